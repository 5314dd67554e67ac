"""The PACS that the other tests lean on is one: to DCMTK, to pynetdicom, and when it misbehaves."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import AllTransferSyntaxes, ImplicitVRLittleEndian
from pynetdicom import AE, AllStoragePresentationContexts, build_context, build_role, evt
from pynetdicom.dsutils import decode, split_dataset
from pynetdicom.sop_class import (
    PatientRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from prefect_dicom.testing import (
    KNOBS,
    Behaviour,
    PacsPolicy,
    ScriptedPacs,
    generate_cohort,
    tiny_instances,
    write_cohort_file,
)
from prefect_dicom.testing.association_pdus import OddItems, association_request, items
from prefect_dicom.testing.instances import changed, decoded
from prefect_dicom.testing.matching import matches
from tests.network.test_hostile_pacs import HostilePacs
from tests.support.sites import until, until_it_listens

FIND = StudyRootQueryRetrieveInformationModelFind
MOVE = StudyRootQueryRetrieveInformationModelMove
GET = StudyRootQueryRetrieveInformationModelGet

dcmtk = pytest.mark.skipif(
    shutil.which("movescu") is None, reason="DCMTK is not installed (Debian package dcmtk)"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("archive")
    return generate_cohort(directory, studies=6, instances_per_series=4)


def data_set_bytes(path: Path) -> bytes:
    _, offset = split_dataset(path)
    return path.read_bytes()[offset:]


def by_uid(files: list[Path]) -> dict[str, Path]:
    return {
        str(pydicom.dcmread(f, specific_tags=["SOPInstanceUID"]).SOPInstanceUID): f for f in files
    }


def study_uids(files: list[Path]) -> list[str]:
    tags = ["StudyInstanceUID"]
    return list(
        dict.fromkeys(str(pydicom.dcmread(f, specific_tags=tags).StudyInstanceUID) for f in files)
    )


class Receiver:
    """A storage SCP that keeps every C-STORE request, and answers ``answer(uid)``."""

    def __init__(self) -> None:
        self.reset()
        entity = AE("RECEIVER")
        entity.maximum_associations = 50
        for context in AllStoragePresentationContexts:
            entity.add_supported_context(context.abstract_syntax, AllTransferSyntaxes)
        self.server = entity.start_server(
            ("127.0.0.1", 0),
            block=False,
            evt_handlers=[(evt.EVT_C_STORE, self.store), (evt.EVT_ACCEPTED, self.accept)],
        )
        self.address = ("127.0.0.1", self.server.server_address[1])

    def reset(self) -> None:
        self.requests: list = []
        self.answer = lambda uid: 0x0000
        self.arrived = threading.Semaphore(0)
        self.associations: list = []
        """That of every request, in their order."""
        self.accepted = 0

    def accept(self, event: evt.Event) -> None:
        self.accepted += 1

    def store(self, event: evt.Event) -> int:
        self.requests.append(event.request)
        self.associations.append(event.assoc)
        self.arrived.release()
        return self.answer(str(event.request.AffectedSOPInstanceUID))

    @property
    def uids(self) -> list[str]:
        return [str(r.AffectedSOPInstanceUID) for r in self.requests]

    def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert self.arrived.acquire(timeout=20)


@pytest.fixture(scope="module")
def listening_receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()


@pytest.fixture
def receiver(listening_receiver: Receiver) -> Receiver:
    listening_receiver.reset()
    return listening_receiver


@contextlib.contextmanager
def association(pacs: ScriptedPacs, *models: str, called: str = "DEMOPACS", calling: str = "ME"):
    entity = AE(calling)
    entity.acse_timeout = entity.dimse_timeout = 20
    contexts = [build_context(model) for model in models or (FIND, MOVE)]
    association = entity.associate("127.0.0.1", pacs.port, contexts=contexts, ae_title=called)
    try:
        yield association
    finally:
        if association.is_established:
            association.release()


def identifier(level: str, **keys: object) -> Dataset:
    dataset = Dataset()
    dataset.QueryRetrieveLevel = level
    for keyword, value in keys.items():
        setattr(dataset, keyword, value)
    return dataset


def find(pacs: ScriptedPacs, level: str, model: str = FIND, **keys: object):
    """The answers, and the final status (None where the association was lost)."""
    with association(pacs, model) as peer:
        responses = list(peer.send_c_find(identifier(level, **keys), model))
    answers = [answer for _, answer in responses if answer is not None]
    return answers, responses[-1][0].get("Status")


def move(pacs: ScriptedPacs, level: str, destination: str = "RECEIVER", **keys: object):
    """All responses of a C-MOVE; the status of the last is None where it was lost."""
    with association(pacs) as peer:
        return [
            status
            for status, _ in peer.send_c_move(
                identifier(level, **keys), destination, MOVE, msg_id=77
            )
        ]


def pacs_with(files: list[Path], receiver: Receiver, *script: Behaviour) -> ScriptedPacs:
    return ScriptedPacs(files, destinations={"RECEIVER": receiver.address}, script=script)


# --- DCMTK


def run(*command: object) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@dcmtk
def test_echoscu_is_answered(files):
    with ScriptedPacs(files) as pacs:
        run("echoscu", "-aec", "DEMOPACS", "127.0.0.1", pacs.port)
    assert [(r.service, r.status) for r in pacs.log] == [("C-ECHO", 0)]


@dcmtk
def test_findscu_lists_the_studies(files):
    with ScriptedPacs(files) as pacs:
        text = run(
            *("findscu", "-S", "-v", "-aec", "DEMOPACS", "127.0.0.1", pacs.port),
            *("-k", "QueryRetrieveLevel=STUDY", "-k", "StudyInstanceUID", "-k", "PatientID"),
        )
    found = re.findall(r"\(0020,000d\) UI \[([\d.]+)", text, re.IGNORECASE)
    assert set(found) == set(study_uids(files))
    assert pacs.requests("C-FIND")[0].answers == 6


@dcmtk
def test_movescu_and_storescp_get_the_stored_bytes(files, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    storescp = ["storescp", "+B", "+xa", "-od", str(tmp_path), str(port)]
    with (
        subprocess.Popen(storescp) as peer,
        ScriptedPacs(files, destinations={"STORESCP": ("127.0.0.1", port)}) as pacs,
    ):
        try:
            until_it_listens(port)
            for study in study_uids(files):
                run(
                    *("movescu", "-S", "-aec", "DEMOPACS", "-aem", "STORESCP"),
                    *("127.0.0.1", pacs.port),
                    *("-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={study}"),
                )
        finally:
            peer.terminate()
    received = by_uid(list(tmp_path.iterdir()))
    stored = by_uid(files)
    assert received.keys() == stored.keys()
    for uid, path in stored.items():
        assert data_set_bytes(received[uid]) == data_set_bytes(path)


@dcmtk
def test_getscu_gets_a_study(files, tmp_path):
    study = study_uids(files)[2]
    with ScriptedPacs(files) as pacs:
        run(
            *("getscu", "-S", "+B", "-aec", "DEMOPACS", "-od", tmp_path, "127.0.0.1", pacs.port),
            *("-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={study}"),
        )
    (request,) = pacs.requests("C-GET")
    assert request.status == 0
    assert len(list(tmp_path.iterdir())) == len(request.sent) > 0


@dcmtk
def test_storescu_loads_it(files):
    with ScriptedPacs() as pacs:
        run("storescu", "+sd", "+r", "-xr", "-aec", "DEMOPACS", "127.0.0.1", pacs.port,
            files[0].parents[2])  # fmt: skip
        answers, _ = find(pacs, "STUDY", StudyInstanceUID="")
    assert {a.StudyInstanceUID for a in answers} == set(study_uids(files))
    assert len(pacs.requests("C-STORE")) == len(files)


# --- services


@pytest.mark.needs("time")
def test_an_instance_list_is_found_level_by_level(files):
    with ScriptedPacs(files) as pacs:
        studies, _ = find(pacs, "STUDY", StudyInstanceUID="", NumberOfStudyRelatedInstances="")
        listed = set()
        for study in studies:
            uid = study.StudyInstanceUID
            series, _ = find(pacs, "SERIES", StudyInstanceUID=uid, SeriesInstanceUID="")
            of_study = [
                image.SOPInstanceUID
                for one in series
                for image in find(
                    pacs,
                    "IMAGE",
                    StudyInstanceUID=uid,
                    SeriesInstanceUID=one.SeriesInstanceUID,
                    SOPInstanceUID="",
                )[0]
            ]
            assert len(of_study) == study.NumberOfStudyRelatedInstances
            listed |= set(of_study)
    assert listed == by_uid(files).keys()


def test_patients_are_found_in_patient_root_only(files):
    with ScriptedPacs(files) as pacs:
        model = PatientRootQueryRetrieveInformationModelFind
        answers, status = find(
            pacs, "PATIENT", model, PatientID="", PatientName="", NumberOfPatientRelatedStudies=""
        )
        assert status == 0
        assert find(pacs, "PATIENT", PatientID="") == ([], 0xA900)
    assert len(answers) == 6
    assert "Muster^J\u00f6rg" in {str(answer.PatientName) for answer in answers}
    assert all(answer.PatientID.startswith("000") for answer in answers)


def test_without_the_keys_above_a_query_is_refused_unless_relational(files):
    study = study_uids(files)[0]
    with ScriptedPacs(files) as pacs:
        assert find(pacs, "IMAGE", StudyInstanceUID=study, SOPInstanceUID="") == ([], 0xA900)
    with ScriptedPacs(files, policy=PacsPolicy(relational=True)) as pacs:
        answers, status = find(pacs, "IMAGE", StudyInstanceUID=study, SOPInstanceUID="")
    assert status == 0
    assert len(answers) > 1


def test_a_retrieve_without_its_unique_key_is_refused(files, receiver):
    with pacs_with(files, receiver) as pacs:
        assert [s.Status for s in move(pacs, "STUDY", PatientID="00000001")] == [0xA900]
    assert receiver.uids == []


def test_a_move_names_its_originator_and_counts_what_it_sends(files, receiver):
    study = study_uids(files)[0]
    with pacs_with(files, receiver) as pacs:
        responses = move(pacs, "STUDY", StudyInstanceUID=study)
        (request,) = pacs.requests("C-MOVE")
    total = len(request.sent)
    assert [s.Status for s in responses] == [0xFF00] * (total - 1) + [0]
    assert [s.NumberOfRemainingSuboperations for s in responses[:-1]] == [*range(total - 1, 0, -1)]
    assert responses[-1].NumberOfCompletedSuboperations == total
    assert "NumberOfRemainingSuboperations" not in responses[-1]
    assert receiver.uids == [sent.sop_instance_uid for sent in request.sent]
    for stored in receiver.requests:
        assert stored.MoveOriginatorApplicationEntityTitle == "ME"
        assert stored.MoveOriginatorMessageID == 77


def test_moves_by_uid_list_and_by_instance_send_nothing_else(files, receiver):
    studies = study_uids(files)
    chosen = [pydicom.dcmread(files[n]) for n in (0, 2)]
    with pacs_with(files, receiver) as pacs:
        move(pacs, "STUDY", StudyInstanceUID=studies[1:3])
        of_studies = set(receiver.uids)
        receiver.requests.clear()
        move(
            pacs,
            "IMAGE",
            StudyInstanceUID=chosen[0].StudyInstanceUID,
            SeriesInstanceUID=chosen[0].SeriesInstanceUID,
            SOPInstanceUID=[d.SOPInstanceUID for d in chosen],
        )
    tags = ["StudyInstanceUID"]
    assert of_studies == {
        uid
        for uid, path in by_uid(files).items()
        if pydicom.dcmread(path, specific_tags=tags).StudyInstanceUID in studies[1:3]
    }
    assert receiver.uids == [d.SOPInstanceUID for d in chosen]


def test_a_get_sends_over_its_own_association_in_the_stored_syntax(files):
    study = study_uids(files)[3]  # RLE among others
    arrived = {}

    def store(event):
        uid = str(event.request.AffectedSOPInstanceUID)
        arrived[uid] = event.request.DataSet.getvalue()
        return 0

    of_study = {
        uid: path
        for uid, path in by_uid(files).items()
        if pydicom.dcmread(path, specific_tags=["StudyInstanceUID"]).StudyInstanceUID == study
    }
    pairs = set()
    for path in of_study.values():
        meta = pydicom.dcmread(path, stop_before_pixels=True).file_meta
        pairs.add((meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID))
    with ScriptedPacs(files) as pacs:
        peer = AE("ME").associate(
            "127.0.0.1",
            pacs.port,
            ae_title="DEMOPACS",
            contexts=[build_context(GET), *(build_context(*pair) for pair in sorted(pairs))],
            ext_neg=[build_role(uid, scp_role=True) for uid in {pair[0] for pair in pairs}],
            evt_handlers=[(evt.EVT_C_STORE, store)],
        )
        responses = list(peer.send_c_get(identifier("STUDY", StudyInstanceUID=study), GET))
        peer.release()
    assert responses[-1][0].Status == 0
    assert arrived == {uid: data_set_bytes(path) for uid, path in of_study.items()}


def test_a_class_not_proposed_in_a_get_is_a_failed_sub_operation(files):
    study = study_uids(files)[2]
    with ScriptedPacs(files) as pacs, association(pacs, GET) as peer:
        responses = list(peer.send_c_get(identifier("STUDY", StudyInstanceUID=study), GET))
    status, failed = responses[-1]
    assert status.Status == 0xA702
    assert status.NumberOfFailedSuboperations > 0
    assert "FailedSOPInstanceUIDList" in failed


def test_an_unknown_destination_is_a801_and_a_dead_one_a702(files, receiver):
    study = study_uids(files)[2]
    with socket.socket() as taken, pacs_with(files, receiver) as pacs:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        pacs.destinations["DEAD"] = taken.getsockname()
        assert move(pacs, "STUDY", "NOBODY", StudyInstanceUID=study)[-1].Status == 0xA801
        last = move(pacs, "STUDY", "DEAD", StudyInstanceUID=study)[-1]
    assert last.Status == 0xA702
    assert last.NumberOfFailedSuboperations > 0


def test_a_refused_instance_is_named_in_the_final_response(files, receiver):
    study = study_uids(files)[0]
    refused = str(pydicom.dcmread(files[0]).SOPInstanceUID)
    receiver.answer = lambda uid: 0xA700 if uid == refused else 0
    with pacs_with(files, receiver) as pacs, association(pacs) as peer:
        request = identifier("STUDY", StudyInstanceUID=study)
        status, failed = list(peer.send_c_move(request, "RECEIVER", MOVE))[-1]
    assert status.Status == 0xB000
    assert failed.FailedSOPInstanceUIDList == refused


def test_a_cancelled_move_stops(files, receiver):
    study = study_uids(files)[0]
    with pacs_with(files, receiver) as pacs, association(pacs) as peer:
        go_on = threading.Event()

        def answer(uid):
            peer.send_c_cancel(9, query_model=MOVE)
            go_on.wait(20)
            return 0

        receiver.answer = answer
        request = identifier("STUDY", StudyInstanceUID=study)
        responses = peer.send_c_move(request, "RECEIVER", MOVE, msg_id=9)
        receiver.wait_for(1)
        pacs_side = next(iter(pacs._server.active_associations))
        while 9 not in pacs_side.dimse.cancel_req:
            threading.Event().wait(0.01)
        go_on.set()
        statuses = [status for status, _ in responses]
        assert statuses[-1].Status == 0xFE00
        assert statuses[-1].NumberOfRemainingSuboperations > 0
        assert len(receiver.uids) == 1
        assert len(pacs.requests("C-CANCEL")) == 1


def test_titles_it_does_not_know_are_rejected_or_aborted(files):
    with ScriptedPacs(files, policy=PacsPolicy(calling_ae_titles=["FRIEND"])) as pacs:
        with association(pacs, called="OTHERPACS", calling="FRIEND") as peer:
            assert peer.acceptor.primitive.diagnostic == 7
        with association(pacs, calling="STRANGER") as peer:
            assert peer.acceptor.primitive.diagnostic == 3
        with association(pacs, Verification, calling="FRIEND") as peer:
            assert peer.send_c_echo().Status == 0
    with (
        ScriptedPacs(files, policy=PacsPolicy(["FRIEND"], unknown_calling="abort")) as pacs,
        association(pacs, Verification, calling="STRANGER") as peer,
    ):
        assert peer.is_established
        assert "Status" not in peer.send_c_echo()


def test_the_log_tells_what_was_asked_and_what_was_sent(files, receiver):
    study = study_uids(files)[2]
    with pacs_with(files, receiver) as pacs:
        find(pacs, "STUDY", StudyInstanceUID=study, PatientID="")
        move(pacs, "STUDY", StudyInstanceUID=study)
    found, moved = pacs.log
    assert (found.service, found.number, found.level) == ("C-FIND", 1, "STUDY")
    assert found.keys == {"StudyInstanceUID": study, "PatientID": ""}
    assert (found.calling_ae_title, found.status, found.answers) == ("ME", 0, 1)
    assert (moved.message_id, moved.destination, moved.status) == (77, "RECEIVER", 0)
    assert pacs.sent_instances() == receiver.uids
    assert {sent.status for sent in moved.sent} == {0}


@pytest.mark.parametrize(
    ("keyword", "key", "value", "expected"),
    [
        ("PatientID", "", "1", True),
        ("PatientID", "000123", "000123", True),
        ("PatientID", "123", "000123", False),
        ("PatientID", "00*", "000123", True),
        ("PatientID", "0001?3", "000123", True),
        ("PatientID", "abc", "ABC", False),
        ("PatientID", "A\\B", "A", False),
        ("PatientID", "x", "", False),
        ("PatientName", "muster^*", "Muster^J\u00f6rg", True),
        ("PatientName", "Muster^J\u00f6rg^", "Muster^J\u00f6rg", True),
        ("StudyInstanceUID", "1.2\\1.3", "1.3", True),
        ("StudyInstanceUID", "1.*", "1.3", False),
        ("StudyDate", "20240101", "20240101", True),
        ("StudyDate", "20240101-20240131", "20240131", True),
        ("StudyDate", "20240101-20240131", "20240201", False),
        ("StudyDate", "-20240131", "19990101", True),
        ("StudyDate", "20240101-", "20231231", False),
        ("StudyDate", "20240101-", "", False),
        ("StudyDate", "20240115", "2024.01.15", True),
        ("StudyTime", "0800-0900", "083000.123", True),
        ("StudyTime", "0800-0900", "090130", False),
        ("ModalitiesInStudy", "SR", "CT\\SR", True),
        ("ModalitiesInStudy", "MR", "CT\\SR", False),
        ("InstanceNumber", "1", "01", True),
    ],
)
def test_keys_match_as_the_standard_says(keyword, key, value, expected):
    assert matches(keyword, key, value) is expected


def test_ten_thousand_studies_are_held_and_each_is_found(receiver):
    objects = tiny_instances(10_000)
    with ScriptedPacs(instances=objects, destinations={"RECEIVER": receiver.address}) as pacs:
        answers, _ = find(pacs, "STUDY", StudyInstanceUID="", AccessionNumber="T0000009999")
        assert [a.AccessionNumber for a in answers] == ["T0000009999"]
        move(pacs, "STUDY", StudyInstanceUID=answers[0].StudyInstanceUID)
    (stored,) = receiver.requests
    dataset = decoded(stored.DataSet.getvalue(), "1.2.840.10008.1.2.1")
    assert dataset.PatientID == "00009999"
    assert len(dataset.PixelData) == dataset.Rows * dataset.Columns


def test_what_no_pacs_could_send_is_left_out_of_a_directory(files, tmp_path):
    shutil.copy(files[0], tmp_path / "whole.dcm")
    (tmp_path / "cut.dcm").write_bytes(files[0].read_bytes()[:132])
    (tmp_path / "notes.txt").write_text("not DICOM")
    pacs = ScriptedPacs([tmp_path])
    assert len(pacs.holdings) == 1
    assert pacs.left_out == [tmp_path / "cut.dcm"]


def test_it_runs_as_a_process_and_says_when_it_listens(files):
    command = [sys.executable, "-m", "prefect_dicom.testing"]
    command += ["--directory", str(files[0].parents[2]), "--destination", "ME=127.0.0.1:1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            match = re.fullmatch(
                r"DEMOPACS listens on 127\.0\.0\.1:(\d+) with (\d+) instances of 6 studies\n", line
            )
            assert match, line
            assert int(match[2]) == len(files)
            peer = AE("ME").associate(
                "127.0.0.1",
                int(match[1]),
                contexts=[build_context(Verification)],
                ae_title="DEMOPACS",
            )
            assert peer.send_c_echo().Status == 0
            peer.release()
        finally:
            process.terminate()
        assert process.wait(20) == 0


def test_generated_files_depend_on_the_seed_only(tmp_path):
    first, again, other = (
        generate_cohort(tmp_path / name, studies=3, seed=seed, instances_per_series=2)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert [f.read_bytes() for f in first] == [f.read_bytes() for f in again]
    assert not by_uid(first).keys() & by_uid(other).keys()
    assert all(uid.startswith("2.25.") and len(uid) <= 64 for uid in by_uid(first))


def test_the_cohort_file_names_each_study_once(files, tmp_path):
    lines = write_cohort_file(tmp_path / "cohort.csv", files).read_text().splitlines()
    assert lines[0] == "PatientID,AccessionNumber,StudyInstanceUID,StudyDate"
    assert len(lines) == 1 + 6
    assert lines[2].startswith("00000002,,,2")


# --- the script


def test_a_behaviour_can_be_limited_to_a_request_a_study_and_a_number_of_times(files, receiver):
    one, two = study_uids(files)[1:3]
    with pacs_with(files, receiver) as pacs:
        pacs.script.append(Behaviour("move.refuse", status=0xC001, on_request=2))
        pacs.script.append(Behaviour("move.refuse", status=0xC002, study=two, times=1))
        statuses = [
            move(pacs, "STUDY", StudyInstanceUID=uid)[-1].Status for uid in (one, one, two, two)
        ]
    assert statuses == [0, 0xC001, 0xC002, 0]


def test_a_knob_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no knob"):
        Behaviour("move.success_noting")
    with pytest.raises(TypeError):
        Behaviour("find.cap", n=5)


class Scene:
    """A PACS with one behaviour, a receiver, and a study of several series to ask for."""

    def __init__(self, files: list[Path], receiver: Receiver) -> None:
        self.receiver = receiver
        self.first_file = files[0]
        self.study = study_uids(files)[0]
        tags = ["StudyInstanceUID"]
        self.uids = [
            uid
            for uid, path in by_uid(files).items()
            if pydicom.dcmread(path, specific_tags=tags).StudyInstanceUID == self.study
        ]
        self.pacs = pacs_with(files, receiver)

    def with_knob(self, knob: str, **arguments: object) -> ScriptedPacs:
        self.pacs.script.append(Behaviour(knob, **arguments))
        return self.pacs

    def move(self) -> list[Dataset]:
        return move(self.pacs, "STUDY", StudyInstanceUID=self.study)

    def list_images(self) -> tuple[list[Dataset], int | None]:
        first = pydicom.dcmread(self.first_file)
        return find(
            self.pacs,
            "IMAGE",
            StudyInstanceUID=self.study,
            SeriesInstanceUID=first.SeriesInstanceUID,
            SOPInstanceUID="",
        )


@pytest.fixture
def scene(files, receiver) -> Scene:
    return Scene(files, receiver)


def find_cap(scene):
    with scene.with_knob("find.cap", answers=4, status=0xA700) as pacs:
        answers, status = find(pacs, "STUDY", StudyInstanceUID="")
    assert (len(answers), status) == (4, 0xA700)
    pacs.script[:] = [Behaviour("find.cap", answers=2, order="StudyDate", level="STUDY")]
    with pacs:
        answers, status = find(pacs, "STUDY", StudyInstanceUID="", StudyDate="")
        dates = sorted(study[0].attributes["StudyDate"] for study in pacs.holdings.studies({}))
        assert [answer.StudyDate for answer in answers] == dates[:2]
        assert scene.list_images()[1] == 0


def find_ignore_keys(scene):
    with scene.with_knob("find.ignore_keys", keys=["AccessionNumber"]) as pacs:
        answers, _ = find(pacs, "STUDY", StudyInstanceUID="", AccessionNumber="none-has-this")
    assert len(answers) == 6
    assert pacs.log[0].keys["AccessionNumber"] == "none-has-this"


def find_no_image_level(scene):
    with scene.with_knob("find.no_image_level"):
        assert scene.list_images() == ([], 0xC000)


def find_counts(scene):
    with scene.with_knob("find.counts", how="none") as pacs:
        keys = {"StudyInstanceUID": scene.study, "NumberOfStudyRelatedInstances": ""}
        ((answer,), _) = find(pacs, "STUDY", **keys)
    assert "NumberOfStudyRelatedInstances" not in answer


def find_omit_keys(scene):
    with scene.with_knob("find.omit_keys", keys=["PatientID"]) as pacs:
        ((answer,), _) = find(pacs, "STUDY", StudyInstanceUID=scene.study, PatientID="")
    assert "PatientID" not in answer


def find_empty_series(scene):
    first = pydicom.dcmread(scene.first_file).SeriesInstanceUID
    with scene.with_knob("find.empty_series", series=[first], count=7) as pacs:
        answers, _ = find(
            pacs,
            "SERIES",
            StudyInstanceUID=scene.study,
            SeriesInstanceUID="",
            NumberOfSeriesRelatedInstances="",
        )
        counts = {a.SeriesInstanceUID: a.NumberOfSeriesRelatedInstances for a in answers}
        assert counts[first] == 7
        assert scene.list_images() == ([], 0)


def store_vary(scene):
    first = scene.uids[0]
    said = set()
    with scene.with_knob("store.vary", instances=[first]):
        for _ in range(2):
            scene.receiver.reset()
            scene.move()
            data = decoded(arrived_of(scene, first), of_the_first(scene).transfer_syntax_uid)
            said.add(data.InstanceCreationTime)
    assert said == {"000000", "000001"}


def find_refuse(scene):
    with scene.with_knob("find.refuse", status=0x0122) as pacs:
        assert find(pacs, "STUDY", StudyInstanceUID="") == ([], 0x0122)


def find_unsupported_key(scene):
    with scene.with_knob("find.unsupported_key", keys=["Modality"]) as pacs:
        assert find(pacs, "STUDY", StudyInstanceUID="", Modality="CT") == ([], 0)
        answers, _ = find(pacs, "STUDY", StudyInstanceUID="", Modality="")
    assert len(answers) == 6


def find_substring(scene):
    with scene.with_knob("find.substring") as pacs:
        answers, _ = find(pacs, "STUDY", PatientID="0000000")
    assert len(answers) == 6


def find_case(scene):
    with scene.with_knob("find.case") as pacs:
        held = pacs.holdings.studies({})[0][0].attributes["AccessionNumber"]
        assert held.lower() != held
        answers, _ = find(pacs, "STUDY", AccessionNumber=held.lower())
    assert [answer.AccessionNumber for answer in answers] == [held]


def find_alias(scene):
    held = str(pydicom.dcmread(scene.first_file, specific_tags=["PatientID"]).PatientID)
    with scene.with_knob("find.alias", asked="OLD-7", held=[held]) as pacs:
        answers, _ = find(pacs, "STUDY", PatientID="OLD-7", StudyInstanceUID="")
        assert {answer.PatientID for answer in answers} == {held}
        assert find(pacs, "STUDY", PatientID="OLD-8", StudyInstanceUID="")[0] == []


def find_pn_literal(scene):
    with scene.pacs as pacs:
        name = str(pacs.holdings.studies({})[0][0].attributes["PatientName"])
        assert len(find(pacs, "STUDY", PatientName=name + "^")[0]) > 0
        pacs.script.append(Behaviour("find.pn_literal"))
        assert find(pacs, "STUDY", PatientName=name + "^")[0] == []


def find_query_charset(scene):
    held = changed(next(tiny_instances(1)), SpecificCharacterSet="ISO_IR 192", PatientID="Ü1")
    with scene.pacs as pacs:
        pacs.holdings.add(held)
        pacs.script.append(Behaviour("find.query_charset", sets=["ISO_IR 192"]))
        for declared, patient, count in (
            ("ISO_IR 192", "Ü1", 1),
            ("ISO_IR 100", "Ü1", 0),
            ("", "", 7),
        ):
            keys = {"SpecificCharacterSet": declared} if declared else {}
            assert len(find(pacs, "STUDY", PatientID=patient, **keys)[0]) == count


def find_no_list(scene):
    with scene.with_knob("find.no_list", uids=True) as pacs:
        both = study_uids([scene.first_file]) * 2
        assert find(pacs, "STUDY", StudyInstanceUID=both) == ([], 0)
        assert len(find(pacs, "STUDY", StudyInstanceUID=both[0])[0]) == 1


def find_strict(scene):
    scene.pacs.policy.relational = True
    with scene.with_knob("find.strict", status=0xC000) as pacs:
        assert find(pacs, "SERIES", SeriesInstanceUID="") == ([], 0xC000)
        assert len(find(pacs, "SERIES", StudyInstanceUID=scene.study)[0]) > 0


def find_demand_keys(scene):
    with scene.with_knob("find.demand_keys") as pacs:
        assert find(pacs, "SERIES", StudyInstanceUID=scene.study) == ([], 0xA900)
        assert find(pacs, "STUDY", StudyInstanceUID=scene.study)[1] == 0
        [(study, *_)] = pacs.holdings.studies({"StudyInstanceUID": scene.study})
        both = {"StudyInstanceUID": scene.study, "PatientID": study.patient_id}
        assert len(find(pacs, "SERIES", **both)[0]) > 0


def find_no_series_level(scene):
    with scene.with_knob("find.no_series_level", status=0xA900) as pacs:
        assert scene.list_images() == ([], 0xA900)
        assert find(pacs, "SERIES", StudyInstanceUID=scene.study) == ([], 0xA900)
        assert len(find(pacs, "STUDY", StudyInstanceUID=scene.study)[0]) == 1


def find_pad_ids(scene):
    with scene.with_knob("find.pad_ids", strip_zeros=True, after=" ") as pacs:
        held = pacs.holdings.studies({})[0][0].patient_id
        ((answer,), _) = find(pacs, "STUDY", PatientID=held.lstrip("0"))
    assert answer.PatientID.strip() == held.lstrip("0") != held


def find_date_shift(scene):
    with scene.with_knob("find.date_shift", days=1) as pacs:
        held = pacs.holdings.studies({"StudyInstanceUID": scene.study})[0][0].attributes
        keys = {"StudyInstanceUID": scene.study, "StudyDate": held["StudyDate"]}
        assert find(pacs, "STUDY", **keys)[0] == []
        ((answer,), _) = find(pacs, "STUDY", StudyInstanceUID=scene.study, StudyDate="")
    assert int(answer.StudyDate) > int(held["StudyDate"])
    pacs.script[:] = [Behaviour("find.date_shift", days=1, answered=False)]
    with pacs:
        ((answer,), _) = find(pacs, "STUDY", StudyInstanceUID=scene.study, StudyDate="")
        assert find(pacs, "STUDY", **keys)[0] == []
    assert answer.StudyDate == held["StudyDate"]


def find_date_ends(scene):
    with scene.pacs as pacs:
        day = pacs.holdings.studies({"StudyInstanceUID": scene.study})[0][0].attributes["StudyDate"]
        keys = {"StudyInstanceUID": scene.study}
        for ends, first, last in (("first", day, "29991231"), ("last", "19000101", day)):
            pacs.script[:] = [Behaviour("find.date_ends", ends=ends)]
            assert find(pacs, "STUDY", **keys, StudyDate=f"{first}-{last}")[0] == []
            assert len(find(pacs, "STUDY", **keys, StudyDate=day)[0]) == 1
            assert len(find(pacs, "STUDY", **keys, StudyDate="19000101-29991231")[0]) == 1


def find_ff01(scene):
    with scene.with_knob("find.ff01") as pacs, association(pacs, FIND) as peer:
        request = identifier("STUDY", StudyInstanceUID=scene.study)
        statuses = [status.Status for status, _ in peer.send_c_find(request, FIND)]
    assert statuses == [0xFF01, 0]


def find_duplicate(scene):
    with scene.with_knob("find.duplicate", copies=2, patient_id="OTHER") as pacs:
        answers, _ = find(pacs, "STUDY", StudyInstanceUID=scene.study, PatientID="")
    assert [answer.PatientID == "OTHER" for answer in answers] == [False, True, True]


def find_charset(scene):
    held = changed(
        next(tiny_instances(1)), SpecificCharacterSet="ISO_IR 192", StudyDescription="Ü王"
    )
    keys = {"StudyInstanceUID": held.study_instance_uid, "StudyDescription": ""}
    with scene.pacs as pacs:
        pacs.holdings.add(held)
        for how, declared in (("strip", "ISO_IR 100"), ("none", ""), ("lie", "ISO_IR 192")):
            pacs.script[:] = [Behaviour("find.charset", how=how)]
            ((answer,), _) = find(pacs, "STUDY", **keys)
            assert answer.get("SpecificCharacterSet") == declared
            # The one letter that Latin-1 has, as the declaration lets it be read.
            assert answer.StudyDescription == ("\ufffd" if how == "lie" else "Ü")


def find_declare(scene):
    held = changed(next(tiny_instances(1)), SpecificCharacterSet="ISO_IR 192", PatientName="Люк^И")
    declared = ("ISO-IR 144", "X", "")
    with scene.pacs as pacs:
        pacs.holdings.add(held)
        for one in declared:
            pacs.script[:] = [Behaviour("find.declare", declared=one, encoding="iso8859_5")]
            pacs_answers = answers_as_they_come(
                pacs, StudyInstanceUID=held.study_instance_uid, PatientName=""
            )
            ((answer, raw),) = pacs_answers
            assert "Люк^И".encode("iso8859_5") in raw
            value = answer.get_item("SpecificCharacterSet").value
            assert (value if isinstance(value, str) else value.decode()).strip() == one


def answers_as_they_come(pacs: ScriptedPacs, **keys: object) -> list[tuple[Dataset, bytes]]:
    """The answers of a STUDY level query, undecoded, each with its bytes."""
    came = []

    def keep(event: evt.Event) -> None:
        data = event.message.data_set
        if data.getvalue():
            raw = data.getvalue()
            came.append((decode(BytesIO(raw), True, True), raw))

    with association(pacs, FIND) as peer:
        peer.bind(evt.EVT_DIMSE_RECV, keep)
        list(peer.send_c_find(identifier("STUDY", **keys), FIND))
    return came


def find_answer(scene):
    values = {"NumberOfStudyRelatedInstances": "4.0", "StudyDate": b"2024-2025", "PatientID": None}
    with scene.with_knob("find.answer", values=values, level="STUDY") as pacs:
        ((answer, _),) = answers_as_they_come(
            pacs, StudyInstanceUID=scene.study, PatientID="", NumberOfStudyRelatedInstances=""
        )
        assert answer.get_item("NumberOfStudyRelatedInstances").value == b"4.0 "
        assert answer.get_item("StudyDate").value == b"2024-2025 "
        assert "PatientID" not in answer
        images, _ = scene.list_images()
    assert images and "StudyDate" not in images[0]


def find_hang_up(scene):
    with scene.with_knob("find.hang_up", keys=["StudyDate"]) as pacs:
        assert find(pacs, "STUDY", StudyDate="20000101-20300101") == ([], None)
        assert find(pacs, "STUDY", StudyInstanceUID=scene.study)[1] == 0


def find_retrieve_aet(scene):
    with scene.with_knob("find.retrieve_aet", titles=["A", "B"]) as pacs:
        ((answer,), _) = find(pacs, "STUDY", StudyInstanceUID=scene.study)
    assert answer.RetrieveAETitle == ["A", "B"]


def find_availability(scene):
    with scene.with_knob("find.availability", value="OFFLINE") as pacs:
        ((answer,), _) = find(pacs, "STUDY", StudyInstanceUID=scene.study)
    assert answer.InstanceAvailability == "OFFLINE"


def find_time_hang(scene):
    hold = threading.Event()
    with scene.with_knob("find.time_hang", hold=hold) as pacs:
        keys = {"StudyDate": "20000101-20300101"}
        assert len(find(pacs, "STUDY", **keys)[0]) == 6
        with association(pacs, FIND) as peer:
            request = identifier("STUDY", StudyTime="0000-2359", **keys)
            answers = peer.send_c_find(request, FIND)
            got = threading.Event()
            thread = threading.Thread(target=lambda: (list(answers), got.set()))
            thread.start()
            assert not got.wait(0.2)
            hold.set()
            thread.join(20)
            assert got.is_set()


def find_garble(scene):
    with scene.with_knob("find.garble", answers=[1], how="absent") as pacs:
        answers, status = find(pacs, "STUDY", StudyInstanceUID="")
    assert ([bool(answer) for answer in answers].count(False), status) == (1, 0)


def find_cross_talk(scene):
    responses = []
    with scene.with_knob("find.cross_talk", answers=[0]) as pacs, association(pacs, FIND) as peer:
        peer.bind(evt.EVT_DIMSE_RECV, lambda event: responses.append(event.message))
        list(peer.send_c_find(identifier("STUDY", StudyInstanceUID=scene.study), FIND, msg_id=7))
    answered = [message.command_set.MessageIDBeingRespondedTo for message in responses]
    assert answered[0] == 6


def associate(pacs: ScriptedPacs) -> tuple[str, object]:
    """How an association request ended, and with which numbers."""
    ended = []
    entity = AE("ME")
    entity.acse_timeout = 5
    peer = entity.associate(
        "127.0.0.1",
        pacs.port,
        contexts=[build_context(FIND), build_context(Verification)],
        ae_title="DEMOPACS",
        evt_handlers=[(evt.EVT_PDU_RECV, lambda event: ended.append(event.pdu))],
    )
    pdus = [type(pdu).__name__ for pdu in ended]
    if peer.is_established:
        peer.release()
        return "established", [c.abstract_syntax for c in peer.accepted_contexts]
    if "A_ASSOCIATE_RJ" in pdus:
        return "rejected", (ended[0].result, ended[0].source, ended[0].reason_diagnostic)
    if "A_ABORT_RQ" in pdus:
        return "aborted", (ended[-1].source, ended[-1].reason_diagnostic)
    return ("no contexts", None) if "A_ASSOCIATE_AC" in pdus else ("lost", None)


def net_refuse(scene):
    back = threading.Event()
    with scene.with_knob("net.refuse", back=back, on_request=1) as pacs:
        assert associate(pacs)[0] == "lost"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", pacs.port), 5)
        back.set()
        until_it_listens(pacs.port)
        assert associate(pacs)[0] == "established"


def net_reset(scene):
    with scene.with_knob("net.reset", times=1) as pacs:
        # It may be reset before it is known to stand.
        with (
            pytest.raises(ConnectionResetError),
            socket.create_connection(("127.0.0.1", pacs.port), 5) as connection,
        ):
            connection.recv(1)
        assert associate(pacs)[0] == "established"


def net_tls(scene):
    hello = ssl.create_default_context()
    hello.check_hostname, hello.verify_mode = False, ssl.CERT_NONE
    with scene.with_knob("net.tls") as pacs:
        assert associate(pacs)[0] == "lost"
        with (
            socket.create_connection(("127.0.0.1", pacs.port), 5) as connection,
            # It speaks TLS, and has no certificate to show.
            pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"),
        ):
            hello.wrap_socket(connection)


def assoc_silent(scene):
    hold = threading.Event()
    with scene.with_knob("assoc.silent", hold=hold) as pacs:
        entity = AE("ME")
        entity.acse_timeout = 0.2
        peer = entity.associate(
            "127.0.0.1", pacs.port, [build_context(Verification)], ae_title="DEMOPACS"
        )
        assert not peer.is_established
        hold.set()
        assert associate(pacs)[0] == "established"


def assoc_reject(scene):
    with scene.with_knob("assoc.reject", result=2, source=3, reason=1, on_request=1) as pacs:
        assert associate(pacs) == ("rejected", (2, 3, 1))
        assert associate(pacs)[0] == "established"


def assoc_abort(scene):
    with scene.with_knob("assoc.abort", when="instead", source=2, reason=6, times=1) as pacs:
        assert associate(pacs) == ("aborted", (2, 6))
        pacs.script[:] = [Behaviour("assoc.abort", when="request", source=2, reason=1)]
        with association(pacs, FIND) as peer:
            assert peer.is_established
            responses = list(peer.send_c_find(identifier("STUDY", PatientID="1"), FIND))
        assert [status for status, _ in responses] == [Dataset()]


def assoc_drop(scene):
    with scene.with_knob("assoc.drop", when="accepted") as pacs, association(pacs, FIND) as peer:
        peer.join(10)
        assert peer.is_aborted
    with pytest.raises(ValueError, match="when"):
        Behaviour("assoc.drop", when="nonsense").apply("associate", "A-ASSOCIATE", 1, None)


def assoc_contexts(scene):
    with scene.with_knob("assoc.contexts", result=1, services=["C-FIND"]) as pacs:
        assert associate(pacs) == ("established", [Verification])
        with association(pacs, FIND, Verification) as peer:
            assert [context.result for context in peer.rejected_contexts] == [1]


def assoc_no_contexts(scene):
    with scene.with_knob("assoc.no_contexts") as pacs:
        assert associate(pacs)[0] == "no contexts"


def assoc_no_roles(scene):
    ct = "1.2.840.10008.5.1.4.1.1.2"
    with scene.pacs as pacs:
        accepted = []
        for script in ([], [Behaviour("assoc.no_roles")]):
            pacs.script[:] = script
            peer = AE("ME").associate(
                "127.0.0.1",
                pacs.port,
                contexts=[build_context(ct)],
                ae_title="DEMOPACS",
                ext_neg=[build_role(ct, scp_role=True)],
            )
            accepted.append([context.as_scp for context in peer.accepted_contexts])
            peer.release()
    assert accepted == [[True], [False]]


def assoc_items(scene):
    accepted = []

    def keep(event: evt.Event) -> None:
        accepted.append(event.data)

    name = struct.pack(">BxH", 0x55, 3) + b"ODD"
    odd = {"leave_out": [0x51, 0x55], "add": name, "called": b"A\0B", "calling": bytes(16)}
    with scene.with_knob("assoc.items", **odd) as pacs:
        with association(pacs, FIND) as peer:
            assert peer.is_established and peer.acceptor.maximum_length is None
            assert peer.acceptor.implementation_version_name == "ODD"
        with socket.create_connection(("127.0.0.1", pacs.port)) as connection:
            connection.sendall(
                association_request(
                    "ME", "DEMOPACS", [(FIND, [ImplicitVRLittleEndian])], OddItems()
                )
            )
            said = connection.recv(65536)
    assert said[10:42] == b"A\0B".ljust(16) + bytes(16)
    assert dict(items(said[6:], 68))[0x50].endswith(name)


def assoc_max(scene):
    with scene.with_knob("assoc.max", associations=1) as pacs, association(pacs, FIND):
        assert associate(pacs) == ("rejected", (2, 3, 2))


def move_success_nothing(scene):
    with scene.with_knob("move.success_nothing"):
        (last,) = scene.move()
    assert (last.Status, last.NumberOfCompletedSuboperations) == (0, 0)
    assert scene.receiver.uids == []


def move_early_success(scene):
    hold = threading.Event()
    with scene.with_knob("move.early_success", after=2, hold=hold):
        last = scene.move()[-1]
        assert last.Status == 0
        assert len(scene.receiver.uids) == 2
        hold.set()
        scene.receiver.wait_for(len(scene.uids))
    assert sorted(scene.receiver.uids) == sorted(scene.uids)


def move_drop_instances(scene):
    with scene.with_knob("move.drop_instances", instances=2, times=2):
        last = scene.move()[-1]
        first_time = set(scene.receiver.uids)
        scene.receiver.requests.clear()
        scene.move()
        assert set(scene.receiver.uids) == first_time
        scene.receiver.requests.clear()
        scene.move()
    assert last.Status == 0
    assert len(first_time) == len(scene.uids) - 2
    assert sorted(scene.receiver.uids) == sorted(scene.uids)


def move_zero_counts(scene):
    with scene.with_knob("move.zero_counts", status=0xC000):
        responses = scene.move()
    assert responses[-1].Status == 0xC000
    assert {s.NumberOfCompletedSuboperations for s in responses} == {0}
    assert len(scene.receiver.uids) == len(scene.uids)


def move_final_status(scene):
    with scene.with_knob("move.final_status", status=0xA702):
        assert scene.move()[-1].Status == 0xA702
    assert len(scene.receiver.uids) == len(scene.uids)


def move_refuse(scene):
    with scene.with_knob("move.refuse", status=0x0124):
        assert [s.Status for s in scene.move()] == [0x0124]


def move_unknown_destination(scene):
    with scene.with_knob("move.unknown_destination"):
        assert [s.Status for s in scene.move()] == [0xA801]


def move_stop_at_failure(scene):
    refused = scene.uids[1]
    scene.receiver.answer = lambda uid: 0x0111 if uid == refused else 0
    with scene.with_knob("move.stop_at_failure"):
        last = scene.move()[-1]
    assert (last.Status, last.NumberOfCompletedSuboperations) == (0xC000, 0)
    assert scene.receiver.uids == scene.uids[:2]


def store_truncate(scene):
    with scene.with_knob("store.truncate", instances=[scene.uids[0]], times=1) as pacs:
        scene.move()
        scene.move()
    sizes = {}
    for request in scene.receiver.requests:
        size = len(request.DataSet.getvalue())
        sizes.setdefault(str(request.AffectedSOPInstanceUID), []).append(size)
    short, whole = sizes.pop(scene.uids[0])
    assert 0 < short < whole
    assert all(len(set(pair)) == 1 for pair in sizes.values())
    assert pacs.script[0].used == 1


def store_other_patient(scene):
    with scene.with_knob("store.other_patient", instances=1):
        scene.move()
    ids = [decoded_request(scene, r).PatientID for r in scene.receiver.requests]
    assert ids.count("OTHER-000001") == 1
    assert ids.count("00000001") == len(scene.uids) - 1


def decoded_request(scene: Scene, request) -> Dataset:
    (stored,) = [
        s for s in scene.pacs.holdings if s.sop_instance_uid == request.AffectedSOPInstanceUID
    ]
    return decoded(request.DataSet.getvalue(), stored.transfer_syntax_uid)


def arrived_of(scene: Scene, uid: str) -> bytes:
    (data,) = [
        request.DataSet.getvalue()
        for request in scene.receiver.requests
        if str(request.AffectedSOPInstanceUID).strip(" \0") == uid
    ]
    return data


def of_the_first(scene: Scene):
    return next(s for s in scene.pacs.holdings if s.sop_instance_uid == scene.uids[0])


def store_coerce(scene):
    first = scene.uids[0]
    elements = {"StudyDate": "19990101", "Modality": None}
    with scene.with_knob("store.coerce", instances=[first], elements=elements):
        scene.move()
    dataset = decoded(arrived_of(scene, first), of_the_first(scene).transfer_syntax_uid)
    assert (dataset.StudyDate, "Modality" in dataset) == ("19990101", False)


def store_other_study(scene):
    with scene.with_knob("store.other_study", instances=1):
        scene.move()
    studies = [decoded_request(scene, r).StudyInstanceUID for r in scene.receiver.requests]
    assert sorted(studies) == sorted(["2.25.4100"] + [scene.study] * (len(scene.uids) - 1))


def store_uid_mismatch(scene):
    first = scene.uids[0]
    with scene.with_knob("store.uid_mismatch", instances=[first]):
        scene.move()
    data = arrived_of(scene, "2.25.4500")
    assert decoded(data, of_the_first(scene).transfer_syntax_uid).SOPInstanceUID == first
    assert first not in scene.receiver.uids


def store_odd_uid(scene):
    first = scene.uids[0]
    with scene.with_knob("store.odd_uid", instances=[first], how="zeros"):
        scene.move()
    oddly = ".0".join(first.rsplit(".", 1))
    syntax = of_the_first(scene).transfer_syntax_uid
    assert decoded(arrived_of(scene, oddly), syntax).SOPInstanceUID == oddly


def store_wrong_syntax(scene):
    first = scene.uids[0]
    with scene.with_knob("store.wrong_syntax", instances=[first]):
        scene.move()
    stored, data = of_the_first(scene), arrived_of(scene, first)
    assert data != stored.encoded()
    implicit = "1.2.840.10008.1.2"
    written = "1.2.840.10008.1.2.1" if stored.transfer_syntax_uid == implicit else implicit
    assert decoded(data, written).SOPInstanceUID == first


def store_transcode(scene):
    first, implicit = scene.uids[0], "1.2.840.10008.1.2"
    arguments = {"instances": [first], "transfer_syntax_uid": implicit, "lossy": True}
    with scene.with_knob("store.transcode", **arguments) as pacs:
        assert scene.move()[-1].Status == 0
        stored = of_the_first(scene)
    dataset = decoded(arrived_of(scene, first), implicit)
    assert dataset.LossyImageCompression == "01"
    assert dataset.Rows == decoded(stored.encoded(), stored.transfer_syntax_uid).Rows
    assert pacs.script[0].used == 1


def store_odd_length(scene):
    first = scene.uids[0]
    with scene.with_knob("store.odd_length", instances=[first]):
        assert scene.move()[-1].Status == 0
    data = arrived_of(scene, first)
    assert data.startswith(of_the_first(scene).encoded()) and len(data) % 2
    dataset = decoded(data, of_the_first(scene).transfer_syntax_uid)
    assert len(dataset[0x7FE11001].value) == 7


def store_huge(scene):
    native = next(
        s.sop_instance_uid
        for s in scene.pacs.holdings
        if s.study_instance_uid == scene.study
        and "PixelData" in decoded(s.encoded(), s.transfer_syntax_uid)
        and s.transfer_syntax_uid.startswith("1.2.840.10008.1.2")
        and not s.transfer_syntax_uid.endswith(".5")
    )
    with scene.with_knob("store.huge", instances=[native], mebibytes=3):
        assert scene.move()[-1].Status == 0
    data = arrived_of(scene, native)
    assert len(data) > 3 << 20


def store_shuffle(scene):
    with scene.with_knob("store.shuffle", lot=3):
        assert scene.move()[-1].Status == 0
    assert scene.receiver.uids != scene.uids
    assert sorted(scene.receiver.uids) == sorted(scene.uids)


def store_duplicate(scene):
    with scene.with_knob("store.duplicate", instances=1):
        last = scene.move()[-1]
    assert len(scene.receiver.uids) == len(scene.uids) + 1
    assert set(scene.receiver.uids) == set(scene.uids)
    assert last.NumberOfCompletedSuboperations == len(scene.uids)


def store_conflict(scene):
    with scene.with_knob("store.conflict", instances=[scene.uids[0]]):
        scene.move()
    versions = {
        r.DataSet.getvalue()
        for r in scene.receiver.requests
        if r.AffectedSOPInstanceUID == scene.uids[0]
    }
    assert len(versions) == 2


def store_unsolicited(scene):
    (foreign,) = tiny_instances(1)
    with scene.with_knob("store.unsolicited", extra=[foreign]):
        last = scene.move()[-1]
    assert scene.receiver.uids[0] == foreign.sop_instance_uid
    assert scene.receiver.requests[0].MoveOriginatorMessageID is None
    assert last.NumberOfCompletedSuboperations == len(scene.uids)


def pacs_mutate(scene):
    gone = scene.uids[0]
    change = {"change": lambda pacs: pacs.holdings.remove(gone), "times": 1}
    with scene.with_knob("pacs.mutate", **change):
        before, _ = scene.list_images()
        after, _ = scene.list_images()
    assert {a.SOPInstanceUID for a in before} - {a.SOPInstanceUID for a in after} == {gone}


def net_drop_after(scene):
    with scene.with_knob("net.drop_after", answers=2, how="close", times=1) as pacs:
        last = scene.move()[-1]
        assert "Status" not in last
        assert len(scene.receiver.uids) == 2
        scene.receiver.requests.clear()
        pacs.script.append(Behaviour("net.drop_after", answers=2, keep_sending=True))
        assert "Status" not in scene.move()[-1]
        scene.receiver.wait_for(2 + len(scene.uids))
        pacs.script.append(Behaviour("net.drop_after", answers=3))
        answers, status = find(pacs, "STUDY", StudyInstanceUID="")
        assert (len(answers), status) == (3, None)


def net_first_byte(scene):
    hold = threading.Event()
    with scene.with_knob("net.first_byte", hold=hold) as pacs, association(pacs) as peer:
        request = identifier("STUDY", StudyInstanceUID=scene.study)
        responses = peer.send_c_move(request, "RECEIVER", MOVE)
        (logged,) = wait_for_log(pacs, "C-MOVE")
        assert (logged.sent, logged.status) == ([], None)
        hold.set()
        assert [status.Status for status, _ in responses][-1] == 0


def wait_for_log(pacs: ScriptedPacs, service: str) -> list:
    until(lambda: pacs.requests(service), f"a {service} has arrived")
    return pacs.requests(service)


def net_slow(scene):
    with scene.with_knob("net.slow", seconds=0.1) as pacs:
        began = time.monotonic()
        answers, status = find(pacs, "STUDY", StudyInstanceUID="")
        assert (len(answers) > 0, status) == (True, 0)
        assert time.monotonic() - began >= 0.1 * len(answers)


def net_stall_after(scene):
    hold = threading.Event()
    with scene.with_knob("net.stall_after", answers=3, hold=hold) as pacs, association(pacs) as p:
        request = identifier("STUDY", StudyInstanceUID=scene.study)
        responses = p.send_c_move(request, "RECEIVER", MOVE)
        scene.receiver.wait_for(3)
        assert len(scene.receiver.uids) == 3
        hold.set()
        assert [status.Status for status, _ in responses][-1] == 0
    assert len(scene.receiver.uids) == len(scene.uids)


def move_fail_but_all(scene):
    with scene.with_knob("move.fail_but_all", status=0xA702), association(scene.pacs) as peer:
        request = identifier("STUDY", StudyInstanceUID=scene.study)
        status, failed = list(peer.send_c_move(request, "RECEIVER", MOVE))[-1]
    assert (status.Status, status.NumberOfFailedSuboperations) == (0xA702, len(scene.uids))
    assert sorted(failed.FailedSOPInstanceUIDList) == sorted(scene.uids)
    assert sorted(scene.receiver.uids) == sorted(scene.uids)


def move_bad_counts(scene):
    with scene.with_knob("move.bad_counts", counts=(None, 9999, -1 & 0xFFFF, 0), times=1) as pacs:
        responses = scene.move()
        assert {r.NumberOfCompletedSuboperations for r in responses} == {9999}
        pacs.script.append(Behaviour("move.bad_counts", counts=(70_000, 0, 0, 0)))
        assert scene.move()[-1].NumberOfRemainingSuboperations == 70_000 & 0xFFFF


def move_no_pending(scene):
    with scene.with_knob("move.no_pending"):
        assert [r.Status for r in scene.move()] == [0]
    assert len(scene.receiver.uids) == len(scene.uids)


def move_no_originator(scene):
    with scene.with_knob("move.no_originator"):
        assert [r.Status for r in scene.move()][-1] == 0
    assert {r.MoveOriginatorMessageID for r in scene.receiver.requests} == {None}


def move_failed_list(scene):
    scene.receiver.answer = lambda uid: 0xA700
    with scene.with_knob("move.failed_list", uids=["1.2.3"]), association(scene.pacs) as peer:
        request = identifier("STUDY", StudyInstanceUID=scene.study)
        status, failed = list(peer.send_c_move(request, "RECEIVER", MOVE))[-1]
    assert (status.Status, failed.FailedSOPInstanceUIDList) == (0xA702, "1.2.3")


def move_no_list(scene):
    with scene.with_knob("move.no_list", times=1) as pacs:
        other = next(u for u in pacs.holdings.study_instance_uids() if u != scene.study)
        both = f"{scene.study}\\{other}"
        move(pacs, "STUDY", StudyInstanceUID=both)
        assert sorted(scene.receiver.uids) == sorted(scene.uids)
        pacs.script.append(Behaviour("move.no_list", status=0xA900))
        assert [r.Status for r in move(pacs, "STUDY", StudyInstanceUID=both)] == [0xA900]


def move_no_image_level(scene):
    first = pydicom.dcmread(scene.first_file)
    keys = {
        "StudyInstanceUID": scene.study,
        "SeriesInstanceUID": first.SeriesInstanceUID,
        "SOPInstanceUID": first.SOPInstanceUID,
    }
    with scene.with_knob("move.no_image_level", times=1) as pacs:
        assert [r.Status for r in move(pacs, "IMAGE", **keys)] == [0xA900]
        pacs.script.append(Behaviour("move.no_image_level", status=None))
        move(pacs, "IMAGE", **keys)
    assert sorted(scene.receiver.uids) == sorted(scene.uids)


def move_keep_sending(scene):
    with scene.with_knob("move.keep_sending") as pacs:
        pacs.script.append(Behaviour("net.drop_after", answers=1, keep_sending=True))
        assert "Status" not in scene.move()[-1]
        scene.receiver.wait_for(len(scene.uids))


def move_late(scene):
    hold = threading.Event()
    with scene.with_knob("move.late", instances=[scene.uids[0]], hold=hold):
        assert scene.move()[-1].Status == 0
        assert sorted(scene.receiver.uids) == sorted(scene.uids[1:])
        hold.set()
        scene.receiver.wait_for(len(scene.uids))
    assert scene.receiver.uids[-1] == scene.uids[0]


def move_ignore_cancel(scene):
    with scene.with_knob("move.ignore_cancel") as pacs, association(pacs) as peer:
        pacs.script.append(Behaviour("net.stall_after", answers=1, hold=When(pacs)))
        request = identifier("STUDY", StudyInstanceUID=scene.study)
        responses = peer.send_c_move(request, "RECEIVER", MOVE, msg_id=9)
        scene.receiver.wait_for(1)
        peer.send_c_cancel(9, query_model=MOVE)
        assert [status.Status for status, _ in responses][-1] == 0
    assert len(scene.receiver.uids) == len(scene.uids)


class When(threading.Event):
    """In place of an event a script waits for: the peer has cancelled a request."""

    def __init__(self, pacs: ScriptedPacs) -> None:
        super().__init__()
        self._pacs = pacs

    def wait(self, timeout: float | None = None) -> bool:
        return bool(self._pacs.requests("C-CANCEL")) or super().wait(timeout)


def move_many_assocs(scene):
    with scene.with_knob("move.many_assocs", each=2):
        assert scene.move()[-1].Status == 0
    associations = [id(a) for a in scene.receiver.associations]
    assert len(set(associations)) == -(-len(scene.uids) // 2)


def move_empty_assoc(scene):
    with scene.with_knob("move.empty_assoc", associations=2, stay_open=True):
        assert scene.move()[-1].Status == 0
    assert scene.receiver.accepted == 3
    assert len(scene.receiver.uids) == len(scene.uids)


def get_disabled(scene):
    with scene.with_knob("get.disabled", status=0x0122, times=1) as pacs:
        request = identifier("STUDY", StudyInstanceUID=scene.study)
        with association(pacs, GET) as peer:
            assert [s.Status for s, _ in peer.send_c_get(request, GET)] == [0x0122]
        pacs.script.append(Behaviour("get.disabled", status=None))
        with association(pacs, GET) as peer:
            assert ["Status" in s for s, _ in peer.send_c_get(request, GET)] == [False]
        assert scene.move()[-1].Status == 0


def get_stop_on_class(scene):
    with scene.with_knob("get.stop_on_class") as pacs, association(pacs, GET) as peer:
        request = identifier("STUDY", StudyInstanceUID=scene.study)
        status, _ = list(peer.send_c_get(request, GET))[-1]
    assert (status.Status, status.NumberOfFailedSuboperations) == (0xC000, 1)


def assoc_queue(scene):
    turn = threading.Semaphore(0)
    with scene.with_knob("assoc.queue", turn=turn) as pacs, association(pacs) as peer:
        request = identifier("STUDY", StudyInstanceUID=scene.study)
        responses = peer.send_c_move(request, "RECEIVER", MOVE)
        wait_for_log(pacs, "C-MOVE")
        assert scene.receiver.uids == []
        turn.release()
        assert [status.Status for status, _ in responses][-1] == 0
    assert turn.acquire(timeout=20)


def pacs_corrupt(scene):
    with scene.with_knob("pacs.corrupt", instances=[scene.uids[0]]):
        for _ in range(2):
            last = scene.move()[-1]
            assert (last.Status, last.NumberOfFailedSuboperations) == (0xB000, 1)
    assert set(scene.receiver.uids) == set(scene.uids[1:])


def store_async_flood(scene):
    began = threading.Event()
    scene.receiver.answer = lambda uid: 0 if began.wait(20) else 0xA700
    with scene.with_knob("store.async_flood") as pacs, association(pacs) as peer:
        request = identifier("STUDY", StudyInstanceUID=scene.study)
        responses = peer.send_c_move(request, "RECEIVER", MOVE)
        (logged,) = wait_for_log(pacs, "C-MOVE")
        # All have been sent, and not one is answered.
        while len(logged.sent) < len(scene.uids):
            threading.Event().wait(0.01)
        assert {sent.status for sent in logged.sent} == {None}
        began.set()
        assert [status.Status for status, _ in responses][-1] == 0
    assert scene.receiver.uids == scene.uids


def store_pipeline(scene):
    # pynetdicom's receiver grants no window: it is kept, but for those beyond.
    with scene.with_knob("store.pipeline", beyond=2) as pacs:
        assert scene.move()[-1].Status == 0
        (logged,) = pacs.requests("C-MOVE")
    assert scene.receiver.uids == scene.uids
    assert logged.most_outstanding == 3
    asked = scene.receiver.associations[0].requestor.asynchronous_operations
    assert asked == (0, 1)


def store_titles(scene):
    with scene.with_knob("store.titles", called=b"OURS", calling=b"SOMEBODY"):
        assert scene.move()[-1].Status == 0
    requestor = scene.receiver.associations[0].requestor
    assert requestor.primitive.called_ae_title.strip() == "OURS"
    assert requestor.ae_title.strip() == "SOMEBODY"


def store_items(scene):
    name = struct.pack(">BxH", 0x55, 3) + b"ODD"
    with scene.with_knob("store.items", leave_out=[0x55], add=name):
        assert scene.move()[-1].Status == 0
    assert scene.receiver.associations[0].requestor.implementation_version_name == "ODD"


def store_source(scene):
    with scene.with_knob("store.source", address="127.0.0.2"):
        assert scene.move()[-1].Status == 0
    assert scene.receiver.associations[0].requestor.address == "127.0.0.2"


def store_contexts(scene):
    with scene.with_knob("store.contexts", classes=60, syntaxes=5):
        # Of several syntaxes the receiver may choose another than the instance has.
        scene.move()
    contexts = scene.receiver.associations[0].requestor.primitive
    proposed = contexts.presentation_context_definition_list
    assert len(proposed) == 60 and {len(one.transfer_syntax) for one in proposed} <= {5, 6}


class Measuring(HostilePacs):
    """Accepts everything, and notes the lengths of PDUs."""

    def _pdu(self, connection: socket.socket) -> bytes:
        body = super()._pdu(connection)
        self.lengths.append(len(body))
        return body


def store_long_pdus(scene):
    with Measuring(lambda connection: connection.close()) as receiver:
        receiver.lengths = []
        scene.pacs.destinations["RECEIVER"] = ("127.0.0.1", receiver.node().port)
        with scene.with_knob("store.long_pdus", size_bytes=300_000) as pacs:
            pacs.script.append(Behaviour("store.huge", instances=len(scene.uids), mebibytes=1))
            scene.move()
    # It says that it takes any length; without the knob these are of a mebibyte.
    assert max(receiver.lengths[1:]) == 300_000


def net_nagle(scene):
    with scene.with_knob("net.nagle"):
        assert scene.move()[-1].Status == 0
    assert scene.receiver.uids == scene.uids


def net_blackhole(scene):
    with scene.with_knob("net.blackhole", answers=1) as pacs, association(pacs) as peer:
        request = identifier("STUDY", StudyInstanceUID=scene.study)
        statuses = []
        for status, _ in peer.send_c_move(request, "RECEIVER", MOVE):
            statuses.append(status)
            peer.dimse_timeout = 0.3
        assert ["Status" in status for status in statuses] == [True, False]
        (logged,) = pacs.requests("C-MOVE")
        assert (len(logged.sent), logged.status) == (1, None)


def pacs_restart(scene):
    back = threading.Event()
    with scene.with_knob("pacs.restart", answers=1, back=back, times=1) as pacs:
        assert "Status" not in scene.move()[-1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", pacs.port))
        back.set()
        for _ in range(2000):
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", pacs.port)).close()
                break
            threading.Event().wait(0.01)
        assert scene.move()[-1].Status == 0


@pytest.mark.needs("time")
def test_a_behaviour_by_lot_happens_as_often_as_it_should_and_the_same_with_its_seed(scene):
    def statuses(seed):
        by_lot = Behaviour("move.refuse", status=0xC001, probability=0.5, seed=seed)
        with pacs_with([scene.first_file], scene.receiver) as pacs:
            pacs.script.append(by_lot)
            return [move(pacs, "STUDY", StudyInstanceUID="1.2.3")[-1].Status for _ in range(12)]

    first = statuses(1)
    assert {0, 0xC001} == set(first)
    assert statuses(1) == first != statuses(2)


SHOWN_ELSEWHERE = {"web": "web", "keep": "delivery"}
"""Kinds of behaviour that are shown where they matter: in the tests of these rooms."""


def is_shown_here(knob: str) -> bool:
    return knob.partition(".")[0] not in SHOWN_ELSEWHERE


@pytest.mark.needs("time")
@pytest.mark.parametrize("knob", filter(is_shown_here, sorted(KNOBS)))
def test_each_behaviour_of_the_script_happens(knob, scene):
    globals()[knob.replace(".", "_")](scene)


def test_every_other_behaviour_is_used_by_the_tests_of_its_room():
    tests = Path(__file__).parents[1]
    for kind, room in SHOWN_ELSEWHERE.items():
        used = "".join(path.read_text() for path in (tests / room).glob("*.py"))
        knobs = {knob for knob in KNOBS if knob.startswith(f"{kind}.")}
        assert knobs
        assert {knob for knob in knobs if f'"{knob}"' not in used} == set()
