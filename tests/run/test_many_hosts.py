"""Hosts that share a ledger share a cohort: each receives for itself, and none waits for the dead.

Each host has a receiver with an AE title of its own, and a spool that no other host sees. A run
ends when its cohort does: what another run works on is watched until it is finished or falls free.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from prefect_dicom.core.model import CohortRow, Study, Verdict
from prefect_dicom.flows import pull_cohort
from prefect_dicom.ledger import Ledger
from prefect_dicom.network.storage_scp import running_receiver
from prefect_dicom.run.chunks import ChunkPlanner
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support import program
from tests.support.campaign import subset
from tests.support.peers import free_port
from tests.support.postgres import cluster, ledger_url
from tests.support.sites import LOOPBACK, Place, site_around

pytestmark = [pytest.mark.campaign("operations"), pytest.mark.timeout(300)]

KINDS = ("sqlite", "postgresql")
STUDIES, INSTANCES = 6, 2
PATIENCE = 240


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
    objects = tiny_instances(STUDIES, instances=INSTANCES)
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
            [*program("sites"), str(place.file), str(cohort)], stdout=log, stderr=log
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


@pytest.mark.parametrize("kind", subset(KINDS, []))
def test_the_studies_of_a_host_that_died_are_taken_over_by_one_that_waits(
    tmp_path, kind, monkeypatch, prefect_harness
):
    hold, waits = Held(), threading.Event()
    studies_of_others = ChunkPlanner.studies_of_others

    def seen(self: ChunkPlanner) -> tuple[int, bool]:
        left = studies_of_others(self)
        if left == (2, False):
            waits.set()
        return left

    monkeypatch.setattr(ChunkPlanner, "studies_of_others", seen)
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


@pytest.mark.parametrize("kind", subset(KINDS, ["sqlite"]))
def test_rows_that_a_run_asks_for_are_asked_for_by_no_other_until_it_dies(tmp_path, kind):
    url = ledger_url(kind, tmp_path)
    with Ledger.open(url) as one, Ledger.open(url) as two:
        cohort = one.cohorts.add(
            "d" * 64, "main", [CohortRow(line) for line in range(2, 12)]
        ).number
        with two.runs.begin("pull", cohort) as second:
            with one.runs.begin("pull", cohort) as first:
                taken = one.rows.take(first, cohort, 0, 4)
                assert [row.line for row in taken] == [2, 3, 4, 5]
                assert [row.line for row in two.rows.take(second, cohort, 0, 4)] == [6, 7, 8, 9]
                assert [row.line for row in one.rows.take(first, cohort, 5, 4)] == [10, 11]
                assert two.rows.take(second, cohort, 9) == []
                assert two.rows.taken_by_others(second, cohort) == (6, 0)
                assert [r.line for r in two.rows.to_discover(cohort, run=second)] == [6, 7, 8, 9]
                # What was answered is nobody's any more, whatever the answer.
                one.rows.record_discoveries(cohort, [(2, [Study("1.2")]), (3, (), "pacs-failure")])
                assert two.rows.taken_by_others(second, cohort) == (4, 0)
                assert [row.line for row in two.rows.take(second, cohort, 0, 1)] == [3]
            # The first run has ended before it had asked for all of its rows.
            assert two.rows.taken_by_others(second, cohort) == (0, 4)
            assert [row.line for row in two.rows.take(second, cohort, 3)] == [4, 5, *range(6, 12)]
            assert two.rows.taken_by_others(second, cohort) == (0, 0)


def test_two_runs_at_once_take_every_row_once(tmp_path):
    url = ledger_url("postgresql", tmp_path)
    lines = list(range(2, 402))
    taken: list[list[int]] = [[], []]
    begin = threading.Barrier(2)

    def take(number: int) -> None:
        with Ledger.open(url) as ledger, ledger.runs.begin("pull", 1) as run:
            begin.wait(PATIENCE)
            after = 0
            while rows := ledger.rows.take(run, 1, after, 10):
                taken[number] += [row.line for row in rows]
                after = rows[-1].line
            begin.wait(PATIENCE)

    with Ledger.open(url) as ledger:
        ledger.cohorts.add("d" * 64, "main", [CohortRow(line) for line in lines])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(take, range(2)))
    assert sorted(taken[0] + taken[1]) == lines
