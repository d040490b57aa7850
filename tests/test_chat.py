"""The prompt loop: at a real terminal, and fed from a pipe."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pexpect
import pytest
from conftest import REPO, TINY
from test_sample import texts

FLAGS = ("--max_new_tokens=30", "--device=cpu", "--dtype=float32")
UP, START_OF_LINE = "\x1b[A", "\x01"


@pytest.fixture
def trained(tiny, call) -> Path:
    assert call("train", *TINY, "--max_iters=1")[0] == 0
    return tiny


# Python 3.12 warns of any fork in a process with threads.
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_at_a_terminal(trained, call):
    expected = texts(call("sample", *FLAGS, "--start=the king", "--num_samples=3")[1])
    [greedy, *_] = texts(call("sample", *FLAGS, "--start=the king", "--temperature=0")[1])
    line = [str(REPO / "sample.py"), "--interactive", *FLAGS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "INPUTRC": os.devnull}
    terminal = pexpect.spawn(sys.executable, line, env=environment, encoding="utf-8", timeout=30)

    def shows(text: str) -> None:
        terminal.expect_exact(text.replace("\n", "\r\n"))

    def answers(keys: str, text: str) -> None:
        terminal.send(keys + "\r")
        shows(f"{text}\n")
        shows("> ")

    shows("/help lists commands")
    shows("> ")
    answers("the king", expected[0])
    answers("king" + START_OF_LINE + "the ", expected[1])
    answers(UP, expected[2])
    answers("/sed 1", "error: /sed: no such command; /help lists them")
    answers("/top_p 2", "error: top_p=2.0: must be at most 1")
    answers("/top_k all", "error: --top_k: expected a whole number, got 'all'")
    answers("Ω", "error: the vocabulary of 30 characters lacks 'Ω' (U+03A9): 1 of 1 characters")

    terminal.send("/max_new_tokens 1000000000\r")
    shows("> ")
    terminal.send("the king\r")
    terminal.expect("(?s)the king\r.{300}")
    terminal.sendintr()  # ends the text
    shows("> ")
    terminal.send("the quee")
    shows("the quee")
    terminal.sendintr()  # drops the line
    shows("> ")

    for command in ("/max_new_tokens 30", "/seed 1337"):
        terminal.send(f"{command}\r")
        shows("> ")
    answers("the king", expected[0])
    terminal.send("/temperature 0\r")
    shows("> ")
    answers("the king", greedy)
    terminal.send("/help\r")
    shows("/temperature 0.0 ")
    shows("/seed 1337 ")
    shows("> ")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


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
