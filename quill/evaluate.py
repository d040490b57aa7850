"""Evaluate weights on a whole val split: nats per token, bits per byte or answers that are right.

Usage:
    python -m quill.evaluate --out_dir=out                      on the dataset it was trained on
    python -m quill.evaluate --out_dir=out --dataset=mine       on another one of the same tokenizer
    python -m quill.evaluate --out_dir=out-a,out-b,out-c        the mean of their probabilities
    python -m quill.evaluate --init_from=gpt2 --dataset=shakespeare
"""

import quill.startup  # noqa: F401, I001  first, for Ctrl-C during the imports below
import dataclasses
import time

from quill import settings
from quill.errors import InputError, run_command
from quill.interop import ensemble, pretrained
from quill.interop.for_sampling import INIT_FROM, OUT_DIR
from quill.settings import DType, option
from quill.training import checks, devices
from quill.training.evaluation import evaluate_split
from quill.training.splits import open_splits


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    out_dir: str = option(*OUT_DIR)
    init_from: str = option(*INIT_FROM)
    dataset: str = option("", "folder below data/; if empty, the one it was trained on")
    batch_size: int = option(12, "windows at a time", min=1, max=10**6)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: DType = option("auto", "dtype of matrix products")


def main(argv: list[str]) -> int:
    config = settings.load(EvaluateConfig, argv, usage=__doc__)
    device = devices.pick_device(config.device)
    dtype = devices.pick_dtype(config.dtype, device)
    is_run = config.init_from == "resume"
    name = config.out_dir if is_run else config.init_from
    loaded = ensemble.from_folders(name) if is_run else pretrained.load(name)
    dataset = config.dataset or loaded.dataset
    if not config.dataset and any(part.dataset != dataset for _, part in loaded.parts(name)):
        raise InputError(f"{name} were trained on several datasets: give --dataset=NAME")
    if not dataset:
        raise InputError(f"{name} does not say what it was trained on: give --dataset=NAME")
    with devices.out_of_memory_advice(f"lower batch_size={config.batch_size}"):
        model = loaded.build().eval().to(device)
        data = open_splits(dataset, model.config.block_size, device)
        checks.check_tokenizer(dataset, data, loaded, name)
        checks.note_replaced_text(dataset, data, loaded, name)
        started = time.perf_counter()
        whole = data.val.eval_offsets(0, whole=True)
        loss, exact = evaluate_split(model, data.val, whole, config.batch_size, dtype)
    seconds = time.perf_counter() - started
    scores = f"val loss {loss:.4f}, "
    if data.val.examples is None:
        scores += f"val bpb {data.val_bpb(loss):.4f}"
    else:  # where only answers carry loss, bits per byte mean nothing
        scores += f"{exact:.2%} of the answers right"
    size = model.config.block_size
    print(f"{name} on {dataset}: {scores}, in windows of {size}, in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    run_command(main)
