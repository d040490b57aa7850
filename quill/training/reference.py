"""The val loss that a run of a measured config should have by step: docs/reference/*.jsonl.

The first line of a file has the options of the runs, the SHA-256 of their text, the size of their
vocabulary, and digests of the weights that they were made of, if any; each further one a step, the
mean of the val losses there, and their extremes. `python -m quill.reference` writes it.
"""

import dataclasses
import json
import math
from pathlib import Path

from quill.errors import blames_input
from quill.files import open_file

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
# Options that do not change the val loss at a step, or by less than another seed does.
FREE = {
    *("out_dir", "dataset", "init_from", "overwrite", "eval_interval", "eval_iters", "eval_only"),
    *("sample_at_eval", "log_interval", "checkpoint_seconds", "always_save_checkpoint", "patience"),
    *("wandb_log", "wandb_project", "wandb_run_name", "tensorboard_log", "device", "dtype"),
    *("compile", "compile_mode", "cuda_graph", "parallel", "backend", "deterministic", "seed"),
}
NO_CURVE = (ValueError, KeyError, TypeError, OverflowError)  # raised by what another program wrote
# A new run lies in three seeds' range only half of the time.
N_RANGES = 1.5  # to both sides of the mean
LEAST = 0.01


def options_that_count(config: dict) -> dict:
    return {name: value for name, value in config.items() if name not in FREE}


def header_of(config: dict, text_sha256: str, vocab_size: int, made_of: dict[str, str]) -> dict:
    """In what runs agree that have the same curve."""
    header = {"options": options_that_count(config), "text_sha256": text_sha256}
    return header | {"vocab_size": vocab_size, "made_of": made_of}


def find(config, meta, made_of: dict[str, str]) -> dict[int, tuple[float, float]]:
    """By step the lowest and highest val loss to expect; empty for a run that was not measured.

    config, made_of: those of a train.Run; meta: its dataset's. Options that are newer than a file
    have their defaults there.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    own = header_of(dataclasses.asdict(config), meta.sha256, meta.vocab_size, made_of)
    for path in sorted(FOLDER.glob("*.jsonl")):
        with (
            blames_input(f"{path} is no reference curve, make it anew or remove it", *NO_CURVE),
            open_file(path) as file,
        ):
            header, *lines = map(json.loads, file)
            header["options"] = options_that_count(defaults) | header["options"]
            if all(header[name] == value for name, value in own.items()):
                return {line["step"]: _expected(**line) for line in lines}
    return {}


def _expected(step: int, mean: float, low: float, high: float) -> tuple[float, float]:
    if not all(map(math.isfinite, (mean, low, high))):
        raise ValueError(f"step {step} has no loss")
    half = max(LEAST, N_RANGES * (high - low))
    return mean - half, mean + half
