"""Every legal way to cut messages into PDVs, PDUs and packets gives the same instances."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pynetdicom import AE, evt
from pynetdicom.pdu import A_ASSOCIATE_AC

from prefect_dicom.network.dimse import Element, read_command, unsigned_short, write_command
from prefect_dicom.network.storage_scp.close_reason import CloseKind
from prefect_dicom.network.storage_scp.transfer import (
    Limits,
)
from prefect_dicom.network.upper_layer.pdu import ProtocolError, message_pdus
from tests.support.wire import (
    CT,
    EXPLICIT,
    IMPLICIT,
    RELEASE_RP,
    RELEASE_RQ,
    VERIFICATION,
    Conversation,
    MemoryStoreHandler,
    association_request,
    converse,
    echo_message,
    pdu,
    pdv,
    responses,
    statuses,
    store_command,
    store_message,
)


def test_an_instance_arrives_in_the_bytes_it_was_sent_in():
    data = bytes(range(256)) * 3
    store_handler, end, said = converse(store_message("1.2.3", data), RELEASE_RQ)
    assert store_handler.instances == [(CT, "1.2.3", EXPLICIT, data)]
    assert end.kind is CloseKind.RELEASED
    (response,), rest = responses(said)
    assert rest == RELEASE_RP
    assert unsigned_short(response, Element.COMMAND_FIELD) == 0x8001
    assert unsigned_short(response, Element.MESSAGE_ID_BEING_RESPONDED_TO) == 1
    assert unsigned_short(response, Element.COMMAND_DATA_SET_TYPE) == 0x0101
    assert unsigned_short(response, Element.STATUS) == 0x0000
    assert response[Element.AFFECTED_SOP_CLASS_UID] == CT.encode() + b"\0"
    assert response[Element.AFFECTED_SOP_INSTANCE_UID] == b"1.2.3\0"
    (length,) = struct.unpack("<I", response[0])
    assert 12 + length == len(said) - len(RELEASE_RP) - 12


def test_the_request_says_who_sent_the_instance_and_for_which_move():
    originator = {
        Element.MOVE_ORIGINATOR_AE_TITLE: b"PREFECTDICOM    ",
        Element.MOVE_ORIGINATOR_MESSAGE_ID: 4711,
    }
    command = store_command("1.2.3 ", elements=originator)
    store_handler, _, _ = converse(message_pdus(5, command, b"ab", 0), RELEASE_RQ)
    (request,) = store_handler.began
    assert request.move_originator_ae_title == "PREFECTDICOM"
    assert request.move_originator_message_id == 4711
    assert request.sop_instance_uid == "1.2.3"
    assert request.transfer_syntax_uid == IMPLICIT
    assert (request.calling_ae_title, request.called_ae_title) == ("SENDER", "RECEIVER")
    assert request.peer_address == "192.0.2.1"


def test_a_stream_may_be_cut_at_every_byte():
    data = bytes(range(40))
    stream = (
        pdu(pdv(3, 1, (command := store_command("1.2.3"))[:10]), pdv(3, 3, command[10:]))
        + pdu(pdv(3, 0, data[:8]), pdv(3, 2, data[8:]))
        + echo_message()
        + RELEASE_RQ
    )
    for cut in range(1, len(stream)):
        store_handler, end, said = converse(stream[:cut], stream[cut:])
        assert store_handler.instances == [(CT, "1.2.3", EXPLICIT, data)], cut
        assert statuses(said) == [0, 0]
        assert end.kind is CloseKind.RELEASED


def test_a_stream_may_come_byte_by_byte():
    stream = store_message("1.2.3", b"abcd") + RELEASE_RQ
    store_handler, _, said = converse(*(stream[n : n + 1] for n in range(len(stream))))
    assert store_handler.instances == [(CT, "1.2.3", EXPLICIT, b"abcd")]
    assert said.endswith(RELEASE_RP)


def test_several_requests_may_come_before_the_first_answer():
    stream = b"".join(store_message(f"1.2.{n}", b"%04d" % n) for n in range(100))
    store_handler, _, said = converse(stream, RELEASE_RQ)
    assert [part.data for part in store_handler.completed] == [b"%04d" % n for n in range(100)]
    assert statuses(said) == [0] * 100


def test_reserved_bits_of_the_message_control_header_are_not_tested():
    command = store_command("1.2.3")
    stream = pdu(pdv(3, 0xFF & ~0x02, command[:8]), pdv(3, 0xFF, command[8:]))
    stream += pdu(pdv(3, 0xFC, b"ab"), pdv(3, 0xFE, b"cd"))
    store_handler, _, _ = converse(stream, RELEASE_RQ)
    assert store_handler.instances == [(CT, "1.2.3", EXPLICIT, b"abcd")]


def test_fragments_of_odd_length_and_empty_fragments_are_joined():
    command = store_command("1.2.3")
    stream = pdu(pdv(3, 1, command[:7]), pdv(3, 1, b""), pdv(3, 1, command[7:]), pdv(3, 3, b""))
    stream += pdu(pdv(3, 0, b"a")) + pdu(pdv(3, 0, b"")) + pdu(pdv(3, 0, b"bc"), pdv(3, 2, b""))
    store_handler, _, said = converse(stream, RELEASE_RQ)
    assert store_handler.instances == [(CT, "1.2.3", EXPLICIT, b"abc")]
    assert statuses(said) == [0]


def test_an_empty_data_set_is_an_instance_too():
    store_handler, _, said = converse(store_message("1.2.3", b""), RELEASE_RQ)
    assert store_handler.instances == [(CT, "1.2.3", EXPLICIT, b"")]
    assert statuses(said) == [0]


def test_a_store_without_a_data_set_fails_and_the_association_stays():
    alone = message_pdus(3, store_command("1.2.3", data_set_type=0x0101), None, 0)
    store_handler, end, said = converse(alone, store_message("1.2.4", b"ab"), RELEASE_RQ)
    assert statuses(said) == [0xC000, 0]
    assert [part.request.sop_instance_uid for part in store_handler.completed] == ["1.2.4"]
    assert end.kind is CloseKind.RELEASED


def test_a_full_spool_is_answered_by_a700_and_the_data_set_is_swallowed():
    store_handler, end, said = converse(
        store_message("1.2.3", bytes(5000)),
        echo_message(),
        RELEASE_RQ,
        store_handler=MemoryStoreHandler(full=True),
    )
    assert statuses(said) == [0xA700, 0]
    assert not store_handler.completed
    assert end.kind is CloseKind.RELEASED


def test_a_disk_that_fills_up_within_an_instance_is_answered_by_a700():
    store_handler, _, said = converse(
        store_message("1.2.3", bytes(5000), pdu_bytes=1000),
        store_message("1.2.4", bytes(500)),
        RELEASE_RQ,
        store_handler=MemoryStoreHandler(room=2500),
    )
    assert statuses(said) == [0xA700, 0]
    assert [part.request.sop_instance_uid for part in store_handler.abandoned] == ["1.2.3"]
    assert [part.request.sop_instance_uid for part in store_handler.completed] == ["1.2.4"]


def test_the_status_of_the_store_handler_is_what_is_answered():
    _, _, said = converse(
        store_message("1.2.3", b"ab"), RELEASE_RQ, store_handler=MemoryStoreHandler(status=0x0124)
    )
    assert statuses(said) == [0x0124]


def test_a_store_handler_that_fails_costs_one_instance_and_not_the_association():
    class Faulty(MemoryStoreHandler):
        def complete(self, part):
            if part.request.sop_instance_uid == "1.2.3":
                raise RuntimeError
            return super().complete(part)

    _, _, said = converse(
        store_message("1.2.3", b"ab"),
        store_message("1.2.4", b"ab"),
        RELEASE_RQ,
        store_handler=Faulty(),
    )
    assert statuses(said) == [0x0110, 0]


@pytest.mark.parametrize("field", [0x0010, 0x0020, 0x0021, 0x0100, 0x0110, 0x0140, 0x0150])
@pytest.mark.parametrize("data", [None, b"abcd"])
def test_other_requests_are_unrecognised_operations(field, data):
    elements = {
        Element.COMMAND_FIELD: field,
        Element.MESSAGE_ID: 9,
        Element.COMMAND_DATA_SET_TYPE: 0x0101 if data is None else 1,
    }
    _, end, said = converse(message_pdus(3, write_command(elements), data, 0), RELEASE_RQ)
    (response,), _ = responses(said)
    assert unsigned_short(response, Element.COMMAND_FIELD) == field | 0x8000
    assert unsigned_short(response, Element.STATUS) == 0x0211
    assert unsigned_short(response, Element.MESSAGE_ID_BEING_RESPONDED_TO) == 9
    assert end.kind is CloseKind.RELEASED


def test_a_cancel_of_nothing_is_not_answered():
    elements = {
        Element.COMMAND_FIELD: 0x0FFF,
        Element.MESSAGE_ID_BEING_RESPONDED_TO: 1,
        Element.COMMAND_DATA_SET_TYPE: 0x0101,
    }
    _, _, said = converse(message_pdus(3, write_command(elements), None, 0), RELEASE_RQ)
    assert said == RELEASE_RP


COMMAND = store_command("1.2.3")
BEGUN = pdu(pdv(3, 3, COMMAND))
PROTOCOL_ERRORS = {
    "data on another context": (BEGUN + pdu(pdv(5, 2, b"ab")), 6),
    "command on two contexts": (pdu(pdv(3, 1, COMMAND[:8]), pdv(5, 3, COMMAND[8:])), 6),
    "unknown context": (pdu(pdv(7, 3, COMMAND)), 6),
    "data without command": (pdu(pdv(3, 2, b"ab")), 2),
    "command instead of data": (BEGUN + BEGUN, 2),
    "data within a command": (pdu(pdv(3, 1, COMMAND[:8]), pdv(3, 2, b"ab")), 2),
    "PDV longer than its PDU": (struct.pack(">BxIIBB", 4, 8, 100, 3, 3) + b"ab", 6),
    "PDV too short": (struct.pack(">BxIIBB", 4, 6, 1, 3, 3), 6),
    "PDU ends in a PDV header": (struct.pack(">BxI", 4, 8 + 3) + pdv(3, 1, b"ab") + b"abc", 6),
    "empty P-DATA": (pdu(), 6),
    "garbage for a command": (pdu(pdv(3, 3, b"\x08\x00\x05\x00\x02\x00\x00\x00ab")), 6),
    "element beyond the command": (pdu(pdv(3, 3, b"\0\0\0\1\xff\xff\xff\xff")), 6),
    "command without command field": (pdu(pdv(3, 3, b"")), 6),
    "release within a message": (BEGUN + RELEASE_RQ, 2),
    "second association request": (b"\x01\0\0\0\0\x04abcd", 2),
    "unknown PDU": (b"\x09\0\0\0\0\x04abcd", 1),
}


@pytest.mark.parametrize("name", PROTOCOL_ERRORS)
def test_what_breaks_the_protocol_is_aborted(name):
    stream, reason = PROTOCOL_ERRORS[name]
    store_handler, end, said = converse(stream)
    assert said[-10:] == bytes((7, 0, 0, 0, 0, 4, 0, 0, 2, reason))
    assert end.kind is CloseKind.REFUSED
    assert not store_handler.completed
    assert len(store_handler.abandoned) == len(store_handler.began)


def test_a_response_to_no_request_is_aborted():
    elements = {
        Element.COMMAND_FIELD: 0x8010,
        Element.STATUS: 0,
        Element.COMMAND_DATA_SET_TYPE: 0x0101,
    }
    _, end, said = converse(message_pdus(3, write_command(elements), None, 0))
    assert said == bytes((7, 0, 0, 0, 0, 4, 0, 0, 0, 0))
    assert end.kind is CloseKind.REFUSED


@pytest.mark.parametrize("tail", [b"", bytes((7, 0, 0, 0, 0, 4, 0, 0, 2, 1))])
def test_an_instance_is_abandoned_when_the_association_ends_within_it(tail):
    talk = Conversation()
    talk.ours.sendall(BEGUN + pdu(pdv(3, 0, b"half")) + tail)
    talk.ours.shutdown(socket.SHUT_WR)
    assert talk.everything() == b""
    assert len(talk.store_handler.abandoned) == 1
    assert not talk.store_handler.completed
    if tail:
        assert (talk.end.kind, talk.end.source, talk.end.reason) == (CloseKind.ABORTED, 2, 1)
    else:
        assert talk.end.kind is CloseKind.CLOSED


@pytest.mark.parametrize("longest", [1, 8, 20, 64, 16382])
def test_answers_are_cut_to_the_pdu_length_of_the_peer(longest):
    _, _, said = converse(store_message("1.2.3", b"ab"), RELEASE_RQ, peer_pdu_bytes=longest)
    command = bytearray()
    while said[:1] == b"\x04":
        (length,) = struct.unpack_from(">I", said, 2)
        assert length <= max(longest, 8)
        assert length % 2 == 0
        command += said[12 : 6 + length]
        said = said[6 + length :]
    assert unsigned_short(read_command(command), Element.STATUS) == 0
    assert said == RELEASE_RP


@given(st.binary(max_size=200))
def test_reading_a_command_set_never_raises_but_for_a_protocol_error(data):
    with contextlib.suppress(ProtocolError):
        read_command(data)


# --- the same streams, read by pynetdicom


@st.composite
def cut(draw, data: bytes):
    """Fragments of the data, none of odd length, as PS3.8 wants them."""
    size = draw(st.sampled_from([2, 8, 50, 10_000]))
    return [data[start : start + size] for start in range(0, len(data), size)] or [b""]


@st.composite
def streams(draw, joined: bool):
    """Objects, and a legal stream of PDUs that carries them, in chunks.

    ``joined`` lets the end of a message and the beginning of the next share a PDU, which
    pynetdicom's SCP cannot read.
    """
    objects, stream, pdvs = [], bytearray(), []
    for number in range(draw(st.integers(1, 4))):
        context_id = draw(st.sampled_from([3, 5]))
        data = draw(st.binary(min_size=1, max_size=150)) * 2
        uid = f"1.2.{number + 1}"
        objects.append((CT, uid, EXPLICIT if context_id == 3 else IMPLICIT, data))
        for kind, whole in ((1, store_command(uid, message_id=number + 1)), (0, data)):
            fragments = draw(cut(whole))
            for index, fragment in enumerate(fragments):
                last = 2 if index == len(fragments) - 1 else 0
                pdvs.append(pdv(context_id, kind | last, fragment))
        while pdvs and not joined:
            stream += _take(draw, pdvs)
    while pdvs:
        stream += _take(draw, pdvs)
    points = sorted(draw(st.sets(st.integers(1, len(stream) - 1), max_size=8)))
    chunks = [
        bytes(stream[start:stop])
        for start, stop in zip([0, *points], [*points, len(stream)], strict=True)
    ]
    return objects, chunks


def _take(draw, pdvs):
    """A PDU of some of the PDVs, which are gone then."""
    count = draw(st.integers(1, len(pdvs)))
    taken = pdu(*pdvs[:count])
    del pdvs[:count]
    return taken


@pytest.fixture(scope="module")
def reference():
    """pynetdicom's own storage SCP: what it makes of a stream."""
    received = []

    def keep(event):
        received.append(
            (
                str(event.request.AffectedSOPClassUID),
                str(event.request.AffectedSOPInstanceUID),
                str(event.context.transfer_syntax),
                event.request.DataSet.getvalue(),
            )
        )
        return 0x0000

    application = AE()
    for syntax, uid in ((IMPLICIT, VERIFICATION), (EXPLICIT, CT)):
        application.add_supported_context(uid, [syntax])
    application.add_supported_context(CT, [EXPLICIT, IMPLICIT])
    server = application.start_server(
        ("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, keep)]
    )

    def read(chunks, count):
        received.clear()
        with socket.create_connection(server.server_address, 20) as connection:
            connection.settimeout(20)
            connection.sendall(association_request())
            header = _exactly(connection, 6)
            answer = A_ASSOCIATE_AC()
            answer.decode(header + _exactly(connection, int.from_bytes(header[2:], "big")))
            assert all(context.result == 0 for context in answer.presentation_context)
            for chunk in chunks:
                connection.sendall(chunk)
            said = bytearray()
            while len(statuses(bytes(said))) < count:
                header = _exactly(connection, 6)
                said += header + _exactly(connection, int.from_bytes(header[2:], "big"))
            connection.sendall(RELEASE_RQ)
            assert _exactly(connection, 10) == RELEASE_RP
        return list(received), statuses(bytes(said))

    yield read
    server.shutdown()


def _exactly(connection, count):
    data = bytearray()
    while len(data) < count:
        chunk = connection.recv(count - len(data))
        assert chunk
        data += chunk
    return bytes(data)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(streams(joined=False))
def test_any_legal_stream_gives_what_pynetdicom_gives(reference, stream):
    objects, chunks = stream
    store_handler, end, said = converse(*chunks, RELEASE_RQ)
    assert store_handler.instances == objects
    assert end.kind is CloseKind.RELEASED
    assert (store_handler.instances, statuses(said)) == reference(chunks, len(objects))


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(streams(joined=True))
@pytest.mark.needs("time")
def test_any_legal_stream_gives_the_instances_it_carries(stream):
    objects, chunks = stream
    store_handler, _, said = converse(*chunks, RELEASE_RQ)
    assert store_handler.instances == objects
    assert statuses(said) == [0] * len(objects)


def test_an_association_that_is_to_leave_ends_after_the_instance_under_way():
    talk = Conversation(limits=Limits(idle_seconds=20))
    talk.ours.sendall(BEGUN)
    talk.store_handler.wait_until(lambda store_handler: store_handler.began)
    talk.transfer.leave()
    talk.ours.sendall(pdu(pdv(3, 2, b"ab")))
    said = talk.everything()
    assert statuses(said) == [0]
    assert said[-10:-4] == bytes((7, 0, 0, 0, 0, 4))
    assert talk.end.kind is CloseKind.STOPPED


def test_an_instance_on_the_context_of_another_class_is_taken_and_said_once(caplog):
    caplog.set_level(logging.DEBUG)
    other = {Element.AFFECTED_SOP_CLASS_UID: b"1.2.840.10008.5.1.4.1.1.4"}
    stream = b"".join(
        message_pdus(3, store_command(f"1.2.{n}", elements=other), b"ab", 0) for n in range(3)
    )
    store_handler, _, said = converse(stream, store_message("1.2.9", b"cd"), RELEASE_RQ)
    assert statuses(said) == [0] * 4
    assert len(store_handler.completed) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "SENDER sends instances on a presentation context of another SOP class; they are taken"
    ]
