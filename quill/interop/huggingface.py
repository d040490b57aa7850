"""GPT-2's weights in, GPT-2's and Llama's out, as folders of Hugging Face's transformers.

`load` reads what a GPT2LMHeadModel saved. `export` writes a folder that AutoModelForCausalLM and
AutoTokenizer load: a GPT2LMHeadModel or a LlamaForCausalLM, whichever computes the same.
"""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from model import GPT, GPTConfig
from quill.data.tokenizers import END_OF_TEXT, Tokenizer
from quill.errors import InputError, blames_input, needs_extra
from quill.files import atomic_write, file_lock, open_file
from quill.interop import hf_tokenizers
from quill.training import checkpoint
from quill.training.models import BigramConfig, state_shapes

# In GPT-2's config.json: sizes with Quill's names, values that Quill's model needs, activations.
SIZES = ("vocab_size", "n_layer", "n_head", "n_embd")
FIXED = {
    "n_inner": None,  # 4 n_embd
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu"}
ACTIVATIONS |= {"relu": "relu", "relu2": "relu2"}
N_HEAD = {768: 12, 1024: 16, 1280: 20, 1600: 25}  # by n_embd, in the models OpenAI published

# GPT-2's tensors have Quill's names; those of its Conv1D layers are transposed.
TRANSPOSED = re.compile(r".*\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # constants that some files hold as well
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"

# Llama's names for the parts of Quill's model. Several names share a part's rows equally.
LLAMA = {
    "wte": ["model.embed_tokens"],
    "ln_1": ["input_layernorm"],
    "attn.c_attn": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.c_proj": ["self_attn.o_proj"],
    "ln_2": ["post_attention_layernorm"],
    "mlp.c_fc": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.c_proj": ["mlp.down_proj"],
    "ln_f": ["model.norm"],
    "lm_head": ["lm_head"],
}

PRODUCER = {"format": "pt", "producer": "quill"}  # the metadata of each exported model.safetensors


def import_safetensors():
    with needs_extra("hf"):
        import safetensors.torch
    return safetensors


def load(path: Path) -> tuple[GPTConfig, dict[str, torch.Tensor], Tokenizer | None]:
    """A folder, or a .safetensors file and what lies beside it -> config, state_dict, tokenizer.

    Without a config.json it must be one of the four models that OpenAI published. Raises
    `InputError` for anything that Quill's GPT cannot compute.
    """
    folder = path if path.is_dir() else path.parent
    tensors = read_tensors(path)
    config_path = folder / "config.json"
    with blames_input(str(config_path), *checkpoint.LOAD_ERRORS):
        has_config = config_path.exists()
        values = hf_tokenizers.read_json(config_path) if has_config else published(tensors)
        config = config_of_gpt2(values)
        shapes = state_shapes(config, len(tensors))
    if config.tied_head and EMBEDDING in tensors:
        tensors.setdefault(HEAD, tensors[EMBEDDING])
    refuse_other_tensors(tensors, shapes, path)
    if config.tied_head and not tensors[HEAD].equal(tensors[EMBEDDING]):
        raise InputError(f"{path}: {HEAD} differs from {EMBEDDING}, but tie_word_embeddings=true")
    for name in filter(TRANSPOSED.fullmatch, tensors):
        tensors[name] = tensors[name].t().contiguous()
    tokenizer = hf_tokenizers.read(folder)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        sizes = f"has {tokenizer.vocab_size} tokens, its model {config.vocab_size}"
        raise InputError(f"{folder}: its tokenizer {sizes}")
    return config, tensors, tokenizer


def config_of_gpt2(values: dict) -> GPTConfig:
    """From a config.json, without its dropout, which each run chooses.

    Raises ValueError for what Quill's GPT cannot compute.
    """
    kind = values.get("model_type", "gpt2")
    if kind != "gpt2":
        raise ValueError(f"model_type={kind!r:.80}: only GPT-2's models can be read")
    activation = values.get("activation_function", "gelu_new")
    if activation not in [*ACTIVATIONS]:
        raise ValueError(f"activation_function={activation!r:.80} is none of {[*ACTIVATIONS]}")
    config = GPTConfig(
        block_size=values.get("n_positions"),
        **{name: values.get(name) for name in SIZES},
        tied_head=values.get("tie_word_embeddings", True),
        mlp=ACTIVATIONS[activation],
    )
    for name, needed in FIXED.items():
        value = values.get(name, needed)
        if value != needed and not (name == "n_inner" and value == 4 * config.n_embd):
            raise ValueError(f"{name}={value!r:.80}, not {needed!r}")
    return config


def published(tensors: dict[str, torch.Tensor]) -> dict:
    """The config.json of one of OpenAI's four models; raises ValueError for any other."""
    wte, wpe = tensors.get(EMBEDDING), tensors.get("transformer.wpe.weight")
    if wte is None or wpe is None or wte.size(-1) not in N_HEAD:
        raise ValueError("missing, and needed: the weights are of none of OpenAI's four models")
    return {
        "vocab_size": len(wte),
        "n_positions": len(wpe),
        "n_layer": sum(name.endswith(".ln_1.weight") for name in tensors),
        "n_head": N_HEAD[wte.size(-1)],
        "n_embd": wte.size(-1),
    }


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """In float32, by Quill's names, from a file or from the files of a folder."""
    safetensors = import_safetensors()
    files = [path]
    if path.is_dir():
        files = [*path.glob("model.safetensors")] or sorted(path.glob("model-*-of-*.safetensors"))
    if not files:
        raise InputError(f"{path} holds no model.safetensors, the only form that is read")
    tensors = {}
    for file in files:
        open_file(file).close()  # safe_open does not say why it fails
        kinds = OSError, safetensors.SafetensorError
        with blames_input(f"{file} is not a safetensors file, or damaged", *kinds):
            handle = safetensors.safe_open(file, framework="pt")
        for name in handle.keys():  # noqa: SIM118, it cannot be iterated
            own = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            if own.endswith(MASKS):
                continue
            if own in tensors:
                raise InputError(f"{file}: {name} is there twice")
            kind = handle.get_slice(name).get_dtype()
            if kind not in ("F32", "F16", "BF16"):
                raise InputError(f"{file}: {name} is of type {kind}, not F32, F16 or BF16")
            tensors[own] = handle.get_tensor(name).float()
    return tensors


def refuse_other_tensors(tensors: dict, shapes: dict, path: Path) -> None:
    """Raise InputError unless they are finite and of these shapes; Conv1D's are transposed."""
    wrong = [f"{name} is not of a GPT-2" for name in tensors if name not in shapes]
    for name, shape in shapes.items():
        needed = tuple(reversed(shape) if TRANSPOSED.fullmatch(name) else shape)
        if name not in tensors:
            wrong.append(f"{name} is missing")
        elif tensors[name].shape != needed:
            wrong.append(f"{name} is {tuple(tensors[name].shape)}, not {needed}")
        elif not tensors[name].isfinite().all():
            wrong.append(f"{name} is not finite")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{path}: {'; '.join(wrong[:3])}{more}")


def export(model: GPT, tokenizer: Tokenizer, dest: Path) -> str:
    """Write the folder; -> the name of the class. Raises ValueError when no class fits."""
    safetensors = import_safetensors()
    target = target_of(model.config)
    values, tensors = target.convert(model)
    if model.config.tied_head:
        del tensors[HEAD]
    end = tokenizer.end_of_text
    ends = {"bos_token_id": end, "eos_token_id": end}
    names = {} if end is None else {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    texts = {
        "tokenizer.json": hf_tokenizers.specification(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.block_size,
            "clean_up_tokenization_spaces": False,
            **names,
        },
        "generation_config.json": ends,
        # Written last: transformers does not load a folder without it.
        "config.json": {"architectures": [target.name], **values, **ends},
    }
    paths = [dest / part for part in ("model.safetensors", *texts)]
    with file_lock(dest), atomic_write(*paths) as (weights, *files):
        weights.write(safetensors.torch.save(tensors, metadata=PRODUCER))
        for file, contents in zip(files, texts.values(), strict=True):
            file.write(json.dumps(contents, indent=1, ensure_ascii=False).encode() + b"\n")
    return target.name


def to_gpt2(model: GPT) -> tuple[dict, dict[str, torch.Tensor]]:
    """-> config.json and tensors. GPT-2 always has biases: zeros where the model has none."""
    config, weights, tensors = model.config, model.state_dict(), {}
    with_bias = dataclasses.replace(config, bias=True)
    for name, shape in state_shapes(with_bias, len(weights)).items():
        p = weights[name] if name in weights else torch.zeros(shape)
        tensors[name] = p.t().contiguous() if TRANSPOSED.fullmatch(name) else p
    names = {own: name for name, own in ACTIVATIONS.items()}
    values = {
        "model_type": "gpt2",
        **FIXED,
        "n_positions": config.block_size,
        **{name: getattr(config, name) for name in SIZES},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        "activation_function": names[config.mlp],
        "tie_word_embeddings": config.tied_head,
    }
    return values, tensors


def to_llama(model: GPT) -> tuple[dict, dict[str, torch.Tensor]]:
    """-> config.json and tensors."""
    config, tensors = model.config, {}
    pattern = re.compile(r"(?:transformer\.)?(?:h\.(\d+)\.)?(.+)\.(weight|bias)")
    for name, p in model.state_dict().items():
        layer, part, kind = pattern.fullmatch(name).groups()
        prefix = "" if layer is None else f"model.layers.{layer}."
        for theirs, rows in zip(LLAMA[part], p.chunk(len(LLAMA[part])), strict=True):
            tensors[f"{prefix}{theirs}.{kind}"] = rows
    values = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "hidden_size": config.n_embd,
        "intermediate_size": model.transformer.h[0].mlp.c_proj.in_features,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tied_head,
    }
    return values, tensors


class TargetClass(NamedTuple):
    """A class of transformers, and the values that it can express of GPTConfig's fields.

    A field that is in neither `choices` nor `ANY_VALUE`, a new option say, must have its default.
    """

    name: str
    choices: dict[str, list]
    convert: Callable[[GPT], tuple[dict, dict[str, torch.Tensor]]]  # -> config.json, tensors


# What every class has with any value, and what no longer matters once there are weights.
ANY_VALUE = {*SIZES, "block_size", "dropout", "bias", "tied_head", "residual_init", "init_std"}
TARGETS = [
    TargetClass(
        "GPT2LMHeadModel",
        {"position": ["learned"], "norm": ["layernorm"], "mlp": sorted({*ACTIVATIONS.values()})},
        to_gpt2,
    ),
    TargetClass(
        "LlamaForCausalLM",
        {"position": ["rotary"], "norm": ["rmsnorm"], "mlp": ["swiglu"]},
        to_llama,
    ),
]


def target_of(config: GPTConfig) -> TargetClass:
    """The class that computes the same; raises ValueError naming what each class lacks."""
    if isinstance(config, BigramConfig):
        raise ValueError("no class of transformers has model='bigram'")
    problems = []
    for target in TARGETS:
        wrong = []
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            choices = target.choices.get(field.name, [field.default])
            if field.name not in ANY_VALUE and value not in choices:
                wrong.append(f"{field.name}={value!r} (but {' or '.join(map(repr, choices))})")
        if not wrong:
            return target
        problems.append(f"{target.name} has no {', no '.join(wrong)}")
    raise ValueError("; ".join(problems))
