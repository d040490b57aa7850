"""The losses of runs over their steps, from metrics.jsonl. No torch is needed."""

import json
from pathlib import Path

from quill.errors import InputError, blames_input
from quill.files import open_file

# The more of these the better; with the style of their lines.
SCORES = {
    "reward": ":",
    "val_reward": "-o",
    "val_judge": "-s",
    "val_exact": "-^",
    "val_pairs": "-v",
}

DRAWN = ("train_loss", "loss", "lr", "seconds", "expected_low", "expected_high")  # and val_*


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; raises InputError for one without an evaluation."""
    records = read_records(path)
    if not any("val_loss" in record for record in records):
        raise InputError(f"{path} holds no evaluation yet")
    return records


def read_records(path: Path) -> list[dict]:
    """The same, also of a run that has no evaluation yet."""
    with open_file(path) as file:
        # After the last line end there is nothing, or a line cut short by a kill.
        *lines, _ = file.read().split(b"\n")
    records = []
    kinds = ValueError, TypeError, KeyError, AttributeError, RecursionError
    for number, line in enumerate(lines, start=1):
        with blames_input(f"{path}, line {number}: not a line of metrics, remove it", *kinds):
            record = json.loads(line)
            if record.get("loss", 0) is None:
                del record["loss"]  # the step's update was skipped
            numbers = [x for name, x in record.items() if name.startswith("val_") or name in DRAWN]
            are_drawable = all(type(x) is float and not abs(x) > 1e30 for x in numbers)
            are_drawable &= ("expected_low" in record) == ("expected_high" in record)
            if type(record["step"]) is not int or abs(record["step"]) > 1e15 or not are_drawable:
                raise ValueError("no step with losses")
        records.append(record)
    return records


def draw_losses(runs: dict[str, list[dict]]):
    """A figure of each run's losses, with a star at the lowest val loss, above learning rates.

    Between them, where a run has any, the scores of post-training.
    """
    from matplotlib.figure import Figure

    scores = [
        name for name in SCORES if any(name in r for records in runs.values() for r in records)
    ]
    figure = Figure(figsize=(8, 7 if scores else 5), layout="constrained")
    ratios = (3, 2, 1) if scores else (3, 1)
    above, *between, below = figure.subplots(len(ratios), sharex=True, height_ratios=ratios)
    for i, (name, records) in enumerate(runs.items()):
        color = color_of(i, len(runs))
        batch, train = ("batch", "train") if i == 0 else (None, None)  # once in the legend
        if any("train_loss" in record for record in records):  # not in post-training
            thin = {"alpha": 0.35, "linewidth": 0.8}
            above.plot(*columns(records, "loss"), color=color, label=batch, **thin)
            above.plot(*columns(records, "train_loss"), "--", color=color, label=train)
        steps, losses = columns(records, "val_loss")
        best = losses.index(min(losses))
        title = f"{name}: " if len(runs) > 1 else ""
        label = f"{title}val, best {losses[best]:.4f} at step {steps[best]}"
        star = {"markevery": [best], "markersize": 14, "markeredgecolor": "white"}
        above.plot(steps, losses, "-*", color=color, label=label, **star)
        steps, low = columns(records, "expected_low")
        if steps:  # a config that was measured
            band = {"color": color, "alpha": 0.2, "linewidth": 0, "label": f"{title}val, expected"}
            above.fill_between(steps, low, columns(records, "expected_high")[1], **band)
        below.plot(*columns(records, "lr"), color=color)
        for score in scores:
            style = {"color": color, "label": score.replace("_", " ") if i == 0 else None}
            between[0].plot(*columns(records, score), SCORES[score], **style, markersize=4)
    above.set(ylabel="loss (nats per token)")
    below.set(xlabel="step", ylabel="learning rate")
    if scores:
        between[0].set(ylabel="score")
        between[0].legend()
    for axes in (above, *between, below):
        tidy(axes)
    above.legend()
    return figure


def draw_kl(runs: dict[str, list[dict]]):
    """A figure of what post-training gained, and of what that cost: scores against val_kl.

    Above the judge's score, below the reward that the policy was trained on: where that goes on to
    rise while the judge's falls, the policy exploits the errors of the reward model (Gao et al.
    2022). Runs that begin at the same weights begin at the same dot.
    """
    names = [name for records in runs.values() for r in records if "val_kl" in r for name in r]
    scores = [name for name in ("val_judge", "val_reward") if name in names]
    if not scores:
        raise InputError("no evaluation has a val_judge or val_reward to draw against val_kl")
    figure, rows = new_lines(runs, "val_kl", scores)
    rows[-1].set(xlabel="KL from the start (nats per token)")
    return figure


def draw_time(runs: dict[str, list[dict]]):
    """A figure of each run's val loss against the seconds of its training, after step 0."""
    from matplotlib.ticker import LogFormatter

    trained = {name: [r for r in records if r["step"] > 0] for name, records in runs.items()}
    figure, (axes,) = new_lines(trained, "seconds", ["val_loss"])
    axes.set(xlabel="seconds", ylabel="val loss (nats per token)", xscale="log")
    axes.xaxis.set_major_formatter(LogFormatter())  # plain numbers
    axes.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    return figure


def new_lines(runs: dict[str, list[dict]], x: str, values: list[str]):
    """-> a figure with a row for each of these values, and the axes of the rows.

    Each run is a line with a dot for each evaluation.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 3 * len(values)), layout="constrained")
    rows = figure.subplots(len(values), sharex=True, squeeze=False)[:, 0]
    for axes, value in zip(rows, values, strict=True):
        for i, (name, records) in enumerate(runs.items()):
            color = color_of(i, len(runs))
            found = [record for record in records if value in record and x in record]
            points = [record[x] for record in found], [record[value] for record in found]
            axes.plot(*points, "-o", color=color, label=name, markersize=4)
        axes.set(ylabel=value.replace("_", " "))
        tidy(axes)
    rows[0].legend()
    return figure, rows


def color_of(i: int, n: int):
    """Of run i of n: dark to light, in grey too."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.8 * i / max(1, n - 1))


def tidy(axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def columns(records: list[dict], name: str) -> tuple[list, list]:
    """The steps and the values of the records that have a value of that name."""
    found = [record for record in records if name in record]
    return [record["step"] for record in found], [record[name] for record in found]
