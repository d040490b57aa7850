"""Draw a run as PNG and SVG: its losses, and what its model does with a text. Needs no display.

Usage:
    python -m quill.plot --out_dir=out                      writes out/loss.png, out/attention.png,
                                                            out/surprise.png, out/neighbours.png
    python -m quill.plot --out_dir=out --start="ROMEO:"     the model's pictures of this text, or of
                                                            the file in FILE:path
    python -m quill.plot --out_dir=out --pictures=loss      only one of them
    python -m quill.plot --out_dir=out-a,out-b              the losses of several runs, in one
                                                            picture: out-a/losses.png
    python -m quill.plot --out_dir=out-a,out-b --pictures=time   val losses against seconds
    python -m quill.plot --out_dir=out-rl,out-dpo --pictures=kl   scores of post-training against
                                                            the distance from its start

Beside each PNG the same picture is written as SVG.
"""

import quill.startup  # noqa: F401, I001  first, for Ctrl-C during the imports below
import dataclasses
import os
from pathlib import Path
from typing import Literal

from quill import settings
from quill.errors import InputError, needs_extra, run_command
from quill.files import atomic_write, split_folders
from quill.settings import option
from quill.views import curves

# A white background also on a dark page; text in an SVG stays text.
STYLE = {
    **{"savefig.facecolor": "white", "savefig.dpi": 150, "savefig.bbox": "tight", "font.size": 9},
    **{"svg.fonttype": "none", "svg.hashsalt": "quill", "text.parse_math": False},
}
OF_METRICS = ("loss", "time", "kl")  # for which no model is loaded
Which = Literal["all", "loss", "time", "kl", "attention", "surprise", "neighbours"]


@dataclasses.dataclass(frozen=True)
class PlotConfig:
    out_dir: str = option("out", "the run's folder, or several separated by commas")
    pictures: Which = option("all", "which to draw")
    start: str = option("", "the text to look at, or FILE:path; if empty, the model writes one")


def main(argv: list[str]) -> int:
    config = settings.load(PlotConfig, argv, usage=__doc__)
    os.environ["MPLBACKEND"] = "agg"  # of matplotlib's: files, no windows, whatever is set
    with needs_extra("plot"):
        import matplotlib
    out_dirs = split_folders(config.out_dir)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's matplotlibrc says, TeX for one
        matplotlib.rcParams.update(STYLE)
        for name, figure in draw(config, out_dirs).items():
            for kind in ("png", "svg"):
                metadata = {"Date": None} if kind == "svg" else None  # the same run, the same file
                with atomic_write(out_dirs[0] / f"{name}.{kind}") as (file,):
                    figure.savefig(file, format=kind, metadata=metadata)
            print(f"wrote {out_dirs[0] / name}.png and {name}.svg")
    return 0


def draw(config: PlotConfig, out_dirs: list[Path]) -> dict:
    """-> the figures by name."""
    figures, is_one = {}, len(out_dirs) == 1
    if config.pictures in ("all", *OF_METRICS):
        runs = {str(path): curves.read_metrics(path / "metrics.jsonl") for path in out_dirs}
    if config.pictures in ("kl", "time"):
        drawing = curves.draw_kl if config.pictures == "kl" else curves.draw_time
        figures[config.pictures] = drawing(runs)
    if config.pictures in ("all", "loss"):
        figures["loss" if is_one else "losses"] = curves.draw_losses(runs)
    if not is_one and (config.start or config.pictures not in ("all", *OF_METRICS)):
        raise InputError(
            f"--start and --pictures={config.pictures} take one run, not {config.out_dir}"
        )
    if config.pictures not in OF_METRICS and is_one:
        from quill.views import pictures  # torch takes a second, which the losses do not need

        figures |= pictures.draw(out_dirs[0], config.start, config.pictures)
    return figures


if __name__ == "__main__":
    run_command(main)
