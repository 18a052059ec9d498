"""
Threads within a call. Imports neither torch nor transformers.

The pools of `concurrent.futures` take no more work once a program's main thread has ended, even if its other
threads, such as a server's, keep running.
"""

from collections.abc import Callable, Iterable, Iterator
from threading import Lock, Thread
from typing import TypeVar


Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: list[Item], threads: int) -> list[Result]:
    """
    The function's result for each item, from at most `threads` threads, one of them the caller's.

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
    """The same parts; a thread makes the next one while the caller works on the last."""
    parts, made, end = iter(parts), [], object()

    def make():
        try:
            made.append((next(parts, end), None))
        except BaseException as error:
            made.append((end, error))

    make()
    while made:
        part, error = made.pop()
        if error is not None:
            raise error
        if part is end:
            return
        thread = _start(make)
        try:
            yield part
        finally:
            if thread is not None:
                thread.join()
        if thread is None:
            make()


def _start(work: Callable[[], None]) -> Thread | None:
    """A thread, or None if the system has none left: then the caller does its work."""
    thread = Thread(target=work)
    try:
        thread.start()
    except RuntimeError:
        return None
    return thread


__all__ = ["in_threads", "one_ahead"]
