from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import VARIANTS, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from quill.errors import RunError
from quill.sampling.decoder import Decoder
from quill.sampling.text import SampleOptions, sample_tokens
from quill.training.models import Bigram, BigramConfig
from quill.views.batching import Batch, Cuts, Text

VOCAB_SIZE = 10  # the models' last id is padding
CUTS = (Cuts(1.0, 0, 1.0), Cuts(0.7, 3, 1.0), Cuts(1.3, 0, 0.8), Cuts(0.0, 0, 1.0))


class Writing:
    """A text of n tokens and what it becomes."""

    def __init__(self, prompt: list[int], n: int, cuts: Cuts, number: int):
        self.prompt, self.n, self.cuts, self.number = prompt, n, cuts, number
        self.written: list[int] = []
        rng = np.random.default_rng([7, number])
        self.text = Text([*prompt], cuts, rng, self.on_token, on_error=pytest.fail)

    def on_token(self, token: int, logits: torch.Tensor) -> bool:
        assert logits.shape == (VOCAB_SIZE,)
        self.written.append(token)
        return len(self.written) == self.n

    def alone(self, model) -> list[int]:
        """What sample.py writes."""
        options = SampleOptions(num_samples=1, max_new_tokens=self.n, seed=7, **self.cuts._asdict())
        decoder = Decoder(model, VOCAB_SIZE)
        return [t for [t] in sample_tokens(decoder, self.prompt, options, first=self.number)]


def write(model, writings: list[Writing], joins_at: list[int], max_texts: int) -> None:
    batch, waiting, step = Batch(model, VOCAB_SIZE, max_texts), [*writings], 0
    while waiting or batch.texts:
        while waiting and len(batch.texts) < max_texts and joins_at[len(waiting) - 1] <= step:
            batch.join(waiting.pop().text)
        if batch.texts:
            batch.step()
        step += 1


@VARIANTS
@settings(max_examples=8)
@given(st.data())
def test_each_text_is_what_it_is_alone(switches, data):
    """Whoever joins or leaves when, before and after a text has outgrown the context of 8."""
    model = tiny_model(switches)
    sizes = data.draw(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 25)), min_size=1))
    writings = []
    for number, (n_prompt, n) in enumerate(sizes[:6]):
        prompt = np.random.default_rng(number).integers(0, VOCAB_SIZE, n_prompt).tolist()
        writings.append(Writing(prompt, n, data.draw(st.sampled_from(CUTS)), number))
    joins_at = [data.draw(st.integers(0, 12)) for _ in writings]
    write(model, writings, joins_at, max_texts=data.draw(st.integers(1, 4)))
    for writing in writings:
        assert writing.written == writing.alone(model)


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_the_shortest_contexts(block_size):
    model = tiny_model({}, block_size=block_size)
    writings = [Writing([1, 2, 3][: i + 1], 9, CUTS[0], i) for i in range(3)]
    write(model, writings, [0, 0, 0], max_texts=3)
    assert [w.written for w in writings] == [w.alone(model) for w in writings]


def test_a_bigram_has_no_cache():
    model = Bigram(BigramConfig(vocab_size=11, block_size=8)).eval()
    torch.nn.init.normal_(next(model.parameters()), generator=torch.Generator().manual_seed(0))
    writings = [Writing([i], 9, CUTS[0], i) for i in range(3)]
    write(model, writings, [0, 2, 4], max_texts=2)
    assert [w.written for w in writings] == [w.alone(model) for w in writings]


def test_bfloat16_weights_write():
    model = tiny_model({"position": "rotary"}).bfloat16()
    writings = [Writing([i], 9, CUTS[0], i) for i in range(3)]
    write(model, writings, [0, 2, 4], max_texts=3)
    assert all(len(w.written) == 9 for w in writings)


def test_scores_that_are_not_finite_are_an_error():
    model = tiny_model({})
    batch = Batch(model, VOCAB_SIZE, 2)
    batch.join(Writing([1], 9, CUTS[0], 0).text)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        batch.step()
