"""The loop of `sample.py --interactive`: a line in, a text out. It knows the terminal, no model."""

from __future__ import annotations

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


class Chat:
    """What has been set, and how many prompts there were since the seed.

    write(prompt, config, number) yields a text piece by piece; a text's random numbers are drawn
    from (config.seed, number).
    """

    def __init__(self, write: Callable[..., Iterator[str]], config):
        self.write, self.config, self.n_prompts = write, config, 0

    def answer(self, line: str) -> None:
        """Show the text that begins with the line, or do what `/command value` says.

        Raises InputError for a wrong command or value, or a prompt that the model cannot read.
        """
        if line.startswith("/"):
            name, _, value = line[1:].strip().partition(" ")
            self.obey(name, value.strip())
        elif line:
            self.n_prompts += 1
            for text in self.write(line, self.config, self.n_prompts - 1):
                print(text, end="", flush=True)
            print()

    def obey(self, name: str, value: str) -> None:
        if name == "help":
            print(self.help_text())
        elif name in OPTIONS:
            flag = f"--{name}={value}"
            self.config = settings.load(type(self.config), [flag], usage="", base=vars(self.config))
            if name == "seed":
                self.n_prompts = 0
        else:
            raise InputError(f"/{name}: no such command; /help lists them")

    def help_text(self) -> str:
        lines = {
            f"/{field.name} {getattr(self.config, field.name)}": field.metadata["help"]
            for field in dataclasses.fields(self.config)
            if field.name in OPTIONS
        }
        lines |= {"/help": "these lines, with the values set now", "/quit": "end, as does Ctrl-D"}
        return "\n".join(f"{command:<24} {help}" for command, help in lines.items())


def run(write: Callable[..., Iterator[str]], config) -> None:
    """Until /quit or the end of the input. At a terminal Ctrl-C ends a line or a text, not this."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # not there on Windows
            import readline  # noqa: F401  by being imported it gives input() editing and history
        print(WELCOME)
    sys.stdin.reconfigure(errors="replace")
    chat = Chat(write, config)
    while True:
        try:
            line = read_line(is_terminal)
            if line.strip() == "/quit":
                return
            chat.answer(line)
        except (InputError, RunError) as error:
            print_error(str(error))
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print()


def read_line(is_terminal: bool) -> str:
    try:
        return input(PROMPT if is_terminal else "")
    except EOFError:
        if is_terminal:
            print()
        return "/quit"
