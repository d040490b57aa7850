"""Draw a run: its losses, and what its model does with a text. No display is needed.

Usage:
    python plot.py --out_dir=out                      writes out/loss.png, out/attention.png,
                                                      out/surprise.png, out/neighbours.png
    python plot.py --out_dir=out --start="ROMEO:"     ... of this text, or FILE:path
    python plot.py --out_dir=out --pictures=loss      one of them alone
    python plot.py --out_dir=out-a,out-b              several runs' losses: out-a/losses.png

Beside each PNG there is the same picture as SVG.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

from quill import settings
from quill.errors import InputError, run_command
from quill.files import atomic_write
from quill.settings import option
from sample import read_prompt


@dataclasses.dataclass(frozen=True)
class PlotConfig:
    out_dir: str = option("out", "the run's folder, or several with commas between them")
    pictures: Literal["all", "loss", "attention", "surprise", "neighbours"] = option(
        "all", "which to draw"
    )
    start: str = option("", "the text to look at, or FILE:path; if empty, the model writes one")


# Opaque, so that a dark page does not shine through; an SVG's text remains text.
STYLE = {
    **{"savefig.facecolor": "white", "savefig.dpi": 150, "savefig.bbox": "tight", "font.size": 9},
    **{"svg.fonttype": "none", "svg.hashsalt": "quill", "text.parse_math": False},
}


def main(argv: list[str]) -> int:
    config = settings.load(PlotConfig, argv, usage=__doc__)
    try:
        import matplotlib
    except ImportError as error:
        raise InputError(f"{error}; install the extra: pip install '.[plot]'") from None
    out_dirs = [Path(name) for name in config.out_dir.split(",")]
    with matplotlib.rc_context(STYLE):
        for name, figure in draw(config, out_dirs).items():
            path = out_dirs[0] / f"{name}.png"
            with atomic_write(path) as (file,):
                figure.savefig(file, format="png")
            with atomic_write(path.with_suffix(".svg")) as (file,):
                # Without the date, the same run gives the same file.
                figure.savefig(file, format="svg", metadata={"Date": None})
            print(f"wrote {path} and {path.with_suffix('.svg').name}")
    return 0


def draw(config: PlotConfig, out_dirs: list[Path]) -> dict:
    """-> the figures by name."""
    figures, is_one = {}, len(out_dirs) == 1
    if config.pictures in ("all", "loss"):
        runs = {str(path): read_metrics(path / "metrics.jsonl") for path in out_dirs}
        figures["loss" if is_one else "losses"] = draw_losses(runs)
    elif not is_one:
        raise InputError(f"--pictures={config.pictures} takes one run, not {config.out_dir}")
    if config.pictures != "loss" and is_one:
        text = read_prompt(config.start) if config.start else None
        from quill.views import pictures  # here, not at the top: torch takes a second

        figures |= pictures.draw(out_dirs[0], text, config.pictures)
    return figures


def read_metrics(path: Path) -> list[dict]:
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n")  # none, or cut short by a kill
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); check --out_dir") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if record.get("loss", 0) is None:
                del record["loss"]  # the step's update was skipped
            names = ("train_loss", "val_loss", "loss", "lr")
            numbers = [record[name] for name in names if name in record]
            if type(record["step"]) is not int or not all(type(x) is float for x in numbers):
                raise ValueError("no step with losses")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise InputError(f"{path}, line {number}: not a line of metrics; remove it") from None
        records.append(record)
    if not any({"train_loss", "val_loss"} <= record.keys() for record in records):
        raise InputError(f"{path} holds no evaluation yet")
    return records


def draw_losses(runs: dict[str, list[dict]]):
    """Above the losses of each run, a star at its lowest val loss; below the learning rates."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for i, (name, records) in enumerate(runs.items()):
        color = colormaps["viridis"](0.8 * i / max(1, len(runs) - 1))  # dark to light, in grey too
        draw_run(above, records, color, f"{name}: " if len(runs) > 1 else "", is_first=i == 0)
        below.plot(*columns(records, "lr"), color=color)
    above.set(ylabel="loss (nats per token)")
    below.set(xlabel="step", ylabel="learning rate")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    above.legend()
    return figure


def draw_run(axes, records: list[dict], color, title: str, is_first: bool) -> None:
    evaluations = [record for record in records if {"train_loss", "val_loss"} <= record.keys()]
    steps, losses = columns(evaluations, "val_loss")
    best = losses.index(min(losses))
    labels = {"loss": "batch", "train_loss": "train"} if is_first else {}
    styles = {"loss": {"alpha": 0.35, "linewidth": 0.8}, "train_loss": {"linestyle": "--"}}
    for name, style in styles.items():
        axes.plot(*columns(records, name), color=color, label=labels.get(name), **style)
    axes.plot(
        *(steps, losses, "-*"),
        **{"color": color, "markevery": [best], "markersize": 14, "markeredgecolor": "white"},
        label=f"{title}val, best {losses[best]:.4f} at step {steps[best]}",
    )


def columns(records: list[dict], name: str) -> tuple[list, list]:
    """The steps and the values of the records that have such a value."""
    found = [record for record in records if name in record]
    return [record["step"] for record in found], [record[name] for record in found]


if __name__ == "__main__":
    run_command(main)
