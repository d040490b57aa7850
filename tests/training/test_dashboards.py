"""What TensorBoard and Weights & Biases are sent, read back from the files that they keep."""

from __future__ import annotations

import dataclasses
import json
import struct
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from helpers import TINY, is_one_error_line

from quill import settings
from train import TrainConfig

FLAGS = ["--sample_at_eval=30", "--log_interval=1"]


def metrics() -> list[dict]:
    """The lines as dashboards should show them: no nulls, and no two values of a name at a step."""
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    for evaluation in (line for line in lines if "val_loss" in line):
        evaluation["next_lr"] = evaluation.pop("lr")
    names = [(line["step"], name) for line in lines for name in line if name != "step"]
    assert len(set(names)) == len(names)
    return [{k: v for k, v in line.items() if v is not None} for line in lines]


# ---- TensorBoard -------------------------------------------------------------------------------


def in_tensorboard() -> dict[str, list[tuple]]:
    """-> by name, what it shows: (step, number or text)."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    written = EventAccumulator("out/tensorboard", {"tensors": 0})  # 0: all of them
    written.Reload()
    shown = defaultdict(list)
    for name in written.Tags()["tensors"]:
        for event in written.Tensors(name):
            tensor = event.tensor_proto
            value = tensor.float_val[0] if tensor.float_val else tensor.string_val[0].decode()
            if name.endswith("/text_summary"):
                value = value.removeprefix("    ").replace("\n    ", "\n")
            shown[name.removesuffix("/text_summary")].append((event.step, value))
    return shown


def by_name(lines: list[dict]) -> dict[str, list[tuple]]:
    """The same of metrics, in TensorBoard's precision."""
    expected = defaultdict(list)
    for line in lines:
        for name in line.keys() - {"step"}:
            value = line[name] if name == "sample" else float(np.float32(line[name]))
            expected[name].append((line["step"], value))
    return expected


def test_tensorboard_has_the_metrics_the_config_and_the_samples(tiny, call):
    argv = [*TINY, *FLAGS, "--tensorboard_log=true"]
    assert call("train", *argv)[0] == 0
    shown, expected = in_tensorboard(), by_name(metrics())
    [(_, config)] = shown.pop("config")
    assert shown == expected and [step for step, _ in shown["sample"]] == [0, 3, 6]
    values = dataclasses.asdict(settings.load(TrainConfig, argv, usage=""))
    assert config.splitlines() == [f"{name} = {value!r}" for name, value in values.items()]


def test_tensorboard_shows_no_step_of_a_resumed_run_twice(tiny, call):
    """As if it had been killed after step 6, with its last checkpoint at step 3."""
    call("train", *TINY, *FLAGS, "--tensorboard_log=true", "--seed=2")
    call("train", *TINY, *FLAGS, "--tensorboard_log=true")
    for path in Path("out/tensorboard").iterdir():  # read in the order of their names
        path.rename(path.with_name(f"events.out.tfevents.{int(path.suffix[1:]):09}"))
    Path("out/ckpt.previous.pt").replace("out/ckpt.pt")
    assert call("train", "--init_from=resume", "--max_iters=7")[0] == 0
    shown = in_tensorboard()
    assert [step for step, _ in shown.pop("config")] == [0, 4]
    assert shown == by_name(metrics()) and [step for step, _ in shown["sample"]] == [0, 3, 6, 7]


# ---- Weights & Biases --------------------------------------------------------------------------


def records(path: Path):
    """A run's file: 7 bytes, then blocks of 32 kB, in which a record may be cut into parts."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    while at < len(data):
        at += -at % 2**15 if -at % 2**15 < 7 else 0  # no part begins where its head does not fit
        _, n_bytes, part = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + n_bytes]
        at += 7 + n_bytes
        if part in (1, 4):  # whole, or the last of several
            yield Record.FromString(record)
            record = b""


def in_wandb() -> dict[str, tuple]:
    """-> by name of the run: its config, its rows, its exit codes."""
    runs = {}
    for path in Path().glob("*/wandb/offline-run-*/run-*.wandb"):
        parts = defaultdict(list)
        for record in records(path):
            kind = record.WhichOneof("record_type")
            parts[kind].append(getattr(record, kind))
        [run], [metric] = parts["run"], parts["metric"]
        assert (metric.glob_name, metric.step_metric) == ("*", "step")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        rows = [
            {i.nested_key[0]: json.loads(i.value_json) for i in r.item} for r in parts["history"]
        ]
        shown = [{k: v for k, v in row.items() if k[0] != "_"} for row in rows]
        runs[run.display_name] = config, shown, [end.exit_code for end in parts["exit"]]
    return runs


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.delenv("WANDB_DIR", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", "cache")


def test_wandb_has_the_metrics_the_config_and_the_samples(tiny, call, offline, monkeypatch):
    argv = [*TINY, *FLAGS, "--wandb_log=true", "--wandb_run_name=first"]
    assert call("train", *argv)[0] == 0
    Path("elsewhere").mkdir()
    monkeypatch.setenv("WANDB_DIR", "elsewhere")
    failing = ["--wandb_run_name=second", "--max_iters=12", "--learning_rate=1e30", "--min_lr=1e30"]
    assert call("train", "--init_from=resume", *failing)[0] == 1
    sys.modules["wandb"].teardown()

    runs, expected = in_wandb(), metrics()
    config, rows, exit_codes = runs["first"]
    assert rows == [line for line in expected if line["step"] <= 6] and exit_codes == [0]
    assert sum("sample" in row for row in rows) == 3
    values = dataclasses.asdict(settings.load(TrainConfig, argv, usage=""))
    assert {name: config[name] for name in values} == values
    _, rows, exit_codes = runs["second"]
    assert rows == [line for line in expected if line["step"] > 6] != [] and exit_codes == [1]
    assert len([*Path("out").rglob("*.wandb")]) == len([*Path("elsewhere").rglob("*.wandb")]) == 1


def test_what_wandb_refuses_is_one_line(tiny, call, offline):
    code, _, err = call("train", *TINY, "--wandb_log=true", "--wandb_project=a/b")
    assert code == 2 and is_one_error_line(err) and "Invalid project name" in err


@pytest.mark.parametrize("module", ["wandb", "tensorboard"])
def test_a_missing_extra_names_its_install_command(tiny, call, offline, monkeypatch, module):
    call("train", *TINY)
    before = {path: path.read_bytes() for path in Path("out").rglob("*")}
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    flags = ["--wandb_log=true", "--tensorboard_log=true", "--overwrite=true"]
    code, _, err = call("train", *TINY, *flags)
    assert code == 2 and is_one_error_line(err) and "pip install '.[track]'" in err
    assert {path: path.read_bytes() for path in Path("out").rglob("*")} == before
