"""
Threads within a call. Imports neither torch nor transformers.

The pools of `concurrent.futures` take no more work once a program's main thread has ended, while its other threads, a
server's for example, go on.
"""

from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from threading import Lock, Semaphore, Thread
from typing import TypeVar


Item = TypeVar("Item")
Result = TypeVar("Result")
_END = object()


def in_threads(function: Callable[[Item], Result], items: list[Item], threads: int) -> list[Result]:
    """
    The function's result for each item, from at most so many threads, of which the caller's is one.

    Raises:
        BaseException: what the function raised first. No further items are begun then.
    """
    results, errors, numbers, lock = [None] * len(items), [], iter(range(len(items))), Lock()

    def work():
        while not errors:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            try:
                results[number] = function(items[number])
            except BaseException as error:
                errors.append(error)

    started = [thread for _ in range(min(threads, len(items)) - 1) if (thread := _start(work)) is not None]
    try:
        work()
    finally:
        for thread in started:
            thread.join()
    if errors:
        raise errors[0]
    return results


def one_ahead(parts: Iterable[Item]) -> Iterator[Item]:
    """The same parts, of which a thread makes the next one while the caller works on the last."""
    made, wanted = SimpleQueue(), Semaphore(0)
    is_closed = False

    def make():
        # One thread for all parts: torch gives each new one its own pool of threads.
        try:
            for part in parts:
                made.put((part, None))
                wanted.acquire()
                if is_closed:
                    return
            made.put((_END, None))
        except BaseException as error:
            made.put((_END, error))

    # A reader that an error has ended may live on in its traceback, with the thread, which must not keep a program
    # alive.
    thread = _start(make, daemon=True)
    if thread is None:
        yield from parts
        return
    try:
        while (item := made.get())[0] is not _END:
            wanted.release()
            yield item[0]
        if item[1] is not None:
            raise item[1]
    finally:
        is_closed = True
        wanted.release()
        thread.join()


def _start(work: Callable[[], None], daemon: bool | None = None) -> Thread | None:
    """A thread, or None if the system has none left: then the caller does its work."""
    thread = Thread(target=work, daemon=daemon)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


__all__ = ["in_threads", "one_ahead"]
