"""No study has two runs that work on it, and a run that has lost a study writes no more of it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import select

from prefect_dicom.core.errors import ClaimLost, LedgerError
from prefect_dicom.core.model import (
    ArchivedInstance,
    CohortRow,
    Evidence,
    Instance,
    InstanceKey,
    InstanceState,
    ReceivedInstance,
    Study,
    StudyState,
)
from prefect_dicom.ledger import Claim, Ledger
from prefect_dicom.ledger.schema import runs
from tests.support.postgres import cluster, ledger_url

pytestmark = pytest.mark.campaign("concurrency")

KEY = InstanceKey("1.2.3.4", "1.2.3.4.1")
SHA256 = "ab" * 32

# Claims all studies, says so, and lives until it is killed or may go on.
_HOLDER = """
import json, sys
from prefect_dicom.ledger import Ledger
with Ledger.open(sys.argv[1]) as ledger:
    with ledger.runs.begin("pull") as run:
        claims = ledger.claims.acquire(run, range(1, 1000))
        print(json.dumps([run.number, [claim.reference for claim in claims]]), flush=True)
        sys.stdin.readline()
"""


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    return ledger_url(request.param, tmp_path)


@pytest.fixture
def ledger(url):
    with Ledger.open(url) as opened:
        yield opened


@pytest.fixture
def references(ledger) -> list[int]:
    """Three pending studies."""
    lines = (2, 3, 4)
    cohort = ledger.cohorts.add("d" * 64, "main", [CohortRow(line) for line in lines]).number
    ledger.rows.record_discoveries(cohort, [(n, [Study(f"1.2.{n}")], None, ()) for n in lines])
    return [record.reference for record in ledger.studies.to_pull(cohort)]


@pytest.fixture
def holder(url, references):
    """Another process whose run holds all three studies; and its run's number."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLDER, url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        number, held = json.loads(process.stdout.readline())
        assert held == references
        yield process, number
    finally:
        process.kill()
        process.communicate()


def fail_every_write(ledger: Ledger, claim: Claim) -> None:
    """Each verb that writes about the study is refused."""
    arrival = ReceivedInstance(
        claim.reference, KEY, "1.2", "1.2.840.10008.1.2.1", SHA256, 1, SHA256
    )
    stored = (KEY, ArchivedInstance("key", SHA256, 1), ())
    for write in (
        lambda: ledger.instances.record_list(claim, [Instance(KEY)], Evidence.INSTANCE_LIST),
        lambda: ledger.instances.record_received({claim.reference: claim}, [arrival]),
        lambda: ledger.instances.record_lost(claim, [KEY]),
        lambda: ledger.instances.record_rejected(claim, [(KEY, "wrong-patient")]),
        lambda: ledger.instances.record_stored(claim, [stored]),
        lambda: ledger.studies.record_archived(claim, b"{}", instances=1, withheld=0, size_bytes=1),
        lambda: ledger.studies.record_failed(claim, "pacs-busy"),
    ):
        with pytest.raises(ClaimLost):
            write()


def test_a_living_runs_studies_cannot_be_claimed(ledger, references, holder):
    _, number = holder
    with ledger.runs.begin("pull") as run:
        assert ledger.claims.acquire(run, references) == []
    assert {claim.run for claim in ledger.claims.live()} == {number}
    assert [record.claimed for record in ledger.studies.of_cohort(1)] == [True] * 3


def test_a_killed_runs_studies_are_taken_over(ledger, references, holder):
    process, number = holder
    before = ledger.claims.live()
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_until_the_server_has_noticed(ledger)
    assert ledger.claims.live() == []
    assert [record.claimed for record in ledger.studies.of_cohort(1)] == [False] * 3
    with ledger.runs.begin("pull") as run:
        claims = ledger.claims.acquire(run, references)
        assert [claim.reference for claim in claims] == references
        assert [claim.attempt for claim in claims] == [claim.attempt + 1 for claim in before]
        assert run.number != number
        assert ledger.claims.live() == claims
        assert ledger.claims.still_held(before) == []
        assert ledger.claims.still_held(claims) == claims
        for old in before:
            fail_every_write(ledger, old)
        ledger.claims.release(before)
        assert ledger.claims.live() == claims


def _wait_until_the_server_has_noticed(ledger: Ledger) -> None:
    """PostgreSQL ends a session when it next looks at its socket; the file lock is gone at once."""
    if not ledger._database.is_sqlite:
        for _ in range(10_000):
            if not ledger.claims.live():
                break


def test_a_stopped_run_keeps_its_studies(ledger, references, holder):
    process, number = holder
    process.send_signal(signal.SIGSTOP)
    try:
        with ledger.runs.begin("pull") as run:
            assert ledger.claims.acquire(run, references) == []
        assert {claim.run for claim in ledger.claims.live()} == {number}
    finally:
        process.send_signal(signal.SIGCONT)


def test_a_run_that_ends_gives_its_studies_back(ledger, references, holder):
    process, _ = holder
    process.communicate("\n")
    assert process.returncode == 0
    with ledger.runs.begin("pull") as run:
        claims = ledger.claims.acquire(run, references)
        assert [claim.attempt for claim in claims] == [2, 2, 2]


def test_a_run_that_ends_with_an_error_gives_its_studies_back(ledger, references):
    with pytest.raises(LookupError, match="in the block"), ledger.runs.begin("pull") as run:
        ledger.claims.acquire(run, references)
        raise LookupError("in the block")
    assert ledger.claims.live() == []
    assert [record.claimed for record in ledger.studies.of_cohort(1)] == [False] * 3


def test_a_writer_that_wakes_up_after_its_run_writes_nothing(ledger, references):
    with ledger.runs.begin("pull") as run:
        old = ledger.claims.acquire(run, references)
    fail_every_write(ledger, old[0])
    assert [record.state for record in ledger.studies.of_cohort(1)] == [StudyState.PENDING] * 3
    with pytest.raises(LedgerError) as error:
        ledger.claims.acquire(run, references)
    assert error.value.code == "ledger-unavailable"
    with ledger.runs.begin("pull") as next_run:
        new = ledger.claims.acquire(next_run, references)
        fail_every_write(ledger, old[0])
        ledger.instances.record_list(new[0], [Instance(KEY)], Evidence.INSTANCE_LIST)
        fail_every_write(ledger, old[0])
        (instance,) = ledger.instances.of_study(new[0].reference)
        assert instance.state is InstanceState.EXPECTED


def test_a_batch_with_one_lost_claim_records_nothing_until_it_is_left_out(ledger, references):
    with ledger.runs.begin("pull") as run:
        claims = {claim.reference: claim for claim in ledger.claims.acquire(run, references)}
        for claim in claims.values():
            ledger.instances.record_list(claim, [Instance(KEY)], Evidence.INSTANCE_LIST)
        batch = [
            ReceivedInstance(reference, KEY, "1.2", "1.2.840.10008.1.2.1", SHA256, 1, SHA256)
            for reference in references
        ]
        ledger.claims.release([claims[references[1]]])
        with ledger.runs.begin("other") as other:
            ledger.claims.acquire(other, references)
            with pytest.raises(ClaimLost):
                ledger.instances.record_received(claims, batch)
            assert ledger.progress.totals(1).received == 0
            standing = {
                claim.reference: claim for claim in ledger.claims.still_held(claims.values())
            }
            assert sorted(standing) == [references[0], references[2]]
            assert ledger.instances.record_received(standing, batch) == [batch[1]]
            assert ledger.progress.totals(1).received == 2


def test_a_claim_ends_with_the_study(ledger, references):
    with ledger.runs.begin("pull") as run:
        archived, failed, released = ledger.claims.acquire(run, references)
        ledger.instances.record_list(archived, [], Evidence.INSTANCE_LIST)
        ledger.studies.record_archived(archived, b"{}", instances=0, withheld=0, size_bytes=0)
        ledger.studies.record_failed(failed, "pacs-busy")
        ledger.claims.release([released])
        assert ledger.claims.live() == []
        for claim in (archived, failed, released):
            fail_every_write(ledger, claim)
        (again,) = ledger.claims.acquire(run, references)
        assert (again.reference, again.attempt) == (released.reference, 2)


def test_a_run_does_not_take_a_study_twice(ledger, references):
    with ledger.runs.begin("pull") as run:
        assert len(ledger.claims.acquire(run, references + references)) == 3
        assert ledger.claims.acquire(run, references) == []


def test_runs_that_claim_at_once_share_the_studies_out(url, ledger):
    count, runners = 60, 4
    cohort = ledger.cohorts.add("d" * 64, "main", [CohortRow(n) for n in range(count)]).number
    ledger.rows.record_discoveries(
        cohort, [(n, [Study(f"1.2.{n}")], None, ()) for n in range(count)]
    )
    references = [record.reference for record in ledger.studies.to_pull(cohort)]
    barrier = threading.Barrier(runners)
    taken: list[list[int]] = []

    def work(own: Ledger, run) -> None:
        barrier.wait()
        claims = []
        for start in range(0, count, 5):
            claims += own.claims.acquire(run, references[start : start + 5])
        taken.append([claim.reference for claim in claims])

    with ExitStack() as stack:
        threads = []
        for _ in range(runners):
            own = stack.enter_context(Ledger.open(url))
            run = stack.enter_context(own.runs.begin("pull"))
            threads.append(threading.Thread(target=work, args=(own, run)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(sum(taken, [])) == references
        assert len(taken) == runners


@contextmanager
def somebody_asks_about(ledger: Ledger, number: int) -> Iterator[None]:
    """The moment in which another process tries whether the run lives, held still."""
    with ledger._database.read() as connection:
        lock = connection.scalar(select(runs.c.lock).where(runs.c.number == number))
    if ledger._database.is_sqlite:
        with ledger._database.locks._path(lock).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield
    else:
        with ledger._database.read() as connection:
            assert not ledger._database.locks.is_held(connection, lock)
            yield


def test_asking_whether_a_run_lives_does_not_look_like_the_run(ledger, references, holder):
    process, number = holder
    process.kill()
    process.wait()
    _wait_until_the_server_has_noticed(ledger)
    with somebody_asks_about(ledger, number), ledger.runs.begin("pull") as run:
        assert len(ledger.claims.acquire(run, references)) == 3


def test_no_lock_files_are_left_by_runs(tmp_path):
    url = ledger_url("sqlite", tmp_path)
    with Ledger.open(url) as ledger:
        with ledger.runs.begin("pull"):
            assert len(_lock_files(tmp_path)) == 1
        assert _lock_files(tmp_path) == []


def test_the_lock_file_of_a_killed_run_goes_when_its_studies_are_taken_over(tmp_path):
    url = ledger_url("sqlite", tmp_path)
    with Ledger.open(url) as ledger:
        ledger.cohorts.add("d" * 64, "main", [CohortRow(2)])
        ledger.rows.record_discoveries(1, [(2, [Study("1.2.3")], None, ())])
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        process.stdout.readline()
        process.kill()
        process.communicate()
        assert len(_lock_files(tmp_path)) == 1
        with ledger.runs.begin("pull") as run:
            assert len(ledger.claims.acquire(run, [1])) == 1
            assert len(_lock_files(tmp_path)) == 1
        assert _lock_files(tmp_path) == []


def _lock_files(directory: Path) -> list[Path]:
    return [path for path in directory.glob("ledger.db.runs/*") if path.name != "schema.lock"]


def test_a_program_that_a_run_starts_does_not_keep_its_lock(tmp_path):
    url = ledger_url("sqlite", tmp_path)
    child = None
    with Ledger.open(url) as ledger:
        ledger.cohorts.add("d" * 64, "main", [CohortRow(2)])
        ledger.rows.record_discoveries(1, [(2, [Study("1.2.3")], None, ())])
        program = _HOLDER.replace(
            "print(",
            "import subprocess; p = subprocess.Popen(['cat']); print(p.pid, flush=True); print(",
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        child = int(process.stdout.readline())
        process.stdout.readline()
        process.kill()
        process.wait()
        try:
            os.kill(child, 0)
            with ledger.runs.begin("pull") as run:
                assert len(ledger.claims.acquire(run, [1])) == 1
        finally:
            process.stdin.close()
            process.stdout.close()


def test_a_run_whose_session_the_server_ended_has_lost_its_studies(tmp_path):
    url = ledger_url("postgresql", tmp_path)
    with Ledger.open(url) as ledger, Ledger.open(url) as other:
        ledger.cohorts.add("d" * 64, "main", [CohortRow(2)])
        ledger.rows.record_discoveries(1, [(2, [Study("1.2.3")], None, ())])
        with ledger.runs.begin("pull") as run:
            (old,) = ledger.claims.acquire(run, [1])
            with cluster().connect(_database(url)) as administrator:
                administrator.execute(
                    "SELECT pg_terminate_backend(pid, 10000) FROM pg_locks"
                    " WHERE locktype = 'advisory' AND granted"
                    " AND database = (SELECT oid FROM pg_database"
                    " WHERE datname = current_database())"
                )
            with pytest.raises(LedgerError) as error:
                ledger.claims.acquire(run, [1])
            assert "lost its lock" in error.value.detail
            with other.runs.begin("pull") as successor:
                (new,) = other.claims.acquire(successor, [1])
                assert new.attempt == old.attempt + 1
                fail_every_write(ledger, old)


def _database(url: str) -> str:
    return url.split("@/")[1].split("?")[0]
