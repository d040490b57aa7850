"""Low-rank adapters: what is trained, what is saved, what it computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import TINY, VARIANTS, is_one_error_line, random_ids, same_run, tiny_model

from quill.interop import pretrained
from quill.training import lora
from quill.training.checkpoint import load_checkpoint
from quill.training.state_dict import load_model_state_dict

FINETUNE = [flag for flag in TINY if not flag.startswith(("--n_", "--block"))]
FINETUNE += ["--init_from=out", "--out_dir=fine", "--lora_rank=2", "--learning_rate=1e-2"]


@VARIANTS
def test_a_model_with_adapters_starts_as_it_was_and_merges_as_it_is(switches):
    model, idx = tiny_model(switches), random_ids(3, 8)
    plain, before = {k: p.clone() for k, p in model.state_dict().items()}, model(idx)[0]
    torch.manual_seed(0)
    lora.add_adapters(model, 3)
    torch.testing.assert_close(model(idx)[0], before)
    for name, p in model.named_parameters():
        assert p.requires_grad == (lora.ADAPTER in name)
        if p.requires_grad:
            torch.nn.init.normal_(p)
    after = model(idx)[0]
    assert not torch.allclose(after, before, atol=0.1)
    other = tiny_model(switches)
    other.load_state_dict(lora.merged(model.state_dict()))
    torch.testing.assert_close(other(idx)[0], after)
    load_model_state_dict(model, plain)  # the weights that a new run starts from
    assert all(torch.equal(model.state_dict()[n], p) for n, p in plain.items() if "c_" not in n)
    assert lora.merged(plain).keys() == plain.keys()


def test_only_adapters_are_trained_and_have_moments(tiny, call):
    assert call("train", *TINY)[0] == 0
    assert call("train", *FINETUNE)[0] == 0
    base, fine = (load_checkpoint(Path(d, "ckpt.pt"), for_resume=True) for d in ("out", "fine"))
    moments = [t for state in fine["optimizers"][0]["state"].values() for t in state.values()]
    adapters = [p for name, p in fine["model"].items() if lora.ADAPTER in name]
    assert sum(t.numel() > 1 for t in moments) == 2 * len(adapters) == 2 * 2 * 4 * 2
    best = load_checkpoint(Path("out/best.pt"))["model"]
    for name, p in best.items():
        kept = fine["model"].get(
            name, fine["model"].get(name.removesuffix(".weight") + lora.ORIGINAL)
        )
        assert torch.equal(p, kept), f"{name} is not trained"
    assert any(p.abs().max() > 0 for name, p in fine["model"].items() if name.endswith("0.b"))
    losses = [json.loads(line) for line in Path("fine/metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in losses if "val_loss" in line]
    assert losses[-1] < losses[0] == pytest.approx(base["progress"]["best_val_loss"], abs=1e-6)


def test_what_was_finetuned_is_used_as_any_other_run(tiny, call):
    assert call("train", *TINY)[0] == 0 and call("train", *FINETUNE)[0] == 0
    weights = pretrained.from_folder(Path("fine")).weights
    assert weights.keys() == pretrained.from_folder(Path("out")).weights.keys()
    for argv in (
        ["sample", "--out_dir=fine", "--num_samples=1", "--max_new_tokens=5"],
        ["evaluate", "--out_dir=fine"],
        ["export", "--out_dir=fine", "exported"],
        ["train", *FINETUNE, "--init_from=fine", "--out_dir=again", "--lora_rank=0"],
    ):
        code, _, err = call(*argv)
        assert (code, err) == (0, ""), argv


def test_a_resumed_run_is_the_run_that_was_not_stopped(tiny, call):
    assert call("train", *TINY)[0] == 0
    assert call("train", *FINETUNE, "--out_dir=whole")[0] == 0
    assert (
        call("train", *FINETUNE, "--out_dir=parts", "--max_iters=3", "--lr_decay_iters=6")[0] == 0
    )
    assert call("train", "--out_dir=parts", "--init_from=resume", "--max_iters=6")[0] == 0
    same_run("whole", "parts")
    for rank in (0, 3):
        code, _, err = call("train", "--out_dir=parts", "--init_from=resume", f"--lora_rank={rank}")
        assert code == 2 and is_one_error_line(err) and "lora_rank is 2 there" in err


def test_what_cannot_be_adapted_is_one_line(tiny, call):
    assert call("train", *TINY, "--model=bigram")[0] == 0
    assert call("train", *TINY, "--out_dir=gpt")[0] == 0
    for flags, said in (
        (FINETUNE, "bigram"),
        ([*TINY, "--lora_rank=2"], "given weights"),
        ([*FINETUNE, "--init_from=gpt", "--lora_rank=100000"], "above n_embd=16"),
    ):
        code, _, err = call("train", *flags, "--out_dir=fine")
        assert code == 2 and is_one_error_line(err) and said in err


def test_rl_trains_adapters(sums, call):
    flags = [flag for flag in TINY if not flag.startswith(("--dataset", "--block"))]
    assert call("train", *flags, "--dataset=addition", "--block_size=6")[0] == 0
    flags = ["--start_from=out", "--out_dir=rl", "--lora_rank=2", "--max_iters=2"]
    flags += ["--prompts_per_step=8", "--completions=8", "--reward=ones.py"]
    Path("ones.py").write_text("def reward(prompt, completion):\n    return len(completion)\n")
    assert call("rl", *flags)[0] == 0
    saved = load_checkpoint(Path("rl/ckpt.pt"))["model"]
    assert any(lora.ADAPTER in name for name in saved)
    assert call("sample", "--out_dir=rl", "--start=1+1=")[0] == 0
