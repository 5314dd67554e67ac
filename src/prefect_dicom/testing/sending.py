"""C-STORE of stored instances to a storage SCP.

The socket is used directly (PS3.8 9.3.2 to 9.3.5, PS3.7 9.3.1). pynetdicom's threads poll, which
costs milliseconds for each message; what a test or a benchmark measures here should be the
receiver. Nor does it send what no sender should.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pynetdicom import evt
from pynetdicom.association import Association

from prefect_dicom.config.tls import Tls
from prefect_dicom.testing.association_pdus import (
    OddItems,
    accepted_contexts,
    association_request,
    granted_window,
    operations_window,
)
from prefect_dicom.testing.instances import StoredInstance
from prefect_dicom.testing.tls import secured_client

CONTEXTS_PER_ASSOCIATION = 128
_P_DATA, _RELEASE_RQ = 4, 5
_COMMAND, _LAST = 1, 2
_C_STORE_RQ = 0x0001
_RESPONDED_TO, _STATUS = 0x0120, 0x0900
_ABORT = struct.pack(">BxL2x2B", 7, 4, 0, 0)
_UNLIMITED_PDU = 1 << 20
_SMALL = 1 << 18
_ASSOCIATE_SECONDS = 10
_STORE_SECONDS = 60


@dataclass
class SenderManner:
    """How a sender requests its associations and sends over them; as it should by default.

    Attributes
    ----------
    source : str
        The address it connects from; empty: any.
    items : OddItems
        Titles and user items of its request.
    classes, syntaxes : int
        How many contexts it proposes at least, of storage classes that it does not hold, and how
        many transfer syntaxes in each beside the one it needs.
    pdu_bytes : int
        The length of its PDUs, whatever the receiver takes; 0: what the receiver takes.
    nagle : bool
        With Nagle's algorithm, command and data set in segments of their own.
    window : int or None
        Operations that it asks to have outstanding, 0 for any number; None: it does not ask.
    """

    source: str = ""
    items: OddItems = OddItems()
    classes: int = 0
    syntaxes: int = 0
    pdu_bytes: int = 0
    nagle: bool = False
    window: int | None = None

    @property
    def request_items(self) -> OddItems:
        """Titles and user items of its request, the window among them."""
        if self.window is None:
            return self.items
        return replace(self.items, add=self.items.add + operations_window(self.window, 1))


def send_at_once(event: evt.Event) -> None:
    """Handler of EVT_CONN_OPEN: without Nagle's algorithm.

    Together with delayed acknowledgements it costs 40 ms for each message.
    """
    transport = event.assoc.dul.socket
    assert transport is not None and transport.socket is not None, "it has just been opened"
    transport.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def without_message_log(association: Association) -> None:
    """Take pynetdicom's log handlers off an association.

    They write out every PDU and message, whether anybody listens or not: half of the time.
    """
    for event in (evt.EVT_DIMSE_SENT, evt.EVT_DIMSE_RECV, evt.EVT_PDU_SENT, evt.EVT_PDU_RECV):
        handlers: Any = association.get_handlers(event)
        for handler, _ in handlers:
            association.unbind(event, handler)


def context_key(stored: StoredInstance) -> tuple[str, str]:
    """Return SOP class and transfer syntax, for which an instance needs a context."""
    return stored.sop_class_uid, stored.transfer_syntax_uid


def contexts_to_send_in(
    association: Association, *, without_roles: bool = False
) -> dict[tuple[str, str], int]:
    """The accepted contexts in which this side may send, by :func:`context_key`.

    ``without_roles``: all of them, whether the roles allow it or not.
    """
    return {
        (str(context.abstract_syntax), str(context.transfer_syntax[0])): context.context_id
        for context in association.accepted_contexts
        if (context.as_scu or without_roles) and context.context_id is not None
    }


class StoreAssociation:
    """An association for C-STORE requests.

    Parameters
    ----------
    calling_ae_title, called_ae_title : str
        Ours and the receiver's.
    address : (str, int)
        Host and port.
    contexts : iterable of (str, str)
        SOP class and transfer syntax of each context to propose; 128 at most.
    manner : SenderManner, optional
        How it asks and sends.
    tls : Tls, optional
        Sends over TLS, and verifies the receiver.

    Raises
    ------
    ConnectionError
        If the receiver cannot be reached, rejects the association or accepts no context.
    """

    def __init__(
        self,
        calling_ae_title: str,
        called_ae_title: str,
        address: tuple[str, int],
        contexts: Iterable[tuple[str, str]],
        *,
        manner: SenderManner | None = None,
        tls: Tls | None = None,
    ) -> None:
        self._manner = manner or SenderManner()
        wanted = [(sop_class, [syntax]) for sop_class, syntax in contexts]
        request = association_request(
            calling_ae_title,
            called_ae_title,
            _proposed(wanted, self._manner),
            self._manner.request_items,
        )
        source = (self._manner.source, 0) if self._manner.source else None
        self._socket = socket.create_connection(address, _ASSOCIATE_SECONDS, source)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, not self._manner.nagle)
        try:
            if tls is not None:
                self._socket = secured_client(self._socket, tls, address[0])
            self._socket.sendall(request)
            header = self._read(6)
            answer = header + self._read(_length_of(header))
            accepted, longest = accepted_contexts(answer)
        except OSError as error:
            self.close()
            raise ConnectionError("no association with the receiver") from error
        self._contexts = {
            (sop_class, syntax): 2 * number + 1
            for number, (sop_class, (syntax, *_)) in enumerate(wanted)
            if accepted.get(2 * number + 1) == syntax
        }
        self.window = granted_window(answer)
        """Requests that may be outstanding, 0 for any number."""
        self._socket.settimeout(_STORE_SECONDS)
        self._fragment = (self._manner.pdu_bytes or longest or _UNLIMITED_PDU) - 6

    def context_id(self, stored: StoredInstance) -> int | None:
        """Return the id of the accepted context for an instance, or None."""
        return self._contexts.get(context_key(stored))

    def store(
        self,
        context_id: int,
        *,
        message_id: int,
        sop_class_uid: str,
        sop_instance_uid: str,
        data: bytes,
        originator: tuple[str, int] | None = None,
    ) -> int:
        """Send one C-STORE request (PS3.7 9.1.1.1) and return the status of its response.

        Raises
        ------
        ConnectionError
            If the association ended before the response came.
        """
        self.request(
            context_id,
            message_id=message_id,
            sop_class_uid=sop_class_uid,
            sop_instance_uid=sop_instance_uid,
            data=data,
            originator=originator,
        )
        return self.response()[1]

    def request(
        self,
        context_id: int,
        *,
        message_id: int,
        sop_class_uid: str,
        sop_instance_uid: str,
        data: bytes,
        originator: tuple[str, int] | None = None,
        broken_off: bool = False,
    ) -> None:
        """Send the request of :meth:`store`, and wait for nothing.

        ``broken_off``: abort the association within the data set.
        """
        elements = [
            (0x0002, _uid(sop_class_uid)),
            (0x0100, struct.pack("<H", _C_STORE_RQ)),
            (0x0110, struct.pack("<H", message_id)),
            (0x0700, struct.pack("<H", 0)),
            (0x0800, struct.pack("<H", 1)),
            (0x1000, _uid(sop_instance_uid)),
        ]
        if originator is not None:
            title, number = originator
            elements.append((0x1030, _padded(title.encode("ascii"), b" ")))
            elements.append((0x1031, struct.pack("<H", number)))
        command = b"".join(
            struct.pack("<HHL", 0, element, len(value)) + value for element, value in elements
        )
        command = struct.pack("<HHLL", 0, 0, 4, len(command)) + command
        try:
            self._send(context_id, command, data, broken_off)
        except (OSError, struct.error) as error:
            raise ConnectionError("the association with the receiver was lost") from error

    def response(self) -> tuple[int, int]:
        """Read the next response: the message ID of its request, and its status."""
        try:
            return self._receive_response()
        except (OSError, struct.error) as error:
            raise ConnectionError("the association with the receiver was lost") from error

    def _send(self, context_id: int, command: bytes, data: bytes, broken_off: bool) -> None:
        pdus = [_pdu(context_id, _COMMAND | _LAST, command)]
        if broken_off:
            part = data[: min(len(data) // 2, self._fragment)]
            self._socket.sendall(b"".join((*pdus, _pdu(context_id, 0, part), _ABORT)))
            raise ConnectionError("the association was aborted")
        for start in range(0, max(len(data), 1), self._fragment):
            fragment = data[start : start + self._fragment]
            last = _LAST if start + self._fragment >= len(data) else 0
            pdus.append(_pdu(context_id, last, fragment))
        if len(data) <= _SMALL and not self._manner.nagle:
            self._socket.sendall(b"".join(pdus))
            return
        for pdu in pdus:
            self._socket.sendall(pdu)

    def _receive_response(self) -> tuple[int, int]:
        command = b""
        while True:
            kind, length = struct.unpack(">BxL", self._read(6))
            body = self._read(length)
            if kind != _P_DATA:
                raise ConnectionError("the receiver ended the association")
            position = 0
            while position < length:
                size, _, control = struct.unpack_from(">LBB", body, position)
                if control & _COMMAND:
                    command += body[position + 6 : position + 4 + size]
                position += 4 + size
                if control == _COMMAND | _LAST:
                    return _response(command)

    def _read(self, length: int) -> bytes:
        data = bytearray()
        while len(data) < length:
            received = self._socket.recv(length - len(data))
            if not received:
                raise ConnectionError("the receiver closed the connection")
            data += received
        return bytes(data)

    def release(self) -> None:
        """A-RELEASE (PS3.8 9.3.6), and close."""
        with contextlib.suppress(OSError):
            self._socket.sendall(struct.pack(">BxL4x", _RELEASE_RQ, 4))
            self._read(10)
        self.close()

    def close(self) -> None:
        """Close the connection as it is."""
        self._socket.close()


def _length_of(header: bytes) -> int:
    return int.from_bytes(header[2:], "big")


def _proposed(
    wanted: Sequence[tuple[str, list[str]]], manner: SenderManner
) -> list[tuple[str, list[str]]]:
    """The contexts to propose: those wanted, and as many others as the manner has."""
    others = [f"1.2.840.10008.1.2.4.{number}" for number in range(50, 50 + manner.syntaxes)]
    held = [(sop_class, [*syntaxes, *others]) for sop_class, syntaxes in wanted]
    further = (f"1.2.840.10008.5.1.4.1.1.{number}" for number in range(500, 500 + manner.classes))
    return (
        held + [(sop_class, others) for sop_class in further][: max(0, manner.classes - len(held))]
    )


def _pdu(context_id: int, control: int, fragment: bytes) -> bytes:
    length = len(fragment)
    return struct.pack(">BxLLBB", _P_DATA, length + 6, length + 2, context_id, control) + fragment


def _padded(value: bytes, padding: bytes) -> bytes:
    return value + padding * (len(value) % 2)


def _uid(text: str) -> bytes:
    return _padded(text.encode("ascii", "replace"), b"\0")


def _response(command: bytes) -> tuple[int, int]:
    numbers: dict[int, int] = {}
    position = 0
    while position < len(command):
        group, element, length = struct.unpack_from("<HHL", command, position)
        if group == 0 and element in (_RESPONDED_TO, _STATUS):
            (numbers[element],) = struct.unpack_from("<H", command, position + 8)
        position += 8 + length
    if len(numbers) < 2:
        raise ConnectionError("the receiver's response has no status or message ID")
    return numbers[_RESPONDED_TO], numbers[_STATUS]
