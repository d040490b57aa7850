"""What a server serves: a model, its tokenizer, the thread that writes with it, and its limits."""

import dataclasses
import time
from pathlib import Path

import torch

from model import GPT
from quill.data import tokenizers
from quill.data.tokenizers import Tokenizer
from quill.errors import InputError
from quill.files import split_folders
from quill.interop.for_sampling import load_for_sampling
from quill.training.devices import pick_device, pick_dtype
from quill.views.batching import Batch
from quill.views.engine import Engine
from quill.views.http import ApiError
from quill.views.insides import Stage, stages


@dataclasses.dataclass(frozen=True)
class Limits:
    prompt_tokens: int
    new_tokens: int
    seconds: float
    texts: int  # of a request


@dataclasses.dataclass(frozen=True)
class Served:
    """is_chat: it was trained on prompts and completions."""

    name: str
    run: Path | None  # the folder with metrics.jsonl
    model: torch.nn.Module
    tokenizer: Tokenizer
    engine: Engine
    limits: Limits
    reverses_answers: bool
    is_chat: bool
    stages: list[Stage]  # none where the model is no GPT
    created: int  # Unix time

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def card(self) -> dict:
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "quill",
        }

    # ---- checks of a request; they raise ApiError ------------------------------------------------

    def check_model(self, name: str) -> None:
        if name != self.name:
            message = f"there is no model {name!r} here, only {self.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def check_n_texts(self, n: int, param: str) -> None:
        if n == 0:
            raise ApiError(400, "the prompt is empty", param=param)
        if n > self.limits.texts:
            raise ApiError(400, f"a request is for 1 to {self.limits.texts} texts", param=param)

    def check_n_tokens(self, n: int) -> None:
        if n > self.limits.new_tokens:
            message = f"max_tokens is at most {self.limits.new_tokens:,} here"
            raise ApiError(400, message, param="max_tokens")

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        try:
            if isinstance(prompt, str):
                ids = tokenizers.encode_prompt(self.tokenizer, prompt).tolist()
            else:
                ids = prompt
        except (InputError, UnicodeEncodeError) as error:  # the latter of half a surrogate pair
            raise ApiError(400, str(error), param="prompt") from None
        if not ids:
            raise ApiError(400, "the prompt is empty", param="prompt")
        if len(ids) > self.limits.prompt_tokens:
            message = f"a prompt has at most {self.limits.prompt_tokens:,} tokens, not {len(ids):,}"
            raise ApiError(400, message, param="prompt", code="context_length_exceeded")
        if not 0 <= min(ids) <= max(ids) < self.tokenizer.vocab_size:
            message = f"token ids are 0 to {self.tokenizer.vocab_size - 1:,}"
            raise ApiError(400, message, param="prompt")
        return ids


def load(config) -> Served:
    """The model with its engine, as the options of quill.serve describe it."""
    device = pick_device(config.device)
    loaded = tokenizer = None

    def make_batch() -> Batch:
        nonlocal loaded, tokenizer
        loaded, tokenizer = load_for_sampling(config)
        model = loaded.build().eval().to(device, pick_dtype(config.dtype, device))
        return Batch(model, tokenizer.vocab_size, config.max_texts)

    engine = Engine(make_batch, config.max_waiting)
    model = engine.batch.model
    n_shown = min(16, model.config.block_size)
    is_gpt, is_run = isinstance(model, GPT), config.init_from == "resume"
    folders = split_folders(config.out_dir) if is_run else [Path(config.init_from)]
    run = folders[0] if is_run and len(folders) == 1 else None
    return Served(
        name=",".join(folder.resolve().name for folder in folders),
        run=run,
        model=model,
        tokenizer=tokenizer,
        engine=engine,
        limits=Limits(
            prompt_tokens=config.max_prompt_tokens,
            new_tokens=config.max_new_tokens,
            seconds=config.max_seconds,
            texts=config.max_texts,
        ),
        reverses_answers=loaded.reverses_answers,
        is_chat=run is not None and has_answers(run / "metrics.jsonl"),
        stages=engine.call(lambda: stages(model, n_shown)).result() if is_gpt else [],
        created=int(time.time()),
    )


def has_answers(metrics: Path) -> bool:
    """Whether the run was trained on prompts and completions, by what its evaluations say."""
    return metrics.is_file() and b'"val_exact"' in metrics.read_bytes()
