"""A run of a measured config is compared with what it should reach."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import TINY, is_one_error_line

from quill import settings
from quill.training import reference
from quill.training.checkpoint import load_checkpoint, save_checkpoint
from train import TrainConfig


@pytest.fixture
def measured(tiny, call, monkeypatch) -> Path:
    """The curve of three seeds of TINY, where train.py looks for it."""
    monkeypatch.setattr(reference, "FOLDER", tiny / "reference")
    (tiny / "reference").mkdir()
    for seed in "123":
        assert call("train", *TINY, f"--seed={seed}", f"--out_dir=out-{seed}")[0] == 0
    path = tiny / "reference" / "tiny.jsonl"
    code, out, _ = call("reference", "--out_dir=out-1,out-2,out-3", path)
    assert code == 0 and "3 steps of 3 runs" in out
    return path


def evaluations(folder="out") -> dict[int, dict]:
    lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "val_loss" in line}


def test_a_curve_has_the_mean_and_the_extremes_of_its_runs(measured):
    header, *lines = map(json.loads, measured.read_text().splitlines())
    assert header["seeds"] == [1, 2, 3] and [line["step"] for line in lines] == [0, 3, 6]
    losses = [evaluations(f"out-{seed}")[6]["val_loss"] for seed in "123"]
    assert lines[-1]["mean"] == pytest.approx(sum(losses) / 3, abs=1e-4)
    assert lines[-1]["low"] == pytest.approx(min(losses), abs=1e-4)
    assert lines[-1]["high"] == pytest.approx(max(losses), abs=1e-4)


def test_a_run_of_it_says_where_it_stands(measured, call):
    code, out, _ = call("train", *TINY, "--seed=4", "--eval_interval=2")
    at = {line.split(":")[0]: line for line in out.splitlines() if "val loss" in line}
    assert code == 0 and "expected" in at["step 6"] and "expected" not in at["step 2"]
    last, run = json.loads(measured.read_text().splitlines()[-1]), evaluations()
    half = max(0.01, 1.5 * (last["high"] - last["low"]))
    assert run[6]["expected_low"] == pytest.approx(last["mean"] - half)
    assert run[6]["expected_high"] == pytest.approx(last["mean"] + half)
    assert "expected_low" not in run[2]
    # A resumed run knows it as well, up to the steps that were measured.
    out = call("train", "--init_from=resume", "--max_iters=6", "--log_interval=9")[1]
    assert "is off" not in out.lower()


def test_a_file_is_no_curve_or_is_in_the_way(measured, call):
    code, _, err = call("reference", "--out_dir=out-1,out-2,out-3", measured)
    assert code == 2 and is_one_error_line(err) and "exists already" in err
    header, line, *_ = measured.read_text().splitlines()
    damaged = json.loads(line)
    texts = [f"{header}\n{json.dumps(damaged | {'mean': x})}" for x in (math.nan, 10**400, "1")]
    for text in ("", "{}", "[1", "[]", *texts):
        (measured.parent / "a.jsonl").write_text(text)
        code, _, err = call("train", *TINY)
        assert code == 2 and is_one_error_line(err) and "a.jsonl is no reference curve" in err


@pytest.mark.parametrize("shift", [-5.0, 5.0])
def test_a_run_that_is_off_is_told_so(measured, call, shift):
    header, *lines = map(json.loads, measured.read_text().splitlines())
    for line in lines:
        line |= {name: line[name] + shift for name in ("mean", "low", "high")}
    measured.write_text("".join(json.dumps(line) + "\n" for line in (header, *lines)))
    out = call("train", *TINY)[1]
    assert out.count("THIS RUN IS OFF") == 3


@pytest.mark.parametrize(
    "flag",
    ["--n_layer=1", "--learning_rate=2e-2", "--batch_size=2", "--dataset=other", "--dataset=bytes"],
)
def test_another_run_is_not_compared(measured, call, flag):
    assert call("prepare", "bytes", "--input=text.txt", "--tokenizer=byte")[0] == 0
    Path("text.txt").write_text("another text of the same letters\n" * 30)
    assert call("prepare", "other", "--input=text.txt")[0] == 0
    code, out, _ = call("train", *TINY, flag)
    assert code == 0 and "expected" not in out


def test_a_finetuned_run_is_not_compared_with_one_from_scratch(measured, call):
    assert call("train", *TINY, "--init_from=out-1", "--max_iters=3")[0] == 0
    out = call("train", "--init_from=resume", "--max_iters=6")[1]
    assert "resuming" in out and "expected" not in out
    code, _, err = call("reference", "--out_dir=out,out-2", "x.jsonl")
    assert code == 2 and is_one_error_line(err) and "made_of is {'init_from': " in err
    # Three that start from the same weights have a curve of their own.
    for seed in "456":
        flags = ["--init_from=out-1", f"--seed={seed}", f"--out_dir=fine-{seed}"]
        assert call("train", *TINY, *flags)[0] == 0
    path = measured.parent / "fine.jsonl"
    assert call("reference", "--out_dir=fine-4,fine-5,fine-6", path)[0] == 0
    assert "expected" in call("train", *TINY, "--init_from=out-1", "--out_dir=new")[1]
    assert "expected" not in call("train", *TINY, "--init_from=out-2", "--out_dir=newer")[1]


def test_runs_of_several_configs_or_of_one_seed_are_no_reference(measured, call):
    assert call("train", *TINY, "--seed=9", "--n_embd=8", "--out_dir=narrow")[0] == 0
    assert call("train", *TINY, "--seed=9", "--out_dir=cut")[0] == 0
    assert call("prepare", "bytes", "--input=text.txt", "--tokenizer=byte")[0] == 0
    flags = [flag for flag in TINY if flag != "--dataset=tiny"]
    assert call("train", *flags, "--dataset=bytes", "--seed=9", "--out_dir=bytes")[0] == 0
    Path("cut/metrics.jsonl").write_text('{"step": 7, "val_loss": 1.0}\n')
    for names, said in (
        ("out-1,out-1", "have the same seed, 1"),
        ("out-1,narrow", "narrow differs from out-1 in more than its seed: n_embd is 16 there and"),
        ("out-1,bytes", "bytes differs from out-1 in more than its seed: vocab_size is"),
        ("out-1", "several runs"),
        ("out-1,cut", "no evaluation at the same step"),
    ):
        code, _, err = call("reference", f"--out_dir={names}", "x.jsonl")
        assert code == 2 and is_one_error_line(err) and said in err
    assert not Path("x.jsonl").exists()


@pytest.mark.parametrize("names", ["out-1,old", "old,out-1"])
def test_a_run_without_an_option_of_today_is_not_taken_for_one_with_it(measured, call, names):
    saved = load_checkpoint(Path("out-2/ckpt.pt"))
    del saved["config"]["token_shift"]
    Path("old").mkdir()
    save_checkpoint(Path("old/ckpt.pt"), saved)
    code, _, err = call("reference", f"--out_dir={names}", "x.jsonl")
    assert code == 2 and is_one_error_line(err) and "token_shift is " in err


def test_the_plot_shows_what_is_expected(measured, call):
    assert call("train", *TINY)[0] == 0
    assert call("plot", "--pictures=loss")[0] == 0
    assert "val, expected" in Path("out/loss.svg").read_text()
    assert call("plot", "--pictures=loss", "--out_dir=out-1")[0] == 0
    assert "val, expected" not in Path("out-1/loss.svg").read_text()


@pytest.mark.parametrize("path", sorted(reference.FOLDER.glob("*.jsonl")), ids=lambda p: p.stem)
def test_the_config_of_a_curve_is_still_the_one_that_was_measured(path):
    """Its name is that of the config file, or of several, with a + between."""
    header = json.loads(path.read_text().splitlines()[0])
    argv = [f"config/{name}.py" for name in path.stem.split("+")]
    config = settings.load(TrainConfig, argv, usage="")
    meta = SimpleNamespace(sha256=header["text_sha256"], vocab_size=header["vocab_size"])
    found = reference.find(config, meta, header["made_of"])
    assert config.max_iters in found and 0 in found
    now = reference.options_that_count(dataclasses.asdict(config))
    assert header["options"].items() <= now.items(), "what is newer has its default"
