"""A study is archived as soon as it is whole, while the retrieve of its chunk goes on."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefect_dicom.core.errors import Interrupted
from prefect_dicom.core.model import StudyState, Verdict
from prefect_dicom.run.upload import give_way
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.sites import Place, site_around, until

STUDIES, INSTANCES = 3, 2


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere threads have no priority of their own"
)
def test_uploads_give_way_to_what_a_pacs_waits_for():
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with ThreadPoolExecutor(1, initializer=give_way) as pool:
        upload = pool.submit(os.getpriority, os.PRIO_PROCESS, 0).result()
    assert upload >= 10
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def archived(place: Place) -> int:
    return sum(study.state is StudyState.ARCHIVED for study in place.studies().values())


def pulled(place: Place, meanwhile) -> None:
    """Retrieve and archive the only chunk at the same time, as the pipeline does."""
    with place.opened() as pull, ThreadPoolExecutor(2) as pool:
        for page in pull.discovery.pages():
            pull.discovery.discover(*page)
        (chunk,) = pull.chunks.chunks()
        pull.in_hand.open(chunk)
        retrieving = pool.submit(pull.retrieval.retrieve, chunk)
        retrieving.add_done_callback(lambda _: pull.in_hand.close(chunk))
        archiving = pool.submit(pull.archiving.archive, chunk)
        try:
            meanwhile(pull, retrieving)
        finally:
            until(archiving.done, "the archiving has ended")
        assert len(pull.in_hand) == 0 and pull.in_hand.to_archive() == []


@pytest.mark.parametrize("retrieve", ["c-get", "c-move"])
def test_a_study_is_committed_before_the_retrieve_of_its_chunk_ends(tmp_path, retrieve):
    service, gate = retrieve.upper(), threading.Event()
    stalled = Behaviour("net.stall_after", service=service, answers=INSTANCES, hold=gate)
    objects = tiny_instances(STUDIES, instances=INSTANCES)
    with site_around(tmp_path, objects, script=[stalled], retrieve=retrieve) as place:

        def meanwhile(pull, retrieving):
            until(lambda: archived(place) == 1, "the first study is archived")
            assert len(place.pacs.sent_instances()) == INSTANCES
            assert not retrieving.done()
            gate.set()
            assert retrieving.result() == STUDIES

        pulled(place, meanwhile)
        assert len(place.pacs.requests(service)) == 1
        place.is_whole()


def test_what_is_whole_is_archived_though_its_chunk_is_interrupted(tmp_path):
    gate = threading.Event()
    stalled = Behaviour("net.stall_after", service="C-GET", answers=INSTANCES, hold=gate)
    objects = tiny_instances(STUDIES, instances=INSTANCES)
    with site_around(tmp_path, objects, script=[stalled], retrieve="c-get") as place:

        def meanwhile(pull, retrieving):
            until(lambda: archived(place) == 1, "the first study is archived")
            pull.control.stop.set()
            with pytest.raises(Interrupted):
                retrieving.result()
            assert pull.ledger.claims.live() == []

        pulled(place, meanwhile)
        gate.set()
        assert place.totals().studies[StudyState.ARCHIVED] == 1
        place.audit()
        place.goes_on()


def test_what_comes_twice_of_an_archived_study_leaves_nothing_in_the_spool(tmp_path):
    gate = threading.Event()
    objects = list(tiny_instances(STUDIES, instances=INSTANCES))
    script = [
        Behaviour("net.stall_after", service="C-GET", answers=INSTANCES, hold=gate),
        Behaviour("store.unsolicited", extra=objects[:INSTANCES]),
    ]
    with site_around(tmp_path, objects, script=script, retrieve="c-get") as place:

        def meanwhile(pull, retrieving):
            until(lambda: archived(place) == 1, "the first study is archived")
            gate.set()
            assert retrieving.result() == STUDIES

        pulled(place, meanwhile)
        assert place.totals().rows == {Verdict.ARCHIVED: STUDIES}
        place.is_whole()


def test_a_second_version_in_the_same_request_fails_a_study_that_is_whole(tmp_path):
    gate = threading.Event()
    objects = list(tiny_instances(STUDIES, instances=INSTANCES))
    twice = [objects[0].sop_instance_uid]
    script = [
        Behaviour("store.conflict", instances=twice),
        Behaviour("net.stall_after", service="C-GET", answers=INSTANCES + 1, hold=gate),
    ]
    with site_around(tmp_path, objects, script=script, retrieve="c-get") as place:

        def meanwhile(pull, retrieving):
            until(lambda: ("failed", "conflicting-content") in place.reasons(), "it has failed")
            assert not retrieving.done()
            gate.set()
            assert retrieving.result() == STUDIES

        pulled(place, meanwhile)
        assert archived(place) == STUDIES - 1
        assert len(place.quarantined()) == 1
