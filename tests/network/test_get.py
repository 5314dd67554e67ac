"""C-GET: what was asked for comes back on our own association, and every end has a name."""

from __future__ import annotations

import contextlib
import threading

import pytest
from pydicom import dcmread
from pydicom.encaps import encapsulate
from pydicom.uid import ExplicitVRLittleEndian, RLELossless
from pynetdicom import AE, evt
from pynetdicom.sop_class import (
    PatientRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from prefect_dicom.core.model import InformationModel
from prefect_dicom.network.get import c_get
from tests.support.c_get import identifier, node, raised
from tests.support.peers import Dcmqrscp, Orthanc, free_port
from tests.support.wire import (
    CT,
    EXPLICIT,
    MemoryStoreHandler,
    data_set_bytes,
    make_instance,
    write_instances,
)

MR = "1.2.840.10008.5.1.4.1.1.4"


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
            # dcmqrscp keeps uncompressed instances only.
            paths.append(tmp_path / "00013.dcm")
            compressed.save_as(paths[-1], enforce_file_format=True)
        assert peer.load(paths).stored == len(paths)
        peer.paths = paths
        yield peer


def test_a_study_comes_back_in_the_bytes_it_was_stored_in(archive):
    store_handler, seen = MemoryStoreHandler(), []
    result = c_get(
        archive.node(),
        identifier(),
        contexts=[(CT, EXPLICIT), (CT, RLELossless)],
        store_handler=store_handler,
        message_id=42,
        on_progress=seen.append,
    )
    assert (result.status, result.lost) == (0x0000, None)
    assert result.completed == len(archive.paths)
    assert not result.failed
    # dcmqrscp re-encodes, here into what it was; Orthanc sends what it holds.
    expected = {
        dcmread(path).SOPInstanceUID: (
            str(dcmread(path).file_meta.TransferSyntaxUID),
            data_set_bytes(path),
        )
        for path in archive.paths
    }
    assert {uid: (syntax, data) for _, uid, syntax, data in store_handler.instances} == expected
    assert {request.peer_address for request in store_handler.began} == {"127.0.0.1"}
    assert {request.called_ae_title for request in store_handler.began} == {archive.ae_title}
    assert seen
    assert {progress.status for progress in seen} == {0xFF00}


def test_a_study_the_archive_does_not_hold_brings_nothing(archive):
    store_handler = MemoryStoreHandler()
    result = c_get(
        archive.node(), identifier("1.2.99"), contexts=[(CT, EXPLICIT)], store_handler=store_handler
    )
    assert result.status in (0x0000, 0xC000)
    assert result.lost is None
    assert not store_handler.began


def test_a_full_spool_is_reported_to_the_pacs(archive):
    store_handler = MemoryStoreHandler(full=True)
    result = c_get(
        archive.node(), identifier(), contexts=[(CT, EXPLICIT)], store_handler=store_handler
    )
    assert result.status != 0x0000
    assert not store_handler.completed


def test_a_cancelled_request_ends_before_the_study_does(archive):
    class Gate(MemoryStoreHandler):
        def complete(self, part):
            status = super().complete(part)
            if len(self.completed) == 2:
                stop.set()
            return status

    stop = threading.Event()
    store_handler = Gate()
    result = c_get(
        archive.node(),
        identifier(),
        contexts=[(CT, EXPLICIT), (CT, RLELossless)],
        store_handler=store_handler,
        should_stop=stop.is_set,
    )
    # A small study may be under way as a whole before the archive reads the C-CANCEL-RQ.
    assert result.status in (0xFE00, 0x0000)
    assert len(store_handler.completed) >= 2


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
    class Refusing(MemoryStoreHandler):
        def complete(self, part):
            super().complete(part)
            return 0xA700 if part.request.sop_instance_uid == "1.2.3.4.2" else 0x0000

    with scripted(sending(1, 2, 3), {CT: [ExplicitVRLittleEndian]}) as port:
        result = c_get(
            node(port), identifier(), contexts=[(CT, EXPLICIT)], store_handler=Refusing()
        )
    assert result.status == 0xB000
    assert (result.completed, result.failed, result.warning) == (2, 1, 0)
    assert result.failed_sop_instance_uids == ("1.2.3.4.2",)
    assert result.lost is None


@pytest.mark.parametrize(
    ("model", "sop_class"),
    [
        (InformationModel.STUDY_ROOT, StudyRootQueryRetrieveInformationModelGet),
        (InformationModel.PATIENT_ROOT, PatientRootQueryRetrieveInformationModelGet),
    ],
)
def test_the_model_of_the_node_is_asked(model, sop_class):
    with scripted(sending(1), {CT: [ExplicitVRLittleEndian]}, model=sop_class) as port:
        store_handler = MemoryStoreHandler()
        result = c_get(
            node(port, model=model),
            identifier(),
            contexts=[(CT, EXPLICIT)],
            store_handler=store_handler,
        )
    assert result.status == 0x0000
    assert [o[1] for o in store_handler.instances] == ["1.2.3.4.1"]


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
    result = c_get(
        node(server.server_address[1]),
        identifier(),
        contexts=pairs,
        store_handler=MemoryStoreHandler(),
    )
    server.shutdown()
    assert result.status == 0x0000
    assert [(c.abstract_syntax, *c.transfer_syntax) for c in proposed[1:]] == pairs


def test_the_largest_association_can_be_opened():
    pairs = [(f"1.2.840.10008.5.1.4.1.1.{n}", EXPLICIT) for n in range(126)] + [(CT, EXPLICIT)]
    with scripted(sending(1), {CT: [ExplicitVRLittleEndian]}) as port:
        result = c_get(node(port), identifier(), contexts=pairs, store_handler=MemoryStoreHandler())
    assert result.status == 0x0000


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
