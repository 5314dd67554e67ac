"""Storage commitment, PS3.4 Annex J: requests (N-ACTION) and reports (N-EVENT-REPORT).

A report may come before the response to its request, on the same association, on a later one that
either side opens, or never. So who requests records the request first, and takes reports wherever
they come: here, and in the receiver (:mod:`prefect_dicom.network.storage_scp.transfer`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pydicom.dataset import Dataset
from pynetdicom.dsutils import encode

from prefect_dicom.config.node import PacsNode
from prefect_dicom.core.errors import Interrupted, PacsError
from prefect_dicom.network.association import TRANSFER_SYNTAXES, Association, associate
from prefect_dicom.network.association_errors import aborted
from prefect_dicom.network.commitment_report import (
    ReportHandler,
    read_report,
    report_response,
)
from prefect_dicom.network.dimse import (
    HAS_DATA_SET,
    LONGEST_PDU_BYTES,
    RESPONSE,
    AssociationAborted,
    CommandField,
    Element,
    Message,
    unsigned_short,
    write_command,
)
from prefect_dicom.network.logging import configure_logging
from prefect_dicom.network.upper_layer.negotiation import (
    ACCEPTED,
    MODEL_CONTEXT_ID,
    PUSH_MODEL,
    request_pdu,
)
from prefect_dicom.network.upper_layer.pdu import ProtocolError
from prefect_dicom.network.upper_layer.stream import BUFFER_BYTES

MOST_REFERENCES = 500
"""Instances in one request: Orthanc takes 1.3 s for 724 and 49 s for 5,000."""
PUSH_MODEL_INSTANCE = "1.2.840.10008.1.20.1.1"
"""The well-known SOP instance of the Storage Commitment Push Model, PS3.4 J.3.5."""
_REQUEST_COMMITMENT = 1
_NOT_OFFERED = frozenset({0x0118, 0x0122, 0x0123, 0x0211})
_LOOK_SECONDS = 0.2

Reference = tuple[str, str]
"""A SOP class UID and a SOP instance UID."""


class CommitmentAssociation:
    """An association on which commitment is requested, and reports are taken. A context manager.

    Parameters
    ----------
    node : PacsNode
        The node, our AE title and the time limits.
    on_report : callable
        Takes each report that comes on this association, of this request or of earlier ones.
    should_stop : callable, optional
        Called while something is waited for; true ends the wait.

    Raises
    ------
    PacsError
        The association could not be opened, or ``commitment-not-offered``.
    """

    def __init__(
        self,
        node: PacsNode,
        on_report: ReportHandler,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        configure_logging()
        self._seconds = node.timeouts.acse_seconds
        self._on_report = on_report
        self._should_stop = should_stop
        self._message_id = 0
        request = request_pdu(
            node.calling_ae_title, node.called_ae_title, [(PUSH_MODEL, TRANSFER_SYNTAXES)]
        )
        stream, granted = associate(node, request, LONGEST_PDU_BYTES + BUFFER_BYTES)
        self._association = Association(stream, granted, self._seconds)
        result = self._association.context_result(MODEL_CONTEXT_ID)
        if result != ACCEPTED:
            self._association.release()
            raise PacsError("commitment-not-offered", f"context result {result}")

    def __enter__(self) -> CommitmentAssociation:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._association.release()
        else:
            self._association.abort()

    def request(self, transaction_uid: str, references: Sequence[Reference]) -> None:
        """Request commitment of instances, and wait for the response.

        Raises
        ------
        PacsError
            ``commitment-not-offered`` or ``request-refused`` by its status, or how the
            association ended.
        ValueError
            No instance, or more than :data:`MOST_REFERENCES`.
        """
        if not 0 < len(references) <= MOST_REFERENCES:
            raise ValueError(f"a request is for 1 to {MOST_REFERENCES} instances")
        self._message_id += 1
        command = write_command(
            {
                Element.REQUESTED_SOP_CLASS_UID: PUSH_MODEL.encode(),
                Element.COMMAND_FIELD: CommandField.N_ACTION_RQ,
                Element.MESSAGE_ID: self._message_id,
                Element.COMMAND_DATA_SET_TYPE: HAS_DATA_SET,
                Element.REQUESTED_SOP_INSTANCE_UID: PUSH_MODEL_INSTANCE.encode(),
                Element.ACTION_TYPE_ID: _REQUEST_COMMITMENT,
            }
        )
        syntax = self._association.transfer_syntax(MODEL_CONTEXT_ID)
        data_set = encode(
            _action_information(transaction_uid, references),
            syntax.is_implicit_VR,
            syntax.is_little_endian,
        )
        self._association.send(MODEL_CONTEXT_ID, command, data_set)
        deadline = time.monotonic() + self._seconds
        while True:
            message = self._next(deadline)
            if message is None:
                raise PacsError("pacs-silent", "no response to an N-ACTION")
            if self._is_report(message):
                continue
            status = unsigned_short(message.elements, Element.STATUS)
            field = unsigned_short(message.elements, Element.COMMAND_FIELD)
            if field != CommandField.N_ACTION_RQ | RESPONSE or status is None:
                raise PacsError("answer-unusable", "no response to an N-ACTION where one was due")
            if status in _NOT_OFFERED:
                raise PacsError("commitment-not-offered", f"N-ACTION status {status:04X}")
            if status:
                raise PacsError("request-refused", f"N-ACTION status {status:04X}")
            return

    def attend(self, seconds: float, until: Callable[[], bool]) -> None:
        """Take reports on this association, until there is nothing more to wait for.

        The end of the association by the peer ends the wait: reports may come on another.
        """
        deadline = time.monotonic() + seconds
        while not until():
            try:
                message = self._next(min(deadline, time.monotonic() + _LOOK_SECONDS))
            except PacsError:
                return
            if message is not None:
                self._is_report(message)
            elif time.monotonic() >= deadline:
                return

    def _next(self, deadline: float) -> Message | None:
        """The next message, or None where there is none in time."""
        while True:
            try:
                return self._association.read(min(deadline, time.monotonic() + _LOOK_SECONDS))
            except TimeoutError:
                if self._should_stop():
                    raise Interrupted() from None
                if time.monotonic() >= deadline:
                    return None
            except ProtocolError as fault:
                raise PacsError("answer-unusable", fault.detail) from None
            except AssociationAborted as end:
                raise aborted(end.source, end.reason, first_request=False) from None
            except OSError:
                raise aborted(None, None, first_request=False) from None

    def _is_report(self, message: Message) -> bool:
        """Take a report and answer it; whether the message is one."""
        field = unsigned_short(message.elements, Element.COMMAND_FIELD)
        if field != CommandField.N_EVENT_REPORT_RQ:
            return False
        syntax = self._association.transfer_syntax(message.context_id)
        status = self._on_report(read_report(message.data_set, syntax))
        self._association.send(message.context_id, report_response(message.elements, status), None)
        return True


def _action_information(transaction_uid: str, references: Sequence[Reference]) -> Dataset:
    """The action information of a request, PS3.4 J.3.2."""
    information = Dataset()
    information.TransactionUID = transaction_uid
    items = []
    for sop_class_uid, sop_instance_uid in references:
        item = Dataset()
        item.ReferencedSOPClassUID = sop_class_uid
        item.ReferencedSOPInstanceUID = sop_instance_uid
        items.append(item)
    information.ReferencedSOPSequence = items
    return information
