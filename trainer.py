"""The training itself: step, evaluation, checkpoints, the loop. The options are train.py's."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import checkpoint
import dataset
import runtime
import tokenizer as tokenizers
from errors import EXIT_DONE, InputError, RunError
from files import dataset_folder
from model import GPT, GPTConfig
from optim import learning_rate_at, make_optimizers, restore, set_learning_rate
from report import Pace, Report, loss_line

if TYPE_CHECKING:
    from train import TrainConfig


@dataclasses.dataclass
class Progress:
    """How far a run has come; a checkpoint carries it."""

    step: int = 0  # optimizer updates made
    tokens: int = 0
    seconds: float = 0.0
    best_val_loss: float = math.inf
    stale_evaluations: int = 0  # since the best one
    evaluated_step: int = -1  # the last step whose evaluation is in the metrics


class Trainer:
    """One run of a `TrainConfig`, from scratch or from where a checkpoint stopped."""

    def __init__(self, config: TrainConfig, saved: dict | None = None):
        self.config = config
        if not config.out_dir:
            raise InputError("out_dir is empty: give a folder for the run")
        self.out_dir = Path(config.out_dir)
        self.device = runtime.pick_device(config.device)
        self.dtype = runtime.pick_dtype(config.dtype, self.device)
        runtime.set_up(self.device)
        self.meta, self.train_split, self.val_split = self._open_dataset()
        self.model_config = model_config(config, self.meta.vocab_size)
        if saved is not None:
            self._check_same_run(saved)

        torch.manual_seed(config.seed)
        self.model = GPT(self.model_config).to(self.device)
        self.optimizers = make_optimizers(self.model, config, self.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.progress = Progress()
        self.average: list = []  # of the weights over the steps
        if config.average_decay:
            self.average = [p.detach().clone() for p in self.model.parameters()]
        if saved is not None:
            self._restore(saved)

        self.compiles = runtime.pick_compile(config.compile, self.device)
        self.forward = self.model
        if self.compiles:
            self.forward = torch.compile(self.model, mode=config.compile_mode)
        # A recorded graph writes its gradients to the same place at each replay, so they are added
        # to gradients of our own instead of becoming them.
        self.keeps_gradients = self.compiles and config.compile_mode == "reduce-overhead"
        if self.keeps_gradients:
            for p in self.model.parameters():
                p.grad = torch.zeros_like(p)
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=self.device)
        self.upcoming: list | None = None  # the next step's micro-batches

    def _open_dataset(self) -> tuple[dataset.Meta, dataset.Split, dataset.Split]:
        folder = dataset_folder(self.config.dataset)
        meta, *splits = dataset.read(folder)
        tokenizer = tokenizers.from_json(meta.tokenizer, str(folder / "meta.json"))
        if tokenizer.vocab_size != meta.vocab_size:
            raise InputError(
                f"{folder / 'meta.json'}: vocab_size={meta.vocab_size}, but its tokenizer has "
                f"{tokenizer.vocab_size}; prepare the dataset again"
            )
        paths = [folder / f"{name}.bin" for name in dataset.SPLITS]
        for path, ids in zip(paths, splits, strict=True):
            if len(ids) <= self.config.block_size:
                raise InputError(
                    f"block_size={self.config.block_size} does not fit {path}, which has "
                    f"{len(ids):,} tokens: lower it, or prepare a longer text"
                )
        pairs = zip(splits, paths, strict=True)
        return meta, *(dataset.Split(i, meta.vocab_size, self.device, p) for i, p in pairs)

    # ---- one step ------------------------------------------------------------------------------

    def train_step(self):
        """Make one update; -> (loss, gradient norm before clipping), tensors on the device."""
        config, step = self.config, self.progress.step
        set_learning_rate(self.optimizers, config, step)
        micro_batches = self.upcoming or self._micro_batches(step)
        loss, norm = self._gradients(micro_batches)
        while self.scaler.is_enabled() and not self._loss_scale_fits(loss, norm):
            loss, norm = self._gradients(micro_batches)
        self._update(loss, norm)
        if self.average:
            weights = [p.detach() for p in self.model.parameters()]
            decay = min(config.average_decay, (1 + step) / (10 + step))  # soon rid of the start
            torch._foreach_lerp_(self.average, weights, 1 - decay)
        self.progress.step += 1
        self.progress.tokens += config.tokens_per_step
        # While the device is still at work, and before a log line waits for it.
        self.upcoming = self._micro_batches(step + 1)
        return loss, norm

    def _micro_batches(self, step: int) -> list:
        """The step's (idx, targets) windows: gradient_accumulation_steps parts of batch_size."""
        config = self.config
        shape = (config.gradient_accumulation_steps, config.batch_size)
        n_tokens = len(self.train_split)
        starts = dataset.train_starts(
            n_tokens, config.block_size, math.prod(shape), config.seed, step
        )
        return [self.train_split.windows(part, config.block_size) for part in starts.reshape(shape)]

    def _gradients(self, micro_batches: list):
        """Forward and backward; -> (loss, norm of the gradients, which are then clipped)."""
        runtime.seed_step(self.config.seed, self.progress.step)  # of dropout
        n_targets = sum((targets != dataset.IGNORE_INDEX).sum() for _, targets in micro_batches)
        n_targets = n_targets.clamp(min=1)
        loss = torch.zeros((), device=self.device)
        for idx, targets in micro_batches:
            with runtime.autocast(self.device, self.dtype):
                _, loss_sum = self.forward(idx, targets, reduction="sum")
            micro_loss = loss_sum / n_targets
            self.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        longest = self.config.grad_clip or math.inf
        return loss, torch.nn.utils.clip_grad_norm_(self.model.parameters(), longest)

    def _loss_scale_fits(self, loss, norm) -> bool:
        """For float16: whether the gradients are finite; if not, lower the scale and drop them.

        The step is then made again from the same windows and dropout, so that N stays N updates.
        """
        if torch.isfinite(norm + loss):
            return True
        if not torch.isfinite(loss) or self.scaler.get_scale() < 1:
            self.first_bad_step.fill_(self.progress.step)
            self.raise_if_not_finite()
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        return False

    def _update(self, loss, norm) -> None:
        """Step the optimizers; from the first non-finite step on, the weights stay as they are.

        The optimizers skip on the device (by `found_inf`), so the loop need not wait to find out.
        """
        is_first_bad = ~torch.isfinite(loss + norm) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(is_first_bad, self.progress.step, self.first_bad_step)
        if self.device.type == "mps":
            self.raise_if_not_finite()  # its kernels do not look at found_inf
        for optimizer in self.optimizers:
            if not self.scaler.is_enabled():
                optimizer.found_inf = (self.first_bad_step >= 0).float()
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        self.scaler.update()

    def raise_if_not_finite(self) -> None:
        bad_step = int(self.first_bad_step)
        if bad_step >= 0:
            raise RunError(
                f"the loss or its gradient was not finite at step {bad_step + 1}; stopped before "
                f"that update, nothing was saved since: lower learning_rate "
                f"({self.config.learning_rate}), raise warmup_iters or set grad_clip=1.0"
            )

    # ---- evaluation ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged_weights(self):
        """In the block, the model has its weights' running average, where one is kept."""
        if not self.average:
            yield
            return
        weights = [p.detach() for p in self.model.parameters()]
        latest = [p.clone() for p in weights]
        torch._foreach_copy_(weights, self.average)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, latest)

    def evaluate(self) -> dict:
        """Nats a token on both splits: the same weights always give the same numbers."""
        is_small = len(self.val_split) <= dataset.MAX_TOKENS_EVALUATED_WHOLE
        record = {
            "step": self.progress.step,
            "train_loss": self._mean_loss(self.train_split, whole=False),
            "val_loss": self._mean_loss(self.val_split, whole=is_small),
        }
        if not all(map(math.isfinite, record.values())):
            raise RunError(f"{loss_line(record)}: not finite, nothing saved; lower learning_rate")
        return record

    @torch.no_grad()
    def _mean_loss(self, split: dataset.Split, whole: bool) -> float:
        config = self.config
        starts = dataset.eval_starts(len(split), config.block_size, config.eval_iters, whole)
        # Fill up the last batch with windows past the end, whose targets are all ignored.
        starts = np.append(starts, np.full(-len(starts) % config.batch_size, len(split)))
        sums, counts = [], []
        self.model.eval()
        for part in starts.reshape(-1, config.batch_size):
            idx, targets = split.windows(part, config.block_size)
            with runtime.autocast(self.device, self.dtype):
                _, loss_sum = self.forward(idx, targets, reduction="sum")
            sums.append(loss_sum.clone())  # a recorded graph would write over it
            counts.append((targets != dataset.IGNORE_INDEX).sum())
        self.model.train()
        return float(torch.stack(sums).cpu().double().sum() / torch.stack(counts).cpu().sum())

    # ---- the loop ------------------------------------------------------------------------------

    def run(self) -> int:
        """-> exit code. Raises InputError or RunError for what the user can mend."""
        if self.config.eval_only:
            with self.averaged_weights():
                print(loss_line(self.evaluate()))
            return EXIT_DONE
        config, progress = self.config, self.progress
        self._announce()
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"out_dir={self.out_dir}: there is a file of that name") from None
        resumed = dataclasses.replace(progress) if config.init_from == "resume" else None
        self.report = Report(self.out_dir, dataclasses.asdict(config), resumed)
        with contextlib.closing(self.report):
            return self._loop()

    def _loop(self) -> int:
        config, progress = self.config, self.progress
        self.started = time.perf_counter() - progress.seconds
        self.pace = Pace()
        self.pace.restart(progress.step)
        with _stop_signals() as received:
            while not received:
                if self._evaluation_is_due():
                    self._evaluate_and_save()
                if received or self._is_last():
                    break
                loss, norm = self.train_step()
                if progress.step % config.log_interval == 0 or progress.step == 1:
                    self._log(loss, norm)
        if received:
            return self._save_and_stop(received[0])
        print(
            f"done after step {progress.step}, best val loss {progress.best_val_loss:.4f}; "
            f"next: python sample.py --out_dir={shlex.quote(config.out_dir)}"
        )
        return EXIT_DONE

    def _evaluation_is_due(self) -> bool:
        step = self.progress.step
        is_due = step % self.config.eval_interval == 0 or self._is_last()
        return is_due and step != self.progress.evaluated_step

    def _is_last(self) -> bool:
        is_stale = 0 < self.config.patience <= self.progress.stale_evaluations
        return is_stale or self.progress.step >= self.config.max_iters

    def _evaluate_and_save(self) -> None:
        self.raise_if_not_finite()
        config, progress = self.config, self.progress
        with self.averaged_weights():
            record = self.evaluate()
            is_best = record["val_loss"] < progress.best_val_loss
            progress.best_val_loss = min(record["val_loss"], progress.best_val_loss)
            if is_best:
                checkpoint.save(self.out_dir / "best.pt", self._weights())
        progress.stale_evaluations = 0 if is_best else progress.stale_evaluations + 1
        progress.evaluated_step = progress.step
        progress.seconds = time.perf_counter() - self.started
        record["lr"] = learning_rate_at(config, progress.step)
        record |= {"tokens": progress.tokens, "seconds": round(progress.seconds, 3)}
        self.report.evaluation(record, is_best)
        if is_best or config.always_save_checkpoint or self._is_last():
            self._save()
        self.pace.restart(progress.step)

    def _log(self, loss, norm) -> None:
        """The only place in the loop, but for evaluations, that waits for the device."""
        self.raise_if_not_finite()
        record = {
            "step": self.progress.step,
            "loss": loss.item(),
            "grad_norm": norm.item(),
            "lr": learning_rate_at(self.config, self.progress.step - 1),
        }
        seconds = self.pace.lap(self.progress.step)
        tokens_per_s = self.config.tokens_per_step / seconds
        peak = runtime.peak_flops(self.device, self.dtype)
        mfu = tokens_per_s * self.model.flops_per_token() / peak if peak else None
        record |= {"ms_per_step": 1000 * seconds, "tokens_per_s": tokens_per_s, "mfu": mfu}
        shows_pace = self.pace.laps > self.compiles  # the first lap may be a compiler's
        is_first = self.pace.laps == 1 + self.compiles
        self.report.step(record, shows_pace, is_first and self.device.type == "cpu")

    def _save_and_stop(self, signal_number: int) -> int:
        self.raise_if_not_finite()
        self.progress.seconds = time.perf_counter() - self.started
        self._save()
        print(
            f"{signal.Signals(signal_number).name}: saved after step {self.progress.step}; go on "
            f"with: python train.py --out_dir={shlex.quote(self.config.out_dir)} --init_from=resume"
        )
        return 128 + signal_number

    def _announce(self) -> None:
        config = self.config
        print(
            f"{config.dataset}: {len(self.train_split):,} train and {len(self.val_split):,} val "
            f"tokens, {config.tokens_per_step:,} in a step\n"
            f"model: {self.model.n_parameters():,} parameters on {runtime.describe(self.device)}, "
            f"{str(self.dtype).removeprefix('torch.')}",
            flush=True,
        )
        if self.progress.step:
            print(f"resuming after step {self.progress.step} of {config.max_iters}", flush=True)

    # ---- checkpoints ---------------------------------------------------------------------------

    def _weights(self) -> dict:
        """What sampling needs."""
        return {
            "model": self.model.state_dict(),
            "model_config": dataclasses.asdict(self.model_config),
            "config": dataclasses.asdict(self.config),
            "tokenizer": self.meta.tokenizer,
            "step": self.progress.step,
            "best_val_loss": self.progress.best_val_loss,
            "text_sha256": self.meta.sha256,
        }

    def _save(self) -> None:
        """All that an exact resume needs; no random state, which `runtime.seed_step` derives."""
        self.report.sync()
        state = {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average,
            "scaler": self.scaler.state_dict(),
            "progress": dataclasses.asdict(self.progress),
        }
        checkpoint.save(self.out_dir / "ckpt.pt", self._weights() | state)

    def _check_same_run(self, saved: dict) -> None:
        """Raises InputError with every difference that makes the saved state unusable here."""
        path = self.out_dir / "ckpt.pt"
        then = saved["model_config"] | {"optimizer": saved["config"].get("optimizer")}
        now = dataclasses.asdict(self.model_config) | {"optimizer": self.config.optimizer}
        different = [
            f"{name} is {then.get(name)!r} there and {value!r} here"
            for name, value in now.items()
            if name not in ("dropout", "init_std") and then.get(name) != value
        ]
        if saved["tokenizer"] != self.meta.tokenizer:
            different.append(f"dataset {self.config.dataset!r} now has another tokenizer")
        if saved.get("text_sha256") != self.meta.sha256:
            different.append(f"dataset {self.config.dataset!r} is now made of another text")
        if different:
            raise InputError(
                f"{path} cannot be resumed: {', '.join(different)}; leave these options out, or "
                "start a new run in another --out_dir"
            )
        if saved["step"] > self.config.max_iters:
            raise InputError(
                f"max_iters={self.config.max_iters} lies before step {saved['step']} of {path}"
            )

    def _restore(self, saved: dict) -> None:
        try:
            self.progress = Progress(**saved["progress"])
            for name, value in vars(Progress()).items():
                if type(getattr(self.progress, name)) is not type(value):
                    raise ValueError(f"progress.{name} has another type")
            self.model.load_state_dict(saved["model"])
            if self.average:  # a run that kept none starts one from its present weights
                self._restore_average(saved.get("average") or [*self.model.parameters()])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                restore(optimizer, state, has_stepped=self.progress.step > 0)
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(saved["scaler"])
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            path = self.out_dir / "ckpt.pt"
            raise InputError(f"{path} is not usable for a resume: {error}") from None

    @torch.no_grad()
    def _restore_average(self, saved: list) -> None:
        for average, p in zip(self.average, saved, strict=True):
            if average.shape != p.shape:
                raise ValueError("its average does not fit the model")
            average.copy_(p)


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """The options that describe the model; raises InputError when they cannot work together."""
    names = {field.name for field in dataclasses.fields(GPTConfig)} - {"vocab_size"}
    padded = math.ceil(vocab_size / config.vocab_multiple) * config.vocab_multiple
    try:
        return GPTConfig(vocab_size=padded, **{name: getattr(config, name) for name in names})
    except ValueError as error:
        raise InputError(str(error)) from None


@contextlib.contextmanager
def _stop_signals():
    """Yield a list that SIGINT or SIGTERM is put in; a second one acts at once, as ever."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        received.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
