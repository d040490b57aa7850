"""The endpoints below /v1, as the OpenAI API has them, so that its clients can write with a run.

https://platform.openai.com/docs/api-reference: models, completions, and chat completions for runs
that were trained on prompts and completions. `top_k` is an addition, as in other servers.
"""

import asyncio
import dataclasses
import json
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Literal

import numpy as np
import pydantic
import torch
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from quill.data import tokenizers
from quill.sampling.text import TextStream
from quill.views.batching import Cuts, Text
from quill.views.http import ApiError, model_of, read_json
from quill.views.served import Served

MAX_STOPS, MAX_LOGPROBS = 16, 20


# ---- requests ------------------------------------------------------------------------------------


class StreamOptions(pydantic.BaseModel):
    include_usage: bool = False


class TextRequest(pydantic.BaseModel):
    """What both kinds of requests have. An option that has no meaning here is refused."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    model: str
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    # Clients send these with the values that change nothing.
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict | None = Field(None, max_length=0)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @pydantic.field_validator("stop")
    @classmethod
    def check_stop(cls, stop):
        if isinstance(stop, list) and len(stop) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} texts")
        return stop


class CompletionRequest(TextRequest):
    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: Literal[False] | None = False
    best_of: int | None = Field(None, ge=1, le=1)
    suffix: None = None

    @property
    def n_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def n_tokens(self) -> int | None:
        return self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        is_one = isinstance(self.prompt, str) or all(type(x) is int for x in self.prompt)
        return [self.prompt] if self.prompt and is_one else self.prompt


class Message(pydantic.BaseModel):
    role: Literal["user"]
    content: str


class ChatRequest(TextRequest):
    # A run of prompts and completions has seen one message and its answer.
    messages: list[Message] = Field(min_length=1, max_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def n_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def n_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        return [self.messages[0].content]


# ---- texts ---------------------------------------------------------------------------------------


@dataclasses.dataclass
class TokenScore:
    """A token that was drawn, with its log-probability and the likeliest ones, in nats."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclasses.dataclass
class Piece:
    """What a token added to a text; the last has a reason to end."""

    index: int
    text: str
    score: TokenScore | None
    finish_reason: str | None = None


class Choice:
    """A text of an answer: what the engine's thread draws becomes pieces of text."""

    def __init__(self, served: Served, request: TextRequest, index: int, put: Callable):
        self.index, self.put = index, put
        self.n_logprobs = request.n_logprobs
        self.stream = TextStream(served.tokenizer, request.stops, served.reverses_answers)
        self.n_left, self.deadline = served.max_tokens_of(request.n_tokens), served.deadline()

    def on_token(self, token: int, logits: torch.Tensor) -> bool:
        self.n_left -= 1
        piece = Piece(self.index, self.stream.feed(token), self.score_of(token, logits))
        if self.stream.is_done:
            piece.finish_reason = "stop"
        elif self.n_left == 0 or time.monotonic() > self.deadline:
            piece.text += self.stream.finish()
            piece.finish_reason = "length"
        self.put(piece)
        return piece.finish_reason is not None

    def score_of(self, token: int, logits: torch.Tensor) -> TokenScore | None:
        if self.n_logprobs is None:
            return None
        log_probs = logits.float().log_softmax(dim=-1)
        values, tokens = log_probs.topk(min(self.n_logprobs, len(log_probs)))
        top = list(zip(tokens.tolist(), values.tolist(), strict=True))
        return TokenScore(token, log_probs[token].item(), top)


class Answer:
    """The texts of a request, while they are written."""

    def __init__(self, served: Served, request: TextRequest):
        self.served, self.request = served, request
        self.prompts = [served.prompt_ids(prompt) for prompt in request.prompts()]
        self.created = int(time.time())
        self.id = secrets.token_hex(12)
        self.n_tokens = 0
        self.pieces: deque[Piece | Exception] = deque()  # not read yet
        self.has_pieces, loop = asyncio.Event(), asyncio.get_running_loop()

        def put(piece: Piece | Exception) -> None:
            """Called in the engine's thread. To wake the other for each token would cost time."""
            self.pieces.append(piece)
            if request.stream or isinstance(piece, Exception) or piece.finish_reason:
                loop.call_soon_threadsafe(self.has_pieces.set)

        seed = secrets.randbits(32) if request.seed is None else request.seed
        cuts = Cuts(request.temperature, request.top_k, request.top_p)
        self.texts = []
        for p, ids in enumerate(self.prompts):
            for i in range(request.n):
                choice = Choice(served, request, p * request.n + i, put)
                rng = np.random.default_rng([seed, i])  # the texts of sample.py --seed
                self.texts.append(Text(ids, cuts, rng, choice.on_token, put))
        served.engine.submit(self.texts)

    async def read(self) -> AsyncIterator[Piece]:
        """Raises ApiError where a text cannot be completed."""
        n_open = len(self.texts)
        while n_open:
            await self.has_pieces.wait()
            self.has_pieces.clear()
            while self.pieces:
                piece = self.pieces.popleft()
                if isinstance(piece, Exception):
                    raise ApiError(500, str(piece), kind="server_error")
                self.n_tokens += 1
                n_open -= piece.finish_reason is not None
                yield piece

    def cancel(self) -> None:
        self.served.engine.cancel(self.texts)

    def usage(self) -> dict:
        n_prompt = sum(map(len, self.prompts))
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": self.n_tokens,
            "total_tokens": n_prompt + self.n_tokens,
        }


# ---- answers -------------------------------------------------------------------------------------


class CompletionFormat:
    """How /v1/completions writes a text, whole or in pieces."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, answer: Answer):
        self.tokenizer = answer.served.tokenizer
        self.offsets = [0] * len(answer.texts)  # of the next token in each text

    def first_parts(self) -> Iterable[dict]:
        return ()

    def of_part(self, piece: Piece) -> dict:
        scores = [] if piece.score is None else [piece.score]
        return self.choice(piece.index, piece.text, scores, piece.finish_reason)

    def of_whole(self, index: int, pieces: list[Piece]) -> dict:
        scores = [piece.score for piece in pieces if piece.score is not None]
        text = "".join(piece.text for piece in pieces)
        return self.choice(index, text, scores, pieces[-1].finish_reason)

    def choice(self, index: int, text: str, scores: list[TokenScore], reason) -> dict:
        logprobs = None
        if scores:
            names = [self.name(score.token) for score in scores]
            offsets = [self.offsets[index]]
            for name in names:
                offsets.append(offsets[-1] + len(name))
            self.offsets[index] = offsets.pop()
            logprobs = {
                "tokens": names,
                "token_logprobs": [score.logprob for score in scores],
                "top_logprobs": [{self.name(t): p for t, p in score.top} for score in scores],
                "text_offset": offsets,
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def name(self, token: int) -> str:
        return tokenizers.decode(self.tokenizer, [token])


class ChatFormat:
    """How /v1/chat/completions does."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, answer: Answer):
        self.tokenizer, self.n = answer.served.tokenizer, len(answer.texts)

    def first_parts(self) -> Iterable[dict]:
        for index in range(self.n):
            delta = {"role": "assistant", "content": ""}
            yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def of_part(self, piece: Piece) -> dict:
        delta = {"content": piece.text} if piece.text else {}
        scores = [] if piece.score is None else [piece.score]
        rest = {"logprobs": self.logprobs(scores), "finish_reason": piece.finish_reason}
        return {"index": piece.index, "delta": delta, **rest}

    def of_whole(self, index: int, pieces: list[Piece]) -> dict:
        text = "".join(piece.text for piece in pieces)
        scores = [piece.score for piece in pieces if piece.score is not None]
        message = {"role": "assistant", "content": text, "refusal": None}
        rest = {"logprobs": self.logprobs(scores), "finish_reason": pieces[-1].finish_reason}
        return {"index": index, "message": message, **rest}

    def logprobs(self, scores: list[TokenScore]) -> dict | None:
        if not scores:
            return None
        content = [
            self.entry(score.token, score.logprob)
            | {"top_logprobs": [self.entry(*pair) for pair in score.top]}
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def entry(self, token: int, logprob: float) -> dict:
        raw = self.tokenizer.decode_bytes([token])
        text = raw.decode("utf-8", errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(raw)}


async def respond(request: Request, kind: type[TextRequest], new_format) -> Response:
    served: Served = request.app.state.served
    asked = model_of(kind, await read_json(request))
    served.check_model(asked.model)
    served.check_number(len(asked.prompts()), "prompt")
    served.check_number(asked.n * len(asked.prompts()), "n")
    answer = Answer(served, asked)
    form = new_format(answer)
    head = {"id": f"{form.prefix}-{answer.id}", "created": answer.created, "model": served.name}
    if asked.stream:
        return EventResponse(answer, form, head | {"object": form.part})
    try:
        pieces = await whole(answer, request)
    finally:
        answer.cancel()
    choices = [form.of_whole(index, parts) for index, parts in enumerate(pieces)]
    usage = answer.usage()
    return JSONResponse(head | {"object": form.whole, "choices": choices, "usage": usage})


async def whole(answer: Answer, request: Request) -> list[list[Piece]]:
    """-> the pieces of each text; raises ApiError when the client leaves before the end."""
    pieces: list[list[Piece]] = [[] for _ in answer.texts]

    async def read():
        async for piece in answer.read():
            pieces[piece.index].append(piece)

    reading = asyncio.ensure_future(read())
    leaving = asyncio.ensure_future(request.receive())  # after the body comes only a disconnect
    try:
        await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ApiError(499, "the client is gone")
        await reading
    finally:
        for task in (reading, leaving):
            task.cancel()
    return pieces


class EventResponse(StreamingResponse):
    """Server-sent events, a JSON object each. The texts end when the response does."""

    def __init__(self, answer: Answer, form, head: dict):
        super().__init__(self.events(form, head), media_type="text/event-stream")
        self.answer = answer

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.cancel()

    async def events(self, form, head: dict) -> AsyncIterator[str]:
        options = self.answer.request.stream_options
        wants_usage = options is not None and options.include_usage
        more = {"usage": None} if wants_usage else {}
        try:
            for choice in form.first_parts():
                yield event(head | {"choices": [choice]} | more)
            async for piece in self.answer.read():
                yield event(head | {"choices": [form.of_part(piece)]} | more)
            if wants_usage:
                yield event(head | {"choices": [], "usage": self.answer.usage()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield event(error.contents())


def event(contents: dict) -> str:
    return f"data: {json.dumps(contents)}\n\n"


async def completions(request: Request) -> Response:
    return await respond(request, CompletionRequest, CompletionFormat)


async def chat_completions(request: Request) -> Response:
    if not request.app.state.served.is_chat:
        raise ApiError(400, "this run continues texts: use /v1/completions", code="model_not_chat")
    return await respond(request, ChatRequest, ChatFormat)


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [request.app.state.served.card()]})


async def model(request: Request) -> Response:
    served: Served = request.app.state.served
    served.check_model(request.path_params["name"])
    return JSONResponse(served.card())


ROUTES = [
    Route("/v1/models", models),
    Route("/v1/models/{name:path}", model),
    Route("/v1/completions", completions, methods=["POST"]),
    Route("/v1/chat/completions", chat_completions, methods=["POST"]),
]
