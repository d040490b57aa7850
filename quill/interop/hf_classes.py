"""What transformers' GPT2LMHeadModel and LlamaForCausalLM are in Quill's terms.

GPT-2's tables serve both directions; Llama's only the way out.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch takes a second, a script's --help should not
    import torch

    from model import GPT, GPTConfig

# GPT-2's config.json: its names for Quill's sizes, and what is the same for every model.
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
N_HEAD = {768: 12, 1024: 16, 1280: 20, 1600: 25}  # by n_embd, as OpenAI published them

# Its tensors' names are Quill's own. These are transposed,
TRANSPOSED = re.compile(r".*\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight")
# these are constants that some files hold as well, and a tied head is not stored.
MASKS = (".attn.bias", ".attn.masked_bias")
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"

# Llama's names for the parts of Quill's model; several for one that is cut into them, by rows.
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


def gpt2_config(values: dict) -> GPTConfig:
    """Of a config.json; raises ValueError for what Quill's GPT is not.

    Dropout is 0: it is a run's choice.
    """
    from model import GPTConfig

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
    """The config.json of one of OpenAI's models; raises ValueError where it is none of the four."""
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
    """GPT-2 always has biases: zeros where there were none."""
    import torch

    from quill.training import checkpoint

    weights = model.state_dict()
    biased = dataclasses.replace(model.config, bias=True)
    for name, shape in checkpoint.shapes_of(biased, len(weights)).items():
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
        where = "" if layer is None else f"model.layers.{layer}."
        for theirs, piece in zip(LLAMA[part], p.chunk(len(LLAMA[part])), strict=True):
            yield f"{where}{theirs}.{kind}", piece


@dataclasses.dataclass(frozen=True)
class StockClass:
    name: str
    switches: dict[str, list]  # what it has of Quill's
    json: Callable[[GPT], dict]  # a model -> its config.json
    tensors: Callable[[GPT], Iterator]  # and its tensors by their names there


MLPS = sorted({*ACTIVATIONS.values()})
CLASSES = [
    StockClass(
        "GPT2LMHeadModel",
        {
            "model": ["gpt"],
            "position": ["learned"],
            "norm": ["layernorm"],
            "qk_norm": [False],
            "mlp": MLPS,
        },
        gpt2_json,
        gpt2_tensors,
    ),
    StockClass(
        "LlamaForCausalLM",
        {
            "model": ["gpt"],
            "position": ["rotary"],
            "norm": ["rmsnorm"],
            "qk_norm": [False],
            "mlp": ["swiglu"],
        },
        llama_json,
        llama_tensors,
    ),
]


def class_of(config: GPTConfig) -> StockClass:
    """The one that computes the same; raises ValueError naming the switches that none has."""
    problems = []
    for stock in CLASSES:
        wrong = [
            f"{switch}={getattr(config, switch)!r} (but {' or '.join(map(repr, choices))})"
            for switch, choices in stock.switches.items()
            if getattr(config, switch) not in choices
        ]
        if not wrong:
            return stock
        problems.append(f"{stock.name} has no {', no '.join(wrong)}")
    raise ValueError("; ".join(problems))
