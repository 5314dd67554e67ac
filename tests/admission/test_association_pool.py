"""Idle associations are released, and none is lent after its pool was closed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest

from prefect_dicom.network.requestor import Requestor
from prefect_dicom.run.run import Run
from prefect_dicom.testing import tiny_instances
from tests.support.sites import PATIENCE_SECONDS, Place, site_around, until


@pytest.fixture
def opened(tmp_path) -> Iterator[tuple[Place, Run]]:
    with (
        site_around(tmp_path, tiny_instances(1), retrieve="c-get") as place,
        place.opened() as run,
    ):
        yield place, run


@contextlib.contextmanager
def idle_and_looked_up(
    run: Run, monkeypatch: pytest.MonkeyPatch, answer: Callable
) -> Iterator[tuple[Requestor, threading.Event]]:
    """An idle association whose slot is being looked up until the event is set."""
    looked_up, go_on = threading.Event(), threading.Event()

    def held(*arguments):
        looked_up.set()
        assert go_on.wait(PATIENCE_SECONDS)
        return answer(*arguments)

    with run.access.pool.requestor("pacs") as requestor:
        requestor.open()
    with monkeypatch.context() as patch:
        patch.setattr(run.ledger.rate_limits, "check_slot", held)
        assert looked_up.wait(PATIENCE_SECONDS)
    yield requestor, go_on
    go_on.set()


def test_an_idle_association_whose_slot_is_being_looked_up_is_closed_with_the_others(
    opened, monkeypatch
):
    place, run = opened
    with idle_and_looked_up(run, monkeypatch, run.ledger.rate_limits.check_slot):
        run.access.pool.close()
        until(lambda: place.pacs.established() == 0, "the association is closed")


def test_an_idle_association_can_be_borrowed_while_its_slot_is_being_looked_up(opened, monkeypatch):
    place, run = opened
    pool = run.access.pool

    def given_up(*_: object) -> tuple[bool, bool]:
        return False, False

    with (
        idle_and_looked_up(run, monkeypatch, given_up) as (first, go_on),
        pool.requestor("pacs") as second,
    ):
        go_on.set()
        until(lambda: pool._releaser is None, "nothing else is idle")
        assert second is first and place.pacs.established() == 1
