"""A scaling law of your own: which size is best for a number of operations, and what it reaches.

Usage:
    python -m quill.scaling --dataset=classics

Models of several sizes are trained for several budgets of operations, each by train.py with
config/scaling.py. A law is fitted to their val losses, and a prediction written down before the run
that tests it is made. The same command continues a study that was stopped.
"""

import quill.startup  # noqa: F401, I001  first, for Ctrl-C during the imports below
import dataclasses
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from model import GPT, GPTConfig
from quill import settings
from quill.data import dataset_files
from quill.errors import (
    EXIT_BAD_INPUT,
    InputError,
    RunError,
    blames_input,
    needs_extra,
    run_command,
)
from quill.files import atomic_write, dataset_folder, file_lock, open_file, sha256_of_file
from quill.settings import option
from quill.views import curves, scaling_law
from quill.views.scaling_law import Run

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "config" / "scaling.py"
SIZES = ((2, 32), (2, 48), (3, 64), (4, 80), (4, 112), (5, 144))  # layers, width
LARGER_SIZES = ((6, 176), (6, 208))  # for the prediction
HEAD_SIZE = 16
SWITCHES = {"block_size": 64, "position": "rotary", "mlp": "swiglu", "token_shift": True}
BATCH_SIZE = 24
RATES = {"learning_rate": 8e-3, "muon_learning_rate": 0.03}
# Of these rates, tried for each size with the smallest budget, and with the largest.
FACTORS = ((1.0, 2.0, 4.0), (0.5, 1.0, 2.0))
SEED = 1337
AHEAD = 4  # times the largest budget, for the prediction


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    dataset: str = option("classics", "folder below data/, of a text of tens of megabytes")
    out_dir: str = option("out-scaling", "folder; the runs, law and picture are in its DATASET/")
    smallest: float = option(1e12, "the smallest budget, in operations", min=1e9, max=1e21)
    budgets: int = option(4, "how many budgets, each twice the one before", min=2, max=20)
    seeds: int = option(3, "runs of each size and budget", min=1, max=100)
    jobs: int = option(2, "runs at a time, of one thread each", min=1, max=1000)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run to make. Its operations come as near to the budget as whole steps do."""

    size: tuple[int, int]
    budget: float
    factor: float  # of the rates
    seed: int
    n_parameters: int
    n_steps: int

    @property
    def name(self) -> str:
        n_layer, n_embd = self.size
        return f"{self.budget:.4g}-{n_layer}x{n_embd}-{self.factor:g}-{self.seed}"

    @property
    def n_tokens(self) -> int:
        return self.n_steps * BATCH_SIZE * SWITCHES["block_size"]


def main(argv: list[str]) -> int:
    config = settings.load(ScalingConfig, argv, usage=__doc__)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with needs_extra("plot"):
        import matplotlib  # noqa: F401  fails before the runs, not after them
    meta, _ = dataset_files.read(dataset_folder(config.dataset))
    study = Study(config, meta)
    with file_lock(study.folder):
        study.refuse_another()
        factors = study.tune()
        runs = study.make_all(study.grid(factors))
        try:
            law, others = scaling_law.fit(runs), scaling_law.bootstrap(runs)
        except ValueError as error:
            raise RunError(str(error)) from None
        print("\n".join(scaling_law.describe(law, others)))
        figure = scaling_law.draw(runs, law)
        with atomic_write(study.folder / "scaling.png") as (file,):
            figure.savefig(file, format="png", dpi=150)
        plan, predicted = study.predict(law, others, factors)
        [run] = study.make_all([plan])
        print(f"predicted {predicted} for {plan.name}")
        print(f"reached {run.val_loss:.4f}")
    return 0


class Study:
    """The runs of a study, each made once; those of its folder are not made again."""

    def __init__(self, config: ScalingConfig, meta: dataset_files.Meta):
        self.config, self.folder, self.meta = config, Path(config.out_dir, config.dataset), meta
        self.budgets = [config.smallest * 2**i for i in range(config.budgets)]
        self.processes: list[subprocess.Popen] = []  # of the runs, also of those that have ended

    def refuse_another(self) -> None:
        """Raises InputError where the folder's runs are of another text or of other settings."""
        path = self.folder / "study.json"
        own = {"text": self.meta.sha256, "vocab_size": self.meta.vocab_size}
        own |= {"switches": SWITCHES, "batch_size": BATCH_SIZE, "rates": RATES}
        own |= {"smallest": self.config.smallest, "config": sha256_of_file(CONFIG)}
        if not path.exists():
            with atomic_write(path) as (file,):
                file.write(json.dumps(own).encode())
        described = blames_input(f"{path} describes no study, remove it", ValueError)
        with described, open_file(path) as file:
            there = json.load(file)
        if there != own:
            raise InputError(
                f"{self.folder} has runs of another text or of other settings: choose another "
                "--out_dir"
            )

    def tune(self) -> dict[tuple[tuple[int, int], float], float]:
        """Best factor of the rates by (size, budget), for the smallest budget and the largest."""
        plans = [
            self.plan(size, budget, factor)
            for budget, factors in zip((self.budgets[0], self.budgets[-1]), FACTORS, strict=True)
            for size in SIZES
            for factor in factors
        ]
        tried = zip(plans, self.make_all(plans), strict=True)
        from_worst = sorted(tried, key=lambda pair: -pair[1].val_loss)
        return {(plan.size, plan.budget): plan.factor for plan, _ in from_worst}  # the best is last

    def tuned_plan(self, factors: dict, size, budget: float, seed: int = SEED) -> Plan:
        """Between and beyond the two tuned budgets the rates follow a power of the budget.

        Sizes that were not tuned have the rates of the largest one that was.
        """
        tuned_size = size if size in SIZES else SIZES[-1]
        smallest, largest = self.budgets[0], self.budgets[-1]
        low, high = factors[tuned_size, smallest], factors[tuned_size, largest]
        power = math.log(budget / smallest) / math.log(largest / smallest)
        return self.plan(size, budget, low * (high / low) ** power, seed)

    def grid(self, factors: dict) -> list[Plan]:
        """The largest runs first, so that at the end none is waited for alone."""
        return [
            self.tuned_plan(factors, size, budget, SEED + i)
            for budget in reversed(self.budgets)
            for size in SIZES
            for i in range(self.config.seeds)
        ]

    def plan(self, size, budget: float, factor: float, seed: int = SEED) -> Plan:
        n_layer, n_embd = size
        sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_embd // HEAD_SIZE}
        with torch.device("meta"):  # to count
            model = GPT(GPTConfig(**sizes, **SWITCHES, vocab_size=self.meta.vocab_size, bias=False))
        flops_per_step = model.flops_per_token() * BATCH_SIZE * SWITCHES["block_size"]
        n_steps = max(1, round(budget / flops_per_step))
        return Plan(size, budget, factor, seed, model.n_parameters(), n_steps)

    def predict(self, law, others, factors) -> tuple[Plan, str]:
        """What the best size reaches with a larger budget; what was once written down stays."""
        budget, sizes = AHEAD * self.budgets[-1], (*SIZES, *LARGER_SIZES)
        plans = [self.tuned_plan(factors, size, budget) for size in sizes]
        plan = min(plans, key=lambda plan: law.loss(plan.n_parameters, plan.n_tokens))
        path = self.folder / "prediction.json"
        if not path.exists():
            losses = [one.loss(plan.n_parameters, plan.n_tokens) for one in (law, *others)]
            content = {"run": plan.name, "val_loss": losses[0]}
            content["interval"] = scaling_law.interval(losses[1:])
            with atomic_write(path) as (file,):
                file.write(json.dumps(content).encode())
        kinds = ValueError, KeyError, TypeError
        with (
            blames_input(f"{path} holds no prediction, remove it", *kinds),
            open_file(path) as file,
        ):
            predicted = json.load(file)
            run, loss = predicted["run"], float(predicted["val_loss"])
            low, high = map(float, predicted["interval"])
        if run != plan.name:
            raise InputError(f"{path} is of {run}, not of {plan.name}: remove it")
        return plan, f"{loss:.4f} ({low:.4f} to {high:.4f})"

    def make_all(self, plans: list[Plan]) -> list[Run]:
        """Those that are not finished are made, a few at a time."""
        missing = [plan for plan in plans if self.result(plan) is None]
        work = sum(plan.budget for plan in missing)
        done, started = 0.0, time.monotonic()
        pool = ThreadPoolExecutor(self.config.jobs)
        try:
            for plan, run in zip(missing, pool.map(self.make, missing), strict=True):
                done += plan.budget
                seconds = (work - done) / done * (time.monotonic() - started)
                to_go = datetime.timedelta(seconds=round(seconds))
                passes = plan.n_tokens / self.meta.train_tokens
                note = f", {passes:.1f} passes over the text" if passes > 1 else ""
                print(f"{plan.name}: val loss {run.val_loss:.4f}{note}; {to_go} to go", flush=True)
        except SystemExit:  # SIGTERM; of Ctrl-C the runs have heard themselves
            pool.shutdown(wait=False, cancel_futures=True)
            for process in self.processes:
                process.terminate()  # it saves, for the next time
            raise
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C no further run is begun
        return [self.result(plan) for plan in plans]

    def make(self, plan: Plan) -> Run:
        argv = [sys.executable, str(ROOT / "train.py"), str(CONFIG)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([*argv, *self.flags(plan)], env=environment, **streams)
        self.processes.append(process)
        _, errors = process.communicate()
        if process.returncode:
            kind = InputError if process.returncode == EXIT_BAD_INPUT else RunError
            raise kind(f"{plan.name} ended with code {process.returncode}: {errors[-300:]}")
        return self.result(plan)

    def flags(self, plan: Plan) -> list[str]:
        n_layer, n_embd = plan.size
        options = {"dataset": self.config.dataset, "out_dir": self.folder / plan.name}
        options |= {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_embd // HEAD_SIZE, **SWITCHES}
        options |= {name: rate * plan.factor for name, rate in RATES.items()}
        options |= {"batch_size": BATCH_SIZE, "max_iters": plan.n_steps, "seed": plan.seed}
        options |= {"init_std": n_embd**-0.5, "warmup_iters": plan.n_steps // 20}
        return [f"--{name}={value}" for name, value in options.items()] + ["--init_from=auto"]

    def result(self, plan: Plan) -> Run | None:
        """None while the run is not finished."""
        path = self.folder / plan.name / "metrics.jsonl"
        if not path.exists():
            return None
        losses = dict(zip(*curves.columns(curves.read_records(path), "val_loss"), strict=True))
        if plan.n_steps not in losses:
            return None
        return Run(plan.budget, plan.n_parameters, plan.n_tokens, losses[plan.n_steps])


if __name__ == "__main__":
    run_command(main)
