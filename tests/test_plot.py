from __future__ import annotations

from pathlib import Path

import pytest
from conftest import TINY, is_one_error_line


def test_loss_curve(tiny, call):
    image = pytest.importorskip("matplotlib.image")
    call("train", *TINY)
    with Path("out/metrics.jsonl").open("a") as file:  # of an update that was skipped
        file.write('{"step": 6, "skipped": 1}\n{"step": 6, "loss": null, "grad_norm": null}\n')
    code, out, err = call("plot", "--out_dir=out")
    assert (code, out, err) == (0, "wrote out/loss.png\n", "")
    pixels = image.imread("out/loss.png")[..., :3]
    orange = (abs(pixels - [1.0, 0.498, 0.055]) < 0.02).all(axis=-1)
    assert orange.sum() > 100, "the val curve is on it"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "check --out_dir"),
        ("{", "line 1: not a line of metrics"),
        ("7", "line 1"),
        ("[" * 100_000, "line 1"),
        ('{"step": 1, "loss": 2.0}\n{"step": "a", "loss": 2.0}', "line 2"),
        ('{"step": 1, "train_loss": 1.0, "val_loss": [2]}', "line 1"),
        ("", "no evaluation yet"),
    ],
)
def test_nothing_to_draw(folder, call, content, complaint):
    Path("out").mkdir()
    if content is not None:
        Path("out/metrics.jsonl").write_text(content)
    code, _, err = call("plot")
    assert code == 2 and is_one_error_line(err) and complaint in err
