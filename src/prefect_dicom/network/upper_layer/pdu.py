"""PDUs and PDVs of the DICOM upper layer: their types, headers and bytes, PS3.8 9.3 and Annex E."""

from __future__ import annotations

import struct
from enum import IntEnum

ANNOUNCED_PDU_BYTES = 256 * 1024
"""The maximum PDU length we announce. Larger ones were no faster, smaller ones slower."""

PDU_HEADER = struct.Struct(">BxI")
PDV_HEADER = struct.Struct(">IBB")

COMMAND_FRAGMENT = 0x01
"""Bit of a message control header, PS3.8 E.2: a fragment of a command set, not of a data set."""
LAST_FRAGMENT = 0x02
"""Bit of a message control header: the last fragment of its command set or data set."""

_SHORTEST_PDU_TO_SEND = 8


class Pdu(IntEnum):
    """PDU types, PS3.8 9.3.1."""

    ASSOCIATE_RQ = 0x01
    ASSOCIATE_AC = 0x02
    ASSOCIATE_RJ = 0x03
    P_DATA_TF = 0x04
    RELEASE_RQ = 0x05
    RELEASE_RP = 0x06
    ABORT = 0x07


PDU_TYPES = frozenset(map(int, Pdu))
P_DATA_TF = int(Pdu.P_DATA_TF)
"""For loops: Python 3.11 takes 0.14 us to look up the member of an enumeration."""


class ProtocolError(Exception):
    """The peer broke the upper layer protocol or a limit: answer with A-ABORT.

    ``source`` and ``reason`` are those of PS3.8 9.3.8.
    """

    UNSPECIFIED = 0
    UNRECOGNISED_PDU = 1
    UNEXPECTED_PDU = 2
    INVALID_PARAMETER = 6

    def __init__(self, reason: int, detail: str, source: int = 2) -> None:
        super().__init__(detail)
        self.source = source
        self.reason = reason
        self.detail = detail


def message_pdus(
    context_id: int, command: bytes, data_set: bytes | None, longest_pdu_bytes: int
) -> bytes:
    """A message as P-DATA-TF PDUs of one PDV each, no longer than the peer takes (0: any).

    Fragments have an even length, PS3.8 Annex E.2.
    """
    if longest_pdu_bytes:
        size = (max(longest_pdu_bytes, _SHORTEST_PDU_TO_SEND) - 6) // 2 * 2
    else:
        size = ANNOUNCED_PDU_BYTES
    pdus = bytearray()
    for data, kind in ((command, COMMAND_FRAGMENT), (data_set, 0)):
        if data is None:
            continue
        for start in range(0, max(len(data), 1), size):
            fragment = data[start : start + size]
            control = kind | (LAST_FRAGMENT if start + size >= len(data) else 0)
            pdus += PDU_HEADER.pack(P_DATA_TF, len(fragment) + 6)
            pdus += PDV_HEADER.pack(len(fragment) + 2, context_id, control) + fragment
    return bytes(pdus)


def abort_pdu(source: int, reason: int) -> bytes:
    """An A-ABORT, PS3.8 9.3.8."""
    return PDU_HEADER.pack(Pdu.ABORT, 4) + bytes((0, 0, source, reason))


def reject_pdu(result: int, source: int, reason: int) -> bytes:
    """An A-ASSOCIATE-RJ, PS3.8 9.3.4."""
    return bytes((Pdu.ASSOCIATE_RJ, 0, 0, 0, 0, 4, 0, result, source, reason))


RELEASE_RQ = PDU_HEADER.pack(Pdu.RELEASE_RQ, 4) + bytes(4)
RELEASE_RP = PDU_HEADER.pack(Pdu.RELEASE_RP, 4) + bytes(4)
