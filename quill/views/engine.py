"""The thread that owns the model: it writes texts in a batch, and does in between what is asked."""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from quill.views.batching import Batch, Text


class Busy(Exception):  # noqa: N818  it is no error of the program
    """More texts are being written and wait than the engine takes."""


class Engine:
    """on_error of a text is called, in this thread, with what ended it before it was complete."""

    def __init__(self, batch: Batch, max_waiting: int):
        self.batch, self.max_waiting = batch, max_waiting
        self.waiting: deque[Text] = deque()
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.is_closed = False
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.lock = threading.Lock()  # of `waiting`, to which other threads add
        self.thread.start()

    # ---- called from other threads ---------------------------------------------------------------

    def submit(self, texts: list[Text]) -> None:
        """Write them all; raises Busy where there is no room for all of them."""
        with self.lock:
            n_open = len(self.batch.texts) + len(self.waiting)
            if n_open + len(texts) > self.batch.max_texts + self.max_waiting:
                raise Busy
            self.waiting.extend(texts)
        self.inbox.put(lambda: None)  # wakes the thread

    def cancel(self, texts: list[Text]) -> None:
        """Write no more of those that are not complete."""
        self.inbox.put(lambda: [self._drop(text) for text in texts])

    def call(self, function: Callable) -> Future:
        """The result of function(), between two tokens."""
        future = Future()

        def work():
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except Exception as error:  # for whoever waits
                    future.set_exception(error)

        self.inbox.put(work)
        return future

    def close(self) -> None:
        self.inbox.put(lambda: setattr(self, "is_closed", True))
        self.thread.join()

    # ---- in the thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        while not self.is_closed:
            is_idle = not self.batch.texts and not self.waiting
            if is_idle:
                self.inbox.get()()
            while not self.inbox.empty():
                self.inbox.get()()
            while self.waiting and len(self.batch.texts) < self.batch.max_texts:
                text = self.waiting.popleft()
                self._guarded([text], lambda text=text: self.batch.join(text))
            if self.batch.texts:
                self._guarded(list(self.batch.texts), self.batch.step)

    def _guarded(self, texts: list[Text], work: Callable[[], None]) -> None:
        """A failure ends these texts, and not the thread."""
        try:
            work()
        except Exception as error:  # out of memory, scores that are not finite
            logging.getLogger(__name__).exception("a text could not be written")
            for text in texts:
                if self._drop(text):
                    text.on_error(error)

    def _drop(self, text: Text) -> bool:
        """-> whether it was still being written, or waited."""
        if text in self.batch.texts:
            self.batch.leave(text)
            return True
        with self.lock:
            is_waiting = text in self.waiting
            if is_waiting:
                self.waiting.remove(text)
        return is_waiting
