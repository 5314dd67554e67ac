"""Queries go before retrieves at the associations of a node, and one at a time beside them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefect_dicom.admission.association_turns import AssociationTurns
from prefect_dicom.admission.health import RequestKind
from prefect_dicom.core.clock import Clock
from prefect_dicom.core.errors import Interrupted
from tests.support.sites import until

QUERY, RETRIEVE = RequestKind.QUERY, RequestKind.RETRIEVE


class Turns(AssociationTurns):
    """Turns of threads whose names are noted as they come to them."""

    def __init__(self, most: int) -> None:
        super().__init__(Clock(), lambda: most)
        self.checks = 0
        self.order: list[str] = []
        self.stopped = threading.Event()

    def check(self) -> None:
        self.checks += 1
        if self.stopped.is_set():
            raise Interrupted()

    def begin_as(self, name: str, kind: RequestKind) -> None:
        self.begin(kind, self.check)
        self.order.append(name)

    def waiting(self) -> int:
        return len(self._line._waiting)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(4) as pool:
        yield pool


def wait_in_line(pool, turns: Turns, *kinds: RequestKind) -> list:
    """Threads that wait one behind the other."""
    waiting = []
    for kind in kinds:
        before = turns.waiting()
        waiting.append(pool.submit(turns.begin_as, f"{kind} {len(waiting)}", kind))
        until(lambda before=before: turns.waiting() > before, "it waits")
    return waiting


def test_queries_that_wait_go_before_retrieves(pool):
    turns = Turns(most=1)
    turns.begin(RETRIEVE, turns.check)
    waiting = wait_in_line(pool, turns, RETRIEVE, QUERY, QUERY)
    for name in ("query 1", "query 2", "retrieve 0"):
        turns.end(RETRIEVE if not turns.order else QUERY)
        until(lambda name=name: name in turns.order, f"it is the turn of {name}")
    assert turns.order == ["query 1", "query 2", "retrieve 0"]
    assert all(each.result() is None for each in waiting)


def test_while_one_association_queries_the_others_retrieve(pool):
    turns = Turns(most=2)
    for _ in range(2):
        turns.begin(RETRIEVE, turns.check)
    waiting = wait_in_line(pool, turns, QUERY, QUERY, RETRIEVE)
    turns.end(RETRIEVE)
    turns.end(RETRIEVE)
    until(lambda: len(turns.order) == 2, "both associations are used")
    assert sorted(turns.order) == ["query 0", "retrieve 2"]
    turns.end(QUERY)
    assert all(each.result() is None for each in waiting)


def test_no_retrieve_waits_while_no_query_does(pool):
    turns = Turns(most=2)
    turns.begin(RETRIEVE, turns.check)
    assert turns.is_free()
    turns.begin(RETRIEVE, turns.check)
    assert not turns.is_free()


def test_who_is_to_stop_leaves_the_line(pool):
    turns = Turns(most=1)
    turns.begin(RETRIEVE, turns.check)
    (waiting,) = wait_in_line(pool, turns, QUERY)
    turns.stopped.set()
    with pytest.raises(Interrupted):
        waiting.result(10)
    assert turns.waiting() == 0
    turns.end(RETRIEVE)
    assert turns.is_free()
