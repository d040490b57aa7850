"""Fetch a file of known size and hash; an interrupted download resumes."""

import os
import time
from pathlib import Path

import requests

from quill.errors import RunError
from quill.files import file_lock, refuse_special_files, sha256_of_file, show_progress

TIMEOUT_SECONDS = 20  # without a byte
# An attempt may take PATIENCE_SECONDS, and the time that all bytes need at the slowest rate.
PATIENCE_SECONDS = 300
SLOWEST_BYTES_PER_SECOND = 50_000
ATTEMPTS = 3  # at each address
WAIT_SECONDS = 1.0  # after the first attempt; it doubles each time
READ_BYTES = 1 << 20


def download(urls: tuple[str, ...], path: Path, n_bytes: int, sha256: str, advice: str) -> None:
    """Write `path` from the first of `urls` that delivers it whole.

    Each is tried `ATTEMPTS` times; the next attempt, or the next run, resumes from `<path>.part`.
    Raises RunError when all fail; `advice` says what the user can do then.
    """
    part, reasons = path.with_name(path.name + ".part"), {}
    with file_lock(path.parent):
        refuse_special_files(path, part)
        for attempt in range(ATTEMPTS):
            for url in urls:
                try:
                    _fetch(url, part, n_bytes)
                except (requests.RequestException, requests.exceptions.BaseHTTPError) as error:
                    response = getattr(error, "response", None)
                    status = "" if response is None else f" {response.status_code}"
                    reasons[url] = type(error).__name__ + status
                    continue
                except OSError as error:  # of the disk
                    error.filename = error.filename or str(part)
                    raise
                if sha256_of_file(part) == sha256:
                    part.replace(path)
                    return
                reasons[url] = f"sent {part.stat().st_size:,} bytes that are not the expected ones"
                part.unlink()
            if attempt < ATTEMPTS - 1:
                time.sleep(WAIT_SECONDS * 2**attempt)
    tried = "; ".join(f"{url}: {reason}" for url, reason in reasons.items())
    raise RunError(f"could not download {path.name} ({tried}): {advice}")


def _fetch(url: str, part: Path, n_bytes: int) -> None:
    """Resume `part`, up to a byte more than `n_bytes`: a wrong file cannot fill the disk.

    `response.raw` raises BaseHTTPError, which is urllib3's, instead of requests' own exceptions.
    """
    n_there = part.stat().st_size if part.exists() else 0
    if n_there >= n_bytes:
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={n_there}-"} if n_there else {})
    deadline = time.monotonic() + PATIENCE_SECONDS + n_bytes / SLOWEST_BYTES_PER_SECOND
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            part.unlink()  # start again
        response.raise_for_status()
        is_rest = response.status_code == requests.codes.partial_content
        with part.open("ab" if is_rest else "wb") as file:
            # iter_content would wait for full chunks, and miss the deadline of a dripping server.
            while data := response.raw.read1(min(READ_BYTES, n_bytes + 1 - file.tell())):
                file.write(data)
                show_progress(f"downloading {url}", file.tell(), n_bytes)
                if time.monotonic() > deadline:
                    raise requests.Timeout
            file.flush()
            os.fsync(file.fileno())
            if file.tell() < n_bytes:
                raise requests.ConnectionError("cut off")
