"""Association negotiation on a socket we own: PS3.8 9.3.2 to 9.3.4, PS3.7 Annex D.

What peers propose and accept is decided here, and what we propose.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom.service_class import (
    NonPatientObjectStorageServiceClass,
    ServiceClass,
    StorageServiceClass,
    VerificationServiceClass,
)
from pynetdicom.sop_class import uid_to_service_class

from prefect_dicom.dicom.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from prefect_dicom.network.upper_layer import association_items
from prefect_dicom.network.upper_layer.association_items import (
    MOST_CONTEXTS,
    AssociationItems,
    OperationsWindow,
    Roles,
    acceptance_pdu,
    ae_title,
    padded_ae_title,
    read_items,
)
from prefect_dicom.network.upper_layer.pdu import (
    ANNOUNCED_PDU_BYTES,
    PDU_HEADER,
    Pdu,
    ProtocolError,
)
from prefect_dicom.network.upper_layer.stream import Stream

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
# 128 contexts of 45 transfer syntaxes of an ordinary length are 170 KiB.
_REQUEST_BYTES = 512 * 1024
MOST_FIRST_BYTES = PDU_HEADER.size + 64 * 1024
"""How much of an A-ASSOCIATE-RQ is waited for before it is read: nearly all are shorter."""
_TLS_HANDSHAKE = 0x16
_SHORT_REQUEST_BYTES = 16 * 1024
_long_requests = threading.Lock()
ANSWER_BYTES = 64 * 1024
"""The longest A-ASSOCIATE-AC that is read."""

# Context IDs are odd and at most 255 (PS3.8 9.3.2.2); the first is the model's.
MODEL_CONTEXT_ID = 1
STORAGE_CONTEXTS = MOST_CONTEXTS - 1
"""Presentation contexts that remain for instances in the association of a C-GET."""

PUSH_MODEL = "1.2.840.10008.1.20.1"
"""The Storage Commitment Push Model, PS3.4 J.3."""

Pair = tuple[str, str]
"""A SOP class UID and a transfer syntax UID."""

MOST_OUTSTANDING = 64
"""Operations that a peer may have outstanding with us, however many it asks for.

Twice as many were hardly faster at a round trip of 20 ms, and as many responses fit into a
socket's buffer: a peer that sends all its requests before it reads a response is not kept waiting.
"""

ACCEPTED = 0
"""Result of a presentation context that was accepted, PS3.8 9.3.3.2."""
_REPORT_SYNTAXES = (str(ExplicitVRLittleEndian), str(ImplicitVRLittleEndian))
_USER_REJECTION = 1
_ABSTRACT_SYNTAX_NOT_SUPPORTED = 3
_TRANSFER_SYNTAXES_NOT_SUPPORTED = 4

# The class pynetdicom gives to what it does not know: private and future storage classes.
_SERVICES = (
    ServiceClass,
    StorageServiceClass,
    NonPatientObjectStorageServiceClass,
    VerificationServiceClass,
)


class Context(NamedTuple):
    """An accepted presentation context."""

    abstract_syntax_uid: str
    transfer_syntax_uid: str


@dataclass(frozen=True, slots=True)
class AssociationRequest:
    """What an A-ASSOCIATE-RQ asks for; AE titles are what the peer wrote, without padding."""

    protocol_version: int
    application_context_uid: str
    called_ae_title: str
    calling_ae_title: str
    length: int
    """Of the PDU, in bytes."""
    items: AssociationItems


class NotDicomError(ConnectionAbortedError):
    """What a connection begins with is no PDU; says what it seems to be."""

    def __init__(self, *, is_tls: bool) -> None:
        super().__init__("it speaks TLS" if is_tls else "it speaks no DICOM")
        self.is_tls = is_tls


def first_bytes(there: bytes) -> int:
    """How many bytes of a connection have to be there for :func:`read_request` to decide.

    Parameters
    ----------
    there : bytes
        What has arrived, from the first byte on.
    """
    if there[:1] != bytes((Pdu.ASSOCIATE_RQ,)):
        return 1
    if len(there) < PDU_HEADER.size:
        return PDU_HEADER.size
    length: int = PDU_HEADER.unpack_from(there)[1]
    if length > _REQUEST_BYTES:
        return PDU_HEADER.size
    return min(PDU_HEADER.size + length, MOST_FIRST_BYTES)


def read_request(stream: Stream, deadline: float) -> AssociationRequest:
    """The A-ASSOCIATE-RQ a connection begins with.

    Raises
    ------
    ProtocolError
        Another PDU, or one that cannot be read.
    NotDicomError
        Another protocol.
    OSError
        Too slow, or closed.
    """
    stream.fill(deadline)
    kind = stream.buffer[stream.start]
    if kind not in Pdu._value2member_map_:
        # HTTP, TLS on the plain port, a scanner: closed without an answer.
        raise NotDicomError(is_tls=kind == _TLS_HANDSHAKE)
    if kind != Pdu.ASSOCIATE_RQ:
        raise ProtocolError(ProtocolError.UNEXPECTED_PDU, "the first PDU is no A-ASSOCIATE-RQ")
    header = stream.take(PDU_HEADER.size, deadline)
    _, length = PDU_HEADER.unpack(header)
    if length > _REQUEST_BYTES:
        raise ProtocolError(ProtocolError.INVALID_PARAMETER, f"an A-ASSOCIATE-RQ of {length} bytes")
    body = stream.take(length, deadline)
    with _in_turn(length):
        items = read_items(body)
    return AssociationRequest(
        items.protocol_version,
        items.application_context_uid,
        ae_title(items.called),
        ae_title(items.calling),
        length,
        items,
    )


@contextlib.contextmanager
def _in_turn(length: int) -> Iterator[None]:
    """Decode long requests one by one: many at once would leave no time for anything else."""
    if length <= _SHORT_REQUEST_BYTES:
        yield
    else:
        with _long_requests:
            yield


# What a sender may list beside what it holds, from the likeliest to be re-encoded on.
_RECODED = {
    str(ImplicitVRLittleEndian): 2,
    str(ExplicitVRBigEndian): 1,
    str(DeflatedExplicitVRLittleEndian): 1,
}


def kept_transfer_syntax(proposed: Sequence[str]) -> str:
    """The transfer syntax to accept of those a sender proposes in one context.

    The first that is none of those to which instances are re-encoded: a sender lists first what
    it prefers to send, but everybody lists Implicit VR Little Endian as well, and some re-encode
    into it whatever they hold, losing the VRs of private elements; Explicit VR Big Endian (retired)
    and the deflated syntax stand for what somebody's software can do, and hardly ever for what it
    holds.
    """
    return min(proposed, key=lambda syntax: _RECODED.get(syntax, 0))


class Answer:
    """The A-ASSOCIATE-AC to a request: PS3.8 9.3.3, PS3.7 D.3.3.

    Attributes
    ----------
    contexts : dict of int to Context
        The accepted presentation contexts by their ID.
    peer_pdu_bytes : int
        The longest PDU the peer takes, 0 for any.
    pdu : bytes
        The PDU to send.

    Parameters
    ----------
    takes_reports : bool
        Whether to accept the Storage Commitment Push Model, with the peer as SCP (PS3.4 J.3.1).

    Raises
    ------
    ProtocolError
        The request is for us and has no user information.
    """

    def __init__(
        self, request: AssociationRequest, pdu_bytes: int, *, takes_reports: bool = False
    ) -> None:
        if not request.items.has_user_information:
            raise ProtocolError(
                ProtocolError.INVALID_PARAMETER, "an A-ASSOCIATE-RQ without user information"
            )
        self._takes_reports = takes_reports
        with _in_turn(request.length):
            self._build(request.items, pdu_bytes)

    def _build(self, asked: AssociationItems, pdu_bytes: int) -> None:
        results = [
            self._negotiate(proposed, asked.roles.get(proposed.abstract_syntax_uid))
            for proposed in asked.contexts
        ]
        self.contexts = {
            proposed.context_id: Context(
                proposed.abstract_syntax_uid, answered.transfer_syntax_uids[0]
            )
            for proposed, answered in zip(asked.contexts, results, strict=True)
            if answered.result == ACCEPTED
        }
        self.peer_pdu_bytes = asked.maximum_length
        accepted = {context.abstract_syntax_uid for context in self.contexts.values()}
        answer = AssociationItems(
            asked.protocol_version,
            asked.called,
            asked.calling,
            APPLICATION_CONTEXT,
            results,
            maximum_length=pdu_bytes,
            roles={
                uid: Roles(scu=uid != PUSH_MODEL, scp=uid == PUSH_MODEL)
                for uid, role in asked.roles.items()
                if uid in accepted and (role.scp if uid == PUSH_MODEL else role.scu)
            },
            operations_window=_granted_window(asked.operations_window),
        )
        self.pdu = acceptance_pdu(answer, IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME)

    def _negotiate(
        self, proposed: association_items.Context, role: Roles | None
    ) -> association_items.Context:
        if self._takes_reports and proposed.abstract_syntax_uid == PUSH_MODEL:
            return _negotiate_reports(proposed)
        return _negotiate(proposed, role)


def _negotiate_reports(proposed: association_items.Context) -> association_items.Context:
    """The result for a context on which reports of storage commitment come."""
    answered = association_items.Context(proposed.context_id)
    syntaxes = [uid for uid in proposed.transfer_syntax_uids if uid in _REPORT_SYNTAXES]
    answered.transfer_syntax_uids = syntaxes[:1] or [ImplicitVRLittleEndian]
    answered.result = ACCEPTED if syntaxes else _TRANSFER_SYNTAXES_NOT_SUPPORTED
    return answered


def _granted_window(asked: OperationsWindow | None) -> OperationsWindow | None:
    """The window to answer, PS3.7 D.3.3.3: none where none is proposed.

    The operations of one association are performed one after the other, in the order they came.
    Outstanding ones wait in the peer's and our socket buffers, and in ours of the stream: a larger
    window lets a peer send on without waiting for a round trip, and takes no memory of its own.
    """
    if asked is None:
        return None
    # We invoke nothing on associations of others.
    return OperationsWindow(min(asked.invoked or MOST_OUTSTANDING, MOST_OUTSTANDING), 1)


def _negotiate(
    proposed: association_items.Context, role: Roles | None
) -> association_items.Context:
    """The result for one proposed context: any class of instances and C-ECHO, any encoding."""
    answered = association_items.Context(proposed.context_id)
    syntaxes = [uid for uid in proposed.transfer_syntax_uids if _is_usable(uid)]
    answered.transfer_syntax_uids = [
        kept_transfer_syntax(syntaxes) if syntaxes else ImplicitVRLittleEndian
    ]
    abstract_syntax = proposed.abstract_syntax_uid
    if not syntaxes:
        answered.result = _TRANSFER_SYNTAXES_NOT_SUPPORTED
    elif not _is_usable(abstract_syntax) or uid_to_service_class(abstract_syntax) not in _SERVICES:
        # Queries, worklists and the like: better refused here than with a status later.
        answered.result = _ABSTRACT_SYNTAX_NOT_SUPPORTED
    elif role is not None and not role.scu:
        # It wants to be SCP only, and we do not send.
        answered.result = _USER_REJECTION
    return answered


def _is_usable(uid: str) -> bool:
    """Whether a UID, however odd, is a text that can be written into a file."""
    return bool(uid) and uid.isascii() and uid.isprintable()


def get_request_pdu(
    calling_ae_title: str, called_ae_title: str, model: str, contexts: Sequence[Pair]
) -> bytes:
    """The A-ASSOCIATE-RQ of a C-GET: the model, a context for each pair, the SCP role for each
    class (PS3.7 D.3.3.4)."""
    # Implicit VR is what everybody has to accept (PS3.5 10.1); identifiers lose nothing by it.
    proposed: list[tuple[str, list[str]]] = [(model, [ImplicitVRLittleEndian])]
    proposed += [(sop_class, [syntax]) for sop_class, syntax in contexts]
    roles = dict.fromkeys(sop_class for sop_class, _ in contexts)
    # One C-GET of ours; the instances it brings need not wait for each other.
    window = OperationsWindow(1, MOST_OUTSTANDING)
    return request_pdu(calling_ae_title, called_ae_title, proposed, roles, window)


def request_pdu(
    calling_ae_title: str,
    called_ae_title: str,
    proposed: Iterable[tuple[str, Sequence[str]]],
    roles: Iterable[str] = (),
    operations_window: OperationsWindow | None = None,
    pdu_bytes: int = ANNOUNCED_PDU_BYTES,
) -> bytes:
    """An A-ASSOCIATE-RQ, PS3.8 9.3.2.

    Parameters
    ----------
    proposed : iterable of (abstract syntax, transfer syntaxes)
        A context each, numbered 1, 3, 5, …
    roles : iterable of str
        SOP classes for which we want to be SCP alone, PS3.7 D.3.3.4.
    operations_window : OperationsWindow, optional
        The operations that may be outstanding; without it one at a time.
    pdu_bytes : int
        The longest PDU we say that we take.

    Raises
    ------
    ValueError
        An AE title cannot be written.
    """
    contexts = [
        association_items.Context(2 * number + MODEL_CONTEXT_ID, 0, abstract, list(syntaxes))
        for number, (abstract, syntaxes) in enumerate(proposed)
    ]
    asked = AssociationItems(
        1,
        padded_ae_title(called_ae_title),
        padded_ae_title(calling_ae_title),
        APPLICATION_CONTEXT,
        contexts,
        maximum_length=pdu_bytes,
        roles={sop_class: Roles(scu=False, scp=True) for sop_class in roles},
        operations_window=operations_window,
    )
    return association_items.request_pdu(
        asked, IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
    )


@dataclass(frozen=True, slots=True)
class Granted:
    """Contexts, roles and limits that an A-ASSOCIATE-AC grants.

    Parameters
    ----------
    results : dict of int to int
        By presentation context ID: 0 for acceptance, else why not, PS3.8 9.3.3.2.
    transfer_syntaxes : dict of int to str
        By presentation context ID: the one that was chosen; empty where there is none.
    scp_roles : frozenset of str
        SOP classes for which we may be SCP.
    operations_window : int
        Operations we may have outstanding, 0 for any number; 1 where it was not answered.
    peer_pdu_bytes : int
        The longest PDU the peer takes, 0 for any.
    """

    results: dict[int, int]
    transfer_syntaxes: dict[int, str]
    scp_roles: frozenset[str]
    operations_window: int
    peer_pdu_bytes: int


def read_answer(pdu: bytes) -> Granted:
    """What an A-ASSOCIATE-AC grants.

    Raises
    ------
    ProtocolError
        It cannot be read.
    """
    items = read_items(pdu[PDU_HEADER.size :])
    if not items.contexts and not items.application_context_uid:
        raise ProtocolError(ProtocolError.INVALID_PARAMETER, "an A-ASSOCIATE-AC of nothing")
    return Granted(
        {one.context_id: one.result for one in items.contexts},
        {
            context.context_id: "".join(context.transfer_syntax_uids[:1])
            for context in items.contexts
        },
        frozenset(uid for uid, role in items.roles.items() if role.scp),
        # Not answered means one at a time, PS3.7 D.3.3.3.
        1 if items.operations_window is None else items.operations_window.invoked,
        items.maximum_length,
    )


def accepted_contexts(
    granted: Granted, contexts: Sequence[Pair], *, without_roles: bool = False
) -> dict[int, Context]:
    """The storage contexts of a C-GET that were accepted with our SCP role, by their ID.

    Parameters
    ----------
    without_roles : bool
        Whether a peer that says nothing of any role is taken to grant them.
    """
    accepted = {}
    any_role = without_roles and not granted.scp_roles
    for number, (sop_class, syntax) in enumerate(contexts, start=1):
        context_id = 2 * number + MODEL_CONTEXT_ID
        if granted.results.get(context_id) == ACCEPTED and (
            any_role or sop_class in granted.scp_roles
        ):
            accepted[context_id] = Context(sop_class, syntax)
    return accepted
