from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import REPO, is_one_error_line
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPT, GPTConfig, generate
from quill.data import tokenizers
from quill.errors import InputError
from quill.files import file_lock
from quill.interop import hf_tokenizers, huggingface
from quill.interop.pretrained import Pretrained
from quill.training import checkpoint
from quill.training.models import BigramConfig, build, config_to_dict

files_of = pytest.importorskip("safetensors.torch")

BYTES = [bytes([b]) for b in range(256)]
MERGED = [b"th", b"the", b" t", b" the", b"in", b"ing", b"\n\n", "é".encode(), b"aa", b"aaa"]
BPE = tokenizers.BPETokenizer(BYTES + MERGED, ["<|endoftext|>"])
BYTE, BYTE_END = tokenizers.ByteTokenizer(), tokenizers.ByteTokenizer(True)
CHAR, CHAR_END = (tokenizers.CharTokenizer("\n\r .aehtéΩ\u0308", ends) for ends in (False, True))


@pytest.fixture(scope="module")
def transformers():
    """Imported only by the tests that compare with it: that takes seconds."""
    module = pytest.importorskip("transformers")
    module.utils.logging.disable_progress_bar()
    return module


@torch.no_grad()
def randomised(model):
    """Without a new model's zeros and ones, which would hide a weight in the wrong place."""
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=rng) * 0.2 + (p.dim() == 1))
    return model.eval()


def assert_same(model: GPT, theirs) -> None:
    """Equal logits at full length, and greedily the same text after one token."""
    vocab_size, block_size = model.config.vocab_size, model.config.block_size
    idx = torch.randint(vocab_size, (3, block_size), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logits = model(idx)[0]
        assert logits.std() > 0.1
        torch.testing.assert_close(theirs(idx).logits, logits, rtol=0, atol=1e-5)
    steps = generate(model, idx[:, :1], block_size - 1, temperature=0)
    ours = torch.stack([*steps], dim=1)
    options = {"do_sample": False, "max_length": block_size, "eos_token_id": None}
    text = theirs.generate(idx[:, :1], attention_mask=torch.ones(3, 1), **options)
    assert torch.equal(text[:, 1:], ours)


def load(path: str) -> Pretrained:
    return Pretrained(*huggingface.load(Path(path)))


def read(path: str) -> GPT:
    return load(path).build().eval()


def export(config: GPTConfig, tokenizer=CHAR, dest: str = "dest") -> GPT:
    model = randomised(GPT(config))
    huggingface.export(model, tokenizer, Path(dest))
    return model


def save_run(model: GPT, tokenizer) -> None:
    described = {"model_config": config_to_dict(model.config), "config": {}, "step": 1}
    Path("out").mkdir(exist_ok=True)
    contents = {"model": model.state_dict(), "tokenizer": tokenizer.to_json(), **described}
    checkpoint.save_checkpoint(Path("out/best.pt"), contents)


# ---- in -----------------------------------------------------------------------------------------


def gpt2_config(transformers, n_layer: int, n_head: int, n_embd: int, **more):
    sizes = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
    return transformers.GPT2Config(vocab_size=50, n_positions=20, **sizes, **more)


@pytest.mark.parametrize(
    ("sizes", "more"),
    [
        ((2, 2, 16), {}),
        ((1, 3, 48), {"activation_function": "gelu", "tie_word_embeddings": False}),
        ((3, 1, 8), {"activation_function": "relu", "n_inner": 32}),
        ((2, 4, 24), {"activation_function": "gelu_pytorch_tanh", "resid_pdrop": 0.0}),
        ((1, 2, 16), {"activation_function": "relu2", "reorder_and_upcast_attn": True}),
    ],
)
def test_a_gpt2_of_transformers_computes_the_same_here(transformers, folder, sizes, more):
    config = gpt2_config(transformers, *sizes, **more)
    theirs = randomised(transformers.GPT2LMHeadModel(config))
    theirs.save_pretrained("gpt2")
    assert_same(read("gpt2"), theirs)
    assert load("gpt2").tokenizer is None


def test_half_precision_several_files_no_prefix_and_masks(transformers, folder):
    config = gpt2_config(transformers, 2, 2, 16)
    theirs = randomised(transformers.GPT2LMHeadModel(config)).bfloat16()
    theirs.save_pretrained("half")
    theirs.float().save_pretrained("shards", max_shard_size="9KB")
    theirs.transformer.save_pretrained("bare")
    expected = read("half").state_dict()
    assert all(p.equal(p.bfloat16().float()) for p in expected.values())
    weights = files_of.load_file("bare/model.safetensors")
    masks = {"h.1.attn.bias": torch.ones(1, 1, 20, 20), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    head = {"lm_head.weight": weights["wte.weight"].clone()}
    files_of.save_file(weights | masks | head, "bare/model.safetensors")
    assert len([*Path("shards").glob("*.safetensors")]) > 1
    for path in ("shards", "bare", "bare/model.safetensors"):
        found = read(path).state_dict()
        assert all(found[name].equal(p) for name, p in expected.items()), path


def test_openais_own_sizes_need_no_config(folder):
    model = export(GPTConfig(8, 20, 1, 12, 768, mlp="gelu_tanh"))
    shutil.move("dest/model.safetensors", "alone.safetensors")
    assert load("alone.safetensors").config == model.config
    export(GPTConfig(8, 20, 1, 2, 16))
    shutil.move("dest/model.safetensors", "alone.safetensors")
    with pytest.raises(InputError, match=r"config\.json: missing, and needed"):
        load("alone.safetensors")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model_type": "llama"}, "model_type='llama': only GPT-2's models"),
        ({"activation_function": "silu"}, "activation_function='silu' is none of"),
        ({"activation_function": ["gelu"]}, "activation_function=['gelu'] is none of"),
        ({"n_inner": 65}, "n_inner=65, not None"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06, not 1e-05"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False, not True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"n_head": 3}, "n_embd=16 is not divisible by n_head=3"),
        ({"n_head": None}, "n_head=None is no int in 1..inf"),
        ({"n_embd": 2**62}, "config.json: "),
        ({"n_layer": 10**9}, "config.json: n_layer=1000000000"),
        ({"n_layer": 2}, "transformer.h.1.ln_1.weight is missing; "),
        ({"n_positions": 21}, "transformer.wpe.weight is (20, 16), not (21, 16)"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"vocab_size": 5}, "transformer.wte.weight is (50, 16), not (5, 16)"),
    ],
)
def test_another_model_is_refused(folder, changes, complaint):
    export(GPTConfig(20, 50, 1, 2, 16))
    path = Path("dest/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError) as caught:
        load("dest")
    assert complaint in str(caught.value) and "dest" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"transformer.ln_f.bias": None}, "transformer.ln_f.bias is missing"),
        ({"score.weight": torch.ones(2, 16)}, "transformer.score.weight is not of a GPT-2"),
        ({"transformer.ln_f.bias": torch.ones(15)}, "ln_f.bias is (15,), not (16,)"),
        ({"transformer.h.0.mlp.c_fc.weight": torch.ones(64, 16)}, "is (64, 16), not (16, 64)"),
        ({"transformer.ln_f.bias": torch.ones(16) / 0}, "ln_f.bias is not finite"),
        ({"transformer.ln_f.bias": torch.ones(16).long()}, "ln_f.bias is of type I64"),
        ({"ln_f.bias": torch.ones(16)}, "ln_f.bias is there twice"),
        ({"lm_head.weight": torch.ones(50, 16)}, "lm_head.weight differs from transformer.wte"),
    ],
)
def test_other_tensors_are_refused(folder, changes, complaint):
    export(GPTConfig(20, 50, 1, 2, 16))
    weights = files_of.load_file("dest/model.safetensors") | changes
    kept = {name: p for name, p in weights.items() if p is not None}
    files_of.save_file(kept, "dest/model.safetensors")
    with pytest.raises(InputError, match=r"^dest.*") as caught:
        load("dest")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("model.safetensors", None, "dest holds no model.safetensors"),
        ("model.safetensors", b"", "model.safetensors is not a safetensors file, or damaged"),
        ("model.safetensors", b"\xff" * 99, "not a safetensors file, or damaged"),
        ("model.safetensors", slice(-1), "not a safetensors file, or damaged"),
        ("model.safetensors", slice(1, None), "not a safetensors file, or damaged"),
        ("config.json", slice(-9), "config.json is not JSON, or damaged"),
        ("config.json", b"[1]", "config.json is not a JSON object"),
        ("config.json", b"\xff", "config.json is not UTF-8 at byte 0"),
        ("tokenizer.json", b"[" * 99999, "tokenizer.json is not JSON, or damaged"),
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer that Quill has"),
    ],
)
def test_damaged_files_are_refused(folder, name, content, complaint):
    export(GPTConfig(20, 50, 1, 2, 16))
    path = Path("dest", name)
    data = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(data[content] if isinstance(content, slice) else content)
    with pytest.raises(InputError) as caught:
        load("dest")
    assert complaint in str(caught.value)


ANYTHING = [None, True, 0, -1, 1.5, 1e400, "", "x", "0 1", [], {}, [[]], {"a": 1}, 10**30]


def random_places(tree, n: int):
    """Yield n copies of a JSON tree, in each of which something has become something else."""
    rng = random.Random(0)
    for _ in range(n):
        root = part = copy.deepcopy(tree)
        while True:
            key = rng.choice([*part] if isinstance(part, dict) else range(len(part)))
            if not isinstance(part[key], (dict, list)) or not part[key] or rng.random() < 0.3:
                break
            part = part[key]
        part[key] = rng.choice(ANYTHING)
        yield root


@pytest.mark.parametrize("tokenizer", [BPE, CHAR_END])
def test_any_json_in_any_place_is_read_or_refused(folder, tokenizer):
    export(GPTConfig(20, 300, 1, 2, 16), tokenizer)
    n_read = 0
    for name in ("config.json", "tokenizer.json"):
        path = Path("dest", name)
        before = path.read_bytes()
        for changed in random_places(json.loads(before), 80):
            path.write_text(json.dumps(changed))
            try:
                n_read += load("dest") is not None
            except InputError as error:
                assert "dest" in str(error)
        path.write_bytes(before)
    assert 10 < n_read < 150


def test_vocab_json_and_merges_txt_are_a_tokenizer(folder):
    export(GPTConfig(20, 300, 1, 2, 16), BPE)
    model = json.loads(Path("dest/tokenizer.json").read_text())["model"]
    Path("dest/tokenizer.json").unlink()
    Path("dest/vocab.json").write_text(json.dumps(model["vocab"]))
    with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
        load("dest")
    lines = ["#version: 0.2", *model["merges"], ""]
    Path("dest/merges.txt").write_text("\n".join(lines), encoding="utf-8")
    assert load("dest").tokenizer.to_json() == BPE.to_json()


SHUFFLED = {"merges": ["th e", "t h", *hf_tokenizers.merges_of(BPE.tokens)[2:]]}
HOLE = {"vocab": {"a": 0, "b": 2}}


@pytest.mark.parametrize(
    ("part", "changes", "complaint"),
    [
        ("model", {"type": "Unigram"}, "its model is 'Unigram', not 'BPE'"),
        ("model", SHUFFLED, "its merges are not in the order of its ids"),
        ("model", HOLE, "its ids are not 0, 1, 2 and so on"),
        ("model", {"end_of_word_suffix": "</w>"}, "end_of_word_suffix is '</w>', not ''"),
        ("pre_tokenizer", {"type": "Metaspace"}, "its pre_tokenizer is 'Metaspace'"),
        ("pre_tokenizer", {"add_prefix_space": True}, "add_prefix_space is True, not False"),
        (None, {"normalizer": {"type": "NFC"}}, "its normalizer is {'type': 'NFC'}, not None"),
        (None, {"added_tokens": [{"content": "the", "id": 257}]}, "its special tokens are not"),
        (None, {"model": {"type": "WordLevel", "vocab": {"the": 0}}}, "of words, not as Quill"),
    ],
)
def test_another_tokenizer_is_refused(folder, part, changes, complaint):
    spec = copy.deepcopy(hf_tokenizers.specification(BPE))
    (spec if part is None else spec[part]).update(changes)
    Path("tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match=r"^tokenizer\.json: not a tokenizer") as caught:
        hf_tokenizers.read(Path())
    assert complaint in str(caught.value)


def test_a_tokenizer_of_another_kind_is_not_exported_as_bytes():
    class Words:
        end_of_text = None

    with pytest.raises(ValueError, match="a Words has no form"):
        hf_tokenizers.specification(Words())


def test_more_tokens_than_rows_are_refused(folder):
    export(GPTConfig(20, 8, 1, 2, 16), CHAR)
    with pytest.raises(InputError, match="dest: its tokenizer has 11 tokens, its model 8"):
        load("dest")


def test_a_missing_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(InputError, match=r"install the extra: pip install '\.\[hf\]'"):
        load("dest")


# ---- out ----------------------------------------------------------------------------------------

LLAMA = {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu"}


@pytest.mark.parametrize(
    ("switches", "tokenizer"),
    [
        ({}, CHAR),
        ({"bias": False, "mlp": "gelu_tanh", "init_std": 0.1, "dropout": 0.1}, CHAR_END),
        ({"tied_head": False, "mlp": "relu"}, BYTE),
        ({"tied_head": False, "bias": False, "mlp": "relu2"}, BPE),
        (LLAMA, CHAR),
        ({**LLAMA, "bias": False, "dropout": 0.1}, BYTE_END),
        ({**LLAMA, "tied_head": False}, CHAR_END),
        ({**LLAMA, "tied_head": False, "bias": False}, BPE),
    ],
)
def test_a_run_of_quill_computes_the_same_in_transformers(
    transformers, folder, call, switches, tokenizer
):
    config = GPTConfig(20, tokenizer.vocab_size + 3, 2, 2, 24, **switches)
    model = randomised(GPT(config))
    save_run(model, tokenizer)
    code, out, err = call("export", "--out_dir=out", "made/dest")
    name = "LlamaForCausalLM" if config.position == "rotary" else "GPT2LMHeadModel"
    n_parameters = sum(p.numel() for p in model.parameters())
    assert (code, err) == (0, "")
    assert out == f"wrote made/dest: {name} of {n_parameters:,} parameters\n"
    theirs = transformers.AutoModelForCausalLM.from_pretrained("made/dest")
    assert type(theirs).__name__ == name
    assert_same(model, theirs)
    assert len(transformers.AutoTokenizer.from_pretrained("made/dest")) == tokenizer.vocab_size
    ends = {theirs.config.eos_token_id, theirs.generation_config.eos_token_id}
    assert ends == {tokenizer.end_of_text}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokenizer", [CHAR, CHAR_END, BYTE, BYTE_END, BPE])
def test_what_was_exported_is_read_bit_for_bit(folder, tokenizer, bias):
    model = export(GPTConfig(20, 300, 2, 2, 16, bias=bias, tied_head=bias), tokenizer)
    pretrained = load("dest")
    expected = model.state_dict()
    assert pretrained.tokenizer.to_json() == tokenizer.to_json()
    for name, p in pretrained.weights.items():
        assert p.equal(expected[name]) if name in expected else not bias and not p.any()
    assert expected.keys() <= pretrained.weights.keys()
    shared = pretrained.weights["lm_head.weight"] is pretrained.weights["transformer.wte.weight"]
    assert shared == bias


@pytest.mark.parametrize("tokenizer", [CHAR_END, BYTE, BYTE_END, BPE])
def test_autotokenizer_gives_the_same_ids_and_text(transformers, folder, tokenizer):
    export(GPTConfig(20, 300, 1, 1, 4), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained("dest")
    assert len(theirs) == tokenizer.vocab_size
    chars = tokenizer.chars if tokenizer is CHAR_END else st.characters(codec="utf-8")
    words = st.sampled_from([" the", "aaaa", " a", " .", "\n\n\n", "é", "<|endoftext|>"])

    @settings(max_examples=60, derandomize=True)
    @given(st.lists(words | st.text(chars)))
    def check(parts):
        text = "".join(parts)
        ids = tokenizers.encode_prompt(tokenizer, text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text

    check()


@settings(max_examples=60, derandomize=True)
@given(
    st.text("ab \né", min_size=300, max_size=3000) | st.text(min_size=200), st.integers(257, 290)
)
def test_learned_tokens_have_the_same_merges_there(text, vocab_size):
    learners = pytest.importorskip("tokenizers")
    try:
        tokenizer = hf_tokenizers.learn_bpe([text], vocab_size)
    except InputError as error:
        assert vocab_size > 257 and "occur twice" in str(error)
        return
    ids = tokenizer.encode(text).tolist()
    assert tokenizers.decode(tokenizer, ids) == text and tokenizer.vocab_size == vocab_size
    theirs = learners.Tokenizer.from_str(json.dumps(hf_tokenizers.specification(tokenizer)))
    assert theirs.encode(text).ids == ids


def test_an_unknown_character_is_an_error_there_too(transformers, folder):
    export(GPTConfig(20, 300, 1, 1, 4), CHAR)
    with pytest.raises(Exception, match="UNK"):
        transformers.AutoTokenizer.from_pretrained("dest")("xyz")


gpt2_cache = Path(os.environ.get("TIKTOKEN_CACHE_DIR", REPO.parent / "shared/tiktoken"))
VOCAB_BPE = "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"  # tiktoken's name for OpenAI's file
shakespeare = gpt2_cache.parent / "data/tinyshakespeare.txt"


@pytest.mark.skipif(not gpt2_cache.is_dir(), reason="needs GPT-2's files in TIKTOKEN_CACHE_DIR")
def test_gpt2s_own_tokenizer(transformers, folder, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_cache))
    tokenizer = tokenizers.BPETokenizer.gpt2()
    export(GPTConfig(4, 50257, 1, 1, 4), tokenizer)
    merges = json.loads(Path("dest/tokenizer.json").read_text())["model"]["merges"]
    published = (gpt2_cache / VOCAB_BPE).read_text(encoding="utf-8")
    assert merges == published.split("\n")[1:-1] and len(merges) == 50_000
    text = shakespeare.read_text()[:20_000] if shakespeare.exists() else "Ġ The cat's  paw\n" * 99
    theirs = transformers.AutoTokenizer.from_pretrained("dest")
    assert theirs(text)["input_ids"] == tokenizer.encode(text).tolist()
    theirs.save_pretrained("again")  # as transformers writes it
    assert hf_tokenizers.read(Path("again")).to_json() == tokenizer.to_json()


@pytest.mark.parametrize(
    ("switches", "complaint"),
    [
        (
            {"qk_norm": True},
            "GPT2LMHeadModel has no qk_norm=True (but False); LlamaForCausalLM has no "
            "position='learned' (but 'rotary'), no norm='layernorm' (but 'rmsnorm'), no "
            "qk_norm=True (but False), no mlp='gelu' (but 'swiglu')",
        ),
        (
            {**LLAMA, "norm": "layernorm"},
            "GPT2LMHeadModel has no position='rotary' (but 'learned'), no mlp='swiglu' (but "
            "'gelu' or 'gelu_tanh' or 'relu' or 'relu2'); LlamaForCausalLM has no "
            "norm='layernorm' (but 'rmsnorm')",
        ),
    ],
)
def test_switches_that_no_class_has_are_named(folder, call, switches, complaint):
    save_run(GPT(GPTConfig(20, 12, 1, 2, 16, **switches)), CHAR)
    code, out, err = call("export", "dest")
    assert (code, out, err) == (2, "", f"error: out/best.pt cannot be exported: {complaint}\n")
    assert not Path("dest").exists()


def test_a_bigram_is_refused(folder, call):
    save_run(build(BigramConfig(block_size=20, vocab_size=12)), CHAR)
    code, out, err = call("export", "dest")
    assert (code, out) == (2, "") and is_one_error_line(err) and "model='bigram'" in err
    assert not Path("dest").exists()


@pytest.mark.parametrize("switches", [{}, LLAMA])
def test_an_option_that_no_class_lists_is_refused_away_from_its_default(folder, switches):
    fields = [("shared_values", bool, False), ("window", int, 0)]
    wider = dataclasses.make_dataclass("WiderConfig", fields, bases=(GPTConfig,), frozen=True)
    export(wider(20, 12, 1, 2, 16, **switches))
    assert Path("dest/config.json").exists()
    for name, value in (("shared_values", True), ("window", 8)):
        with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no .*Llama") as caught:
            export(wider(20, 12, 1, 2, 16, **switches | {name: value}), dest="refused")
        assert str(caught.value).count(f"{name}={value} (but ") == 2, "neither class has it"
        assert not Path("refused").exists()


def test_the_classes_list_options_that_there_are():
    options = {field.name for field in dataclasses.fields(GPTConfig)}
    assert options >= huggingface.ANY_VALUE
    assert all(target.choices.keys() <= options for target in huggingface.TARGETS)


def test_only_an_earlier_export_is_overwritten(folder, call):
    save_run(randomised(GPT(GPTConfig(20, 12, 1, 2, 16))), CHAR)
    for dest in ("file", "full", "empty"):
        Path(dest).mkdir() if dest != "file" else Path(dest).write_text("mine")
    Path("full/model.safetensors").write_text("mine")
    Path("empty/config.json.tmp").write_text("of an export that was killed")
    for dest, complaint in (
        ("file", "file: Not a directory"),
        ("full", "full is not empty and not an earlier export"),
        (".", ". is not empty and not an earlier export"),
    ):
        code, _, err = call("export", dest)
        assert code == 2 and is_one_error_line(err) and complaint in err
    assert Path("full/model.safetensors").read_text() == Path("file").read_text() == "mine"
    assert call("export", "empty")[0] == 0
    save_run(randomised(GPT(GPTConfig(20, 12, 3, 2, 16))), CHAR)
    assert call("export", "empty")[0] == 0
    assert load("empty").config.n_layer == 3
    files = {path.name: path for path in Path("empty").iterdir()}
    files.pop(".lock")
    assert len(files) == 5
    assert len({path.stat().st_mode for path in files.values()}) == 1, "readable alike"
    with file_lock(Path("empty")):
        code, _, err = call("export", "empty")
    assert code == 2 and is_one_error_line(err) and "is in use" in err


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "use: python -m quill.export --out_dir=out DEST"),
        (["--out_dir=out"], "use: python -m quill.export"),
        ([], "DEST, the folder to write, is missing"),
        (["export", "dest"], "one dest at a time, not 2: export dest"),
        (["a", "b"], "one dest at a time"),
        (["--what=1", "a"], "what: no such option"),
        (["dest"], "out/ckpt.pt is missing"),
    ],
)
def test_a_wrong_command_line_is_one_line(folder, call, argv, complaint):
    code, out, err = call("export", *argv)
    assert (code, out) == (2, "") and is_one_error_line(err) and complaint in err
