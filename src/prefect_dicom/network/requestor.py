"""Requests to a node and their responses, over an association that is opened when needed.

The caller's thread alone reads and writes: an association has no thread of its own. While it is
idle nobody reads, so what ended it meanwhile is found when it is used next.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom.dsutils import decode, encode

from prefect_dicom.config.node import PacsNode
from prefect_dicom.core.errors import Interrupted, PacsError
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.reasons import Scope
from prefect_dicom.core.row_queries import RowTrace
from prefect_dicom.network.association import TRANSFER_SYNTAXES, Association, associate
from prefect_dicom.network.association_errors import aborted
from prefect_dicom.network.dimse import (
    HAS_DATA_SET,
    LONGEST_PDU_BYTES,
    NO_DATA_SET,
    RESPONSE,
    AssociationAborted,
    CommandField,
    Element,
    Elements,
    Message,
    cancel_command,
    unsigned_short,
    write_command,
)
from prefect_dicom.network.information_models import QUERY_RETRIEVE_CLASSES, VERIFICATION
from prefect_dicom.network.logging import configure_logging
from prefect_dicom.network.status import PENDING
from prefect_dicom.network.upper_layer.negotiation import (
    ACCEPTED,
    request_pdu,
)
from prefect_dicom.network.upper_layer.pdu import ProtocolError
from prefect_dicom.network.upper_layer.stream import BUFFER_BYTES

_COMMANDS = {
    "C-ECHO": CommandField.C_ECHO_RQ,
    "C-FIND": CommandField.C_FIND_RQ,
    "C-MOVE": CommandField.C_MOVE_RQ,
}
"""The services of a :class:`Requestor`; each has a presentation context, in this order."""
_ANNOUNCED_PDU_BYTES = 16382
_LOW_PRIORITY = 2

# PACS drop idle associations after 30 s (Orthanc) or more; one about to go is not used.
_IDLE_SECONDS = 15.0
# How late, at worst, a cancellation is noticed while an answer is waited for.
_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Response:
    """A response to a C-ECHO, C-FIND or C-MOVE.

    Parameters
    ----------
    status : int
        Status (0000,0900).
    elements : dict of int to bytes
        Its command set, by element number.
    data_set : bytes
        Its identifier; empty where it has none.
    transfer_syntax : UID
        In which the identifier is encoded.
    """

    status: int
    elements: Elements
    data_set: bytes
    transfer_syntax: UID

    @property
    def is_pending(self) -> bool:
        """Whether further responses follow."""
        return self.status in PENDING

    def identifier(self) -> Dataset:
        """The identifier, decoded. Raises a dozen types for bytes that are no data set."""
        syntax = self.transfer_syntax
        return decode(io.BytesIO(self.data_set), syntax.is_implicit_VR, syntax.is_little_endian)


class Exchange:
    """One request under way and the responses to it. Made by :meth:`Requestor.send`."""

    def __init__(
        self,
        requestor: Requestor,
        association: Association,
        service: str,
        context_id: int,
        message_id: int,
        fresh: bool,
    ) -> None:
        self.fresh = fresh
        """Whether the association was opened for this request."""
        self.answered = False
        """Whether the peer answered it at all."""
        self.ended = False
        """Whether the final response is here, or the association gone."""
        self._requestor = requestor
        self._association = association
        self._service = service
        self._context_id = context_id
        self._message_id = message_id
        self._sent_at = requestor.now()

    def next(self, seconds: float) -> Response | None:
        """The next response, or None when none came in time.

        Raises
        ------
        PacsError
            When the association has ended, or the message is no response to this request; the
            association is gone then.
        Interrupted
            The run was asked to stop; the association was aborted.
        """
        deadline = time.monotonic() + seconds
        while True:
            try:
                message = self._association.read(min(deadline, time.monotonic() + _LOOK_SECONDS))
            except TimeoutError:
                if self._service != "C-MOVE" and self._requestor.stopping():
                    # A C-MOVE is cancelled first, by who waits for it: it goes on without us.
                    self.abort()
                    raise Interrupted() from None
                if time.monotonic() >= deadline:
                    return None
            except ProtocolError as fault:
                self.abort(fault.source, fault.reason)
                raise PacsError("answer-unusable", fault.detail) from None
            except AssociationAborted as end:
                raise self._lost(end.source, end.reason) from None
            except OSError:
                raise self._lost(None, None) from None
            else:
                return self._take(message)

    def cancel(self) -> None:
        """Send a C-CANCEL-RQ, PS3.7 9.3.2.3; the final response is still to be waited for."""
        self._association.send(self._context_id, cancel_command(self._message_id), None)

    def abort(self, source: int = 0, reason: int = 0) -> None:
        """Abort the association, PS3.8 7.3, if it still stands."""
        self.ended = True
        self._requestor.abort(source, reason)

    def _lost(self, source: int | None, reason: int | None) -> PacsError:
        self.ended = True
        self._requestor.drop()
        # PACS that know our AE title from no table accept the association, answer
        # C-ECHO, and abort at the first request that needs a permission.
        first = not self.answered and self._service not in self._requestor.answered
        seconds = self._requestor.now() - self._sent_at
        return aborted(source, reason, first_request=first, seconds=seconds)

    def _take(self, message: Message) -> Response:
        elements = message.elements
        status = unsigned_short(elements, Element.STATUS)
        if (
            message.context_id != self._context_id
            or unsigned_short(elements, Element.COMMAND_FIELD)
            != _COMMANDS[self._service] | RESPONSE
            or unsigned_short(elements, Element.MESSAGE_ID_BEING_RESPONDED_TO) != self._message_id
            or status is None
        ):
            self.abort()
            raise PacsError("answer-unusable", f"no answer to a {self._service} where one was due")
        if not self.answered:
            self._requestor.first_answer(self._service, self._requestor.now() - self._sent_at)
        self.answered = True
        self._requestor.answered.add(self._service)
        syntax = self._association.transfer_syntax(self._context_id)
        response = Response(status, elements, message.data_set, syntax)
        if not response.is_pending:
            self.ended = True
            self._requestor.touch()
        return response


class Requestor:
    """Our side of the associations to one node, one at a time.

    The association (Verification, and the FIND and MOVE classes of the node's information
    model) is opened with the first request, used for all that follow, and opened anew when it
    was lost or has been idle. For one thread at a time. A context manager.

    Parameters
    ----------
    node : PacsNode
        The node, our AE title, and the time limits.
    answered : set of str, optional
        Kept by the caller, who has several requestors to the node: an abort of what it has
        answered before is no lack of permission.

    Examples
    --------
    >>> with Requestor(node) as requestor:  # doctest: +SKIP
    ...     seconds = echo(requestor)
    ...     studies = find_studies(requestor, {"PatientID": "000123"})
    """

    def __init__(self, node: PacsNode, answered: set[str] | None = None) -> None:
        configure_logging()
        self.node = node
        self.answers_lists = True
        """Whether lists of UIDs in queries are tried: until one was not answered completely."""
        self.stopping: Callable[[], bool] = lambda: False
        """Whether the run is to stop; called while an answer is waited for."""
        self.answered: set[str] = set() if answered is None else answered
        """The services this node has ever answered us."""
        self.ignores_keys = False
        """Whether this node has reported (FF01) that it does not support all keys of a query."""
        self.characters = ""
        """The Specific Character Set of the last query with texts beyond ASCII that had answers."""
        self.now: Callable[[], float] = time.monotonic
        self.first_answer: Callable[[str, float], object] = lambda service, seconds: None
        """Called for each request with its service and the seconds of ``now`` until its first
        response."""
        self.about: Hashable = None
        """The study or row of the requests, where there is one."""
        self.trace: RowTrace | None = None
        """Takes down the queries of a row and their answers, where there is one."""
        self._association: Association | None = None
        self._message_id = 0
        self._last_used = 0.0

    def __enter__(self) -> Requestor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def model(self, service: str) -> str:
        """SOP class UID that stands for a service at this node."""
        if service == "C-ECHO":
            return VERIFICATION
        return QUERY_RETRIEVE_CLASSES[service][self.node.information_model]

    def open(self) -> bool:
        """Open the association now, where there is none that can be used.

        Returns
        -------
        bool
            Whether a new one was opened.

        Raises
        ------
        PacsError
            With the cause: address, refusal, silence, rejection, abort.
        """
        if self._reuse() is not None:
            return False
        self._associate()
        return True

    def send(
        self,
        service: str,
        identifier: Dataset | None = None,
        *,
        destination: str | None = None,
        message_id: int | None = None,
    ) -> Exchange:
        """Send one request, on the open association or on a new one.

        Parameters
        ----------
        service : str
            ``C-ECHO``, ``C-FIND`` or ``C-MOVE``.
        identifier : Dataset, optional
            Of a C-FIND or C-MOVE.
        destination : str, optional
            AE title a C-MOVE sends to.
        message_id : int, optional
            1 to 65535; by default the next of this requestor's own.

        Raises
        ------
        PacsError
            When no association can be had, or the peer did not accept the service on it.
        """
        association = self._reuse()
        fresh = association is None
        if association is None:
            association = self._associate()
        context_id = _context_id(service)
        result = association.context_result(context_id)
        if result != ACCEPTED:
            raise PacsError("service-not-offered", f"{service}: context result {result}")
        if message_id is None:
            self._message_id = self._message_id % 65535 + 1
            message_id = self._message_id
        command: dict[int, bytes | int] = {
            Element.AFFECTED_SOP_CLASS_UID: self.model(service).encode(),
            Element.COMMAND_FIELD: _COMMANDS[service],
            Element.MESSAGE_ID: message_id,
            Element.COMMAND_DATA_SET_TYPE: NO_DATA_SET,
        }
        data_set: bytes | None = None
        if identifier is not None:
            syntax = association.transfer_syntax(context_id)
            data_set = encode(identifier, syntax.is_implicit_VR, syntax.is_little_endian)
            if not data_set:
                raise ValueError("the identifier cannot be encoded")
            command[Element.PRIORITY] = _LOW_PRIORITY
            command[Element.COMMAND_DATA_SET_TYPE] = HAS_DATA_SET
        if destination is not None:
            # Texts are padded with a blank, PS3.5 6.2.
            command[Element.MOVE_DESTINATION] = destination.ljust(
                len(destination) + len(destination) % 2
            ).encode()
        association.send(context_id, write_command(command), data_set)
        return Exchange(self, association, service, context_id, message_id, fresh)

    def close(self) -> None:
        """Release the association, PS3.8 7.2; never raises, and is fine to repeat."""
        association, self._association = self._association, None
        if association is None:
            return
        try:
            association.look()
        except (ProtocolError, AssociationAborted, OSError):
            association.close()
        else:
            association.release()

    def abort(self, source: int = 0, reason: int = 0) -> None:
        """Abort the association, PS3.8 7.3, where there is one."""
        association, self._association = self._association, None
        if association is not None:
            association.abort(source, reason)

    def drop(self) -> None:
        """Close the connection of an association that the peer has ended."""
        association, self._association = self._association, None
        if association is not None:
            association.close()

    def touch(self) -> None:
        """Note that the association was used just now."""
        self._last_used = time.monotonic()

    def _reuse(self) -> Association | None:
        """Reuse the open association, or end it where it was idle too long or has failed."""
        if self._association is None:
            return None
        if time.monotonic() - self._last_used >= _IDLE_SECONDS:
            self.close()
            return None
        try:
            self._association.look()
        except (AssociationAborted, OSError):
            self.drop()
        except ProtocolError as fault:
            self.abort(fault.source, fault.reason)
        return self._association

    def _associate(self) -> Association:
        node = self.node
        request = request_pdu(
            node.calling_ae_title,
            node.called_ae_title,
            [(self.model(service), TRANSFER_SYNTAXES) for service in _COMMANDS],
            pdu_bytes=_ANNOUNCED_PDU_BYTES,
        )
        try:
            stream, granted = associate(node, request, LONGEST_PDU_BYTES + BUFFER_BYTES)
        except PacsError as error:
            if error.scope is Scope.REQUEST:
                # Nothing has been asked yet that could be at fault: it is the node's.
                raise PacsError("pacs-reset", error.detail) from None
            raise
        association = Association(stream, granted, node.timeouts.acse_seconds)
        if all(association.context_result(_context_id(service)) for service in _COMMANDS):
            association.abort(2)
            raise PacsError("service-not-offered", "no presentation context was accepted")
        self._check_that_it_stands(association)
        self._association = association
        self.touch()
        failpoint("associated")
        return association

    @staticmethod
    def _check_that_it_stands(association: Association) -> None:
        """Raise where the peer has ended an association as it accepted it."""
        try:
            association.look()
            return
        except ProtocolError as fault:
            error = PacsError("pacs-reset", fault.detail)
        except AssociationAborted as end:
            error = aborted(end.source, end.reason, first_request=True)
            if error.code == "association-lost":
                error = PacsError("pacs-reset", error.detail)
        except OSError:
            error = PacsError("pacs-reset", "the connection ended as the association was accepted")
        association.close()
        raise error


def _context_id(service: str) -> int:
    """The presentation context ID that :func:`request_pdu` gives to a service's context."""
    return 2 * list(_COMMANDS).index(service) + 1
