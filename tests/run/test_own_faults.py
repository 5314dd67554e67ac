"""Our own ports, disks, processes, stores and clocks may fail: no study does because of it.

:data:`REACTIONS` names the reaction to each fault of our own side. Every one is provoked by the
real thing (a socket that is bound, a disk that is full, a process that is killed), and afterwards
the promise holds and a run to which nothing happens ends with everything archived.
"""

from __future__ import annotations

import os
import random
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

import pytest

from prefect_dicom.archive.spool import Spool
from prefect_dicom.config.site import load_site
from prefect_dicom.core.errors import (
    ArchiveError,
    ConfigurationError,
    LedgerError,
    PacsError,
    ReceiverError,
    SpoolFull,
)
from prefect_dicom.core.model import Disposition, Verdict
from prefect_dicom.network.storage_scp import ReceiverLease, running_receiver
from prefect_dicom.operations.doctor import examine
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_run
from prefect_dicom.testing import Behaviour, tiny_instances
from prefect_dicom.testing.instances import changed
from tests.support.campaign import subset
from tests.support.disks import fill, small_disk
from tests.support.peers import free_port
from tests.support.s3_server import S3Server
from tests.support.sites import LOOPBACK, Place, credentials, site_around, until

pytestmark = [
    pytest.mark.campaign("our side"),
    pytest.mark.filterwarnings("ignore::UserWarning:pydicom"),
]

REACTIONS = {
    "F50": "the run stops at its start, names who has the port, and asks the PACS for nothing",
    "F51": "one receiver for each AE title and port, shared by all runs that name it alike",
    "F52": "the run stops asking at the reserve; no object is refused before",
    "F53": "the next run takes what has arrived, and asks for the rest",
    "F54": "uploads have retries of their own; what waits for the archive holds up the PACS",
    "F55": "the run stops; what was on its way lies in the spool, and is not asked for again",
    "F56": "nothing is ordered by the clock on the wall",
    "F57": "the node is disabled with the checklist, and its studies stay pending",
    "F58": "an AE title that is none is refused with the site file; an odd UID holds nobody up",
}
METHODS = ("c-move", "c-get")
SERVICES = {"c-move": "C-MOVE", "c-get": "C-GET"}
MANY = 6


def test_every_fault_of_our_own_side_has_its_reaction_and_its_tests():
    assert list(REACTIONS) == [f"F5{digit}" for digit in range(9)]
    tested = {name[5:8].upper() for name in globals() if re.match(r"test_f5\d_", name)}
    assert tested == set(REACTIONS)


def times_kept(place: Place) -> Counter[str]:
    """How often the receiver has said success to each object."""
    sent = [one for request in list(place.pacs.log) for one in request.sent]
    return Counter(one.sop_instance_uid for one in sent if one.status == 0x0000)


def all_pending(place: Place) -> bool:
    return dict(place.totals().rows) == {Verdict.PENDING: len(place.verdicts())}


def six() -> list:
    return list(tiny_instances(1, instances=MANY, side=200))


def silent_after(answers: int, retrieve: str, hold: threading.Event | None = None) -> Behaviour:
    return Behaviour(
        "net.stall_after",
        answers=answers,
        hold=hold or threading.Event(),
        service=SERVICES[retrieve],
        on_request=1,
    )


# --- F50, F51: the receiver's port and AE title


def test_f50_a_port_that_something_else_has_stops_the_run_at_its_start(tmp_path):
    with site_around(tmp_path, six()) as place:
        with socket.socket() as other:
            other.bind((LOOPBACK, place.site.receiver.port))
            other.listen()
            with pytest.raises(ReceiverError) as caught:
                place.pull()
        assert caught.value.code == "receiver-taken"
        assert caught.value.disposition is Disposition.OPERATOR
        assert str(place.site.receiver.port) in caught.value.detail
        # And who has it: this process.
        assert f"process {os.getpid()} " in caught.value.detail
        assert place.asked_for() == 0
        place.goes_on()


@pytest.mark.whole_campaign
def test_f50_a_receiver_that_a_dead_run_has_left_behind_is_used(tmp_path):
    with site_around(tmp_path, six(), script=[silent_after(3, "c-move")]) as place:
        place.change(receiver={"idle_seconds": 60})
        with place.victim(place.cohort()):
            until(lambda: sum(times_kept(place).values()) == 3, "three have arrived")
        with running_receiver(place.site) as lease:
            left_behind = lease.status()["pid"]
        place.pacs.script.clear()
        place.goes_on()
        with running_receiver(place.site) as lease:
            assert lease.status()["pid"] == left_behind


@pytest.mark.parametrize("shared", subset(["ae_title", "port"], ["port"]))
def test_f51_another_site_cannot_have_our_ae_title_or_port(tmp_path, shared):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    with (
        site_around(tmp_path / "one", six()) as one,
        site_around(tmp_path / "other", six()) as other,
    ):
        other.change(receiver={shared: getattr(one.site.receiver, shared)})
        with ReceiverLease(one.site), pytest.raises(ReceiverError, match="receiver-taken"):
            other.pull()
        assert other.asked_for() == 0
        one.goes_on()


@pytest.mark.whole_campaign
def test_f51_two_runs_at_once_share_one_receiver_and_get_what_each_asked_for(tmp_path):
    objects = list(tiny_instances(4, instances=3))
    uids = sorted({o.study_instance_uid for o in objects})
    with site_around(tmp_path, objects) as place:
        goes_on_later = place.cohort()
        numbers = [register_cohort(place.site, goes_on_later, None, "all").number]
        for name, part in (("one", uids[:2]), ("other", uids[2:])):
            cohort = place.cohort([{"StudyInstanceUID": uid} for uid in part])
            numbers.append(register_cohort(place.site, cohort, None, name).number)

        def run(number: int) -> int:
            with open_run(place.site, number) as pull:
                work_through(pull)
                return pull.nodes.receiver().status()["pid"]

        with ThreadPoolExecutor(2) as pool:
            receivers = list(pool.map(run, numbers[1:]))
        assert len(set(receivers)) == 1
        assert place.quarantined() == []
        assert set(times_kept(place).values()) == {1}
        run(numbers[0])
        assert dict(place.totals().rows) == {Verdict.ARCHIVED: 4}
        place.audit()


# --- F52: the disk


@pytest.mark.parametrize("retrieve", subset(METHODS, ["c-move"]))
def test_f52_at_the_reserve_the_run_stops_asking_before_anything_is_refused(tmp_path, retrieve):
    with small_disk(tmp_path / "disk", mebibytes=4) as disk:
        spool = {"path": str(disk / "spool"), "reserve_bytes": 1 << 20}
        objects = list(tiny_instances(3, instances=4, side=200))
        node = {"limits": {"chunk_studies": 1}}
        # While the first study is on its way somebody else fills the disk to the reserve.
        filled = threading.Event()

        class Filling(threading.Event):
            def wait(self, timeout: float | None = None) -> bool:
                if not filled.is_set():
                    fill(disk, but=(1 << 20) + 300_000)
                    filled.set()
                return True

        script = [silent_after(1, retrieve, Filling())]
        with site_around(
            tmp_path, objects, retrieve=retrieve, script=script, spool=spool, node=node
        ) as place:
            # 160 KB of a study go in, are archived, and make room for the next.
            assert dict(place.pull().rows) == {Verdict.ARCHIVED: 3}
            (disk / "filler").unlink()
            fill(disk, but=1 << 20)
            asked = place.asked_for(SERVICES[retrieve])
            later = list(tiny_instances(1, instances=2, seed=5, side=200))
            for stored in later:
                place.pacs.holdings.add(stored)
            with pytest.raises(SpoolFull) as caught:
                place.pull()
            assert caught.value.disposition is Disposition.OPERATOR
            assert place.asked_for(SERVICES[retrieve]) == asked
            sent = [one.status for r in place.pacs.log for one in r.sent]
            assert set(sent) == {0x0000}
            (disk / "filler").unlink()
            place.pull()
            assert set(times_kept(place).values()) == {1}
            assert place.spooled() == []


# --- F53: the process


@pytest.mark.parametrize("answers", subset([1, 3], [3]))
@pytest.mark.parametrize("retrieve", subset(METHODS, ["c-get"]))
def test_f53_what_has_arrived_when_a_run_is_killed_is_the_next_ones(tmp_path, retrieve, answers):
    with site_around(
        tmp_path, six(), retrieve=retrieve, script=[silent_after(answers, retrieve)]
    ) as place:
        with place.victim(place.cohort()):
            until(lambda: sum(times_kept(place).values()) == answers, "some have arrived")
        place.pacs.script.clear()
        place.goes_on()
        assert set(times_kept(place).values()) == {1}
        assert sum(times_kept(place).values()) == MANY


# --- F54: the archive


@pytest.fixture
def bucket(monkeypatch) -> Iterator[S3Server]:
    with S3Server() as server:
        credentials(server, monkeypatch)
        yield server


@pytest.mark.parametrize("retrieve", subset(METHODS, ["c-move"]))
def test_f54_an_archive_that_asks_for_patience_gets_it(tmp_path, bucket, retrieve):
    bucket.fail("PutObject", status=503, code="SlowDown", times=3)
    with site_around(tmp_path, six(), retrieve=retrieve, bucket=bucket) as place:
        place.goes_on()
        assert set(times_kept(place).values()) == {1}


@pytest.mark.parametrize("retrieve", subset(METHODS, []))
def test_f54_credentials_that_expire_stop_the_run_and_cost_no_retrieve(tmp_path, bucket, retrieve):
    objects = list(tiny_instances(2, instances=3))
    node = {"limits": {"chunk_studies": 1}}
    with site_around(tmp_path, objects, retrieve=retrieve, bucket=bucket, node=node) as place:
        bucket.meanwhile("PutObject", lambda: bucket.expire(bucket.access_key), skip=2)
        with pytest.raises(ArchiveError) as caught:
            place.pull()
        assert caught.value.disposition is Disposition.OPERATOR
        bucket.add_user(bucket.access_key, bucket.secret_key)
        place.audit()
        place.goes_on()
        assert set(times_kept(place).values()) == {1}


@pytest.mark.parametrize("retrieve", subset(METHODS, ["c-get"]))
def test_f54_what_waits_for_the_archive_holds_up_the_pacs_when_the_spool_is_full(
    tmp_path, bucket, retrieve
):
    bucket.fail("PutObject", status=503, code="SlowDown", times=2)
    with small_disk(tmp_path / "disk", mebibytes=4) as disk:
        spool = {"path": str(disk / "spool"), "reserve_bytes": 0}
        with site_around(tmp_path, six(), retrieve=retrieve, bucket=bucket, spool=spool) as place:
            if retrieve == "c-move":
                ReceiverLease(place.site).close()
            else:
                Spool(disk / "spool")
            # Two objects at a time.
            fill(disk, but=100_000)
            place.goes_on()
            assert set(times_kept(place).values()) == {1}
            assert place.asked_for(SERVICES[retrieve]) >= 2


# --- F55: the ledger


@pytest.mark.parametrize("retrieve", subset(METHODS, ["c-move"]))
def test_f55_when_the_ledger_cannot_be_written_what_is_on_its_way_ends_in_the_spool(
    tmp_path, retrieve
):
    with small_disk(tmp_path / "disk", mebibytes=4) as disk:
        filled: list[Path] = []

        class Filling(threading.Event):
            """In place of an event: from now on the ledger's disk is full."""

            def wait(self, timeout: float | None = None) -> bool:
                if not filled:
                    filled.append(fill(disk))
                return True

        script = [silent_after(1, retrieve, Filling())]
        ledger = {"path": str(disk / "ledger.sqlite")}
        with site_around(tmp_path, six(), retrieve=retrieve, script=script, ledger=ledger) as place:
            with pytest.raises(LedgerError) as caught:
                place.pull()
            assert caught.value.code == "ledger-unavailable"
            assert caught.value.disposition is Disposition.OPERATOR
            asked = place.asked_for(SERVICES[retrieve])
            filled[0].unlink()
            assert all_pending(place)
            assert len(place.spooled()) == MANY
            place.goes_on()
            # Nothing was asked for again, though the ledger had never heard of it.
            assert place.asked_for(SERVICES[retrieve]) == asked
            assert set(times_kept(place).values()) == {1}


# --- F56: the clock


@contextmanager
def a_clock_that(jumps, monkeypatch) -> Iterator[None]:
    """Let all our modules read a wall clock that is off by what ``jumps()`` says.

    Only ours: the PACS runs in this process too, and its timers are not what is tested.
    """

    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime.now(tz) + jumps()

    modules = [
        module
        for name, module in sys.modules.items()
        if name.startswith("prefect_dicom.") and getattr(module, "datetime", None) is datetime
    ]
    assert modules
    with monkeypatch.context() as patch:
        for module in modules:
            patch.setattr(module, "datetime", Clock)
        yield


CLOCKS = {
    "an hour ahead": lambda lots: timedelta(hours=1),
    "an hour behind": lambda lots: timedelta(hours=-1),
    "a year ahead": lambda lots: timedelta(days=365),
    "anywhere at each reading": lambda lots: timedelta(seconds=lots.randrange(-(10**8), 10**8)),
}


@pytest.mark.parametrize("clock", subset(CLOCKS, ["anywhere at each reading"]))
def test_f56_nothing_depends_on_what_the_clock_on_the_wall_says(tmp_path, monkeypatch, seed, clock):
    lots = random.Random(seed)
    objects = list(tiny_instances(3, instances=3))
    script = [
        Behaviour("move.drop_instances", instances=1, times=1),
        Behaviour("store.truncate", instances=1, times=1),
    ]
    with site_around(tmp_path, objects, script=script) as place:
        with a_clock_that(lambda: CLOCKS[clock](lots), monkeypatch):
            place.goes_on()
            asked = place.asked_for("C-MOVE")
            place.goes_on()
            assert place.asked_for("C-MOVE") == asked
        place.goes_on()
        assert place.asked_for("C-MOVE") == asked


# --- F57: the way back


@pytest.mark.parametrize("wrong", subset(["port", "title", "silence"], ["title"]))
def test_f57_a_receiver_that_the_pacs_has_elsewhere_disables_the_node(tmp_path, wrong):
    with site_around(tmp_path, tiny_instances(5)) as place:
        place.change(node={"limits": {"chunk_studies": 1}})
        right = dict(place.pacs.destinations)
        if wrong == "port":
            title = place.site.receiver.ae_title
            place.pacs.destinations = {title: (LOOPBACK, free_port())}
        elif wrong == "title":
            place.pacs.destinations = {"ELSEWHERE": (LOOPBACK, place.site.receiver.port)}
        else:
            place.pacs.script.append(Behaviour("move.success_nothing"))
        with pytest.raises(PacsError) as caught:
            place.pull()
        assert caught.value.disposition is Disposition.OPERATOR
        assert "our AE title in exact case" in caught.value.reason.advice
        assert place.archived() == {}
        # None of the five has failed for it, or only those the first few moves were for.
        assert place.totals().rows[Verdict.PENDING] >= 2
        [fault] = [finding for finding in examine(place.site) if not finding.ok]
        assert "C-MOVE" in fault.check
        place.pacs.destinations = right
        place.pacs.script.clear()
        place.goes_on()


# --- F58: titles and UIDs


TITLES = ["SEVENTEEN_LETTERS", "", "  ", " PADDED", "UMLAUT_\xdc", "BACK\\SLASH", "LINE\nFEED"]


@pytest.mark.parametrize("title", subset(TITLES, TITLES[:1]))
@pytest.mark.parametrize("part", subset(["receiver", "called", "calling"], 1))
def test_f58_an_ae_title_that_is_none_is_refused_with_the_site_file(tmp_path, title, part):
    with site_around(tmp_path, six()) as place:
        key = {"receiver": "ae_title", "called": "called_ae_title", "calling": "calling_ae_title"}
        before = place.file.read_text()
        section = "receiver" if part == "receiver" else "node"
        place.change(**{section: {key[part]: title}})
        with pytest.raises(ConfigurationError) as caught:
            load_site(place.file)
        assert key[part] in str(caught.value)
        assert place.asked_for() == 0
        place.file.write_text(before)
        load_site(place.file)


@pytest.mark.whole_campaign
def test_f58_a_sop_class_that_is_no_uid_ends_no_c_get_and_holds_nobody_up(tmp_path):
    odd = changed(next(tiny_instances(1, seed=3)), SOPClassUID="1.2.840.\xe9")
    with site_around(tmp_path, [*six(), odd], retrieve="c-get") as place:
        place.change(node={"timeouts": {"acse_seconds": 120}})
        began = time.monotonic()
        place.pull()
        assert time.monotonic() - began < 60
        states = {uid: str(study.state) for uid, study in place.studies().items()}
        assert states[six()[0].study_instance_uid] == "archived"
        place.audit()
