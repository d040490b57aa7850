"""Kills, signals, full disks, damaged files, two at once: nothing is lost, nothing is half there.

Each fault has a short form, and a long one (`--run-slow`) that prints what docs/results.md reports
(`-s` shows it). What a run should have become is always that of one which was left alone.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers import (
    TINY,
    command,
    command_line,
    environment,
    is_one_error_line,
    losses_of,
    same_run,
)

from quill.data import dataset_files
from quill.errors import InputError
from quill.training import checkpoint
from quill.training.checkpoint import load_checkpoint

slow = pytest.mark.slow


def counts(short: int, long: int):
    """Parametrize a test by how often its fault happens."""
    return pytest.mark.parametrize("n_faults", [short, pytest.param(long, marks=slow)])


def start(script: str, *argv: str, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command_line(script, *argv), env=environment(), **pipes | options)


def is_writing(folder: str) -> bool:
    return any(Path(folder).glob("*.tmp"))


def wait_until(run: subprocess.Popen, condition, seconds: float = 60) -> bool:
    """Until the condition holds or the process has ended; -> whether it still runs."""
    deadline = time.monotonic() + seconds
    while run.poll() is None and not condition():
        assert time.monotonic() < deadline, "waited too long"
    return run.poll() is None


def is_whole(out_dir: str) -> bool:
    """Whether what the run had saved is there: read as a resume would, from whatever is there."""
    paths = [Path(out_dir, name) for name in ("ckpt.pt", "ckpt.previous.pt", "best.pt")]
    lowest = {  # val losses; loading raises when a file is not whole
        path.name: load_checkpoint(path, for_resume=path.name != "best.pt")["best_val_loss"]
        for path in filter(Path.exists, paths)
    }
    assert min(lowest.values(), default=math.inf) == lowest.get("best.pt", math.inf)
    return bool(lowest.keys() - {"best.pt"})


# ---- SIGKILL -----------------------------------------------------------------------------------

# Evaluates and saves after every step; in the long form the files are larger, for kills inside.
BUSY = [*TINY, "--eval_interval=1", "--eval_iters=1", "--log_interval=7", "--dropout=0.1"]
BUSY += ["--optimizer=muon", "--average_decay=0.9"]


def is_quiet(err: str, had_state: bool) -> bool:
    """A run killed between its first best.pt and its first ckpt.pt starts anew, and says so."""
    return err == "" or (not had_state and re.fullmatch(r"the run .* is moved to .*\n", err))


@counts(3, 140)
@pytest.mark.parametrize("seconds", [0, 0.05])
def test_killed_at_random_moments_and_resumed(tiny, call, n_faults, seconds):
    """A third while starting or resuming, a third in the loop, a third inside a write."""
    rng = random.Random(1)
    flags = [*BUSY, "--n_embd=96", f"--max_iters={8 * n_faults}", "--lr_decay_iters=2000"]
    flags += ["--init_from=auto", f"--checkpoint_seconds={seconds}"]
    assert call("train", *flags, "--out_dir=whole")[0] == 0
    where = dict.fromkeys(("starting", "in the loop", "inside a write"), 0)
    for fault in range(n_faults):
        had_state = Path("parts").exists() and is_whole("parts")
        run = start("train", *flags, "--out_dir=parts")
        moment = list(where)[fault % 3]
        if moment == "starting":
            time.sleep(rng.uniform(0, 1.5))
        else:
            lines = iter(run.stdout.readline, "")
            assert any("val loss" in line or "loss" in line for line in lines), run.stderr.read()
            time.sleep(rng.uniform(0, 0.2))
        if moment == "inside a write":
            wait_until(run, lambda: is_writing("parts"))
        run.kill()
        _, err = run.communicate()
        assert run.returncode == -signal.SIGKILL, "ended before it was killed"
        assert is_quiet(err, had_state), err
        where["inside a write" if is_writing("parts") else moment] += 1
        assert is_whole("parts") or not had_state
    had_state = is_whole("parts")
    code, _, err = call("train", *flags, "--out_dir=parts")
    assert code == 0 and is_quiet(err, had_state), err
    same_run("whole", "parts")
    print(f"\n{n_faults} kills of training: {where}")


def test_a_kill_between_two_saves_loses_only_the_steps_since(tiny, call):
    flags = [*TINY, "--eval_interval=10", "--log_interval=1", "--max_iters=300", "--dropout=0.1"]
    flags += ["--checkpoint_seconds=0.5"]
    assert call("train", *flags, "--out_dir=whole")[0] == 0
    run = start("train", *flags, "--out_dir=parts")
    wait_until(run, Path("parts/ckpt.pt").exists)
    lines = iter(run.stdout.readline, "")
    saved = load_checkpoint(Path("parts/ckpt.pt"), for_resume=True)["step"]
    reached = (int(line.split()[1].split("/")[0]) for line in lines if "ms/step" in line)
    assert any(step >= saved + 10 for step in reached)
    run.kill()
    assert run.communicate()[1] == "" and run.returncode == -signal.SIGKILL
    saved = load_checkpoint(Path("parts/ckpt.pt"), for_resume=True)["step"]
    assert losses_of("parts")[-1][0] > saved
    code, out, err = call("train", *flags, "--out_dir=parts", "--init_from=resume")
    assert (code, err) == (0, "") and f"resuming after step {saved} of 300" in out
    same_run("whole", "parts")


@counts(2, 60)
def test_prepare_killed_at_random_moments(folder, n_faults, text):
    """The dataset is the old one or the new one: never anything else, and never none."""
    rng = random.Random(2)
    texts = {"old": text * 20, "new": text[::-1] * 40}
    for name, content in texts.items():
        Path(f"{name}.txt").write_text(content)
        began = time.monotonic()
        assert command("prepare", name, f"--input={name}.txt").returncode == 0
        seconds = time.monotonic() - began
    expected = {
        dataset_files.read_meta(Path(f"data/{name}/meta.json")).sha256: name for name in texts
    }
    assert command("prepare", "d", "--input=old.txt").returncode == 0
    found = dict.fromkeys([*texts, "new, of which between two renames"], 0)
    for fault in range(n_faults):
        given = f"--input={['new', 'old'][fault % 2]}.txt"
        run = start("prepare", "d", given, "--overwrite=true")
        if fault % 4 < 2:
            wait_until(run, lambda: is_writing("data/d"))
            time.sleep(rng.uniform(0, 0.02))
        else:
            time.sleep(rng.uniform(0, seconds))
        run.kill()
        assert run.communicate()[1] == ""
        found["new, of which between two renames"] += not Path("data/d/meta.json").exists()
        found[expected[dataset_files.read(Path("data/d"))[0].sha256]] += 1
    assert command("prepare", "d", "--input=new.txt", "--overwrite=true").returncode == 0
    assert dataset_files.read(Path("data/d"))[0] == dataset_files.read(Path("data/new"))[0]
    print(f"\n{n_faults} kills of prepare; the dataset was then {found}")


# ---- SIGINT and SIGTERM ------------------------------------------------------------------------


@counts(3, 100)
def test_signals_at_random_moments(tiny, call, n_faults):
    rng = random.Random(3)
    flags = [*BUSY, f"--max_iters={60 * n_faults}", "--eval_interval=8", "--init_from=auto"]
    assert call("train", *flags, "--out_dir=whole")[0] == 0
    saved = 0
    for fault in range(n_faults):
        number = [signal.SIGINT, signal.SIGTERM][fault % 2]
        seconds = rng.choice([0, 0.05, 180])
        run = start("train", *flags, "--out_dir=parts", f"--checkpoint_seconds={seconds}")
        if fault % 3 < 2:
            assert any("loss" in line for line in iter(run.stdout.readline, ""))
            time.sleep(rng.uniform(0, 0.1))
        else:
            time.sleep(rng.uniform(0.3, 1.5))  # Python itself is up
        run.send_signal(number)
        out, err = run.communicate()
        assert "Traceback" not in err and run.returncode in (128 + number, -number), err
        saved += "--init_from=resume" in out
    code, _, err = call("train", *flags, "--out_dir=parts")
    assert (code, err) == (0, "")
    same_run("whole", "parts")
    assert saved >= 2 * n_faults // 3
    print(f"\n{n_faults} signals: {saved} in the loop, saved; the others while starting")


# ---- a full disk, a read-only one --------------------------------------------------------------


@contextlib.contextmanager
def small_disk(path: str, kilobytes: int):
    """A file system of its own at `path`; skips the test where we may not make one."""
    Path(path).mkdir()
    make = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "quill-test", path]
    if not shutil.which("mount") or subprocess.run(make, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(path: str, leave_kilobytes: int) -> Path:
    """Take the rest of a disk but for `leave_kilobytes`; -> the file to delete for room again."""
    filler = Path(path, "filler")
    room = shutil.disk_usage(path).free - leave_kilobytes * 1024
    filler.write_bytes(bytes(max(0, room)))
    return filler


@counts(1, 40)
def test_a_full_disk_stops_a_run_and_loses_nothing(tiny, call, n_faults):
    rng = random.Random(4)
    flags = [*TINY, "--n_embd=64", "--eval_interval=2", "--log_interval=1", "--max_iters=40"]
    flags += ["--lr_decay_iters=40"]
    assert call("train", *flags, "--out_dir=whole")[0] == 0
    endings = dict.fromkeys(("metrics.jsonl", "best.pt", "ckpt.pt", "enough room"), 0)
    with small_disk("disk", 8192):
        for fault in range(n_faults):
            shutil.rmtree("disk/parts", ignore_errors=True)
            assert call("train", *flags, "--out_dir=disk/parts", "--max_iters=10")[0] == 0
            before = load_checkpoint(Path("disk/parts/ckpt.pt"))["step"]
            filler = fill("disk", 0 if fault % 4 == 0 else rng.randrange(4, 1600))
            more = ["--init_from=resume", "--max_iters=40", "--out_dir=disk/parts"]
            done = command("train", *flags, *more)
            assert done.returncode in (0, 1)
            if done.returncode == 1:
                assert is_one_error_line(done.stderr) and "No space left" in done.stderr
                endings[next(name for name in endings if name in done.stderr)] += 1
            else:
                endings["enough room"] += 1
            assert is_whole("disk/parts") and not is_writing("disk/parts")
            assert load_checkpoint(Path("disk/parts/ckpt.pt"))["step"] >= before
            filler.unlink()
            assert call("train", *flags, *more)[0] == 0
            same_run("whole", "disk/parts")
    assert endings["enough room"] < n_faults
    print(f"\n{n_faults} full disks in training, found by {endings}")


@counts(2, 20)
def test_a_full_disk_stops_prepare_and_keeps_the_dataset(folder, n_faults, text):
    rng = random.Random(5)
    Path("old.txt").write_text(text)
    Path("new.txt").write_text(text[::-1] * 8)
    with small_disk("data", 1024):
        assert command("prepare", "d", "--input=old.txt").returncode == 0
        before = dataset_files.read(Path("data/d"))[0]
        for _ in range(n_faults):
            filler = fill("data", rng.randrange(0, 250))
            done = command("prepare", "d", "--input=new.txt", "--overwrite=true")
            assert done.returncode == 1 and is_one_error_line(done.stderr)
            assert "No space left" in done.stderr and not is_writing("data/d")
            assert dataset_files.read(Path("data/d"))[0] == before
            filler.unlink()
        assert command("prepare", "d", "--input=new.txt", "--overwrite=true").returncode == 0
    print(f"\n{n_faults} full disks in prepare: the old dataset stays, one line")


def test_a_read_only_out_dir(tiny, call):
    with small_disk("disk", 8192):
        assert call("train", *TINY, "--out_dir=disk/out", "--max_iters=3")[0] == 0
        subprocess.run(["mount", "-o", "remount,ro", "disk"], check=True)
        for argv in (["--out_dir=disk/out", "--init_from=resume"], ["--out_dir=disk/new"]):
            code, _, err = call("train", *TINY, *argv)
            assert code == 1 and is_one_error_line(err)
            assert "Read-only file system; choose a folder that can be written" in err
        assert is_whole("disk/out")


# ---- damaged files -----------------------------------------------------------------------------


def damages(data: bytes, rng: random.Random, n: int | None):
    """Copies of `data` with one bit wrong or cut short; n of each, or one at every byte."""
    places = range(len(data)) if n is None else rng.sample(range(len(data)), min(n, len(data)))
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << rng.randrange(8)
        yield bytes(flipped)
        yield data[:place]


@pytest.mark.parametrize("n", [60, pytest.param(None, marks=slow)])
@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt", "train.bin", "val.bin", "meta.json"])
def test_a_wrong_bit_or_a_cut_anywhere_is_an_error(tiny, call, name, n):
    small = ["--n_layer=1", "--n_embd=8", "--max_iters=2", "--eval_interval=2"]
    assert call("train", *TINY, *small)[0] == 0
    path = Path("out" if name.endswith(".pt") else "data/tiny", name)
    meta = dataset_files.read_meta(Path("data/tiny/meta.json"))
    whole, n_tried, same = path.read_bytes(), 0, 0
    for data in damages(whole, random.Random(6), n):
        path.write_bytes(data)
        n_tried += 1
        try:
            read = (
                load_checkpoint(path)
                if name.endswith(".pt")
                else dataset_files.read(Path("data/tiny"))
            )
        except InputError:
            continue
        assert name == "meta.json" and read[0] == meta, f"{name} was taken, damaged"
        same += 1  # one kind of blank for another says the same
    print(f"\n{name}: {n_tried:,} damaged copies, {n_tried - same:,} refused, {same} said the same")


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(tiny, call):
    flags = [*TINY, "--dropout=0.1", "--max_iters=9", "--log_interval=1"]
    call("train", *flags, "--out_dir=whole")
    call("train", *flags, "--out_dir=parts", "--max_iters=6", "--lr_decay_iters=9")
    path = Path("parts/ckpt.pt")
    path.write_bytes(path.read_bytes()[:-1000])
    code, out, err = call("train", "--out_dir=parts", "--init_from=resume", "--max_iters=9")
    assert code == 0 and "parts/ckpt.pt is damaged" in err and "kept as parts/ckpt.damaged" in err
    assert "going on from parts/ckpt.previous.pt, saved after step 3" in err
    assert "resuming after step 3" in out
    same_run("whole", "parts")
    for name in ("ckpt.pt", "ckpt.previous.pt"):
        Path("parts", name).write_bytes(b"")
    code, _, err = call("train", "--out_dir=parts", "--init_from=auto")
    assert code == 2 and is_one_error_line(err), "both lost: no silent start from scratch"
    assert "neither parts/ckpt.pt nor the one before it" in err
    assert "use the weights of parts/best.pt (--init_from=parts/best.pt)" in err
    start = ["--init_from=parts/best.pt", "--out_dir=new", "--max_iters=1", "--eval_iters=1"]
    assert call("train", "--dataset=tiny", *start)[0] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda saved: saved["model"]["lm_head.weight"].fill_(math.nan), "a weight is not finite"),
        (lambda saved: saved["optimizers"].clear(), "its optimizer state does not fit the model"),
    ],
)
def test_a_state_that_no_run_has_left_is_not_resumed(tiny, call, change, said):
    """Its checksum is right: somebody's program has written it."""
    call("train", *TINY, "--max_iters=1")
    saved = copy.deepcopy(load_checkpoint(Path("out/ckpt.pt")))
    change(saved)
    checkpoint.save_checkpoint(Path("out/ckpt.pt"), saved)
    code, _, err = call("train", "--init_from=resume", "--max_iters=2")
    assert code == 2 and is_one_error_line(err) and said in err


def test_a_damaged_best_is_said_with_the_one_that_is_left(tiny, call):
    call("train", *TINY, "--max_iters=1")
    Path("out/best.pt").write_bytes(b"")
    code, _, err = call("sample", "--max_new_tokens=1")
    assert code == 2 and is_one_error_line(err) and "(--init_from=out/ckpt.pt)" in err
    assert call("sample", "--max_new_tokens=1", "--init_from=out/ckpt.pt")[0] == 0


def test_only_damage_leads_to_the_one_before_and_only_a_run_moves_it(tiny, call):
    call("train", *TINY)
    newer = load_checkpoint(Path("out/ckpt.pt")) | {"quill_checkpoint": 99}
    checkpoint.save_checkpoint(Path("out/ckpt.pt"), newer)
    code, _, err = call("train", "--init_from=resume")
    assert code == 2 and "schema version" in err and Path("out/ckpt.pt").exists()
    Path("out/ckpt.pt").write_bytes(b"")
    code, out, err = call("train", "--init_from=resume", "--eval_only=true")
    assert code == 0 and "going on from out/ckpt.previous.pt" in err and "step 3" in out
    assert Path("out/ckpt.pt").exists()


def test_a_run_never_goes_on_from_another_ones_checkpoint(tiny, call):
    call("train", *TINY)
    call("train", *TINY, "--seed=9", "--max_iters=0", "--overwrite=true")
    Path("out/ckpt.pt").write_bytes(b"")
    code, _, err = call("train", *TINY, "--init_from=resume")
    assert code == 2 and is_one_error_line(err) and "is damaged" in err


def test_a_checkpoint_that_reads_back_differently_is_not_kept(tiny, call, monkeypatch):
    call("train", *TINY)
    before = Path("out/ckpt.pt").read_bytes()
    write = checkpoint.HashingFile.write

    def lossy(self, data):
        if len(data) > 100:  # the disk keeps something else than it was given
            self.digest.update(data)
            return self.file.write(bytes(len(data)))
        return write(self, data)

    monkeypatch.setattr(checkpoint.HashingFile, "write", lossy)
    code, _, err = call("train", "--init_from=resume", "--max_iters=9")
    assert code == 1 and is_one_error_line(err) and "what was read back is not what" in err
    assert Path("out/ckpt.pt").read_bytes() == before


# ---- two at once -------------------------------------------------------------------------------


def test_a_second_trainer_is_refused(tiny, call):
    run = start("train", *TINY, "--max_iters=100000", "--eval_interval=10000")
    assert wait_until(run, Path("out/ckpt.pt").exists)
    before = Path("out/best.pt").read_bytes()
    for argv in (TINY, ["--init_from=resume"]):
        code, _, err = call("train", *argv)
        assert code == 2 and is_one_error_line(err) and "out is in use" in err
    assert call("train", *TINY, "--eval_only=true")[0] == 0, "which writes nothing"
    assert Path("out/best.pt").read_bytes() == before
    run.kill()
    run.communicate()
    assert call("train", *TINY, "--overwrite=true")[0] == 0, "a killed run holds nothing"


def test_a_second_prepare_is_refused(tiny, call):
    Path("other.txt").write_text("something else " * 9)
    from quill.files import file_lock

    with file_lock(Path("data/tiny")):
        code, _, err = call("prepare", "tiny", "--input=other.txt")
    assert code == 2 and is_one_error_line(err) and "data/tiny is in use" in err


# ---- long runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n_steps", [400, pytest.param(5000, marks=slow)])
def test_a_long_run_grows_in_nothing(tiny, n_steps):
    """Memory, open files and the time of a step, from an eighth of the way to the end."""
    flags = [*TINY, f"--max_iters={n_steps}", "--eval_interval=50", "--log_interval=10"]
    seen = {}
    with start("train", *flags, "--average_decay=0.9", "--dropout=0.1") as run:
        for line in run.stdout:
            if line.startswith("step ") and "ms/step" in line:
                status = Path(f"/proc/{run.pid}/status").read_text()
                kilobytes = int(status.split("VmRSS:")[1].split()[0])
                step = int(line.split()[1].split("/")[0])
                seen[step] = (kilobytes, len(list(Path(f"/proc/{run.pid}/fd").iterdir())))
    assert run.returncode == 0
    lines = map(json.loads, Path("out/metrics.jsonl").read_text().splitlines())
    ms = {line["step"]: line["ms_per_step"] for line in lines if "ms_per_step" in line}
    late = [step for step in seen if step >= n_steps // 8]
    begin, end = seen[late[0]], seen[late[-2]]  # the last may be read after its process
    assert end[0] - begin[0] < 4096 and end[1] <= begin[1], (begin, end)
    half = [
        sorted(ms[step] for step in part)
        for part in (late[: len(late) // 2], late[len(late) // 2 :])
    ]
    medians = [times[len(times) // 2] for times in half]
    print(
        f"\n{n_steps} steps: memory {begin[0] / 1024:.1f} to {end[0] / 1024:.1f} MiB, open files "
        f"{begin[1]} to {end[1]}, median step of the halves {medians[0]:.2f}, {medians[1]:.2f} ms"
    )
