"""Shared by tests of several rooms: a tiny run's flags, small models, commands, forged files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig
from quill.data import dataset_files
from quill.sampling.window import FixedKVCache
from quill.training.checkpoint import checksum_comment, load_checkpoint
from sample import SEPARATOR

REPO = Path(__file__).resolve().parent.parent
SCRIPTS = ("train", "sample", "prepare")
TINY = [
    *(
        "--dataset=tiny",
        "--device=cpu",
        "--dtype=float32",
        "--n_layer=2",
        "--n_head=2",
        "--n_embd=16",
    ),
    *("--block_size=16", "--batch_size=4", "--gradient_accumulation_steps=2"),
    *("--max_iters=6", "--eval_interval=3", "--eval_iters=3", "--warmup_iters=2"),
    *("--learning_rate=1e-2", "--checkpoint_seconds=0"),
]


# ---- small models ------------------------------------------------------------------------------

CLASSIC = {"bias": True}
MODERN = {
    **{"position": "rotary", "norm": "rmsnorm", "qk_norm": True, "mlp": "relu2"},
    **{"tied_head": False, "residual_init": "zero", "bias": False},
}
SHIFTED = {"mlp": "swiglu", "position": "rotary", "token_shift": True}
VARIANTS = pytest.mark.parametrize(
    "switches", [CLASSIC, MODERN, MODERN | {"mlp": "swiglu"}, SHIFTED]
)


def tiny_model(switches, is_random=True, **changes) -> GPT:
    shape = {"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 16}
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape | switches | changes))
    if is_random:  # so that zero-initialised parts take part
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 11, shape, generator=torch.Generator().manual_seed(1))


class Uncached:
    """A model that has to read all of the context for each token."""

    def __init__(self, model):
        self.model, self.config = model, model.config

    def new_cache(self, batch_size):
        return None

    def __call__(self, idx, cache, last_only):
        return self.model(idx, last_only=last_only)


class WithFixedCache(Uncached):
    """What a compiled decoder uses, without the compiler."""

    def new_cache(self, batch_size):
        return FixedKVCache(self.model, batch_size)

    def __call__(self, idx, cache, last_only):
        return self.model(idx, cache=cache, last_only=last_only)


# ---- commands and files ------------------------------------------------------------------------


def command(script: str, *argv: str, **options) -> subprocess.CompletedProcess:
    """Run a command as a user does, in the current folder."""
    options = {"capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run(command_line(script, *argv), env=environment(), **options)


def command_line(script: str, *argv: str) -> list[str]:
    """`python train.py ...`, or `python -m quill.plot ...`."""
    start = [str(REPO / f"{script}.py")] if script in SCRIPTS else ["-m", f"quill.{script}"]
    return [sys.executable, *start, *map(str, argv)]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)} | more


def seal(path: Path) -> None:
    """Give a forged archive the checksum that checkpoint.save would have given it."""
    data = path.read_bytes()
    digest = hashlib.sha256(data)
    path.write_bytes(data[:-2] + checksum_comment(digest))


def edit_meta(folder: Path, **changes) -> None:
    """Change meta.json as somebody would who knows its checksum."""
    path = Path(folder, "meta.json")
    fields = json.loads(path.read_text()) | changes
    fields.pop("checksum")
    path.write_text(json.dumps(fields | {"checksum": dataset_files.checksum_of(fields)}))


def is_one_error_line(stderr: str) -> bool:
    return stderr.startswith("error: ") and stderr.count("\n") == 1


def texts(out: str) -> list[str]:
    """The samples in the output of sample.py."""
    parts = out.split(f"\n{SEPARATOR}\n")
    assert parts.pop() == ""
    return parts


# ---- comparing runs ----------------------------------------------------------------------------


def same_run(whole: str, parts: str) -> None:
    """The weights, the optimizer and the metrics of one run are those of the other."""
    saved = [load_checkpoint(Path(d, "ckpt.pt"), for_resume=True) for d in (whole, parts)]
    flat = [flat_tensors([s["model"], s["optimizers"], s["average"]]) for s in saved]
    assert len(flat[0]) == len(flat[1]) > 4
    assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))
    best = [load_checkpoint(Path(d, "best.pt"))["model"] for d in (whole, parts)]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    assert losses_of(whole) == losses_of(parts)


def flat_tensors(value) -> list:
    if isinstance(value, dict):
        value = [value[name] for name in sorted(value)]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in flat_tensors(part)]
    return [value] if torch.is_tensor(value) else []


def losses_of(out_dir: str) -> list:
    lines = map(json.loads, Path(out_dir, "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line.get("loss"), line.get("val_loss")) for line in lines]
