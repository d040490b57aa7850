"""A scaling law: fitted to runs that follow one, and the study that makes the runs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import REPO, is_one_error_line

from quill import scaling as study
from quill.data import dataset_files
from quill.errors import InputError
from quill.files import file_lock
from quill.training.checkpoint import load_checkpoint
from quill.views import scaling_law
from quill.views.scaling_law import Law, Run

TRUE = Law(1.0, 30.0, 200.0, 0.4, 0.45)


def runs_of(law: Law, noise: float = 0.0) -> list[Run]:
    rng = np.random.default_rng(0)
    return [
        Run(c, n, int(c / (6 * n)), float(law.loss(n, c / (6 * n)) + noise * rng.normal()))
        for c in (1e12, 2e12, 4e12, 8e12)
        for n in (30_000, 60_000, 150_000, 300_000, 600_000, 1_200_000)
    ]


def test_a_law_is_found_in_runs_that_follow_it():
    law = scaling_law.fit(runs_of(TRUE))
    assert law.alpha == pytest.approx(0.4, abs=0.03) and law.beta == pytest.approx(0.45, abs=0.03)
    n, d = 2_000_000, 5e12 / 3
    assert law.loss(n, d) == pytest.approx(TRUE.loss(n, d), abs=0.01)


def test_the_interval_of_an_exponent_holds_the_true_one():
    laws = scaling_law.bootstrap(runs_of(TRUE, noise=0.005), n_times=20)
    low, high = scaling_law.interval(law.size_exponent for law in laws)
    assert low - 0.05 < TRUE.size_exponent < high + 0.05 and high - low < 0.5


def test_draws_that_no_law_fits_are_left_out(monkeypatch):
    """Those in which the loss grows with the size or with the tokens."""
    monkeypatch.setattr(scaling_law, "GRID", np.linspace(0.3, 0.6, 7))
    runs = runs_of(TRUE, noise=1.0)
    laws = scaling_law.bootstrap(runs, n_times=20)
    assert 10 <= len(laws) < 20
    flat = [dataclasses.replace(run, val_loss=run.n_tokens / 1e8) for run in runs]
    with pytest.raises(ValueError, match="single runs"):
        scaling_law.bootstrap(flat, n_times=20)


def test_too_few_runs_are_no_law():
    with pytest.raises(ValueError, match="too few"):
        scaling_law.fit(runs_of(TRUE)[:5])


@pytest.fixture
def made(tiny, monkeypatch) -> list[str]:
    """train.py is replaced by the true law; -> the names of the runs that were made."""
    names = []

    def make(self, plan):
        names.append(plan.name)
        folder = self.folder / plan.name
        folder.mkdir(parents=True)
        loss = float(TRUE.loss(plan.n_parameters, plan.n_tokens)) + abs(plan.factor - 1)
        lines = [{"step": s, "train_loss": 1.0, "val_loss": loss} for s in (0, plan.n_steps)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        if Path("out-scaling/tiny/prediction.json").exists():
            names.append("after the prediction")
        return self.result(plan)

    monkeypatch.setattr(study.Study, "make", make)
    monkeypatch.setattr(scaling_law, "GRID", np.linspace(0.3, 0.6, 7))
    return names


def study_of(meta=None, **options) -> study.Study:
    meta = meta or dataset_files.read(Path("data/tiny"))[0]
    return study.Study(study.ScalingConfig(dataset="tiny", **options), meta)


def test_a_study_of_another_text_takes_no_runs_of_this_one(tiny):
    mine = study_of()
    mine.folder.mkdir(parents=True)
    mine.refuse_another()
    mine.refuse_another()
    another_text = dataclasses.replace(mine.meta, sha256="b")
    for other in (study_of(another_text), study_of(smallest=1.00001e12)):
        with pytest.raises(InputError, match="another text or of other settings"):
            other.refuse_another()


def test_a_run_that_was_stopped_in_its_first_evaluation_is_not_finished(tiny):
    mine = study_of()
    plan = mine.plan((2, 32), 1e12, 1.0)
    (mine.folder / plan.name).mkdir(parents=True)
    for text in ("", '{"step": 0, "val_loss": 4.0'):
        (mine.folder / plan.name / "metrics.jsonl").write_text(text)
        assert mine.result(plan) is None


def test_rates_lie_between_and_beyond_those_of_the_two_tuned_budgets(tiny):
    mine, size = study_of(), study.SIZES[-1]
    factors = {(size, 1e12): 4.0, (size, 8e12): 0.5}
    for of in (size, study.LARGER_SIZES[0]):
        picked = [mine.tuned_plan(factors, of, c).factor for c in (1e12, 2e12, 4e12, 8e12, 1.6e13)]
        assert picked == pytest.approx([4.0, 2.0, 1.0, 0.5, 0.25])
    exact = [mine.tuned_plan(factors, size, c).name for c in (1e12, 8e12)]
    assert exact == ["1e+12-5x144-4-1337", "8e+12-5x144-0.5-1337"], "the tuned runs serve again"


def test_the_best_rates_are_found_at_both_ends(made):
    mine = study_of(jobs=1)
    assert {*mine.tune().values()} == {1.0}, "train.py's stand-in is best with these"


def test_a_study_predicts_and_then_makes_the_largest_run(made, call):
    flags = ["--dataset=tiny", "--seeds=2", "--budgets=2", "--jobs=1"]
    code, out, _ = call("scaling", *flags)
    n_tuning = len(study.SIZES) * sum(map(len, study.FACTORS))
    n_grid = len(study.SIZES) * 2 * 2
    # At the budgets of the tuning the runs at the best rate serve twice.
    assert code == 0 and len(made) == n_tuning + n_grid - len(study.SIZES) * 2 + 1 + 1
    assert made[-1] == "after the prediction" and made.count("after the prediction") == 1
    assert len(set(made)) == len(made)
    predicted = json.loads(Path("out-scaling/tiny/prediction.json").read_text())
    reached = float(out.rpartition("reached ")[2])
    assert predicted["val_loss"] == pytest.approx(reached, abs=0.01)
    assert "passes over the text" in out, "the text is short"
    assert Path("out-scaling/tiny/scaling.png").stat().st_size > 1000
    made.clear()
    assert call("scaling", *flags)[0] == 0 and made == [], "nothing is made twice"


def test_a_run_that_fails_ends_the_study_with_its_reason(tiny, call, monkeypatch):
    monkeypatch.setattr(study, "RATES", {"learning_rate": -1.0})
    monkeypatch.setattr(study, "SIZES", ((2, 32),))
    monkeypatch.setattr(study, "FACTORS", ((1.0,), (1.0,)))
    code, _, err = call("scaling", "--dataset=tiny", "--smallest=1e9")
    assert code == 2 and is_one_error_line(err) and "ended with code 2" in err
    assert "learning_rate" in err


def test_runs_that_follow_no_law_are_told(made, call, monkeypatch):
    worse_with_all = Law(1.0, -30.0, -200.0, 0.4, 0.45)
    monkeypatch.setitem(globals(), "TRUE", worse_with_all)
    code, _, err = call("scaling", "--dataset=tiny", "--seeds=1", "--budgets=2", "--jobs=1")
    assert code == 1 and is_one_error_line(err) and "give larger budgets" in err
    assert not Path("out-scaling/tiny/prediction.json").exists()


@pytest.mark.slow
def test_a_study_that_is_told_to_end_stops_its_runs(tiny):
    flags = ["--dataset=tiny", "--smallest=1e13", "--jobs=2"]
    command = [sys.executable, "-m", "quill.scaling", *flags]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(REPO)})
    runs, deadline = Path("out-scaling/tiny"), time.monotonic() + 120
    while len([*runs.glob("*/metrics.jsonl")]) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    checkpoints = [*runs.glob("*/ckpt.pt")]
    for path in checkpoints:
        load_checkpoint(path, for_resume=True)
        with file_lock(path.parent):
            pass
    assert len(checkpoints) == 2, "each saved at the signal, and no further run was begun"


@pytest.mark.slow
def test_real_runs_follow_a_law_or_that_they_do_not_is_said(tiny, call):
    """Of so few steps they may do either; here the runs themselves are looked at."""
    flags = ["--dataset=tiny", "--smallest=1e9", "--budgets=2", "--seeds=1"]
    code, out, err = call("scaling", *flags)
    found = code == 0 and "reached" in out
    assert found or (code == 1 and is_one_error_line(err) and "give larger budgets" in err)
    n_runs = len(study.SIZES) * (len(study.FACTORS) + 1) + found
    runs = [*Path("out-scaling/tiny").glob("*/best.pt")]
    assert out.count(": val loss") == len(runs) == n_runs
