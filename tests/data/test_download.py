from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
from pathlib import Path

import pytest

from quill.data import download
from quill.errors import InputError, RunError
from quill.files import file_lock


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with what the path asks for; `hits` counts requests by path."""

    body = b"the right text"
    hits: dict[str, int]
    bodies = {  # noqa: RUF012
        "/html": b"<html>sign in</html>",
        "/long": body * 1000,
        "/wrong": b"the wrong text",
        "/cut": body[:5],
        "/stall": body[:5],
    }
    ranges: list[str | None]

    def do_GET(self):
        self.hits[self.path] = self.hits.get(self.path, 0) + 1
        self.ranges.append(self.headers["Range"])
        is_flaky_now = self.path == "/flaky" and self.hits[self.path] < 3
        if self.path == "/error" or is_flaky_now:
            return self.send_error(500)
        if self.path in ("/moved", "/circle"):
            self.send_response(302)
            self.send_header("Location", "/good" if self.path == "/moved" else "/circle")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if self.path == "/picky" and self.headers["Range"]:
            return self.send_error(416)
        if self.path == "/ranges" and self.headers["Range"]:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Length", str(len(self.body) - start))
            self.end_headers()
            return self.wfile.write(self.body[start:])
        self.send_response(200)
        if self.path == "/endless":
            self.end_headers()
            return self.go_on_and_on()
        promised = {"/less": 5, "/long": 14_000}
        self.send_header("Content-Length", str(promised.get(self.path, len(self.body))))
        self.end_headers()
        if self.path == "/drip":
            return self.drip()
        self.wfile.write(self.bodies.get(self.path, self.body))
        if self.path == "/stall":
            self.server.is_over.wait(5)

    def drip(self):
        """A byte now and then, so that no single wait is long."""
        for byte in self.body:
            if self.server.is_over.wait(0.1):
                return
            with contextlib.suppress(OSError):  # the client may have left
                self.wfile.write(bytes([byte]))
                self.wfile.flush()

    def go_on_and_on(self):
        with contextlib.suppress(OSError):
            while not self.server.is_over.is_set():
                self.wfile.write(bytes(1 << 16))

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(download, "PATIENCE_SECONDS", 0.4)
    monkeypatch.setattr(download, "WAIT_SECONDS", 0)
    Server.hits, Server.ranges = {}, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        httpd.is_over = threading.Event()
        threading.Thread(target=httpd.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.is_over.set()
        httpd.shutdown()


def fetch(server, *paths):
    sha256 = hashlib.sha256(Server.body).hexdigest()
    urls = [server + path for path in paths]
    path, size = Path("got.txt"), len(Server.body)
    download.download(urls, path, size, sha256, "ask somebody")


CUT_OFF = ["/cut", "/less", "/stall", "/drip"]  # what has come may be the beginning of the right
BAD = ["/error", "/html", "/long", "/wrong", "/cut", "/less", "/stall", "/drip", "/circle"]


@pytest.mark.parametrize("bad", BAD)
def test_download_takes_the_second_address_when_the_first_is_bad(folder, server, bad):
    fetch(server, bad, "/good")
    assert Path("got.txt").read_bytes() == Server.body


def test_download_tries_again(folder, server):
    fetch(server, "/flaky")
    assert Path("got.txt").read_bytes() == Server.body and Server.hits == {"/flaky": 3}


def test_download_reads_a_byte_too_much_at_most(folder, server, monkeypatch):
    sizes = []
    monkeypatch.setattr(download, "show_progress", lambda what, done, total: sizes.append(done))
    with pytest.raises(RunError):
        fetch(server, "/endless")
    assert max(sizes) == len(Server.body) + 1


def test_download_follows_a_redirect(folder, server):
    fetch(server, "/moved")
    assert Path("got.txt").read_bytes() == Server.body


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_download_never_gets_the_final_name(folder, server, bad):
    Path("got.txt").write_text("what was there")
    with pytest.raises(RunError, match=f"{bad}.*ask somebody"):
        fetch(server, bad)
    kept = {p.name for p in folder.iterdir()} - {".lock"}
    assert kept == {"got.txt"} | ({"got.txt.part"} if bad in CUT_OFF else set())
    assert Path("got.txt").read_text() == "what was there"
    assert Server.hits[bad] >= download.ATTEMPTS


def test_a_download_goes_on_where_another_stopped(folder, server):
    Path("got.txt.part").write_bytes(Server.body[:5])
    fetch(server, "/ranges")
    assert Path("got.txt").read_bytes() == Server.body and Server.ranges == ["bytes=5-"]
    assert not Path("got.txt.part").exists()


# Which goes on, sends all of it again, or refuses to go on.
@pytest.mark.parametrize("path", ["/ranges", "/good", "/picky"])
@pytest.mark.parametrize("part", [b"<html>", b"not the right beginning of it", b"the right text"])
def test_whatever_is_there_the_result_is_right(folder, server, path, part):
    Path("got.txt.part").write_bytes(part)
    fetch(server, path)
    assert Path("got.txt").read_bytes() == Server.body


def test_a_full_disk_names_the_file(folder, server, full_disk):
    full_disk("got.txt", ".part")
    with pytest.raises(OSError, match="No space left") as caught:
        fetch(server, "/good")
    assert caught.value.filename == "got.txt.part"


def test_a_second_download_of_the_same_file_is_refused(folder, server):
    with file_lock(Path()), pytest.raises(InputError, match="is in use"):
        fetch(server, "/good")
