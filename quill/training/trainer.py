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
from torch.nn import functional as F

from model import GPTConfig, build, count_parameters
from quill.data import dataset, tokenizers
from quill.errors import EXIT_DONE, InputError, RunError
from quill.files import dataset_folder, run_folder
from quill.training import checkpoint, devices, distributed, snapshot
from quill.training.log import Pace, Report, Silence, evaluation_text, loss_line
from quill.training.optimizers import learning_rate_at, make_optimizers, set_learning_rate
from quill.training.snapshot import Progress
from sample import SampleConfig, write

if TYPE_CHECKING:
    from quill.interop.pretrained import Pretrained
    from train import TrainConfig


class Trainer:
    """One run of a `TrainConfig`: new, from given weights, or from where a checkpoint stopped."""

    def __init__(
        self, config: TrainConfig, saved: dict | None = None, start: Pretrained | None = None
    ):
        self.config = config
        self.is_resumed = self.has_saved = saved is not None
        self.out_dir = run_folder(config.out_dir)
        self.device = devices.pick_device(config.device)
        self.dtype = devices.pick_dtype(config.dtype, self.device)
        devices.set_up(self.device, config.deterministic)
        self.compiles = devices.pick_compile(config.compile, self.device)
        # A recorded graph writes its gradients to the same place at each replay, so they are added
        # to gradients of our own instead of becoming them.
        self.keeps_gradients = self.compiles and config.compile_mode == "reduce-overhead"
        if distributed.size() > 1:
            self._check_processes()
        self.meta, self.tokenizer, self.train_split, self.val_split = self._open_dataset()
        self.model_config = model_config(config, self.meta.vocab_size)
        if saved is not None:
            snapshot.check_same_run(self, saved)

        weights = distributed.share(None if start is None else self._start_weights(start))
        torch.manual_seed(config.seed)
        self._build_model()
        if weights is not None:
            snapshot.put_weights(self, weights)
        self.optimizers = make_optimizers(self.model, config, self.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.progress = Progress()
        self.average: list = []  # of the weights over the steps
        if config.average_decay:
            self.average = [p.detach().clone() for p in self.model.parameters()]
        # The steps whose updates were not made; the one after the last allowed ends the run.
        n_slots = config.skip_nonfinite + 1
        self.slots = torch.arange(n_slots, device=self.device)
        self.bad_steps = torch.zeros_like(self.slots)
        if saved is not None:
            snapshot.put_back(self, saved)
            self._know_skipped_steps()
        if self.keeps_gradients:
            for p in self.model.parameters():
                p.grad = torch.zeros_like(p)
        self.upcoming: list | None = None  # the next step's micro-batches
        self.report: Report | Silence = Silence()

    def _build_model(self) -> None:
        """self.model, and self.forward, which trains it: compiled, and on all processes."""
        config = self.model_config
        sizes = f"a vocabulary of {config.vocab_size:,}"
        if config.model == "gpt":
            sizes = f"n_layer={config.n_layer}, n_embd={config.n_embd} and {sizes}"
        devices.refuse_larger_than_memory(count_parameters(config), sizes, self.device)
        self.model = build(config)
        if self.shards:
            mode = self.config.compile_mode if self.compiles else None
            distributed.shard(self.model, self.device, mode)
            self.forward = self.model
            return
        self.model.to(self.device)
        self.forward = self.model
        if self.compiles:
            self.forward = torch.compile(self.model, mode=self.config.compile_mode)
        self.forward = distributed.replicate(self.forward, self.device)
        if distributed.size() > 1:
            self._settle_replicas()

    def _settle_replicas(self) -> None:
        """Give DDP a backward pass, after which it lays the gradients out for good.

        That layout decides in which order they are summed over three or more processes: the first
        step of a resumed run would else differ in its last bits from the same step of another.
        """
        idx, targets = self._micro_batches(0)[0]
        with devices.autocast(self.device, self.dtype):
            _, loss_sum = self.forward(idx, targets, reduction="sum")
        loss_sum.backward()
        self.model.zero_grad()

    def _start_weights(self, start: Pretrained) -> dict:
        """Raises InputError when they are for another tokenizer, or for another model."""
        config, tokenizer = self.config, start.tokenizer
        if tokenizer is not None and tokenizer.to_json() != self.meta.tokenizer:
            raise InputError(
                f"dataset {config.dataset!r} has another tokenizer than {config.init_from}: "
                "prepare it with that one, by --tokenizer"
            )
        if self.meta.vocab_size > start.config.vocab_size:
            raise InputError(
                f"dataset {config.dataset!r} has {self.meta.vocab_size:,} tokens, more than the "
                f"{start.config.vocab_size:,} of {config.init_from}"
            )
        return start.fitted(self.model_config)

    def _check_processes(self) -> None:
        """Raises InputError with every option that several processes cannot do."""
        config, n = self.config, distributed.size()
        problems = []
        if config.gradient_accumulation_steps % n and config.batch_size % n:
            problems.append(
                f"neither gradient_accumulation_steps={config.gradient_accumulation_steps} nor "
                f"batch_size={config.batch_size} can be divided by {n} processes"
            )
        if self.device.type == "mps":
            problems.append("several processes need CUDA devices or CPUs")
        if self.keeps_gradients:
            problems.append("compile_mode=reduce-overhead is for one process")
        if self.shards and config.optimizer == "muon":
            problems.append("Muon needs whole matrices: take optimizer=adamw or parallel=ddp")
        if self.shards and config.sample_at_eval:
            problems.append("sample_at_eval needs all of the model in one process: parallel=ddp")
        if self.shards and self.dtype == torch.float16:
            problems.append("parallel=fsdp has no loss scaling: take bfloat16 or float32")
        if problems:
            raise InputError("; ".join(problems))

    @property
    def shards(self) -> bool:
        return distributed.size() > 1 and self.config.parallel == "fsdp"

    def _know_skipped_steps(self) -> None:
        known = self.progress.skipped_steps[: self.config.skip_nonfinite]
        self.bad_steps[: len(known)] = torch.tensor(known, dtype=torch.int64)

    def _open_dataset(self):
        """-> (meta, tokenizer, train split, val split)"""
        folder = dataset_folder(self.config.dataset)
        if distributed.is_first_here():
            meta, data = dataset.read(folder)
        distributed.largest(0)  # the first may have to finish what a killed prepare.py left
        if not distributed.is_first_here():
            meta, data = dataset.read(folder, verify=False)
        if distributed.share(meta) != meta:
            raise InputError(f"{folder} is not the same on all machines; prepare it from one text")
        tokenizer = tokenizers.from_json(meta.tokenizer, str(folder / "meta.json"))
        if tokenizer.vocab_size != meta.vocab_size:
            raise InputError(
                f"{folder / 'meta.json'}: vocab_size={meta.vocab_size}, but its tokenizer has "
                f"{tokenizer.vocab_size}; prepare the dataset again"
            )
        train, val = (
            dataset.Split(
                data[name],
                data.get(f"{name}.mask"),
                meta.vocab_size,
                self.config.block_size,
                self.device,
                folder / f"{name}.bin",
            )
            for name in dataset.SPLITS
        )
        return meta, tokenizer, train, val

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
        """This process's (idx, targets) windows of the step, in micro-steps.

        Several processes share the micro-steps, or else the rows of each.
        """
        config, rank, n = self.config, distributed.rank(), distributed.size()
        shape = (config.gradient_accumulation_steps, config.batch_size)
        starts = self.train_split.train_offsets(math.prod(shape), config.seed, step).reshape(shape)
        own = starts[rank::n] if shape[0] % n == 0 else starts[:, rank::n]
        return [self.train_split.windows(part) for part in own]

    def _gradients(self, micro_batches: list):
        """Forward and backward; -> (loss, norm of the gradients, which are then clipped)."""
        devices.seed_step(self.config.seed, self.progress.step, distributed.rank())  # of dropout
        n_targets = sum((targets != dataset.IGNORE_INDEX).sum() for _, targets in micro_batches)
        n_targets = distributed.total(n_targets).clamp(min=1)
        loss = torch.zeros((), device=self.device)
        for i, (idx, targets) in enumerate(micro_batches, start=1):
            distributed.average_gradients(self.forward, now=i == len(micro_batches))
            with devices.autocast(self.device, self.dtype):
                _, loss_sum = self.forward(idx, targets, reduction="sum")
            micro_loss = loss_sum / n_targets
            # The processes' gradients are averaged, and their sum is wanted.
            self.scaler.scale(micro_loss * distributed.size()).backward()
            loss += micro_loss.detach()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        longest = self.config.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), longest)
        return distributed.total(loss), distributed.whole(norm)

    def _loss_scale_fits(self, loss, norm) -> bool:
        """For float16: whether to go on; if not, the scale is lowered and the gradients dropped.

        The step is then made again from the same windows and dropout, so that N stays N updates.
        What a lower scale would not mend goes on, to `_update`.
        """
        if torch.isfinite(norm + loss) or not torch.isfinite(loss) or self.scaler.get_scale() < 1:
            return True
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        return False

    def _update(self, loss, norm) -> None:
        """Step the optimizers, unless the step is not finite or one too many was not.

        The optimizers skip on the device (by `found_inf`), so the loop need not wait to find out.
        """
        is_bad = ~torch.isfinite(loss + norm)
        is_over = self.bad_steps[-1] > 0
        next_slot = self.slots == (self.bad_steps > 0).sum()
        self.bad_steps.masked_fill_(next_slot & is_bad, self.progress.step + 1)
        found_inf = (is_bad | is_over).float()
        for optimizer in self.optimizers:
            if not self.scaler.is_enabled():
                optimizer.found_inf = found_inf
                # MPS kernels do not look at it.
                if self.device.type != "mps" or not found_inf:
                    optimizer.step()
            elif not found_inf:  # `_loss_scale_fits` has waited for the device already
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=not self.keeps_gradients)
        self.scaler.update()

    def settle_bad_steps(self) -> None:
        """Tell of updates that were skipped since the last time; RunError when it was one too many.

        The only place, but for log lines and evaluations, that waits for the device.
        """
        bad = [step for step in self.bad_steps.tolist() if step > 0]
        config, skipped = self.config, self.progress.skipped_steps
        for step in bad[: config.skip_nonfinite]:
            if step not in skipped:
                skipped.append(step)
                self.report.skipped(step, len(skipped), config.skip_nonfinite)
        if len(bad) > config.skip_nonfinite:
            raise RunError(
                f"the loss or its gradient was not finite at step {bad[-1]}; stopped before "
                f"that update, nothing was saved since: lower learning_rate "
                f"({config.learning_rate}), raise warmup_iters, set grad_clip=1.0, or allow more "
                f"than skip_nonfinite={config.skip_nonfinite}"
            )

    # ---- evaluation ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def averaged_weights(self):
        """In the block, the model has its weights' running average, where one is kept."""
        if not self.average:
            yield
            return
        weights = [distributed.own_part(p.detach()) for p in self.model.parameters()]
        latest = [p.clone() for p in weights]
        torch._foreach_copy_(weights, [distributed.own_part(a) for a in self.average])
        try:
            yield
        finally:
            torch._foreach_copy_(weights, latest)

    def evaluate(self) -> dict:
        """Nats a token on both splits, and a text where the main process is to make one.

        The same weights always give the same numbers.
        """
        is_small = len(self.val_split) <= dataset.MAX_TOKENS_EVALUATED_WHOLE
        train_loss, _ = self._mean_loss(self.train_split, whole=False)
        val_loss, val_exact = self._mean_loss(self.val_split, whole=is_small)
        record = {"step": self.progress.step, "train_loss": train_loss, "val_loss": val_loss}
        if self.val_split.records is not None:
            record["val_exact"] = val_exact
        if not all(map(math.isfinite, record.values())):
            raise RunError(f"{loss_line(record)}: not finite, nothing saved; lower learning_rate")
        if self.config.sample_at_eval and distributed.is_main():
            record["sample"] = self._sample()
        return record

    def _sample(self) -> str:
        """A text that begins as the val split does, by random numbers from (seed, step) alone."""
        config = SampleConfig(max_new_tokens=self.config.sample_at_eval, seed=self.config.seed)
        prompt = tokenizers.decode(self.tokenizer, self.val_split.prompt.tolist())
        self.model.eval()
        text = "".join(write(self.model, self.tokenizer, prompt, config, self.progress.step))
        self.model.train()
        return text

    @torch.no_grad()
    def _mean_loss(self, split: dataset.Split, whole: bool) -> tuple[float, float]:
        """-> nats a token, and the share of answers that greedy decoding would get right."""
        config = self.config
        starts = split.eval_offsets(config.eval_iters, whole)
        # Each process takes every n-th batch. Fill up with windows past the end, whose targets are
        # all ignored, so that all have equally many.
        rank, n = distributed.rank(), distributed.size()
        starts = np.append(starts, np.full(-len(starts) % (n * config.batch_size), len(split)))
        parts = starts.reshape(-1, config.batch_size)
        sums = torch.zeros(len(parts), device=self.device)
        # Of targets, of answers, of right ones.
        counts = torch.zeros(3, len(parts), dtype=torch.int64, device=self.device)
        self.model.eval()
        for i in range(rank, len(parts), n):
            idx, targets = split.windows(parts[i])
            with devices.autocast(self.device, self.dtype):
                logits, sums[i] = self.forward(idx, targets, reduction="sum")
            counts[0, i] = (targets != dataset.IGNORE_INDEX).sum()
            if split.records is not None:
                counts[1:, i] = count_answers(logits[..., : split.vocab_size], targets)
        self.model.train()
        # Added up in one order, however many processes there are.
        sums, counts = distributed.total(sums).cpu(), distributed.total(counts).cpu()
        n_targets, n_answers, n_right = counts.sum(dim=1).tolist()
        return float(sums.double().sum()) / n_targets, n_right / max(1, n_answers)

    # ---- the loop ------------------------------------------------------------------------------

    def run(self) -> int:
        """-> exit code. Raises InputError or RunError for what the user can mend."""
        if self.config.eval_only:
            with self.averaged_weights():
                self._say(evaluation_text(self.evaluate()))
            return EXIT_DONE
        self._announce()
        if distributed.is_main():
            resumed = dataclasses.replace(self.progress) if self.is_resumed else None
            self.report = Report(self.out_dir, dataclasses.asdict(self.config), resumed)
        with contextlib.closing(self.report), _stop_signals() as received:
            return self._loop(received)

    def _loop(self, received: list[int]) -> int:
        config, progress = self.config, self.progress
        self.started = time.perf_counter() - progress.seconds
        self.pace = Pace()
        self.pace.restart(progress.step)
        # A signal to one process stops all, after the same step.
        while not (signal_number := distributed.largest(max(received, default=0))):
            if self._evaluation_is_due():
                self._evaluate_and_save()
            if self._is_last():
                self._say(
                    f"done after step {progress.step}, best val loss "
                    f"{progress.best_val_loss:.4f}; "
                    f"next: python sample.py --out_dir={shlex.quote(config.out_dir)}"
                )
                return EXIT_DONE
            loss, norm = self.train_step()
            if progress.step % config.log_interval == 0 or progress.step == 1:
                self._log(loss, norm)
        return self._save_and_stop(signal_number)

    def _evaluation_is_due(self) -> bool:
        step = self.progress.step
        is_due = step % self.config.eval_interval == 0 or self._is_last()
        return is_due and step != self.progress.evaluated_step

    def _is_last(self) -> bool:
        is_stale = 0 < self.config.patience <= self.progress.stale_evaluations
        return is_stale or self.progress.step >= self.config.max_iters

    def _evaluate_and_save(self) -> None:
        self.settle_bad_steps()
        config, progress = self.config, self.progress
        with self.averaged_weights():
            record = self.evaluate()
            is_best = record["val_loss"] < progress.best_val_loss
            progress.best_val_loss = min(record["val_loss"], progress.best_val_loss)
            if is_best:
                self._save(checkpoint.BEST, snapshot.weights(self))
        progress.stale_evaluations = 0 if is_best else progress.stale_evaluations + 1
        progress.evaluated_step = progress.step
        progress.seconds = time.perf_counter() - self.started
        record["lr"] = learning_rate_at(config, progress.step)
        record |= {"tokens": progress.tokens, "seconds": round(progress.seconds, 3)}
        self.report.evaluation(record, is_best)
        if is_best or config.always_save_checkpoint or self._is_last():
            self._save_everything()
        self.pace.restart(progress.step)

    def _log(self, loss, norm) -> None:
        """The only place in the loop, but for evaluations, that waits for the device."""
        self.settle_bad_steps()
        record = {
            "step": self.progress.step,
            "loss": _finite(loss),
            "grad_norm": _finite(norm),
            "lr": learning_rate_at(self.config, self.progress.step - 1),
        }
        seconds = self.pace.lap(self.progress.step)
        tokens_per_s = self.config.tokens_per_step / seconds
        peak = devices.peak_flops(self.device, self.dtype)
        flops_per_s = tokens_per_s * self.model.flops_per_token() / distributed.size()
        mfu = flops_per_s / peak if peak else None
        record |= {"ms_per_step": 1000 * seconds, "tokens_per_s": tokens_per_s, "mfu": mfu}
        shows_pace = self.pace.laps > self.compiles  # the first lap may be a compiler's
        is_first = self.pace.laps == 1 + self.compiles
        self.report.step(record, shows_pace, is_first and self.device.type == "cpu")

    def _save_and_stop(self, signal_number: int) -> int:
        self.settle_bad_steps()
        self.progress.seconds = time.perf_counter() - self.started
        self._save_everything()
        command = "python" if distributed.size() == 1 else "torchrun ..."
        self._say(
            f"{signal.Signals(signal_number).name}: saved after step {self.progress.step}; go on "
            f"with: {command} train.py --out_dir={shlex.quote(self.config.out_dir)} "
            "--init_from=resume"
        )
        distributed.largest(0)  # all wait for the save, deaf to further signals
        return 128 + signal_number

    def _announce(self) -> None:
        config, n = self.config, distributed.size()
        each = f"{n} processes, each with " if n > 1 else ""
        self._say(
            f"{config.dataset}: {len(self.train_split):,} train and {len(self.val_split):,} val "
            f"tokens, {config.tokens_per_step:,} in a step\n"
            f"model: {self.model.n_parameters():,} parameters on {each}"
            f"{devices.describe(self.device)}, {str(self.dtype).removeprefix('torch.')}"
        )
        if n_cut := self.train_split.n_cut:
            self._say(f"{n_cut:,} pairs are longer than block_size={config.block_size} and cut")
        if self.is_resumed:
            self._say(f"resuming after step {self.progress.step} of {config.max_iters}")

    def _save_everything(self) -> None:
        """Keeps the checkpoint before, but never that of another run in the folder."""
        previous = self.out_dir / checkpoint.PREVIOUS
        self._save(
            checkpoint.LATEST, snapshot.everything(self), previous if self.has_saved else None
        )
        if distributed.is_main() and not self.has_saved:
            previous.unlink(missing_ok=True)
        self.has_saved = True

    def _save(self, name: str, contents: dict, previous: Path | None = None) -> None:
        if distributed.is_main():
            self.report.sync()  # no checkpoint is newer on the disk than the lines that led to it
            checkpoint.save(self.out_dir / name, contents, previous)

    def _say(self, text: str) -> None:
        if distributed.is_main():
            print(text, flush=True)


def count_answers(logits, targets):
    """logits (B, T, V), targets (B, T) -> (2,): how many answers there are, and how many right.

    An answer is a run of targets that carry loss. It is right when each of them scores highest
    after what is right before it: what greedy decoding would write.
    """
    counts = targets != dataset.IGNORE_INDEX
    begins = counts & ~F.pad(counts, (1, 0))[:, :-1]
    number = begins.cumsum(dim=1)  # of the answer that a target is in, from 1 on
    is_wrong = counts & (logits.argmax(dim=-1) != targets)
    n_wrong = torch.zeros_like(F.pad(number, (1, 0))).scatter_add_(1, number, is_wrong.long())
    n_answers = begins.sum()
    return torch.stack((n_answers, n_answers - (n_wrong[:, 1:] > 0).sum()))


def _finite(value) -> float | None:
    number = value.item()
    return number if math.isfinite(number) else None


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
    """Yield a list that SIGINT or SIGTERM is put in; a second one acts at once, as ever.

    Not so in a run of several processes: what started them sends more than one.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        received.append(number)
        if distributed.size() == 1:
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
