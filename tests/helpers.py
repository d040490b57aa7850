"""What tests of several rooms share: a tiny run's flags, and ways to run commands and forge files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from quill.data import dataset_files
from quill.training import checkpoint

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
    "--learning_rate=1e-2",
]


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
    path.write_bytes(data[:-2] + checkpoint.checksum_comment(digest))


def edit_meta(folder: Path, **changes) -> None:
    """Change meta.json as somebody would who knows its checksum."""
    path = Path(folder, "meta.json")
    fields = json.loads(path.read_text()) | changes
    fields.pop("checksum")
    path.write_text(json.dumps(fields | {"checksum": dataset_files.checksum_of(fields)}))


def is_one_error_line(stderr: str) -> bool:
    return stderr.startswith("error: ") and stderr.count("\n") == 1
