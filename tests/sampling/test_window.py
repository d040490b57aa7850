"""What CUDA graphs of sampling record, without the recording: it makes the tokens of generate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import CLASSIC, MODERN, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from model import generate
from quill.errors import RunError
from quill.sampling.decoder import Decoder
from quill.sampling.text import SampleOptions, sample_tokens
from quill.sampling.window import TOKENS_PER_READ, Window

MODELS = {name: tiny_model(kind) for name, kind in (("classic", CLASSIC), ("modern", MODERN))}
CUTS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 1, 4, 200]),
        "top_p": st.sampled_from([1.0, 0.6]),
    }
)


def in_turn(numbers):
    """-> what Decoder.generate and what model.generate take: n rows at a call, and one."""
    rows, ones = iter(numbers), iter(numbers)

    def several(n: int):
        padding = torch.zeros(n, numbers.size(1))  # more than is needed may be asked for
        return torch.stack([next(rows, zeros) for zeros in padding])

    return several, ones.__next__


@given(
    st.sampled_from([*MODELS]),
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(0, 3 * TOKENS_PER_READ),
    CUTS,
    st.integers(0, 2**32 - 1),
)
def test_a_window_makes_the_tokens_of_generate(name, B, prompt_tokens, n_tokens, cuts, seed):
    """Its block_size is 8: most of these are longer, and read the most recent half again."""
    model, rng = MODELS[name], np.random.default_rng(seed)
    idx = torch.from_numpy(rng.integers(0, 11, (B, prompt_tokens)))
    numbers = torch.from_numpy(rng.random((n_tokens, B), dtype=np.float32))
    several, one = in_turn(numbers)
    expected = [new.tolist() for new in generate(model, idx, n_tokens, **cuts, uniform=one)]
    window = Window(model, 11, False, B, **cuts)
    assert [*window.generate(idx, n_tokens, several)] == expected
    several, _ = in_turn(numbers)
    plain = Decoder(model, 11).generate(idx, n_tokens, **cuts, uniform=several)
    assert [*plain] == expected


@pytest.mark.parametrize("kind", [CLASSIC, MODERN])
def test_a_window_of_bfloat16_weights(kind):
    """As `sample.py --compile=true` has them on a CPU; the cache is in float32 there."""
    model = tiny_model(kind).bfloat16()
    idx, cuts = torch.tensor([[1, 2, 3]]), {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    expected = [new.tolist() for new in generate(model, idx, 20, **cuts)]
    made = Window(model, 11, False, 1, **cuts).generate(idx, 20, lambda n: torch.zeros(n, 1))
    assert [*made] == expected


def test_a_window_serves_one_text_after_another():
    window = Window(MODELS["modern"], 11, False, 1, temperature=0.0, top_k=0, top_p=1.0)
    idx = torch.tensor([[1, 2, 3]])

    def uniform(n: int):
        return torch.zeros(n, 1)

    first = [*window.generate(idx, 20, uniform)]
    assert [*window.generate(torch.tensor([[5]]), 20, uniform)] != first
    assert [*window.generate(idx, 20, uniform)] == first
    unfinished = window.generate(idx, 20, uniform)
    next(unfinished)
    next(window.generate(idx.clone(), 20, uniform))
    with pytest.raises(AssertionError, match="in use"):
        list(unfinished)


def test_padding_is_never_sampled_and_scores_that_are_not_finite_are_an_error(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **options: step)
    model = tiny_model(MODERN)
    options = SampleOptions(num_samples=2, max_new_tokens=40, temperature=5.0, top_k=0)
    tokens = [*sample_tokens(Decoder(model, 4, compiled=True), [1], options)]
    assert len(tokens) == 40 and max(map(max, tokens)) == 3
    plain = [*sample_tokens(Decoder(model, 4), [1], options)]
    assert plain == tokens, "of the same seeds"
    model.transformer.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        [*sample_tokens(Decoder(model, 4, compiled=True), [1], options)]
