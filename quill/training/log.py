"""What a run reports: lines on the screen, metrics.jsonl, and the dashboards asked for."""

import contextlib
import dataclasses
import datetime
import errno
import json
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

from quill.data import tokenizers
from quill.errors import InputError, flush_or_discard, needs_extra
from quill.files import atomic_write
from quill.training import devices, distributed, reference, run_folder
from quill.training.checkpoint import Progress
from quill.training.optimizers import schedule_warnings

SLOW_RUN_SECONDS = 3600

# How metrics of an evaluation are printed, if not as their name and four digits.
FORMATS = {"val_exact": "{:.2%} of the answers right"}
# What else is in its record.
NO_METRICS = ("step", "sample", "lr", "tokens", "seconds", "expected_low", "expected_high")


class NullLogger:
    """For the processes that report nothing, which are all but rank 0."""

    def __getattr__(self, name: str):
        return lambda *args: None


class Logger:
    """Appends one JSON object a line to metrics.jsonl of a run, and prints the same.

    A resumed run keeps the lines up to its checkpoint; a new run starts a new file.
    """

    def __init__(self, run):
        config = dataclasses.asdict(run.config)
        self.out_dir, self.max_iters = Path(run.config.out_dir), run.config.max_iters
        self.path = self.out_dir / run_folder.METRICS
        self.resumed = dataclasses.replace(run.progress) if run.is_resumed else None
        self.warns_if_slow = run.device.type == "cpu"
        self.smooth_ms_per_step: float | None = None
        self.file = None
        self.dashboards = _open_dashboards(self.out_dir, config, self.resumed)
        self.sample_flag = _start_of_a_sample(run.data)
        self.expected = reference.find(run.config, run.data.meta, run.made_of)
        print_line(self.summary(run))

    def summary(self, run) -> str:
        return run_summary(run)

    def evaluation(self, record: dict, is_best: bool) -> None:
        note = ", best so far" if is_best else ""
        if record["step"] in self.expected:
            low, high = self.expected[record["step"]]
            record |= {"expected_low": low, "expected_high": high}
            note += f", expected {low:.3f} to {high:.3f}"
            note += "" if low <= record["val_loss"] <= high else ": THIS RUN IS OFF"
        self._write(record)
        print_line(evaluation_text(record, note))

    def step(self, record: dict) -> None:
        """A log line."""
        self._write(record)
        loss = math.nan if record["loss"] is None else record["loss"]
        line = f"step {record['step']}/{self.max_iters}: loss {loss:.4f}"
        if record["ms_per_step"] is not None:
            line += self._pace(record)
        print_line(line)

    def _pace(self, record: dict) -> str:
        ms = record["ms_per_step"]
        before = ms if self.smooth_ms_per_step is None else self.smooth_ms_per_step
        self.smooth_ms_per_step = 0.9 * before + 0.1 * ms  # or the time to go would jump
        to_go = self.smooth_ms_per_step / 1000 * (self.max_iters - record["step"])
        text = f", {ms:.1f} ms/step, {record['tokens_per_s']:,.0f} tokens/s"
        text += f", mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
        seconds = min(round(to_go), 10**13)  # no timedelta is longer
        text += f", {datetime.timedelta(seconds=seconds)} to go"
        if self.warns_if_slow and to_go > SLOW_RUN_SECONDS:
            text += f"\nthis will take about {to_go / 3600:.0f} h on this machine; "
            text += "config/shakespeare_char_cpu.py is a model for one without a GPU"
        self.warns_if_slow = False
        return text

    def skipped(self, step: int, n_skipped: int, n_allowed: int) -> None:
        """An update that was not made, because its loss or gradient was not finite."""
        self._write({"step": step, "skipped": n_skipped})
        print_line(f"step {step}: not finite, update skipped ({n_skipped} of {n_allowed})")

    def done(self, progress: Progress) -> None:
        best = f"best val loss {progress.best_val_loss:.4f}"
        command = f"python sample.py --out_dir={shlex.quote(str(self.out_dir))}{self.sample_flag}"
        print_line(f"done after step {progress.step}, {best}; next: {command}")

    def stopped(self, progress: Progress, signal_number: int) -> None:
        command = "python" if distributed.world_size() == 1 else "torchrun ..."
        command += f" train.py --out_dir={shlex.quote(str(self.out_dir))} --init_from=resume"
        name = signal.Signals(signal_number).name
        print_line(f"{name}: saved after step {progress.step}; resume with: {command}")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        for dashboard in self.dashboards:
            dashboard.close()

    def sync(self) -> None:
        """Flush to the disk, so that no checkpoint there is newer than the lines before it."""
        self._open()
        with self._names_file():
            os.fsync(self.file.fileno())

    def _open(self) -> None:
        """Only at the first line: a run that fails before leaves an older file as it was."""
        if self.file is None:
            kept = [] if self.resumed is None else _lines_up_to(self.path, self.resumed)
            with atomic_write(self.path) as (file,):
                file.writelines(kept)
            self.file = self.path.open("a", encoding="utf-8")

    @contextlib.contextmanager
    def _names_file(self):
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)
            raise

    def _write(self, record: dict) -> None:
        self._open()
        with self._names_file():
            self.file.write(json.dumps(record, allow_nan=False) + "\n")
            self.file.flush()
        # TensorBoard shows one value of a name at a step, and a log line of the same step has the
        # learning rate of the update before.
        names = {"lr": "next_lr"} if "val_loss" in record else {}
        known = {names.get(k, k): value for k, value in record.items() if value is not None}
        for dashboard in self.dashboards:
            dashboard.send(known)


def _start_of_a_sample(data) -> str:
    """The flag that sample.py needs where its default, a line end, is not in the vocabulary."""
    try:
        tokenizers.encode_prompt(data.tokenizer, "\n")
        return ""
    except InputError:
        prompt = tokenizers.decode(data.tokenizer, data.val.prompt.tolist())
        return f" --start={shlex.quote(prompt)}"


def print_line(text: str) -> None:
    """Print it. A terminal that was closed since (SIGHUP says so) does not end a run unsaved."""
    try:
        print(text, flush=True)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        flush_or_discard(sys.stdout)


class StepTimer:
    """The pace of training, measured from one log line to the next."""

    def __init__(self, tokens_per_step: int, flops_per_token: float, device, dtype, compiles: bool):
        self.tokens_per_step, self.peak_flops = tokens_per_step, devices.peak_flops(device, dtype)
        self.flops_per_token = flops_per_token / distributed.world_size()  # of this process
        # The first lap is no pace where it includes a compilation or the loading of kernels.
        self.skips_next = compiles or device.type == "cuda"

    def start(self, progress: Progress) -> None:
        self.started = time.perf_counter() - progress.seconds
        self.restart(progress.step)

    def seconds(self) -> float:
        """Of training so far, before a resume included."""
        return time.perf_counter() - self.started

    def restart(self, step: int) -> None:
        """Leave out the time since the last lap, which an evaluation took, say."""
        self.step, self.time = step, time.perf_counter()

    def lap(self, step: int) -> dict:
        """The pace since the last lap, in numbers that are None where it is not known."""
        if self.skips_next:
            self.skips_next = False
            self.restart(step)
            return {"ms_per_step": None, "tokens_per_s": None, "mfu": None}
        seconds = (time.perf_counter() - self.time) / (step - self.step)
        self.restart(step)
        tokens_per_s = self.tokens_per_step / seconds
        mfu = tokens_per_s * self.flops_per_token / self.peak_flops if self.peak_flops else None
        return {"ms_per_step": 1000 * seconds, "tokens_per_s": tokens_per_s, "mfu": mfu}


def run_summary(run) -> str:
    """What train.py's Run trains on what, in a few lines."""
    config, data, n = run.config, run.data, distributed.world_size()
    each = f"{n} processes, each with " if n > 1 else ""
    lines = [
        f"{config.dataset}: {len(data.train):,} train and {len(data.val):,} val tokens, "
        f"{config.tokens_per_step:,} in a step",
        f"model: {run.model.n_parameters():,} parameters on {each}"
        f"{devices.describe(run.device)}, {str(run.dtype).removeprefix('torch.')}",
    ]
    if n_cut := data.train.n_cut:
        lines.append(f"{n_cut:,} pairs are longer than block_size={config.block_size} and cut")
    lines += schedule_warnings(config)
    if run.compiles:
        lines.append("compiling: up to a minute, before and after the first evaluation")
    if run.is_resumed:
        lines.append(f"resuming after step {run.progress.step} of {config.max_iters}")
    return "\n".join(lines)


def evaluation_text(record: dict, note: str = "") -> str:
    """The line of metrics, and below it the sample if there is one."""
    metrics = [
        FORMATS.get(name, f"{name.replace('_', ' ')} {{:.4f}}").format(value)
        for name, value in record.items()
        if name not in NO_METRICS
    ]
    line = f"step {record['step']}: {', '.join(metrics)}{note}"
    return f"{line}\n{record['sample']}" if "sample" in record else line


def _lines_up_to(path: Path, progress: Progress) -> list[bytes]:
    """The lines up to a checkpoint, without one that a kill has cut short."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
            last = progress.evaluated_step if "val_loss" in record else progress.step
            if line.endswith(b"\n") and record["step"] <= last:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return kept


class WandbDashboard:
    """There a resumed run is a second one of the same name, which continues the steps."""

    def __init__(self, wandb, out_dir: Path, config: dict):
        names = {"project": config["wandb_project"], "name": config["wandb_run_name"]}
        folder = os.environ.get("WANDB_DIR") or str(out_dir)
        try:
            self.run = wandb.init(**names, dir=folder, config=config)
        except (wandb.Error, ValueError) as error:
            advice = "WANDB_MODE=offline needs no account"
            raise InputError(f"wandb_log: {error}; {advice}") from None
        # wandb's own step counter would merge two records of one step into one row.
        self.run.define_metric("*", step_metric="step")

    def send(self, record: dict) -> None:
        self.run.log(record)

    def close(self) -> None:
        has_failed = sys.exc_info()[0] is not None  # closed while an error is raised
        self.run.finish(exit_code=int(has_failed))


class TensorboardDashboard:
    def __init__(self, tensorboard, folder: Path, config: dict, resumed: Progress | None):
        # purge_step hides what an earlier run wrote, or this one after its checkpoint.
        step = 0 if resumed is None else resumed.step + 1
        self.writer = tensorboard.SummaryWriter(str(folder), purge_step=step)
        self._add_text("config", "\n".join(f"{name} = {v!r}" for name, v in config.items()), step)

    def send(self, record: dict) -> None:
        for name, value in record.items():
            if name == "sample":
                self._add_text(name, value, record["step"])
            elif name != "step":
                self.writer.add_scalar(name, value, record["step"])

    def _add_text(self, name: str, text: str, step: int) -> None:
        """Indented: texts are shown as Markdown, which would join the lines."""
        self.writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def close(self) -> None:
        self.writer.close()


def _open_dashboards(out_dir: Path, config: dict, resumed: Progress | None) -> list:
    """Imports all first, so that a missing extra is an error before anything is written."""
    with needs_extra("track"):
        if config.get("wandb_log"):
            import wandb
        if config.get("tensorboard_log"):
            import torch.utils.tensorboard as tensorboard
    dashboards: list = []
    if config.get("wandb_log"):
        dashboards.append(WandbDashboard(wandb, out_dir, config))
    if config.get("tensorboard_log"):
        folder = out_dir / "tensorboard"
        dashboards.append(TensorboardDashboard(tensorboard, folder, config, resumed))
    return dashboards
