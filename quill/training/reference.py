"""The val loss that a run of a measured config should have by step: docs/reference/*.jsonl.

The first line of a file has the options of the runs and the SHA-256 of their text, each further one
a step, the mean of the val losses there, and their extremes. `python -m quill.reference` writes it.
"""

import dataclasses
import json
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
STARTS = ("scratch", "auto", "resume")
NO_CURVE = (ValueError, KeyError, TypeError)  # raised by what another program wrote
# A new run lies in three seeds' range only half of the time.
N_RANGES = 1.5  # to both sides of the mean
LEAST = 0.01


def options_that_count(config: dict) -> dict:
    return {name: value for name, value in config.items() if name not in FREE}


def find(config, text_sha256: str) -> dict[int, tuple[float, float]]:
    """By step the lowest and highest val loss to expect; empty for a run that was not measured.

    config: a train.TrainConfig. Options that are newer than a file have their defaults there.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    own = options_that_count(dataclasses.asdict(config))
    for path in sorted(FOLDER.glob("*.jsonl")) if config.init_from in STARTS else ():
        with blames_input(f"{path} is no reference curve", *NO_CURVE), open_file(path) as file:
            header, *lines = map(json.loads, file)
            measured = options_that_count(defaults) | header["options"]
            if measured == own and header["text_sha256"] == text_sha256:
                return {line["step"]: _expected(**line) for line in lines}
    return {}


def _expected(step: int, mean: float, low: float, high: float) -> tuple[float, float]:
    half = max(LEAST, N_RANGES * (high - low))
    return mean - half, mean + half
