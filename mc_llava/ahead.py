"""Prepares the next items in threads while the model works on earlier ones."""

import os
import threading
from collections.abc import Callable
from typing import Generic, TypeVar


THREADS = min(8, max(2, os.cpu_count() or 2))
MOST_BYTES = 2**30  # of results that are prepared before they are needed
Item = TypeVar("Item")
Result = TypeVar("Result")


class Ahead(Generic[Item, Result]):
    """
    Starts to prepare items at once, in order and in several threads, and pauses when `MOST_BYTES` are prepared.

    Threads never wait: they end when all is done, too much is held, or `stop` was called.

    Args:
        prepare: makes a result of an item. `results` raises its errors.
        count_bytes: the memory that a result takes.
    """

    def __init__(
        self, prepare: Callable[[Item], Result], items: list[Item], count_bytes: Callable[[Result], int] = lambda _: 0
    ):
        self.prepare, self.items, self.count_bytes = prepare, items, count_bytes
        self._results, self._next, self._held, self._running = {}, 0, 0, 0
        self._most, self._is_stopped, self._error = MOST_BYTES, False, None
        self._changed = threading.Condition()
        with self._changed:
            self._start_threads()

    def results(self) -> list[Result]:
        """Wait for the results of all items, and return them in order."""
        with self._changed:
            self._most = float("inf")  # they are needed now
            self._start_threads()
            is_alone = not self._running  # all is done, or the system has no threads left
            self._running += is_alone
        if is_alone:
            self._work()
        with self._changed:
            self._changed.wait_for(lambda: not self._running)
            if self._error is not None:
                raise self._error
            return [self._results.pop(number) for number in range(len(self.items))]

    def stop(self):
        """Let the threads end after the items that they are working on."""
        with self._changed:
            self._is_stopped = True

    def _start_threads(self):
        for _ in range(min(THREADS, len(self.items) - self._next) - self._running):
            try:
                threading.Thread(target=self._work).start()
            except RuntimeError:  # the system has no threads left: `results` works without
                return
            self._running += 1  # it waits for the lock until then

    def _take(self) -> int | None:
        """The number of the next item, or None if this thread has to end."""
        with self._changed:
            is_done = self._next == len(self.items) or self._error is not None
            if is_done or self._is_stopped or self._held >= self._most:
                self._running -= 1
                self._changed.notify_all()
                return None
            self._next += 1
            return self._next - 1

    def _work(self):
        while (number := self._take()) is not None:
            try:
                result = self.prepare(self.items[number])
                with self._changed:
                    self._results[number] = result
                    self._held += self.count_bytes(result)
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
