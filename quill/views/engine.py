"""The thread that owns the model: it writes texts in a batch, and makes calls in between."""

import functools
import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from quill.errors import RunError
from quill.views.batching import Batch, Text


class Busy(Exception):  # noqa: N818  it is no error of the program
    """More texts are being written and wait than the engine takes."""


class Engine:
    """on_error of a text is called, in the thread, with what ended it before it was complete.

    make_batch: called in the thread, and what it raises is raised here. All of PyTorch's work
    should be done there: two threads that compute have two pools of OpenMP threads, more than there
    are cores, and then a step of 8 texts takes 13 ms where it could take 9.
    """

    def __init__(self, make_batch: Callable[[], Batch], max_waiting: int):
        self.max_waiting = max_waiting
        self.waiting: deque[Text] = deque()
        self.calls: deque[Callable[[], None]] = deque()
        self.orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # come first
        self.lock = threading.Lock()  # of `waiting`
        self.is_closed = False
        made = Future()
        options = {"name": "model", "daemon": True, "args": (make_batch, made)}
        self.thread = threading.Thread(target=self._run, **options)
        self.thread.start()
        made.result()

    # ---- called from other threads ---------------------------------------------------------------

    def submit(self, texts: list[Text]) -> None:
        """Write them all; raises Busy where there is no room for all of them."""
        with self.lock:
            n_open = len(self.batch.texts) + len(self.waiting)
            if n_open + len(texts) > self.batch.max_texts + self.max_waiting:
                raise Busy
            self.waiting.extend(texts)
        self._wake()

    def cancel(self, texts: list[Text]) -> None:
        """Write no more of those that are not complete; within a token."""
        self.orders.put(lambda: [self._drop(text) for text in texts])

    def call(self, function: Callable) -> Future:
        """The result of function(), after the next token; raises Busy where too many wait."""
        if len(self.calls) > self.max_waiting:
            raise Busy
        future = Future()
        self.calls.append(lambda: fulfil(future, function))
        self._wake()
        return future

    def close(self) -> None:
        """End with an error what is not complete."""
        self.is_closed = True
        self._wake()
        self.thread.join()

    def _wake(self) -> None:
        self.orders.put(lambda: None)

    # ---- in the thread ---------------------------------------------------------------------------

    def _run(self, make_batch: Callable[[], Batch], made: Future) -> None:
        def make():
            self.batch = make_batch()

        fulfil(made, make)
        if made.exception() is None:
            self._write()

    def _write(self) -> None:
        while not self.is_closed:
            is_idle = not (self.batch.texts or self.waiting or self.calls)
            if is_idle:
                self.orders.get()()
            while not self.orders.empty():
                self.orders.get()()
            if self.calls:  # one for each token, so that neither keeps the other waiting
                self.calls.popleft()()
            self._let_join()
            if self.batch.texts:
                self._guarded(list(self.batch.texts), self.batch.step)
        for text in (*self.batch.texts, *self.waiting):
            text.on_error(RunError("the server is stopping"))
        for call in self.calls:
            call()

    def _let_join(self) -> None:
        while len(self.batch.texts) < self.batch.max_texts:
            with self.lock:
                if not self.waiting:
                    return
                text = self.waiting.popleft()
            self._guarded([text], functools.partial(self.batch.join, text))

    def _guarded(self, texts: list[Text], work: Callable[[], None]) -> None:
        """A failure ends these texts, and not the thread."""
        try:
            work()
        except Exception as error:  # out of memory, scores that are not finite
            if not isinstance(error, RunError):
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


def fulfil(future: Future, function: Callable) -> None:
    """Make the call that somebody waits for, if they still do."""
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)
