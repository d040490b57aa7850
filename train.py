"""Train a GPT: the command and its options. The training itself is trainer.py's.

Usage:
    python train.py config/shakespeare_char.py [--key=value ...]
    python train.py --out_dir=out --init_from=resume
    python train.py config/finetune_shakespeare.py --init_from=gpt2
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from quill import settings
from quill.errors import InputError, run_command
from quill.files import dataset_folder, file_lock, run_folder
from quill.settings import DType, option

if TYPE_CHECKING:
    from quill.interop.pretrained import Pretrained
    from quill.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Every option of a run, under nanoGPT's name where it has the option."""

    # files and reporting
    out_dir: str = option("out", "folder for checkpoints and metrics")
    dataset: str = option("openwebtext", "folder below data/ with train.bin, val.bin, meta.json")
    init_from: str = option(
        "scratch",
        "scratch; resume: go on from ckpt.pt; auto: go on if it is there, else as a config file "
        "says; or weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path to those of a run, "
        "of nanoGPT, of Hugging Face",
    )
    eval_interval: int = option(2000, "steps between evaluations", min=1)
    eval_iters: int = option(
        200, "windows for the train loss, and for a large val split", min=1, max=10**6
    )
    sample_at_eval: int = option(
        0, "tokens of text to generate at each evaluation; 0: none", min=0, max=10**6
    )
    eval_only: bool = option(False, "evaluate once, print and stop; writes nothing")
    log_interval: int = option(1, "steps between log lines", min=1)
    always_save_checkpoint: bool = option(True, "save ckpt.pt also when val loss did not improve")
    patience: int = option(0, "stop after so many evaluations without a new best; 0 never", min=0)
    wandb_log: bool = option(False, "log to Weights & Biases (needs the 'track' extra)")
    wandb_project: str = option("quill", "its project")
    wandb_run_name: str = option("gpt", "its run name")
    tensorboard_log: bool = option(False, "log to out_dir/tensorboard (needs the 'track' extra)")
    # data
    batch_size: int = option(12, "windows in a micro-step", min=1, max=10**6)
    block_size: int = option(1024, "tokens in a window: the longest context", min=1)
    gradient_accumulation_steps: int = option(
        40, "micro-steps summed into one step", min=1, max=10**6
    )
    # model
    model: Literal["gpt", "bigram"] = option("gpt", "bigram: the baseline, only the last token")
    n_layer: int = option(12, "blocks", min=1, max=10**4)
    n_head: int = option(12, "attention heads in a block", min=1)
    n_embd: int = option(768, "width of the residual stream", min=1, max=10**6)
    dropout: float = option(0.0, "share of activations dropped in training", min=0, max=0.99)
    bias: bool = option(False, "biases in linear layers and LayerNorm, as in GPT-2")
    position: Literal["learned", "rotary"] = option("learned", "how order is told")
    norm: Literal["layernorm", "rmsnorm"] = option("layernorm", "normalisation")
    qk_norm: bool = option(False, "normalise queries and keys")
    mlp: Literal["gelu", "gelu_tanh", "relu", "relu2", "swiglu"] = option("gelu", "activation")
    tied_head: bool = option(True, "the output matrix is the token embedding")
    residual_init: Literal["scaled", "zero"] = option("scaled", "start of residual projections")
    init_std: float = option(0.02, "deviation of the first weights", min=1e-6, max=1)
    vocab_multiple: int = option(1, "round the model's vocabulary up to it", min=1, max=10**6)
    # optimizer
    optimizer: Literal["adamw", "muon"] = option("adamw", "muon: for the blocks' matrices alone")
    learning_rate: float = option(6e-4, "highest rate of AdamW", min=0)
    muon_learning_rate: float = option(0.02, "highest rate of Muon", min=0)
    muon_momentum: float = option(0.95, "Muon's memory of gradients", min=0, max=0.9999)
    max_iters: int = option(600000, "optimizer updates to make", min=0)
    weight_decay: float = option(0.1, "decay of matrices, times the rate", min=0)
    beta1: float = option(0.9, "AdamW's memory of gradients", min=0, max=0.9999)
    beta2: float = option(0.95, "AdamW's memory of their squares", min=0, max=0.9999)
    grad_clip: float = option(1.0, "longest gradient (L2 norm); 0 does not clip", min=0)
    skip_nonfinite: int = option(
        0, "updates that may be skipped for a loss or gradient not finite", min=0, max=10**4
    )
    average_decay: float = option(
        0.0,
        "evaluate and keep in best.pt a running average of the weights; 0: the latest",
        min=0,
        max=0.99999,
    )
    # learning rate
    decay_lr: bool = option(True, "false keeps the rate constant")
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = option(
        "cosine", "shape after warm-up; wsd: flat, then a linear fall"
    )
    warmup_iters: int = option(2000, "steps of linear warm-up", min=0)
    lr_decay_iters: int = option(0, "step where min_lr is reached; 0: max_iters", min=0)
    min_lr: float = option(6e-5, "lowest rate after decay", min=0)
    wsd_decay_share: float = option(0.2, "share of the steps in wsd's final fall", min=0, max=1)
    # machine
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: DType = option("auto", "format of matrix products")
    compile: bool | Literal["auto"] = option("auto", "torch.compile; auto: on CUDA")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs"] = option(
        "default", "of torch.compile; reduce-overhead records CUDA graphs"
    )
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "many processes: each has all of the model, or its part of each tensor"
    )
    backend: Literal["nccl", "gloo"] = option("nccl", "many processes: of GPUs; CPUs use gloo")
    deterministic: bool = option(False, "only repeatable GPU kernels: slower, resumes bit for bit")
    seed: int = option(1337, "of weights, data order and dropout", min=0, max=2**32 - 1)

    @property
    def tokens_per_step(self) -> int:
        return self.gradient_accumulation_steps * self.batch_size * self.block_size


def main(argv: list[str]) -> int:
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return run(argv)
    from quill.training import distributed

    with distributed.together():
        return run(argv)


def run(argv: list[str]) -> int:
    config = settings.load(TrainConfig, argv, usage=__doc__)
    folder = run_folder(config.out_dir)
    # Here, not at the top: torch takes a second, --help and typos should not.
    from quill.training import devices, distributed

    sys.stdout.reconfigure(errors="replace")  # a sample may have characters that it lacks
    with contextlib.ExitStack() as stack:
        if distributed.is_main() and not config.eval_only:
            stack.enter_context(file_lock(folder))
        with devices.out_of_memory_advice("lower n_embd or n_layer"):
            trainer = make_trainer(argv, config, folder)
        advice = (
            f"halve batch_size={trainer.config.batch_size} and double "
            "gradient_accumulation_steps, which trains the same, or lower block_size, n_embd or "
            "n_layer"
        )
        with devices.out_of_memory_advice(advice):
            return trainer.run()


def make_trainer(argv: list[str], config: TrainConfig, folder: Path) -> Trainer:
    """A new run, or one that goes on; on several processes, with the first one's options."""
    from quill.training import devices, distributed
    from quill.training.trainer import Trainer

    saved = start = base = None
    if distributed.is_main():
        saved = load_saved(folder, config)
        start = None if saved is not None else load_start(argv, config, folder)
    # What the command line does not say is as the run had it, or as the weights need it.
    if saved is not None:
        base = saved["config"] | {"out_dir": config.out_dir}  # the folder may have been moved
    elif start is not None:
        base = start.options()
    if base is not None:
        config = settings.load(TrainConfig, argv, usage=__doc__, base=base)
    config = TrainConfig(**distributed.tell(dataclasses.asdict(config)))
    distributed.connect(devices.pick_device(config.device), config.backend)
    return Trainer(config, distributed.share(saved), start)


def load_saved(folder: Path, config: TrainConfig) -> dict | None:
    """The checkpoint to continue from, None for a new run."""
    from quill.training import checkpoint

    goes_on = config.init_from == "auto" and checkpoint.can_resume(folder)
    if config.init_from == "resume" or goes_on:
        return checkpoint.load_latest(folder, may_move=not config.eval_only)
    return None


def load_start(argv: list[str], config: TrainConfig, folder: Path) -> Pretrained | None:
    """The weights that a new run starts from, None for new ones."""
    source = config.init_from
    if source == "auto":  # there is nothing to continue: as the config files say
        files = settings.config_files(TrainConfig, argv)
        source = settings.load(TrainConfig, files, usage=__doc__).init_from
    if source in ("scratch", "auto"):
        return None
    if folder.resolve() in (Path(source).resolve(), Path(source).resolve().parent):
        raise InputError(
            f"out_dir={config.out_dir}: the run would write over {source}, which it starts from; "
            "choose another folder, or --init_from=resume to go on with that run"
        )
    from quill.data import dataset
    from quill.interop import pretrained

    if source in pretrained.RELEASES:
        dataset.read(dataset_folder(config.dataset))  # before gigabytes are fetched for nothing
    return pretrained.load(source)


if __name__ == "__main__":
    run_command(main)
