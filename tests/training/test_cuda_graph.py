"""A step as it is recorded for CUDA graphs, with the recording itself left out."""

from __future__ import annotations

import pytest
import torch
from helpers import TINY

import train
from quill import settings
from quill.errors import InputError
from quill.training.checks import pick_cuda_graph
from quill.training.cuda_graph import Recorded

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def new_run(*flags: str) -> train.Run:
    return train.setup(settings.load(train.TrainConfig, [*TINY, *flags], usage=""))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_to_be_recorded_make_the_run_of_plain_ones(tiny, monkeypatch, optimizer):
    flags = [f"--optimizer={optimizer}", "--dropout=0.2", "--average_decay=0.9"]
    plain = new_run(*flags)
    monkeypatch.setattr(train.checks, "pick_cuda_graph", lambda *options: True)
    monkeypatch.setattr(train, "Recorded", lambda work, device: Recorded(work, None))
    recorded = new_run(*flags)
    rates = [group["lr"] for o in recorded.optimizers for group in o.param_groups]
    assert all(torch.is_tensor(rate) for rate in rates)
    for _ in range(6):
        results = [train.train_step(run) for run in (plain, recorded)]
        assert torch.allclose(torch.stack(results[0]), torch.stack(results[1]), atol=1e-6)
    for part in (lambda run: run.model.parameters(), lambda run: run.ema.average):
        pairs = zip(part(plain), part(recorded), strict=True)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in pairs)
    used = [group["lr"].item() for o in recorded.optimizers for group in o.param_groups]
    expected = [group["lr"] for o in plain.optimizers for group in o.param_groups]
    assert used == pytest.approx(expected), "the rate of the last step, in the same tensors"
    assert all(a is group["lr"] for a, group in zip(rates, groups(recorded), strict=True))


def groups(run: train.Run):
    return [group for optimizer in run.optimizers for group in optimizer.param_groups]


def test_a_step_reads_its_number_from_the_device(tiny):
    """A replay repeats Python's numbers of the first step, so none may count."""
    run = new_run("--average_decay=0.9", "--skip_nonfinite=3")
    batch = train.get_batch(run, 0)
    averages = []
    for step in (0, 5):
        run.ema.restart()
        run.step_number.fill_(step)
        train.update_weights(run, *batch)
        weights = [*run.model.parameters()]
        averages.append(
            max((a - w).abs().max() for a, w in zip(run.ema.average, weights, strict=True))
        )
    assert averages[0] < 0.5 * averages[1], "the average's decay starts low"
    run.step_number.fill_(7)
    run.guard.record(torch.tensor(float("nan")), torch.tensor(1.0), run.step_number)
    assert run.guard.bad_steps.tolist() == [8, 0, 0, 0]


def test_where_steps_are_recorded(monkeypatch):
    assert pick_cuda_graph("auto", GPU, torch.bfloat16) and pick_cuda_graph(
        True, GPU, torch.float32
    )
    assert not pick_cuda_graph(False, GPU, torch.bfloat16)
    assert not pick_cuda_graph("auto", CPU, torch.bfloat16)
    assert not pick_cuda_graph("auto", GPU, torch.float16)
    for device, dtype in ((CPU, torch.float32), (GPU, torch.float16)):
        with pytest.raises(InputError, match="cuda_graph=true"):
            pick_cuda_graph(True, device, dtype)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not pick_cuda_graph("auto", GPU, torch.bfloat16)
    with pytest.raises(InputError, match="one process"):
        pick_cuda_graph(True, GPU, torch.bfloat16)
