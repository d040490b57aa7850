from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REPO, TINY, VARIANTS, is_one_error_line, random_ids, tiny_model
from matplotlib import image, rc_context, rcParams

from model import attend
from quill import plot
from quill.data import tokenizers
from quill.views import curves, insides, pictures

EVALUATIONS = [
    {"step": 0, "train_loss": 4.0, "val_loss": 4.1, "lr": 0.0},
    {"step": 5, "train_loss": 2.0, "val_loss": 2.25, "lr": 0.01},
    {"step": 9, "train_loss": 1.0, "val_loss": 3.0, "lr": 0.0},
]


def written(out: str) -> list[Path]:
    """The files that a call says it wrote, in their order."""
    lines = [line.split() for line in out.splitlines()]
    pairs = [(Path(png), Path(png).with_name(svg)) for _, png, _, svg in lines]
    return [path for pair in pairs for path in pair]


# ---- losses ------------------------------------------------------------------------------------


def test_the_losses_alone_need_no_torch(tiny, call):
    call("train", *TINY)
    with Path("out/metrics.jsonl").open("a") as file:  # of an update that was skipped
        file.write('{"step": 6, "skipped": 1}\n{"step": 6, "loss": null, "grad_norm": null}\n')
    probe = "import sys; from quill import plot; plot.main(['--pictures=loss'])"
    probe += "; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(REPO), "MPLBACKEND": "none of them"}
    line = [sys.executable, "-W", "error", "-c", probe]
    done = subprocess.run(line, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    png, svg = written(done.stdout.decode())
    assert (str(png), str(svg)) == ("out/loss.png", "out/loss.svg")
    pixels = image.imread(png)
    assert (pixels[0, 0] == 1).all() and (pixels[..., 3] == 1).all(), "opaque on white"
    words = " ".join(ET.parse(svg).getroot().itertext())
    assert "val, best" in words and "at step 6" in words and "learning rate" in words


def test_the_best_step_of_each_run_is_marked():
    batches = [{"step": 3, "loss": 3.0, "lr": 0.02}, {"step": 4}]
    figure = curves.draw_losses({"a": [*EVALUATIONS[:2], *batches], "b": EVALUATIONS})
    above, below = figure.axes
    best = [line for line in above.lines if line.get_marker() == "*"]
    for line, name, losses in zip(best, "ab", ([4.1, 2.25], [4.1, 2.25, 3.0]), strict=True):
        assert line.get_label() == f"{name}: val, best 2.2500 at step 5"
        assert list(line.get_ydata()) == losses and line.get_markevery() == [1]
    dashed = [list(line.get_ydata()) for line in above.lines if line.get_linestyle() == "--"]
    assert dashed == [[4.0, 2.0], [4.0, 2.0, 1.0]]
    assert [list(line.get_ydata()) for line in below.lines] == [[0.0, 0.01, 0.02], [0.0, 0.01, 0.0]]
    assert best[0].get_color() != best[1].get_color()


def test_scores_over_the_distance_from_the_start(folder, call):
    scored = [
        {"step": 0, "val_loss": 2.0, "val_kl": 0.0, "val_judge": 0.5, "val_reward": 1.0},
        {"step": 5, "val_loss": 2.5, "val_kl": 0.25, "val_judge": 0.25, "val_reward": 3.0},
    ]
    without_reward = [{k: v for k, v in r.items() if k != "val_reward"} for r in scored]
    figure = curves.draw_kl({"rl": scored, "dpo": without_reward})
    judge, reward = figure.axes
    assert [line.get_label() for line in judge.lines] == ["rl", "dpo"]
    assert judge.lines[0].get_xydata().tolist() == [[0.0, 0.5], [0.25, 0.25]]
    assert [line.get_xydata().tolist() for line in reward.lines] == [[[0.0, 1.0], [0.25, 3.0]], []]
    for name, records in {"rl": scored, "plain": EVALUATIONS}.items():
        Path(name).mkdir()
        lines = "".join(json.dumps(record) + "\n" for record in records)
        Path(name, "metrics.jsonl").write_text(lines)
    code, out, _ = call("plot", "--out_dir=rl,plain", "--pictures=kl")
    assert code == 0 and written(out)[0] == Path("rl/kl.png") and Path("rl/kl.svg").exists()
    code, out, _ = call("plot", "--out_dir=rl,plain", "--pictures=time")
    assert code == 0 and written(out)[0] == Path("rl/time.png")
    timed = [{"step": 1, "seconds": 2.5, "val_loss": 2.0}, {"step": 2, "seconds": 5.0, "loss": 1.0}]
    [axes] = curves.draw_time({"a": timed}).axes
    assert axes.lines[0].get_xydata().tolist() == [[2.5, 2.0]]
    code, _, err = call("plot", "--out_dir=plain", "--pictures=kl")
    assert code == 2 and "no evaluation has a val_judge" in err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "metrics.jsonl: No such file"),
        ("{", "line 1: not a line of metrics"),
        ("7", "line 1"),
        ("[" * 100_000, "line 1"),
        ('{"step": 1, "loss": 2.0}\n{"step": "a", "loss": 2.0}', "line 2"),
        ('{"step": 1, "train_loss": 1.0, "val_loss": [2]}', "line 1"),
        ('{"step": 1, "lr": "high"}', "line 1"),
        ("", "no evaluation yet"),
    ],
)
def test_nothing_to_draw(folder, call, content, complaint):
    Path("out").mkdir()
    if content is not None:
        Path("out/metrics.jsonl").write_text(content + "\n" * bool(content))
    code, _, err = call("plot")
    assert code == 2 and is_one_error_line(err) and complaint in err


def test_a_kill_cuts_a_line_short_and_a_full_disk_leaves_what_was_there(folder, call, full_disk):
    Path("out").mkdir()
    whole = '{"step": 0, "train_loss": 1.0, "val_loss": 2.0, "lr": 0.1}\n'
    Path("out/metrics.jsonl").write_text(whole + '{"step": 1, "lo')
    assert call("plot", "--pictures=loss")[0] == 0
    before = Path("out/loss.png").read_bytes()
    full_disk("out/loss.png")
    code, _, err = call("plot", "--pictures=loss")
    assert code == 1 and is_one_error_line(err) and "loss.png: No space left" in err
    assert Path("out/loss.png").read_bytes() == before


def test_without_matplotlib(folder, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call("plot")
    assert code == 2 and is_one_error_line(err) and "pip install '.[plot]'" in err


# ---- the model's pictures ----------------------------------------------------------------------


@torch.no_grad()
def test_attention_weights_are_those_that_attend_uses():
    """Whatever kernel computes it: the output is the weights times the values."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 7, 8)
    weights = insides.attention_weights(q, k)
    assert (weights.triu(1) == 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 2, 7))
    torch.testing.assert_close(weights @ v, attend(q, k, v, is_causal=True))


def test_all_pictures_of_a_run(tiny, call, monkeypatch):
    call("train", *TINY)
    code, out, err = call("plot", "--out_dir=out")
    assert (code, err) == (0, "")
    files = written(out)
    names = ["loss", "attention", "surprise", "neighbours"]
    assert [path.name for path in files] == [
        f"{n}.{kind}" for n in names for kind in ("png", "svg")
    ]
    contents = [path.read_bytes() for path in files]
    assert call("plot", "--out_dir=out")[0] == 0
    assert [path.read_bytes() for path in files] == contents, "the same files each time"

    code, out, err = call("plot", "--pictures=surprise", "--start=été — $x$")
    assert code == 2 and "'$' (U+0024)" in err and "--start" in err and is_one_error_line(err)
    code, out, err = call("plot", "--pictures=surprise", "--start=e")
    assert code == 2 and "--start of two" in err and is_one_error_line(err)
    Path("prompt.txt").write_text("to sleep — été\n" * 9)
    code, out, _ = call("plot", "--pictures=surprise", "--start=FILE:prompt.txt")
    _, svg = written(out)
    words = [*ET.parse(svg).getroot().itertext()]
    assert code == 0 and "—" in words and "↵" in words and "·" in words
    assert any("the first 17 of 135" in word for word in words), "as many as fit the context"

    Path("out").rename("$\\x$")  # as a formula it would be wrong
    code, out, _ = call("plot", f"--out_dir=$\\x$,{tiny}/$\\x$")
    assert (code, out) == (0, "wrote $\\x$/losses.png and losses.svg\n")
    for flag in ("--pictures=attention", "--start=e"):
        code, _, err = call("plot", f"--out_dir=$\\x$,{tiny}/$\\x$", flag)
        assert code == 2 and is_one_error_line(err) and "one run, not $\\x$," in err
    code, _, err = call("plot", "--out_dir=$\\x$,")
    assert code == 2 and is_one_error_line(err) and "is empty" in err
    monkeypatch.setitem(rcParams, "text.usetex", True)  # as a matplotlibrc may have it
    assert call("plot", "--out_dir=$\\x$", "--pictures=loss")[0] == 0
    Path("$\\x$").rename("a,b")
    assert call("plot", "--out_dir=a,b")[1].startswith("wrote a,b/loss.png")


@VARIANTS
@torch.no_grad()
def test_attention_maps_are_what_the_model_uses(switches):
    """Its own attention, which never shows its weights, gives what these weights give."""
    model, ids = tiny_model(switches), random_ids(7)
    seen = []
    hooks = [
        block.attn.register_forward_hook(lambda *call: seen.append(call))
        for block in model.transformer.h
    ]
    model(ids[None])
    for hook in hooks:
        hook.remove()
    maps = insides.attention_maps(model, ids)
    assert maps.shape == (2, 2, 7, 7)
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 2, 7))
    assert (maps.triu(1) == 0).all(), "nobody sees the future"
    for weights, (attention, (x, rotary, _), output) in zip(maps, seen, strict=True):
        _, _, v = attention.queries_keys_values(x, rotary)
        y = (weights @ v[0]).transpose(0, 1).reshape(1, 7, 16)
        torch.testing.assert_close(attention.c_proj(y), output)


@VARIANTS
@torch.no_grad()
def test_surprise_is_the_loss_and_padding_is_never_guessed(switches):
    model, ids = tiny_model(switches), random_ids(9)
    surprise, guessed, probs = insides.guesses(model, ids, vocab_size=6, n_guesses=4)
    logits, loss = model(ids[None, :-1], ids[None, 1:])
    assert surprise.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    expected = logits[0].softmax(dim=-1)[:, :6].sort(descending=True)
    assert torch.equal(guessed, expected.indices[:, :4])
    torch.testing.assert_close(probs, expected.values[:, :4])


@torch.no_grad()
def test_neighbours_point_the_same_way():
    model = tiny_model({})
    angles = torch.tensor([0.0, 3.0, 0.1, 1.5, -0.2, 0.0])
    vectors = torch.stack((angles.cos(), angles.sin()), dim=1)
    model.transformer.wte.weight.zero_()
    model.transformer.wte.weight[:6, :2] = vectors * torch.tensor([[1.0], [9], [5], [1], [7], [9]])
    cosines, tokens = insides.neighbours(model, [0, 3], vocab_size=5, n=8)  # 5 is padding
    assert tokens.tolist() == [[2, 4, 3, 1], [2, 1, 0, 4]]
    assert cosines[0].tolist() == pytest.approx([math.cos(x) for x in (0.1, 0.2, 1.5, 3)], abs=1e-6)


def test_a_text_is_wrapped_in_columns():
    cells = pictures.wrapped(np.array([["a", "A"], ["b", "B"], ["c", "C"]]), 2, "")
    assert cells.tolist() == [["", "a"], ["", "A"], ["", ""], ["b", "c"], ["B", "C"]]


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        (
            tokenizers.ByteTokenizer(),
            " \n\t\0$é",
            ["·", "↵", "\\t", "\\x00", "$", "\\xc3", "\\xa9"],
        ),
        (
            tokenizers.CharTokenizer("\xadé中😀"),
            "\xadé中😀",
            ["\\xad", "é", "\\u4e2d", "\\U0001f600"],
        ),
    ],
)
def test_every_token_can_be_shown(tokenizer, text, expected):
    assert pictures.labels_of(tokenizer, tokenizer.encode(text).tolist()) == expected


@torch.no_grad()
@pytest.mark.parametrize(("shape", "chars"), [({"block_size": 1}, "\nb"), ({"n_head": 16}, "\n$")])
def test_odd_models_can_be_drawn(shape, chars):
    model, tokenizer = tiny_model({}, **shape, vocab_size=2), tokenizers.CharTokenizer(chars)
    ids = pictures.written_by(model, tokenizer)
    for draw in (pictures.draw_attention, pictures.draw_surprise, pictures.draw_neighbours):
        with rc_context(plot.STYLE):
            draw(model, tokenizer, ids).savefig(io.BytesIO())
