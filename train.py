"""Train a GPT.

Usage:
    python train.py config/shakespeare_char.py [--key=value ...]
    python train.py --out_dir=out --init_from=resume
    python train.py config/finetune_shakespeare.py --init_from=gpt2
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py
"""

import quill.startup  # noqa: F401, I001  first, for Ctrl-C during the imports below
import contextlib
import dataclasses
import functools
import math
from pathlib import Path
from typing import Literal

import torch

from model import GPT, GPTConfig
from quill import settings
from quill.data import dataset, tokenizers
from quill.errors import EXIT_DONE, RunError, Stopped, run_command, stop_signals
from quill.files import file_lock
from quill.interop.distill import Teacher
from quill.interop.pretrained import Pretrained
from quill.interop.start import find_start
from quill.sampling.decoder import Decoder
from quill.sampling.text import SampleOptions, stream_text
from quill.settings import DType, option
from quill.training import checkpoint, checks, devices, distributed, lora, run_folder, state_dict
from quill.training.checkpoint import Progress
from quill.training.cuda_graph import Recorded
from quill.training.ema import EMA
from quill.training.evaluation import evaluate_split
from quill.training.log import Logger, NullLogger, StepTimer, evaluation_text
from quill.training.models import Bigram, build, config_from_options
from quill.training.nonfinite import LossScaler, NonFiniteGuard
from quill.training.optimizers import OptimizerOptions, get_lr, make_optimizers, set_lr
from quill.training.saving import Saver
from quill.training.splits import Splits, open_splits

# ---- options -----------------------------------------------------------------------------------

# n_layer, block_size and so on: the fields of GPTConfig, but for vocab_size, which the dataset
# decides. As in nanoGPT, bias is off unless it is asked for.
ModelOptions = settings.options_of(GPTConfig, leave_out=("vocab_size",), bias=False)


@dataclasses.dataclass(frozen=True)
class TrainConfig(OptimizerOptions, ModelOptions):
    """Every option of a run, with nanoGPT's name where it has the option.

    The model's are in model.GPTConfig; those of updates, their number and rate in optimizers.py.
    """

    # files and reporting
    out_dir: str = option("out", "folder for checkpoints and metrics")
    dataset: str = option("openwebtext", "folder below data/ with train.bin, val.bin, meta.json")
    init_from: str = option(
        "scratch",
        "scratch; resume: continue from ckpt.pt; auto: continue if it exists, else as a config "
        "file says; or weights: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a path to those of a "
        "run, of nanoGPT, of Hugging Face",
    )
    overwrite: bool = option(False, "start anew in a folder that has a run; moves it to previous-N")
    eval_interval: int = option(2000, "steps between evaluations", min=1)
    eval_iters: int = option(200, "windows for train loss, and for a large val", min=1, max=10**6)
    sample_at_eval: int = option(0, "tokens to sample per evaluation; 0: none", min=0, max=10**6)
    eval_only: bool = option(False, "evaluate once, print and stop; writes nothing")
    log_interval: int = option(1, "steps between log lines", min=1)
    checkpoint_seconds: float = option(180.0, "between saves, at evaluations; 0: at each", min=0)
    always_save_checkpoint: bool = option(True, "save ckpt.pt also when val loss did not improve")
    patience: int = option(0, "stop after so many evaluations without a new best; 0 never", min=0)
    wandb_log: bool = option(False, "log to Weights & Biases (needs the 'track' extra)")
    wandb_project: str = option("quill", "its project")
    wandb_run_name: str = option("gpt", "its run name")
    tensorboard_log: bool = option(False, "log to out_dir/tensorboard (needs the 'track' extra)")
    distill_from: str = option("", "learn also from the model in this folder; a,b,c: their mean")
    distill_weight: float = option(0.5, "the teacher's part in the loss", min=0, max=1)
    # data
    batch_size: int = option(12, "windows in a micro-step", min=1, max=10**6)
    gradient_accumulation_steps: int = option(40, "micro-steps in a step", min=1, max=10**6)
    # model
    model: Literal["gpt", "bigram"] = option("gpt", "bigram: the baseline, only the last token")
    lora_rank: int = option(0, "train adapters of this rank alone; 0: all", min=0, max=10**5)
    vocab_multiple: int = option(1, "round the model's vocabulary up to it", min=1, max=10**6)
    # machine
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: DType = option("auto", "dtype of matrix products")
    compile: bool | Literal["auto"] = option("auto", "torch.compile; auto: on CUDA")
    compile_mode: Literal["default", "blocks", "max-autotune-no-cudagraphs"] = option(
        "default", "of torch.compile; blocks: one at a time, which starts sooner"
    )
    cuda_graph: bool | Literal["auto"] = option("auto", "launch a step as a whole; auto: on CUDA")
    parallel: Literal["ddp", "fsdp"] = option("ddp", "fsdp: a process has a shard of each tensor")
    backend: Literal["nccl", "gloo"] = option("nccl", "several processes on GPUs; CPUs use gloo")
    deterministic: bool = option(False, "only repeatable GPU kernels: slower, resumes bit for bit")
    seed: int = option(1337, "of weights, data order and dropout", min=0, max=2**32 - 1)

    @property
    def tokens_per_step(self) -> int:
        return self.gradient_accumulation_steps * self.batch_size * self.block_size


# ---- data and model ----------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What a training step reads and changes."""

    config: TrainConfig
    device: torch.device
    dtype: torch.dtype  # of matrix products
    compiles: bool
    data: Splits  # train, val, and their tokenizer
    model: GPT | Bigram  # the weights
    forward: torch.nn.Module  # what to call: the model, compiled or wrapped for DDP or not
    optimizers: list[torch.optim.Optimizer]
    step_number: torch.Tensor  # progress.step, on the device
    scaler: LossScaler  # does nothing unless dtype is float16
    ema: EMA  # the running average of the weights
    guard: NonFiniteGuard
    timer: StepTimer
    update: Recorded  # update_weights, on one GPU as a single launch
    progress: Progress
    made_of: dict[str, str]  # digests of the weights it starts from and of its teacher's
    teacher: Teacher | None = None
    is_resumed: bool = False
    next_batch: tuple | None = None  # prefetched
    log: Logger | NullLogger = dataclasses.field(default_factory=NullLogger)
    saver: Saver | None = None  # once the training starts
    signals: list[int] = dataclasses.field(default_factory=list)  # received, that ask to stop


def setup(config: TrainConfig, saved: dict | None = None, start: Pretrained | None = None) -> Run:
    """A new run; one that resumes a saved checkpoint; or one that starts from given weights."""
    device = devices.pick_device(config.device)
    dtype = devices.pick_dtype(config.dtype, device)
    devices.set_up_device(device, config.deterministic, config.dropout)
    checks.check_processes(config, device, dtype)
    use_graph = checks.pick_cuda_graph(config.cuda_graph, device, dtype)
    data = open_splits(config.dataset, config.block_size, device)
    model_config = config_from_options(config, data.meta.vocab_size)
    if saved is not None:
        checks.check_resume(config, data, model_config, saved)
    weights = None
    if start is not None:
        checks.check_tokenizer(config.dataset, data, start, config.init_from)
        weights = start.fitted(model_config)
    checks.check_memory(model_config, device)
    compiles = devices.pick_compile(config.compile, device)
    torch.manual_seed(config.seed)
    model = build(model_config)
    if config.lora_rank:
        checks.check_lora(config.lora_rank, model_config, (start or saved) is not None)
        lora.add_adapters(model, config.lora_rank)
    compile_mode = config.compile_mode if compiles else None
    forward = distributed.wrap(model, device, config.parallel, compile_mode)
    if weights is not None:
        state_dict.load_model_state_dict(model, weights)
    run = Run(
        config=config,
        device=device,
        dtype=dtype,
        compiles=compiles,
        data=data,
        model=model,
        forward=forward,
        optimizers=make_optimizers(model, config, dtype, use_graph),
        step_number=torch.zeros((), dtype=torch.int64, device=device),
        scaler=LossScaler(device.type, enabled=dtype == torch.float16),
        ema=EMA(model, config.average_decay),
        guard=NonFiniteGuard(config, device),
        timer=StepTimer(config.tokens_per_step, model.flops_per_token(), device, dtype, compiles),
        update=Recorded(lambda *batch: update_weights(run, *batch), device if use_graph else None),
        progress=Progress(),
        made_of={} if start is None else {"init_from": state_dict.digest(start.weights)},
    )
    if config.distill_from and not config.eval_only:
        teachers, weight = config.distill_from, config.distill_weight
        run.teacher = Teacher(teachers, weight, config, data, device)
        run.made_of["distill_from"] = state_dict.digest(run.teacher.model.state_dict())
    if saved is not None:
        run.made_of = checks.check_made_of(config, run.made_of, saved)
        parts = (model, run.optimizers, run.ema, run.scaler, run.guard)
        path = Path(config.out_dir, checkpoint.LATEST)
        run.progress = state_dict.load_training_state(saved, path, *parts)
        run.is_resumed = True
    if distributed.world_size() > 1 and config.parallel == "ddp":
        rebuild_ddp_buckets(run)
    return run


def rebuild_ddp_buckets(run: Run) -> None:
    """One backward pass, after which DDP orders its buckets anew, and so sums gradients in another
    order: the first step after a resume would round differently without it."""
    idx, targets = get_batch(run, 0)
    loss_sum(run, idx[0], targets[0]).backward()
    run.model.zero_grad()


# ---- evaluation --------------------------------------------------------------------------------


def estimate_loss(run: Run) -> dict:
    """Nats per token on both splits; the same weights always give the same numbers.

    Every metric in this dict is printed, written to the metrics and sent to the dashboards.
    """
    config, val = run.config, run.data.val

    def evaluated(split: dataset.Split, whole: bool) -> tuple[float, float]:
        """Over the whole split, or over eval_iters windows spread evenly."""
        offsets = split.eval_offsets(config.eval_iters, whole)
        check = functools.partial(check_signals, run)
        return evaluate_split(run.forward, split, offsets, config.batch_size, run.dtype, check)

    train_loss, _ = evaluated(run.data.train, whole=False)
    val_loss, val_exact = evaluated(val, whole=len(val) <= dataset.MAX_TOKENS_EVALUATED_WHOLE)
    metrics = {"train_loss": train_loss, "val_loss": val_loss}
    if val.examples is not None:
        metrics["val_exact"] = val_exact
    else:
        metrics["val_bpb"] = run.data.val_bpb(val_loss)
    return metrics


def sample_text(run: Run) -> str:
    """A text that continues the beginning of the val split, drawn with (seed, step)."""
    data, config = run.data, run.config
    options = SampleOptions(max_new_tokens=config.sample_at_eval, seed=config.seed)
    prompt = tokenizers.decode(data.tokenizer, data.val.prompt.tolist())
    decoder = Decoder(run.model.eval(), data.tokenizer.vocab_size)
    number, shown = run.progress.step, data.reverses_answers
    with torch.compiler.set_stance("force_eager"):  # to compile for a few tokens takes longer
        text = "".join(stream_text(decoder, data.tokenizer, prompt, options, number, shown))
    run.model.train()
    return text


# ---- a training step ---------------------------------------------------------------------------


def get_batch(run: Run, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The windows of a step, idx and targets (micro-steps, B, T); each process takes its part.

    Which windows these are depends on (seed, step) alone.
    """
    shape = (run.config.gradient_accumulation_steps, run.config.batch_size)
    offsets = run.data.train.train_offsets(math.prod(shape), run.config.seed, step).reshape(shape)
    offsets = distributed.shard_batch(offsets)
    idx, targets = run.data.train.get_batch(offsets.flatten())
    return idx.view(*offsets.shape, -1), targets.view(*offsets.shape, -1)


def loss_sum(run: Run, idx, targets):
    """The summed loss of one micro-step's (B, T), in nats."""
    with devices.autocast(run.device, run.dtype):
        if run.teacher is not None:
            return run.teacher.loss_sum(run.forward(idx)[0], idx, targets)
        _, loss = run.forward(idx, targets, reduction="sum", loss_only=True)
    return loss


def compute_gradients(run: Run, idx, targets):
    """Forward and backward; -> (loss, norm of the gradient before it is clipped)."""
    # Of all micro-steps and processes: windows may have unequal numbers of targets.
    n_targets = (targets != dataset.IGNORE_INDEX).sum()
    n_targets = distributed.all_reduce(n_targets).clamp(min=1)
    loss = torch.zeros((), device=run.device)
    for micro_step in range(len(idx)):
        distributed.sync_gradients(run.forward, is_last=micro_step == len(idx) - 1)
        micro_loss = loss_sum(run, idx[micro_step], targets[micro_step]) / n_targets
        # DDP and FSDP average gradients over the processes, where their sum is wanted.
        run.scaler.scale(micro_loss * distributed.world_size()).backward()
        loss += micro_loss.detach()
    for optimizer in run.optimizers:
        run.scaler.unscale_(optimizer)
    max_norm = run.config.grad_clip or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), max_norm)
    return distributed.all_reduce(loss), distributed.full_tensor(grad_norm)


def train_step(run: Run):
    """Make one optimizer update; -> (loss, gradient norm), tensors that stay on the device."""
    step = run.progress.step
    set_lr(run.optimizers, run.config, step)
    run.step_number.fill_(step)
    devices.seed_step(run.config.seed, step, distributed.rank())  # for dropout
    loss, grad_norm = run.update(*(run.next_batch or get_batch(run, step)))
    run.progress.step += 1
    run.progress.tokens += run.config.tokens_per_step
    # Prefetch while the device is still busy with this step.
    run.next_batch = get_batch(run, step + 1)
    return loss, grad_norm


def update_weights(run: Run, idx, targets):
    """All that a step does on the device; -> (loss, gradient norm).

    Nothing is updated if the loss or the gradient is not finite: AdamW's fused kernel and our Muon
    read `found_inf` on the device, so that this process need not wait to find out.
    """
    loss, grad_norm = compute_gradients(run, idx, targets)
    while run.scaler.prepare_retry(loss, grad_norm, run.optimizers):
        devices.seed_step(run.config.seed, run.progress.step, distributed.rank())
        loss, grad_norm = compute_gradients(run, idx, targets)  # float16: the same step again
    found_inf = run.guard.record(loss, grad_norm, run.step_number)  # 0 or 1, on the device
    for optimizer in run.optimizers:
        if run.scaler.is_enabled():
            if not found_inf:  # prepare_retry has waited for the device anyway
                run.scaler.step(optimizer)
        else:
            optimizer.found_inf = found_inf
            if run.device.type != "mps" or not found_inf:  # MPS kernels ignore found_inf
                optimizer.step()
        optimizer.zero_grad()
    run.scaler.update()
    run.ema.update(run.step_number, found_inf)
    return loss, grad_norm


# ---- the loop ----------------------------------------------------------------------------------


def train(run: Run) -> int:
    """Train to the end, or until a signal; -> exit code."""
    config, progress = run.config, run.progress
    if distributed.is_main():
        run.log = Logger(run)
        if not run.is_resumed:
            run_folder.move_aside(Path(config.out_dir))
    run.saver = Saver(Path(config.out_dir), config.checkpoint_seconds)
    signals = stop_signals(acts_at_second=distributed.world_size() == 1)
    with contextlib.closing(run.log), signals as run.signals, run.saver:
        run.timer.start(progress)
        try:
            with devices.compiler_errors(run.signals):
                train_to_the_end(run)
        except Stopped as stopped:
            return save_and_stop(run, stopped.signal_number)
        run.saver.wait()
        run.log.done(progress)
        return EXIT_DONE


def train_to_the_end(run: Run) -> None:
    while not (is_finished(run) and is_evaluated(run)):
        run.saver.check()
        check_signals(run)
        if evaluation_is_due(run):
            evaluate_and_save(run)
            continue
        loss, grad_norm = train_step(run)
        step = run.progress.step
        if step % run.config.log_interval == 0 or step == 1:
            log_step(run, loss, grad_norm)


def check_signals(run: Run) -> None:
    """Raise Stopped in all processes, at the same place, once one of them has had a signal."""
    if signal_number := distributed.all_reduce_max(max(run.signals, default=0)):
        raise Stopped(signal_number)


def is_finished(run: Run) -> bool:
    is_stale = 0 < run.config.patience <= run.progress.stale_evaluations
    return is_stale or run.progress.step >= run.config.max_iters


def evaluation_is_due(run: Run) -> bool:
    is_due = run.progress.step % run.config.eval_interval == 0 or is_finished(run)
    return is_due and not is_evaluated(run)


def is_evaluated(run: Run) -> bool:
    return run.progress.evaluated_step == run.progress.step


def evaluate(run: Run) -> dict:
    """The record of an evaluation: the step, its metrics, and a sample on rank 0 if wanted."""
    record = {"step": run.progress.step, **estimate_loss(run)}
    if not all(map(math.isfinite, record.values())):
        raise RunError(f"{evaluation_text(record)}: not finite, not saved; lower learning_rate")
    if run.config.sample_at_eval and distributed.is_main():
        record["sample"] = sample_text(run)
    return record


def evaluate_and_save(run: Run) -> None:
    run.guard.report(run.progress.skipped_steps, run.log)
    config, progress = run.config, run.progress
    with run.ema.as_weights():
        record = evaluate(run)
        is_best = record["val_loss"] < progress.best_val_loss
        if is_best:
            progress.best_val_loss = record["val_loss"]
            best = state_dict.weights_and_config(run)  # the averages, where there are any
            run.saver.keep_best(best)
    progress.stale_evaluations = 0 if is_best else progress.stale_evaluations + 1
    progress.evaluated_step = progress.step
    progress.seconds = run.timer.seconds()
    record["lr"] = get_lr(config, progress.step)
    record |= {"tokens": progress.tokens, "seconds": round(progress.seconds, 3)}
    run.log.evaluation(record, is_best)
    if is_finished(run) or run.saver.is_due(config.always_save_checkpoint):
        save(run)
    run.timer.restart(progress.step)


def log_step(run: Run, loss, grad_norm) -> None:
    """Apart from evaluations, float16 and MPS, the only place that waits for the device."""
    run.guard.report(run.progress.skipped_steps, run.log)
    numbers = {"loss": loss.item(), "grad_norm": grad_norm.item()}
    record = {"step": run.progress.step}
    record |= {name: x if math.isfinite(x) else None for name, x in numbers.items()}
    record["lr"] = get_lr(run.config, run.progress.step - 1)
    run.log.step(record | run.timer.lap(run.progress.step))


def save(run: Run) -> None:
    """Start to write ckpt.pt, with all that an exact resume needs, and before it a new best.pt."""
    run.saver.wait()  # for the save before, so that the copies of two need not fit in memory
    contents = state_dict.weights_and_config(run)
    contents |= state_dict.training_state(run.optimizers, run.ema, run.scaler)
    contents["progress"], contents["made_of"] = dataclasses.asdict(run.progress), run.made_of
    run.log.sync()  # no checkpoint on the disk is newer than the metrics that led to it
    run.saver.start(contents)


def save_and_stop(run: Run, signal_number: int) -> int:
    run.guard.report(run.progress.skipped_steps, run.log)
    run.progress.seconds = run.timer.seconds()
    save(run)
    run.saver.wait()
    run.log.stopped(run.progress, signal_number)
    distributed.barrier()  # all wait for the save; further signals are only noted
    return 128 + signal_number


def evaluate_only(run: Run) -> int:
    with run.ema.as_weights():
        record = evaluate(run)
    if distributed.is_main():
        print(evaluation_text(record), flush=True)
    return EXIT_DONE


# ---- the command -------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    with distributed.session():
        config = settings.load(TrainConfig, argv, usage=__doc__)
        is_writer = distributed.is_main() and not config.eval_only
        folder = run_folder.path_of(config.out_dir)
        with file_lock(folder) if is_writer else contextlib.nullcontext():
            with devices.out_of_memory_advice("lower n_embd or n_layer"):
                # Nothing keeps the checkpoint or weights in memory once the model has them.
                run = setup(*find_start(config, argv, usage=__doc__))
            with devices.out_of_memory_advice(
                f"halve batch_size={run.config.batch_size} and double gradient_accumulation_steps, "
                "which trains the same, or lower block_size, n_embd or n_layer"
            ):
                return evaluate_only(run) if run.config.eval_only else train(run)


if __name__ == "__main__":
    run_command(main)
