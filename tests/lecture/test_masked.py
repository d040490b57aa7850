"""The masked-character encoder and the counting that stands beside it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lecture import gpt, masked, spelled_out
from lecture.masked import GAP, Encoder, T


def test_an_encoder_sees_both_sides_and_not_what_is_masked():
    torch.manual_seed(0)
    model, idx = Encoder(5).eval(), torch.randint(5, (1, T))
    is_masked = torch.zeros(1, T, dtype=torch.bool)
    is_masked[0, 10] = True
    before = model(idx, is_masked)
    for place, changes in ((2, True), (60, True), (10, False)):
        other = idx.clone()
        other[0, place] = (other[0, place] + 1) % 5
        assert torch.equal(model(other, is_masked), before) != changes, place


@pytest.mark.parametrize("offset", range(GAP))
def test_two_characters_on_either_side_of_a_mask_are_seen(offset):
    [places] = [masks.nonzero()[:, 0].tolist() for masks in masked.masks(1, offset)]
    hidden = {*places}
    assert len(places) in (20, 21)
    for place in places:
        around = {place - 2, place - 1, place + 1, place + 2}
        assert not around & hidden and min(around) >= 0 and max(around) < T


@given(st.lists(st.integers(0, 3), min_size=8, max_size=60), st.integers(2, 5))
def test_the_probabilities_of_all_characters_sum_to_one(train_ids, place):
    is_masked = torch.arange(8)[None] == place
    probs = []
    for char in range(4):
        idx = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
        idx[0, place] = char
        probs.append(math.exp(-masked.ngram_loss(train_ids, idx, is_masked, 4)))
    assert sum(probs) == pytest.approx(1, abs=1e-5) and min(probs) > 0


def test_what_was_always_so_is_expected():
    train_ids = [0, 1, 2, 3] * 50
    idx, is_masked = torch.tensor([[0, 1, 2, 3, 0, 1]]), torch.arange(6)[None] == 3
    assert masked.ngram_loss(train_ids, idx, is_masked, 4) < 0.03
    surprising = torch.tensor([[0, 1, 2, 2, 0, 1]])
    assert masked.ngram_loss(train_ids, surprising, is_masked, 4) > 4


def test_it_trains_on_a_text_and_says_what_it_cannot_read(folder, text, capsys):
    Path("text.txt").write_text(text, encoding="utf-8")
    assert masked.main(["text.txt", "--steps=2"]) == 0
    assert capsys.readouterr().out.count("nats per masked character") == 2
    Path("short.txt").write_text("too short")
    Path("bytes.txt").write_bytes(b"\xff" * 9999)
    os.mkfifo("pipe")
    for lecture in (masked, gpt, spelled_out):
        for name in ("short.txt", "bytes.txt", "pipe"):
            with pytest.raises(SystemExit) as stop:
                lecture.main([name])
            assert stop.value.code == 2 and f"error: {name}: " in capsys.readouterr().err
