"""What the commands import before anything else, as importing torch takes a second or two.

Importing it installs a handler for Ctrl-C (one line and exit code 130, no traceback), opens
/dev/null in place of standard streams that are closed, and ends a command whose packages or whose
current folder are not there.
"""

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

from quill.errors import EXIT_BAD_INPUT, print_error

STARTED = time.perf_counter()  # when the command started, nearly


def interrupt(number, frame) -> None:
    """Exit at once during an import, where libraries may swallow an exception; else raise it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            print_error("interrupted")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def open_closed_streams() -> None:
    """Or the next file to be opened would get the number of stdout, and what is printed there."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, open(descriptor, "w" if number else "r"))  # noqa: PTH123, SIM115


def refuse_missing_packages() -> None:
    missing = [name for name in ("numpy", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        print_error(
            f"{' and '.join(missing)} cannot be found by {sys.executable}: activate the "
            "environment (. .venv/bin/activate), or install what Quill needs (pip install .)"
        )
        sys.exit(EXIT_BAD_INPUT)


def refuse_missing_folder() -> None:
    try:
        Path.cwd()
    except OSError as error:  # which libraries that torch loads would say in their own ways
        print_error(f"the current folder: {error.strerror}; change to another")
        sys.exit(EXIT_BAD_INPUT)


open_closed_streams()
refuse_missing_packages()
refuse_missing_folder()
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupt)
