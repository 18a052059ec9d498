"""Work ahead of time: results are in order, errors are raised, memory is bounded, and no thread is left."""

import threading
import time

import pytest

from mc_llava import ahead
from mc_llava.ahead import Ahead


@pytest.fixture(autouse=True)
def no_thread_stays(monkeypatch):
    monkeypatch.setattr(ahead, "THREADS", 2)
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive()


def test_results_are_in_order_whatever_takes_longest():
    def prepare(item):
        time.sleep(0.05 if item == 0 else 0)
        return item * 10

    assert Ahead(prepare, list(range(7))).results() == [0, 10, 20, 30, 40, 50, 60]
    assert Ahead(prepare, []).results() == []


def test_without_threads_it_works_when_it_is_asked(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert Ahead(str, [1, 2, 3]).results() == ["1", "2", "3"]
    with pytest.raises(ZeroDivisionError):
        Ahead(lambda item: 1 // item, [1, 0]).results()


def test_it_begins_before_it_is_asked():
    begun = threading.Event()
    work = Ahead(lambda item: begun.set(), [1])
    assert begun.wait(5)
    work.results()


def test_two_items_are_prepared_at_once():
    both = threading.Barrier(2)
    Ahead(lambda item: both.wait(5), [1, 2]).results()


def test_it_pauses_when_too_much_is_held(monkeypatch):
    monkeypatch.setattr(ahead, "MOST_BYTES", 100)
    prepared = []
    work = Ahead(lambda item: prepared.append(item) or item, list(range(50)), lambda result: 40)
    deadline = time.monotonic() + 5
    while work._running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 3 <= len(prepared) <= 4  # the second thread may have started on one
    assert work.results() == list(range(50)), "what is needed is prepared whatever it takes"


@pytest.mark.parametrize("error", [OSError("the disk"), KeyboardInterrupt(), MemoryError()])
def test_errors_are_raised_where_results_are_asked_for(error):
    def prepare(item):
        if item == 3:
            raise error
        return item

    with pytest.raises(type(error)):
        Ahead(prepare, list(range(100))).results()


def test_it_stops_after_what_it_has_begun_with():
    begun, may_end = [], threading.Event()

    def prepare(item):
        begun.append(item)
        may_end.wait(5)

    work = Ahead(prepare, list(range(100)))
    work.stop()
    may_end.set()
    deadline = time.monotonic() + 5
    while work._running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(begun) <= 2 and not work._running
