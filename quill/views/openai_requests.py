"""What may be asked of the endpoints below /v1, as the OpenAI API names it.

`top_k` is an addition, as in other servers. null is the same as leaving an option out; one that is
not listed here is refused. A wrong value is named by pydantic.
"""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from quill.views.http import CutFields, Fields, one_of

MAX_STOPS, MAX_LOGPROBS = 16, 20
TOKENS = pydantic.AliasChoices("max_completion_tokens", "max_tokens")  # the new name and the old


class NullableFields(Fields):
    @pydantic.model_validator(mode="before")
    @classmethod
    def without_null(cls, contents):
        if not isinstance(contents, dict):
            return contents
        return {name: value for name, value in contents.items() if value is not None}


class StreamOptions(NullableFields):
    include_usage: bool = False


class TextRequest(NullableFields, CutFields):
    """What both kinds of requests have."""

    model: str
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0)
    stop: Annotated[str | list[str], one_of("a text or a list of texts")] = Field([])
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    # Clients send these with the values that change nothing.
    user: str = ""
    presence_penalty: float = Field(0.0, ge=0, le=0)
    frequency_penalty: float = Field(0.0, ge=0, le=0)
    logit_bias: dict = Field({}, max_length=0)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @pydantic.field_validator("stop")
    @classmethod
    def check_stop(cls, stop):
        if isinstance(stop, list) and len(stop) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} texts")
        return stop


class CompletionRequest(TextRequest):
    prompt: Annotated[
        str | list[str] | list[int] | list[list[int]],
        one_of("a text, a list of texts, token ids, or a list of such lists"),
    ]
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: Literal[False] = False
    best_of: int = Field(1, ge=1, le=1)

    @property
    def n_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def n_tokens(self) -> int:
        return self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        is_one = isinstance(self.prompt, str) or all(type(x) is int for x in self.prompt)
        return [self.prompt] if self.prompt and is_one else self.prompt


class Message(NullableFields):
    role: Literal["user"]
    content: str


class ChatRequest(TextRequest):
    # A run of prompts and completions has seen one message and its answer.
    messages: list[Message] = Field(min_length=1, max_length=1)
    max_completion_tokens: int = Field(500, ge=1, validation_alias=TOKENS)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS)

    @property
    def n_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def n_tokens(self) -> int:
        return self.max_completion_tokens

    def prompts(self) -> list[str | list[int]]:
        return [self.messages[0].content]
