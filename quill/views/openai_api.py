"""The endpoints below /v1, as the OpenAI API has them, so that its clients can write with a run.

https://platform.openai.com/docs/api-reference: models, completions, and chat completions for runs
that were trained on prompts and completions.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from quill.data import tokenizers
from quill.views.answers import Answer, Piece, TokenScore
from quill.views.http import ApiError, read_json, validated
from quill.views.openai_requests import ChatRequest, CompletionRequest, TextRequest
from quill.views.served import Served


class CompletionFormat:
    """How /v1/completions writes a text, whole or in pieces."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, answer: Answer):
        self.tokenizer = answer.served.tokenizer
        self.offsets = [0] * len(answer.texts)  # of the next token in each text

    def first_parts(self) -> Iterable[dict]:
        return ()

    def of_part(self, piece: Piece) -> dict:
        return self.of_whole(piece.index, [piece])

    def of_whole(self, index: int, pieces: list[Piece]) -> dict:
        logprobs = self.logprobs(index, scores_of(pieces))
        rest = {"logprobs": logprobs, "finish_reason": pieces[-1].finish_reason}
        return {"index": index, "text": text_of(pieces), **rest}

    def logprobs(self, index: int, scores: list[TokenScore]) -> dict | None:
        if not scores:
            return None
        names = [self.name(score.token) for score in scores]
        offsets = [self.offsets[index]]
        for name in names:
            offsets.append(offsets[-1] + len(name))
        self.offsets[index] = offsets.pop()
        return {
            "tokens": names,
            "token_logprobs": [score.logprob for score in scores],
            "top_logprobs": [{self.name(t): p for t, p in score.top} for score in scores],
            "text_offset": offsets,
        }

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
        return {"index": piece.index, "delta": delta, **self.rest([piece])}

    def of_whole(self, index: int, pieces: list[Piece]) -> dict:
        message = {"role": "assistant", "content": text_of(pieces), "refusal": None}
        return {"index": index, "message": message, **self.rest(pieces)}

    def rest(self, pieces: list[Piece]) -> dict:
        logprobs = self.logprobs(scores_of(pieces))
        return {"logprobs": logprobs, "finish_reason": pieces[-1].finish_reason}

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


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def scores_of(pieces: list[Piece]) -> list[TokenScore]:
    return [piece.score for piece in pieces if piece.score is not None]


async def respond(request: Request, kind: type[TextRequest], new_format) -> Response:
    served: Served = request.app.state.served
    asked = validated(kind, await read_json(request))
    served.check_model(asked.model)
    served.check_n_texts(len(asked.prompts()), "prompt")
    served.check_n_texts(asked.n * len(asked.prompts()), "n")
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
        wants_usage = self.answer.request.stream_options.include_usage
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
