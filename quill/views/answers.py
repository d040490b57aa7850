"""The texts that a request asks for, while the engine writes them."""

import asyncio
import contextlib
import dataclasses
import math
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

import numpy as np
import torch

from quill.sampling.text import TextStream
from quill.views.batching import Cuts, Text
from quill.views.http import ApiError
from quill.views.openai_requests import TextRequest
from quill.views.served import Served


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
        self.n_left, self.max_seconds = request.n_tokens, served.limits.seconds
        self.deadline = math.inf  # from the first token on

    def on_token(self, token: int, logits: torch.Tensor) -> bool:
        self.n_left -= 1
        self.deadline = min(self.deadline, time.monotonic() + self.max_seconds)
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
        served.check_n_tokens(request.n_tokens)
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
                with contextlib.suppress(RuntimeError):  # the loop has ended, nobody waits
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
