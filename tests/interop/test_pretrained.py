"""Runs and samples that start from given weights: another run's, nanoGPT's, a released model's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, is_one_error_line

from model import GPT, GPTConfig
from quill.data import dataset_files, tokenizers
from quill.errors import InputError
from quill.interop import pretrained
from quill.training import checkpoint
from quill.training.models import config_to_dict

MACHINE = ["--device=cpu", "--dtype=float32"]
# What the weights do not decide.
FREE = [flag for flag in TINY if not flag.startswith(("--n_", "--block_size"))]


def random_model(**changes) -> GPT:
    """None of its gains is 1, none of its biases 0."""
    torch.manual_seed(0)
    sizes = {"block_size": 16, "vocab_size": 30, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**sizes | changes))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model.eval()


def save_as_nanogpt(model: GPT, path: Path, prefix: str = "", changes: dict = {}) -> None:  # noqa: B006
    """In the form of nanoGPT's train.py; `prefix` is what torch.compile puts before names."""
    weights = {prefix + name: p for name, p in model.state_dict().items()}
    for layer in range(model.config.n_layer):  # the mask of attention without a fused kernel
        weights[f"{prefix}transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    contents = {
        "model": weights,
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
        "model_args": {name: getattr(model.config, name) for name in names},
        "iter_num": 50,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "tiny"},
    }
    path.parent.mkdir(exist_ok=True)
    torch.save(contents | changes, path)


def save_as_run(model: GPT, path: Path, chars: str) -> None:
    contents = {
        "model": model.state_dict(),
        "model_config": config_to_dict(model.config),
        "config": {},
        "tokenizer": tokenizers.CharTokenizer(chars).to_json(),
        "step": 7,
    }
    path.parent.mkdir(exist_ok=True)
    checkpoint.save_checkpoint(path, contents)


def chars_of_tiny() -> str:
    return dataset_files.read_meta(Path("data/tiny/meta.json")).tokenizer["chars"]


# ---- nanoGPT -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_a_nanogpt_run_has_its_weights(folder, prefix, bias):
    model = random_model(bias=bias, dropout=0.1)
    save_as_nanogpt(model, Path("nano/ckpt.pt"), prefix)
    for source in ("nano", "nano/ckpt.pt"):
        loaded = pretrained.load(source)
        idx = torch.arange(16)[None]
        assert (loaded.build().eval()(idx)[0] == model(idx)[0]).all() and loaded.tokenizer is None


def test_a_nanogpt_run_is_sampled_with_a_datasets_tokenizer_and_trained_on(tiny, call):
    model = random_model()
    save_as_nanogpt(model, Path("nano/ckpt.pt"))
    flags = ["--init_from=nano", "--num_samples=1", "--max_new_tokens=5", *MACHINE]
    code, _, err = call("sample", *flags, "--start=the")
    assert code == 2 and is_one_error_line(err) and "--dataset=NAME" in err
    code, out, _ = call("sample", *flags, "--start=the", "--dataset=tiny")
    assert code == 0 and out.startswith("the")
    assert call("train", *FREE, "--init_from=nano")[0] == 0
    val = dataset_files.read(Path("data/tiny"))[1]["val"].astype(np.int64)
    windows = [torch.from_numpy(val[i : i + 17]) for i in range(0, len(val) - 1, 16)]
    losses = [model(w[None, :-1], w[None, 1:], reduction="sum")[1].item() for w in windows]
    first = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[0])
    assert first["val_loss"] == pytest.approx(sum(losses) / (len(val) - 1), rel=1e-5)
    saved = checkpoint.load_checkpoint(Path("out/ckpt.pt"))
    assert saved["step"] == 6 and saved["config"]["n_embd"] == 16
    # and it goes on, though no option says what the model is
    code, out, _ = call("train", "--out_dir=out", "--init_from=resume", "--max_iters=7")
    assert code == 0 and "resuming after step 6" in out


@pytest.mark.parametrize(
    "changes",
    [
        {"model_args": {}},
        {"model_args": None},
        {"model": {}},
        {"model": [1]},
        {"model": random_model(n_embd=8).state_dict()},
        {"model": {name: p * torch.nan for name, p in random_model().state_dict().items()}},
        {"hook": torch.ones(3)},
    ],
)
def test_what_is_not_nanogpts_is_refused(folder, changes):
    save_as_nanogpt(random_model(), Path("nano/ckpt.pt"), changes=changes)
    with pytest.raises(InputError, match=r"nano/ckpt\.pt"):
        pretrained.load("nano")


class Payload:
    def __reduce__(self):
        return exec, ("open('executed', 'w')",)


def test_a_foreign_checkpoint_runs_nothing(folder):
    save_as_nanogpt(random_model(), Path("nano/ckpt.pt"), changes={"config": Payload()})
    with pytest.raises(InputError, match="nothing in it was run"):
        pretrained.load("nano")
    assert not Path("executed").exists()


def write_nanogpt_dataset(chars: str, ids: list[int], protocol: int = 4) -> None:
    Path("nano").mkdir(exist_ok=True)
    stoi = {char: i for i, char in enumerate(chars)}
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": stoi}
    Path("nano/meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    np.array(ids, dtype="<u2").tofile("nano/train.bin")
    np.array(ids[::-1], dtype="<u2").tofile("nano/val.bin")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_nanogpt_dataset_is_converted(folder, call, protocol):
    chars = "zé\n" + "".join(map(chr, range(0x100, 0x300)))  # ids in an order of their own
    write_nanogpt_dataset(chars, [0, 1, 2, 300], protocol)
    code, out, err = call("prepare", "mine", "--input=nano/meta.pkl")
    assert (code, err) == (0, "") and "4 train + 4 val tokens" in out
    meta, data = dataset_files.read(Path("data/mine"))
    assert data["train"].tolist() == [0, 1, 2, 300] and data["val"].tolist() == [300, 2, 1, 0]
    assert tokenizers.from_json(meta.tokenizer, "meta").encode("\nz").tolist() == [2, 0]
    Path("more.txt").write_text("zzé\n" * 5)
    assert call("prepare", "more", "--input=more.txt", "--tokenizer=nano/meta.pkl")[0] == 0
    assert dataset_files.read(Path("data/more"))[1]["train"][:4].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps({"itos": Payload()}),
        pickle.dumps({"itos": {0: "ab"}}),
        pickle.dumps({"itos": {1: "a"}}),
        pickle.dumps({"itos": {-1: "a", 5: "b"}}),
        pickle.dumps({"itos": {0: "a", 1: "a"}}),
        pickle.dumps({"itos": {0: 7}}),
        pickle.dumps({"itos": 7}),
        pickle.dumps(["itos"]),
        pickle.dumps({}),
        b"",
        b"no pickle",
        b"\x80\x04}r\xff\xff\xff\x7f.",  # puts its value far away, with memory for what is between
        b"\x80\x04}(K\x01u.",
        b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
        pickle.dumps({"itos": {i: chr(i) for i in range(20000)}, "more": "x" * 2**22}),
        b"\x80\x04h\x05.",
    ],
)
def test_a_foreign_meta_pkl_is_refused_and_runs_nothing(folder, call, data):
    write_nanogpt_dataset("ab", [0, 1])
    Path("nano/meta.pkl").write_bytes(data)
    for argv in (["--input=nano/meta.pkl"], ["--input=x.txt", "--tokenizer=nano/meta.pkl"]):
        Path("x.txt").write_text("abab")
        code, _, err = call("prepare", "mine", *argv)
        assert code == 2 and is_one_error_line(err) and "nano/meta.pkl" in err
    assert not Path("executed").exists() and not Path("data/mine/meta.json").exists()


@pytest.mark.parametrize("damage", ["missing", "odd", "high"])
def test_bins_that_do_not_fit_their_meta_pkl_are_refused(folder, call, damage):
    write_nanogpt_dataset("ab", [0, 1, 2] if damage == "high" else [0, 1])
    if damage == "missing":
        Path("nano/val.bin").unlink()
    if damage == "odd":
        Path("nano/val.bin").write_bytes(b"abc")
    code, _, err = call("prepare", "mine", "--input=nano/meta.pkl")
    assert code == 2 and is_one_error_line(err) and "nano/" in err


# ---- any weights -------------------------------------------------------------------------------


def test_a_run_starts_from_another_runs_weights(tiny, call):
    model = random_model(position="rotary", norm="rmsnorm", mlp="swiglu", tied_head=False)
    save_as_run(model, Path("first/ckpt.pt"), chars_of_tiny())
    assert call("train", *FREE, "--init_from=first", "--max_iters=0")[0] == 0
    begun = checkpoint.load_checkpoint(Path("out/ckpt.pt"))
    for name, p in model.state_dict().items():
        assert (begun["model"][name] == p).all()
    assert begun["step"] == 0 and begun["config"]["mlp"] == "swiglu"


def test_a_shorter_context_and_a_padded_vocabulary_score_the_same(folder):
    model = random_model()
    save_as_run(model, Path("first/ckpt.pt"), "".join(map(chr, range(65, 95))))
    loaded = pretrained.load("first")
    config = dataclasses.replace(model.config, block_size=8, vocab_size=64, dropout=0.5)
    other = GPT(config).eval()
    other.load_state_dict(loaded.fitted(config))
    idx = torch.arange(8)[None]
    scores = other(idx)[0]
    assert (scores[..., :30] - model(idx)[0]).abs().max() < 1e-6
    mean = model(idx)[0].mean(dim=-1, keepdim=True)
    assert (scores[..., 30:] - mean).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--n_layer=3", "--mlp=relu"], "n_layer is 2 there and 3 here, mlp is 'gelu' there"),
        (["--block_size=32"], "block_size is at most 16 there"),
        (["--vocab_multiple=1"], "its vocabulary has 40 tokens"),
        (["--init_from=nowhere"], "nowhere: there is no such file or folder of weights"),
        (["--init_from=data"], "data holds neither ckpt.pt nor a .safetensors"),
        (["--out_dir=first"], "the run would write over first"),
        (["--out_dir=first", "--init_from=first/ckpt.pt"], "write over first/ckpt.pt"),
        (["--init_from=text.txt"], "text.txt is not a checkpoint"),
        (["--dataset=other"], "dataset 'other' has another tokenizer than first"),
        (
            ["--dataset=large", "--init_from=nano"],
            "dataset 'large' has 52 tokens, more than the 40",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(tiny, call, argv, complaint):
    model = random_model(vocab_size=40)
    save_as_run(model, Path("first/ckpt.pt"), chars_of_tiny())
    save_as_nanogpt(model, Path("nano/ckpt.pt"))
    letters = "".join(map(chr, [*range(65, 91), *range(97, 123)]))
    for name, text in (("other", "ab" * 99), ("large", letters * 9)):
        Path(f"{name}.txt").write_text(text)
        assert call("prepare", name, f"--input={name}.txt")[0] == 0
    code, _, err = call("train", *FREE, "--init_from=first", "--overwrite=true", *argv)
    assert code == 2 and is_one_error_line(err) and complaint in err, err
    assert not Path("out/ckpt.pt").exists()


def test_auto_goes_on_or_starts_as_the_config_file_says(tiny, call):
    save_as_run(random_model(mlp="relu"), Path("first/ckpt.pt"), chars_of_tiny())
    Path("tune.py").write_text("init_from = 'first'")
    argv = ["train", "tune.py", *FREE, "--init_from=auto"]
    code, out, _ = call(*argv, "--max_iters=2")
    assert code == 0 and "resuming" not in out
    assert checkpoint.load_checkpoint(Path("out/ckpt.pt"))["config"]["mlp"] == "relu"
    assert "resuming after step 2" in call(*argv, "--max_iters=3")[1]


def test_a_tokenizer_is_taken_from_a_run_and_never_replaced(tiny, call):
    save_as_run(random_model(), Path("first/ckpt.pt"), chars_of_tiny())
    Path("part.txt").write_text("the king and the queen " * 9)
    assert call("prepare", "part", "--input=part.txt", "--tokenizer=first")[0] == 0
    meta = dataset_files.read_meta(Path("data/part/meta.json"))
    assert meta.tokenizer["chars"] == chars_of_tiny()
    code, _, err = call("sample", "--init_from=first", "--dataset=part", *MACHINE)
    assert code == 2 and is_one_error_line(err) and "came with a tokenizer" in err
    code, _, err = call("prepare", "part", "--input=part.txt", "--tokenizer=part.txt")
    assert code == 2 and is_one_error_line(err) and "the folder of a run" in err


def test_a_larger_vocabulary_than_the_models_cannot_be_sampled(tiny, call):
    save_as_nanogpt(random_model(vocab_size=9), Path("nano/ckpt.pt"))
    code, _, err = call("sample", "--init_from=nano", "--dataset=tiny", *MACHINE)
    assert code == 2 and is_one_error_line(err) and "more than the 9 of the model" in err


# ---- answers that carry loss, prompts that do not -----------------------------------------------


def test_a_model_learns_the_answers_and_stops_after_them(folder, call):
    pairs = [{"prompt": f"{a}{b}>", "completion": f"{b}{a}"} for a in "abcd" for b in "abcd"]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs * 20))
    assert call("prepare", "tiny", "--input=pairs.jsonl")[0] == 0
    flags = ["--max_iters=250", "--eval_interval=250", "--batch_size=8", "--block_size=29"]
    flags += ["--sample_at_eval=5", "--n_embd=32", "--lr_schedule=linear", "--min_lr=0"]
    assert call("train", *TINY, *flags)[0] == 0
    last = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])
    first_sample = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[0])["sample"]
    assert first_sample[2] == ">", "it begins with all of a prompt"
    assert last["val_loss"] < 0.05, "nothing in the prompts can be predicted: they must not count"
    flags = ["--num_samples=2", "--temperature=0", "--max_new_tokens=20", *MACHINE]
    assert call("sample", *flags, "--start=cb>")[1].split() == ["cb>bc", "---------------"] * 2


# ---- released weights --------------------------------------------------------------------------


def test_a_name_stands_for_the_released_weights(folder, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    model = random_model(n_layer=1, n_head=12, n_embd=768, mlp="gelu_tanh", bias=True)
    weights = {}
    for name, p in model.state_dict().items():
        is_turned = ".h." in name and p.dim() == 2
        weights[name.removeprefix("transformer.")] = p.t().contiguous() if is_turned else p.clone()
    del weights["lm_head.weight"]
    body = safetensors.save(weights)
    release = pretrained.Release("abc", len(body), hashlib.sha256(body).hexdigest())
    monkeypatch.setitem(pretrained.RELEASES, "gpt2", release)
    tokenizer = tokenizers.ByteTokenizer()
    monkeypatch.setattr(tokenizers.BPETokenizer, "gpt2", lambda: tokenizer)
    path = Path("data/openai-community/gpt2/model.safetensors")
    path.parent.mkdir(parents=True)
    path.write_bytes(body)
    loaded = pretrained.load("gpt2")
    idx = torch.arange(16)[None]
    assert torch.allclose(loaded.build().eval()(idx)[0], model(idx)[0], atol=1e-5)
    assert loaded.tokenizer is tokenizer


def test_a_released_file_is_downloaded_once_and_verified(folder, monkeypatch):
    body, calls = b"the weights", []
    release = pretrained.Release("abc", len(body), hashlib.sha256(body).hexdigest())
    monkeypatch.setitem(pretrained.RELEASES, "gpt2", release)

    def download(urls, path, n_bytes, sha256, advice):
        calls.append((urls, n_bytes, sha256))
        path.parent.mkdir(parents=True)
        path.write_bytes(body)

    monkeypatch.setattr(pretrained, "download", download)
    path = Path("data/openai-community/gpt2/model.safetensors")
    for _ in range(2):
        assert pretrained._released("gpt2") == path
    url = "https://huggingface.co/openai-community/gpt2/resolve/abc/model.safetensors"
    assert calls == [((url,), len(body), release.sha256)]
    path.write_bytes(b"other weights")
    with pytest.raises(InputError, match=r"model\.safetensors is not the gpt2 that was released"):
        pretrained._released("gpt2")
