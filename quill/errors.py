"""Errors, as one line on stderr and an exit code; signals."""

import contextlib
import errno
import os
import signal
import sys
import traceback

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2

# With these the user named a file that is not there, or may not be used. Any other OSError is a
# failure of the run.
BAD_NAMES = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM}
BAD_NAMES |= {errno.ENAMETOOLONG, errno.ELOOP}
NO_SPACE = {errno.ENOSPC, errno.EDQUOT}


class InputError(Exception):
    """The user's input is wrong: an option, a config, a dataset, a checkpoint or a prompt."""


class RunError(Exception):
    """The input was fine, the run itself failed: non-finite loss, out of memory, disk full."""


def run_command(main) -> None:
    """Run `main(argv) -> exit code` as a command; an expected failure prints one line."""
    sys.stdout.reconfigure(errors="replace")  # for characters that its encoding lacks
    try:
        code = main(sys.argv[1:])
        print(end="", flush=True)  # also where a config file has set sys.stdout to None
    except (Exception, KeyboardInterrupt) as error:
        failure = expected_failure(error)
        if failure is None:
            raise
        message, code = failure
        if isinstance(error, OSError) and not error.filename and error.errno in NO_SPACE:
            message = f"standard output: {message}"  # all other files are named
        print_error(message)
    finally:
        for stream in (sys.stdout, sys.stderr):
            flush_or_discard(stream)
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
        is_bad_name = error.errno in BAD_NAMES
        return describe_os_error(error), EXIT_BAD_INPUT if is_bad_name else EXIT_FAILED
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    return None


def flush_or_discard(stream) -> None:
    """Drop what cannot be written, or Python would fail again at its end, with exit code 120."""
    try:
        if stream is not None:  # as a config file, which is a program, can set it
            stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def reader_may_leave():
    """In the block, a reader of the output that leaves (`head`, say) has seen enough: no error."""
    try:
        yield
        print(end="", flush=True)
    except BrokenPipeError:
        flush_or_discard(sys.stdout)


def describe_os_error(error: OSError) -> str:
    """One line that names the file, the reason and, where there is one, the way out."""
    advice = {
        errno.ENOSPC: "; free some space, then continue or try again",
        errno.EDQUOT: "; free some space, then continue or try again",
        errno.EACCES: "; check its permissions",
        errno.ENOENT: "; check the name",
        errno.EEXIST: "; choose another name",
        errno.ENOTDIR: "; choose another name",
        errno.EISDIR: "; choose another name",
        errno.EROFS: "; choose a folder that can be written",
    }.get(error.errno, "")
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}{advice}"


def print_error(message: str) -> None:
    over_progress = "\r\x1b[K" if sys.stderr.isatty() else ""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    print_note(f"{over_progress}error: {line}")


def print_note(text: str) -> None:
    """Print to stderr; if that fails, carry on."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def blames_input(what: str, *kinds: type[Exception]):
    """In the block, an exception of these kinds is an InputError: `<what>: <the exception>`."""
    try:
        yield
    except kinds as error:
        raise InputError(f"{what}: {error}") from None


@contextlib.contextmanager
def blames_program(path: str, what: str):
    """In the block, whatever the user's Python file at `path` raises is an InputError, with `what`
    and the last line of the file that it went through.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a program may raise anything
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        reason = traceback.format_exception_only(error)[-1]
        if isinstance(error, OSError) and not lines:  # of the file itself
            reason = error.strerror
        if isinstance(error, SyntaxError) and error.lineno and not lines:
            lines = [error.lineno]
        where = f", line {lines[-1]}" if lines else ""
        raise InputError(f"{what}{where}: {reason}") from None


@contextlib.contextmanager
def needs_extra(name: str):
    """In the block, a missing package is an InputError that says what to install."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{error}; install the extra: pip install '.[{name}]'") from None


class Stopped(Exception):  # noqa: N818  it is no error
    """A signal has asked the run to stop, and it is at a place where it can."""

    def __init__(self, signal_number: int):
        super().__init__(signal_number)
        self.signal_number = signal_number


@contextlib.contextmanager
def stop_signals(acts_at_second: bool):
    """Yield a list that collects SIGINT, SIGTERM and SIGHUP while the block runs.

    acts_at_second: the same signal once more acts at once, as it would without this.
    """
    received: list[int] = []
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # not under nohup, nor on Windows
    before = {number: signal.getsignal(number) for number in numbers}

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
