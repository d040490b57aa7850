"""Requests from outside: who may ask, how much, and how an error is answered."""

import contextlib
import ipaddress
import json
from urllib.parse import urlsplit

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

MAX_BODY_BYTES = 1 << 18

HEADERS = {
    # The page's own scripts and styles alone: what a model writes can neither run nor load.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class ApiError(Exception):
    """Answered with this status, in the OpenAI API's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code

    def contents(self) -> dict:
        names = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": names}

    def response(self) -> JSONResponse:
        headers = {"retry-after": "1"} if self.status == 429 else None
        return JSONResponse(self.contents(), self.status, headers)


class Fields(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class CutFields(Fields):
    """How a token is drawn, see `model.logits_to_probs`."""

    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)


def one_of(kinds: str):
    """For a field of several types: what it may be, where pydantic would list what each lacks."""

    def check(value, handler):
        try:
            return handler(value)
        except pydantic.ValidationError:
            raise PydanticCustomError("kind", "Input should be {kinds}", {"kinds": kinds}) from None

    return pydantic.WrapValidator(check)


async def read_json(request: Request):
    """The body, as long as it is not too large and JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0]
    if kind.strip().lower() != "application/json":
        raise ApiError(415, "send JSON, with content-type: application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"a request has at most {MAX_BODY_BYTES:,} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None


def validated(kind: type[pydantic.BaseModel], contents):
    """An object of this kind; raises ApiError that names the first wrong field."""
    try:
        return kind.model_validate(contents)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"])) or None
        message = f"{param}: {first['msg']}" if param else first["msg"]
        raise ApiError(400, message, param=param) from None


class Guard:
    """ASGI middleware that turns away what a page of another site sends, and sets the headers.

    A browser says in Origin which page asks. A page whose own name has been pointed at this machine
    (DNS rebinding) gives itself away by the name in Host: addresses, localhost and `own_host` are
    the only ones known here.
    """

    def __init__(self, app, own_host: str):
        self.app, self.own_host = app, own_host

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        host = headers.get("host", "")
        app = self.app
        if not self.is_known(host):
            app = ApiError(403, f"Host {host!r} is no name of this server").response()
        elif (origin := headers.get("origin")) not in (None, f"http://{host}"):
            app = ApiError(403, f"a page of {origin!r} may not use this server").response()
        with contextlib.suppress(ClientDisconnect):  # before all of its body was there
            await app(scope, receive, send_with_headers)

    def is_known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in ("localhost", self.own_host.lower()):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
