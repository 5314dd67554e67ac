"""Large instances are hashed beside the transfer: answered when written, named when hashed."""

from __future__ import annotations

import hashlib
import random
import threading

import pytest

from prefect_dicom.archive.spool import Spool
from prefect_dicom.core import background as background_module
from prefect_dicom.core.background import Background
from prefect_dicom.core.model import StoreRequest
from prefect_dicom.network.storage_scp import Expectation, StoreHandler
from tests.support.hostile_peers import data_set, file_name
from tests.support.wire import (
    CT,
    EXPLICIT,
    RELEASE_RQ,
    Conversation,
    responses,
    store_message,
)

STUDY = "1.2.3"
LARGE, SMALL = 300_000, 10_000


@pytest.fixture
def spool(tmp_path) -> Spool:
    return Spool(tmp_path / "spool")


@pytest.fixture
def store_handler(spool) -> StoreHandler:
    store_handler = StoreHandler(spool)
    store_handler.processors = 2
    return store_handler


@pytest.fixture
def expectation(store_handler) -> Expectation:
    expectation = Expectation({STUDY: 1})
    store_handler.expect(expectation)
    return expectation


class Busy:
    """A background that is kept from its work."""

    def __init__(self) -> None:
        self.background = Background("test")
        self.free = threading.Event()
        self.background.hand_over(self.free.wait)

    def finish(self) -> None:
        self.free.set()
        self.background.close()


@pytest.fixture
def busy():
    busy = Busy()
    yield busy
    busy.finish()


def received(store_handler: StoreHandler, sop: str, size: int, background: Background):
    """An instance that has been written as a whole, and what it will be called."""
    data = data_set(sop.encode(), study=STUDY.encode(), size=size)
    part = store_handler.begin(StoreRequest(1, CT, sop, EXPLICIT), background)
    part.write([memoryview(data)])
    return part, file_name(sop, data)


def names(spool: Spool) -> set[str]:
    return {path.name for path in spool.files(1)}


def test_a_large_instance_is_answered_before_its_hash_is_there(
    store_handler, spool, expectation, busy
):
    part, name = received(store_handler, "1.2.3.4", LARGE, busy.background)
    assert store_handler.complete(part) == 0x0000
    assert names(spool) == set()
    assert expectation.instances == 0
    # A sign of life, and a reason not to end: it is not done yet.
    assert store_handler.open_bytes == part.size_bytes
    busy.finish()
    assert names(spool) == {name}
    assert (expectation.instances, expectation.size_bytes) == (1, part.size_bytes)
    assert store_handler.open_bytes == 0


def test_who_asks_what_was_received_waits_for_the_names_of_what_was_answered(
    store_handler, spool, expectation, busy
):
    part, name = received(store_handler, "1.2.3.4", LARGE, busy.background)
    store_handler.complete(part)
    seen: list[set[str]] = []

    def look() -> None:
        store_handler.await_names()
        seen.append(names(spool))

    asking = threading.Thread(target=look)
    asking.start()
    asking.join(0.05)
    assert asking.is_alive()
    busy.finish()
    asking.join(20)
    assert seen == [{name}]


def test_a_small_instance_has_its_name_before_it_is_answered(
    store_handler, spool, expectation, busy
):
    part, name = received(store_handler, "1.2.3.4", SMALL, busy.background)
    assert store_handler.complete(part) == 0x0000
    assert names(spool) == {name}
    assert expectation.instances == 1


def test_with_more_associations_than_processors_a_large_instance_is_hashed_before_it_is_answered(
    store_handler, spool, expectation, busy
):
    other, _ = received(store_handler, "1.2.3.5", SMALL, busy.background)
    part, name = received(store_handler, "1.2.3.4", LARGE, busy.background)
    assert store_handler.complete(part) == 0x0000
    assert names(spool) == {name}
    store_handler.abandon(other)


def test_a_large_instance_that_nobody_asked_for_goes_to_quarantine_when_it_is_hashed(
    store_handler, spool, busy
):
    part, name = received(store_handler, "1.2.3.4", LARGE, busy.background)
    assert store_handler.complete(part) == 0x0000
    busy.finish()
    assert [entry.sha256 + ".dcm" for entry in spool.quarantine_entries()] == [name]
    assert store_handler.quarantined == 1


def test_an_answered_instance_that_gets_no_name_is_refused_to_the_run(
    store_handler, spool, expectation, busy
):
    part, _ = received(store_handler, "1.2.3.4", LARGE, busy.background)
    store_handler.complete(part)
    part.path.unlink()
    busy.finish()
    assert store_handler.refused_since(expectation) == "spool-unusable"
    assert expectation.instances == 0
    assert store_handler.open_bytes == 0


def test_an_abandoned_instance_is_not_kept_by_what_is_under_way(store_handler, spool, busy):
    part, _ = received(store_handler, "1.2.3.4", LARGE, busy.background)
    store_handler.abandon(part)
    busy.finish()
    assert list(spool.incoming.iterdir()) == []
    assert names(spool) == set()


def conversation(store_handler: StoreHandler, spool: Spool, count: int = 60) -> None:
    """Instances of all sizes at once: each has the hash of its own bytes when all is over."""
    lot, wanted, stream = random.Random(7), set(), bytearray()
    for number in range(count):
        sop = f"1.2.3.{number}"
        size = lot.choice([100, SMALL, 65_000, 70_000, LARGE, 526_000, 2_400_000])
        pixels = data_set(sop.encode(), study=STUDY.encode(), size=0)[:-4]
        pixels += size.to_bytes(4, "little") + lot.randbytes(size)
        wanted.add(file_name(sop, pixels))
        stream += store_message(sop, pixels, pdu_bytes=lot.choice([0, 16384, 131072]))
    talk = Conversation(store_handler)
    said: list[bytes] = []
    listening = threading.Thread(target=lambda: said.append(talk.everything()))
    listening.start()
    talk.ours.sendall(stream + RELEASE_RQ)
    listening.join(60)
    assert len(responses(said[0])[0]) == count
    # The end of the association waits for the names.
    assert names(spool) == wanted
    for path in spool.files(1):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
    assert list(spool.incoming.iterdir()) == []


def test_bytes_are_not_overwritten_before_they_are_hashed(store_handler, spool, expectation):
    conversation(store_handler, spool)
    assert expectation.instances == 60


def test_with_one_processor_nothing_is_handed_over(store_handler, spool, expectation, monkeypatch):
    monkeypatch.setattr(background_module.os, "sched_getaffinity", lambda process: {0})
    begun = []
    monkeypatch.setattr(Background, "hand_over", lambda self, task: begun.append(task))
    conversation(store_handler, spool, 10)
    assert begun == []
    assert expectation.instances == 10


def test_tasks_are_done_in_order_and_one_that_fails_stops_no_other():
    background, done = Background("test"), []

    def failing() -> None:
        raise ValueError

    for number in range(50):
        background.hand_over(lambda number=number: done.append(number))
        background.hand_over(failing)
    background.wait()
    assert done == list(range(50))
    assert background.idle
    background.close()
    assert "test" not in {thread.name for thread in threading.enumerate()}


def test_where_no_thread_can_be_started_a_task_is_done_at_once(monkeypatch):
    def full(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    background, done = Background("test"), []
    background.hand_over(lambda: done.append(1))
    assert done == [1]
    background.wait()
    background.close()
