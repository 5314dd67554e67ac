"""C-GET with a PACS that answers byte by byte, wrongly, late or never."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import pytest
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelGet,
)

from prefect_dicom.core.errors import PacsError
from prefect_dicom.network import get
from prefect_dicom.network.dimse import Element, write_command
from prefect_dicom.network.get import c_get
from tests.support.c_get import identifier, node, raised
from tests.support.wire import (
    CT,
    EXPLICIT,
    MemoryStoreHandler,
    message_pdus,
    pdu,
    pdv,
    store_command,
)


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
    elements.update({getattr(Element, name): value for name, value in counters.items()})
    return message_pdus(1, write_command(elements), None, 0)


ABORT = bytes((7, 0, 0, 0, 0, 4, 0, 0, 0, 0))
BEGUN = pdu(pdv(3, 3, store_command("1.2.3.4.1"))) + pdu(pdv(3, 0, b"half"))


def ask(script, *, store_handler=None, should_stop=None, **timeouts):
    with saying(script) as port:
        return c_get(
            node(port, **timeouts),
            identifier(),
            contexts=[(CT, EXPLICIT)],
            store_handler=store_handler or MemoryStoreHandler(),
            should_stop=should_stop,
        )


def test_an_abort_at_the_first_request_means_no_permission():
    def script(connection):
        accept(connection)
        connection.sendall(ABORT)

    result = ask(script)
    assert (result.status, result.lost) == (None, "not-permitted")


@pytest.mark.parametrize("last_bytes", [b"", ABORT])
def test_an_association_lost_within_an_instance_leaves_no_instance(last_bytes):
    def script(connection):
        accept(connection)
        connection.sendall(
            response(0xFF00, COMPLETED_SUBOPERATIONS=5, REMAINING_SUBOPERATIONS=7)
            + BEGUN
            + last_bytes
        )

    store_handler = MemoryStoreHandler()
    result = ask(script, store_handler=store_handler)
    assert (result.status, result.lost) == (None, "association-lost")
    assert (result.completed, result.remaining) == (5, 7)
    assert len(store_handler.abandoned) == 1
    assert not store_handler.completed


def test_silence_after_the_request_differs_from_a_stall():
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
            store_handler=MemoryStoreHandler(),
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

    result = ask(script)
    assert (result.status, result.completed, result.failed) == (0xC000, 4, 1)
    assert result.remaining is None
    assert result.error_comment_present
    assert "disk" not in repr(result)


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

    result = ask(script)
    assert (result.status, result.failed_sop_instance_uids) == (0xB000, ())


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

    result = ask(script, should_stop=lambda: True)
    assert (result.status, result.remaining, result.lost) == (0xFE00, 9, None)


def test_a_cancelled_archive_that_goes_on_is_aborted(monkeypatch):
    monkeypatch.setattr(get, "_CANCEL_SECONDS", 0.2)
    seen = []

    def script(connection):
        accept(connection)
        while True:
            connection.sendall(response(0xFF00))
            seen.append(read_pdu(connection)[0])
            threading.Event().wait(0.3)

    result = ask(script, should_stop=lambda: True)
    assert (result.status, result.lost) == (None, "interrupted")
    assert seen[0] == 4
    assert seen[-1] in (4, 7)


def test_more_contexts_than_an_association_has_are_refused():
    pairs = [(f"1.2.{n}", EXPLICIT) for n in range(128)]
    for contexts in (pairs, []):
        with pytest.raises(ValueError, match="127"):
            c_get(node(1), identifier(), contexts=contexts, store_handler=MemoryStoreHandler())
