"""Whatever a PACS answers to a C-FIND or C-GET: an error with a reason, in time and in limits.

Whoever asks is a receiver too: the PACS decides what comes over the association.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydicom.dataset import Dataset

from prefect_dicom.config.node import PacsNode, Timeouts
from prefect_dicom.core.errors import PacsError
from prefect_dicom.network.dimse import Element, write_command
from prefect_dicom.network.find.list_studies import find_studies
from prefect_dicom.network.get import c_get
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.upper_layer.pdu import Pdu
from tests.support.campaign import subset
from tests.support.part10_objects import SEQUENCE_END, element, item
from tests.support.sites import until
from tests.support.wire import (
    CT,
    EXPLICIT,
    MemoryStoreHandler,
    message_pdus,
    pdu,
    pdv,
    store_message,
)

pytestmark = [
    pytest.mark.campaign("hostile peers"),
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
]

MEBIBYTE = bytes(1024**2)
GROWTH_BYTES = 64 * 1024**2
UNUSABLE = {"answer-unusable", "pacs-reset", "association-lost", "association-stalled"}
Attack = Callable[[socket.socket], None]


def association_item(kind: int, data: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(data)) + data


def items(data: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    while start + 4 <= len(data):
        kind, length = struct.unpack_from(">BxH", data, start)
        yield kind, data[start + 4 : start + 4 + length]
        start += 4 + length


def accept_all(request: bytes) -> bytes:
    """The A-ASSOCIATE-AC that accepts every context and role of a request's body."""
    answer = request[:68] + association_item(0x10, b"1.2.840.10008.3.1.1.1")
    user = b""
    for kind, content in items(request, 68):
        if kind == 0x20:
            syntax = next(data for kind, data in items(content, 4) if kind == 0x40)
            answer += association_item(0x21, content[:4] + association_item(0x40, syntax))
        elif kind == 0x50:
            for inner, data in items(content, 0):
                if inner == 0x51:
                    user += association_item(0x51, bytes(4))
                elif inner in (0x52, 0x54):
                    user += association_item(inner, data)
    answer += association_item(0x50, user)
    return struct.pack(">BxI", 2, len(answer)) + answer


class HostilePacs:
    """Accepts what is proposed, reads one request, and then does what it wants."""

    def __init__(self, attack: Attack, *, accepts: bool = True) -> None:
        self._attack = attack
        self._accepts = accepts
        self._server = socket.create_server(("127.0.0.1", 0))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> HostilePacs:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        self._server.close()
        assert not self._thread.is_alive()

    def node(self, **timeouts: float) -> PacsNode:
        return PacsNode(
            host="127.0.0.1",
            port=self._server.getsockname()[1],
            called_ae_title="PACS",
            timeouts=Timeouts(
                **{
                    "connect_seconds": 5,
                    "acse_seconds": 1,
                    "find_seconds": 1,
                    "first_byte_seconds": 1,
                    "stall_seconds": 1,
                    **timeouts,
                }
            ),
        )

    def _serve(self) -> None:
        while not self._over.is_set():
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            connection.settimeout(10)
            with connection, contextlib.suppress(OSError):
                if self._accepts:
                    connection.sendall(accept_all(self._pdu(connection)))
                    while self._pdu(connection)[5] != 2:
                        pass
                self._attack(connection)
                while (said := connection.recv(65536)) and said[0] != Pdu.RELEASE_RQ:
                    pass

    def _pdu(self, connection: socket.socket) -> bytes:
        header = self._take(connection, 6)
        return self._take(connection, int.from_bytes(header[2:], "big"))

    @staticmethod
    def _take(connection: socket.socket, count: int) -> bytes:
        taken = b""
        while len(taken) < count:
            piece = connection.recv(count - len(taken))
            if not piece:
                raise ConnectionAbortedError
            taken += piece
        return taken


@contextlib.contextmanager
def unharmed(seconds: float = 10) -> Iterator[None]:
    """In time, in limits of memory, and with no thread left behind."""

    def memory(name: str) -> int:
        text = Path("/proc/self/status").read_text()
        return int(re.search(rf"^{name}:\s+(\d+)", text, re.M)[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before, threads, began = memory("VmRSS"), threading.active_count(), time.monotonic()
    yield
    assert time.monotonic() - began < seconds
    until(lambda: threading.active_count() <= threads, "threads are back", 5)
    assert memory("VmHWM") - before < GROWTH_BYTES


def asks_find(pacs: HostilePacs, **timeouts: float) -> str:
    with Requestor(pacs.node(**timeouts)) as requestor, pytest.raises(PacsError) as caught:
        find_studies(requestor, {"PatientID": "1"})
    return caught.value.code


def asks_get(pacs: HostilePacs, **timeouts: float) -> str:
    identifier = Dataset()
    identifier.QueryRetrieveLevel, identifier.StudyInstanceUID = "STUDY", "1.2.3"
    store_handler = MemoryStoreHandler()
    try:
        result = c_get(
            pacs.node(**timeouts),
            identifier,
            contexts=[(CT, EXPLICIT)],
            store_handler=store_handler,
        )
    except PacsError as error:
        return error.code
    assert result.status is None
    assert len(store_handler.began) == len(store_handler.completed) + len(store_handler.abandoned)
    return result.lost


# --- answers to both services

FIND, GET, STORED = 0x8020, 0x8010, 3


def response(command: int, status: int, data_set: bool, message_id: int = 1) -> bytes:
    return write_command(
        {
            Element.COMMAND_FIELD: command,
            Element.MESSAGE_ID_BEING_RESPONDED_TO: message_id,
            Element.COMMAND_DATA_SET_TYPE: 1 if data_set else 0x0101,
            Element.STATUS: status,
        }
    )


def endlessly(piece: bytes, times: int = 300) -> Attack:
    def attack(connection: socket.socket) -> None:
        for _ in range(times):
            connection.sendall(piece)

    return attack


def after(first: bytes, attack: Attack) -> Attack:
    def both(connection: socket.socket) -> None:
        connection.sendall(first)
        attack(connection)

    return both


def dripping(said: bytes) -> Attack:
    def attack(connection: socket.socket) -> None:
        for number in range(200):
            connection.sendall(said[number : number + 1] or b"\0")
            select.select([connection], [], [], 0.05)

    return attack


LARGE = struct.pack(">BxI", 4, 0xFFFFFFFF)


def answers(context: int, command: int) -> dict[str, Attack]:
    """What a PACS may answer on a context, whose responses are those to be had there."""
    whole = response(command, 0xFF00, False)
    return {
        "a PDU of four gigabytes": after(LARGE, endlessly(MEBIBYTE)),
        "a PDU of four gigabytes in a PDV of as many": after(
            LARGE + struct.pack(">IBB", 0xFFFFFFF0, context, 0), endlessly(MEBIBYTE)
        ),
        "a command set without end": endlessly(pdu(pdv(context, 1, bytes(16_000))) * 64),
        "an identifier without end": after(
            pdu(pdv(context, 3, response(command, 0xFF00, True))),
            endlessly(pdu(pdv(context, 0, bytes(16_000))) * 64),
        ),
        "a drip": dripping(struct.pack(">BxI", 4, 10_000)),
        "a PDU of an unknown type": after(struct.pack(">BxI", 9, 100), endlessly(MEBIBYTE, 3)),
        "another request": after(struct.pack(">BxI", 1, 0xFFFFFF), endlessly(MEBIBYTE, 30)),
        "HTTP": endlessly(b"HTTP/1.1 400 Bad Request\r\n\r\n", 1),
        "a PDV on no context": endlessly(pdu(pdv(99, 3, whole)), 1),
        "a PDV longer than its PDU": endlessly(
            struct.pack(">BxIIBB", 4, 20, 4000, context, 3) + bytes(14), 1
        ),
        "a PDV without a header": endlessly(struct.pack(">BxII", 4, 4, 0), 1),
        "a command set that is none": endlessly(pdu(pdv(context, 3, b"\xff" * 100)), 1),
        "an empty command set": endlessly(pdu(pdv(context, 3, b"")), 1),
        "a status without a value": endlessly(
            message_pdus(
                context,
                write_command({Element.COMMAND_FIELD: command, Element.STATUS: b""}),
                None,
                0,
            ),
            1,
        ),
        "half a response": after(pdu(pdv(context, 3, whole[:-5])), lambda connection: None),
        "a request to us": endlessly(
            message_pdus(context, write_command({Element.COMMAND_FIELD: 0x0100}), None, 0) * 9, 1
        ),
        "a response to another request": endlessly(
            message_pdus(context, response(0x8021, 0, False, 77), None, 0), 1
        ),
        "an end in the middle": after(b"\x04\0\0", lambda c: c.shutdown(socket.SHUT_RDWR)),
    }


ASKING = {"C-FIND": (asks_find, answers(3, FIND)), "C-GET": (asks_get, answers(1, GET))}
OFTEN = [
    ("C-FIND", "a PDU of four gigabytes"),
    ("C-GET", "a PDU of four gigabytes"),
    ("C-FIND", "a command set without end"),
    ("C-FIND", "an identifier without end"),
    ("C-GET", "an identifier without end"),
    ("C-FIND", "an empty command set"),
    ("C-FIND", "a request to us"),
    ("C-GET", "a drip"),
]


@pytest.mark.parametrize(
    "case",
    subset([(service, name) for service in ASKING for name in ASKING[service][1]], OFTEN),
    ids=", ".join,
)
def test_what_no_answer_is_ends_the_association(case):
    service, name = case
    asks, attacks = ASKING[service]
    with HostilePacs(attacks[name]) as pacs, unharmed():
        assert asks(pacs) in UNUSABLE | {"pacs-silent", "not-permitted"}


@pytest.mark.parametrize("asks", [asks_find, asks_get])
@pytest.mark.parametrize(
    "said",
    [
        b"\x02\0\xff\xff\xff\xff",
        b"\x03\0\xff\xff\xff\xff",
        b"\x07\0\xff\xff\xff\xff",
        b"\x02\0\0\0\xff\xf0" + bytes(68) + b"\x21\0\0\0" * 16363,
        b"\x04\0\xff\xff\xff\xff",
        b"SSH-2.0-OpenSSH\r\n",
    ],
    ids=["accepts", "rejects", "aborts", "stuffed", "data", "another protocol"],
)
def test_an_answer_to_the_association_has_an_end(asks, said):
    with HostilePacs(after(said, endlessly(MEBIBYTE, 100)), accepts=False) as pacs, unharmed():
        assert asks(pacs) in UNUSABLE | {"pacs-silent"}


def test_identifiers_nested_deeper_than_any_stack_are_no_answers():
    nested = b""
    for _ in range(3000):
        content = item(nested, -1) + SEQUENCE_END
        nested = element(0x00081140, b"SQ", content, 0xFFFFFFFF)
    answer = message_pdus(3, response(FIND, 0xFF00, True), nested, 16_000)
    final = message_pdus(3, response(FIND, 0, False), None, 0)
    with HostilePacs(endlessly(answer + final, 1)) as pacs, unharmed():
        assert asks_find(pacs) == "answer-unusable"


def test_an_instance_on_the_association_of_a_get_has_an_end():
    begun = store_message("1.2.9", b"")[:-12]
    with HostilePacs(after(begun, dripping(pdu(pdv(STORED, 0, bytes(5000)))))) as pacs, unharmed():
        assert asks_get(pacs) in UNUSABLE
