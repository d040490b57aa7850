"""quill.pairs, quill.reward and quill.dpo from outside, on sums of single digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import flat_tensors, is_one_error_line
from test_rl import RL, START, policy, records, write_reward  # noqa: F401  a fixture

from quill.posttraining import reward_model
from quill.posttraining.rollouts import pack
from quill.training.checkpoint import load_checkpoint

LOOP = ["--start_from=out", "--max_iters=60", "--eval_interval=60", "--warmup_iters=0"]
LOOP += ["--pairs_per_step=16", "--checkpoint_seconds=0", "--log_interval=1"]
LOOP += ["--learning_rate=1e-2"]


@pytest.fixture
def preferred(policy, call) -> Path:  # noqa: F811
    """Pairs of which the completion with more ones is chosen."""
    write_reward("ones", "completion.count('1')")
    flags = ["--start_from=out", "--n_pairs=200", "--batch_size=50"]
    code, out, _ = call("pairs", "ones.py", *flags)
    assert code == 0 and "200 pairs" in out
    return policy


def evaluations(out_dir: str) -> list[dict]:
    return [record for record in records(out_dir) if "val_loss" in record]


def test_pairs_are_chosen_by_the_judge(preferred):
    lines = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    assert len(lines) == 200 and all(line["prompt"].endswith("=") for line in lines)
    assert all(line["chosen"].count("1") > line["rejected"].count("1") for line in lines)


def test_a_reward_model_learns_the_judge_and_trains_a_policy(preferred, call):
    assert call("reward", *LOOP)[0] == 0
    first, last = evaluations("out-reward")
    assert first["val_loss"] == pytest.approx(0.6931, abs=1e-3), "at first all are equally good"
    assert last["val_pairs"] > 0.8
    flags = [*RL, "--max_iters=40", "--eval_interval=40", "--learning_rate=1e-2"]
    assert call("rl", *flags, "--reward=out-reward", "--judge=ones.py")[0] == 0
    first, last = evaluations("rl")
    assert last["val_reward"] > first["val_reward"]
    assert last["val_judge"] > first["val_judge"] + 0.5, "which the policy was not told"
    code, _, err = call("sample", "--out_dir=out-reward")
    assert code == 2 and is_one_error_line(err) and "'reward', which predicts no tokens" in err


def test_dpo_prefers_what_the_pairs_prefer(preferred, call):
    assert call("dpo", *LOOP, "--judge=ones.py", "--learning_rate=1e-3")[0] == 0
    first, last = evaluations("out-dpo")
    assert first["val_dpo"] == pytest.approx(0.6931, abs=1e-3) and first["val_kl"] == 0
    assert last["val_pairs"] > 0.8 and last["val_dpo"] < 0.66
    assert last["val_judge"] > first["val_judge"] + 0.5 and last["val_kl"] > 0
    assert call("sample", "--out_dir=out-dpo", "--start=2+3=", "--num_samples=1")[0] == 0


@pytest.mark.parametrize("command", ["reward", "dpo"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(preferred, call, command):
    whole = [*LOOP, "--max_iters=4", "--eval_interval=2", "--out_dir=whole"]
    assert call(command, *whole)[0] == 0
    parts = [*LOOP, "--max_iters=2", "--eval_interval=2", "--out_dir=parts", "--lr_decay_iters=4"]
    assert call(command, *parts)[0] == 0
    assert call(command, "--out_dir=parts", "--init_from=resume", "--max_iters=4")[0] == 0
    saved = [load_checkpoint(Path(d, "ckpt.pt"), for_resume=True) for d in ("whole", "parts")]
    for name in ("model", "optimizers"):
        a, b = (flat_tensors(contents[name]) for contents in saved)
        assert all(map(torch.equal, a, b)) and len(a) == len(b) > 2


@pytest.mark.parametrize("command", ["reward", "dpo"])
def test_a_resume_from_other_pairs_or_weights_is_refused(preferred, call, command):
    """Their names are the run's, so that nothing else would tell."""
    assert call(command, *LOOP, "--max_iters=2", "--out_dir=run")[0] == 0
    resume = ["--out_dir=run", "--init_from=resume", "--max_iters=3"]
    lines = Path("pairs.jsonl").read_text().splitlines(keepends=True)
    Path("pairs.jsonl").write_text("".join(reversed(lines)))
    Path("out").rename("kept")
    assert call("train", *START, "--seed=1")[0] == 0
    code, _, err = call(command, *resume)
    said = "start_from=out and pairs=pairs.jsonl is not what the run began with"
    assert code == 2 and is_one_error_line(err) and said in err
    Path("pairs.jsonl").write_text("".join(lines))
    Path("out").rename("other")
    Path("kept").rename("out")
    assert call(command, *resume)[0] == 0


def test_the_score_is_that_of_the_last_token(preferred, call):
    """What follows a shorter completion in a batch does not count; the completion does."""
    assert call("reward", *LOOP, "--max_iters=10")[0] == 0
    model, tokenizer = reward_model.load(Path("out-reward"))
    prompt, *both = (tokenizer.encode(text) for text in ("2+3=", "51", "1"))
    with torch.no_grad():
        together = model(pack([prompt] * 2, both, torch.device("cpu")))
        alone = [model(pack([prompt], [one], torch.device("cpu"))).item() for one in both]
    assert together.tolist() == pytest.approx(alone, abs=1e-5) and alone[0] != alone[1]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{}", "prompt"),
        ('{"prompt": "1+1=", "chosen": "2"}', "rejected"),
        ('{"prompt": "1+1=", "chosen": "2", "rejected": "x"}', "'x'"),
        ('{"prompt": "1+1=", "chosen": "2", "rejected": "3333"}', "block_size"),
        ('{"prompt": "", "chosen": "2", "rejected": "3"}', "empty"),
        ('{"prompt": "1+1=", "chosen": "2", "rejected": "2"}', "the same"),
        ('{"prompt": 1, "chosen": "2", "rejected": "3"}', ""),
        ("[" * 100_000, ""),
    ],
)
@pytest.mark.parametrize("command", ["reward", "dpo"])
def test_a_line_that_is_no_pair_is_named(preferred, call, command, line, said):
    text = Path("pairs.jsonl").read_text()
    Path("pairs.jsonl").write_text(text + line + "\n")
    code, _, err = call(command, *LOOP)
    assert code == 2 and is_one_error_line(err) and "line 201" in err and said in err


def test_what_cannot_work_is_one_line(preferred, call):
    write_reward("zero", "0")
    Path("mine.tmp").write_text("kept")
    for argv, said in (
        (["pairs", "ones.py", "--start_from=out", "--to=mine"], "mine.tmp exists already"),
        (["pairs"], "give a judge"),
        (["pairs", "ones.py", "--start_from=out"], "exists already"),
        (["pairs", "ones.py", "--start_from=out", "--to="], "give the name of a file"),
        (["pairs", "ones.py", "--start_from=nowhere", "--to=new"], "nowhere"),
        (["pairs", "zero.py", "--start_from=out", "--to=new"], "alike"),
        (["dpo", *LOOP, "--pairs=nowhere.jsonl"], "nowhere.jsonl"),
        (["dpo", *LOOP, "--start_from=nowhere"], "start_from: nowhere"),
        (["reward", *LOOP, "--out_dir=out"], "already holds a run"),
    ):
        code, _, err = call(*argv)
        assert code == 2 and is_one_error_line(err) and said in err
    assert len(Path("pairs.jsonl").read_text().splitlines()) == 200, "left as it was"
    assert Path("mine.tmp").read_text() == "kept"
