"""Several processes on one machine: the same run, one voice, and restarts that lose nothing."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import REPO, TINY, same_run

from quill.training import distributed
from quill.training.checkpoint import load_checkpoint

SAME = [*TINY, "--batch_size=4", "--gradient_accumulation_steps=4", "--log_interval=1"]
SAME += ["--learning_rate=1e-3", "--muon_learning_rate=5e-3"]
slow = pytest.mark.slow


def free_port() -> int:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def processes(n: int, *argv: str, program: list | None = None, pause=0, **more) -> list[str]:
    """Run train.py on n processes, without torchrun's own second of start-up; -> what each said.

    pause: seconds between their starts; more: environment variables.
    """
    line = [sys.executable, *(program or [REPO / "train.py"]), *argv]
    common = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)} | more
    runs = []
    for i in range(n):
        environment = os.environ | common | {"RANK": str(i), "LOCAL_RANK": str(i)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        runs.append(subprocess.Popen(line, env=environment, **pipes))
        time.sleep(pause)
    said = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0] * n, said
    assert all(err == "" for _, err in said), said
    return [out for out, _ in said]


def torchrun(*argv: str, **options) -> subprocess.Popen:
    line = [sys.executable, "-m", "torch.distributed.run", *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(line, env=environment, **pipes | options)


def workers(agent: subprocess.Popen) -> dict[int, int]:
    """-> process id by rank, of those that torchrun has started."""
    found = {}
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
    for pid in children.read_text().split() if children.exists() else []:
        with contextlib.suppress(OSError):
            names = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = [name[5:] for name in names if name.startswith(b"RANK=")]
            if rank:
                found[int(rank[0])] = int(pid)
    return found


def wait_for_steps(out_dir: str, n: int) -> None:
    """Until the metrics have n lines."""
    path, deadline = Path(out_dir, "metrics.jsonl"), time.monotonic() + 60
    while not path.exists() or path.read_text().count("\n") < n:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_nearly_equal(a: str, b: str) -> None:
    """Losses and weights, to 1e-6 of their size."""
    lines = [[*map(json.loads, Path(d, "metrics.jsonl").read_text().splitlines())] for d in (a, b)]
    for name in ("loss", "grad_norm", "val_loss", "train_loss"):
        values = [[line[name] for line in part if name in line] for part in lines]
        assert values[0] == pytest.approx(values[1], rel=1e-6) and len(values[0]) >= 3
    weights = [load_checkpoint(Path(d, "ckpt.pt"))["model"] for d in (a, b)]
    for name, expected in weights[0].items():
        assert (weights[1][name] - expected).norm() <= 1e-6 * expected.norm(), name


# ---- the same run ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "flags"),
    [
        # The rows of a micro-step are shared out, or else the micro-steps.
        (2, ["--optimizer=muon", "--average_decay=0.5", "--gradient_accumulation_steps=1"]),
        (4, ["--sample_at_eval=20", "--init_from=first"]),
        (2, ["--parallel=fsdp", "--average_decay=0.5", "--position=rotary"]),
    ],
)
def test_several_processes_make_the_run_of_one(tiny, call, n, flags):
    assert call("train", *SAME, "--max_iters=2", "--seed=7", "--out_dir=first")[0] == 0
    assert call("train", *SAME, *flags, "--out_dir=one")[0] == 0
    said = processes(n, *SAME, *flags, "--out_dir=several")
    assert f"on {n} processes" in said[0] and said[1:] == [""] * (n - 1), "the first alone speaks"
    assert_nearly_equal("one", "several")


def test_checkpoints_of_fsdp_and_of_one_process_are_the_same(tiny, call):
    flags = [*SAME, "--max_iters=9", "--average_decay=0.5"]
    call("train", *flags, "--out_dir=whole")
    sharded = ["--parallel=fsdp", "--lr_decay_iters=9"]
    processes(2, *flags, *sharded, "--max_iters=3", "--out_dir=parts")
    assert call("sample", "--out_dir=parts", "--max_new_tokens=5", "--num_samples=1")[0] == 0
    call("train", "--out_dir=parts", "--init_from=resume", "--max_iters=6")
    processes(2, *sharded, "--out_dir=parts", "--init_from=resume", "--max_iters=9")
    assert_nearly_equal("whole", "parts")


@slow
def test_evaluating_an_average_of_shards_does_not_touch_the_training(tiny):
    """Where nothing is saved, which would put the shards in order by itself."""
    flags = [*SAME, "--parallel=fsdp", "--average_decay=0.5", "--always_save_checkpoint=false"]
    flags += ["--learning_rate=0.3", "--decay_lr=false", "--max_iters=8"]
    processes(2, *flags, "--eval_interval=1", "--out_dir=often")
    processes(2, *flags, "--eval_interval=100", "--out_dir=rarely")
    often, rarely = (load_checkpoint(Path(d, "ckpt.pt"))["model"] for d in ("often", "rarely"))
    assert all(torch.equal(often[name], rarely[name]) for name in often)


def test_gradients_are_exchanged_once_a_step(tiny):
    probe = """
import sys, torch, train
from quill import settings
from quill.training import distributed
config = settings.load(train.TrainConfig, sys.argv[1:], usage="")
with distributed.session():
    distributed.init_process_group(torch.device("cpu"), "gloo")
    run, calls = train.setup(config), []
    def count(state, bucket):
        calls.append(bucket.buffer().numel())
        return torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(
            lambda done: done.value()[0])
    run.forward.register_comm_hook(None, count)
    for _ in range(3):
        train.train_step(run)
    n_numbers = sum(p.numel() for p in run.model.parameters())
    assert sum(calls) == 3 * n_numbers, (calls, n_numbers)
    print("counted")
    del run  # and with it the hook, which must not outlive the process group
"""
    assert processes(2, *SAME, program=["-c", probe]) == ["counted\n"] * 2


def test_one_clock_decides_when_all_save(tiny):
    """Where the other's says that it is never time."""
    probe = """
import os, sys, types, train
from quill.training import saving
if os.environ["RANK"] == "1":
    saving.time = types.SimpleNamespace(monotonic=lambda: 0.0)
sys.exit(train.main(sys.argv[1:]))
"""
    flags = [*SAME, "--checkpoint_seconds=1e-6", "--parallel=fsdp"]
    said = processes(2, *flags, program=["-c", probe])
    assert "done after step 6" in said[0]
    steps = [load_checkpoint(Path("out", f))["step"] for f in ("ckpt.previous.pt", "ckpt.pt")]
    assert steps == [3, 6]


# ---- one voice ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["uneven.py"], "by 2 processes; Muon needs whole matrices.*; sample_at_eval needs"),
        (["one_differs.py"], "process 1 of 2: config file one_differs.py, line 2"),
    ],
)
def test_a_failure_on_any_process_is_one_line(tiny, argv, complaint):
    uneven = "batch_size = 3\ngradient_accumulation_steps = 5\n"
    sharded = "parallel = 'fsdp'\noptimizer = 'muon'\nsample_at_eval = 1\n"
    Path("uneven.py").write_text(uneven + sharded)
    Path("one_differs.py").write_text("import os\nbias = [True][int(os.environ['RANK'])]\n")
    run = torchrun("--standalone", "--nproc_per_node=2", REPO / "train.py", "--dataset=tiny", *argv)
    said = run.communicate(timeout=60)[0]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert run.returncode == 1 and len(errors) == 1 and re.search(complaint, errors[0]), said
    assert 'train.py", line' not in said, "no traceback of ours among torchrun's report"


def test_processes_that_do_not_share_a_folder_are_refused(tiny, call):
    """One finds a checkpoint to continue from, the other none."""
    assert call("train", *SAME, "--out_dir=out0", "--max_iters=2")[0] == 0
    Path("apart.py").write_text("import os\nout_dir = 'out' + os.environ['RANK']\n")
    script = [REPO / "train.py", *SAME, "apart.py", "--init_from=auto"]
    said = torchrun("--standalone", "--nproc_per_node=2", *script).communicate(timeout=60)[0]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "does not hold the same checkpoint" in errors[0], said


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=slow)])
def test_a_signal_to_one_process_stops_and_saves_all(tiny, rank):
    flags = [*SAME, "--max_iters=100000", "--eval_interval=100000"]
    run = torchrun("--standalone", "--nproc_per_node=2", REPO / "train.py", *flags)
    wait_for_steps("out", 5)
    os.kill(workers(run)[rank], signal.SIGTERM)
    said = run.communicate(timeout=60)[0]
    assert said.count("SIGTERM: saved after step") == 1 and "error: " not in said, said
    step = load_checkpoint(Path("out/ckpt.pt"), for_resume=True)["step"]
    assert f"saved after step {step};" in said


@slow
def test_a_process_that_vanishes_is_told_once(tiny):
    flags = [*SAME, "--max_iters=100000", "--eval_interval=100000"]
    run = torchrun("--standalone", "--nproc_per_node=2", REPO / "train.py", *flags)
    wait_for_steps("out", 5)
    os.kill(workers(run)[1], signal.SIGKILL)
    said = run.communicate(timeout=60)[0]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) <= 1 and 'train.py", line' not in said, said  # torchrun may be the quicker


def test_torchruns_variables_without_torchrun(tiny, call, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call("train", *TINY)
    assert code == 2 and err.count("error: ") == 1 and "start it with torchrun" in err


def test_who_is_waited_for_is_said_and_not_without_end(tiny, call, monkeypatch):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"} | place).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "SILENT_SECONDS", 0.1)
    monkeypatch.setattr(distributed, "START_TIMEOUT_SECONDS", 1)
    code, _, err = call("train", *TINY)
    note, error = err.splitlines()
    assert note == f"process 1 of 2 waits for process 0 at 127.0.0.1:{place['MASTER_PORT']}"
    assert code == 1 and error.startswith("error: process 1 of 2:") and "timed out" in error.lower()


def test_a_rank_alone_means_nothing(tiny, call, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert call("train", *TINY)[0] == 0 and Path("out/ckpt.pt").exists()


# ---- restarts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "n_kills"), [(2, 1), pytest.param(2, 20, marks=slow), pytest.param(4, 10, marks=slow)]
)
def test_a_killed_process_is_restarted_and_nothing_is_lost(tiny, n, n_kills):
    rng = random.Random(n)
    n_steps = 60 + 40 * n_kills
    flags = [*SAME, f"--max_iters={n_steps}", "--eval_interval=5", "--dropout=0.1"]
    processes(n, *flags, "--out_dir=whole")
    script = [REPO / "train.py", *flags, "--init_from=auto", "--out_dir=parts"]
    run = torchrun("--standalone", f"--nproc_per_node={n}", f"--max-restarts={n_kills}", *script)
    for kill in range(n_kills):
        wait_for_steps("parts", 12 + 20 * kill)
        time.sleep(rng.uniform(0, 0.3))
        while len(before := workers(run)) < n:
            assert run.poll() is None
        os.kill(before[rng.randrange(n)], signal.SIGKILL)
        while run.poll() is None and set(workers(run).values()) & set(before.values()):
            time.sleep(0.05)
    said = run.communicate(timeout=200)[0]
    assert run.returncode == 0, said
    assert 1 <= said.count("resuming after step") <= n_kills, "some are killed while starting"
    same_run("whole", "parts")
    print(f"\n{n} processes, {n_kills} of them killed: the weights are those of the run left alone")


@slow
def test_processes_do_not_take_the_addresses_of_those_before_them(tiny):
    """torchrun keeps its store when it restarts them; the second of the new ones comes late."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for pause in (0, 1):
        said = processes(2, *SAME, pause=pause, **place)
        assert "done after step 6" in said[0]


@slow
def test_two_machines_work_as_one(tiny):
    """Two agents that meet at one address, one process each."""
    processes(2, *SAME, "--out_dir=whole")
    place = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=quill"]
    place += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--local_addr=127.0.0.1"]
    runs = [torchrun(*place, REPO / "train.py", *SAME, "--out_dir=parts") for _ in range(2)]
    said = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert sum("done after step 6" in out for out in said) == 1
    same_run("whole", "parts")
