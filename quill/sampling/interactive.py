"""The prompt loop of `sample.py --interactive`: a line in, a text out."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator

from quill import settings
from quill.errors import InputError, RunError, print_error

PROMPT = "> "  # readline counts its characters: escape sequences would need \001 and \002 around
WELCOME = (
    "The model continues what you type. /help lists commands; Ctrl-C stops a text, Ctrl-D ends."
)
OPTIONS = ("temperature", "top_k", "top_p", "max_new_tokens", "seed")


class PromptLoop:
    """The options as they are set now, and how many prompts there were since the seed was set.

    write(prompt, options, number) yields a text piece by piece; a text's random numbers are drawn
    from (options.seed, number).
    """

    def __init__(self, write: Callable[..., Iterator[str]], options):
        self.write, self.options, self.n_prompts = write, options, 0

    def answer(self, line: str) -> None:
        """Print the text that begins with the line, or carry out `/command value`.

        Raises InputError for a wrong command or value, or a prompt that the model cannot read.
        """
        if line.startswith("/"):
            name, _, value = line[1:].strip().partition(" ")
            self.set_option(name, value.strip())
        elif line:
            self.n_prompts += 1
            for text in self.write(line, self.options, self.n_prompts - 1):
                print(text, end="", flush=True)
            print()

    def set_option(self, name: str, value: str) -> None:
        if name == "help":
            print(self.help_text())
        elif name in OPTIONS:
            flags, base = [f"--{name}={value}"], vars(self.options)
            self.options = settings.load(type(self.options), flags, usage="", base=base)
            if name == "seed":
                self.n_prompts = 0
        else:
            hint = settings.did_you_mean(name, [*OPTIONS, "help", "quit"], "/")
            raise InputError(f"/{name}: no such command{hint or '; /help lists them'}")

    def help_text(self) -> str:
        lines = {
            f"/{field.name} {getattr(self.options, field.name)}": field.metadata["help"]
            for field in dataclasses.fields(self.options)
            if field.name in OPTIONS
        }
        lines |= {"/help": "these lines, with the present values", "/quit": "end, as does Ctrl-D"}
        return "\n".join(f"{command:<24} {help}" for command, help in lines.items())


def run(write: Callable[..., Iterator[str]], options) -> None:
    """Until /quit or the end of input. At a terminal Ctrl-C only ends the line or the text."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # not available on Windows
            import readline  # noqa: F401  importing it gives input() editing and history
        print(WELCOME)
    sys.stdin.reconfigure(errors="replace")
    loop = PromptLoop(write, options)
    while True:
        try:
            line = input(PROMPT if is_terminal else "")
            if line.strip() == "/quit":
                return
            loop.answer(line)
        except EOFError:
            print(end="\n" if is_terminal else "")
            return
        except (InputError, RunError) as error:
            print_error(str(error))
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()
