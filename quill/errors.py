"""Errors, as one line on stderr and an exit code; signals."""

import contextlib
import errno
import os
import signal
import sys

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2


class InputError(Exception):
    """The user's input is wrong: an option, a config, a dataset, a checkpoint or a prompt."""


class RunError(Exception):
    """The input was fine, the run itself failed: non-finite loss, out of memory, disk full."""


def run_command(main) -> None:
    """Run `main(argv) -> exit code` as a command; an expected failure prints one line."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        failure = expected_failure(error)
        if failure is None:
            raise
        if isinstance(error, BrokenPipeError):
            silence_stdout()
        message, code = failure
        print_error(message)
    sys.exit(code)


def expected_failure(error: BaseException) -> tuple[str, int] | None:
    """-> (what to tell the user, exit code); None for a bug, which shows its traceback."""
    if isinstance(error, InputError):
        return str(error), EXIT_BAD_INPUT
    if isinstance(error, RunError):
        return str(error), EXIT_FAILED
    if isinstance(error, BrokenPipeError):
        return "nobody reads the output any more; stopped", EXIT_FAILED
    if isinstance(error, OSError):
        is_bad_name = error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
        return describe_os_error(error), EXIT_BAD_INPUT if is_bad_name else EXIT_FAILED
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    return None


def silence_stdout() -> None:
    """After a broken pipe: nothing can be written, and flushing at exit must not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe_os_error(error: OSError) -> str:
    """One line that names the file, the reason and, where there is one, the way out."""
    advice = {
        errno.ENOSPC: "; free some space and run the same command again",
        errno.EDQUOT: "; free some space and run the same command again",
        errno.EACCES: "; check its permissions",
        errno.EROFS: "; choose a folder that can be written",
    }.get(error.errno, "")
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}{advice}"


def print_error(message: str) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)  # over a progress line
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)


@contextlib.contextmanager
def needs_extra(name: str):
    """In the block, a missing package is an InputError that says what to install."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{error}; install the extra: pip install '.[{name}]'") from None


@contextlib.contextmanager
def stop_signals(acts_at_second: bool):
    """Yield a list that collects SIGINT and SIGTERM while the block runs.

    acts_at_second: a second signal acts at once, as it would without this.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        received.append(number)
        if acts_at_second:
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
