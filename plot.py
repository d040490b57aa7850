"""Draw the loss curves of a run.

Usage:
    python plot.py --out_dir=out      writes out/loss.png
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import settings
from errors import InputError, run_script
from settings import option


@dataclasses.dataclass(frozen=True)
class PlotConfig:
    out_dir: str = option("out", "the run's folder: its metrics.jsonl is read")


def main(argv: list[str]) -> int:
    config = settings.load(PlotConfig, argv, usage=__doc__)
    out_dir = Path(config.out_dir)
    records = read_metrics(out_dir / "metrics.jsonl")
    path = out_dir / "loss.png"
    draw_losses(records, path)
    print(f"wrote {path}")
    return 0


def read_metrics(path: Path) -> list[dict]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); check --out_dir") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if record.get("loss", 0) is None:
                del record["loss"]  # the step's update was skipped
            losses = [record[name] for name in ("train_loss", "val_loss", "loss") if name in record]
            if type(record["step"]) is not int or not all(type(loss) is float for loss in losses):
                raise ValueError("no step with losses")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise InputError(f"{path}, line {number}: not a line of metrics; remove it") from None
        records.append(record)
    if not any({"train_loss", "val_loss"} <= record.keys() for record in records):
        raise InputError(f"{path} holds no evaluation yet")
    return records


def draw_losses(records: list[dict], path: Path) -> None:
    """The batches' losses in grey, the evaluations' as lines, the lowest val loss marked."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f"{error}; install the extra: pip install '.[plot]'") from None
    evaluations = [record for record in records if {"train_loss", "val_loss"} <= record.keys()]
    batches = [record for record in records if "loss" in record]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*columns(batches, "loss"), color="0.7", linewidth=1, label="batch")
    axes.plot(*columns(evaluations, "train_loss"), "o-", color="tab:blue", label="train")
    axes.plot(*columns(evaluations, "val_loss"), "o-", color="tab:orange", label="val")
    best = min(evaluations, key=lambda record: record["val_loss"])
    axes.annotate(
        f"{best['val_loss']:.4f} at step {best['step']}",
        (best["step"], best["val_loss"]),
        xytext=(-10, 30),
        textcoords="offset points",
        ha="right",
        arrowprops={"arrowstyle": "->"},
    )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def columns(records: list[dict], name: str) -> tuple[list, list]:
    return [record["step"] for record in records], [record[name] for record in records]


if __name__ == "__main__":
    run_script(main)
