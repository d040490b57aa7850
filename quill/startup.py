"""What the commands import before anything else, as importing torch takes a second or two.

Importing it installs a handler for Ctrl-C: one line and exit code 130, no traceback.
"""

import os
import signal
import time

from quill.errors import print_error

STARTED = time.perf_counter()  # when the command started, nearly


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
