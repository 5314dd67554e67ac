"""However many run on a cohort, at once or too late, each study is moved and committed once."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from prefect_dicom.config.site import ledger_url
from prefect_dicom.core.errors import ReceiverError
from prefect_dicom.core.model import Disposition, Verdict
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_run
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support import program
from tests.support.campaign import subset
from tests.support.postgres import cluster
from tests.support.sites import LOOPBACK, Place, site_around

pytestmark = pytest.mark.campaign("concurrency")

KINDS = ("sqlite", "postgresql")
STUDIES, INSTANCES = 8, 2
PATIENCE = 240


@contextlib.contextmanager
def place_with(
    folder: Path, kind: str = "sqlite", *, studies: int = STUDIES, **parts
) -> Iterator[Place]:
    """A site whose ledger is of this kind."""
    if kind == "postgresql":
        parts["ledger"] = {"path": None, "url": cluster().new_database()}
    with site_around(folder, tiny_instances(studies, instances=INSTANCES), **parts) as place:
        yield place


@contextlib.contextmanager
def running(place: Place, cohort: Path, number: int = 1) -> Iterator[list[subprocess.Popen]]:
    """Runs in processes of their own."""
    with contextlib.ExitStack() as stack:
        processes = []
        for each in range(number):
            log = stack.enter_context((place.folder / f"run{each}.log").open("wb"))
            process = subprocess.Popen(
                [*program("sites"), str(place.file), str(cohort)],
                stdout=log,
                stderr=log,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def log_of(place: Place, each: int = 0) -> str:
    return (place.folder / f"run{each}.log").read_text()


class Held(threading.Event):
    """Holds a request in its middle until the test has done something."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.reached.set()
        return super().wait(PATIENCE)

    def at(self, service: str, *, request: int = 1, answers: int = 1) -> Behaviour:
        return Behaviour(
            "net.stall_after", answers=answers, hold=self, service=service, on_request=request
        )


def done_once(place: Place, studies: int = STUDIES) -> None:
    """All is archived, and nothing came, went or was written twice."""
    assert place.totals().rows == {Verdict.ARCHIVED: studies}
    place.audit()
    assert set(Counter(place.pacs.sent_instances()).values()) == {1}
    assert len(place.archived()) == studies * (INSTANCES + 1)
    assert place.quarantined() == []
    asked = place.asked_for()
    place.pull()
    assert place.asked_for() == asked
    assert place.spooled() == []


RUNS = [(kind, number) for kind in KINDS for number in (2, 4, 8)]


@pytest.mark.parametrize("case", subset(RUNS, []), ids=str)
def test_runs_on_one_cohort_share_its_studies(tmp_path, case):
    kind, number = case
    limits = {"limits": {"chunk_studies": 1}}
    # Nobody gets on before all are there.
    arrived = threading.Barrier(number)

    class Together(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            arrived.wait(PATIENCE)
            return True

    script = [
        Behaviour("net.stall_after", answers=1, hold=Together(), service="C-MOVE", on_request=n)
        for n in range(1, number + 1)
    ]
    with place_with(tmp_path, kind, script=script, node=limits) as place:
        with running(place, place.cohort(), number) as runs:
            for each, run in enumerate(runs):
                assert run.wait(PATIENCE) == 0, log_of(place, each)
        done_once(place)


@pytest.mark.parametrize("kind", subset(KINDS, ["postgresql"]))
@pytest.mark.parametrize("retrieve", subset(("c-move", "c-get"), ["c-get"]))
def test_two_workers_on_one_task_do_it_once(tmp_path, kind, retrieve):
    """As when Prefect hands a task out twice."""
    with place_with(tmp_path, kind, retrieve=retrieve) as place:
        with place.opened() as pull:
            for first, last in pull.discovery.pages():
                pull.discovery.discover(first, last)
            (chunk,) = list(pull.chunks.chunks())
            begin = threading.Barrier(2)

            def work(_: int) -> tuple[int, int]:
                begin.wait(PATIENCE)
                claimed = pull.retrieval.retrieve(chunk)
                begin.wait(PATIENCE)
                return claimed, pull.archiving.archive(chunk)

            with ThreadPoolExecutor(2) as pool:
                claimed, archived = zip(*pool.map(work, range(2)), strict=True)
            assert sorted(claimed) == [0, STUDIES]
            assert sorted(archived) == [0, STUDIES]
        done_once(place)


@pytest.mark.parametrize("kind", subset(KINDS, ["sqlite"]))
def test_a_second_attempt_while_the_first_still_lives_leaves_the_work_to_it(tmp_path, kind):
    """As when Prefect has lost sight of a worker and starts its task again."""
    hold = Held()
    with place_with(tmp_path, kind, retrieve="c-get", script=[hold.at("C-GET")]) as place:
        with place.opened() as pull:
            for first, last in pull.discovery.pages():
                pull.discovery.discover(first, last)
            (chunk,) = list(pull.chunks.chunks())
            with ThreadPoolExecutor(1) as pool:
                attempt = pool.submit(pull.retrieval.retrieve, chunk)
                assert hold.reached.wait(PATIENCE)
                assert pull.retrieval.retrieve(chunk) == 0
                assert pull.archiving.archive(chunk) == 0
                # A flow does this when the second attempt has failed.
                pull.archiving.give_back(chunk)
                hold.set()
                assert attempt.result(PATIENCE) == STUDIES
            assert pull.archiving.archive(chunk) == STUDIES
        done_once(place)


@pytest.mark.parametrize("kind", subset(KINDS, ["postgresql"]))
def test_a_study_of_two_cohorts_is_moved_for_one_and_counts_for_both(tmp_path, kind):
    hold = Held()
    script = [hold.at("C-GET")]
    with place_with(tmp_path, kind, studies=3, retrieve="c-get", script=script) as place:
        uids = place.pacs.holdings.study_instance_uids()
        numbers = []
        for some in (uids[:2], uids[1:]):
            path = place.cohort([{"StudyInstanceUID": uid} for uid in some])
            numbers.append(register_cohort(place.site, path, None).number)

        def pull(number: int) -> Counter:
            with open_run(place.site, number) as opened:
                work_through(opened)
                return opened.ledger.progress.totals(number).rows

        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(pull, numbers[0])
            assert hold.reached.wait(PATIENCE)
            # The study in the middle is the other run's; its row here waits.
            assert pull(numbers[1]) == {Verdict.ARCHIVED: 1, Verdict.PENDING: 1}
            hold.set()
            assert first.result(PATIENCE) == {Verdict.ARCHIVED: 2}
        with place.ledger() as ledger:
            assert ledger.progress.totals(numbers[1]).rows == {Verdict.ARCHIVED: 2}
        assert Counter(place.pacs.sent_instances()).total() == 3 * INSTANCES
        assert set(Counter(place.pacs.sent_instances()).values()) == {1}
        assert len(place.archived()) == 3 * (INSTANCES + 1)


@pytest.mark.parametrize("kind", subset(KINDS, []))
def test_a_rerun_while_the_run_goes_on_takes_nothing_from_it(tmp_path, kind):
    hold = Held()
    with place_with(tmp_path, kind, retrieve="c-get", script=[hold.at("C-GET")]) as place:
        with running(place, place.cohort()) as [run]:
            assert hold.reached.wait(PATIENCE), log_of(place)
            asked = place.asked_for()
            assert place.rerun().rows == {Verdict.PENDING: STUDIES}
            assert place.asked_for() == asked
            hold.set()
            assert run.wait(PATIENCE) == 0, log_of(place)
        done_once(place)


# ------------------------------------------------------------------------- one that wakes up late


def everything(place: Place) -> dict[str, object]:
    """What the ledger says of studies and instances, and the archive's content."""
    engine = create_engine(ledger_url(place.site))
    with engine.connect() as connection:
        found: dict[str, object] = {
            table: sorted(connection.execute(text(f"SELECT * FROM {table}")).all(), key=repr)
            for table in ("studies", "instances", "manifests")
        }
    engine.dispose()
    found["archive"] = {
        key: hashlib.sha256(data).hexdigest() for key, data in place.archived().items()
    }
    return found


def take_its_lock_away(place: Place, kind: str) -> None:
    """As if the run were dead: its session was given up, or its lock file was cleared away."""
    if kind == "sqlite":
        locks = Path(f"{place.site.ledger.path}.runs")
        for path in locks.glob("*.lock"):
            if path.name != "schema.lock":
                path.unlink()
        return
    name = ledger_url(place.site).split("@/")[1].split("?")[0]
    with cluster().connect(name) as administrator:
        administrator.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_locks"
            " WHERE locktype = 'advisory' AND granted AND database ="
            " (SELECT oid FROM pg_database WHERE datname = current_database())"
        )


@pytest.mark.parametrize("kind", subset(KINDS, ["sqlite"]))
@pytest.mark.parametrize("where", subset(("C-FIND list", "C-GET", "second list"), ["C-GET"]))
def test_a_worker_that_wakes_up_after_its_claims_were_taken_over_changes_nothing(
    tmp_path, kind, where
):
    hold = Held()
    # Studies first, then the two levels of the list of each; and once more before the manifest.
    script = {
        "C-FIND list": [hold.at("C-FIND", request=2, answers=0)],
        "C-GET": [hold.at("C-GET")],
        "second list": [hold.at("C-FIND", request=4, answers=0)],
    }[where]
    with place_with(tmp_path, kind, studies=1, retrieve="c-get", script=script) as place:
        with running(place, place.cohort()) as [stale]:
            assert hold.reached.wait(PATIENCE), log_of(place)
            stale.send_signal(signal.SIGSTOP)
            # Stopped is not dead: its studies stay its own.
            assert place.pull().rows == {Verdict.PENDING: 1}
            take_its_lock_away(place, kind)
            assert place.pull().rows == {Verdict.ARCHIVED: 1}
            before = everything(place)
            hold.set()
            stale.send_signal(signal.SIGCONT)
            stale.wait(PATIENCE)
            assert everything(place) == before
            assert "Traceback" not in log_of(place) or "ClaimLost" in log_of(place)
        # What it may have left in the spool is gone with the next run.
        asked = place.asked_for()
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert place.asked_for() == asked
        place.audit()
        assert place.spooled() == []


# ------------------------------------------------------------------------------------ the receiver


def test_a_port_that_another_program_has_is_named_before_the_pacs_is_asked(tmp_path):
    with place_with(tmp_path, studies=1) as place:
        port = place.site.receiver.port
        with socket.create_server((LOOPBACK, port)):
            with pytest.raises(ReceiverError) as caught:
                place.pull()
            assert caught.value.code == "receiver-taken"
            assert caught.value.disposition is Disposition.OPERATOR
            assert str(port) in caught.value.detail
            assert place.asked_for() == 0
        done_once_after(place)


def done_once_after(place: Place) -> None:
    assert place.pull().rows == {Verdict.ARCHIVED: 1}
    done_once(place, 1)


@pytest.mark.whole_campaign
def test_runs_that_start_the_receiver_at_once_get_one(tmp_path):
    with place_with(tmp_path) as place:
        halves = [place.pacs.holdings.study_instance_uids()[n::2] for n in range(2)]
        cohorts = []
        for n, half in enumerate(halves):
            path = place.cohort([{"StudyInstanceUID": uid} for uid in half])
            cohorts.append(path.rename(tmp_path / f"half{n}.csv"))
        with contextlib.ExitStack() as stack:
            runs = [stack.enter_context(running(place, cohort))[0] for cohort in cohorts]
            for run in runs:
                assert run.wait(PATIENCE) == 0, log_of(place)
        with place.ledger() as ledger:
            for cohort in ledger.cohorts.all():
                assert ledger.progress.totals(cohort.number).rows == {
                    Verdict.ARCHIVED: len(halves[0])
                }
        assert set(Counter(place.pacs.sent_instances()).values()) == {1}
        log = (place.site.spool.path / "receiver.log").read_text()
        assert "Traceback" not in log
