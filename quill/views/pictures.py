"""Pictures of a model on a text: attention weights, the loss of each token, nearest embeddings.

Each is a table of coloured cells, from light for low to dark for high, which can be read in grey
and by the colour-blind.

Shapes:  T time, in tokens   nh n_head
"""

import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from torch.nn import functional as F

from model import GPT
from quill.data.tokenizers import Tokenizer, encode_prompt
from quill.errors import InputError, blames_input
from quill.interop import pretrained
from quill.sampling.decoder import Decoder
from quill.sampling.text import SampleOptions, read_prompt, sample_tokens
from quill.training.models import Bigram
from quill.views import insides

# How much one picture shows, so that it can be read.
MAX_TOKENS = 96
MAX_MAP_TOKENS, MIN_MAP_TOKENS = 32, 8
MAPS_WIDTH = 200  # cells in a row, which all heads share: the more heads, the shorter the text
MAX_MAPS = 48  # across or down
N_GUESSES = 4
N_DISTINCT, N_NEIGHBOURS = 12, 8
MAX_LABEL_CHARS = 10

TYPE = {"family": "DejaVu Sans Mono", "size": 7}
CHAR_INCHES, LINE_INCHES = 0.06, 0.11  # width and height of a character
PAGE_INCHES = 6.5  # width of the longest line of text
FONT = get_font(findfont(FontProperties(family=TYPE["family"])))
SYMBOLS = {" ": "·", "\n": "↵"}
BLUES, GREYS = "YlGnBu", "Greys"


@torch.inference_mode()
def draw(out_dir: Path, start: str, which: str) -> dict[str, Figure]:
    """-> the figures by name: the one called `which`, or "all".

    start: the text to look at, or FILE:path; if empty, the model writes one.
    """
    loaded = pretrained.from_folder(out_dir)
    model, tokenizer = loaded.build().eval(), loaded.tokenizer
    ids = encode(tokenizer, read_prompt(start)) if start else written_by(model, tokenizer)
    if isinstance(model, Bigram):
        if which in ("attention", "neighbours"):
            raise InputError(f"--pictures={which}: a bigram has no attention and no embedding")
        which = "surprise"
    kinds = {"attention": draw_attention, "surprise": draw_surprise, "neighbours": draw_neighbours}
    names = kinds if which == "all" else [which]
    return {name: kinds[name](model, tokenizer, ids) for name in names}


def encode(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    with blames_input("give a --start that the model can read", InputError):
        return torch.from_numpy(encode_prompt(tokenizer, text).astype(np.int64))


def written_by(model: GPT | Bigram, tokenizer: Tokenizer) -> torch.Tensor:
    """What the model writes after a line end, or after its first token where it has none."""
    try:
        start = encode(tokenizer, "\n")
    except InputError:
        start = torch.tensor([tokenizer.end_of_text or 0])
    n = min(MAX_TOKENS - 1, model.config.block_size)
    options = SampleOptions(num_samples=1, max_new_tokens=n, temperature=1.0, top_k=0)
    steps = sample_tokens(Decoder(model, tokenizer.vocab_size), start, options)
    return torch.cat((start, *map(torch.tensor, steps)))


def draw_attention(model: GPT, tokenizer: Tokenizer, ids: torch.Tensor) -> Figure:
    """A map for each head (across) of each layer (down), with a row for each token that attends."""
    n_layer, n_head = model.config.n_layer, model.config.n_head
    if max(n_layer, n_head) > MAX_MAPS:
        raise InputError(f"{n_layer} layers of {n_head} heads are too many maps for one picture")
    T = min(MAX_MAP_TOKENS, max(MIN_MAP_TOKENS, MAPS_WIDTH // n_head - 1))
    T = min(T, model.config.block_size, len(ids))
    maps = insides.attention_maps(model, ids[:T])
    maps[..., ~torch.ones(T, T, dtype=torch.bool).tril()] = math.nan  # the future stays white
    side = max(T, MIN_MAP_TOKENS) + 1  # with a gap to the next map
    maps = F.pad(maps, (0, side - T, 0, side - T), value=math.nan)
    cells = maps.transpose(1, 2).reshape(n_layer * side, n_head * side).numpy()
    title = f"Attention weights: one row for each token that attends{part(T, len(ids))}"
    axes = new_table(cells, LINE_INCHES, LINE_INCHES, title)
    for layer, head in np.ndindex(n_layer, n_head):
        x, y = (head + 1) * side - 1.5, layer * side - 0.5
        axes.text(x, y, f"layer {layer}\nhead {head}", ha="right", va="top", size=TYPE["size"])
    labels = labels_of(tokenizer, ids[:T].tolist())
    columns, rows = ([i * side + t for i in range(n) for t in range(T)] for n in (n_head, n_layer))
    upright = {"rotation": 90, "rotation_mode": "anchor", "ha": "right", "va": "center"}
    style = TYPE | (upright if max(map(len, labels)) > 1 else {})
    axes.set_xticks(columns, labels * n_head, **style)
    axes.set_yticks(rows, labels * n_layer, va="center", **TYPE)
    paint(axes, cells, BLUES, "weight", 1.0)
    return axes.figure


def draw_surprise(model: GPT, tokenizer: Tokenizer, ids: torch.Tensor) -> Figure:
    """The text in lines, and below each token those that the model found likeliest there."""
    n = min(MAX_TOKENS, model.config.block_size + 1, len(ids))
    if n < 2:
        raise InputError("the first token is not predicted: give a --start of two or more")
    surprise, guessed, probs = insides.guesses(model, ids[:n], tokenizer.vocab_size, N_GUESSES)
    tokens = torch.cat((ids[1:n, None], guessed), dim=1)  # (n - 1, 1 + N_GUESSES)
    labels = np.array([labels_of(tokenizer, column) for column in tokens.tolist()])
    values = torch.cat((surprise[:, None], probs), dim=1).numpy()
    width = cell_width(labels)
    n_columns = min(n, int(PAGE_INCHES / width))
    labels, values = wrapped(labels, n_columns, ""), wrapped(values, n_columns, math.nan)
    title = f"Surprise, {surprise.mean():.3f} nats a token, and below it the likeliest tokens there"
    axes = new_table(values, 1.8 * LINE_INCHES, width, title + part(n, len(ids)))
    (first,) = labels_of(tokenizer, ids[:1].tolist())
    axes.text(0, 0, first, ha="center", va="center", weight="bold", **TYPE)
    is_text = np.arange(len(values))[:, None] % (tokens.size(1) + 1) == 0
    text, guess = np.where(is_text, values, math.nan), np.where(is_text, math.nan, values)
    uniform = math.log(model.config.vocab_size)  # the loss when all tokens are equally likely
    paint(axes, text, BLUES, "surprise (nats)", uniform, labels, weight="bold")
    paint(axes, guess, GREYS, "probability", 1.0, labels)
    return axes.figure


def wrapped(table: np.ndarray, n_columns: int, empty) -> np.ndarray:
    """Turn the rows (n, m) into columns, in lines of n_columns with an empty row between them.

    The first cell stays empty, for the first token, which is not predicted.
    """
    n, m = table.shape
    n_lines = math.ceil((n + 1) / n_columns)
    cells = np.full((n_lines * n_columns, m + 1), empty, dtype=table.dtype)
    cells[1 : n + 1, :m] = table
    lines = cells.reshape(n_lines, n_columns, m + 1).swapaxes(1, 2)
    return lines.reshape(n_lines * (m + 1), n_columns)[:-1]


def draw_neighbours(model: GPT, tokenizer: Tokenizer, ids: torch.Tensor) -> Figure:
    """A row for each distinct token of the text, with its nearest neighbours first."""
    if tokenizer.vocab_size < 2:
        raise InputError("a vocabulary of one token has no neighbours: draw other --pictures")
    distinct = [*dict.fromkeys(ids.tolist())]
    tokens = distinct[:N_DISTINCT]
    cosines, nearest = insides.neighbours(model, tokens, tokenizer.vocab_size, N_NEIGHBOURS)
    cosines = cosines.numpy()
    labels = [labels_of(tokenizer, row) for row in nearest.tolist()]
    width = max(8 * CHAR_INCHES, cell_width(labels))
    title = f"Neighbours of each distinct token{part(len(tokens), len(distinct))}"
    axes = new_table(cosines, 2.8 * LINE_INCHES, width, title)
    for y, x in np.ndindex(cosines.shape):
        labels[y][x] += f"\n{cosines[y, x]:.2f}"
    axes.set_yticks(range(len(tokens)), labels_of(tokenizer, tokens), va="center", **TYPE)
    paint(axes, cosines, BLUES, "cosine of the embeddings", 1.0, labels)
    return axes.figure


def labels_of(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """Spaces as dots, line ends as arrows; bytes and characters that the font lacks are escaped."""
    labels = []
    for token in tokens:
        text = tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")
        shown = "".join(map(visible, text))
        if len(shown) > MAX_LABEL_CHARS:
            shown = shown[: MAX_LABEL_CHARS - 1] + "…"
        labels.append(shown)
    return labels


def visible(char: str) -> str:
    if char in SYMBOLS:
        return SYMBOLS[char]
    is_drawable = char.isprintable() and FONT.get_char_index(ord(char))
    return char if is_drawable else char.encode("unicode_escape").decode("ascii")


def cell_width(labels) -> float:
    """In inches, for the longest in a table of labels."""
    return (max(2, np.char.str_len(labels).max()) + 1.5) * CHAR_INCHES


def part(n_shown: int, n: int) -> str:
    """What a title says where not all is shown."""
    return f" (the first {n_shown} of {n:,})" if n_shown < n else ""


def new_table(cells: np.ndarray, height: float, width: float, title: str):
    """Axes whose unit is a cell, of height x width inches; saving adds room for the labels."""
    n_rows, n_columns = cells.shape
    axes = Figure(figsize=(n_columns * width, n_rows * height)).add_axes((0, 0, 1, 1))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, loc="left", size=9)
    return axes


def paint(axes, values, colors: str, name: str, maximum: float, labels=None, **style) -> None:
    """Colour the cells that have a value, write their labels, and add a colour bar."""
    image = axes.imshow(values, cmap=colors, vmin=0, vmax=maximum, aspect="auto")
    figure = axes.figure
    width, height = figure.get_size_inches()
    right, bar_height = 0.15 + 0.65 * (len(figure.axes) - 1), 1.5  # inches, beside the table
    box = (1 + right / width, 1 - bar_height / height, 0.1 / width, bar_height / height)
    bar = figure.colorbar(image, cax=figure.add_axes(box))
    bar.set_label(name, size=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    for y, x in np.argwhere(~np.isnan(values)) if labels is not None else ():
        color = "white" if values[y, x] > 0.625 * maximum else "black"  # on dark, on light
        axes.text(x, y, labels[y][x], ha="center", va="center", color=color, **TYPE, **style)
