"""People pause, resume and cancel runs, and what was under way stops within five seconds.

Wherever the run is just then, and whatever the PACS makes of a C-CANCEL: no object that has
arrived is lost or asked for again, and what a run leaves that was told to end is what a rerun
goes on from.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from prefect_dicom.core.errors import Interrupted
from prefect_dicom.core.model import RequestedState
from prefect_dicom.ledger import Cohort
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_run
from prefect_dicom.testing import Behaviour, tiny_instances
from prefect_dicom.testing.audit import Auditor
from tests.support import crashes
from tests.support.campaign import subset
from tests.support.s3_server import S3Server
from tests.support.sites import Place, credentials, site_around, until

PROMISED_SECONDS = 5.0
STUDIES, INSTANCES = 4, 6


# --- the moments at which somebody changes their mind


@dataclass(frozen=True)
class Moment:
    """A run under way: what holds it there, and how it shows that it is there."""

    name: str
    script: Callable[[], list[Behaviour]]
    is_there: Callable[[Place], object]

    def __str__(self) -> str:
        return self.name


def retrieves(place: Place) -> list:
    return [*place.pacs.requests("C-MOVE"), *place.pacs.requests("C-GET")]


def queries(place: Place, level: str) -> list:
    return [r for r in place.pacs.requests("C-FIND") if r.level == level]


def silent(service: str, **limits) -> Behaviour:
    return Behaviour("net.first_byte", service=service, hold=threading.Event(), **limits)


def of_retrieves(knob: str, **arguments) -> list[Behaviour]:
    return [Behaviour(knob, service=service, **arguments) for service in ("C-MOVE", "C-GET")]


MOMENTS = [
    Moment(
        "rows are asked for one by one",
        lambda: [Behaviour("net.slow", service="C-FIND", seconds=0.4)],
        lambda place: len(queries(place, "STUDY")) == 1,
    ),
    Moment(
        "a query for a study is not answered",
        lambda: [silent("C-FIND")],
        lambda place: queries(place, "STUDY"),
    ),
    Moment(
        "a query for a list is not answered",
        lambda: [silent("C-FIND", on_request=2)],
        lambda place: len(place.pacs.requests("C-FIND")) == 2,
    ),
    Moment(
        "objects come slowly",
        lambda: of_retrieves("net.slow", seconds=0.4),
        lambda place: len(place.pacs.sent_instances()) == 3,
    ),
    Moment(
        "objects come slowly, and a C-CANCEL stops nothing",
        lambda: (
            of_retrieves("net.slow", seconds=0.4) + of_retrieves("move.ignore_cancel", how="ignore")
        ),
        lambda place: len(place.pacs.sent_instances()) == 3,
    ),
    Moment(
        "objects come slowly, and a C-CANCEL is answered with an A-ABORT",
        lambda: (
            of_retrieves("net.slow", seconds=0.4) + of_retrieves("move.ignore_cancel", how="abort")
        ),
        lambda place: len(place.pacs.sent_instances()) == 3,
    ),
    Moment(
        "a retrieve is not answered",
        lambda: of_retrieves("net.first_byte", hold=threading.Event()),
        lambda place: retrieves(place),
    ),
    Moment(
        "a retrieve has fallen silent",
        lambda: of_retrieves("net.stall_after", answers=2, hold=threading.Event()),
        lambda place: len(place.pacs.sent_instances()) == 2,
    ),
]
BY_NAME = {moment.name: moment for moment in MOMENTS}


# --- what shows that it was obeyed


def last_asked(place: Place) -> float:
    """When the PACS was last asked for something, or last sent an object."""
    log = list(place.pacs.log)
    times = [request.at for request in log if request.service != "A-ASSOCIATE"]
    return max(times + [sent.at for request in log for sent in request.sent], default=0)


def nothing_was_taken_twice(place: Place) -> None:
    taken = Counter(
        sent.sop_instance_uid
        for request in list(place.pacs.log)
        for sent in request.sent
        if sent.status == 0
    )
    assert set(taken.values()) <= {1}


@contextlib.contextmanager
def working(place: Place) -> Iterator[list[BaseException]]:
    """A run in a thread of its own; what it ended with is known when the block has ended."""
    ended_with: list[BaseException] = []

    def work() -> None:
        try:
            place.pull()
        except BaseException as error:
            ended_with.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield ended_with
    finally:
        thread.join(60)
        assert not thread.is_alive()


MATRIX = list(
    itertools.product(
        MOMENTS, ("c-move", "c-get"), (RequestedState.PAUSED, RequestedState.CANCELLED)
    )
)
ALWAYS = [
    (
        BY_NAME["objects come slowly, and a C-CANCEL stops nothing"],
        "c-move",
        RequestedState.CANCELLED,
    ),
]


@pytest.mark.campaign("operations")
@pytest.mark.parametrize("case", subset(MATRIX, ALWAYS), ids=lambda case: ", ".join(map(str, case)))
def test_a_run_stops_within_five_seconds_and_the_next_goes_on(around, case, record_property):
    moment, retrieve, requested = case
    objects = tiny_instances(STUDIES, instances=INSTANCES)
    with around(objects, script=moment.script(), retrieve=retrieve) as place:
        with working(place) as ended_with, place.ledger() as ledger:
            until(lambda: moment.is_there(place), moment.name)
            began = time.monotonic()
            control = ledger.run_control
            control.pause(1) if requested is RequestedState.PAUSED else control.cancel(1)
        ended = time.monotonic()
        assert [type(error) for error in ended_with] == [Interrupted]
        record_property("ended_after", round(ended - began, 1))
        record_property("last_asked_after", round(last_asked(place) - began, 1))
        assert ended - began < PROMISED_SECONDS
        assert last_asked(place) - began < PROMISED_SECONDS
        place.audit()
        place.pacs.script.clear()
        with place.ledger() as ledger:
            ledger.run_control.resume(1)
        place.goes_on()
        nothing_was_taken_twice(place)


@pytest.mark.campaign("operations")
@pytest.mark.parametrize(
    "requested", subset([RequestedState.PAUSED, RequestedState.CANCELLED], 0), ids=str
)
def test_an_archive_that_is_overloaded_keeps_nobody_waiting(around, monkeypatch, requested):
    objects = list(tiny_instances(STUDIES, instances=INSTANCES))
    with S3Server() as bucket:
        credentials(bucket, monkeypatch)
        bucket.fail("PutObject", times=10_000, status=503, code="SlowDown")
        with around(objects, retrieve="c-get", bucket=bucket) as place:
            with working(place) as ended_with, place.ledger() as ledger:
                until(lambda: bucket.requests["PutObject"] > 10, "objects are refused")
                began = time.monotonic()
                control = ledger.run_control
                control.pause(1) if requested is RequestedState.PAUSED else control.cancel(1)
            assert [type(error) for error in ended_with] == [Interrupted]
            assert time.monotonic() - began < PROMISED_SECONDS
            place.audit()
            bucket.behave()
            with place.ledger() as ledger:
                ledger.run_control.resume(1)
            place.goes_on()
            nothing_was_taken_twice(place)


@pytest.mark.campaign("operations")
@pytest.mark.parametrize("number", subset(range(20), 0))
def test_killed_while_it_ends_a_run_leaves_what_a_rerun_goes_on_from(tmp_path, seed, number):
    lot = random.Random(f"{seed}/{number}")
    (folder := tmp_path / "site").mkdir()
    moment, retrieve = lot.choice(MOMENTS[3:]), lot.choice(("c-move", "c-get"))
    objects = tiny_instances(STUDIES, instances=INSTANCES)
    with site_around(folder, objects, script=moment.script(), retrieve=retrieve) as place:
        cohort, auditor = place.cohort(), Auditor(place.site, place.pacs, watch=folder)
        run = crashes.start(place.file, cohort, tmp_path / "log")
        until(lambda: moment.is_there(place), moment.name)
        with place.ledger() as ledger:
            assert len(ledger.run_control.cancel(1)) == 1
        run.join(lot.uniform(0, 4))
        crashes.kill([run])
        # It may have ended before, with the error that says it was interrupted.
        assert crashes.ended([run])[0] in (crashes.KILLED, 1)
        assert auditor.audit() == []
        place.pacs.script.clear()
        crashes.bring_to_its_end(place.file, cohort)
        assert auditor.audit(finished=True) == []
        assert auditor.audit_rerun(lambda: crashes.bring_to_its_end(place.file, cohort)) == []


@pytest.mark.campaign("operations")
@pytest.mark.parametrize("retrieve", subset(["c-move", "c-get"], 0))
def test_where_a_node_takes_one_at_a_time_the_more_urgent_cohort_comes_first(around, retrieve):
    objects = tiny_instances(3 * STUDIES, instances=2)
    limits = {"associations": 1, "chunk_studies": 2}
    with around(objects, retrieve=retrieve, node={"limits": limits}) as place:
        uids = place.pacs.holdings.study_instance_uids()
        registered = []
        for number in range(3):
            rows = [{"StudyInstanceUID": uid} for uid in uids[number::3]]
            # Each in a file of its own name: what a cohort is, is in its file.
            file = place.cohort(rows).rename(place.folder / f"cohort-{number}.csv")
            registered.append(register_cohort(place.site, file, None))
        first, later, urgent = registered
        with place.ledger() as ledger:
            ledger.run_control.prioritise(urgent.number, 5)
        place.pacs.script += of_retrieves("net.slow", seconds=0.5)

        def work(cohort: Cohort) -> None:
            with open_run(place.site, cohort.number) as pull:
                work_through(pull)

        with ThreadPoolExecutor(3) as pool:
            runs = [pool.submit(work, first)]
            until(lambda: retrieves(place), "the first has the node")
            for waiting, cohort in enumerate((later, urgent), 1):
                runs.append(pool.submit(work, cohort))
                until(lambda n=waiting: in_the_queue(place) == n, "it waits for its turn")
            place.pacs.script.clear()
            for run in runs:
                run.result()
        assert Auditor(place.site, place.pacs).audit(finished=True) == []
        sent = list(dict.fromkeys(s.study_instance_uid for r in retrieves(place) for s in r.sent))
        when = [[sent.index(uid) for uid in uids[number::3]] for number in range(3)]
        assert max(when[2]) < min(when[1])


def in_the_queue(place: Place) -> int:
    with sqlite3.connect(place.site.ledger.path) as connection:
        return connection.execute("SELECT count(*) FROM places WHERE NOT taken").fetchone()[0]
