"""Idle associations are released, and none is lent after its pool was closed."""

from __future__ import annotations

import threading

from prefect_dicom.testing import tiny_instances
from tests.support.sites import PATIENCE_SECONDS, site_around, until


def test_an_idle_association_whose_slot_is_being_looked_up_is_closed_with_the_others(
    tmp_path, monkeypatch
):
    looked_up, go_on = threading.Event(), threading.Event()
    with (
        site_around(tmp_path, tiny_instances(1), retrieve="c-get") as place,
        place.opened() as run,
    ):
        limits, pool = run.ledger.rate_limits, run.access.pool
        check_slot = limits.check_slot

        def held(*arguments):
            looked_up.set()
            assert go_on.wait(PATIENCE_SECONDS)
            return check_slot(*arguments)

        with pool.requestor("pacs") as requestor:
            requestor.open()
        with monkeypatch.context() as patch:
            patch.setattr(limits, "check_slot", held)
            assert looked_up.wait(PATIENCE_SECONDS)
            pool.close()
            until(lambda: place.pacs.established() == 0, "the association is closed")
            go_on.set()


def test_an_idle_association_can_be_borrowed_while_its_slot_is_being_looked_up(
    tmp_path, monkeypatch
):
    looked_up, go_on = threading.Event(), threading.Event()
    with (
        site_around(tmp_path, tiny_instances(1), retrieve="c-get") as place,
        place.opened() as run,
    ):
        limits, pool = run.ledger.rate_limits, run.access.pool

        def held(*_):
            looked_up.set()
            assert go_on.wait(PATIENCE_SECONDS)
            return False, False  # The slot has been given up.

        with pool.requestor("pacs") as first:
            first.open()
        with monkeypatch.context() as patch:
            patch.setattr(limits, "check_slot", held)
            assert looked_up.wait(PATIENCE_SECONDS)
        with pool.requestor("pacs") as second:
            go_on.set()
            until(lambda: pool._releaser is None, "nothing else is idle")
            assert second is first and place.pacs.established() == 1
