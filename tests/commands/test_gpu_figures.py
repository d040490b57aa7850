"""The script that measures on a GPU, as far as a machine without one can tell."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
from helpers import REPO

import sample
import train
from quill import settings
from quill.bench import BenchConfig

OPTIONS = {"train.py": train.TrainConfig, "sample.py": sample.SampleConfig}


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader = importlib.machinery.SourceFileLoader("gpu_figures", str(REPO / ".ci/gpu_figures"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_figures", loader))
    loader.exec_module(module)
    monkeypatch.setattr(module, "WORK", tmp_path / "work")
    (tmp_path / "data/shakespeare_char").mkdir(parents=True)
    (tmp_path / "data/shakespeare_char/meta.json").touch()
    monkeypatch.chdir(tmp_path)
    return module


def program(script, name: str, code: str, limit: float = 20):
    return script.Step(name, script.python("-c", code), limit, script.last_json)


def figures_of(script, monkeypatch, steps: list, *flags: str) -> dict:
    monkeypatch.setattr(script, "part_a", lambda nanogpt: steps)
    root = script.WORK.parent
    argv = ["gpu_figures", "A", f"--out={root}/out", f"--data={root}/data", *flags]
    monkeypatch.setattr(sys, "argv", argv)
    script.main()
    return json.loads((root / "out/figures.json").read_text())


def test_every_command_has_the_options_that_it_is_given(script):
    steps = [step for part in "abc" for step in getattr(script, f"part_{part}")(Path("nanoGPT"))]
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        _, program, *argv = step.argv
        if program in ("-m", "-c"):
            module, *argv = argv
            if module in ("quill.bench", script.PROFILE):
                settings.load(BenchConfig, argv, usage="")
        elif step.folder is None:
            settings.load(OPTIONS[Path(program).name], argv, usage="")


def test_a_step_that_fails_or_takes_too_long_is_noted_and_the_next_one_made(
    script, monkeypatch, capsys
):
    # The second has a child, which would hold its output open.
    child = "import subprocess, sys; print('x'); subprocess.run(['sleep', '60'])"
    steps = [
        program(script, "fails", "print(*'abcdefg', sep='\\n'); exit(3)"),
        program(script, "hangs", child, limit=1),
        program(script, "silent", "print(1)"),
        program(script, "works", "print('{\"n\": 1}')"),
    ]
    started = time.monotonic()
    figures = figures_of(script, monkeypatch, steps)
    assert time.monotonic() - started < 15
    assert [figures[step.name]["exit"] for step in steps] == [3, "timeout", "no figures", 0]
    assert figures["fails"]["said"] == "c\nd\ne\nf\ng" and figures["works"]["n"] == 1
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_a_second_call_makes_what_is_missing(script, monkeypatch):
    steps = [
        program(script, "works", "import time; print('{\"at\": %f}' % time.time())"),
        program(script, "fails", "exit(1)"),
    ]
    first = figures_of(script, monkeypatch, steps)
    steps[1] = program(script, "fails", "print('{}')")
    second = figures_of(script, monkeypatch, steps)
    assert second["works"] == first["works"] and second["fails"]["exit"] == 0
    assert figures_of(script, monkeypatch, steps, "--again")["works"]["at"] > first["works"]["at"]


def test_steps_that_no_longer_fit_are_noted(script, monkeypatch):
    monkeypatch.setattr(script, "PART_SECONDS", 0)
    steps = [program(script, "late", "print('{}')")]
    assert figures_of(script, monkeypatch, steps)["late"]["exit"] == "no time"


def test_runs_of_both_programs_are_read_alike(script):
    ours = "step 250: train loss 1.2, val loss 1.4600, best so far"
    theirs = "step 250: train loss 1.2000, val loss 1.4600"
    for evaluation, pace in ((ours, "step 9/300: loss 1.3, 5.0 ms/step"), (theirs, "time 5.00ms,")):
        lines = [(0.5, evaluation.replace("1.46", "4.2")), *[(1.0, pace)] * 9, (2.04, evaluation)]
        assert script.run_figures(lines) == {
            **{"val": 1.46, "best": 1.46, "ms_per_step": 5.0, "to_target_s": 2.0}
        }
