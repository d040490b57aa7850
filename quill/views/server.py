"""The server: the page, what the page asks, and the OpenAI API, behind one guard."""

import socket
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from quill.errors import InputError
from quill.views import openai_api, page_api
from quill.views.engine import Busy
from quill.views.http import ApiError, Guard
from quill.views.served import Served

PAGE = Path(__file__).parent / "page"


def new_server(served: Served, own_host: str) -> uvicorn.Server:
    page = Mount("/", StaticFiles(directory=PAGE, html=True))
    app = Starlette(
        routes=[*openai_api.ROUTES, *page_api.ROUTES, page],
        middleware=[Middleware(Guard, own_host=own_host)],
        exception_handlers={ApiError: refused, Busy: too_many, HTTPException: no_such_page},
    )
    app.state.served = served
    config = uvicorn.Config(app, log_level="warning", server_header=False)
    config.timeout_graceful_shutdown = 1  # seconds, for texts that are still being written
    return uvicorn.Server(config)


async def refused(request: Request, error: ApiError) -> Response:
    return error.response()


async def too_many(request: Request, error: Busy) -> Response:
    message = "as many texts are being written as this server takes: try again in a moment"
    names = {"kind": "rate_limit_error", "code": "rate_limit_exceeded"}
    return ApiError(429, message, **names).response()


async def no_such_page(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, message).response()


def listen(host: str, port: int) -> socket.socket:
    """Raises InputError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        raise InputError(f"host={host} port={port}: {reason}; choose another") from None


def run(server: uvicorn.Server, listener: socket.socket) -> None:
    """Until Ctrl-C or SIGTERM."""
    host, port, *_ = listener.getsockname()
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends it)", flush=True)
    server.run(sockets=[listener])
