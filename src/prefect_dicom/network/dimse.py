"""DIMSE command sets: their elements, read and written, PS3.7 6.3, 9.3 and Annex E."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import IntEnum

from prefect_dicom.network.upper_layer.pdu import ProtocolError

NO_DATA_SET = 0x0101
"""Command Data Set Type of a message without a data set, PS3.7 E.1-1; any other has one."""
RESPONSE = 0x8000
"""The bit of a Command Field that makes it a response."""

_ELEMENT_HEADER = struct.Struct("<HHI")
_UNSIGNED_SHORT = struct.Struct("<H")
_GROUP_LENGTH = struct.Struct("<HHII")


class CommandField(IntEnum):
    """The commands the loop acts on, PS3.7 E.1-1."""

    C_STORE_RQ = 0x0001
    C_GET_RQ = 0x0010
    C_GET_RSP = 0x8010
    C_ECHO_RQ = 0x0030
    C_CANCEL_RQ = 0x0FFF


class Element(IntEnum):
    """Elements of group 0000 that are read or written here, PS3.7 E.1-1."""

    AFFECTED_SOP_CLASS_UID = 0x0002
    COMMAND_FIELD = 0x0100
    MESSAGE_ID = 0x0110
    MESSAGE_ID_BEING_RESPONDED_TO = 0x0120
    PRIORITY = 0x0700
    COMMAND_DATA_SET_TYPE = 0x0800
    STATUS = 0x0900
    ERROR_COMMENT = 0x0902
    AFFECTED_SOP_INSTANCE_UID = 0x1000
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


def unsigned_short(elements: Elements, element: int) -> int | None:
    """A US value of a command set, or None where it is absent or too short."""
    value = elements.get(element)
    return None if value is None or len(value) < 2 else _UNSIGNED_SHORT.unpack_from(value)[0]
