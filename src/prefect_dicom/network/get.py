"""C-GET, PS3.4 C.4.3 and PS3.7 9.1.3: request instances and receive them on one association.

The association is opened as for every request; then the
:mod:`transfer loop <prefect_dicom.network.storage_scp.transfer>` has its stream.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom.dsutils import encode

from prefect_dicom.config.node import PacsNode
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.network.association import abort, associate
from prefect_dicom.network.association_errors import aborted
from prefect_dicom.network.dimse import (
    HAS_DATA_SET,
    CommandField,
    Element,
    Elements,
    cancel_command,
    unsigned_short,
    write_command,
)
from prefect_dicom.network.information_models import QUERY_RETRIEVE_CLASSES
from prefect_dicom.network.logging import configure_logging
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.network.status import PENDING
from prefect_dicom.network.storage_scp.close_reason import CloseKind, CloseReason
from prefect_dicom.network.storage_scp.instance_sink import InstanceSink
from prefect_dicom.network.storage_scp.limits import Limits
from prefect_dicom.network.storage_scp.transfer import (
    AssociationInfo,
    Transfer,
)
from prefect_dicom.network.upper_layer.negotiation import (
    ACCEPTED,
    MODEL_CONTEXT_ID,
    STORAGE_CONTEXTS,
    Context,
    Granted,
    Pair,
    accepted_contexts,
    get_request_pdu,
)
from prefect_dicom.network.upper_layer.pdu import (
    ProtocolError,
    message_pdus,
)
from prefect_dicom.network.upper_layer.stream import Stream

logger = logging.getLogger(__name__)

_PDU_SECONDS = 30.0
# Instances under way are requested again by the next run; people wait for this one to stop.
_CANCEL_SECONDS = 2.0
_RELEASE_SECONDS = 5.0

_MEDIUM_PRIORITY = 0x0000
_NO_ROLE = "C-GET: no storage class with our SCP role"

_ELEMENT_HEADER = struct.Struct("<HHI")
_FAILED_SOP_INSTANCE_UID_LIST = (0x0008, 0x0058)


def c_get(
    node: PacsNode,
    identifier: Dataset,
    *,
    contexts: Sequence[Pair],
    store_handler: InstanceSink[Any],
    message_id: int = 1,
    on_progress: Callable[[RetrieveResult], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    without_roles: bool = True,
) -> RetrieveResult:
    """Send one C-GET on an association of its own and receive its instances.

    Parameters
    ----------
    node : PacsNode
        The node, our AE title, and the time limits: ``first_byte_seconds`` from the request to
        the first message, ``stall_seconds`` from then on.
    identifier : Dataset
        The identifier, PS3.4 C.4.3.1.3. Its unique keys have been checked by the caller.
    contexts : sequence of (SOP class UID, transfer syntax UID)
        At most 127, one presentation context each: with one context for several syntaxes the
        peer chooses, and some choose one the instances are not stored in, and stop. Instances
        of other contexts cannot be sent.
    store_handler : InstanceSink
        Where instances go.
    message_id : int
        Of the request.
    on_progress : callable, optional
        Called with each pending response, as a result with status 0xFF00.
    should_stop : callable, optional
        Called before each message and once a second; when it returns true the request is
        cancelled (PS3.7 9.3.3.3), and aborted 2 s later if the peer goes on.
    without_roles : bool
        Whether to send the request too where the peer accepts storage classes and says nothing of
        roles: some send all the same.

    Returns
    -------
    RetrieveResult
        With ``lost`` set where the association ended without a final response:
        ``association-lost``, ``association-stalled``, ``pacs-silent``, ``not-permitted``,
        ``answer-unusable`` or ``interrupted``.

    Raises
    ------
    PacsError
        The association could not be opened, or C-GET is not offered on it; ``sop-classes-refused``
        where it is, but for none of the SOP classes, or where the peer says nothing of roles and
        sends nothing either.
    ValueError
        More contexts than an association has, or an identifier that cannot be encoded.
    """
    if not 0 < len(contexts) <= STORAGE_CONTEXTS:
        raise ValueError(f"an association has 1 to {STORAGE_CONTEXTS} storage contexts")
    configure_logging()
    data_set = encode(identifier, is_implicit_vr=True, is_little_endian=True)
    if not data_set:
        raise ValueError("the identifier cannot be encoded")
    stream, granted, accepted = _associate(node, contexts, without_roles)
    with contextlib.closing(stream.connection):
        failpoint("associated")
        request = _Request(
            stream,
            node,
            accepted,
            granted.peer_pdu_bytes,
            store_handler,
            message_id,
            on_progress,
            should_stop,
        )
        result = request.run(data_set)
    if not granted.scp_roles and not request.instances and result.lost != "interrupted":
        raise PacsError("sop-classes-refused", _NO_ROLE)
    return result


def _associate(
    node: PacsNode, contexts: Sequence[Pair], without_roles: bool
) -> tuple[Stream, Granted, dict[int, Context]]:
    """Negotiate; the stream, what was granted, and the accepted storage contexts."""
    model = QUERY_RETRIEVE_CLASSES["C-GET"][node.information_model]
    request = get_request_pdu(node.calling_ae_title, node.called_ae_title, model, contexts)
    stream, granted = associate(node, request)
    accepted = accepted_contexts(granted, contexts, without_roles=without_roles)
    error: PacsError | None = None
    result = granted.results.get(MODEL_CONTEXT_ID)
    if result != ACCEPTED:
        error = PacsError("service-not-offered", f"C-GET: context result {result}")
    elif not accepted:
        error = PacsError("sop-classes-refused", _NO_ROLE)
    if error is not None:
        abort(stream)
        raise error
    return stream, granted, accepted


class _Request:
    """One C-GET under way: its responses, and its cancellation."""

    def __init__(
        self,
        stream: Stream,
        node: PacsNode,
        contexts: dict[int, Context],
        peer_pdu_bytes: int,
        store_handler: InstanceSink[Any],
        message_id: int,
        on_progress: Callable[[RetrieveResult], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        self._model = QUERY_RETRIEVE_CLASSES["C-GET"][node.information_model]
        self._accepted = tuple(
            (context.abstract_syntax_uid, context.transfer_syntax_uid)
            for context in contexts.values()
        )
        self._message_id = message_id
        self._peer_pdu_bytes = peer_pdu_bytes
        self._on_progress = on_progress
        self._should_stop = should_stop
        self._cancelled_until: float | None = None
        self._result = RetrieveResult(None, accepted=self._accepted)
        stall = node.timeouts.stall_seconds
        model_context = Context(self._model, ImplicitVRLittleEndian)
        self._stream = stream
        if should_stop is not None:
            stream.attend = self._attend
        self._transfer = Transfer(
            self._stream,
            {MODEL_CONTEXT_ID: model_context, **contexts},
            store_handler,
            info=AssociationInfo(
                node.calling_ae_title, node.called_ae_title, stream.connection.getpeername()[0]
            ),
            limits=Limits(pdu_seconds=min(_PDU_SECONDS, stall), idle_seconds=stall),
            peer_pdu_bytes=peer_pdu_bytes,
            first_idle_seconds=node.timeouts.first_byte_seconds,
            on_response=self._respond,
        )

    @property
    def instances(self) -> int:
        """Instances that were received."""
        return self._transfer.instances

    def run(self, data_set: bytes) -> RetrieveResult:
        command = write_command(
            {
                Element.AFFECTED_SOP_CLASS_UID: self._model.encode(),
                Element.COMMAND_FIELD: CommandField.C_GET_RQ,
                Element.MESSAGE_ID: self._message_id,
                Element.PRIORITY: _MEDIUM_PRIORITY,
                Element.COMMAND_DATA_SET_TYPE: HAS_DATA_SET,
            }
        )
        try:
            self._transfer.send(
                message_pdus(MODEL_CONTEXT_ID, command, data_set, self._peer_pdu_bytes)
            )
        except OSError:
            return dataclasses.replace(self._result, lost="association-lost")
        end = self._transfer.run()
        if end.kind is CloseKind.FINISHED:
            self._release()
            return self._result
        return dataclasses.replace(self._result, status=None, lost=self._lost(end))

    def _respond(self, elements: Elements, identifier: bytes) -> bool:
        status = unsigned_short(elements, Element.STATUS)
        if unsigned_short(elements, Element.COMMAND_FIELD) != CommandField.C_GET_RSP:
            raise ProtocolError(
                ProtocolError.UNSPECIFIED, "a response to another request", source=0
            )
        if status is None:
            raise ProtocolError(ProtocolError.UNSPECIFIED, "a response without status", source=0)
        before = self._result

        def counter(element: int, last: int | None) -> int | None:
            value = unsigned_short(elements, element)
            return last if value is None else value

        pending = status in PENDING
        self._result = RetrieveResult(
            status,
            # Absent in a final response because nothing remains, PS3.7 9.1.3.1.6.
            remaining=counter(
                Element.REMAINING_SUBOPERATIONS, before.remaining if pending else None
            ),
            completed=counter(Element.COMPLETED_SUBOPERATIONS, before.completed),
            failed=counter(Element.FAILED_SUBOPERATIONS, before.failed),
            warning=counter(Element.WARNING_SUBOPERATIONS, before.warning),
            failed_sop_instance_uids=_failed_uids(identifier),
            error_comment_present=bool(elements.get(Element.ERROR_COMMENT, b"").strip(b" \0")),
            accepted=self._accepted,
        )
        if pending and self._on_progress is not None:
            self._on_progress(self._result)
        return not pending

    def _attend(self) -> None:
        now = time.monotonic()
        if self._cancelled_until is not None:
            if now >= self._cancelled_until:
                self._transfer.hang_up()
        elif self._should_stop is not None and self._should_stop():
            self._cancelled_until = now + _CANCEL_SECONDS
            command = cancel_command(self._message_id)
            self._transfer.send(message_pdus(MODEL_CONTEXT_ID, command, None, self._peer_pdu_bytes))

    def _lost(self, end: CloseReason) -> str:
        if self._cancelled_until is not None:
            # Some PACS answer a C-CANCEL with an A-ABORT.
            return "interrupted"
        if end.kind is CloseKind.ABORTED:
            first = self._transfer.messages == 0
            return aborted(end.source, end.reason, first_request=first).code
        if end.kind is CloseKind.IDLE:
            return "pacs-silent" if self._transfer.messages == 0 else "association-stalled"
        if end.kind is CloseKind.REFUSED:
            slow = end.source == 2 and end.reason == ProtocolError.UNSPECIFIED
            return "association-stalled" if slow else "answer-unusable"
        return "association-lost"

    def _release(self) -> None:
        """Release, PS3.8 7.2. The answer is waited for, and does not matter."""
        self._stream.attend = None
        self._stream.release(time.monotonic() + _RELEASE_SECONDS)


def _failed_uids(identifier: bytes) -> tuple[str, ...]:
    """The Failed SOP Instance UID List of a response's identifier (implicit VR)."""
    offset = 0
    while offset + 8 <= len(identifier):
        group, element, length = _ELEMENT_HEADER.unpack_from(identifier, offset)
        offset += 8
        if (group, element) == _FAILED_SOP_INSTANCE_UID_LIST:
            text = identifier[offset : offset + length].decode("ascii", "surrogateescape")
            return tuple(uid for part in text.split("\\") if (uid := part.strip(" \0")))
        offset += length
    return ()
