"""Association negotiation on a socket we own: PS3.8 9.3.2 to 9.3.4, PS3.7 Annex D.

pynetdicom's PDU classes encode and decode; what is proposed and accepted is decided here.
Decoding bytes of an unknown peer raises a dozen types: every such place catches all of them.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import (
    A_ASSOCIATE,
    AsynchronousOperationsWindowNegotiation,
    ImplementationClassUIDNotification,
    ImplementationVersionNameNotification,
    MaximumLengthNotification,
    SCP_SCU_RoleSelectionNegotiation,
)
from pynetdicom.presentation import PresentationContext, build_context
from pynetdicom.service_class import (
    NonPatientObjectStorageServiceClass,
    ServiceClass,
    StorageServiceClass,
    VerificationServiceClass,
)
from pynetdicom.sop_class import uid_to_service_class

from prefect_dicom.dicom.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from prefect_dicom.network.upper_layer.pdu import ANNOUNCED_PDU_BYTES, Pdu, ProtocolError
from prefect_dicom.network.upper_layer.stream import Stream

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"
_HEADER_BYTES = 6
_REQUEST_BYTES = 64 * 1024
MOST_FIRST_BYTES = _HEADER_BYTES + _REQUEST_BYTES
"""The longest A-ASSOCIATE-RQ that is read."""
# As many as the longest request has, of UIDs of an ordinary length.
_MOST_ITEMS = 3000
_SHORT_REQUEST_BYTES = 16 * 1024
_ITEM_HEADER = struct.Struct(">BxH")
# PS3.8 9.3.2: the variable items begin behind the fixed fields, and those of a presentation
# context behind its ID.
_VARIABLE_ITEMS_AT = 68
_ITEMS_WITHIN = {0x20: 4, 0x21: 4, 0x50: 0}
# PS3.8 9.3.2, PS3.7 D.3.3; a UID has 64 characters, a user's identity (0x58) as many as it likes.
_LONGEST_ITEMS = dict.fromkeys((0x10, 0x30, 0x40, 0x52), 128)
_LONGEST_ITEMS |= dict.fromkeys((0x51, 0x53, 0x54, 0x55, 0x56, 0x57), 1024)
_long_requests = threading.Lock()
ANSWER_BYTES = 64 * 1024
"""The longest A-ASSOCIATE-AC that is read."""

# Context IDs are odd and at most 255 (PS3.8 9.3.2.2); the first is the model's.
MODEL_CONTEXT_ID = 1
STORAGE_CONTEXTS = 127
"""Presentation contexts that remain for instances in the association of a C-GET."""

Pair = tuple[str, str]
"""A SOP class UID and a transfer syntax UID."""

ACCEPTED = 0
"""Result of a presentation context that was accepted, PS3.8 9.3.3.2."""
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


def first_bytes(there: bytes) -> int:
    """How many bytes of a connection have to be there for :func:`read_request` to decide.

    Parameters
    ----------
    there : bytes
        What has arrived, from the first byte on.
    """
    if there[:1] != bytes((Pdu.ASSOCIATE_RQ,)):
        return 1
    if len(there) < _HEADER_BYTES:
        return _HEADER_BYTES
    length = int.from_bytes(there[2:_HEADER_BYTES], "big")
    return _HEADER_BYTES + (0 if length > _REQUEST_BYTES else length)


def read_request(stream: Stream, deadline: float) -> A_ASSOCIATE_RQ:
    """The A-ASSOCIATE-RQ a connection begins with.

    Raises
    ------
    ProtocolError
        Another PDU, or one that cannot be read.
    OSError
        Not DICOM, too slow, or closed.
    """
    stream.fill(deadline)
    kind = stream.buffer[stream.start]
    if kind not in Pdu._value2member_map_:
        # HTTP, TLS on the plain port, a scanner: closed without an answer.
        raise ConnectionAbortedError
    if kind != Pdu.ASSOCIATE_RQ:
        raise ProtocolError(ProtocolError.UNEXPECTED_PDU, "the first PDU is no A-ASSOCIATE-RQ")
    header = stream.take(_HEADER_BYTES, deadline)
    length = int.from_bytes(header[2:], "big")
    if length > _REQUEST_BYTES:
        raise ProtocolError(ProtocolError.INVALID_PARAMETER, f"an A-ASSOCIATE-RQ of {length} bytes")
    body = stream.take(length, deadline)
    _refuse_stuffed(body)
    request = A_ASSOCIATE_RQ()
    try:
        with _in_turn(length):
            request.decode(header + body)
    except Exception:
        # The decoder raises a dozen types for bytes that are no request.
        raise ProtocolError(
            ProtocolError.INVALID_PARAMETER, "an unreadable A-ASSOCIATE-RQ"
        ) from None
    return request


def _refuse_stuffed(body: bytes) -> None:
    """Raise for more or longer items than any use needs, before each becomes an object.

    Decoding takes pynetdicom up to 0.1 ms an item, of which 64 KiB hold 16,000; looking whether
    one UID of 64 KiB is valid takes megabytes.
    """
    left = _MOST_ITEMS
    contexts = STORAGE_CONTEXTS + 1
    behind = [(_VARIABLE_ITEMS_AT, len(body))]
    while behind:
        at, end = behind.pop()
        while at + 4 <= end:
            kind, length = _ITEM_HEADER.unpack_from(body, at)
            at += 4
            left -= 1
            contexts -= kind in (0x20, 0x21)
            if left < 0 or contexts < 0 or length > _LONGEST_ITEMS.get(kind, length):
                raise ProtocolError(ProtocolError.INVALID_PARAMETER, "a stuffed A-ASSOCIATE PDU")
            if kind in _ITEMS_WITHIN:
                behind.append((at + _ITEMS_WITHIN[kind], min(at + length, end)))
            at += length


@contextlib.contextmanager
def _in_turn(length: int) -> Iterator[None]:
    """Decode long requests one by one: many at once would leave no time for anything else."""
    if length <= _SHORT_REQUEST_BYTES:
        yield
    else:
        with _long_requests:
            yield


def kept_transfer_syntax(proposed: Sequence[str]) -> str:
    """The transfer syntax to accept of those a sender proposes in one context.

    The first that is not Implicit VR Little Endian. A sender lists first what it prefers to
    send, but everybody lists the default as well, and some re-encode into it whatever they
    hold, losing the VRs of private elements.
    """
    for syntax in proposed:
        if syntax != ImplicitVRLittleEndian:
            return syntax
    return proposed[0]


class Answer:
    """The A-ASSOCIATE-AC to a request: PS3.8 9.3.3, PS3.7 D.3.3."""

    def __init__(self, request: A_ASSOCIATE_RQ, pdu_bytes: int) -> None:
        try:
            with _in_turn(request.pdu_length):
                self._build(request, pdu_bytes)
        except Exception:
            # Values that could be read and still are none, such as an empty UID.
            raise ProtocolError(
                ProtocolError.INVALID_PARAMETER, "an unusable A-ASSOCIATE-RQ"
            ) from None

    def _build(self, request: A_ASSOCIATE_RQ, pdu_bytes: int) -> None:
        primitive = request.to_primitive()
        roles = {
            item.sop_class_uid: item
            for item in primitive.user_information
            if isinstance(item, SCP_SCU_RoleSelectionNegotiation)
        }
        results = [
            _negotiate(proposed, roles.get(proposed.abstract_syntax))
            for proposed in primitive.presentation_context_definition_list
        ]
        self.contexts = {
            context.context_id: Context(str(context.abstract_syntax), context.transfer_syntax[0])
            for context in results
            if context.result == ACCEPTED and context.context_id is not None
        }
        self.peer_pdu_bytes = _maximum_length(request)

        accept = A_ASSOCIATE()
        accept.application_context_name = APPLICATION_CONTEXT
        accept.calling_ae_title = primitive.calling_ae_title
        accept.called_ae_title = primitive.called_ae_title
        accept.result, accept.result_source = 0, 1
        accept.presentation_context_definition_results_list = results
        accept.user_information = user_information(pdu_bytes)
        # The asynchronous operations window is not answered, which means one at a time.
        for uid, role in roles.items():
            if role.scu_role and any(uid == c.abstract_syntax_uid for c in self.contexts.values()):
                answered = SCP_SCU_RoleSelectionNegotiation()
                answered.sop_class_uid = uid
                answered.scu_role, answered.scp_role = True, False
                accept.user_information.append(answered)
        pdu = A_ASSOCIATE_AC()
        pdu.from_primitive(accept)
        self.pdu = pdu.encode()


def user_information(pdu_bytes: int) -> list[Any]:
    """User information of our side of a negotiation, PS3.7 D.3.3.1 and D.3.3.2."""
    length = MaximumLengthNotification()
    length.maximum_length_received = pdu_bytes
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = IMPLEMENTATION_CLASS_UID
    version = ImplementationVersionNameNotification()
    version.implementation_version_name = IMPLEMENTATION_VERSION_NAME
    return [length, implementation, version]


def _negotiate(
    proposed: PresentationContext, role: SCP_SCU_RoleSelectionNegotiation | None
) -> PresentationContext:
    """The result for one proposed context: any class of instances and C-ECHO, any encoding."""
    context = PresentationContext()
    context.context_id = proposed.context_id
    context.abstract_syntax = proposed.abstract_syntax
    if not proposed.transfer_syntax:
        context.transfer_syntax = [ImplicitVRLittleEndian]
        context.result = _TRANSFER_SYNTAXES_NOT_SUPPORTED
        return context
    context.transfer_syntax = [kept_transfer_syntax(proposed.transfer_syntax)]
    if uid_to_service_class(str(proposed.abstract_syntax)) not in _SERVICES:
        # Queries, worklists and the like: better refused here than with a status later.
        context.result = _ABSTRACT_SYNTAX_NOT_SUPPORTED
    elif role is not None and not role.scu_role:
        # It wants to be SCP only, and we do not send.
        context.result = _USER_REJECTION
    else:
        context.result = ACCEPTED
    return context


def get_request_pdu(
    calling_ae_title: str, called_ae_title: str, model: str, contexts: Sequence[Pair]
) -> bytes:
    """The A-ASSOCIATE-RQ of a C-GET: the model, a context for each pair, the SCP role for each
    class (PS3.7 D.3.3.4)."""
    # Implicit VR is what everybody has to accept (PS3.5 10.1); identifiers lose nothing by it.
    proposed: list[tuple[str, list[str]]] = [(model, [ImplicitVRLittleEndian])]
    proposed += [(sop_class, [syntax]) for sop_class, syntax in contexts]
    roles = dict.fromkeys(sop_class for sop_class, _ in contexts)
    return request_pdu(calling_ae_title, called_ae_title, proposed, roles)


def request_pdu(
    calling_ae_title: str,
    called_ae_title: str,
    proposed: Iterable[tuple[str, Sequence[str]]],
    roles: Iterable[str] = (),
    operations_window: bool = False,
    pdu_bytes: int = ANNOUNCED_PDU_BYTES,
) -> bytes:
    """An A-ASSOCIATE-RQ, PS3.8 9.3.2.

    Parameters
    ----------
    proposed : iterable of (abstract syntax, transfer syntaxes)
        A context each, numbered 1, 3, 5, …
    roles : iterable of str
        SOP classes for which we want to be SCP alone, PS3.7 D.3.3.4.
    operations_window : bool
        Whether to ask for any number of outstanding operations, PS3.7 D.3.3.3.
    pdu_bytes : int
        The longest PDU we say that we take.
    """
    request = A_ASSOCIATE()
    request.application_context_name = APPLICATION_CONTEXT
    request.calling_ae_title = calling_ae_title
    request.called_ae_title = called_ae_title
    contexts = [build_context(abstract, list(syntaxes)) for abstract, syntaxes in proposed]
    for number, context in enumerate(contexts):
        context.context_id = 2 * number + MODEL_CONTEXT_ID
    request.presentation_context_definition_list = contexts
    request.user_information = user_information(pdu_bytes)
    if operations_window:
        operations = AsynchronousOperationsWindowNegotiation()
        operations.maximum_number_operations_invoked = 0
        operations.maximum_number_operations_performed = 1
        request.user_information.append(operations)
    for sop_class in roles:
        role = SCP_SCU_RoleSelectionNegotiation()
        role.sop_class_uid = sop_class
        role.scu_role, role.scp_role = False, True
        request.user_information.append(role)
    pdu = A_ASSOCIATE_RQ()
    pdu.from_primitive(request)
    return pdu.encode()


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
    operations_window : int or None
        Operations we may have outstanding, 0 for any number; None where it was not answered.
    peer_pdu_bytes : int
        The longest PDU the peer takes, 0 for any.
    """

    results: dict[int, int]
    transfer_syntaxes: dict[int, str]
    scp_roles: frozenset[str]
    operations_window: int | None
    peer_pdu_bytes: int


def read_answer(pdu: bytes) -> Granted:
    """What an A-ASSOCIATE-AC grants.

    Raises
    ------
    ProtocolError
        It cannot be read.
    """
    _refuse_stuffed(pdu[6:])
    answer = A_ASSOCIATE_AC()
    try:
        answer.decode(pdu)
        items = answer.to_primitive().user_information
        results = answer.presentation_context
        operations_windows = [
            item.maximum_number_operations_invoked
            for item in items
            if isinstance(item, AsynchronousOperationsWindowNegotiation)
        ]
        return Granted(
            {_number(item.context_id): _number(item.result) for item in results},
            {_number(item.context_id): str(item.transfer_syntax or "") for item in results},
            frozenset(
                str(item.sop_class_uid)
                for item in items
                if isinstance(item, SCP_SCU_RoleSelectionNegotiation) and item.scp_role
            ),
            operations_windows[0] if operations_windows else None,
            _maximum_length(answer),
        )
    except Exception:
        raise ProtocolError(
            ProtocolError.INVALID_PARAMETER, "the A-ASSOCIATE-AC cannot be read"
        ) from None


def _number(value: int | None) -> int:
    """A field of a decoded PDU. pynetdicom's are optional, for PDUs that are being built."""
    if value is None:
        raise ValueError("a field of a PDU is missing")
    return value


def _maximum_length(pdu: A_ASSOCIATE_RQ | A_ASSOCIATE_AC) -> int:
    """The maximum PDU length a peer announces, PS3.8 D.1; 0 is any."""
    information = pdu.user_information
    if information is None:
        raise ValueError("the user information is missing")
    return information.maximum_length or 0


def accepted_contexts(granted: Granted, contexts: Sequence[Pair]) -> dict[int, Context]:
    """The storage contexts of a C-GET that were accepted with our SCP role, by their ID."""
    accepted = {}
    for number, (sop_class, syntax) in enumerate(contexts, start=1):
        context_id = 2 * number + MODEL_CONTEXT_ID
        if granted.results.get(context_id) == ACCEPTED and sop_class in granted.scp_roles:
            accepted[context_id] = Context(sop_class, syntax)
    return accepted
