"""What can go wrong, and what the shell sees of it: one line on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys

EXIT_DONE, EXIT_FAILED, EXIT_BAD_INPUT = 0, 1, 2


class InputError(Exception):
    """The user's input is wrong: an option, a config, a dataset, a checkpoint or a prompt."""


class RunError(Exception):
    """The input was fine, the run itself failed: non-finite loss, out of memory, disk full."""


def run_script(main) -> None:
    """Run `main(argv) -> exit code` as a command; expected failures become one line, no traceback.

    A bug still shows its traceback: only the two exceptions above, a failing disk, Ctrl-C and a
    closed pipe are expected.
    """
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except InputError as error:
        code = _complain(error, EXIT_BAD_INPUT)
    except RunError as error:
        code = _complain(error, EXIT_FAILED)
    except BrokenPipeError:
        silence_stdout()
        code = _complain("nobody reads the output any more; stopped", EXIT_FAILED)
    except OSError as error:
        code = _complain(describe_os_error(error), EXIT_FAILED)
    except KeyboardInterrupt:
        code = _complain("interrupted", 130)
    sys.exit(code)


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


def _complain(message: object, code: int) -> int:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)  # over a progress line
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    return code
