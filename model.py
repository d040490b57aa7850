"""The GPT language model: tensors in, tensors out. PyTorch is all that it needs.

Start at `GPT.forward` with cache=None, then read upwards: Block, attention, MLP; `generate` and the
caches come last.

One architecture with a few switches covers GPT-2 (the defaults, with mlp="gelu_tanh") and the
modern block (rotary positions, RMSNorm, QK-norm, ReLU^2 or SwiGLU, untied head), so that each idea
can be turned on alone. In the classic variant the weights carry GPT-2's names.

Shapes:  B batch   T time, in tokens   C n_embd   nh n_head   hs head size, C / nh   V vocab_size
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**27  # in float32 at once, to compute a loss: 0.5 GB


def option(default, help: str, **bounds):
    """A field of GPTConfig; train.py offers it as a command-line option with this help."""
    return dataclasses.field(default=default, metadata={"help": help, **bounds})


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """What determines the weights' shapes and meaning. Raises ValueError when it cannot work."""

    block_size: int = option(1024, "tokens in a window: the longest context", min=1, max=2**24)
    vocab_size: int = option(50257, "number of token ids", min=1)
    n_layer: int = option(12, "number of blocks", min=1, max=10**4)
    n_head: int = option(12, "attention heads in a block", min=1)
    n_embd: int = option(768, "width of the residual stream", min=1, max=10**6)
    dropout: float = option(0.0, "fraction of activations dropped in training", min=0, max=0.99)
    bias: bool = option(True, "biases in linear layers and LayerNorm, as in GPT-2")
    position: Literal["learned", "rotary"] = option("learned", "position encoding")
    norm: Literal["layernorm", "rmsnorm"] = option("layernorm", "normalization")
    qk_norm: bool = option(False, "normalize queries and keys")
    mlp: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu"] = option("gelu", "activation")
    token_shift: bool = option(False, "the MLP also reads the token before")
    tied_head: bool = option(True, "the output matrix is the token embedding")
    residual_init: Literal["scaled", "zero"] = option("scaled", "init of residual projections")
    init_std: float = option(0.02, "standard deviation of the initial weights", min=1e-6, max=1)

    def __post_init__(self):
        kinds = typing.get_type_hints(GPTConfig)
        for field in dataclasses.fields(GPTConfig):
            value, kind = getattr(self, field.name), kinds[field.name]
            low = field.metadata.get("min", -math.inf)
            high = field.metadata.get("max", math.inf)
            allowed = {int: (int,), float: (int, float)}.get(kind)
            if allowed and (type(value) not in allowed or not low <= value <= high):
                raise ValueError(f"{field.name}={value!r} is no {kind.__name__} in {low}..{high}")
            choices = (True, False) if kind is bool else typing.get_args(kind)
            if choices and value not in choices:
                raise ValueError(f"{field.name}={value!r} is none of {choices}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(
                f"n_embd={self.n_embd} over n_head={self.n_head} makes heads of {self.head_size}: "
                "position=rotary turns pairs of channels, so the head size must be even"
            )

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head


class Norm(nn.Module):
    """LayerNorm (Ba 2016) with an optional bias, or RMSNorm (Zhang & Sennrich 2019)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.is_rms = config.norm == "rmsnorm"
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        has_bias = config.bias and not self.is_rms
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if has_bias else None

    def forward(self, x):
        if self.is_rms:
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-5)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, eps=1e-5)


def rotary_table(head_size: int, block_size: int) -> torch.Tensor:
    """cos, then -sin and sin, of position * frequency: (2, block_size, hs). Su et al. 2021."""
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2) / head_size)
    angle = torch.outer(torch.arange(block_size), frequency)  # (block_size, hs / 2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)))


def rotate(x, rotary):
    """Rotate channel pairs (i, i + hs/2) of x (B, T, heads, hs) by their position's angles."""
    cos, sin = rotary.to(x.dtype)[:, :, None]  # (T, 1, hs) each
    return x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin  # roll swaps the halves


def attention_dtype(x) -> torch.dtype:
    """The dtype of queries and keys: that of x, but on a CPU at least float32.

    There PyTorch's bfloat16 attention takes 3 times as long in the backward pass, and 4 times for a
    single query.
    """
    return torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype


def attend(q, k, v, **options):
    """Scaled dot-product attention of (B, nh, T, hs) each; q and k have `attention_dtype`."""
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):  # or it would make them bfloat16 again
        return F.scaled_dot_product_attention(q, k, v.to(q.dtype), **options)


class CausalSelfAttention(nn.Module):
    """All heads at once, as a batch dimension; each token attends to the past. Vaswani 2017."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def queries_keys_values(self, x, rotary):
        """x (B, T, C) -> q and k, normalized and rotated, and v: (B, nh, T, hs) each."""
        B, T, _ = x.shape
        nh, hs = self.config.n_head, self.config.head_size
        # q and k stay one tensor of 2 nh heads up to the end: half as many small operations.
        qk, v = self.c_attn(x).view(B, T, 3 * nh, hs).split((2 * nh, nh), dim=2)
        qk = qk.to(attention_dtype(qk))
        if self.config.qk_norm:  # Henry et al. 2020
            qk = F.rms_norm(qk, (hs,))
        if rotary is not None:
            qk = rotate(qk, rotary)
        q, k = qk.chunk(2, dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, rotary=None, cache=None):
        B, T, C = x.shape
        q, k, v = self.queries_keys_values(x, rotary)
        dtype, mask = v.dtype, None
        if cache is not None:
            mask = cache.mask(T)
            k, v = cache.append(self.layer, k, v)
        is_causal = mask is None and T > 1
        p = self.dropout if self.training else 0.0
        y = attend(q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=p)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C).to(dtype)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with a nonlinearity between them, applied to each position on its own.

    SwiGLU (Shazeer 2020) has three matrices, so its hidden width is two thirds of the others'.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.kind = config.mlp
        hidden = 4 * config.n_embd
        if self.kind == "swiglu":
            hidden = 8 * math.ceil(hidden * 2 / 3 / 8)
        fan_out = 2 * hidden if self.kind == "swiglu" else hidden
        self.c_fc = nn.Linear(config.n_embd, fan_out, bias=config.bias)
        self.c_proj = nn.Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.c_fc(x)
        if self.kind == "gelu":  # Hendrycks & Gimpel 2016
            x = F.gelu(x)
        elif self.kind == "gelu_tanh":  # as GPT-2 was trained
            x = F.gelu(x, approximate="tanh")
        elif self.kind == "relu":
            x = F.relu(x)
        elif self.kind == "relu2":  # So et al. 2021
            x = F.relu(x)
            x = x * x  # in this form the backward pass is twice as fast as a power's
        else:
            gate, x = x.chunk(2, dim=-1)
            x = F.silu(gate) * x
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """Attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.ln_1 = Norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = Norm(config)
        self.shift = nn.Parameter(torch.full((config.n_embd,), 0.3)) if config.token_shift else None
        self.mlp = MLP(config)

    def forward(self, x, rotary, cache):
        x = x + self.attn(self.ln_1(x), rotary, cache)
        h = self.ln_2(x)
        if self.shift is not None:  # by channel, as in RWKV, Peng et al. 2023
            # The row of the token before: zeros for the first.
            previous = F.pad(h, (0, 0, 1, -1)) if cache is None else cache.before(self.layer, h)
            h = h + previous * self.shift.to(h.dtype)
        return x + self.mlp(h)


def cross_entropy(logits, targets, reduction: str):
    """logits (B, T, V), targets (B, T), -1 where nothing is to be predicted -> nats, or None."""
    if targets is None:
        return None
    scores, targets = logits.flatten(0, -2).float(), targets.flatten()
    return F.cross_entropy(scores, targets, ignore_index=-1, reduction=reduction)


def chunked_cross_entropy(head, x, targets, reduction: str, vocab_size: int):
    """cross_entropy(head(x), ...) of x (B, T, C), with only a chunk of the logits in memory.

    The float32 logits of 32 x 1,024 tokens of GPT-2 take 6.6 GB, and their gradient as much. Each
    chunk is computed again in the backward pass; torch.compile instead fuses the float32 copy away.
    """

    def loss_of(x, targets, reduction="sum"):
        return cross_entropy(head(x), targets, reduction)

    n_rows = max(1, MAX_LOGITS // vocab_size)
    if torch.compiler.is_compiling() or targets.numel() <= n_rows:
        return loss_of(x, targets, reduction)
    parts = zip(x.flatten(0, 1).split(n_rows), targets.flatten().split(n_rows), strict=True)
    options = {"use_reentrant": False, "preserve_rng_state": False}
    loss = sum(checkpoint(loss_of, *part, **options) for part in parts)
    return loss / (targets != -1).sum() if reduction == "mean" else loss


class GPT(nn.Module):
    """Token ids in, scores for the next token out."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        parts = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}
        if config.position == "learned":
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)
            self.rotary = None
        else:
            table = rotary_table(config.head_size, config.block_size)
            self.register_buffer("rotary", table, persistent=False)
        parts["drop"] = nn.Dropout(config.dropout)
        parts["h"] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        parts["ln_f"] = Norm(config)
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.transformer.wte.weight  # Press & Wolf 2017
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self):
        """GPT-2's init: normal, with residual projections scaled down by depth (or zero).

        Only the head differs, so that the first logits are near zero and the first loss is ln(V) to
        1 %. An untied head starts at zero. A tied one cannot, so ln_f starts with a small gain: the
        logits' standard deviation is gain * init_std * sqrt(C). With residual_init="zero" it is
        smaller still, for then the final x is the embedding of the token just read, and a tied head
        would give that token the highest score.
        """
        config = self.config
        is_zero = config.residual_init == "zero"
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                damped = config.init_std / math.sqrt(2 * config.n_layer)
                nn.init.normal_(p, std=0.0 if is_zero else damped)
            elif p.dim() == 2:
                nn.init.normal_(p, std=config.init_std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if config.tied_head:
            # 0.14 was found by trying widths 64 to 768: the first loss is within 1 % of ln(V).
            logit_std = 1 / math.sqrt(config.n_embd) if is_zero else 0.14
            gain = logit_std / (config.init_std * math.sqrt(config.n_embd))
            nn.init.constant_(self.transformer.ln_f.weight, min(1.0, gain))
        else:
            nn.init.zeros_(self.lm_head.weight)

    def forward(
        self, idx, targets=None, *, reduction="mean", loss_only=False, cache=None, last_only=False
    ):
        """idx (B, T) int64 -> logits (B, T, V), loss.

        targets: (B, T), the token after each; -1 is ignored. Without them the loss is None.
        reduction: "mean" over the targets that count, or their "sum", in nats.
        loss_only: the logits are None; those of a large vocabulary are never all in float32.
        cache: idx continues what the cache has read, which it is appended to.
        last_only: logits of the last position alone, (B, 1, V).
        """
        T = idx.size(1)
        assert self.config.block_size >= T, "longer than block_size"
        positions = cache.positions(T) if cache is not None else slice(T)
        x = self.transformer.wte(idx)  # (B, T, C)
        rotary = None
        if self.config.position == "learned":
            x = x + self.transformer.wpe.weight[positions]
        else:
            rotary = self.rotary[:, positions]
        x = self.transformer.drop(x)
        if torch.is_autocast_enabled(x.device.type):  # the residual stream as well, for speed
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for block in self.transformer.h:
            x = block(x, rotary, cache)
        if cache is not None:
            cache.advance(T)
        if last_only:
            x = x[:, -1:]
        if loss_only:
            vocab_size = self.config.vocab_size
            return None, chunked_cross_entropy(self.head, x, targets, reduction, vocab_size)
        logits = self.head(x)
        return logits, cross_entropy(logits, targets, reduction)

    def head(self, x):
        """What the last block made of the tokens, (B, T, C) -> logits (B, T, V)."""
        return self.lm_head(self.transformer.ln_f(x))

    def new_cache(self, batch_size: int) -> "KVCache":
        return KVCache(self, batch_size)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every trained tensor, once, by how the optimizers treat it.

        fused_qkv: query, key and value matrices, stacked (3 C, C). hidden: the blocks' other
        matrices. embedding: the matrices outside the blocks. vector: gains and biases.
        """
        groups = {"fused_qkv": [], "hidden": [], "embedding": [], "vector": []}
        for name, p in self.named_parameters():
            if p.dim() < 2:
                kind = "vector"
            elif ".h." not in name:
                kind = "embedding"
            elif name.endswith("c_attn.weight"):
                kind = "fused_qkv"
            else:
                kind = "hidden"
            groups[kind].append(p)
        return groups

    def n_parameters(self) -> int:
        """All but the position table, as nanoGPT counts."""
        n = sum(p.numel() for p in self.parameters())
        return n - (self.transformer.wpe.weight.numel() if self.rotary is None else 0)

    def flops_per_token(self) -> float:
        """Forward and backward, at full context: 6 a weight and 12 L C T for the attention.

        Weights that multiply, so without embedding look-ups. Chowdhery et al. 2022, appendix B.
        """
        c = self.config
        groups = self.parameter_groups()
        matrices = sum(p.numel() for p in groups["hidden"] + groups["fused_qkv"])
        return 6 * (matrices + c.vocab_size * c.n_embd) + 12 * c.n_layer * c.n_embd * c.block_size


class KVCache:
    """Keys and values of the tokens a model has read, preallocated for block_size tokens.

    k, v: of each layer (B, nh, block_size, hs), of which the first `n_tokens` positions are filled.
    newest: of each layer (B, 1, C), what a token shift will give to the next token.
    """

    def __init__(self, model: GPT, batch_size: int):
        config, weight = model.config, next(model.parameters())
        shape = (batch_size, config.n_head, config.block_size, config.head_size)
        options = {"device": weight.device, "dtype": attention_dtype(weight)}
        self.k = [torch.zeros(shape, **options) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, **options) for _ in range(config.n_layer)]
        shape = (batch_size, 1, config.n_embd)
        n_shifts = config.n_layer if config.token_shift else 0
        self.newest = [weight.new_zeros(shape) for _ in range(n_shifts)]
        self.n_tokens = 0

    def positions(self, T: int):
        """The index of the next T tokens' positions."""
        assert self.n_tokens + T <= self.k[0].size(2), "longer than block_size"
        return slice(self.n_tokens, self.n_tokens + T)

    def append(self, layer: int, k, v):
        """Store the new (B, nh, T, hs) and return all keys and values of `layer` up to them."""
        new = self.positions(k.size(2))
        self.k[layer][:, :, new] = k
        self.v[layer][:, :, new] = v
        return self.k[layer][:, :, : new.stop], self.v[layer][:, :, : new.stop]

    def before(self, layer: int, h):
        """For each token of h (B, T, C) the row of the token before it."""
        rows = torch.cat((self.newest[layer], h), dim=1)
        self.newest[layer].copy_(rows[:, -1:])
        return rows[:, :-1]

    def mask(self, T: int):
        """Which keys each of T new tokens may attend to, (T, n); None where no mask is needed."""
        if T == 1 or self.n_tokens == 0:  # one new token sees all; the first read is causal
            return None
        past = self.n_tokens
        return torch.ones(T, past + T, dtype=torch.bool, device=self.k[0].device).tril(past)

    def advance(self, T: int) -> None:
        self.n_tokens += T

    def clear(self) -> None:
        self.n_tokens = 0
        for row in self.newest:
            row.zero_()


def logits_to_probs(logits, temperature: float, top_k: int, top_p: float):
    """(B, V) logits -> (B, V) probabilities that sum to 1.

    temperature 0 is greedy; top_k 0 and top_p 1 keep everything. top_p (Holtzman et al. 2019)
    keeps the fewest most probable tokens that together reach it.
    """
    logits = logits.float()
    if temperature < torch.finfo(torch.float32).tiny:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    logits = logits - logits.amax(dim=-1, keepdim=True)  # a tiny temperature must not overflow
    probs = F.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        ranked, order = probs.sort(descending=True)
        unneeded = ranked.cumsum(dim=-1) - ranked >= top_p
        unneeded[:, 0] = False
        probs = probs.masked_fill(torch.zeros_like(unneeded).scatter(1, order, unneeded), 0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def sample(probs, uniform):
    """Draw one token a row, (B, 1): where the cumulative of probs (B, V) passes uniform (B,)."""
    cumulative = probs.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Below the total even after rounding, so a token of probability 0 is never reached.
    point = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, point, right=True)  # (B, 1)


@torch.inference_mode()
def generate(
    model: GPT,
    idx,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    uniform: Callable[[], torch.Tensor] | None = None,
) -> Iterator[torch.Tensor]:
    """Continue idx (B, T), T >= 1; yields one (B,) tensor of new tokens a step.

    uniform: called at each step for the (B,) numbers in [0, 1) that choose its tokens, so that a
    row's tokens can be made to depend on its own numbers alone; torch.rand if None.

    A context that has outgrown block_size is cut to its most recent half and read anew, so the cost
    of a token stays bounded.
    """
    block_size = model.config.block_size
    context = idx[:, -block_size:].clone()
    unread = context  # what the cache lacks: all of it at first (prefill), then the newest token
    cache = model.new_cache(idx.size(0))  # None for a model that reads all of its context each time
    for _ in range(max_new_tokens):
        if context.size(1) > block_size:
            context = context[:, -max(1, block_size // 2) :]
            unread = context
            if cache is not None:
                cache.clear()
        logits, _ = model(unread, cache=cache, last_only=True)  # (B, 1, V)
        probs = logits_to_probs(logits[:, -1], temperature, top_k, top_p)  # (B, V)
        numbers = torch.rand(idx.size(0), device=idx.device) if uniform is None else uniform()
        new = sample(probs, numbers)
        context = torch.cat((context, new), dim=1)
        unread = new if cache is not None else context
        yield new[:, 0]


if __name__ == "__main__":
    raise SystemExit("model.py is a library: run train.py to train it, sample.py to generate text")
