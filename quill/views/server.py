"""The server: the page, what the page asks, and the OpenAI API, behind one guard."""

import logging
import socket
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from quill.errors import blames_input
from quill.views import openai_api, page_api
from quill.views.engine import Busy
from quill.views.http import ApiError, Guard
from quill.views.served import Served

PAGE = Path(__file__).parent / "page"


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, served: Served):
        super().__init__(config)
        self.served = served

    async def shutdown(self, sockets=None) -> None:
        self.served.engine.close()  # ends the texts, so that their answers end
        await super().shutdown(sockets)


def new_server(served: Served, own_host: str) -> Server:
    page = Mount("/static", StaticFiles(directory=PAGE))
    app = Starlette(
        routes=[Route("/", index), page, *openai_api.ROUTES, *page_api.ROUTES],
        middleware=[Middleware(Guard, own_host=own_host)],
        exception_handlers={
            ApiError: refused,
            Busy: too_many,
            HTTPException: no_such_page,
            Exception: failed,
        },
    )
    app.state.served = served
    # Seconds for a client to read what is left of its answer.
    options = {"log_level": "error", "server_header": False, "timeout_graceful_shutdown": 1}
    return Server(uvicorn.Config(app, **options), served)


async def index(request: Request) -> Response:
    return FileResponse(PAGE / "index.html")


async def refused(request: Request, error: ApiError) -> Response:
    return error.response()


async def too_many(request: Request, error: Busy) -> Response:
    message = "as many texts are being written as this server takes: try again in a moment"
    names = {"kind": "rate_limit_error", "code": "rate_limit_exceeded"}
    return ApiError(429, message, **names).response()


async def no_such_page(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


async def failed(request: Request, error: Exception) -> Response:
    """Of a bug, whose traceback is logged."""
    return ApiError(500, "the server failed", kind="server_error").response()


def listen(host: str, port: int) -> socket.socket:
    """Raises InputError where it cannot."""
    with blames_input(f"host={host} port={port}: choose another", OSError, UnicodeError):
        kinds = socket.getaddrinfo(host or "no name", port, type=socket.SOCK_STREAM)
        family, _, _, _, address = kinds[0]
        return socket.create_server(address[:2], family=family, backlog=1024)


def run(server: Server, listener: socket.socket) -> None:
    """Until Ctrl-C or SIGTERM."""
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of clients that hang up
    host, port, *_ = listener.getsockname()
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}  (Ctrl-C ends it)", flush=True)
    server.run(sockets=[listener])
