"""The items of A-ASSOCIATE-RQ and A-ASSOCIATE-AC, PS3.8 9.3.2 and 9.3.3, PS3.7 Annex D.

Only what an association needs is read. Version names, implementations, identities and items of
unknown types are skipped, whatever is in them: senders pad them with NUL, write them too long or
leave them out, and none of that is a reason to refuse their instances. What is read has bounds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from prefect_dicom.network.upper_layer.pdu import PDU_HEADER, Pdu, ProtocolError

MOST_CONTEXTS = 128
"""Presentation contexts of an association: the odd numbers of a byte, PS3.8 9.3.2.2."""
# 128 contexts of 45 transfer syntaxes are 6,000; each costs a microsecond.
_MOST_ITEMS = 10_000
# A UID has 64 characters, PS3.5 9.1.
_LONGEST_UID = 128
_ITEM_HEADER = struct.Struct(">BxH")
# PS3.8 9.3.2: protocol version, two reserved bytes, called and calling title, 32 reserved bytes.
_FIXED = struct.Struct(">HH16s16s32s")
_PROTOCOL_VERSION = 1
_WINDOW = struct.Struct(">HH")

_APPLICATION_CONTEXT, _PROPOSED, _RESULT, _USER_INFORMATION = 0x10, 0x20, 0x21, 0x50
_ABSTRACT_SYNTAX, _TRANSFER_SYNTAX = 0x30, 0x40
_MAXIMUM_LENGTH, _IMPLEMENTATION_CLASS, _OPERATIONS_WINDOW = 0x51, 0x52, 0x53
_ROLES, _IMPLEMENTATION_VERSION = 0x54, 0x55


class Roles(NamedTuple):
    """Roles for a SOP class, PS3.7 D.3.3.4: proposed or accepted for the requestor."""

    scu: bool
    scp: bool


class OperationsWindow(NamedTuple):
    """Outstanding operations of an association, PS3.7 D.3.3.3; 0 is any number.

    Both numbers are the requestor's, in its request and in the answer.
    """

    invoked: int
    """Operations that the requestor may have outstanding."""
    performed: int
    """Operations and sub-operations that the acceptor may have outstanding."""


@dataclass(slots=True)
class Context:
    """A presentation context as it is proposed or answered."""

    context_id: int
    result: int = 0
    """Of an answer: 0 for acceptance, else why not."""
    abstract_syntax_uid: str = ""
    transfer_syntax_uids: list[str] = field(default_factory=list)


@dataclass(slots=True)
class AssociationItems:
    """What an A-ASSOCIATE PDU says, as far as an association needs it."""

    protocol_version: int
    called: bytes
    """The called AE title as it was sent, 16 bytes."""
    calling: bytes
    application_context_uid: str = ""
    contexts: list[Context] = field(default_factory=list)
    has_user_information: bool = False
    maximum_length: int = 0
    """The longest PDU its sender takes, 0 for any; most that leave it out take any."""
    roles: dict[str, Roles] = field(default_factory=dict)
    """By SOP class."""
    operations_window: OperationsWindow | None = None
    """None: one operation at a time."""


def ae_title(raw: bytes) -> str:
    """An AE title without its padding, PS3.5 6.2: blanks, and the NUL that ends a C string.

    Examples
    --------
    >>> ae_title(b"PACS".ljust(16, bytes(1))), ae_title(b" PACS "), ae_title(bytes(16))
    ('PACS', 'PACS', '')
    """
    return raw.lstrip(b" \0").partition(b"\0")[0].rstrip(b" ").decode("latin-1")


def padded_ae_title(title: str) -> bytes:
    """An AE title in 16 bytes, as an association request has it, PS3.8 9.3.2.

    Raises
    ------
    ValueError
        It is longer, or has other characters than PS3.5 6.2 allows.
    """
    if len(title) > 16 or not (title.isascii() and title.isprintable()):
        raise ValueError("an AE title has at most 16 printable ASCII characters")
    return title.encode().ljust(16)


def printable(title: str) -> str:
    """An AE title of a peer as it can be logged: other characters become question marks."""
    return "".join(c if c.isprintable() else "?" for c in title)


# --- reading


def read_items(body: bytes) -> AssociationItems:
    """Read the body of an A-ASSOCIATE PDU.

    Raises
    ------
    ProtocolError
        Its fixed fields are not there, an item is longer than the PDU or than any use needs, or
        there are more of them.
    """
    if len(body) < _FIXED.size:
        raise ProtocolError(ProtocolError.INVALID_PARAMETER, "an A-ASSOCIATE PDU cut short")
    version, _, called, calling, _ = _FIXED.unpack_from(body)
    return _Reader(body, AssociationItems(version, called, calling)).read()


class _Reader:
    def __init__(self, body: bytes, read: AssociationItems) -> None:
        self._body = body
        self._items = read
        self._left = _MOST_ITEMS

    def read(self) -> AssociationItems:
        items = self._items
        for kind, at, end in self._within(_FIXED.size, len(self._body)):
            if kind in (_PROPOSED, _RESULT):
                items.contexts.append(self._context(at, end))
                if len(items.contexts) > MOST_CONTEXTS:
                    raise _stuffed()
            elif kind == _APPLICATION_CONTEXT:
                items.application_context_uid = self._uid(at, end)
            elif kind == _USER_INFORMATION:
                items.has_user_information = True
                self._user_information(at, end)
        return items

    def _within(
        self, at: int, end: int, *, lenient: bool = False
    ) -> Iterator[tuple[int, int, int]]:
        """Type, begin and end of each item. Too few bytes for a header are padding."""
        body = self._body
        while at + _ITEM_HEADER.size <= end:
            if lenient and not body[at]:
                # A NUL behind a text that does not count it; no item has this type.
                at += 1
                continue
            kind, length = _ITEM_HEADER.unpack_from(body, at)
            at += _ITEM_HEADER.size
            self._left -= 1
            if self._left < 0:
                raise _stuffed()
            if at + length > end:
                if lenient:
                    return
                raise ProtocolError(
                    ProtocolError.INVALID_PARAMETER, "an item is longer than its A-ASSOCIATE PDU"
                )
            yield kind, at, at + length
            at += length

    def _uid(self, at: int, end: int) -> str:
        if end - at > _LONGEST_UID:
            raise _stuffed()
        return self._body[at:end].strip(b" \0").decode("latin-1")

    def _context(self, at: int, end: int) -> Context:
        if end - at < 4:
            raise ProtocolError(
                ProtocolError.INVALID_PARAMETER, "a presentation context without a number"
            )
        context = Context(self._body[at], self._body[at + 2])
        for kind, start, stop in self._within(at + 4, end):
            if kind == _ABSTRACT_SYNTAX:
                context.abstract_syntax_uid = self._uid(start, stop)
            elif kind == _TRANSFER_SYNTAX:
                context.transfer_syntax_uids.append(self._uid(start, stop))
        return context

    def _user_information(self, at: int, end: int) -> None:
        items = self._items
        for kind, start, stop in self._within(at, end, lenient=True):
            value = self._body[start : min(stop, start + _LONGEST_UID + 4)]
            if kind == _MAXIMUM_LENGTH:
                items.maximum_length = int.from_bytes(value[:4], "big")
            elif kind == _OPERATIONS_WINDOW and len(value) >= 4:
                items.operations_window = OperationsWindow(*_WINDOW.unpack_from(value))
            elif kind == _ROLES:
                size = int.from_bytes(value[:2], "big")
                if len(value) >= size + 4:
                    uid = value[2 : 2 + size].strip(b" \0").decode("latin-1")
                    items.roles[uid] = Roles(value[2 + size] == 1, value[3 + size] == 1)


def _stuffed() -> ProtocolError:
    return ProtocolError(ProtocolError.INVALID_PARAMETER, "a stuffed A-ASSOCIATE PDU")


# --- writing


def request_pdu(asked: AssociationItems, implementation_class_uid: str, version_name: str) -> bytes:
    """An A-ASSOCIATE-RQ: contexts with their syntaxes, what we take and want, and who we are."""
    contexts = b"".join(
        _item(
            _PROPOSED,
            bytes((context.context_id, 0, 0, 0))
            + _uid_item(_ABSTRACT_SYNTAX, context.abstract_syntax_uid)
            + b"".join(_uid_item(_TRANSFER_SYNTAX, uid) for uid in context.transfer_syntax_uids),
        )
        for context in asked.contexts
    )
    who = implementation_class_uid, version_name
    return _association_pdu(Pdu.ASSOCIATE_RQ, asked, contexts, *who)


def acceptance_pdu(
    answered: AssociationItems, implementation_class_uid: str, version_name: str
) -> bytes:
    """An A-ASSOCIATE-AC: contexts with their results, what we take and grant, and who we are."""
    contexts = b"".join(
        _item(
            _RESULT,
            bytes((context.context_id, 0, context.result, 0))
            + _uid_item(_TRANSFER_SYNTAX, context.transfer_syntax_uids[0]),
        )
        for context in answered.contexts
    )
    who = implementation_class_uid, version_name
    return _association_pdu(Pdu.ASSOCIATE_AC, answered, contexts, *who)


def _association_pdu(
    kind: Pdu,
    items: AssociationItems,
    contexts: bytes,
    implementation_class_uid: str,
    version_name: str,
) -> bytes:
    user = _item(_MAXIMUM_LENGTH, items.maximum_length.to_bytes(4, "big"))
    user += _uid_item(_IMPLEMENTATION_CLASS, implementation_class_uid)
    if items.operations_window is not None:
        user += _item(_OPERATIONS_WINDOW, _WINDOW.pack(*items.operations_window))
    user += _role_items(items.roles.items())
    user += _item(_IMPLEMENTATION_VERSION, version_name.encode())
    # In an answer the titles are those of the request, as they came, PS3.8 9.3.3.
    body = _FIXED.pack(_PROTOCOL_VERSION, 0, items.called, items.calling, bytes(32))
    body += _uid_item(_APPLICATION_CONTEXT, items.application_context_uid)
    body += contexts + _item(_USER_INFORMATION, user)
    return PDU_HEADER.pack(kind, len(body)) + body


def _role_items(roles: Iterable[tuple[str, Roles]]) -> bytes:
    return b"".join(
        _item(
            _ROLES,
            len(uid).to_bytes(2, "big") + uid.encode("latin-1") + bytes((role.scu, role.scp)),
        )
        for uid, role in roles
    )


def _uid_item(kind: int, uid: str) -> bytes:
    return _item(kind, uid.encode("latin-1"))


def _item(kind: int, value: bytes) -> bytes:
    return _ITEM_HEADER.pack(kind, len(value)) + value
