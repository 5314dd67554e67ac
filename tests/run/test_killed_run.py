"""A run that is killed, anywhere, is continued by the next: only what is missing moves again."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections import Counter

import pytest

from prefect_dicom.core.model import Verdict
from prefect_dicom.network.storage_scp import running_receiver
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.campaign import subset
from tests.support.s3_server import S3Server
from tests.support.sites import Place, credentials, site_around, until

SERVICES = {"c-move": "C-MOVE", "c-get": "C-GET"}
INSTANCES = 6


@pytest.fixture
def bucket(monkeypatch):
    with S3Server() as server:
        credentials(server, monkeypatch)
        yield server


def kill_when(place: Place, condition, what: str) -> None:
    """Start a run on all studies of the PACS and kill it when the condition holds."""
    with place.victim(place.cohort()) as process:
        until(lambda: process.poll() is not None or condition(), what)


def goes_on_to_the_end(place: Place, studies: int = 1) -> None:
    assert place.pull().rows == {Verdict.ARCHIVED: studies}
    place.audit()


@pytest.mark.campaign("crash: kill")
@pytest.mark.parametrize(
    "case",
    subset(
        [("c-move", 0), ("c-move", 3), ("c-move", INSTANCES), ("c-get", 0), ("c-get", 3)],
        [("c-move", 3), ("c-get", 0)],
    ),
    ids=str,
)
def test_killed_while_a_study_arrives(tmp_path, case):
    retrieve, answers = case
    service, hold = SERVICES[retrieve], threading.Event()
    stall = Behaviour("net.stall_after", answers=answers, hold=hold, service=service, on_request=1)
    objects = list(tiny_instances(1, instances=INSTANCES))
    with site_around(tmp_path, objects, retrieve=retrieve, script=[stall]) as place:

        def silent() -> bool:
            answered = [s for r in place.pacs.requests(service) for s in r.sent if s.status == 0]
            return place.asked_for(service) == 1 and len(answered) == answers

        kill_when(place, silent, "the PACS has fallen silent")
        place.pacs.script.clear()
        goes_on_to_the_end(place)
        # What had come was not sent again; the PACS kept silent about the first request.
        sent = Counter(place.pacs.sent_instances())
        assert set(sent) == {o.sop_instance_uid for o in objects}
        assert set(sent.values()) == {1}
        assert place.asked_for(service) == (1 if answers == INSTANCES else 2)
        hold.set()


def test_what_a_pacs_sends_for_a_run_that_is_dead_is_not_asked_for_again(tmp_path):
    hold = threading.Event()
    stall = Behaviour("net.stall_after", answers=2, hold=hold, service="C-MOVE", on_request=1)
    go_on = Behaviour(
        "net.drop_after", answers=2, service="C-MOVE", on_request=1, keep_sending=True
    )
    objects = list(tiny_instances(1, instances=INSTANCES))
    with site_around(tmp_path, objects, script=[stall, go_on]) as place:
        # The receiver outlives the run, and has longer to do so than the next one needs.
        place.change(receiver={"idle_seconds": 30})
        kill_when(place, lambda: len(place.pacs.sent_instances()) == 2, "two have been sent")
        hold.set()
        goes_on_to_the_end(place)
        assert place.asked_for("C-MOVE") == 1
        assert set(Counter(place.pacs.sent_instances()).values()) == {1}


@pytest.mark.campaign("crash: kill")
@pytest.mark.parametrize("retrieve", subset(SERVICES, ["c-move"]))
def test_killed_between_two_studies_of_a_chunk(tmp_path, retrieve):
    # Two studies in one request; the first is whole, the second has begun.
    service, hold = SERVICES[retrieve], threading.Event()
    stall = Behaviour("net.stall_after", answers=5, hold=hold, service=service, on_request=1)
    objects = list(tiny_instances(2, instances=4))
    with site_around(tmp_path, objects, retrieve=retrieve, script=[stall]) as place:

        def five() -> bool:
            return [s.status for r in place.pacs.requests(service) for s in r.sent] == [0] * 5

        kill_when(place, five, "five have been sent")
        place.pacs.script.clear()
        goes_on_to_the_end(place, studies=2)
        [again] = place.pacs.requests(service)[1:]
        assert again.level == "IMAGE"
        assert sorted(s.sop_instance_uid for s in again.sent) == sorted(
            o.sop_instance_uid for o in objects[5:]
        )
        hold.set()


@pytest.mark.campaign("crash: kill")
@pytest.mark.parametrize("case", subset([("c-move", True), ("c-get", False)], []))
def test_killed_while_an_object_is_uploaded(tmp_path, bucket, case):
    retrieve, committed = case
    bucket.stall("PutObject", skip=3, committed=committed)
    parts = {"archive": {"connections": 1}}
    with site_around(
        tmp_path, tiny_instances(1, instances=INSTANCES), retrieve=retrieve, bucket=bucket, **parts
    ) as place:
        stored = 3 + committed

        def stalled() -> bool:
            return bucket.requests["PutObject"] == 4 and len(bucket.archived) == stored

        kill_when(place, stalled, "the fourth upload stalls")
        goes_on_to_the_end(place)
        assert len(place.pacs.sent_instances()) == INSTANCES
        assert place.asked_for(SERVICES[retrieve]) == 1
        put = Counter(s.key for s in bucket.seen if s.operation == "PutObject")
        # One upload was under way; of those before it the ledger may not have heard yet.
        assert len(put) == INSTANCES + 1
        assert max(put.values()) <= 2
        assert bucket.requests["DeleteObject"] == 0


@pytest.mark.campaign("crash: kill")
@pytest.mark.parametrize("committed", subset([False, True], []))
def test_killed_while_the_manifest_is_put(tmp_path, bucket, committed):
    bucket.stall("PutObject", skip=INSTANCES, committed=committed)
    objects = list(tiny_instances(1, instances=INSTANCES))
    with site_around(tmp_path, objects, retrieve="c-get", bucket=bucket) as place:

        def stalled() -> bool:
            stored = INSTANCES + committed
            return bucket.requests["PutObject"] > INSTANCES and len(bucket.archived) == stored

        kill_when(place, stalled, "the manifest is under way")
        before = dict(bucket.objects)
        assert place.totals().rows == {Verdict.PENDING: 1}
        goes_on_to_the_end(place)
        assert before.items() <= bucket.objects.items()
        assert len(place.pacs.sent_instances()) == INSTANCES
        assert place.asked_for("C-GET") == 1


def test_killed_before_the_study_is_listed_again(tmp_path):
    hold = threading.Event()
    objects = list(tiny_instances(1, instances=INSTANCES))
    # STUDY, SERIES and IMAGE; the fourth query is the second list.
    stall = Behaviour("net.first_byte", hold=hold, service="C-FIND", on_request=4)
    with site_around(tmp_path, objects, retrieve="c-get", script=[stall]) as place:
        kill_when(place, lambda: place.asked_for("C-FIND") == 4, "it is listed again")
        assert len(place.archived()) == INSTANCES
        place.pacs.script.clear()
        goes_on_to_the_end(place)
        assert place.asked_for("C-GET") == 1
        hold.set()


def test_killed_in_discovery(tmp_path):
    hold = threading.Event()
    stall = Behaviour("net.first_byte", hold=hold, service="C-FIND", on_request=2)
    with site_around(tmp_path, tiny_instances(3), retrieve="c-get", script=[stall]) as place:
        kill_when(place, lambda: place.asked_for("C-FIND") == 2, "the second row is asked for")
        place.pacs.script.clear()
        goes_on_to_the_end(place, studies=3)
        assert place.asked_for("C-GET") == 1
        hold.set()


def test_killed_again_and_again_it_comes_to_its_end(tmp_path):
    holds = [threading.Event() for _ in range(2)]
    script = [
        Behaviour("net.stall_after", answers=1, hold=hold, service="C-MOVE", on_request=number)
        for number, hold in enumerate(holds, 1)
    ]
    objects = list(tiny_instances(1, instances=INSTANCES))
    with site_around(tmp_path, objects, script=script) as place:
        for number in range(1, len(holds) + 1):
            kill_when(
                place,
                lambda n=number: len(place.pacs.sent_instances()) == n,
                "one more has been sent",
            )
        place.pacs.script.clear()
        goes_on_to_the_end(place)
        assert set(Counter(place.pacs.sent_instances()).values()) == {1}
        for hold in holds:
            hold.set()


class Killer(threading.Event):
    """In place of an event a script waits for: kills the site's receiver, once."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._place = place

    def wait(self, timeout: float | None = None) -> bool:
        if not self.is_set():
            with running_receiver(self._place.site) as lease:
                os.kill(lease.status()["pid"], signal.SIGKILL)
            self.set()
        return True


@pytest.mark.campaign("concurrency")
@pytest.mark.parametrize("answers", subset([0, 3], [3]))
def test_a_receiver_that_is_killed_in_a_move_does_not_end_the_run(tmp_path, answers):
    objects = list(tiny_instances(1, instances=INSTANCES))
    with site_around(tmp_path, objects) as place:
        killer = Killer(place)
        place.pacs.script.append(
            Behaviour(
                "net.stall_after", answers=answers, hold=killer, service="C-MOVE", on_request=1
            )
        )
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert killer.is_set()
        came = Counter(
            sent.sop_instance_uid
            for request in place.pacs.requests("C-MOVE")
            for sent in request.sent
            if sent.status == 0
        )
        assert set(came) == {o.sop_instance_uid for o in objects}
        assert set(came.values()) == {1}
        place.audit()


def test_what_came_for_a_study_when_it_was_finished_is_kept_apart(tmp_path):
    with site_around(tmp_path, tiny_instances(1, instances=2), retrieve="c-get") as place:
        place.pull()
        [study] = place.studies().values()
        late = [path.read_bytes() for path in sorted((tmp_path / "archive").rglob("*.dcm"))]
        late[1] += b"\0"
        folder = place.site.spool.path / "ready" / str(study.reference)
        folder.mkdir()
        for data in late:
            (folder / f"{hashlib.sha256(data).hexdigest()}.dcm").write_bytes(data)
        place.pull()
        # What is archived already is a duplicate; nobody has the bytes of the other one.
        assert not folder.exists()
        assert [path.stem for path in place.quarantined()] == [hashlib.sha256(late[1]).hexdigest()]
