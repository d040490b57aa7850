from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quill import settings
from quill.errors import InputError
from quill.settings import option


@dataclasses.dataclass(frozen=True)
class Options:
    rate: float = option(0.1, "a rate", min=0, max=1)
    steps: int = option(10, "how many", min=1)
    name: str = option("x", "a name")
    fast: bool = option(False, "a switch")
    shape: Literal["round", "square"] = option("round", "a choice")
    mode: bool | Literal["auto"] = option("auto", "a switch with a third position")


def load(*argv, **kwargs):
    return settings.load(Options, list(argv), usage="usage", **kwargs)


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--rate=0.5"], "rate", 0.5),
        (["--rate", "0.5"], "rate", 0.5),
        (["--rate=1"], "rate", 1.0),
        (["--steps", "3", "--steps=4"], "steps", 4),
        (["--name=a=b"], "name", "a=b"),
        (["--name="], "name", ""),
        (["--name", "-1"], "name", "-1"),
        (["--name", "-x"], "name", "-x"),
        (["--fast=TRUE"], "fast", True),
        (["--fast", "false"], "fast", False),
        (["--fast"], "fast", True),
        (["--fast", "--steps=3"], "fast", True),
        (["--mode"], "mode", True),
        (["--shape=square"], "shape", "square"),
        (["--mode=True"], "mode", True),
        (["--mode=auto"], "mode", "auto"),
    ],
)
def test_good_flags(argv, field, value):
    got = getattr(load(*argv), field)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--stps=3"], "did you mean steps?"),
        (["--steps=1.5"], "expected a whole number, got '1.5'"),
        (["--steps=0"], "steps=0: must be at least 1"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "--rate=1"], "--steps needs a value"),
        (["--rate=fast"], "expected a number"),
        (["--rate=nan"], "expected a number"),
        (["--rate=2"], "must be at most 1"),
        (["--fast=1"], "expected true or false"),
        (["--fast", "yes"], "expected true or false, got 'yes'"),
        (["--fast", "missing.py"], "missing.py: No such file"),
        (["--shape=oval"], "expected 'round' or 'square'"),
        (["--mode=maybe"], "expected true or false or 'auto'"),
        (["-rate=1"], "two dashes"),
        (["missing.py"], "missing.py: No such file"),
        (["--name=a\0b"], "not utf-8 text without NUL"),
        (["--name=a\udcffb"], "not utf-8 text without NUL"),
    ],
)
def test_bad_flags(argv, complaint):
    with pytest.raises(InputError, match=complaint.replace("?", r"\?")):
        load(*argv)


def test_all_problems_are_reported_at_once():
    with pytest.raises(InputError) as caught:
        load("--stps=3", "--rate=x", "--steps=0")
    assert all(word in str(caught.value) for word in ("stps", "rate", "steps=0"))


def test_later_files_win_and_flags_win_over_files(folder):
    (folder / "a.py").write_text("steps = 5 * 8\nname = 'a'\nrate = 1\n")
    (folder / "b.py").write_text("import time\n_note = 3\nname = 'b' + str(int(time.time() > 0))\n")
    assert load("a.py", "b.py") == Options(steps=40, name="b1", rate=1.0)
    assert load("a.py", "b.py", "--name=c").name == "c"


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("stps = 3\n", "bad.py: stps: no such option, did you mean steps"),
        ("steps = '3'\n", "expected a whole number, got '3'"),
        ("steps = True\n", "expected a whole number, got True"),
        ("fast = 1\n", "expected true or false"),
        ("\nsteps = = 3\n", "bad.py, line 2"),
        ("\nsteps = nothing\n", "bad.py, line 2: NameError"),
        ("import sys\nsys.exit()\n", "bad.py, line 2: SystemExit"),
        (f"rate = {10**400}\n", "expected a number"),
        ("steps = 2 ** 63\n", "steps=9223372036854775808: must be at most 9223372036854775807"),
        ("steps = -10 ** 5000\n", "steps=a value of type int that cannot be shown: must be at"),
        ("name = 10 ** 5000\n", "got a value of type int that cannot be shown"),
    ],
)
def test_bad_files(folder, source, complaint):
    (folder / "bad.py").write_text(source)
    with pytest.raises(InputError, match=complaint):
        load("bad.py")


def test_what_is_in_an_archive_is_not_run(folder):
    """A checkpoint is one, and a stranger's may hold a program."""
    with zipfile.ZipFile("best.pt", "w") as archive:
        archive.writestr("__main__.py", "open('executed', 'w')\nsteps = 3\n")
    with pytest.raises(
        InputError, match=r"config file best\.pt: not a text; a checkpoint is given by --init_from"
    ):
        load("best.pt")
    assert not Path("executed").exists()


def test_base_replaces_the_defaults_and_is_checked():
    base = {"steps": 7, "name": "kept", "from_an_older_version": 1}
    assert load("--name=new", base=base) == Options(steps=7, name="new")
    with pytest.raises(InputError, match="steps"):
        load(base={"steps": "7"})


def test_positional():
    assert load("word", "--steps=2", positional="name") == Options(name="word", steps=2)
    with pytest.raises(InputError, match="one name at a time"):
        load("word", "another", positional="name")


def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        load("--help")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for field in dataclasses.fields(Options):
        line = next(line for line in printed.splitlines() if f"--{field.name}=" in line)
        assert repr(field.default) in line and field.metadata["help"] in line


names = st.sampled_from([f.name for f in dataclasses.fields(Options)])


@given(st.lists(st.tuples(names, st.text()).map(lambda pair: f"--{pair[0]}={pair[1]}") | st.text()))
def test_any_command_line_is_accepted_or_refused_in_one_way(argv):
    if {"--help", "-h"} & set(argv):
        return
    try:
        config = load(*argv)
    except InputError:
        return
    assert 0 <= config.rate <= 1 and config.steps >= 1 and type(config.fast) is bool


words = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"))


@given(st.floats(0, 1), st.integers(1, 2**63 - 1), words, st.booleans())
def test_values_survive_the_command_line(rate, steps, name, fast):
    argv = [f"--rate={rate!r}", f"--steps={steps}", f"--name={name}", f"--fast={fast}"]
    assert load(*argv) == Options(rate=rate, steps=steps, name=name, fast=fast)
