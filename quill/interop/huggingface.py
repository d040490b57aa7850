"""GPT-2's weights in and out, as files of Hugging Face's transformers.

Usage:
    python hf.py export --out_dir=out DEST     the run's model and tokenizer, as a folder DEST

AutoModelForCausalLM and AutoTokenizer load that folder. A model with GPT-2's block becomes a
GPT2LMHeadModel, one with Llama's a LlamaForCausalLM; others are refused. The way in is `load`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from quill import settings
from quill.data.tokenizers import END_OF_TEXT, Tokenizer
from quill.errors import InputError, run_command
from quill.files import atomic_write, file_lock
from quill.interop import hf_tokenizers
from quill.interop.hf_classes import (
    EMBEDDING,
    HEAD,
    MASKS,
    TRANSPOSED,
    class_of,
    gpt2_config,
    published,
)
from quill.interop.hf_tokenizers import read_json
from quill.settings import option

if TYPE_CHECKING:  # torch takes a second, --help should not
    import torch

    from model import GPT
    from quill.interop.pretrained import Pretrained

OURS = {"format": "pt", "producer": "quill"}  # the metadata of each model.safetensors written here


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    out_dir: str = option("out", "the run's folder: its best.pt is used, else its ckpt.pt")
    dest: str = option("", "the folder to write: a new one, or an earlier export")


def main(argv: list[str]) -> int:
    use = "use: python hf.py export --out_dir=out DEST (--help says more)"
    if argv[:1] == ["export"]:
        argv = argv[1:]
    elif not {"--help", "-h"} & {*argv}:
        raise InputError(use)
    config = settings.load(ExportConfig, argv, usage=__doc__, positional="dest")
    if not config.dest:
        raise InputError(f"DEST, the folder to write, is missing; {use}")
    dest = Path(config.dest)
    refuse_to_overwrite(dest)
    from quill.interop import pretrained
    from quill.training import checkpoint

    path = checkpoint.find(Path(config.out_dir))
    loaded = pretrained.from_run(path)
    model = loaded.build()
    try:
        name = export(model, loaded.tokenizer, dest)
    except ValueError as error:
        raise InputError(f"{path} cannot be exported: {error}") from None
    print(f"wrote {dest}: {name} of {sum(p.numel() for p in model.parameters()):,} parameters")
    return 0


# ---- in -----------------------------------------------------------------------------------------


def load(path: Path) -> Pretrained:
    """GPT-2's weights: a folder, or a .safetensors file and what lies beside it.

    Without a config.json it must be one of the four models that OpenAI published. Raises
    `InputError` for anything that Quill's GPT is not.
    """
    from quill.interop.pretrained import Pretrained
    from quill.training import checkpoint

    folder = path if path.is_dir() else path.parent
    with contextlib.ExitStack() as stack:
        found = open_tensors(path, stack)
        shapes = {name: tuple(part.get_shape()) for name, part in found.items()}
        described = folder / "config.json"
        is_there = described.exists()
        try:
            config = gpt2_config(read_json(described) if is_there else published(shapes))
            needed = checkpoint.shapes_of(config, len(found))
        except checkpoint.MISFITS as error:
            raise InputError(f"{described}: {error}") from None
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
    return Pretrained(config, weights, tokenizer)


def open_tensors(path: Path, stack: contextlib.ExitStack) -> dict:
    """-> Quill's names: slices, to be read while `stack` is open."""
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
            file.open("rb").close()  # safe_open does not say why it cannot
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


def import_safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise InputError(f"{error}; install the extra: pip install '.[hf]'") from None
    return safetensors


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
    """A whole tensor from a slice, in float32 and as Quill holds it."""
    if part.get_dtype() not in ("F32", "F16", "BF16"):
        raise InputError(f"{path}: {name} is of type {part.get_dtype()}, not F32, F16 or BF16")
    p = part[:].float()
    if not p.isfinite().all():
        raise InputError(f"{path}: {name} is not finite")
    return p.t().contiguous() if TRANSPOSED.fullmatch(name) else p


# ---- out ----------------------------------------------------------------------------------------


def refuse_to_overwrite(dest: Path) -> None:
    """Raise InputError where there is something else than an earlier export."""
    safetensors = import_safetensors()
    try:
        names = {path.name for path in dest.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{dest}: {error.strerror}; choose another folder") from None
    if all(name.endswith((".tmp", ".lock")) for name in names):  # of an export that was killed
        return
    path = dest / "model.safetensors"
    with (
        contextlib.suppress(OSError, safetensors.SafetensorError),
        safetensors.safe_open(path, framework="pt") as file,
    ):
        if file.metadata() == OURS:
            return
    raise InputError(f"{dest} is not empty and not an earlier export: choose another folder")


def export(model: GPT, tokenizer: Tokenizer, dest: Path) -> str:
    """Write the folder; -> the name of the class. Raises ValueError when there is none."""
    safetensors = import_safetensors()
    stock = class_of(model.config)
    end = tokenizer.end_of_text
    ends = {"bos_token_id": end, "eos_token_id": end}
    shared = {"tie_word_embeddings": model.config.tied_head, **ends}
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
        # The last: a folder without it is not loaded.
        "config.json": {"architectures": [stock.name], **stock.json(model), **shared},
    }
    paths = [dest / part for part in ("model.safetensors", *texts)]
    with file_lock(dest), atomic_write(*paths) as (weights, *files):
        is_tied = model.config.tied_head
        tensors = {
            name: p.contiguous() for name, p in stock.tensors(model) if name != HEAD or not is_tied
        }
        weights.write(safetensors.torch.save(tensors, metadata=OURS))
        for file, contents in zip(files, texts.values(), strict=True):
            file.write(json.dumps(contents, indent=1, ensure_ascii=False).encode() + b"\n")
    return stock.name


if __name__ == "__main__":
    run_command(main)
