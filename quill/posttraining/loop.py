"""The loop that rl, dpo and reward share: updates, evaluations, saves, signals, an exact resume.

It is train.py's, for one process, with losses that a task makes. A task has:

    model, model_config        what is trained, and how a checkpoint describes it
    losses(step)               yields the loss of each update of a step, and a dict of what to
                               report, with the `tokens` that it used; each update is made before
                               the next loss is asked for
    evaluate()                 -> a dict of metrics, with a val_loss
    summary()                  -> what it does, in a line

What a step draws depends on (seed, step) alone, so that a resume needs no random state.
"""

import contextlib
import dataclasses
import math
import os
import shlex
import signal
import time
from pathlib import Path
from typing import Literal

import torch

from model import GPTConfig
from quill import settings
from quill.errors import EXIT_DONE, InputError, RunError, Stopped, blames_input, stop_signals
from quill.files import file_lock
from quill.interop import pretrained
from quill.interop.pretrained import Pretrained
from quill.interop.start import find_start, lies_in
from quill.settings import DType, option, options_of
from quill.training import checkpoint, checks, devices, run_folder, state_dict
from quill.training.checkpoint import Progress
from quill.training.ema import EMA
from quill.training.log import Logger, evaluation_text, print_line
from quill.training.nonfinite import LossScaler, NonFiniteGuard
from quill.training.optimizers import (
    OptimizerOptions,
    get_lr,
    make_optimizers,
    schedule_warnings,
    set_lr,
)
from quill.training.saving import Saver
from quill.training.splits import open_splits

UpdateOptions = options_of(
    OptimizerOptions,
    leave_out=("average_decay",),
    **{"learning_rate": 1e-4, "max_iters": 200, "weight_decay": 0.0, "warmup_iters": 10},
    **{"lr_schedule": "linear", "min_lr": 0.0},
)


@dataclasses.dataclass(frozen=True)
class LoopOptions(UpdateOptions):
    start_from: str = option("", "folder of the run, or other weights, to start from")
    out_dir: str = option("out-post", "folder for the checkpoint and metrics")
    dataset: str = option("", "folder below data/; if empty, the one it was trained on")
    init_from: Literal["scratch", "resume", "auto"] = option(
        "scratch", "scratch: from start_from; resume: from ckpt.pt; auto: resume if there is one"
    )
    overwrite: bool = option(False, "start anew in a folder that has a run; moves it to previous-N")
    eval_interval: int = option(50, "steps between evaluations", min=1)
    eval_only: bool = option(False, "evaluate once, print and stop; writes nothing")
    log_interval: int = option(10, "steps between log lines", min=1)
    checkpoint_seconds: float = option(60.0, "between saves, at evaluations; 0: at each", min=0)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: DType = option("float32", "dtype of matrix products")
    seed: int = option(1337, "of everything that is drawn", min=0, max=2**32 - 1)


class Loop:
    """A run of a task, which this file's first lines describe."""

    def __init__(self, config: LoopOptions, saved: dict | None, start: Pretrained, make_task):
        """make_task(loop) is called when all else that the task needs is there."""
        self.config, self.start = config, start
        self.device = devices.pick_device(config.device)
        self.dtype = devices.pick_dtype(config.dtype, self.device)
        if self.dtype == torch.float16:
            raise InputError(
                "dtype=float16 needs loss scaling, which is not done here: take another"
            )
        devices.set_up_device(self.device, deterministic=False, dropout=0.0)
        self.data = open_splits(config.dataset, start.config.block_size, self.device)
        names = config.dataset, self.data, start, config.start_from
        checks.check_tokenizer(*names)
        if saved is None:  # a resume compares the run's own
            checks.note_replaced_text(*names)
        torch.manual_seed(config.seed)
        # The digests of what the run is made of, by the options that name it; a task adds its own.
        self.made_of = {"start_from": state_dict.digest(start.weights)}
        self.task = make_task(self)
        self.model: torch.nn.Module = self.task.model
        self.optimizers = make_optimizers(self.model, config, self.dtype)
        self.guard = NonFiniteGuard(config, self.device)
        self.progress, self.is_resumed = Progress(), saved is not None
        self.ema, self.scaler = EMA(self.model, 0.0), LossScaler(self.device.type, enabled=False)
        self.signals: list[int] = []  # received, that ask to stop
        if saved is not None:
            checks.check_resume(config, self.data, None, saved)
            checks.check_made_of(config, self.made_of, saved)
            parts = (self.model, self.optimizers, self.ema, self.scaler, self.guard)
            path = Path(config.out_dir, checkpoint.LATEST)
            self.progress = state_dict.load_training_state(saved, path, *parts)

    def run(self) -> int:
        """To the end, or until a signal; -> exit code."""
        if self.config.eval_only:
            print(evaluation_text(self.evaluate()), flush=True)
            return EXIT_DONE
        self.log = LoopLogger(self)
        if not self.is_resumed:
            run_folder.move_aside(Path(self.config.out_dir))
        self.saver = Saver(Path(self.config.out_dir), self.config.checkpoint_seconds)
        self.started = time.perf_counter() - self.progress.seconds
        signals = stop_signals(acts_at_second=True)
        with contextlib.closing(self.log), signals as self.signals, self.saver:
            try:
                self.to_the_end()
            except Stopped as stopped:
                self.save()
                self.saver.wait()
                self.log.stopped(self.progress, stopped.signal_number)
                return 128 + stopped.signal_number
            self.saver.wait()
            self.log.done(self.progress)
            return EXIT_DONE

    def to_the_end(self) -> None:
        progress, config = self.progress, self.config
        while True:
            self.saver.check()
            self.check_signals()
            is_finished = progress.step >= config.max_iters
            is_due = progress.step % config.eval_interval == 0 or is_finished
            if is_due and progress.evaluated_step != progress.step:
                self.evaluate_and_save(is_finished)
            if is_finished:
                return
            record = self.step()
            if progress.step % config.log_interval == 0 or progress.step == 1:
                self.log.step(record)

    def check_signals(self) -> None:
        """For a task to call as well, between the parts of what takes long."""
        if self.signals:
            raise Stopped(max(self.signals))

    def step(self) -> dict:
        """The updates of a step; -> the means of what they report."""
        started, step = time.perf_counter(), self.progress.step
        set_lr(self.optimizers, self.config, step)
        reports = [self.update(loss, step) | report for loss, report in self.task.losses(step)]
        self.guard.report(self.progress.skipped_steps, self.log)
        self.progress.step += 1
        self.progress.tokens += sum(report.pop("tokens") for report in reports)
        record = {"step": self.progress.step}
        for name in reports[0]:
            values = [report[name] for report in reports if math.isfinite(report[name])]
            record[name] = sum(values) / len(values) if values else None
        record["lr"] = get_lr(self.config, step)
        record["ms_per_step"] = 1000 * (time.perf_counter() - started)
        return record

    def update(self, loss, step: int) -> dict:
        loss.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        max_norm = self.config.grad_clip or math.inf
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        number = torch.tensor(step, device=self.device)
        found_inf = self.guard.record(loss.detach(), grad_norm, number)
        for optimizer in self.optimizers:
            optimizer.found_inf = found_inf
            if self.device.type != "mps" or not found_inf:  # MPS kernels ignore found_inf
                optimizer.step()
            optimizer.zero_grad()
        return {"objective": loss.item(), "grad_norm": grad_norm.item()}

    def evaluate(self) -> dict:
        record = {"step": self.progress.step, **self.task.evaluate()}
        if not all(map(math.isfinite, record.values())):
            raise RunError(f"{evaluation_text(record)}: not finite, not saved; lower learning_rate")
        return record

    def evaluate_and_save(self, is_finished: bool) -> None:
        record = self.evaluate()
        self.progress.evaluated_step = self.progress.step
        self.progress.best_val_loss = min(self.progress.best_val_loss, record["val_loss"])
        record["lr"] = get_lr(self.config, self.progress.step)
        seconds = round(time.perf_counter() - self.started, 3)
        self.log.evaluation(record | {"tokens": self.progress.tokens, "seconds": seconds}, False)
        if is_finished or self.saver.is_due(always=True):
            self.save()

    def save(self) -> None:
        """ckpt.pt alone: the latest policy is the one to use, there is no best.pt."""
        self.progress.seconds = time.perf_counter() - self.started
        contents = state_dict.weights_and_config(self, self.task.model_config)
        contents |= state_dict.training_state(self.optimizers, self.ema, self.scaler)
        contents["progress"] = dataclasses.asdict(self.progress)
        contents["command"], contents["made_of"] = module_of(self.task), self.made_of
        self.saver.wait()
        self.log.sync()
        self.saver.start(contents)


class LoopLogger(Logger):
    """Prints whatever a task reports."""

    def __init__(self, loop: Loop):
        self.module = module_of(loop.task)
        super().__init__(loop)

    def summary(self, loop: Loop) -> str:
        lines = [f"{loop.config.dataset}: {loop.task.summary()}"]
        lines.append(
            f"model: {loop.model.n_parameters():,} parameters from {loop.config.start_from} on "
            f"{devices.describe(loop.device)}, {str(loop.dtype).removeprefix('torch.')}"
        )
        if loop.is_resumed:
            lines.append(f"resuming after step {loop.progress.step} of {loop.config.max_iters}")
        return "\n".join(lines + schedule_warnings(loop.config))

    def step(self, record: dict) -> None:
        self._write(record)
        shown = {name: value for name, value in record.items() if name not in ("step", "lr")}
        values = [
            f"{name.replace('_', ' ')} {math.nan if value is None else value:.4g}"
            for name, value in shown.items()
        ]
        print_line(f"step {record['step']}/{self.max_iters}: {', '.join(values)}")

    def done(self, progress: Progress) -> None:
        print_line(f"done after step {progress.step}; the result is in {self.out_dir}")

    def stopped(self, progress: Progress, signal_number: int) -> None:
        name, folder = signal.Signals(signal_number).name, shlex.quote(str(self.out_dir))
        command = f"python {self.module} --out_dir={folder} --init_from=resume"
        print_line(f"{name}: saved after step {progress.step}; resume with: {command}")


def run_task(options: type[LoopOptions], argv: list[str], usage: str, make_task) -> int:
    """Make or continue the run that the command line describes; -> exit code."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("this command runs in one process, without torchrun")
    config = settings.load(options, argv, usage=usage)
    folder = run_folder.path_of(config.out_dir)
    with contextlib.nullcontext() if config.eval_only else file_lock(folder):
        config, saved, _ = find_start(config, argv, usage, module_of(make_task))
        start = load_start(config)
        config = dataclasses.replace(config, dataset=config.dataset or start.dataset or "")
        with devices.out_of_memory_advice("fewer prompts, completions or pairs at a time"):
            return Loop(config, saved, start, make_task).run()


def module_of(task) -> str:
    """How Python is called to run a task, or a class of tasks."""
    return f"-m quill.{task.command}"


def load_start(config: LoopOptions) -> Pretrained:
    """The weights to start from, without dropout.

    Raises InputError where they are not given, or the run's own.
    """
    if not config.start_from:
        raise InputError("give --start_from=DIR, the folder of the run to start from")
    if lies_in(config.start_from, config.out_dir):
        raise InputError(
            f"out_dir={config.out_dir} is the run that it starts from: choose another folder"
        )
    with blames_input("start_from", InputError):  # which a resume has from the checkpoint
        start = pretrained.load(config.start_from)
    if isinstance(start.config, GPTConfig):  # what it writes is drawn from what is trained
        start = dataclasses.replace(start, config=dataclasses.replace(start.config, dropout=0.0))
    return start
