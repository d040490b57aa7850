"""The encoder, the decoder and their attentions are PyTorch's; the dates are right."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lecture import encoder_decoder as lecture
from lecture.encoder_decoder import N_HEAD, PAD, Attention, C, DecoderBlock, EncoderBlock

EQUAL = {"rtol": 1e-5, "atol": 1e-5}
LAYER = {"dropout": 0.0, "activation": "relu", "batch_first": True, "norm_first": True}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def carry_attention(theirs: nn.MultiheadAttention, ours: Attention) -> None:
    """Give PyTorch's layer the weights of ours."""
    parts = (ours.query, ours.key, ours.value)
    theirs.in_proj_weight.data = torch.cat([part.weight.data for part in parts])
    theirs.in_proj_bias.data = torch.cat([part.bias.data for part in parts])
    theirs.out_proj.load_state_dict(ours.proj.state_dict())


def carry_encoder(theirs: nn.TransformerEncoderLayer, ours: EncoderBlock) -> None:
    carry_attention(theirs.self_attn, ours.attention)
    pairs = [(theirs.norm1, ours.ln_1), (theirs.norm2, ours.ln_2)]
    pairs += [(theirs.linear1, ours.feed_forward[0]), (theirs.linear2, ours.feed_forward[2])]
    for there, here in pairs:
        nn.init.normal_(here.weight, 1.0, 0.2)
        there.load_state_dict(here.state_dict())


def carry_decoder(theirs: nn.TransformerDecoderLayer, ours: DecoderBlock) -> None:
    carry_attention(theirs.self_attn, ours.self_attention)
    carry_attention(theirs.multihead_attn, ours.cross_attention)
    pairs = [(theirs.norm1, ours.ln_1), (theirs.norm2, ours.ln_2), (theirs.norm3, ours.ln_3)]
    pairs += [(theirs.linear1, ours.feed_forward[0]), (theirs.linear2, ours.feed_forward[2])]
    for there, here in pairs:
        nn.init.normal_(here.weight, 1.0, 0.2)
        there.load_state_dict(here.state_dict())


def padded(B: int, S: int) -> torch.Tensor:
    """is_real (B, 1, S): the first row is whole, the others end earlier."""
    lengths = torch.arange(S, S - B, -1)
    return torch.arange(S) < lengths[:, None, None]


def test_attention_is_pytorchs():
    """To itself, to something else, and with a mask."""
    ours, theirs = Attention(), nn.MultiheadAttention(C, N_HEAD, batch_first=True)
    carry_attention(theirs, ours)
    x, source = torch.randn(3, 5, C), torch.randn(3, 7, C)
    is_real = padded(3, 7)
    wanted, weights = theirs(x, source, source, key_padding_mask=~is_real[:, 0])
    torch.testing.assert_close(ours(x, source, is_real), wanted, **EQUAL)
    torch.testing.assert_close(ours.weights.mean(dim=1), weights, **EQUAL)
    past = torch.ones(1, 5, 5).tril().bool()
    wanted, _ = theirs(x, x, x, attn_mask=~past[0])
    torch.testing.assert_close(ours(x, x, past), wanted, **EQUAL)


def test_blocks_are_pytorchs():
    encoder = nn.TransformerEncoderLayer(C, N_HEAD, 4 * C, **LAYER)
    decoder = nn.TransformerDecoderLayer(C, N_HEAD, 4 * C, **LAYER)
    ours = EncoderBlock(), DecoderBlock()
    carry_encoder(encoder, ours[0])
    carry_decoder(decoder, ours[1])
    x, y, is_real = torch.randn(3, 7, C), torch.randn(3, 5, C), padded(3, 7)
    hidden = ~is_real[:, 0]
    torch.testing.assert_close(
        ours[0](x, is_real)[is_real[:, 0]],
        encoder(x, src_key_padding_mask=hidden)[is_real[:, 0]],
        **EQUAL,
    )
    past = torch.ones(1, 5, 5).tril().bool()
    masks = {"tgt_mask": ~past[0], "memory_key_padding_mask": hidden}
    torch.testing.assert_close(ours[1](y, x, past, is_real), decoder(y, x, **masks), **EQUAL)


def test_the_model_is_pytorchs():
    model = lecture.Transformer().double()
    n = lecture.N_LAYER
    layer = nn.TransformerEncoderLayer(C, N_HEAD, 4 * C, **LAYER)
    encoder = nn.TransformerEncoder(layer, n, nn.LayerNorm(C), enable_nested_tensor=False)
    theirs = nn.Transformer(C, N_HEAD, n, n, 4 * C, custom_encoder=encoder, **LAYER).double()
    for there, here in zip(theirs.encoder.layers, model.encoder, strict=True):
        carry_encoder(there, here)
    for there, here in zip(theirs.decoder.layers, model.decoder, strict=True):
        carry_decoder(there, here)
    source = lecture.encode(["may the first twenty ten", "june the third nineteen hundred"])
    target = lecture.encode(["2010-05-01", "1900-06-03"])
    hidden = source == PAD
    masks = {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden}
    masks["tgt_mask"] = nn.Transformer.generate_square_subsequent_mask(target.size(1))
    wanted = model.lm_head(theirs(model.embed(source), model.embed(target), **masks))
    torch.testing.assert_close(model.decode(target, *model.encode(source)), wanted, **EQUAL)


def test_translating_is_what_teacher_forcing_trained():
    """Fed with what it said itself, the decoder says the same in one pass."""
    model = lecture.Transformer()
    sources = ["may the first twenty ten", "june the third nineteen hundred"]
    said = model.translate(lecture.encode(sources), 6)
    start = torch.full_like(said[:, :1], lecture.START)
    target = torch.cat((start, said[:, :-1]), dim=1)
    logits = model.decode(target, *model.encode(lecture.encode(sources)))
    assert torch.equal(logits.argmax(dim=2), said)
    alone = model.translate(lecture.encode(sources[:1]), 6)
    assert torch.equal(alone, said[:1]), "the padding of a shorter source is not seen"


def test_a_loss_of_nothing_but_padding_is_not_counted():
    model = lecture.Transformer()
    source, target = lecture.encode(["may the first twenty ten"]), lecture.encode(["2010-05-01"])
    longer = torch.cat((target, torch.full((1, 3), PAD)), dim=1)
    torch.testing.assert_close(model.loss(source, target), model.loss(source, longer), **EQUAL)


@pytest.mark.parametrize(
    ("iso", "words"),
    [
        ("1984-03-21", "the twenty-first of march nineteen eighty-four"),
        ("1900-12-30", "the thirtieth of december nineteen hundred"),
        ("1805-02-03", "the third of february eighteen oh five"),
        ("2000-01-31", "the thirty-first of january two thousand"),
        ("2009-08-12", "the twelfth of august two thousand and nine"),
        ("2010-11-20", "the twentieth of november twenty ten"),
    ],
)
def test_dates_in_words(iso, words):
    date = datetime.date.fromisoformat(iso)
    assert lecture.in_words(date, 0) == words
    day, month = words.removeprefix("the ").split(" of ")
    name, year = month.split(" ", 1)
    assert lecture.in_words(date, 1) == f"{name} the {day} {year}"


def test_no_date_is_held_out_and_trained_on():
    train, held_out = lecture.make_dates(seed=1)
    isos = [iso for _, iso in train + held_out]
    assert len({*isos}) == len(isos) == 365_243 and len(held_out) == lecture.N_HELD_OUT
    assert len({words for words, _ in train + held_out}) == len(isos), "each has words of its own"


@given(st.lists(st.text(alphabet=lecture.CHARS, max_size=12), min_size=1, max_size=3))
def test_texts_survive_encoding(texts):
    assert [lecture.decode(row) for row in lecture.encode(texts).tolist()] == texts


def test_it_trains_and_draws(folder, capsys, monkeypatch):
    monkeypatch.setattr(lecture, "FIRST_YEAR", 2090)
    monkeypatch.setattr(lecture, "N_HELD_OUT", 20)
    assert lecture.main(["--steps=2", "--picture=attention.png"]) == 0
    assert "held-out dates right" in capsys.readouterr().out
    assert Path("attention.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "flag", ["--steps=0", "--picture=there.png", "--picture=new.txt", "--picture=nowhere/new.png"]
)
def test_what_cannot_be_done_is_said_before_the_training(folder, capsys, flag):
    Path("there.png").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        lecture.main([flag])
    name, _, value = flag.partition("=")
    assert stop.value.code == 2 and f"error: {name}={value}: " in capsys.readouterr().err
    assert Path("there.png").read_text() == "mine"
