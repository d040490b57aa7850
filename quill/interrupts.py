"""Ctrl-C while a command is still importing torch: one line and exit code 130, no traceback.

The commands import this before anything else. Importing it installs the handler.
"""

from __future__ import annotations

import os
import signal

from quill.errors import print_error


def interrupt(number, frame) -> None:
    """Exit at once during an import, where libraries may swallow an exception; else raise it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            print_error("interrupted")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupt)
