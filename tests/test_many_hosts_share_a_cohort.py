"""Hosts that share a ledger share a cohort: each receives for itself, and none waits for the dead.

Each host has a receiver with an AE title of its own, and a spool that no other host sees. A run
ends when its cohort does: what another run works on is watched until it is finished or falls free.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import sites
from campaign import subset
from peers import free_port
from postgres import cluster
from sites import LOOPBACK, Place, site_around

from prefect_dicom.flows import pull_cohort
from prefect_dicom.model import Verdict
from prefect_dicom.receiver import running_receiver
from prefect_dicom.steps import Pull
from prefect_dicom.testing import Behaviour, tiny_objects

pytestmark = [pytest.mark.campaign("operations"), pytest.mark.timeout(300)]

KINDS = ("sqlite", "postgresql")
STUDIES, INSTANCES = 6, 2
PATIENCE = 60


class Held(threading.Event):
    """Holds a request in its middle until the test has done something."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.reached.set()
        return super().wait(PATIENCE)


@contextlib.contextmanager
def two_hosts(folder: Path, kind: str, hold: Held) -> Iterator[tuple[Place, Place]]:
    """Two hosts of one site; the first C-MOVE stalls after its first object."""
    ledger = {"path": None, "url": cluster().new_database()} if kind == "postgresql" else {}
    script = [Behaviour("net.stall_after", answers=1, hold=hold, service="C-MOVE", on_request=1)]
    limits = {"limits": {"chunk_studies": 2}}
    objects = tiny_objects(STUDIES, instances=INSTANCES)
    with site_around(folder, objects, script=script, ledger=ledger, node=limits) as first:
        port = free_port()
        title = f"TEST{port}"
        first.pacs.destinations[title] = (LOOPBACK, port)
        second = Place(folder, folder / "second.yaml", first.pacs)
        second.file.write_text(first.file.read_text())
        second.change(
            receiver={"ae_title": title, "port": port},
            spool={"path": str(folder / "second-spool")},
            node={"calling_ae_title": title},
        )
        try:
            yield first, second
        finally:
            hold.set()
            if (lease := running_receiver(second.site)) is not None:
                lease.stop()
                lease.close()


@contextlib.contextmanager
def running(place: Place, cohort: Path) -> Iterator[subprocess.Popen]:
    """A run in a process of its own, that is killed at the latest when the block ends."""
    with (place.folder / "run.log").open("wb") as log:
        run = subprocess.Popen(
            [sys.executable, sites.__file__, str(place.file), str(cohort)], stdout=log, stderr=log
        )
        try:
            yield run
        finally:
            run.kill()
            run.wait()


def done_once(hosts: tuple[Place, Place], *, twice: int = 0) -> None:
    """All is archived, and no more than ``twice`` of the studies were asked for again."""
    first, second = hosts
    assert first.totals().rows == {Verdict.ARCHIVED: STUDIES}
    second.audit()
    sent = Counter(s.sop_instance_uid for r in first.pacs.log for s in r.sent)
    assert len(sent) == STUDIES * INSTANCES
    again = {
        s.study_instance_uid for r in first.pacs.log for s in r.sent if sent[s.sop_instance_uid] > 1
    }
    assert len(again) <= twice
    assert first.quarantined() == second.quarantined() == []


@pytest.mark.parametrize("kind", subset(KINDS, ["postgresql"]))
def test_the_studies_of_a_host_that_died_are_taken_over_by_one_that_waits(
    tmp_path, kind, monkeypatch, prefect_harness
):
    hold, waits = Held(), threading.Event()
    left_to_others = Pull.left_to_others

    def seen(self: Pull) -> tuple[int, bool]:
        left = left_to_others(self)
        if left == (2, False):
            waits.set()
        return left

    monkeypatch.setattr(Pull, "left_to_others", seen)
    with two_hosts(tmp_path, kind, hold) as (first, second):
        cohort = first.cohort()
        with running(first, cohort) as run, contextlib.ExitStack() as stack:
            assert hold.reached.wait(PATIENCE)

            def kill_when_the_other_waits() -> None:
                assert waits.wait(PATIENCE)
                assert second.totals().rows == {Verdict.ARCHIVED: STUDIES - 2, Verdict.PENDING: 2}
                run.send_signal(signal.SIGKILL)

            killer = threading.Thread(target=kill_when_the_other_waits)
            killer.start()
            stack.callback(killer.join)
            state = pull_cohort(str(cohort), str(second.file), return_state=True)
        assert (state.type, state.name) == ("COMPLETED", "Completed")
        moves = first.pacs.requests("C-MOVE")
        titles = {place.site.receiver.ae_title for place in (first, second)}
        assert {move.destination for move in moves} == titles
        assert all(move.destination == move.calling_ae_title for move in moves[1:])
        done_once((first, second), twice=2)
        # The other host comes back: of what lies in its spool nothing is needed any more.
        hold.set()
        asked = first.asked_for()
        assert first.pull(cohort).rows == {Verdict.ARCHIVED: STUDIES}
        assert first.asked_for() == asked
        assert first.spooled() == second.spooled() == []
        first.audit()
        assert first.quarantined() == []
