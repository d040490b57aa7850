"""Fixtures: a generated text, a working folder, a prepared dataset, a command in this process."""

from __future__ import annotations

import importlib
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from helpers import SCRIPTS
from hypothesis import settings

from quill import errors
from quill.data import problems

settings.register_profile("quill", deadline=None)  # a first example may import half of PyTorch
settings.load_profile("quill")


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
    """Run a command's main in this process: call("train", "--x=1") -> (code, stdout, stderr).

    Exceptions that the command line would show as a traceback fail the test.
    """

    def run(script: str, *argv: str):
        module = importlib.import_module(script if script in SCRIPTS else f"quill.{script}")
        capsys.readouterr()
        old, sys.argv = sys.argv, [script, *map(str, argv)]
        try:
            with pytest.raises(SystemExit) as stop:
                errors.run_command(module.main)
        finally:
            sys.argv = old
            signal.signal(signal.SIGINT, signal.default_int_handler)
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk("out/ckpt.pt"): whoever writes that file finds the disk full."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    for room in ("files", "data.download", "training.run_folder"):
        monkeypatch.setattr(f"quill.{room}.refuse_special_files", lambda *paths: None)
    return lambda path, end=".tmp": Path(f"{path}{end}").symlink_to("/dev/full")


@pytest.fixture
def tiny(folder, text, call) -> Path:
    """A working folder with the dataset `tiny`, by character."""
    (folder / "text.txt").write_bytes(text.encode())
    assert call("prepare", "tiny", "--input=text.txt")[0] == 0
    return folder


@pytest.fixture
def sums(folder, call, monkeypatch) -> Path:
    """A working folder with the sums of single digits."""
    monkeypatch.setattr(problems, "SUM_DIGITS", 1)
    monkeypatch.setattr(problems, "N_SUMS_HELD_OUT", 20)
    assert call("prepare", "addition")[0] == 0
    return folder
