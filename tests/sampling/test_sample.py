from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TINY, environment, is_one_error_line, texts
from hypothesis import given
from hypothesis import strategies as st

import sample
from model import GPT, GPTConfig
from quill.data.tokenizers import ByteTokenizer
from quill.sampling.decoder import Decoder
from quill.sampling.text import TextStream
from quill.training import checkpoint
from sample import SEPARATOR

SHORT = ("--num_samples=3", "--max_new_tokens=40", "--device=cpu", "--dtype=float32")


@pytest.fixture
def trained(tiny, call) -> Path:
    call("train", *TINY, "--vocab_multiple=64")
    shutil.rmtree("data")  # sampling needs nothing from it
    return tiny


def test_samples_continue_the_prompt(trained, call):
    code, out, err = call("sample", *SHORT, "--start=the ")
    assert (code, err) == (0, "")
    samples = texts(out)
    assert [len(text) for text in samples] == [4 + 40] * 3
    assert all(text.startswith("the ") for text in samples) and len(set(samples)) == 3


def test_sampling_starts_without_pytorchs_compiler(trained, call):
    """Whose import takes as long as that of the rest of PyTorch."""
    call("prepare", "tiny", "--input=text.txt")
    call("train", *TINY, "--position=rotary", "--out_dir=rotary", "--max_iters=0")
    for out_dir in ("out", "rotary"):
        argv = [f"--out_dir={out_dir}", "--num_samples=1", "--max_new_tokens=3", "--device=cpu"]
        probe = f"import sys, sample; code = sample.main({argv}); "
        probe += "sys.exit(code or 'torch._dynamo' in sys.modules)"
        line = [sys.executable, "-c", probe]
        done = subprocess.run(line, env=environment(), capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_same_seed_same_text_whatever_the_number_of_samples(trained, call):
    three = texts(call("sample", *SHORT)[1])
    assert texts(call("sample", *SHORT)[1]) == three
    assert texts(call("sample", *SHORT, "--num_samples=1")[1]) == three[:1]
    assert texts(call("sample", *SHORT, "--num_samples=5")[1])[:3] == three
    assert texts(call("sample", *SHORT, "--seed=2")[1]) != three


def test_greedy_samples_are_all_the_same(trained, call):
    assert len(set(texts(call("sample", *SHORT, "--temperature=0")[1]))) == 1
    assert len(set(texts(call("sample", *SHORT, "--top_k=1")[1]))) == 1
    assert len(set(texts(call("sample", *SHORT, "--top_p=0")[1]))) == 1


def test_prompt_from_a_file(trained, call):
    Path("prompt.txt").write_text("What say\n été")
    from_file = call("sample", *SHORT, "--start=FILE:prompt.txt")[1]
    assert from_file == call("sample", *SHORT, "--start=What say\n été")[1]
    Path("prompt.txt").write_text("What say\n été", encoding="utf-8-sig")  # as prepare reads it
    assert call("sample", *SHORT, "--start=FILE:prompt.txt")[1] == from_file


def test_a_prompt_longer_than_the_context(trained, call, text):
    prompt = text[:100]
    assert all(t.startswith(prompt) for t in texts(call("sample", *SHORT, f"--start={prompt}")[1]))


def test_no_new_tokens_is_the_prompt(trained, call):
    assert texts(call("sample", *SHORT, "--max_new_tokens=0", "--start=the")[1]) == ["the"] * 3


def test_stop_ends_each_text_before_the_string(trained, call):
    free = texts(call("sample", *SHORT, "--start=t", "--max_new_tokens=80")[1])
    stopped = texts(call("sample", *SHORT, "--start=t", "--max_new_tokens=80", "--stop=e")[1])
    assert stopped == [text[:1] + text[1:].split("e")[0] for text in free]


def test_last_checkpoint_serves_when_there_is_no_best(trained, call):
    Path("out/best.pt").unlink()
    assert call("sample", *SHORT)[0] == 0


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--start="], "the prompt is empty"),
        (["--start=FILE:"], "names no file"),
        (["--start=FILE:nothing.txt"], "nothing.txt: No such file"),
        (["--start=FILE:empty.txt"], "the prompt is empty"),
        (["--start=FILE:latin.txt"], "latin.txt is not UTF-8 at byte 1"),
        (["--start=\udcff"], "is not utf-8 text"),
        (["--interactive", "--start=queen"], "leave --start out"),
        (["--start=the Ω"], "lacks 'Ω' (U+03A9)"),
        (["--temperature=-1"], "temperature=-1.0: must be at least 0"),
        (["--top_p=1.1"], "top_p=1.1: must be at most 1"),
        (["--top_k=-1"], "top_k=-1"),
        (["--num_samples=0"], "num_samples=0"),
        (["--out_dir=nowhere"], "nowhere/ckpt.pt is missing"),
        (["--device=cuda:99"], "device=cuda:99: there is none here"),
        (["--device=abacus"], "device=abacus"),
        (["--dtype=int8"], "dtype: expected 'auto' or 'float32'"),
    ],
)
def test_wrong_input_is_one_line(trained, call, argv, complaint):
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes(b"a\xe9")
    code, out, err = call("sample", *argv)
    assert (code, out) == (2, "") and is_one_error_line(err) and complaint in err


def test_bytes_that_split_a_character_print_right(folder, call):
    """A byte model that has learned to repeat 'é…' prints whole characters."""
    torch.manual_seed(0)
    cycle = torch.tensor(list("é…x".encode()) * 20)
    config = GPTConfig(16, 256, 1, 1, 16)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    idx = torch.stack([cycle[i : i + 16] for i in range(6)])
    targets = torch.stack([cycle[i + 1 : i + 17] for i in range(6)])
    for _ in range(60):
        optimizer.zero_grad()
        model(idx, targets)[1].backward()
        optimizer.step()
    saved = {
        "model": model.state_dict(),
        "model_config": vars(config),
        "config": {},
        "tokenizer": ByteTokenizer().to_json(),
        "step": 60,
    }
    checkpoint.save_checkpoint(Path("ckpt.pt"), saved)
    flags = ["--out_dir=.", "--temperature=0", "--num_samples=2", "--max_new_tokens=17"]
    code, out, _ = call("sample", *flags, "--start=é")
    assert code == 0
    # 17 more bytes: …x, twice é…x, and one byte of the next é
    assert texts(out) == ["é…xé…xé…x\ufffd"] * 2


class Letters:
    """A stand-in tokenizer: token i is the i-th letter, 9 the end of a text."""

    end_of_text = 9

    def decode_bytes(self, ids):
        return bytes(ord("a") + i for i in ids)


@given(st.text("abc", max_size=30), st.text("abc", max_size=4))
def test_a_text_is_cut_at_the_stop_string_and_nowhere_else(text, stop):
    cut = TextStream(Letters(), [stop])
    out = "".join(cut.feed(ord(char) - ord("a")) for char in text) + cut.finish()
    assert out == (text.split(stop)[0] if stop else text)
    assert not stop or stop in text or out == text


def test_a_text_ends_with_its_own_token_and_shows_what_was_held_back():
    cut = TextStream(Letters(), ["bc"])
    assert [cut.feed(token) for token in (0, 1, 9, 0)] == ["a", "", "b", ""]
    assert cut.is_done and cut.finish() == ""


def test_the_first_sample_is_shown_while_it_is_made(capsys):
    shown = []

    def steps():
        for token in range(3):
            yield [token, token]
            shown.append(capsys.readouterr().out)

    sample.print_samples("> ", steps(), [TextStream(Letters()) for _ in range(2)])
    assert shown == ["> a", "b", "c"]
    assert capsys.readouterr().out == f"\n{SEPARATOR}\n> abc\n{SEPARATOR}\n"


def test_bfloat16_writes_the_same_text_again(trained, call):
    first = call("sample", *SHORT, "--dtype=bfloat16")
    assert first[0] == 0 and call("sample", *SHORT, "--dtype=bfloat16") == first


def test_decoding_chooses_its_kernel_by_the_number_of_tokens_and_leaves_no_trace():
    model, chosen = GPT(GPTConfig(8, 5, 1, 1, 4)), []
    model.transformer.wte.register_forward_hook(
        lambda *_: chosen.append(torch.backends.mkldnn.enabled)
    )
    decoder = Decoder(model, vocab_size=5)
    for shape in ((1, 4), (1, 1), (3, 1), (1, 1)):
        decoder(torch.zeros(shape, dtype=torch.int64), cache=None, last_only=True)
    with pytest.raises(IndexError):
        decoder(torch.full((1, 1), 99), cache=None, last_only=True)
    assert chosen == [True, False, True, False] and torch.backends.mkldnn.enabled
