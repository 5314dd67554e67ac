"""Association PDUs of a scripted PACS, byte by byte: PS3.8 9.3.2 and 9.3.3, PS3.7 Annex D."""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

_REQUEST, _ACCEPTANCE = 1, 2
_FIXED_BYTES = 68
_APPLICATION_CONTEXT, _PROPOSED, _RESULT, _USER_INFORMATION = 0x10, 0x20, 0x21, 0x50
_ABSTRACT_SYNTAX, _TRANSFER_SYNTAX = 0x30, 0x40
_MAXIMUM_LENGTH, _IMPLEMENTATION_CLASS, _VERSION_NAME = 0x51, 0x52, 0x55
_OPERATIONS_WINDOW = 0x53
_LONGEST_PDU = 16382


@dataclass(frozen=True)
class OddItems:
    """What an association PDU has that others have not; None and nothing: as it should be.

    Attributes
    ----------
    called, calling : bytes or None
        AE titles, filled up with blanks to 16 bytes.
    leave_out : collection of int
        Types of the user items that are missing.
    add : bytes
        Behind the other user items.
    """

    called: bytes | None = None
    calling: bytes | None = None
    leave_out: Collection[int] = ()
    add: bytes = b""


def item(kind: int, value: bytes) -> bytes:
    """Return an item or sub-item."""
    return struct.pack(">BxH", kind, len(value)) + value


def items(data: bytes, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of each item."""
    while start + 4 <= len(data):
        kind, length = struct.unpack_from(">BxH", data, start)
        yield kind, data[start + 4 : start + 4 + length]
        start += 4 + length


def operations_window(invoked: int, performed: int) -> bytes:
    """Return the user item of an asynchronous operations window, PS3.7 D.3.3.3."""
    return item(_OPERATIONS_WINDOW, struct.pack(">HH", invoked, performed))


def granted_window(pdu: bytes) -> int:
    """Return how many operations an A-ASSOCIATE-AC lets us have outstanding (0: any number)."""
    user = dict(items(pdu[6:], _FIXED_BYTES)).get(_USER_INFORMATION, b"")
    return int.from_bytes(dict(items(user)).get(_OPERATIONS_WINDOW, b"\0\1")[:2], "big")


def with_odd_items(pdu: bytes, odd: OddItems) -> bytes:
    """Return an association request or acceptance with other titles and user items."""
    body = pdu[6:]
    titles = [
        held if given is None else given[:16].ljust(16)
        for held, given in ((body[4:20], odd.called), (body[20:36], odd.calling))
    ]
    written = body[:4] + b"".join(titles) + body[36:_FIXED_BYTES]
    for kind, value in items(body, _FIXED_BYTES):
        if kind == _USER_INFORMATION:
            kept = (item(*each) for each in items(value) if each[0] not in odd.leave_out)
            value = b"".join(kept) + odd.add
        written += item(kind, value)
    return pdu[:2] + struct.pack(">I", len(written)) + written


def association_request(
    calling_ae_title: str,
    called_ae_title: str,
    contexts: Iterable[tuple[str, Iterable[str]]],
    odd: OddItems,
) -> bytes:
    """Return an A-ASSOCIATE-RQ; contexts are a SOP class and transfer syntaxes each."""
    body = b"\0\1\0\0"
    body += b"".join(
        t.encode("latin-1")[:16].ljust(16) for t in (called_ae_title, calling_ae_title)
    )
    body += bytes(32) + item(_APPLICATION_CONTEXT, b"1.2.840.10008.3.1.1.1")
    for number, (sop_class, syntaxes) in enumerate(contexts):
        value = bytes((2 * number + 1, 0, 0, 0)) + item(_ABSTRACT_SYNTAX, sop_class.encode())
        value += b"".join(item(_TRANSFER_SYNTAX, syntax.encode()) for syntax in syntaxes)
        body += item(_PROPOSED, value)
    user = item(_MAXIMUM_LENGTH, struct.pack(">I", _LONGEST_PDU))
    user += item(_IMPLEMENTATION_CLASS, b"1.2.826.0.1.3680043.9.3811")
    user += item(_VERSION_NAME, b"SCRIPTED_PACS")
    body += item(_USER_INFORMATION, user)
    return with_odd_items(struct.pack(">BxI", _REQUEST, len(body)) + body, odd)


def accepted_contexts(pdu: bytes) -> tuple[dict[int, str], int]:
    """Return what an A-ASSOCIATE-AC accepts.

    Returns
    -------
    tuple of (dict of int to str, int)
        The transfer syntax of each accepted context, and the longest PDU (0: any).

    Raises
    ------
    ConnectionError
        If it is none.
    """
    if pdu[:1] != bytes((_ACCEPTANCE,)):
        raise ConnectionError("no association with the receiver")
    accepted, longest = {}, 0
    for kind, value in items(pdu[6:], _FIXED_BYTES):
        if kind == _RESULT and value[2] == 0:
            accepted[value[0]] = dict(items(value, 4))[_TRANSFER_SYNTAX].decode()
        elif kind == _USER_INFORMATION:
            longest = int.from_bytes(dict(items(value)).get(_MAXIMUM_LENGTH, b""), "big")
    return accepted, longest
