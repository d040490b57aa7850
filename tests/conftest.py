"""What the tests share: a generated text, a folder to work in, and two ways to run a command."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import dataset
import errors

REPO = Path(__file__).resolve().parent.parent
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


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run the tests of minutes")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --run-slow runs it"))
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny tensors are faster on one thread, and two test processes do not get in the way."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text() -> str:
    """About 20,000 characters with some regularity, line ends and a few beyond ASCII."""
    rng = random.Random(0)
    words = "the king and queen of hearts, été — naïve! What say you? I go; to sleep".split()
    return "".join(rng.choice(words) + rng.choice(["  ", " ", " ", "\n"]) for _ in range(3500))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(capsys):
    """Run a script's main in this process: call("train", "--x=1") -> (exit code, stdout, stderr).

    Exceptions that the command line would show as a traceback fail the test.
    """

    def run(script: str, *argv: str):
        module = importlib.import_module(script)
        capsys.readouterr()
        old, sys.argv = sys.argv, [script, *map(str, argv)]
        try:
            with pytest.raises(SystemExit) as stop:
                errors.run_script(module.main)
        finally:
            sys.argv = old
            signal.signal(signal.SIGINT, signal.default_int_handler)
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


@pytest.fixture
def tiny(folder, text, call) -> Path:
    """A working folder with the dataset `tiny`, by character."""
    (folder / "text.txt").write_bytes(text.encode())
    assert call("prepare", "tiny", "--input=text.txt")[0] == 0
    return folder


def command(script: str, *argv: str, **options) -> subprocess.CompletedProcess:
    """Run a script as a user does, in the current folder."""
    options = {"capture_output": True, "text": True, "timeout": 120} | options
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, REPO / f"{script}.py", *argv]
    return subprocess.run(line, env=environment, **options)


def seal(path: Path) -> None:
    """Give a forged archive the checksum that checkpoint.save would have given it."""
    data = path.read_bytes()
    digest = hashlib.sha256(data)
    path.write_bytes(data[:-2] + checkpoint._comment(digest))


def edit_meta(folder: Path, **changes) -> None:
    """Change meta.json as somebody would who knows its checksum."""
    path = Path(folder, "meta.json")
    fields = json.loads(path.read_text()) | changes
    fields.pop("checksum")
    path.write_text(json.dumps(fields | {"checksum": dataset._checksum(fields)}))


def is_one_error_line(stderr: str) -> bool:
    return stderr.startswith("error: ") and stderr.count("\n") == 1
