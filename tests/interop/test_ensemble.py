"""Several models as one: sampled, evaluated, and taught to a smaller one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import CLASSIC, MODERN, TINY, Uncached, is_one_error_line, random_ids, tiny_model

import train
from model import GPT, generate
from quill import settings
from quill.interop.ensemble import Ensemble
from quill.training.models import Bigram, BigramConfig


def three_kinds() -> list[torch.nn.Module]:
    """A longer context, a padded vocabulary, no cache."""
    torch.manual_seed(2)
    bigram = Bigram(BigramConfig(8, 11))
    torch.nn.init.normal_(bigram.table.weight)
    padded = tiny_model(CLASSIC, vocab_size=16)
    return [tiny_model(MODERN, block_size=16), padded, bigram]


@torch.no_grad()
def test_its_probabilities_are_the_mean_of_its_members():
    members, idx, targets = three_kinds(), random_ids(2, 8), random_ids(2, 8)
    targets[0, :3] = -1
    logits, loss = Ensemble(members, 11)(idx, targets)
    probs = [m(idx)[0][..., :11].softmax(dim=-1) for m in members]
    mean = sum(probs) / 3
    assert torch.allclose(logits.exp(), mean, atol=1e-6)
    taken = mean.gather(2, targets.clamp(min=0)[..., None]).squeeze(2)[targets != -1]
    assert loss.item() == pytest.approx(-taken.log().mean().item(), abs=1e-5)


def test_it_writes_the_same_with_and_without_caches():
    ensemble, idx = Ensemble(three_kinds(), 11), random_ids(2, 3)
    assert ensemble.config.block_size == 8
    torch.manual_seed(1)
    cached = torch.stack([*generate(ensemble, idx, 20)])  # more than a window
    torch.manual_seed(1)
    assert torch.equal(cached, torch.stack([*generate(Uncached(ensemble), idx, 20)]))


def test_a_single_model_and_its_copies_write_and_score_the_same(tiny, call):
    assert call("train", *TINY)[0] == 0
    flags = ["--max_new_tokens=30", "--num_samples=2"]
    one, two = (call("sample", f"--out_dir={names}", *flags) for names in ("out", "out,out"))
    assert one == two and one[0] == 0
    code, out, _ = call("evaluate", "--dtype=float32")
    last = call("train", "--init_from=resume", "--eval_only=true")[1]
    assert code == 0 and out.startswith("out on tiny: val loss ")
    scores = out.partition(": ")[2].partition(", in")[0]
    assert scores in last, "as train.py evaluates the same weights"
    assert scores in call("evaluate", "--out_dir=out,out", "--batch_size=5", "--dtype=float32")[1]
    assert scores in call("evaluate", "--init_from=out/best.pt", "--dtype=float32")[1]


def test_what_cannot_be_averaged_or_evaluated_is_refused(tiny, call):
    Path("text.txt").write_text("another alphabet\n" * 30)
    assert call("prepare", "other", "--input=text.txt")[0] == 0
    assert call("train", *TINY, "--out_dir=a")[0] == 0
    assert call("train", *TINY, "--out_dir=b", "--dataset=other")[0] == 0
    assert call("train", *TINY, "--out_dir=short", "--block_size=8")[0] == 0
    for argv, complaint in (
        (["sample", "--out_dir=a,b"], "a,b: runs of different tokenizers"),
        (["sample", "--out_dir=a,"], "'a,': the name of a folder is empty"),
        (["evaluate", "--out_dir=a,none"], "none/ckpt.pt is missing"),
        (["evaluate", "--out_dir=a", "--dataset=other"], "'other' has another tokenizer than a"),
        (["train", *TINY, "--distill_from=b"], "'tiny' has another tokenizer than b"),
        (["train", *TINY, "--distill_from=none"], "none/ckpt.pt is missing"),
        (["train", *TINY, "--distill_from=a,short"], "a block_size of 8, shorter than this run's"),
        (["train", *TINY, "--distill_from=a", "--distill_weight=2"], "distill_weight"),
        (["train", *TINY, "--distill_from=a,b", "--out_dir=a", "--overwrite=true"], "a teacher's"),
    ):
        code, _, err = call(*argv)
        assert code == 2 and is_one_error_line(err) and complaint in err, argv


def test_where_weights_were_trained_is_asked_for_if_they_do_not_say_it(tiny, call):
    model = tiny_model(CLASSIC, vocab_size=65)
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias")
    args = {name: getattr(model.config, name) for name in names}
    torch.save({"model": model.state_dict(), "model_args": args}, "nano.pt")
    code, _, err = call("evaluate", "--init_from=nano.pt")
    assert code == 2 and is_one_error_line(err) and "give --dataset=NAME" in err
    code, out, _ = call("evaluate", "--init_from=nano.pt", "--dataset=tiny")
    assert code == 0 and "nano.pt on tiny: val loss" in out


def test_a_text_that_was_replaced_is_told(tiny, call):
    call("train", *TINY)
    assert call("evaluate")[2] == ""
    Path("more.txt").write_text(Path("text.txt").read_text() * 2)
    call("prepare", "tiny", "--input=more.txt", "--overwrite=true")
    code, out, err = call("evaluate")
    assert code == 0 and "out on tiny" in out
    note = "dataset 'tiny' has another text now than when {} was trained on it\n"
    assert err == note.format("out")
    assert call("train", *TINY, "--out_dir=new")[0] == 0
    assert call("evaluate", "--out_dir=new,out")[2] == note.format("out"), "of the member alone"
    assert call("train", *TINY, "--out_dir=b", "--distill_from=new,out")[2] == note.format("out")


def test_members_of_several_datasets_are_evaluated_on_a_named_one(tiny, call):
    assert call("prepare", "twin", "--input=text.txt")[0] == 0
    for name in ("tiny", "twin"):
        assert call("train", *TINY, f"--dataset={name}", f"--out_dir={name}")[0] == 0
    code, _, err = call("evaluate", "--out_dir=tiny,twin")
    assert code == 2 and is_one_error_line(err) and "give --dataset=NAME" in err
    code, out, _ = call("evaluate", "--out_dir=tiny,twin", "--dataset=twin")
    assert code == 0 and "tiny,twin on twin: val loss" in out


def test_it_is_not_compiled(tiny, call):
    assert call("train", *TINY)[0] == 0
    code, _, err = call("sample", "--out_dir=out,out", "--compile=true")
    assert code == 2 and is_one_error_line(err) and "compile=true" in err


def student(*flags: str) -> train.Run:
    flags = [*TINY, "--grad_clip=0", "--out_dir=new", *flags]
    return train.setup(settings.load(train.TrainConfig, flags, usage=""))


def gradient(run: train.Run) -> torch.Tensor:
    run.model.zero_grad()
    idx, targets = train.get_batch(run, 0)
    targets[0, 0, :5] = -1
    train.compute_gradients(run, idx, targets)
    return torch.cat([p.grad.flatten() for p in run.model.parameters()])


def test_a_student_is_drawn_towards_the_teacher_by_its_weight(tiny, call):
    assert call("train", *TINY)[0] == 0
    from_text = gradient(student())
    no_teacher = gradient(student("--distill_from=out", "--distill_weight=0"))
    assert torch.allclose(no_teacher, from_text, atol=1e-7)
    whole = gradient(student("--distill_from=out", "--distill_weight=1"))
    half = gradient(student("--distill_from=out", "--distill_weight=0.5"))
    assert torch.allclose(half, (whole + from_text) / 2, atol=1e-7)

    same = student("--distill_from=out", "--distill_weight=1")
    same.model.load_state_dict(same.teacher.model.state_dict())
    assert gradient(same).abs().max() < 1e-6, "a student that agrees has nothing to learn"
    # By finite differences: the gradient is that of the cross-entropy with the teacher's softmax.
    run = student("--distill_from=out", "--distill_weight=1")
    idx, targets = train.get_batch(run, 0)
    with torch.no_grad():
        logits, taught = run.model(idx[0])[0], run.teacher.model(idx[0])[0].softmax(dim=-1)
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), taught.flatten(0, 1))
        loss = run.teacher.loss_sum(logits, idx[0], targets[0]) / targets[0].numel()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_teacher_stays_as_it_is_and_out_of_the_checkpoint(tiny, call):
    assert call("train", *TINY)[0] == 0
    run = student("--distill_from=out,out", "--dropout=0.1")
    before = [p.clone() for p in run.teacher.model.parameters()]
    for _ in range(2):
        train.train_step(run)
    after = [*run.teacher.model.parameters()]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, after, strict=True))
    assert not run.teacher.model.training
    assert (
        isinstance(run.model, GPT) and dataclasses.asdict(run.config)["distill_from"] == "out,out"
    )


def test_a_student_goes_on_with_the_same_teacher_or_none(tiny, call):
    assert call("train", *TINY, "--out_dir=teacher")[0] == 0
    assert call("train", *TINY, "--distill_from=teacher", "--max_iters=3")[0] == 0
    resume = ["train", "--init_from=resume", "--max_iters=6"]
    Path("teacher").rename("elsewhere")
    assert call("train", "--init_from=resume", "--eval_only=true")[0] == 0, "needs no teacher"
    assert call("train", *TINY, "--out_dir=teacher", "--seed=2")[0] == 0
    code, _, err = call(*resume)
    assert code == 2 and is_one_error_line(err)
    assert "distill_from=teacher is not what the run began with" in err
    assert call(*resume, "--distill_from=elsewhere")[0] == 0, "the same under another name"
    assert call(*resume, "--distill_from=", "--max_iters=7")[0] == 0


def test_answers_have_no_bits_per_byte(sums, call):
    assert call("train", *TINY, "--dataset=addition")[0] == 0
    code, out, _ = call("evaluate", "--dtype=float32")
    last = call("train", "--init_from=resume", "--eval_only=true")[1]
    assert code == 0 and "bpb" not in out + last
    assert out.partition(": ")[2].partition(", in")[0] in last
