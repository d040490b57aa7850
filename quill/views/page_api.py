"""The endpoints below /page, which the page in the browser asks about the model and its run.

All answers are JSON. A token is {"id", "text"}; where its bytes are no text, as escapes.
"""

import asyncio
import json
from typing import Annotated

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from model import GPT, logits_to_probs
from quill.data.tokenizers import Tokenizer, decode
from quill.training.models import config_to_dict
from quill.views import insides
from quill.views.http import ApiError, CutFields, one_of, read_json, validated
from quill.views.served import Served

N_CANDIDATES, N_LENS, N_NEIGHBOURS = 20, 5, 10
MAX_METRICS_BYTES = 1 << 22  # in an answer; the page asks again for the rest


class ReadRequest(CutFields):
    """A text, as it is or in token ids, and how the next token would be drawn."""

    text: Annotated[str | list[int], one_of("a text or token ids")]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")


def token_dicts(tokenizer: Tokenizer, tokens: list[int], **columns: list) -> list[dict]:
    """A dict for each token, with its text and its value of each column."""
    return [
        {"id": token, "text": token_text(tokenizer, token)}
        | {name: column[i] for name, column in columns.items()}
        for i, token in enumerate(tokens)
    ]


def rounded(values: torch.Tensor) -> list:
    """Nested lists, with the digits that a page can show."""
    return values.cpu().double().round(decimals=5).tolist()


def check_finite(values: torch.Tensor) -> None:
    if not values.isfinite().all():
        raise ApiError(500, "the model's scores are not finite", kind="server_error")


@torch.inference_mode()
def read_text(served: Served, asked: ReadRequest, ids: list[int]) -> dict:
    """The surprise at each token, and what may come next.

    Surprise is in nats. It is None for the first token that is read, and for those before it: only
    the last block_size tokens are read.
    """
    window = ids[-served.model.config.block_size :]
    logits, _ = served.model(torch.tensor([window], device=served.device))
    logits = logits[0, :, : served.tokenizer.vocab_size].float()  # (T, V)
    check_finite(logits)
    log_probs = logits.log_softmax(dim=-1)
    read = torch.tensor(window[1:], device=served.device)
    surprise = -log_probs[:-1].gather(1, read[:, None])[:, 0]
    cuts = asked.temperature, asked.top_k, asked.top_p
    drawn_from = logits_to_probs(logits[-1:], *cuts)[0]
    probs, tokens = log_probs[-1].exp().topk(min(N_CANDIDATES, served.tokenizer.vocab_size))
    columns = {"prob": rounded(probs), "drawn": rounded(drawn_from[tokens])}
    n_unread = len(ids) - len(window)
    surprises = [None] * (n_unread + 1) + rounded(surprise)
    return {
        "text": decode(served.tokenizer, ids),
        "n_unread": n_unread,
        "tokens": token_dicts(served.tokenizer, ids, surprise=surprises),
        "next": token_dicts(served.tokenizer, tokens.tolist(), **columns),
    }


@torch.inference_mode()
def look_at(served: Served, ids: list[int]) -> dict:
    """How the last of the tokens came about, as far as the window reaches back."""
    window = torch.tensor(ids[-served.model.config.block_size :], device=served.device)
    vocab_size = served.tokenizer.vocab_size
    seen = insides.look_at_last(served.model, window, vocab_size)
    check_finite(seen.lens)
    probs, tokens = seen.lens.topk(min(N_LENS, vocab_size))
    lens = [
        token_dicts(served.tokenizer, row.tolist(), prob=rounded(p))
        for row, p in zip(tokens, probs, strict=True)
    ]
    similar = []
    if vocab_size > 1:
        cosines, nearest = insides.neighbours(served.model, ids[-1:], vocab_size, N_NEIGHBOURS)
        columns = {"cosine": rounded(cosines[0])}
        similar = token_dicts(served.tokenizer, nearest[0].tolist(), **columns)
    return {"attention": rounded(seen.attention), "lens": lens, "neighbours": similar}


async def about(request: Request) -> Response:
    served: Served = request.app.state.served
    return JSONResponse(
        {
            "name": served.name,
            "model": config_to_dict(served.model.config),
            "n_parameters": sum(p.numel() for p in served.model.parameters()),
            "vocab_size": served.tokenizer.vocab_size,
            "is_gpt": isinstance(served.model, GPT),
            "is_run": served.run is not None,
            "max_tokens": served.limits.new_tokens,
            "max_texts": served.limits.texts,
            "stages": [stage._asdict() for stage in served.stages],
        }
    )


async def read(request: Request) -> Response:
    served: Served = request.app.state.served
    asked = validated(ReadRequest, await read_json(request))
    ids = served.prompt_ids(asked.text)
    return JSONResponse(await in_engine(served, lambda: read_text(served, asked, ids)))


async def look(request: Request) -> Response:
    served: Served = request.app.state.served
    asked = validated(ReadRequest, await read_json(request))
    ids = served.prompt_ids(asked.text)
    if not isinstance(served.model, GPT):
        raise ApiError(400, "only a GPT has attention and layers to look at")
    return JSONResponse(await in_engine(served, lambda: look_at(served, ids)))


async def in_engine(served: Served, work):
    return await asyncio.wrap_future(served.engine.call(work))


def metrics(request: Request) -> Response:
    """The records of metrics.jsonl from a byte on, and where the next ones begin."""
    served: Served = request.app.state.served
    try:
        start = int(request.query_params.get("start", "0"))
    except ValueError:
        raise ApiError(400, "start is no number of bytes", param="start") from None
    path = served.run and served.run / "metrics.jsonl"
    if path is None or not path.is_file():
        return JSONResponse({"records": [], "start": 0, "next": 0})
    with path.open("rb") as file:
        size = file.seek(0, 2)
        start = start if 0 <= start <= size else 0  # a new run has begun in the folder
        file.seek(start)
        part = file.read(MAX_METRICS_BYTES)
    n_complete = part.rfind(b"\n") + 1
    if not n_complete and len(part) == MAX_METRICS_BYTES:
        n_complete = len(part)  # of a line that is none; go on behind it
    complete = part[:n_complete]
    records = [record for line in complete.splitlines() if (record := record_of(line)) is not None]
    return JSONResponse({"records": records, "start": start, "next": start + len(complete)})


def record_of(line: bytes) -> dict | None:
    """None for what is no record, or cannot be sent as JSON."""
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


ROUTES = [
    Route("/page/about", about),
    Route("/page/read", read, methods=["POST"]),
    Route("/page/look", look, methods=["POST"]),
    Route("/page/metrics", metrics),
]
