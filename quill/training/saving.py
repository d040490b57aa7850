"""When a run is saved, and the thread that writes its checkpoints while the training goes on.

What is saved are copies on the CPU (state_dict.py makes them), which no step changes any more. A
new best stays in memory until the next save, which writes best.pt first: no ckpt.pt on the disk
knows of a lower val loss than that of the best.pt beside it.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from quill.errors import RunError, describe_os_error
from quill.training import checkpoint, distributed


class Saver:
    """Writes best.pt and ckpt.pt of a run, one save at a time; of several processes on rank 0.

    As a context manager it waits for the last save. When the block raises an error, a best that is
    still in memory is written too; whether that succeeds or not, the block's error is what counts.
    """

    def __init__(self, out_dir: Path, seconds: float):
        """seconds: at least so many pass from one save to the next, but for the last ones."""
        self.out_dir, self.seconds = out_dir, seconds
        self.saved_at = time.monotonic()
        self.pending_best: dict | None = None
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.last_save: Future | None = None

    def keep_best(self, contents: dict) -> None:
        """To be best.pt, from the next save on."""
        if distributed.is_main():
            self.pending_best = contents

    def is_due(self, always: bool) -> bool:
        """Whether to save at this evaluation. All processes ask, and rank 0's clock decides.

        always: also when there was no new best since the last save.
        """
        is_time = time.monotonic() - self.saved_at >= self.seconds
        is_due = is_time and (always or self.pending_best is not None)
        return bool(distributed.all_reduce_max(int(is_due and distributed.is_main())))

    def start(self, contents: dict) -> None:
        """Begin to write the pending best, if there is one, and then ckpt.pt."""
        if distributed.is_main():
            best, self.pending_best = self.pending_best, None
            self.last_save = self.executor.submit(self._write, best, contents)
            self.saved_at = time.monotonic()

    def _write(self, best: dict | None, contents: dict) -> None:
        previous = self.out_dir / checkpoint.PREVIOUS
        try:
            if best is not None:
                checkpoint.save_checkpoint(self.out_dir / checkpoint.BEST, best)
            checkpoint.save_checkpoint(self.out_dir / checkpoint.LATEST, contents, previous)
        except OSError as error:
            if not self.out_dir.is_dir():
                raise RunError(f"{self.out_dir} was removed while the run was going on") from None
            raise RunError(describe_os_error(error)) from None

    def wait(self) -> None:
        """Until the last save is on the disk; raises the error that it failed with."""
        if self.last_save is not None:
            self.last_save.result()

    def check(self) -> None:
        """Raise the error of a save that has failed; does not wait."""
        if self.last_save is not None and self.last_save.done():
            self.last_save.result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        # Not after a second Ctrl-C, whose user wants to wait for nothing more.
        if isinstance(error, Exception) and self.pending_best is not None:
            path = self.out_dir / checkpoint.BEST
            self.executor.submit(checkpoint.save_checkpoint, path, self.pending_best)
        self.executor.shutdown()  # waits
        if error is None:
            self.wait()
