"""What surrounds a process: its streams, special files, permissions, its environment.

Each case is a process of its own, forked so that it need not import torch again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from helpers import TINY, command, is_one_error_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
import sample
import train
from quill import errors, export, startup

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # a fork beside threads
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
NOBODY = 65534
LIMIT_SECONDS = 20
STREAMS = {0: "/dev/null", 1: "stdout", 2: "stderr"}  # what run_apart opens, by number
COMMANDS = {
    "train": (train, [*TINY, "c.py", "--max_iters=2", "--eval_interval=1", "--out_dir=new"]),
    "overwrite": (train, [*TINY, "--max_iters=1", "--out_dir=made", "--overwrite=true"]),
    "resume": (train, ["--out_dir=made", "--init_from=resume", "--max_iters=7"]),
    "sample": (sample, ["--out_dir=made", "--num_samples=1", "--max_new_tokens=5"]),
    "prompt": (sample, ["--out_dir=made", "--max_new_tokens=2", "--start=FILE:p.txt"]),
    "interactive": (sample, ["--out_dir=made", "--interactive=true", "--max_new_tokens=5"]),
    "prepare": (prepare, ["tiny", "--input=text.txt", "--tokenizer=byte"]),
    "another": (prepare, ["other", "--input=text.txt"]),
    "folder": (prepare, ["books", "--input=books"]),
    "export": (export, ["--out_dir=made", "made/hf"]),
    "help": (train, ["--help"]),
    "mistake": (train, ["--nlayer=3"]),
}
FILES = ["c.py", "p.txt", "text.txt", "books", "books/b", "books/b/2.txt", "data/tiny", "made"]
FILES += [f"made/{name}" for name in ("ckpt.pt", "best.pt", "metrics.jsonl", ".lock", "hf")]
FILES += ["made/ckpt.previous.pt", "made/ckpt.previous.pt.tmp", "made/ckpt.pt.tmp", "new/ckpt.pt"]
FILES += [f"data/tiny/{name}" for name in ("train.bin", "val.bin", "meta.json", ".lock")]
FILES += ["data/tiny/meta.json.tmp", "data/other/train.bin", "data/other", "new", "new/.lock"]


def run_apart(module, argv, streams: dict, user: int | None, environment: dict) -> tuple[int, str]:
    """-> (exit code, what it wrote on stderr, if that is a file) of the command as a new process.

    streams: by the numbers 0 to 2, the path to open there, or None for a closed one.
    """
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = become_the_command(module, argv, streams, user, environment)
        except BaseException:
            with contextlib.suppress(Exception):
                Path("traceback").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    deadline = time.monotonic() + LIMIT_SECONDS
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("it hangs")
        time.sleep(0.002)
    said = Path("traceback").read_text() if Path("traceback").exists() else ""
    return os.waitstatus_to_exitcode(done[1]), said + Path("stderr").read_text(errors="replace")


def become_the_command(module, argv, streams: dict, user: int | None, environment: dict) -> int:
    Path("traceback").touch()  # by the first user, and open to another
    Path("traceback").chmod(0o666)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        mode = os.O_RDWR | os.O_CREAT
        os.dup2(os.open(streams[number] or os.devnull, mode, 0o666), number)
        kind = "w" if number else "r"
        stream = open(number, kind, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream if streams[number] else None)
    for number in range(3):
        if streams[number] is None:
            os.close(number)
    startup.open_closed_streams()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    sys.argv = ["command", *argv]
    try:
        errors.run_command(module.main)
    except SystemExit as stop:
        return stop.code
    return 98


def put(path: Path, kind: str) -> None:
    """Make the path something else than the file or folder that is expected there."""
    if kind.startswith("mode "):
        if path.exists():
            path.chmod(int(kind.removeprefix("mode "), 8))
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    targets = {"to a device": "/dev/null", "to itself": path.name, "to nothing": "nothing"}
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind in targets:
        path.symlink_to(targets[kind])
    else:
        assert kind == "missing"


KINDS = ["pipe", "folder", "to a device", "to itself", "to nothing", "missing"]
KINDS += ["mode 000", "mode 444", "mode 555", "mode 777"]
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
NAMES = ["WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT", "TIKTOKEN_CACHE_DIR", "HOME", "COLUMNS"]
VALUES = ["", "0", "1", "-1", "x", "1.5", "\u0663", " 1", "9" * 30, "/dev/null", "a" * 300, "\n"]
inputs = st.sampled_from(["/dev/null", "typed", None])
outputs = st.sampled_from(["stdout", "/dev/null", "/dev/full", None])
errors_to = st.sampled_from(["stderr", "stderr", "stderr", "/dev/full", None])
CASES = {
    "name": st.sampled_from([*COMMANDS]),
    "streams": st.fixed_dictionaries({0: inputs, 1: outputs, 2: errors_to}),
    "special": st.dictionaries(st.sampled_from(FILES), st.sampled_from(KINDS), max_size=2),
    "user": st.sampled_from([None, NOBODY] if IS_ROOT else [None]),
    "open_to_all": st.booleans(),
    "environment": st.dictionaries(st.sampled_from(NAMES), st.sampled_from(VALUES), max_size=1),
}


@pytest.fixture
def pristine(tiny, call):
    """A run, a dataset, a config, a prompt and books; every command has been imported and used."""
    call("prepare", "tiny", "--input=text.txt", "--tokenizer=byte", "--overwrite=true")
    assert call("train", *TINY, "--out_dir=made")[0] == 0
    Path("c.py").write_text("dropout = 0.1\n")
    Path("p.txt").write_text("To be")
    Path("typed").write_text("To be\n/temperature 0.5\n/quit\n")
    for name in ("books/a.txt", "books/b/1.txt", "books/b/2.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("some words of a book " * 20)
    for name in ("sample", "prompt", "folder", "export"):  # what is imported only when it is used
        module, argv = COMMANDS[name]
        call(module.__name__.removeprefix("quill."), *argv)
    shutil.rmtree("made/hf", ignore_errors=True)
    shutil.rmtree("data/books", ignore_errors=True)
    return tiny


def one_case(pristine: Path, name, streams, special, user, open_to_all, environment) -> int:
    work = pristine.parent / "case"
    shutil.copytree(pristine, work)
    os.chdir(work)
    try:
        for path in [work, *work.rglob("*")] if open_to_all else [work]:
            path.chmod(0o777)
        for path, kind in special.items():
            with contextlib.suppress(OSError):  # below another special one
                put(Path(path), kind)
        before = {path: what(path) for path in special}
        Path("stderr").write_bytes(b"")
        Path("stderr").chmod(0o666)
        code, said = run_apart(*COMMANDS[name], streams, user, environment)
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code in (0, 1, 2) and "Traceback" not in said, (code, said)
        if streams[2] == "stderr" and code:
            assert len(lines) == 1, said
        for path, kind in before.items():
            assert kind in ("file", "missing", "directory") or what(path) == kind, (path, kind)
    finally:
        os.chdir(pristine)
        for path in [work, *work.rglob("*")]:
            if not path.is_symlink():
                path.chmod(0o777)
        shutil.rmtree(work)
    return code


def what(path: str) -> str:
    """Its type: a pipe, link or device must still be there afterwards."""
    with contextlib.suppress(OSError):
        mode = os.lstat(path).st_mode
        kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "directory"}
        return kinds.get(stat.S_IFMT(mode), str(stat.S_IFMT(mode)))
    return "missing"


@pytest.mark.parametrize("n", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_any_surroundings(pristine, n):
    device = Path(os.devnull).stat().st_ino
    codes = []

    @settings(
        max_examples=n, database=None, derandomize=True,
        suppress_health_check=[*HealthCheck],
    )  # fmt: skip
    @given(**CASES)
    def run(**case):
        codes.append(one_case(pristine, **case))

    run()
    assert Path(os.devnull).stat().st_ino == device
    assert min(codes.count(0), codes.count(2)) > len(codes) / 20
    print(f"\n{len(codes):,} surroundings: {[codes.count(code) for code in range(3)]} exits")


@pytest.mark.parametrize(("name", "path"), [("train", "c.py"), ("prompt", "p.txt")])
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(pristine, name, path):
    assert one_case(pristine, name, STREAMS, {path: "pipe"}, None, False, {}) == 2


@pytest.mark.skipif(not IS_ROOT, reason="needs to become another user")
@pytest.mark.parametrize("mode", ["mode 000", "mode 444"])
@pytest.mark.parametrize("path", ["books", "books/b", "books/b/2.txt"])
def test_a_folder_with_a_part_that_cannot_be_read_is_refused(pristine, path, mode):
    expected = 0 if (path, mode) == ("books/b/2.txt", "mode 444") else 2
    assert one_case(pristine, "folder", STREAMS, {path: mode}, NOBODY, True, {}) == expected


@pytest.mark.parametrize("streams", [{n: None} for n in range(3)] + [{1: "/dev/full"}])
@pytest.mark.parametrize("name", [*COMMANDS])
def test_closed_and_full_streams(pristine, name, streams):
    expected = 2 if name == "mistake" else 0
    streams = STREAMS | {0: "typed"} | streams
    code = one_case(pristine, name, streams, {}, None, False, {})
    assert code == (1 if streams[1] == "/dev/full" and not expected else expected)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_output_is_named(tiny):
    with Path("/dev/full").open("w") as full:
        done = command("prepare", "tiny", "--input=text.txt", capture_output=False, stdout=full,
                       stderr=subprocess.PIPE)  # fmt: skip
    assert done.returncode == 1 and is_one_error_line(done.stderr)
    assert "standard output: No space left" in done.stderr


def test_a_config_file_that_takes_the_output_away_is_no_traceback(tiny):
    Path("quiet.py").write_text("import sys\nsys.stdout = None\n")
    done = command("train", *TINY, "quiet.py")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Path("out/best.pt").exists()
