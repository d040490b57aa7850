"""Fetch a file of known size and hash; what was cut off goes on where it stopped."""

from __future__ import annotations

import os
import time
from pathlib import Path

from quill.errors import RunError
from quill.files import file_lock, sha256_of_file, show_progress

TIMEOUT_SECONDS = 20  # without a byte
SLOWEST_BYTES_PER_SECOND = 50_000  # over all of an attempt, beyond its first minutes
PATIENCE_SECONDS = 300
ATTEMPTS = 3  # at each address
READ_BYTES = 1 << 20


def download(
    urls: tuple[str, ...],
    path: Path,
    n_bytes: int,
    sha256: str,
    advice: str,
    wait_seconds: float = 1.0,
) -> None:
    """Write `path` from the first of `urls` that delivers it whole.

    Each is tried `ATTEMPTS` times with a doubling wait. Until everything is right, what has come
    is in `<path>.part`, where the next attempt, or the next run, goes on. Raises RunError when
    none delivers; `advice` says what the user can do then.
    """
    import requests
    import urllib3

    part, reasons = path.with_name(path.name + ".part"), {}
    with file_lock(path.parent):
        for attempt in range(ATTEMPTS):
            for url in urls:
                try:
                    _fetch(url, part, n_bytes)
                except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                    response = getattr(error, "response", None)
                    status = "" if response is None else f" {response.status_code}"
                    reasons[url] = type(error).__name__ + status
                    continue
                except OSError as error:  # of the disk
                    error.filename = error.filename or str(part)
                    raise
                if _is_right(part, n_bytes, sha256):
                    part.replace(path)
                    return
                reasons[url] = f"sent {part.stat().st_size:,} bytes that are not the expected ones"
                part.unlink()
            if attempt < ATTEMPTS - 1:
                time.sleep(wait_seconds * 2**attempt)
    tried = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
    raise RunError(f"could not download {path.name} ({tried}): {advice}")


def _fetch(url: str, part: Path, n_bytes: int) -> None:
    """Go on with `part`, up to a byte more than `n_bytes`: a wrong file cannot fill the disk."""
    import requests

    n_there = part.stat().st_size if part.exists() else 0
    if n_there >= n_bytes:
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={n_there}-"} if n_there else {})
    deadline = time.monotonic() + PATIENCE_SECONDS + n_bytes / SLOWEST_BYTES_PER_SECOND
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            part.unlink()  # it goes on from nothing
        response.raise_for_status()
        is_rest = response.status_code == requests.codes.partial_content
        with part.open("ab" if is_rest else "wb") as file:
            while data := response.raw.read1(min(READ_BYTES, n_bytes + 1 - file.tell())):
                file.write(data)
                show_progress(f"downloading {url}", file.tell(), n_bytes)
                if time.monotonic() > deadline:
                    raise requests.Timeout
            file.flush()
            os.fsync(file.fileno())
            if file.tell() < n_bytes:
                raise requests.ConnectionError("cut off")


def _is_right(path: Path, n_bytes: int, sha256: str) -> bool:
    return path.stat().st_size == n_bytes and sha256_of_file(path) == sha256
