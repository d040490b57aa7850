"""The prompt loop: at a real terminal, and fed from a pipe."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pexpect
import pytest
from helpers import REPO, TINY, texts

FLAGS = ("--max_new_tokens=30", "--device=cpu", "--dtype=float32")
UP, START_OF_LINE = "\x1b[A", "\x01"


@pytest.fixture
def trained(tiny, call) -> Path:
    assert call("train", *TINY, "--max_iters=1")[0] == 0
    return tiny


class Terminal:
    """The program at a pseudo-terminal: keys in, what it shows out."""

    def __init__(self):
        line = [str(REPO / "sample.py"), "--interactive", *FLAGS]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "INPUTRC": os.devnull}
        options = {"env": environment, "encoding": "utf-8", "timeout": 30}
        self.program = pexpect.spawn(sys.executable, line, **options)

    def shows(self, text: str) -> None:
        self.program.expect_exact(text.replace("\n", "\r\n"))

    def answers(self, keys: str, text: str = "") -> None:
        self.program.send(keys + "\r")
        self.shows(f"{text}\n")
        self.shows("> ")


# Python 3.12 warns of any fork in a process with threads.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_at_a_terminal(trained, call):
    expected = texts(call("sample", *FLAGS, "--start=the king", "--num_samples=3")[1])
    [greedy, *_] = texts(call("sample", *FLAGS, "--start=the king", "--temperature=0")[1])
    terminal = Terminal()
    shows, answers, program = terminal.shows, terminal.answers, terminal.program

    shows("/help lists commands")
    shows("> ")
    answers("the king", expected[0])
    answers("king" + START_OF_LINE + "the ", expected[1])
    answers(UP, expected[2])
    answers("/sed 1", "error: /sed: no such command, did you mean /seed?")
    answers("/top_p 2", "error: top_p=2.0: must be at most 1")
    answers("/top_k all", "error: --top_k: expected a whole number, got 'all'")
    answers("Ω", "error: the vocabulary of 30 characters lacks 'Ω' (U+03A9): 1 of 1 characters")

    answers("/max_new_tokens 1000000000")
    program.send("the king\r")
    program.expect("(?s)the king\r.{300}")
    program.sendintr()  # ends the text
    shows("> ")
    program.send("the quee")
    shows("the quee")
    program.sendintr()  # drops the line
    shows("> ")

    answers("/max_new_tokens 30")
    answers("/seed 1337")
    answers("the king", expected[0])
    answers("/temperature 0")
    answers("the king", greedy)
    program.send("/help\r")
    shows("/temperature 0.0 ")
    shows("/seed 1337 ")
    shows("> ")
    program.sendeof()
    program.expect(pexpect.EOF)
    program.close()
    assert program.exitstatus == 0


def test_from_a_pipe(trained, call, monkeypatch):
    first, second = texts(call("sample", *FLAGS, "--start=queen", "--num_samples=2")[1])
    lines = b"queen\n\nqueen\n/seed 1337\nqueen"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert call("sample", "--interactive", *FLAGS) == (0, f"{first}\n{second}\n{first}\n", "")

    lines = b"\xff\n/seed x\n/seed 1337\nqueen\n/quit\nqueen\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    code, out, err = call("sample", "--interactive", *FLAGS, "--stop=e")
    assert (code, out) == (0, "queen" + first[5:].split("e")[0] + "\n")
    complaints = err.splitlines()
    assert len(complaints) == 2 and all(line.startswith("error: ") for line in complaints)
