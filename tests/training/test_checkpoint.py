from __future__ import annotations

import math
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import seal

from model import GPT, GPTConfig
from quill.errors import InputError
from quill.interop import pretrained
from quill.training import checkpoint


class Payload:
    """Pickles to a call of os.system."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def contents() -> dict:
    config = {"block_size": 4, "vocab_size": 2, "n_layer": 1, "n_head": 1, "n_embd": 4}
    return {
        "model": GPT(GPTConfig(**config)).state_dict(),
        "model_config": config,
        "config": {"seed": 1},
        "tokenizer": {"kind": "char", "chars": "ab"},
        "step": 3,
    }


def test_round_trip(folder):
    path = Path("best.pt")
    checkpoint.save_checkpoint(path, contents())
    loaded = pretrained.from_run(path)
    assert loaded.config.n_embd == 4 and loaded.tokenizer.chars == "ab"
    for name, p in loaded.build().state_dict().items():
        assert (p == checkpoint.load_checkpoint(path)["model"][name]).all()


def test_best_comes_before_last(folder):
    checkpoint.save_checkpoint(folder / "ckpt.pt", contents())
    assert checkpoint.find_checkpoint(folder).name == "ckpt.pt"
    checkpoint.save_checkpoint(folder / "best.pt", contents())
    assert checkpoint.find_checkpoint(folder).name == "best.pt"


@pytest.mark.parametrize("has_hard_links", [True, False])
def test_the_one_before_is_kept_and_the_last_never_missing(folder, monkeypatch, has_hard_links):
    if not has_hard_links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("none here")))
    last, previous = folder / "ckpt.pt", folder / "ckpt.previous.pt"
    replace, was_there = Path.replace, []

    def watched(self, target):
        result = replace(self, target)
        was_there.append(last.exists())
        return result

    checkpoint.save_checkpoint(last, contents() | {"step": 1}, previous)
    monkeypatch.setattr(Path, "replace", watched)
    for step in (2, 3):
        checkpoint.save_checkpoint(last, contents() | {"step": step}, previous)
    assert [checkpoint.load_checkpoint(path)["step"] for path in (last, previous)] == [3, 2]
    assert all(was_there) == has_hard_links
    assert sorted(p.name for p in folder.iterdir()) == ["ckpt.previous.pt", "ckpt.pt"]


def damaged(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("hello")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "another zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "hello")
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Payload()))
    elif how == "flipped":
        path.write_bytes(data[:900] + bytes([data[900] ^ 4]) + data[901:])
    elif how == "resaved":
        torch.save(torch.load(path, weights_only=True), path)
    elif how == "payload":
        checkpoint.save_checkpoint(path, contents() | {"extra": Payload()})
    elif how == "tensor":
        torch.save(torch.zeros(3), path)
        seal(path)
    elif how == "foreign":
        torch.save({"model": {}, "model_args": {}}, path)
        seal(path)
    elif how == "newer":
        checkpoint.save_checkpoint(path, contents() | {"quill_checkpoint": 99})
    else:
        checkpoint.save_checkpoint(path, contents() | {"model_config": [1]})


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("missing", "is missing: train first"),
        ("empty", "damaged, or not a checkpoint"),
        ("text", "damaged, or not a checkpoint"),
        ("folder", "not a regular file"),
        ("truncated", "damaged"),
        ("flipped", "damaged"),
        ("resaved", "its checksum is missing"),
        ("another zip", "damaged, or not a checkpoint"),
        ("pickle", "damaged, or not a checkpoint"),
        ("payload", "nothing in it was run"),
        ("tensor", "is not a checkpoint .Tensor"),
        ("foreign", "is not a Quill checkpoint"),
        ("newer", "not a Quill checkpoint of schema version 2"),
        ("wrong types", "model_config missing or broken"),
    ],
)
def test_what_is_not_a_checkpoint_is_refused(folder, how, complaint):
    checkpoint.save_checkpoint(folder / "ckpt.pt", contents())
    damaged(folder / "ckpt.pt", how)
    with pytest.raises(InputError, match=complaint) as caught:
        checkpoint.load_checkpoint(folder / "ckpt.pt")
    assert "ckpt.pt" in str(caught.value)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {}},
        {"model_config": contents()["model_config"] | {"n_embd": 8}},
        {"model_config": contents()["model_config"] | {"n_head": 3}},
        {"model_config": contents()["model_config"] | {"n_head": "one"}},
        {"model_config": contents()["model_config"] | {"n_head": 0}},
        {"model_config": contents()["model_config"] | {"n_head": -1}},
        {"model": {7: torch.zeros(1)}},
        {"model_config": {"shape": 3}},
        {"model_config": contents()["model_config"] | {"n_layer": 10**9}},
        {"model_config": contents()["model_config"] | {"n_embd": 10**9}},
        {"model_config": contents()["model_config"] | {"vocab_size": 10**18}},
        {"model_config": contents()["model_config"] | {"block_size": 10**12, "position": "rotary"}},
        {"model_config": contents()["model_config"] | {"mlp": "softmax"}},
        {"model_config": contents()["model_config"] | {"dropout": "much"}},
        {"model": {name: p * math.nan for name, p in contents()["model"].items()}},
        {"tokenizer": {"kind": "morse"}},
    ],
)
def test_weights_that_do_not_fit_their_config_are_refused(folder, changes):
    checkpoint.save_checkpoint(Path("x.pt"), contents() | changes)
    with pytest.raises(InputError, match=r"x\.pt"):
        pretrained.from_run(Path("x.pt"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_keeps_the_checkpoint_that_was_there(folder, full_disk):
    checkpoint.save_checkpoint(folder / "ckpt.pt", contents())
    before = (folder / "ckpt.pt").read_bytes()
    full_disk(folder / "ckpt.pt")
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_checkpoint(folder / "ckpt.pt", contents())
    assert (folder / "ckpt.pt").read_bytes() == before
    assert [p.name for p in folder.iterdir()] == ["ckpt.pt"]
