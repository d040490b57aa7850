"""Checkpoints: saved whole or not at all, loaded without running anything that is in them.

`ckpt.pt` holds everything that a resume needs, `best.pt` the weights with the lowest val loss. Both
are dicts of plain types and tensors, so `torch.load(weights_only=True)` reads them.
"""

from __future__ import annotations

import dataclasses
import pickle
import warnings
import zipfile
from pathlib import Path

import torch

import tokenizer as tokenizers
from errors import InputError
from files import staged
from model import GPT, GPTConfig

SCHEMA_VERSION = 1
_COMMON = {"model": dict, "model_config": dict, "config": dict, "tokenizer": dict, "step": int}
_RESUME = {"optimizers": list, "scaler": dict, "progress": dict}


def save(path: Path, contents: dict) -> None:
    """Write to a temporary file, flush it to the disk, then rename it over `path`."""
    with staged(path) as (file,):
        try:
            torch.save({"quill_checkpoint": SCHEMA_VERSION, **contents}, file)
        except RuntimeError as error:  # torch's writer hides what the file said, a full disk say
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path: Path, *, for_resume: bool = False) -> dict:
    """Read a checkpoint onto the CPU; raises `InputError` when it is missing or not usable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused below
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: train first, or check --out_dir") from None
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} holds more than tensors and plain types, or is not a checkpoint: refused, "
            "nothing in it was run"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, zipfile.BadZipFile):
        raise InputError(
            f"{path} is truncated or not a checkpoint; delete it, or restore it from a copy"
        ) from None
    if not isinstance(contents, dict) or "quill_checkpoint" not in contents:
        raise InputError(f"{path} is not a Quill checkpoint")
    if contents["quill_checkpoint"] != SCHEMA_VERSION:
        raise InputError(
            f"{path} has schema version {contents['quill_checkpoint']!r}; this code reads "
            f"version {SCHEMA_VERSION}"
        )
    needed = _COMMON | _RESUME if for_resume else _COMMON
    wrong = [name for name, kind in needed.items() if not isinstance(contents.get(name), kind)]
    if wrong:
        raise InputError(f"{path} is not a usable checkpoint: {', '.join(wrong)} missing or broken")
    return contents


def find(out_dir: Path) -> Path:
    """The checkpoint to sample from: best.pt when it is there, else ckpt.pt."""
    best = out_dir / "best.pt"
    return best if best.exists() else out_dir / "ckpt.pt"


def build_model(contents: dict, path: Path) -> tuple[GPT, tokenizers.Tokenizer]:
    """The checkpoint's model with its weights, and its tokenizer."""
    try:
        known = {field.name for field in dataclasses.fields(GPTConfig)}
        if contents["model_config"].keys() - known:
            raise ValueError(f"unknown switches {sorted(contents['model_config'].keys() - known)}")
        model = GPT(GPTConfig(**contents["model_config"]))
        model.load_state_dict(contents["model"])
    except (ValueError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: its weights and its model config disagree: {error}") from None
    return model, tokenizers.from_json(contents["tokenizer"], str(path))
