"""C-STORE of stored instances to a storage SCP.

pynetdicom negotiates the association; then its socket is used directly (PS3.8 9.3.5,
PS3.7 9.3.1). pynetdicom's threads poll, which costs milliseconds for each message; what a test
or a benchmark measures here should be the receiver.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable
from typing import Any

from pynetdicom import AE, build_context, evt
from pynetdicom.association import Association

from prefect_dicom.testing.instances import StoredInstance

CONTEXTS_PER_ASSOCIATION = 128
_P_DATA, _RELEASE_RQ = 4, 5
_COMMAND, _LAST = 1, 2
_C_STORE_RQ = 0x0001
_UNLIMITED_PDU = 1 << 20
_SMALL = 1 << 18


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


def contexts_to_send_in(association: Association) -> dict[tuple[str, str], int]:
    """The accepted contexts in which this side may send, by :func:`context_key`."""
    return {
        (str(context.abstract_syntax), str(context.transfer_syntax[0])): context.context_id
        for context in association.accepted_contexts
        if context.as_scu and context.context_id is not None
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
    nagle : bool
        With Nagle's algorithm, command and data set in segments of their own.

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
        nagle: bool = False,
    ) -> None:
        entity = AE(calling_ae_title)
        entity.acse_timeout = entity.connection_timeout = 10
        association = entity.associate(
            *address,
            contexts=[build_context(*pair) for pair in contexts],
            ae_title=called_ae_title,
            evt_handlers=[(evt.EVT_CONN_OPEN, send_at_once)],
        )
        if not association.is_established:
            raise ConnectionError("no association with the receiver")
        self._contexts = contexts_to_send_in(association)
        self._socket = self._take_over(association)
        self._nagle = nagle
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, not nagle)
        self._fragment = (association.acceptor.maximum_length or _UNLIMITED_PDU) - 6

    @staticmethod
    def _take_over(association: Association) -> socket.socket:
        # Both of its threads end at their next turn, and leave the connection as it is.
        association._kill = True
        association.dul._kill_thread = True
        association.join()
        association.dul.join()
        transport = association.dul.socket
        assert transport is not None and transport.socket is not None, "it is established"
        transport.socket.settimeout(60)
        return transport.socket

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
        return self.response()

    def request(
        self,
        context_id: int,
        *,
        message_id: int,
        sop_class_uid: str,
        sop_instance_uid: str,
        data: bytes,
        originator: tuple[str, int] | None = None,
    ) -> None:
        """Send the request of :meth:`store`, and wait for nothing."""
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
            self._send(context_id, command, data)
        except (OSError, struct.error) as error:
            raise ConnectionError("the association with the receiver was lost") from error

    def response(self) -> int:
        """Read the status of the next response, in the order of the requests."""
        try:
            return self._receive_status()
        except (OSError, struct.error) as error:
            raise ConnectionError("the association with the receiver was lost") from error

    def _send(self, context_id: int, command: bytes, data: bytes) -> None:
        pdus = [_pdu(context_id, _COMMAND | _LAST, command)]
        for start in range(0, max(len(data), 1), self._fragment):
            fragment = data[start : start + self._fragment]
            last = _LAST if start + self._fragment >= len(data) else 0
            pdus.append(_pdu(context_id, last, fragment))
        if len(data) <= _SMALL and not self._nagle:
            self._socket.sendall(b"".join(pdus))
            return
        for pdu in pdus:
            self._socket.sendall(pdu)

    def _receive_status(self) -> int:
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
                    return _status(command)

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


def _pdu(context_id: int, control: int, fragment: bytes) -> bytes:
    length = len(fragment)
    return struct.pack(">BxLLBB", _P_DATA, length + 6, length + 2, context_id, control) + fragment


def _padded(value: bytes, padding: bytes) -> bytes:
    return value + padding * (len(value) % 2)


def _uid(text: str) -> bytes:
    return _padded(text.encode("ascii", "replace"), b"\0")


def _status(command: bytes) -> int:
    position = 0
    while position < len(command):
        group, element, length = struct.unpack_from("<HHL", command, position)
        if (group, element) == (0, 0x0900):
            status: int = struct.unpack_from("<H", command, position + 8)[0]
            return status
        position += 8 + length
    raise ConnectionError("the receiver's response has no status")
