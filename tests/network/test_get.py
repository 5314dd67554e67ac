"""C-GET: what was asked for comes back on our own association, and every end has a name."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, RLELossless
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    PatientRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from prefect_dicom.config.node import PacsNode, Timeouts
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import InformationModel
from prefect_dicom.network import get
from prefect_dicom.network.dimse import Element, write_command
from prefect_dicom.network.get import c_get, pack_contexts
from tests.support.peers import Dcmqrscp, Orthanc, free_port
from tests.support.wire import (
    CT,
    EXPLICIT,
    MemoryIntake,
    data_set_bytes,
    make_instance,
    message_pdus,
    pdu,
    pdv,
    store_command,
    write_instances,
)

STUDY = "1.2.3"
MR = "1.2.840.10008.5.1.4.1.1.4"


def identifier(study: str = STUDY) -> Dataset:
    dataset = Dataset()
    dataset.QueryRetrieveLevel = "STUDY"
    dataset.StudyInstanceUID = study
    return dataset


def node(port: int, *, title: str = "PACS", model=InformationModel.STUDY_ROOT, **timeouts):
    return PacsNode(
        host="127.0.0.1",
        port=port,
        called_ae_title=title,
        information_model=model,
        timeouts=Timeouts(**{"connect_seconds": 5, "acse_seconds": 10, **timeouts}),
    )


# --- real archives


@pytest.fixture(params=[Dcmqrscp, Orthanc])
def archive(request, tmp_path):
    if reason := request.param.absent():
        pytest.skip(reason)
    paths = write_instances(tmp_path, 12, size=128)
    compressed = make_instance(13)
    compressed.file_meta.TransferSyntaxUID = RLELossless
    compressed.PixelData = encapsulate([bytes(range(200))])
    compressed["PixelData"].VR = "OB"
    with request.param(tmp_path / "archive") as peer:
        if request.param is Orthanc:
            # dcmqrscp keeps uncompressed objects only.
            paths.append(tmp_path / "00013.dcm")
            compressed.save_as(paths[-1], enforce_file_format=True)
        assert peer.load(paths).stored == len(paths)
        peer.paths = paths
        yield peer


def test_a_study_comes_back_in_the_bytes_it_was_stored_in(archive):
    intake, seen = MemoryIntake(), []
    outcome = c_get(
        archive.node(),
        identifier(),
        contexts=[(CT, EXPLICIT), (CT, RLELossless)],
        intake=intake,
        message_id=42,
        on_progress=seen.append,
    )
    assert (outcome.status, outcome.lost) == (0x0000, None)
    assert outcome.completed == len(archive.paths)
    assert not outcome.failed
    # dcmqrscp re-encodes, here into what it was; Orthanc sends what it holds.
    expected = {
        dcmread(path).SOPInstanceUID: (
            str(dcmread(path).file_meta.TransferSyntaxUID),
            data_set_bytes(path),
        )
        for path in archive.paths
    }
    assert {uid: (syntax, data) for _, uid, syntax, data in intake.objects} == expected
    assert {request.peer_address for request in intake.began} == {"127.0.0.1"}
    assert {request.called_ae_title for request in intake.began} == {archive.ae_title}
    assert seen
    assert {progress.status for progress in seen} == {0xFF00}


def test_a_study_the_archive_does_not_hold_brings_nothing(archive):
    intake = MemoryIntake()
    outcome = c_get(archive.node(), identifier("1.2.99"), contexts=[(CT, EXPLICIT)], intake=intake)
    assert outcome.status in (0x0000, 0xC000)
    assert outcome.lost is None
    assert not intake.began


def test_a_full_spool_is_told_to_the_archive(archive):
    intake = MemoryIntake(full=True)
    outcome = c_get(archive.node(), identifier(), contexts=[(CT, EXPLICIT)], intake=intake)
    assert outcome.status != 0x0000
    assert not intake.completed


def test_a_cancelled_request_ends_before_the_study_does(archive):
    class Gate(MemoryIntake):
        def complete(self, part):
            status = super().complete(part)
            if len(self.completed) == 2:
                stop.set()
            return status

    stop = threading.Event()
    intake = Gate()
    outcome = c_get(
        archive.node(),
        identifier(),
        contexts=[(CT, EXPLICIT), (CT, RLELossless)],
        intake=intake,
        should_stop=stop.is_set,
    )
    # A small study may be under way as a whole before the archive reads the C-CANCEL-RQ.
    assert outcome.status in (0xFE00, 0x0000)
    assert len(intake.completed) >= 2


# --- a scripted archive


@contextlib.contextmanager
def scripted(handler, contexts, model=StudyRootQueryRetrieveInformationModelGet):
    application = AE("PACS")
    application.add_supported_context(model)
    for sop_class, syntaxes in contexts.items():
        application.add_supported_context(sop_class, syntaxes, scu_role=True, scp_role=True)
    server = application.start_server(
        ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_GET, handler)]
    )
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()


def sending(*numbers):
    def handler(event):
        yield len(numbers)
        for number in numbers:
            yield 0xFF00, make_instance(number)

    return handler


def test_failed_instances_are_named(tmp_path):
    class Refusing(MemoryIntake):
        def complete(self, part):
            super().complete(part)
            return 0xA700 if part.request.sop_instance_uid == "1.2.3.4.2" else 0x0000

    with scripted(sending(1, 2, 3), {CT: [ExplicitVRLittleEndian]}) as port:
        outcome = c_get(node(port), identifier(), contexts=[(CT, EXPLICIT)], intake=Refusing())
    assert outcome.status == 0xB000
    assert (outcome.completed, outcome.failed, outcome.warning) == (2, 1, 0)
    assert outcome.failed_sop_instance_uids == ("1.2.3.4.2",)
    assert outcome.lost is None


@pytest.mark.parametrize(
    ("model", "sop_class"),
    [
        (InformationModel.STUDY_ROOT, StudyRootQueryRetrieveInformationModelGet),
        (InformationModel.PATIENT_ROOT, PatientRootQueryRetrieveInformationModelGet),
    ],
)
def test_the_model_of_the_node_is_asked(model, sop_class):
    with scripted(sending(1), {CT: [ExplicitVRLittleEndian]}, model=sop_class) as port:
        intake = MemoryIntake()
        outcome = c_get(
            node(port, model=model), identifier(), contexts=[(CT, EXPLICIT)], intake=intake
        )
    assert outcome.status == 0x0000
    assert [o[1] for o in intake.objects] == ["1.2.3.4.1"]


def test_every_pair_has_a_context_of_its_own():
    proposed = []

    def note(event):
        proposed.extend(event.assoc.requestor.primitive.presentation_context_definition_list)

    application = AE("PACS")
    application.add_supported_context(StudyRootQueryRetrieveInformationModelGet)
    application.add_supported_context(CT, [EXPLICIT, RLELossless], scu_role=True, scp_role=True)
    server = application.start_server(
        ("127.0.0.1", 0),
        block=False,
        evt_handlers=[(evt.EVT_REQUESTED, note), (evt.EVT_C_GET, sending(1))],
    )
    pairs = [(CT, EXPLICIT), (CT, RLELossless), (MR, EXPLICIT)]
    outcome = c_get(
        node(server.server_address[1]), identifier(), contexts=pairs, intake=MemoryIntake()
    )
    server.shutdown()
    assert outcome.status == 0x0000
    assert [(c.abstract_syntax, *c.transfer_syntax) for c in proposed[1:]] == pairs


def test_pairs_are_packed_into_associations():
    pairs = [(f"1.2.{n}", EXPLICIT) for n in range(300)]
    packed = pack_contexts([*pairs, *pairs])
    assert [len(group) for group in packed] == [127, 127, 46]
    assert [pair for group in packed for pair in group] == pairs
    assert pack_contexts([]) == []


def test_the_largest_association_can_be_opened():
    pairs = [(f"1.2.840.10008.5.1.4.1.1.{n}", EXPLICIT) for n in range(126)] + [(CT, EXPLICIT)]
    (contexts,) = pack_contexts(pairs)
    with scripted(sending(1), {CT: [ExplicitVRLittleEndian]}) as port:
        outcome = c_get(node(port), identifier(), contexts=contexts, intake=MemoryIntake())
    assert outcome.status == 0x0000


def test_a_model_that_is_not_accepted_is_a_service_not_offered():
    other = StudyRootQueryRetrieveInformationModelMove
    with scripted(sending(), {CT: [ExplicitVRLittleEndian]}, model=other) as port:
        assert raised(port) == "service-not-offered"


def test_a_role_that_is_not_accepted_for_any_class_refuses_the_classes():
    application = AE("PACS")
    application.add_supported_context(StudyRootQueryRetrieveInformationModelGet)
    application.add_supported_context(CT)
    server = application.start_server(("127.0.0.1", 0), block=False)
    assert raised(server.server_address[1]) == "sop-classes-refused"
    server.shutdown()


def test_a_rejection_has_its_reason():
    application = AE("PACS")
    application.require_called_aet = True
    application.add_supported_context(StudyRootQueryRetrieveInformationModelGet)
    server = application.start_server(("127.0.0.1", 0), block=False)
    assert raised(server.server_address[1], title="OTHER") == "called-ae-title-unknown"
    application.require_calling_aet = ["SOMEBODY"]
    assert raised(server.server_address[1]) == "calling-ae-title-unknown"
    server.shutdown()


def test_nobody_there_is_refused():
    assert raised(free_port()) == "pacs-refused"


def raised(port, **more):
    with pytest.raises(PacsError) as error:
        c_get(node(port, **more), identifier(), contexts=[(CT, EXPLICIT)], intake=MemoryIntake())
    return error.value.code


# --- an archive that says what the test wants, byte by byte


@contextlib.contextmanager
def saying(script):
    """A server that runs ``script(connection)`` for one connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            connection, _ = server.accept()
            with connection:
                connection.settimeout(20)
                with contextlib.suppress(OSError):
                    script(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        thread.join(20)
        assert not thread.is_alive()


def exactly(connection, count):
    data = bytearray()
    while len(data) < count:
        chunk = connection.recv(count - len(data))
        if not chunk:
            raise ConnectionAbortedError
        data += chunk
    return bytes(data)


def read_pdu(connection):
    header = exactly(connection, 6)
    return header[0], exactly(connection, struct.unpack(">I", header[2:])[0])


def accept(connection):
    """Accept all contexts with the SCP role, and read the request."""
    kind, body = read_pdu(connection)
    assert kind == 1
    items = item(0x10, b"1.2.840.10008.3.1.1.1")
    # The proposed order: the model, then (CT, Explicit).
    for context_id, syntax in ((1, b"1.2.840.10008.1.2"), (3, EXPLICIT.encode())):
        items += item(0x21, bytes((context_id, 0, 0, 0)) + item(0x40, syntax))
    role = struct.pack(">H", len(CT)) + CT.encode() + b"\0\1"
    items += item(0x50, item(0x51, struct.pack(">I", 0)) + item(0x52, b"1.2.3") + item(0x54, role))
    answer = body[:68] + items
    connection.sendall(struct.pack(">BxI", 2, len(answer)) + answer)
    for _ in range(2):
        assert read_pdu(connection)[0] == 4


def item(kind, data):
    return struct.pack(">BxH", kind, len(data)) + data


def response(status, **counters):
    elements = {
        Element.AFFECTED_SOP_CLASS_UID: StudyRootQueryRetrieveInformationModelGet.encode(),
        Element.COMMAND_FIELD: 0x8010,
        Element.MESSAGE_ID_BEING_RESPONDED_TO: 1,
        Element.COMMAND_DATA_SET_TYPE: 0x0101,
        Element.STATUS: status,
    }
    elements.update({Element[name]: value for name, value in counters.items()})
    return message_pdus(1, write_command(elements), None, 0)


ABORT = bytes((7, 0, 0, 0, 0, 4, 0, 0, 0, 0))
BEGUN = pdu(pdv(3, 3, store_command("1.2.3.4.1"))) + pdu(pdv(3, 0, b"half"))


def ask(script, *, intake=None, should_stop=None, **timeouts):
    with saying(script) as port:
        return c_get(
            node(port, **timeouts),
            identifier(),
            contexts=[(CT, EXPLICIT)],
            intake=intake or MemoryIntake(),
            should_stop=should_stop,
        )


def test_an_abort_at_the_first_request_means_no_permission():
    def script(connection):
        accept(connection)
        connection.sendall(ABORT)

    outcome = ask(script)
    assert (outcome.status, outcome.lost) == (None, "not-permitted")


@pytest.mark.parametrize("ending", [b"", ABORT])
def test_an_association_lost_within_an_object_leaves_no_object(ending):
    def script(connection):
        accept(connection)
        connection.sendall(
            response(0xFF00, COMPLETED_SUBOPERATIONS=5, REMAINING_SUBOPERATIONS=7) + BEGUN + ending
        )

    intake = MemoryIntake()
    outcome = ask(script, intake=intake)
    assert (outcome.status, outcome.lost) == (None, "association-lost")
    assert (outcome.completed, outcome.remaining) == (5, 7)
    assert len(intake.abandoned) == 1
    assert not intake.completed


def test_silence_after_the_request_is_told_from_a_stall():
    def silent(connection):
        accept(connection)
        connection.recv(10)

    def stalled(connection):
        accept(connection)
        connection.sendall(response(0xFF00))
        connection.recv(10)

    assert ask(silent, first_byte_seconds=0.2, stall_seconds=30).lost == "pacs-silent"
    assert ask(stalled, first_byte_seconds=30, stall_seconds=0.2).lost == "association-stalled"


def test_an_archive_that_does_not_negotiate_is_silent():
    def script(connection):
        connection.recv(100_000)
        connection.recv(10)

    with saying(script) as port, pytest.raises(PacsError) as error:
        c_get(
            node(port, acse_seconds=0.2),
            identifier(),
            contexts=[(CT, EXPLICIT)],
            intake=MemoryIntake(),
        )
    assert error.value.code == "pacs-silent"


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"", "pacs-reset"),
        (ABORT, "not-permitted"),
        (bytes((3, 0, 0, 0, 0, 4, 0, 2, 3, 2)), "pacs-busy"),
        (bytes((3, 0, 0, 0, 0, 4, 0, 9, 9, 9)), "association-rejected"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "answer-unusable"),
        (b"\2\0\0\0\0\x60" + bytes(0x60), "answer-unusable"),
        (b"\2\0\xff\xff\xff\xff", "answer-unusable"),
    ],
)
def test_what_is_no_acceptance_has_a_name(answer, code):
    def script(connection):
        read_pdu(connection)
        connection.sendall(answer)

    with saying(script) as port:
        assert raised(port) == code


def test_a_final_response_without_counters_keeps_the_last_ones():
    def script(connection):
        accept(connection)
        connection.sendall(
            response(
                0xFF00,
                COMPLETED_SUBOPERATIONS=4,
                FAILED_SUBOPERATIONS=1,
                WARNING_SUBOPERATIONS=0,
                REMAINING_SUBOPERATIONS=3,
            )
            + response(0xC000, ERROR_COMMENT=b"disk of 1^2 ")
        )
        assert read_pdu(connection)[0] == 5

    outcome = ask(script)
    assert (outcome.status, outcome.completed, outcome.failed) == (0xC000, 4, 1)
    assert outcome.remaining is None
    assert outcome.error_comment_present
    assert "disk" not in repr(outcome)


def test_a_failed_list_that_cannot_be_read_is_no_list():
    def script(connection):
        accept(connection)
        elements = {
            Element.COMMAND_FIELD: 0x8010,
            Element.COMMAND_DATA_SET_TYPE: 1,
            Element.STATUS: 0xB000,
        }
        connection.sendall(message_pdus(1, write_command(elements), b"\xff" * 33, 0))
        read_pdu(connection)

    outcome = ask(script)
    assert (outcome.status, outcome.failed_sop_instance_uids) == (0xB000, ())


def test_a_response_to_something_else_is_unusable():
    def script(connection):
        accept(connection)
        elements = {
            Element.COMMAND_FIELD: 0x8020,
            Element.COMMAND_DATA_SET_TYPE: 0x0101,
            Element.STATUS: 0,
        }
        connection.sendall(message_pdus(1, write_command(elements), None, 0))
        connection.recv(100)

    assert ask(script).lost == "answer-unusable"


def test_a_cancelled_archive_that_obeys_gives_its_status():
    def script(connection):
        accept(connection)
        assert read_pdu(connection)[0] == 4
        connection.sendall(response(0xFE00, REMAINING_SUBOPERATIONS=9))
        read_pdu(connection)

    outcome = ask(script, should_stop=lambda: True)
    assert (outcome.status, outcome.remaining, outcome.lost) == (0xFE00, 9, None)


def test_a_cancelled_archive_that_goes_on_is_aborted(monkeypatch):
    monkeypatch.setattr(get, "_CANCEL_SECONDS", 0.2)
    seen = []

    def script(connection):
        accept(connection)
        while True:
            connection.sendall(response(0xFF00))
            seen.append(read_pdu(connection)[0])
            threading.Event().wait(0.3)

    outcome = ask(script, should_stop=lambda: True)
    assert (outcome.status, outcome.lost) == (None, "interrupted")
    assert seen[0] == 4
    assert seen[-1] in (4, 7)


def test_more_contexts_than_an_association_has_are_refused():
    pairs = [(f"1.2.{n}", EXPLICIT) for n in range(128)]
    for contexts in (pairs, []):
        with pytest.raises(ValueError, match="127"):
            c_get(node(1), identifier(), contexts=contexts, intake=MemoryIntake())
