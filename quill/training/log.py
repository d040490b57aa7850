"""What a run tells: lines on the screen, metrics.jsonl, and the dashboards that were asked for."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from quill.errors import InputError
from quill.files import atomic_write

if TYPE_CHECKING:
    from quill.training.snapshot import Progress

SLOW_RUN_SECONDS = 3600


class Silence:
    """The report of a process that has nothing to tell: another one does."""

    def evaluation(self, record: dict, is_best: bool) -> None: ...

    def step(self, record: dict, shows_pace: bool, is_slow_device: bool) -> None: ...

    def skipped(self, step: int, n_skipped: int, most: int) -> None: ...

    def close(self) -> None: ...


class Report:
    """Appends one JSON object a line to metrics.jsonl and says the same on the screen.

    A resumed run keeps the lines up to its checkpoint's step; a fresh one starts a new file.
    """

    def __init__(self, out_dir: Path, config: dict, resumed: Progress | None):
        self.max_iters = config["max_iters"]
        self.path = out_dir / "metrics.jsonl"
        self.resumed = resumed
        self.file = None
        self.dashboards = _open_dashboards(out_dir, config, resumed)

    def evaluation(self, record: dict, is_best: bool) -> None:
        self._write(record)
        print(evaluation_text(record, ", best so far" if is_best else ""), flush=True)

    def step(self, record: dict, shows_pace: bool, is_slow_device: bool) -> None:
        """A log line; `shows_pace` is false while the time of a step is still a compiler's."""
        self._write(record)
        to_go = record["ms_per_step"] / 1000 * (self.max_iters - record["step"])
        loss = math.nan if record["loss"] is None else record["loss"]
        line = (
            f"step {record['step']}/{self.max_iters}: loss {loss:.4f}, "
            f"{record['ms_per_step']:.1f} ms/step, {record['tokens_per_s']:,.0f} tokens/s"
        )
        line += f", mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
        line += f", {_clock(to_go)} to go" if shows_pace else ""
        print(line, flush=True)
        if is_slow_device and to_go > SLOW_RUN_SECONDS:
            print(
                f"this will take about {to_go / 3600:.0f} h on this machine; "
                "config/shakespeare_char_cpu.py is a model for one without a GPU",
                flush=True,
            )

    def skipped(self, step: int, n_skipped: int, most: int) -> None:
        """An update that was not made, because its loss or gradient was not finite."""
        self._write({"step": step, "skipped": n_skipped})
        print(f"step {step}: not finite, update skipped ({n_skipped} of {most})", flush=True)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        for dashboard in self.dashboards:
            dashboard.close()

    def sync(self) -> None:
        """Make sure that no checkpoint is newer on the disk than the lines that led to it."""
        self._open()
        os.fsync(self.file.fileno())

    def _open(self) -> None:
        """Only now: a run that fails before it has anything to say leaves an older file whole."""
        if self.file is None:
            kept = [] if self.resumed is None else _lines_up_to(self.path, self.resumed)
            with atomic_write(self.path) as (file,):
                file.writelines(kept)
            self.file = self.path.open("a", encoding="utf-8")

    def _write(self, record: dict) -> None:
        self._open()
        try:
            self.file.write(json.dumps(record, allow_nan=False) + "\n")
            self.file.flush()
        except OSError as error:
            error.filename = str(self.path)
            raise
        # TensorBoard shows one value of a name at a step, and a log line of the same step has the
        # rate of the update before.
        names = {"lr": "next_lr"} if "val_loss" in record else {}
        known = {names.get(k, k): value for k, value in record.items() if value is not None}
        for dashboard in self.dashboards:
            dashboard.send(known)


class Pace:
    """Seconds a step takes, measured from one log line to the next."""

    def __init__(self):
        self.laps = 0
        self.restart(0)

    def restart(self, step: int) -> None:
        """Leave out the time since the last lap: an evaluation, say."""
        self.step, self.time = step, time.perf_counter()

    def lap(self, step: int) -> float:
        seconds = (time.perf_counter() - self.time) / (step - self.step)
        self.laps += 1
        self.restart(step)
        return seconds


def loss_line(record: dict) -> str:
    losses = f"train loss {record['train_loss']:.4f}, val loss {record['val_loss']:.4f}"
    exact = f", {record['val_exact']:.2%} of the answers right" if "val_exact" in record else ""
    return f"step {record['step']}: {losses}{exact}"


def evaluation_text(record: dict, note: str = "") -> str:
    """The line of losses, and below it the sample where there is one."""
    losses = loss_line(record) + note
    return f"{losses}\n{record['sample']}" if "sample" in record else losses


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _lines_up_to(path: Path, progress: Progress) -> list[bytes]:
    """The lines that a checkpoint has behind it, without one that a kill cut short."""
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            record = json.loads(line)
            last = progress.evaluated_step if "val_loss" in record else progress.step
            if line.endswith(b"\n") and record["step"] <= last:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


class WandbDashboard:
    """A resumed run is a second one of the same name there, whose steps go on from the first's."""

    def __init__(self, wandb, out_dir: Path, config: dict):
        names = {"project": config["wandb_project"], "name": config["wandb_run_name"]}
        folder = os.environ.get("WANDB_DIR") or str(out_dir)
        try:
            self.run = wandb.init(**names, dir=folder, config=config)
        except (wandb.Error, ValueError) as error:
            advice = "WANDB_MODE=offline needs no account"
            raise InputError(f"wandb_log: {error}; {advice}") from None
        # Its own count of steps only grows, and two records of one step would become one row.
        self.run.define_metric("*", step_metric="step")

    def send(self, record: dict) -> None:
        self.run.log(record)

    def close(self) -> None:
        has_failed = sys.exc_info()[0] is not None  # an error is on its way through here
        self.run.finish(exit_code=int(has_failed))


class TensorboardDashboard:
    def __init__(self, tensorboard, folder: Path, config: dict, resumed: Progress | None):
        # From here on, hide what an earlier run left there, or this one after its checkpoint.
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
        """Indented, or its lines would be joined: texts are shown as Markdown."""
        self.writer.add_text(name, "    " + text.replace("\n", "\n    "), step)

    def close(self) -> None:
        self.writer.close()


def _open_dashboards(out_dir: Path, config: dict, resumed: Progress | None) -> list:
    """Import all first: when an extra is missing nothing has been written."""
    wandb = _import_extra("wandb") if config["wandb_log"] else None
    tensorboard = _import_extra("torch.utils.tensorboard") if config["tensorboard_log"] else None
    dashboards: list = []
    if wandb is not None:
        dashboards.append(WandbDashboard(wandb, out_dir, config))
    if tensorboard is not None:
        folder = out_dir / "tensorboard"
        dashboards.append(TensorboardDashboard(tensorboard, folder, config, resumed))
    return dashboards


def _import_extra(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{error}; install the extra: pip install '.[track]'") from None
