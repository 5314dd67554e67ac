"""DIMSE messages: command sets and their elements, and messages read whole from a stream.

Sources: PS3.7 6.3, 9.3 and Annex E.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

from prefect_dicom.network.upper_layer.pdu import P_DATA_TF, RELEASE_RP, ProtocolError
from prefect_dicom.network.upper_layer.stream import Stream

NO_DATA_SET = 0x0101
"""Command Data Set Type of a message without a data set, PS3.7 E.1-1; any other has one."""
HAS_DATA_SET = 0x0001
"""Command Data Set Type that this package writes where a data set follows."""
RESPONSE = 0x8000
"""The bit of a Command Field that makes it a response."""

LONGEST_PDU_BYTES = 1024 * 1024
"""Of a response that is read whole, as its message. Far above what one has: it names a study, or
the UIDs of a request that have failed."""
_LONGEST_MESSAGE_BYTES = 1024 * 1024

_ELEMENT_HEADER = struct.Struct("<HHI")
_UNSIGNED_SHORT = struct.Struct("<H")
_RESPONSE_NUMBERS = struct.Struct("<" + 4 * "HHIH")
_GROUP_LENGTH = struct.Struct("<HHII")


# Plain integers and no enumerations: Python 3.11 takes 0.14 us to look up the member of one, and
# each C-STORE looks up nineteen.


class CommandField:
    """Commands that this package sends or answers, PS3.7 E.1-1."""

    C_STORE_RQ = 0x0001
    C_GET_RQ = 0x0010
    C_GET_RSP = 0x8010
    C_FIND_RQ = 0x0020
    C_MOVE_RQ = 0x0021
    C_ECHO_RQ = 0x0030
    C_CANCEL_RQ = 0x0FFF
    N_EVENT_REPORT_RQ = 0x0100
    N_ACTION_RQ = 0x0130


class Element:
    """Elements of group 0000 that this package reads or writes, PS3.7 E.1-1."""

    AFFECTED_SOP_CLASS_UID = 0x0002
    REQUESTED_SOP_CLASS_UID = 0x0003
    COMMAND_FIELD = 0x0100
    MESSAGE_ID = 0x0110
    MESSAGE_ID_BEING_RESPONDED_TO = 0x0120
    MOVE_DESTINATION = 0x0600
    PRIORITY = 0x0700
    COMMAND_DATA_SET_TYPE = 0x0800
    STATUS = 0x0900
    ERROR_COMMENT = 0x0902
    AFFECTED_SOP_INSTANCE_UID = 0x1000
    REQUESTED_SOP_INSTANCE_UID = 0x1001
    EVENT_TYPE_ID = 0x1002
    ACTION_TYPE_ID = 0x1008
    REMAINING_SUBOPERATIONS = 0x1020
    COMPLETED_SUBOPERATIONS = 0x1021
    FAILED_SUBOPERATIONS = 0x1022
    WARNING_SUBOPERATIONS = 0x1023
    MOVE_ORIGINATOR_AE_TITLE = 0x1030
    MOVE_ORIGINATOR_MESSAGE_ID = 0x1031


Elements = dict[int, bytes]


def read_command(data: bytes | bytearray) -> Elements:
    """The elements of a command set, PS3.7 6.3.1: implicit VR little endian, group 0000.

    Parameters
    ----------
    data : bytes
        A whole command set.

    Returns
    -------
    dict of int to bytes
        Values by element number.

    Raises
    ------
    ProtocolError
        It is not a command set.
    """
    elements: Elements = {}
    data = bytes(data)
    offset, size = 0, len(data)
    while offset < size:
        if size - offset < 8:
            raise ProtocolError(
                ProtocolError.INVALID_PARAMETER, "a command set ends within an element"
            )
        group, element, length = _ELEMENT_HEADER.unpack_from(data, offset)
        offset += 8
        if group or length > size - offset:
            raise ProtocolError(ProtocolError.INVALID_PARAMETER, "not a command set")
        elements[element] = data[offset : offset + length]
        offset += length
    return elements


def has_data_set(elements: Elements) -> bool:
    """Whether a data set follows a command set.

    Raises
    ------
    ProtocolError
        It is not the command set of a message.
    """
    if unsigned_short(elements, Element.COMMAND_FIELD) is None:
        raise ProtocolError(ProtocolError.INVALID_PARAMETER, "a command set without command")
    data_set_type = unsigned_short(elements, Element.COMMAND_DATA_SET_TYPE)
    return data_set_type is not None and data_set_type != NO_DATA_SET


def write_command(elements: Mapping[int, bytes | int]) -> bytes:
    """A command set with its group length; integers are written as US.

    Values of odd length are padded with NUL, which is right for UIDs (PS3.5 9.1).
    """
    body = bytearray()
    for element in sorted(elements):
        value = elements[element]
        if isinstance(value, int):
            value = _UNSIGNED_SHORT.pack(value)
        elif len(value) % 2:
            value += b"\0"
        body += _ELEMENT_HEADER.pack(0, element, len(value)) + value
    return _GROUP_LENGTH.pack(0, 0, 4, len(body)) + body


def response_command(request: Elements, status: int) -> bytes:
    """The command set of a response without a data set, to a request with these elements.

    Written in one go: there is one for each instance.
    """
    body = (
        _element(request, Element.AFFECTED_SOP_CLASS_UID)
        + _RESPONSE_NUMBERS.pack(
            *(0, Element.COMMAND_FIELD, 2),
            (unsigned_short(request, Element.COMMAND_FIELD) or 0) | RESPONSE,
            *(0, Element.MESSAGE_ID_BEING_RESPONDED_TO, 2),
            unsigned_short(request, Element.MESSAGE_ID) or 0,
            *(0, Element.COMMAND_DATA_SET_TYPE, 2, NO_DATA_SET, 0, Element.STATUS, 2, status),
        )
        + _element(request, Element.AFFECTED_SOP_INSTANCE_UID)
    )
    return _GROUP_LENGTH.pack(0, 0, 4, len(body)) + body


def _element(elements: Elements, element: int) -> bytes:
    """An element as it came; nothing where it did not."""
    value = elements.get(element)
    if value is None:
        return b""
    if len(value) % 2:
        value += b"\0"
    return _ELEMENT_HEADER.pack(0, element, len(value)) + value


def cancel_command(message_id: int) -> bytes:
    """A C-CANCEL-RQ for the request with this message ID, PS3.7 9.3.2.3."""
    return write_command(
        {
            Element.COMMAND_FIELD: CommandField.C_CANCEL_RQ,
            Element.MESSAGE_ID_BEING_RESPONDED_TO: message_id,
            Element.COMMAND_DATA_SET_TYPE: NO_DATA_SET,
        }
    )


def unsigned_short(elements: Elements, element: int) -> int | None:
    """A US value of a command set, or None where it is absent or too short."""
    value = elements.get(element)
    return None if value is None or len(value) < 2 else _UNSIGNED_SHORT.unpack_from(value)[0]


class Message(NamedTuple):
    """A whole message: its context, its command set, and its data set or nothing."""

    context_id: int
    elements: Elements
    data_set: bytes


class AssociationAborted(Exception):
    """The peer has sent an A-ABORT, PS3.8 9.3.8."""

    def __init__(self, source: int, reason: int) -> None:
        super().__init__(f"({source},{reason})")
        self.source = source
        self.reason = reason


class MessageReader:
    """Reads whole messages, of a bounded length, from the stream of an association.

    Parameters
    ----------
    stream : Stream
        Behind the negotiation. Its buffer has room for a PDU of :data:`LONGEST_PDU_BYTES`.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._waiting: deque[Message] = deque()
        self._context_id: int | None = None
        """Context of the message under way; None between messages."""
        self._elements: Elements | None = None
        """The command whose data set is under way; None before its end."""
        self._gathered = bytearray()
        """The fragments of the command set or data set under way."""
        self._message_bytes = 0

    def read(self, deadline: float) -> Message:
        """The next message.

        Parameters
        ----------
        deadline : float
            Of ``time.monotonic``. What has come until then is kept for the next call.

        Raises
        ------
        TimeoutError
            No message was whole in time.
        AssociationAborted
            The peer has aborted the association.
        ConnectionError
            The peer has released the association, which was answered, or closed the connection.
        ProtocolError
            The peer broke the protocol or a limit.
        """
        self.wait(deadline)
        return self._waiting.popleft()

    def wait(self, deadline: float) -> None:
        """Wait for the next message and leave it to be read. Raises as :meth:`read` does."""
        while not self._waiting:
            self._stream.await_pdu(LONGEST_PDU_BYTES, deadline)
            kind, length = self._stream.pdu_header(deadline)
            if kind != P_DATA_TF:
                self._close(kind, length, deadline)
            self._stream.p_data(length, deadline, self._take)

    def _close(self, kind: int, length: int, deadline: float) -> None:
        numbers = self._stream.read_close(kind, length, deadline)
        if numbers is not None:
            raise AssociationAborted(*numbers)
        self._stream.send(RELEASE_RP, deadline)
        raise ConnectionAbortedError("the peer has released the association")

    def _take(self, context_id: int, is_command: bool, is_last: bool, data: memoryview) -> None:
        if self._context_id is None:
            self._context_id = context_id
        elif context_id != self._context_id:
            raise ProtocolError(ProtocolError.INVALID_PARAMETER, "a message on two contexts")
        if is_command != (self._elements is None):
            raise ProtocolError(ProtocolError.UNEXPECTED_PDU, "command and data set out of order")
        self._message_bytes += len(data)
        if self._message_bytes > _LONGEST_MESSAGE_BYTES:
            raise ProtocolError(ProtocolError.INVALID_PARAMETER, "a message without end")
        self._gathered += data
        if not is_last:
            return
        gathered, self._gathered = bytes(self._gathered), bytearray()
        if self._elements is None:
            self._elements = read_command(gathered)
            if has_data_set(self._elements):
                return
            gathered = b""
        self._waiting.append(Message(self._context_id, self._elements, gathered))
        self._context_id = self._elements = None
        self._message_bytes = 0
