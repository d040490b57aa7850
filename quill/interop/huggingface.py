"""GPT-2's weights in, GPT-2's and Llama's out, as folders of Hugging Face's transformers.

`load` reads what a GPT2LMHeadModel saved. `export` writes a folder that AutoModelForCausalLM and
AutoTokenizer load: a GPT2LMHeadModel or a LlamaForCausalLM, whichever computes the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from model import GPT, GPTConfig
from quill.data.tokenizers import END_OF_TEXT, Tokenizer
from quill.errors import InputError
from quill.files import atomic_write, file_lock
from quill.interop import hf_tokenizers
from quill.training import checkpoint
from quill.training.models import BigramConfig, state_shapes

# GPT-2's config.json: its names for Quill's sizes, and the values that Quill's model needs.
SIZES = {"n_positions": "block_size", "vocab_size": "vocab_size"}
SIZES |= {name: name for name in ("n_layer", "n_head", "n_embd")}
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
    try:
        import safetensors.torch
    except ImportError as error:
        raise InputError(f"{error}; install the extra: pip install '.[hf]'") from None
    return safetensors


# ---- in -----------------------------------------------------------------------------------------


def load(path: Path) -> tuple[GPTConfig, dict[str, torch.Tensor], Tokenizer | None]:
    """A folder, or a .safetensors file and what lies beside it -> config, state_dict, tokenizer.

    Without a config.json it must be one of the four models that OpenAI published. Raises
    `InputError` for anything that Quill's GPT cannot compute.
    """
    folder = path if path.is_dir() else path.parent
    with contextlib.ExitStack() as stack:
        found = open_tensors(path, stack)
        shapes = {name: tuple(part.get_shape()) for name, part in found.items()}
        config_path = folder / "config.json"
        try:
            has_config = config_path.exists()
            values = hf_tokenizers.read_json(config_path) if has_config else published(shapes)
            config = config_of_gpt2(values)
            needed = state_shapes(config, len(found))
        except checkpoint.MISFITS as error:
            raise InputError(f"{config_path}: {error}") from None
        if config.tied_head and HEAD not in found:
            del needed[HEAD]
        refuse_other_tensors(shapes, needed, path)
        weights = {name: read_tensor(name, found[name], path) for name in needed}
    embedding = weights[EMBEDDING]
    if config.tied_head and not weights.setdefault(HEAD, embedding).equal(embedding):
        raise InputError(f"{path}: {HEAD} differs from {EMBEDDING}, but tie_word_embeddings=true")
    tokenizer = hf_tokenizers.read(folder)
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        sizes = f"has {tokenizer.vocab_size} tokens, its model {config.vocab_size}"
        raise InputError(f"{folder}: its tokenizer {sizes}")
    return config, weights, tokenizer


def config_of_gpt2(values: dict) -> GPTConfig:
    """From a config.json, without its dropout, which each run chooses.

    Raises ValueError for what Quill's GPT cannot compute.
    """
    if values.get("model_type", "gpt2") != "gpt2":
        raise ValueError(
            f"model_type={values['model_type']!r:.80}: only GPT-2's models can be read"
        )
    activation = values.get("activation_function", "gelu_new")
    if activation not in [*ACTIVATIONS]:
        raise ValueError(f"activation_function={activation!r:.80} is none of {[*ACTIVATIONS]}")
    config = GPTConfig(
        **{own: values.get(name) for name, own in SIZES.items()},
        tied_head=values.get("tie_word_embeddings", True),
        mlp=ACTIVATIONS[activation],
    )
    for name, needed in FIXED.items():
        value = values.get(name, needed)
        if value != needed and not (name == "n_inner" and value == 4 * config.n_embd):
            raise ValueError(f"{name}={value!r:.80}, not {needed!r}")
    return config


def published(shapes: dict[str, tuple]) -> dict:
    """The config.json of one of OpenAI's four models; raises ValueError for any other."""
    vocab_size, n_embd = shapes.get(EMBEDDING, (0, 0))
    n_positions, _ = shapes.get("transformer.wpe.weight", (0, 0))
    if n_embd not in N_HEAD:
        raise ValueError("missing, and needed: the weights are of none of OpenAI's four models")
    return {
        "vocab_size": vocab_size,
        "n_positions": n_positions,
        "n_layer": sum(name.endswith(".ln_1.weight") for name in shapes),
        "n_head": N_HEAD[n_embd],
        "n_embd": n_embd,
    }


def open_tensors(path: Path, stack: contextlib.ExitStack) -> dict:
    """-> slices by Quill's names, which can be read as long as `stack` is open."""
    safetensors = import_safetensors()
    files = [path]
    if path.is_dir():
        whole = path / "model.safetensors"
        files = [whole] if whole.exists() else sorted(path.glob("model-*-of-*.safetensors"))
    if not files:
        raise InputError(f"{path} holds no model.safetensors, the only form that is read")
    found = {}
    for file in files:
        try:
            file.open("rb").close()  # safe_open does not say why it fails
            handle = stack.enter_context(safetensors.safe_open(file, framework="pt"))
        except PermissionError as error:
            raise InputError(f"{file}: {error.strerror}") from None
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{file} is not a safetensors file, or damaged: {error}") from None
        for name in handle.keys():  # noqa: SIM118, it cannot be iterated
            own = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            if own in found:
                raise InputError(f"{file}: {name} is there twice")
            if not own.endswith(MASKS):
                found[own] = handle.get_slice(name)
    return found


def refuse_other_tensors(shapes: dict, needed: dict, path: Path) -> None:
    wrong = [f"{name} is missing" for name in needed if name not in shapes]
    wrong += [f"{name} is not of a GPT-2" for name in shapes if name not in needed]
    for name in [name for name in needed if name in shapes]:
        shape = tuple(needed[name])[:: -1 if TRANSPOSED.fullmatch(name) else 1]
        if shapes[name] != shape:
            wrong.append(f"{name} is {shapes[name]}, not {shape}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{path}: {'; '.join(wrong[:3])}{more}")


def read_tensor(name: str, part, path: Path) -> torch.Tensor:
    """The tensor behind a slice, in float32 and in Quill's layout."""
    if part.get_dtype() not in ("F32", "F16", "BF16"):
        raise InputError(f"{path}: {name} is of type {part.get_dtype()}, not F32, F16 or BF16")
    p = part[:].float()
    if not p.isfinite().all():
        raise InputError(f"{path}: {name} is not finite")
    return p.t().contiguous() if TRANSPOSED.fullmatch(name) else p


# ---- out ----------------------------------------------------------------------------------------


def export(model: GPT, tokenizer: Tokenizer, dest: Path) -> str:
    """Write the folder; -> the name of the class. Raises ValueError when no class fits."""
    safetensors = import_safetensors()
    target = target_of(model.config)
    is_tied, end = model.config.tied_head, tokenizer.end_of_text
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
        "config.json": {
            "architectures": [target.name],
            **target.config_json(model),
            "tie_word_embeddings": is_tied,
            **ends,
        },
    }
    tensors = {name: p.contiguous() for name, p in target.tensors(model)}
    if is_tied:
        del tensors[HEAD]
    paths = [dest / part for part in ("model.safetensors", *texts)]
    with file_lock(dest), atomic_write(*paths) as (weights, *files):
        weights.write(safetensors.torch.save(tensors, metadata=PRODUCER))
        for file, contents in zip(files, texts.values(), strict=True):
            file.write(json.dumps(contents, indent=1, ensure_ascii=False).encode() + b"\n")
    return target.name


def gpt2_json(model: GPT) -> dict:
    config, names = model.config, {own: name for name, own in ACTIVATIONS.items()}
    return {
        "model_type": "gpt2",
        **FIXED,
        **{name: getattr(config, own) for name, own in SIZES.items()},
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        "activation_function": names[config.mlp],
    }


def gpt2_tensors(model: GPT) -> Iterator[tuple[str, torch.Tensor]]:
    """GPT-2 always has biases: zeros where the model has none."""
    weights = model.state_dict()
    with_bias = dataclasses.replace(model.config, bias=True)
    for name, shape in state_shapes(with_bias, len(weights)).items():
        p = weights[name] if name in weights else torch.zeros(shape)
        yield name, p.t() if TRANSPOSED.fullmatch(name) else p


def llama_json(model: GPT) -> dict:
    config = model.config
    return {
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
    }


def llama_tensors(model: GPT) -> Iterator[tuple[str, torch.Tensor]]:
    pattern = re.compile(r"(?:transformer\.)?(?:h\.(\d+)\.)?(.+)\.(weight|bias)")
    for name, p in model.state_dict().items():
        layer, part, kind = pattern.fullmatch(name).groups()
        prefix = "" if layer is None else f"model.layers.{layer}."
        for theirs, rows in zip(LLAMA[part], p.chunk(len(LLAMA[part])), strict=True):
            yield f"{prefix}{theirs}.{kind}", rows


@dataclasses.dataclass(frozen=True)
class TargetClass:
    """A class of transformers, and the values that it can express of GPTConfig's fields.

    A field named neither in `choices` nor in `ANY_VALUE` must have its default: whoever adds an
    option to the model says here where it can be exported, and until then no class has it.
    """

    name: str
    choices: dict[str, list]
    config_json: Callable[[GPT], dict]
    tensors: Callable[[GPT], Iterator[tuple[str, torch.Tensor]]]


# What every class has with any value, and what no longer matters once there are weights.
ANY_VALUE = {*SIZES.values(), "dropout", "bias", "tied_head", "residual_init", "init_std"}
TARGETS = [
    TargetClass(
        "GPT2LMHeadModel",
        {"position": ["learned"], "norm": ["layernorm"], "mlp": sorted({*ACTIVATIONS.values()})},
        gpt2_json,
        gpt2_tensors,
    ),
    TargetClass(
        "LlamaForCausalLM",
        {"position": ["rotary"], "norm": ["rmsnorm"], "mlp": ["swiglu"]},
        llama_json,
        llama_tensors,
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
