"""Every instance comes in, in the encoding its sender keeps it in."""

from __future__ import annotations

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    RLELossless,
)
from pynetdicom import AE, build_context, build_role
from pynetdicom.sop_class import (
    CTImageStorage,
    HangingProtocolStorage,
    ModalityPerformedProcedureStep,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)

from prefect_dicom.network.storage_scp.association_events import Happening
from prefect_dicom.network.storage_scp.connection import ConnectionPolicy
from prefect_dicom.network.storage_scp.server import StorageScp
from prefect_dicom.network.upper_layer.negotiation import kept_transfer_syntax
from tests.support.wire import (
    CT,
    MemoryStoreHandler,
    data_set_bytes,
    make_instance,
    run_tool,
    tool,
    write_instances,
)

PRIVATE = "1.2.826.0.1.3680043.9.7433.1.1"
RETIRED = "1.2.840.10008.5.1.4.1.1.5"
FUTURE = "1.2.840.10008.5.1.4.1.1.999.7"
VENDOR_SYNTAX = "1.2.840.113619.5.2"


@pytest.fixture
def store_handler():
    return MemoryStoreHandler()


@pytest.fixture
def events():
    return []


@pytest.fixture
def receiver(store_handler, events):
    with StorageScp(
        "127.0.0.1",
        0,
        "PREFECTDICOM",
        store_handler,
        policy=ConnectionPolicy(lambda address: address == "127.0.0.1"),
        on_event=events.append,
    ) as scp:
        yield scp


def associate(receiver, contexts, **more):
    application = AE("SENDER")
    return application.associate(
        "127.0.0.1", receiver.port, contexts=contexts, ae_title="PREFECTDICOM", **more
    )


@pytest.mark.parametrize("sop_class", [CT, HangingProtocolStorage, PRIVATE, RETIRED, FUTURE])
def test_known_private_retired_and_future_classes_are_stored(receiver, store_handler, sop_class):
    association = associate(receiver, [build_context(sop_class, ExplicitVRLittleEndian)])
    assert association.is_established
    assert association.send_c_store(make_instance(1, sop_class=sop_class)).Status == 0x0000
    association.release()
    ((stored_class, uid, syntax, data),) = store_handler.instances
    assert (stored_class, uid, syntax) == (sop_class, "1.2.3.4.1", ExplicitVRLittleEndian)
    assert data.endswith(b"\x01" * 64)


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRBigEndian,
        JPEGBaseline8Bit,
        JPEGLosslessSV1,
        JPEG2000Lossless,
        RLELossless,
        VENDOR_SYNTAX,
    ],
)
def test_every_transfer_syntax_is_accepted_as_it_is_proposed(receiver, syntax):
    association = associate(receiver, [build_context(CT, syntax)])
    assert [c.transfer_syntax for c in association.accepted_contexts] == [[syntax]]
    association.release()


def test_of_several_syntaxes_the_first_that_is_not_implicit_is_taken():
    uncompressed = [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian]
    assert kept_transfer_syntax(uncompressed) == ExplicitVRLittleEndian
    assert kept_transfer_syntax([JPEG2000Lossless, ExplicitVRLittleEndian]) == JPEG2000Lossless
    assert kept_transfer_syntax([ImplicitVRLittleEndian]) == ImplicitVRLittleEndian


def test_compressed_instances_arrive_in_their_own_bytes(receiver, store_handler, tmp_path):
    instance = make_instance(1)
    instance.file_meta.TransferSyntaxUID = RLELossless
    instance.PixelData = encapsulate([bytes(range(200))])
    instance["PixelData"].VR = "OB"
    path = tmp_path / "compressed.dcm"
    instance.save_as(path, enforce_file_format=True)
    association = associate(receiver, [build_context(CT, RLELossless)])
    assert association.send_c_store(dcmread(path)).Status == 0x0000
    association.release()
    ((_, _, syntax, data),) = store_handler.instances
    assert (syntax, data) == (RLELossless, data_set_bytes(path))


def test_every_context_of_a_full_association_is_accepted(receiver):
    contexts = [build_context(f"{PRIVATE}.{n}", ExplicitVRLittleEndian) for n in range(127)]
    association = associate(receiver, [*contexts, build_context(Verification)])
    assert len(association.accepted_contexts) == 128
    assert association.send_c_echo().Status == 0x0000
    association.release()


def test_services_that_are_no_storage_are_refused_by_context(receiver):
    association = associate(
        receiver,
        [
            build_context(CT),
            build_context(StudyRootQueryRetrieveInformationModelFind),
            build_context(ModalityPerformedProcedureStep),
        ],
    )
    assert [c.abstract_syntax for c in association.accepted_contexts] == [CT]
    assert {c.result for c in association.rejected_contexts} == {3}
    association.release()


def test_we_are_scp_only(receiver):
    roles = [build_role(CTImageStorage, scu_role=True, scp_role=True)]
    association = associate(receiver, [build_context(CT)], ext_neg=roles)
    (context,) = association.accepted_contexts
    assert (context.as_scu, context.as_scp) == (True, False)
    association.release()
    only_scp = [build_role(CTImageStorage, scp_role=True)]
    association = associate(
        receiver, [build_context(CT), build_context(Verification)], ext_neg=only_scp
    )
    assert [c.abstract_syntax for c in association.accepted_contexts] == [Verification]
    association.release()


def test_our_pdu_length_and_implementation_are_sent_and_no_asynchronous_window(receiver):
    association = associate(receiver, [build_context(CT)])
    acceptor = association.acceptor
    assert acceptor.maximum_length == 256 * 1024
    assert acceptor.implementation_class_uid.startswith("2.25.")
    assert acceptor.asynchronous_operations == (1, 1)
    association.release()


def test_another_called_ae_title_is_rejected(receiver, events):
    application = AE("SENDER")
    application.add_requested_context(CT)
    association = application.associate("127.0.0.1", receiver.port, ae_title="OTHER")
    assert association.is_rejected
    answer = association.acceptor.primitive
    assert (answer.result, answer.result_source, answer.diagnostic) == (1, 1, 7)
    assert [e.happening for e in events] == [Happening.REJECTED]
    assert events[0].called_ae_title == "OTHER"


def test_what_happens_is_reported_to_the_listener(receiver, events, store_handler):
    association = associate(receiver, [build_context(CT, ExplicitVRLittleEndian)])
    association.send_c_store(make_instance(1))
    association.release()
    receiver.stop()
    assert [e.happening for e in events] == [Happening.ACCEPTED, Happening.ENDED]
    assert events[-1].instances == 1
    assert (events[-1].peer_address, events[-1].calling_ae_title) == ("127.0.0.1", "SENDER")


@pytest.mark.parametrize("program", ["storescu", "dcmsend"])
@pytest.mark.parametrize("nagle", [False, True])
def test_instances_of_dcmtk_arrive_unchanged(receiver, store_handler, tmp_path, program, nagle):
    paths = write_instances(tmp_path, 10, size=96)
    environment = {"PATH": "/usr/bin:/bin"} if nagle else None
    sent = run_tool(
        tool(program), "-aec", "PREFECTDICOM", "127.0.0.1", receiver.port, *paths,
        environment=environment,
    )  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    assert [o[1] for o in store_handler.instances] == [f"1.2.3.4.{n}" for n in range(1, 11)]
    assert {o[2] for o in store_handler.instances} == {ExplicitVRLittleEndian}
    assert [o[3] for o in store_handler.instances] == [data_set_bytes(path) for path in paths]


def test_dcmtk_echoes(receiver):
    echoed = run_tool(tool("echoscu"), "-aec", "PREFECTDICOM", "127.0.0.1", receiver.port)
    assert echoed.returncode == 0, echoed.stderr


def test_the_instances_of_pynetdicom_arrive_unchanged(receiver, store_handler, tmp_path):
    paths = write_instances(tmp_path, 10)
    association = associate(receiver, [build_context(CT, ExplicitVRLittleEndian)])
    for path in paths:
        assert association.send_c_store(path, originator_aet="MOVER").Status == 0x0000
    association.release()
    assert [o[3] for o in store_handler.instances] == [data_set_bytes(path) for path in paths]
    assert {part.request.move_originator_ae_title for part in store_handler.completed} == {"MOVER"}


def test_requests_of_services_we_do_not_offer_get_a_status(receiver):
    # A peer that sends C-FIND on a storage context.
    association = associate(receiver, [build_context(CT)])
    context = association.accepted_contexts[0]
    identifier = Dataset()
    identifier.QueryRetrieveLevel = "STUDY"
    context._as_scu = True
    (status, _), *_ = association.send_c_find(identifier, CT)
    assert status.Status == 0x0211
    association.release()
