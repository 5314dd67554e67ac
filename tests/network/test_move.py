"""A C-MOVE ends with the peer's word, with a loss, or by our will, and always with an result."""

from __future__ import annotations

import threading
from datetime import date

import pytest

from prefect_dicom.config.node import PacsNode, Timeouts
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import InformationModel
from prefect_dicom.core.uids import is_safe_key
from prefect_dicom.network.find.list_instances import list_instances
from prefect_dicom.network.find.list_studies import find_some_studies, find_studies
from prefect_dicom.network.move import move
from prefect_dicom.network.query_keys import retrieve_identifier
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.testing import Behaviour, ScriptedPacs
from prefect_dicom.testing.generate import generate_cohort
from tests.support import peers

STUDY_ROOT = InformationModel.STUDY_ROOT


def _study(uid: str):
    return retrieve_identifier(STUDY_ROOT, "STUDY", None, [uid])


@pytest.fixture(params=["orthanc", "dcmqrscp"])
def archive(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def largest(archive):
    """A study with several instances of plain images, and how the archive lists it."""
    with Requestor(archive.node()) as requestor:
        studies = find_studies(requestor, {"StudyDate": "19000101-20991231"})
        lists = [
            (study.study_instance_uid, list_instances(requestor, study.study_instance_uid))
            for study in studies
            if is_safe_key(study.study_instance_uid)
        ]
    uid, listed = max(lists, key=lambda one: len(one[1].instances))
    assert len(listed.instances) > 2
    return uid, listed.instances


# --- real archives --------------------------------------------------------------------------


def test_a_study_comes_under_the_message_id_that_was_given(archive, largest, receiver_port):
    study, instances = largest
    sent = archive.moves()
    pendings: list[RetrieveResult] = []
    with peers.Inbox(receiver_port) as inbox, Requestor(archive.node()) as requestor:
        result = move(
            requestor,
            _study(study),
            peers.US,
            4711,
            progress=lambda: len(inbox.received),
            on_pending=pendings.append,
        )
    assert result.status == 0x0000 and result.lost is None
    assert result.completed == len(instances)
    assert sorted(uid for uid, _ in inbox.received) == sorted(
        i.key.sop_instance_uid for i in instances
    )
    assert {originator for _, originator in inbox.received} == {4711}
    assert archive.moves() - sent == len(instances)
    assert pendings and all(pending.status is None for pending in pendings)


def test_a_list_of_instances_brings_these_and_no_other(archive, largest, receiver_port):
    study, instances = largest
    series = instances[0].key.series_instance_uid
    wanted = [i.key.sop_instance_uid for i in instances if i.key.series_instance_uid == series][:2]
    identifier = retrieve_identifier(STUDY_ROOT, "IMAGE", None, [study], [series], wanted)
    sent = archive.moves()
    with peers.Inbox(receiver_port) as inbox, Requestor(archive.node()) as requestor:
        result = move(requestor, identifier, peers.US, 1)
    assert result.status == 0x0000
    assert sorted(uid for uid, _ in inbox.received) == sorted(wanted)
    assert archive.moves() - sent == len(wanted)


def test_queries_and_moves_share_an_association(archive, largest, receiver_port):
    study, instances = largest
    with peers.Inbox(receiver_port) as inbox, Requestor(archive.node()) as requestor:
        for number in (1, 2):
            requestor.echo()
            assert find_studies(requestor, {"StudyInstanceUID": study})
            assert move(requestor, _study(study), peers.US, number).status == 0x0000
    assert len(inbox.received) == 2 * len(instances)


def test_an_unknown_destination_is_c000_at_orthanc_and_a801_at_dcmqrscp(archive, largest):
    expected = 0xC000 if isinstance(archive, peers.Orthanc) else 0xA801
    with Requestor(archive.node()) as requestor:
        assert move(requestor, _study(largest[0]), "NOBODY", 1).status == expected


def test_a_destination_that_does_not_listen_is_c000_or_a702(archive, largest):
    expected = 0xC000 if isinstance(archive, peers.Orthanc) else 0xA702
    with Requestor(archive.node()) as requestor:
        result = move(requestor, _study(largest[0]), peers.US, 1)
    assert result.status == expected
    if expected == 0xA702:
        assert result.failed == len(largest[1])
        named = {i.key.sop_instance_uid for i in largest[1]}
        assert set(result.failed_sop_instance_uids) == named


def test_an_unknown_study_is_a_failure_at_orthanc_and_a_success_at_dcmqrscp(archive):
    expected = 0xC000 if isinstance(archive, peers.Orthanc) else 0x0000
    with Requestor(archive.node()) as requestor:
        result = move(requestor, _study("1.2.3.4.5.6"), peers.US, 1)
    assert result.status == expected and not result.completed


def test_a_stop_cancels_the_move_and_the_result_says_why(archive, largest, receiver_port):
    study, instances = largest
    gate = threading.Event()

    def stop_after_the_first() -> str | None:
        if not inbox.received:
            return None
        gate.set()
        return "interrupted"

    with (
        peers.Inbox(receiver_port, delay=gate) as inbox,
        Requestor(archive.node()) as requestor,
    ):
        result = move(requestor, _study(study), peers.US, 1, should_stop=stop_after_the_first)
        requestor.echo()
    assert result.lost == "interrupted"
    assert result.status == 0xFE00
    assert 1 <= len(inbox.received) < len(instances)


# --- archives that misbehave ----------------------------------------------------------------


@pytest.fixture
def scripted(tmp_path, receiver_port):
    files = generate_cohort(tmp_path, studies=2, seed=3)
    with ScriptedPacs(files, destinations={peers.US: ("127.0.0.1", receiver_port)}) as pacs:
        yield pacs


def _node(pacs: ScriptedPacs, **timeouts) -> PacsNode:
    return PacsNode(
        host="127.0.0.1",
        port=pacs.port,
        called_ae_title=pacs.ae_title,
        timeouts=Timeouts(**timeouts),
    )


def _first_study(pacs: ScriptedPacs) -> str:
    with Requestor(_node(pacs)) as requestor:
        return find_some_studies(requestor, date(1900, 1, 1), date(2099, 1, 1))[
            0
        ].study_instance_uid


@pytest.mark.parametrize("how", ["abort", "close"])
@pytest.mark.needs("time")
def test_a_lost_association_keeps_the_counters_reported_before(scripted, receiver_port, how):
    study = _first_study(scripted)
    scripted.script.append(Behaviour("net.drop_after", answers=2, how=how))
    with peers.Inbox(receiver_port), Requestor(_node(scripted)) as requestor:
        result = move(requestor, _study(study), peers.US, 1)
    assert result.status is None
    assert result.lost == "association-lost"
    # A connection closed without an abort may take its last response with it.
    assert result.completed in ((2,) if how == "abort" else (1, 2))


@pytest.mark.needs("time")
def test_a_silent_archive_is_left_after_the_first_byte_time(scripted):
    study = _first_study(scripted)
    hold = threading.Event()
    scripted.script.append(Behaviour("net.first_byte", hold=hold))
    try:
        with Requestor(_node(scripted, first_byte_seconds=0.5)) as requestor:
            result = move(requestor, _study(study), peers.US, 1)
    finally:
        hold.set()
    assert result.lost == "association-stalled"


@pytest.mark.needs("time")
def test_a_stalled_archive_is_left_after_the_stall_time(scripted, receiver_port):
    study = _first_study(scripted)
    hold = threading.Event()
    scripted.script.append(Behaviour("net.stall_after", answers=1, hold=hold))
    try:
        with (
            peers.Inbox(receiver_port),
            Requestor(_node(scripted, stall_seconds=0.5)) as requestor,
        ):
            result = move(requestor, _study(study), peers.US, 1)
    finally:
        hold.set()
    assert result.lost == "association-stalled"
    assert result.completed == 1


@pytest.mark.needs("time")
def test_arriving_instances_keep_a_wordless_archive_alive(scripted, receiver_port):
    """No response comes for four times the stall time; the progress counts."""
    study = _first_study(scripted)
    hold = threading.Event()
    scripted.script.append(Behaviour("net.first_byte", hold=hold))
    looks = 0

    def progress() -> int:
        nonlocal looks
        looks += 1
        if looks > 4:
            hold.set()
        return looks

    with (
        peers.Inbox(receiver_port),
        Requestor(_node(scripted, first_byte_seconds=1.5, stall_seconds=1.5)) as requestor,
    ):
        result = move(requestor, _study(study), peers.US, 1, progress=progress)
    assert result.status == 0x0000 and result.lost is None


def test_a_move_that_cannot_be_sent_is_an_error():
    node = PacsNode(host="127.0.0.1", port=peers.free_port(), called_ae_title="X")
    with Requestor(node) as requestor, pytest.raises(PacsError) as error:
        move(requestor, _study("1.2.3"), peers.US, 1)
    assert error.value.code == "pacs-refused"


def test_an_archive_may_list_what_it_cannot_send(new_archive, corpus, receiver_port):
    """A study in seven transfer syntaxes, of which this archive sends the uncompressed ones."""
    archive = new_archive(peers.Dcmqrscp, {peers.US: receiver_port}, takes_compressed=True)
    loaded = archive.load(sorted((corpus / "neurolabusc+dcm_qa_ts").glob("*.dcm")))
    assert loaded.stored == 9
    with peers.Inbox(receiver_port) as inbox, Requestor(archive.node()) as requestor:
        (study,) = find_studies(requestor, {"StudyDate": "19000101-20991231"})
        listed = list_instances(requestor, study.study_instance_uid)
        result = move(requestor, _study(study.study_instance_uid), peers.US, 1)
    assert result.status == 0xB000
    assert result.completed == len(inbox.received) < len(listed.instances)
    assert len(result.failed_sop_instance_uids) == result.failed
