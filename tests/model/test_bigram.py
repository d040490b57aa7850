"""The baseline: a table, trained, saved and sampled like any model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import TINY, is_one_error_line

from model import generate
from quill.data import dataset_files
from quill.interop import pretrained
from quill.training.devices import refuse_larger_than_memory
from quill.training.models import Bigram, BigramConfig

FLAGS = [*TINY, "--model=bigram"]


def test_only_the_last_token_counts():
    model = Bigram(BigramConfig(block_size=4, vocab_size=5))
    idx = torch.tensor([[1, 2, 3], [4, 0, 3]])
    assert model(idx, idx)[1].item() == pytest.approx(math.log(5))
    torch.nn.init.normal_(model.table.weight)
    logits, _ = model(idx)
    assert (logits[0, 2] == logits[1, 2]).all() and (logits[0, 1] != logits[1, 1]).any()
    assert (model(idx, last_only=True)[0] == logits[:, -1:]).all()
    noise = [torch.tensor([u, u]) for u in (0.1, 0.5, 0.9, 0.3, 0.7, 0.2)]
    uniform = iter(noise).__next__
    a, b = torch.stack(
        [*generate(model, idx, 6, uniform=uniform)]
    ).T  # past the block size, without a cache
    assert (a == b).all()


def test_training_ends_where_counting_does(tiny, call):
    flags = ["--max_iters=300", "--eval_interval=300", "--batch_size=32", "--weight_decay=0.05"]
    assert call("train", *FLAGS, *flags, "--learning_rate=0.1", "--min_lr=0")[0] == 0
    _, data = dataset_files.read(Path("data/tiny"))
    train, val = (torch.from_numpy(data[name].astype("int64")) for name in dataset_files.SPLITS)
    counts = torch.full((30, 30), 0.01)  # a little for pairs that were never seen
    counts.index_put_((train[:-1], train[1:]), torch.ones(()), accumulate=True)
    log_probs = (counts / counts.sum(dim=1, keepdim=True)).log()
    floor = -log_probs[val[:-1], val[1:]].mean().item()
    last = json.loads(Path("out/metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_loss"] == pytest.approx(floor, abs=0.02)
    assert call("sample", "--num_samples=2", "--max_new_tokens=30", "--device=cpu")[0] == 0
    loaded = pretrained.load("out")
    assert isinstance(loaded.build(), Bigram) and isinstance(loaded.config, BigramConfig)
    code, out, _ = call("train", "--out_dir=out", "--init_from=resume", "--max_iters=301")
    assert code == 0 and "resuming after step 300" in out
    start = ["--init_from=out", "--out_dir=more", "--dataset=tiny", "--max_iters=0"]
    assert call("train", *start, "--block_size=8", "--device=cpu")[0] == 0
    begun = pretrained.load("more").weights["table.weight"]
    assert (begun == pretrained.from_run(Path("out/best.pt")).weights["table.weight"]).all()
    code, _, err = call("train", *start, "--vocab_multiple=64", "--out_dir=padded")
    assert code == 2 and is_one_error_line(err) and "vocab_size is 30 there and 64 here" in err


def test_what_a_bigram_cannot_do_is_refused(tiny, call):
    pytest.importorskip("matplotlib")
    assert call("train", *FLAGS, "--max_iters=1")[0] == 0
    code, _, err = call("export", "dest")
    assert code == 2 and is_one_error_line(err) and "model='bigram'" in err
    assert call("plot", "--pictures=surprise")[0] == 0
    for picture in ("attention", "neighbours"):
        code, _, err = call("plot", f"--pictures={picture}")
        assert code == 2 and is_one_error_line(err) and "bigram" in err
    assert call("plot")[0] == 0 and not Path("out/attention.png").exists()


def test_a_table_too_large_is_refused(tiny, call, monkeypatch):
    with pytest.raises(Exception, match=r"a vocabulary of 10\^9 make"):
        refuse_larger_than_memory(10**18, "a vocabulary of 10^9", torch.device("cpu"))
    code, _, err = call("train", *FLAGS, "--vocab_multiple=1000000")
    assert code == 2 and is_one_error_line(err)
    assert "a vocabulary of 1,000,000 make 1,000,000,000,000 parameters" in err
