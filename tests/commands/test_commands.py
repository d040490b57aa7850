"""The commands from outside: exit codes, files, signals, and runs as a user makes them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import (
    REPO,
    SCRIPTS,
    TINY,
    command,
    command_line,
    edit_meta,
    environment,
    is_one_error_line,
)

from quill.training import checkpoint

NANOGPT_STYLE = """\
import time

out_dir = 'out-shakespeare-char'
eval_interval = 5 # keep frequent
eval_iters = 20
log_interval = 10
always_save_checkpoint = False

wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'tiny'
gradient_accumulation_steps = 5 * 8 // 20
batch_size = 4
block_size = 16

n_layer = 2
n_head = 2
n_embd = 16
dropout = 0.2

learning_rate = 1e-3
max_iters = 10
lr_decay_iters = 10
min_lr = 1e-4
beta2 = 0.99
weight_decay = 1e-1
warmup_iters = 100
decay_lr = False
backend = 'nccl'
device = 'cpu'
dtype = 'bfloat16'
compile = False
"""


@pytest.mark.parametrize(
    "script",
    [
        "prepare",
        "train",
        "sample",
        "bench",
        "plot",
        "export",
        "evaluate",
        "arithmetic",
        "reference",
        "scaling",
        "rl",
        "pairs",
        "reward",
        "dpo",
        "serve",
    ],
)
def test_help_says_how_to_run_it(folder, call, script):
    code, out, err = call(script, "--help")
    name = f"python {script}.py" if script in SCRIPTS else f"python -m quill.{script}"
    assert (code, err) == (0, "") and name in out and "options (as --NAME=VALUE" in out
    assert ("--dataset=" if script in ("prepare", "pairs") else "--out_dir=") in out


def test_what_is_no_command_says_what_to_run():
    options = {"capture_output": True, "text": True, "env": environment()}
    done = subprocess.run([sys.executable, REPO / "model.py"], **options)
    assert done.returncode == 1 and "train.py" in done.stderr and "sample.py" in done.stderr
    done = subprocess.run([sys.executable, "-m", "quill"], **options)
    programs = (REPO / "quill").glob("*.py")
    commands = [path.stem for path in programs if "\n    run_command(main)" in path.read_text()]
    assert done.returncode == 1 and len(commands) == 12
    assert all(f".{name}" in done.stderr for name in commands)


@pytest.mark.parametrize("script", ["prepare", "sample"])
def test_a_current_folder_that_is_gone_is_one_line(folder, script):
    gone = folder / "gone"
    gone.mkdir()
    started = f"cd {gone}; rmdir {gone}; {shlex.join(command_line(script, 'x'))}"
    done = subprocess.run(["sh", "-c", started], capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and is_one_error_line(done.stderr), done.stderr
    assert "the current folder: No such file" in done.stderr


@pytest.mark.parametrize("line", ["train.py", "prepare.py", "sample.py", "-m quill.plot"])
def test_an_environment_that_is_not_activated_is_one_line(folder, line):
    argv = [sys.executable, "-S", *(str(REPO / w) if ".py" in w else w for w in line.split())]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and is_one_error_line(done.stderr)
    assert "numpy and torch cannot be found" in done.stderr and "activate" in done.stderr


def test_preparing_loads_no_torch():
    probe = "import sys, prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], cwd=REPO).returncode == 0


def test_prepare_train_resume_sample(tiny, monkeypatch):
    """The whole way in real processes, in a folder that is not the checkout."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # which lacks some characters of the text
    first = command("train", *TINY, "--max_iters=3", "--sample_at_eval=100")
    assert (first.returncode, first.stderr) == (0, "")
    resumed = command("train", "--out_dir=out", "--init_from=resume", "--max_iters=6")
    assert resumed.returncode == 0 and "resuming after step 3 of 6" in resumed.stdout
    sampled = command("sample", "--out_dir=out", "--num_samples=1", "--max_new_tokens=20")
    assert sampled.returncode == 0 and len(sampled.stdout) > 20
    files = [".lock", "best.pt", "ckpt.previous.pt", "ckpt.pt", "metrics.jsonl"]
    assert sorted(p.name for p in Path("out").iterdir()) == files


def test_a_nanogpt_config_runs_unmodified(tiny, call):
    Path("train_shakespeare_char.py").write_text(NANOGPT_STYLE)
    assert call("train", "train_shakespeare_char.py")[0] == 0
    saved = torch.load("out-shakespeare-char/ckpt.pt", weights_only=True)
    assert saved["config"]["gradient_accumulation_steps"] == 2 and saved["step"] == 10


def test_an_out_dir_that_a_config_computes_is_one_folder(tiny, call):
    Path("computed.py").write_text("import time\nout_dir = 'out-' + str(time.time_ns())\n")
    assert call("train", *TINY, "computed.py", "--max_iters=1")[0] == 0
    [folder] = Path().glob("out-*")
    assert {".lock", "ckpt.pt", "metrics.jsonl"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_prints_the_resume_command(tiny, number):
    line = command_line("train", *TINY, "--max_iters=100000", "--log_interval=1")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options["env"] = environment()
    options["preexec_fn"] = lambda: signal.signal(number, signal.SIG_DFL)  # also under nohup
    with subprocess.Popen(line, **options) as run:
        while "step 5/" not in run.stdout.readline():
            pass
        run.send_signal(number)
        out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (128 + number, "")
    assert "python train.py --out_dir=out --init_from=resume" in out
    step = torch.load("out/ckpt.pt", weights_only=True)["step"]
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert step >= 5 and max(line["step"] for line in lines) == step


def test_a_reader_that_leaves_early(tiny, call):
    call("train", *TINY)
    options = {"shell": True, "capture_output": True, "env": environment()}
    line = f"{sys.executable} {REPO}/sample.py --num_samples=50 --device=cpu | head -c 20"
    done = subprocess.run(line, **options)
    assert done.stderr == b"" and len(done.stdout) == 20
    train = f"{sys.executable} {REPO}/train.py {' '.join(TINY)} --max_iters=5000 --log_interval=1"
    train += " --overwrite=true"
    done = subprocess.run(f"({train}; echo $? >code) | head -n 5", **options)
    assert b"\nerror: nobody reads" in done.stderr and Path("code").read_text() == "1\n"


# ---- wrong input: exit 2, one line, nothing lost ------------------------------------------------


def spoil_ids(name: str):
    path = Path(f"data/tiny/{name}.bin")
    path.write_bytes(b"\xff" * path.stat().st_size)
    sha256_of = json.loads(Path("data/tiny/meta.json").read_text())["sha256_of"]
    sha256_of[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_meta("data/tiny", sha256_of=sha256_of)


def flip_a_bit(path: str):
    data = bytearray(Path(path).read_bytes())
    data[len(data) // 2] ^= 16
    Path(path).write_bytes(data)


def only_checkpoint(data: bytes):
    Path("out/ckpt.pt").write_bytes(data)
    Path("out/ckpt.previous.pt").unlink()


def edit_checkpoint(change):
    saved = torch.load("out/ckpt.pt", weights_only=True)
    change(saved)
    checkpoint.save_checkpoint(Path("out/ckpt.pt"), saved)
    Path("out/ckpt.previous.pt").unlink(missing_ok=True)  # or the run goes on from there


def short_moment(saved):
    saved["optimizers"][0]["state"][0]["exp_avg"] = torch.zeros(2)


def no_moments(saved):
    saved["optimizers"][0]["state"] = {}


def odd_progress(saved):
    saved["progress"]["step"] = "6"


def no_best(saved):
    saved["progress"]["best_val_loss"] = float("nan")


def write(path: str, content: str | bytes):
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    ("argv", "damage", "complaint"),
    [
        (["--lerning_rate=1"], None, "--lerning_rate: no such option, did you mean learning_rate?"),
        (["bad.py"], lambda: write("bad.py", "n_layers = 3"), "bad.py: n_layers: no such option"),
        (["bad.py"], lambda: write("bad.py", "n_layer = '3'"), "n_layer: expected a whole number"),
        (["bad.py"], lambda: write("bad.py", "n_layer = (3"), "bad.py, line 1"),
        (["config/none.py"], None, "config/none.py: No such file"),
        (["data"], None, "data is a folder or pipe, no config file"),
        (["--n_layer=two"], None, "n_layer: expected a whole number, got 'two'"),
        (["--n_layer"], None, "--n_layer needs a value"),
        (["--n_embd=15"], None, "n_embd=15 is not divisible by n_head=2"),
        (["--position=rotary", "--n_embd=6"], None, "heads of 3"),
        (["--n_embd=1000000"], None, "parameters, which take"),
        (["--block_size=1999999"], None, "block_size=1999999 does not fit"),
        (["--block_size=3000"], None, "val.bin"),
        (["--dataset=other"], None, "python prepare.py other"),
        (["--dataset=../tiny"], None, "plain folder name"),
        ([], lambda: write("data/tiny/train.bin", b"abc"), "train.bin has 3 bytes"),
        ([], lambda: write("data/tiny/val.bin", b""), "val.bin has 0 bytes"),
        ([], lambda: Path("data/tiny/val.bin").unlink(), "val.bin is missing"),
        ([], lambda: write("data/tiny/meta.json", "{"), "not valid JSON"),
        ([], lambda: write("data/tiny/meta.json", "{}"), "does not describe a dataset"),
        ([], lambda: spoil_ids("val"), "val.bin: token id 65535 does not fit"),
        (
            [],
            lambda: edit_meta("data/tiny", vocab_size=3),
            "vocab_size=3, but its tokenizer has 30",
        ),
        ([], lambda: edit_meta("data/tiny", tokenizer={"kind": "morse"}), "no usable tokenizer"),
        (["--device=cuda:99"], None, "device=cuda:99: there is none here"),
        (["--device=cpu:7"], None, "device=cpu:7: there is none here"),
        (["--out_dir="], None, "out_dir=''"),
        (["--out_dir=../elsewhere"], None, "without '..'"),
        ([], lambda: flip_a_bit("data/tiny/train.bin"), "train.bin was changed or damaged"),
        ([], lambda: flip_a_bit("data/tiny/meta.json"), "meta.json"),
        (["--dropout=1.5"], None, "dropout=1.5"),
        (["--batch_size=0"], None, "batch_size=0"),
        (["--init_from=a\x1b[2Jb"], None, r"a\x1b[2Jb: there is no such file or folder"),
        (["--init_from=elsewhere"], None, "elsewhere: there is no such file or folder"),
    ],
)
def test_wrong_input_to_train(tiny, call, argv, damage, complaint):
    call("train", *TINY, "--max_iters=1")
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    if damage:
        damage()
    code, _, err = call("train", *TINY, "--overwrite=true", *argv)
    assert code == 2 and is_one_error_line(err) and complaint in err
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


@pytest.mark.parametrize(
    ("argv", "damage", "complaint"),
    [
        (["--out_dir=nowhere"], None, "nowhere/ckpt.pt is missing"),
        (["--n_layer=3", "--n_embd=32"], None, "n_layer is 2 there and 3 here, n_embd is 16"),
        (["--optimizer=muon"], None, "optimizer is 'adamw' there and 'muon' here"),
        (["--max_iters=3"], None, "max_iters=3 lies before step 6"),
        ([], lambda: only_checkpoint(b"PK\x03\x04 nonsense"), "out/ckpt.pt is damaged"),
        ([], lambda: only_checkpoint(Path("out/best.pt").read_bytes()), "optimizers"),
        ([], lambda: only_checkpoint(Path("out/ckpt.pt").read_bytes()[:5000]), "is damaged"),
        ([], lambda: edit_checkpoint(short_moment), "optimizer state does not fit"),
        ([], lambda: edit_checkpoint(no_moments), "optimizer state does not fit"),
        ([], lambda: edit_checkpoint(odd_progress), "progress.step has another type"),
        ([], lambda: edit_checkpoint(no_best), "progress is not possible"),
    ],
)
def test_wrong_input_to_resume(tiny, call, argv, damage, complaint):
    call("train", *TINY)
    if damage:
        damage()
    code, _, err = call("train", "--init_from=resume", *argv)
    assert code == 2 and is_one_error_line(err) and complaint in err


HOSTILE = {
    "BaseException": "raise BaseException('no')",
    "GeneratorExit": "raise GeneratorExit",
    "SystemExit": "raise SystemExit(0)",
    "a repr that raises": "class A:\n    __repr__ = None\nseed = A()",
    "a comparison that raises": "class A(int):\n    __eq__ = __lt__ = None\nseed = A(3)",
    "an endless recursion": "def f():\n    f()\nf()",
    "an exception that cannot be printed": "class E(Exception):\n    __str__ = None\nraise E",
}


@pytest.mark.parametrize("config", HOSTILE.values(), ids=HOSTILE)
def test_a_config_that_raises_anything_is_one_line(tiny, call, config):
    write("c.py", config)
    code, _, err = call("train", *TINY, "c.py")
    assert code == 2 and is_one_error_line(err) and "c.py" in err


@pytest.mark.parametrize("name", ["x" * 270, "loop", "loop/x", "text.txt/x"])
@pytest.mark.parametrize(
    ("script", "flag"),
    [
        *(("train", flag) for flag in ("", "--dataset=", "--out_dir=", "--init_from=", "--n")),
        *(("sample", flag) for flag in ("", "--out_dir=", "--init_from=", "--start=FILE:")),
        *(("prepare", flag) for flag in ("", "--input=", "--tokenizer=")),
    ],
)
def test_names_too_long_or_in_a_loop_are_one_line(tiny, call, script, flag, name):
    call("train", *TINY)
    Path("loop").symlink_to("loop")
    argv = {
        "train": [*TINY, "--overwrite=true"],
        "sample": [],
        "prepare": ["mine", "--input=text.txt", "--overwrite=true"],
    }[script]
    code, _, err = call(script, *argv, f"{flag}{name}")
    assert code == 2 and is_one_error_line(err)


@pytest.mark.parametrize("value", ["x", "", "0", "-1", "1.5", "\u0663", "9" * 20])
def test_a_world_size_that_is_no_number_is_one_line(tiny, call, monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    code, _, err = call("train", *TINY)
    assert code == 2 and is_one_error_line(err) and "WORLD_SIZE" in err


@pytest.mark.parametrize("rank", ["2", "x", ""])
@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK"])
def test_a_rank_beyond_the_processes_does_not_wait_for_them(tiny, call, monkeypatch, name, rank):
    for variable, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", name: rank}.items():
        monkeypatch.setenv(variable, value)
    code, _, err = call("train", *TINY)
    assert code == 2 and is_one_error_line(err) and "start it with torchrun" in err


def test_resume_on_another_text_is_refused(tiny, call):
    call("train", *TINY)
    write("other.txt", "completely different characters 0123456789 " * 30)
    call("prepare", "tiny", "--input=other.txt", "--overwrite=true")
    code, _, err = call("train", "--init_from=resume")
    assert code == 2 and "vocab_size is" in err and "another tokenizer and another text" in err
    argv = re.search(r"python prepare.py (.*?); its TEXT was text.txt", err)[1].split()
    assert argv == ["tiny", "--input=TEXT", "--tokenizer=out", "--overwrite=true"]
    assert call("prepare", *argv[:1], "--input=text.txt", *argv[2:])[0] == 0
    assert call("train", "--init_from=resume")[0] == 0


def test_resume_on_a_dataset_of_another_name_says_which_it_was(tiny, call):
    call("train", *TINY)
    write("other.txt", "completely different characters 0123456789 " * 30)
    call("prepare", "other", "--input=other.txt")
    code, _, err = call("train", "--init_from=resume", "--dataset=other")
    assert code == 2 and "leave --dataset out (the run's is 'tiny')" in err
    assert "prepare.py" not in err and "these options" not in err
    _, _, err = call("train", "--init_from=resume", "--dataset=other", "--n_layer=3")
    assert "leave --dataset out (the run's is 'tiny') and leave these options out" in err


def test_resume_on_a_changed_text_is_refused(tiny, call, text):
    call("train", *TINY)
    write("text.txt", text[::-1])
    call("prepare", "tiny", "--input=text.txt", "--overwrite=true")
    code, _, err = call("train", "--init_from=resume")
    assert code == 2 and "another text" in err


def test_resume_of_a_checkpoint_that_does_not_know_its_text(tiny, call):
    call("train", *TINY)
    edit_checkpoint(lambda saved: saved.pop("text_sha256"))
    code, _, err = call("train", "--init_from=resume")
    assert code == 2 and is_one_error_line(err) and "another text" in err


def test_an_error_from_a_real_process(folder):
    done = command("train", "--dataset=none")
    assert done.returncode == 2 and is_one_error_line(done.stderr) and done.stdout == ""


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tiny, call):
    Path("locked").mkdir(mode=0o500)
    code, _, err = call("train", *TINY, "--out_dir=locked/out")
    assert code == 2 and is_one_error_line(err) and "locked/out: Permission denied" in err


def test_an_out_dir_that_is_a_file(tiny, call):
    write("taken", "x")
    code, _, err = call("train", *TINY, "--out_dir=taken")
    assert code == 2 and is_one_error_line(err) and "taken: File exists" in err


@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt"])
def test_a_full_disk_ends_the_run_and_keeps_what_was_there(tiny, call, full_disk, name):
    call("train", *TINY)
    before = Path(f"out/{name}").read_bytes()
    full_disk(f"out/{name}")
    code, _, err = call("train", *TINY, "--init_from=resume", "--max_iters=9")
    assert code == 1 and is_one_error_line(err) and "No space left" in err and "out" in err
    assert Path(f"out/{name}").read_bytes() == before
