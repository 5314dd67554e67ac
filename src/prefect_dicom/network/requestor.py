"""Requests to a node and their responses, over an association that is opened when needed.

The caller's thread alone reads and writes: an association has no thread of its own. While it is
idle nobody reads, so what ended it meanwhile is found when it is used next.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pynetdicom.dsutils import encode

from prefect_dicom.config.node import PacsNode
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.reasons import Scope
from prefect_dicom.dicom.character_sets import character_sets_for
from prefect_dicom.network.association import TRANSFER_SYNTAXES, Association, associate
from prefect_dicom.network.association_errors import aborted
from prefect_dicom.network.dimse import (
    HAS_DATA_SET,
    LONGEST_PDU_BYTES,
    NO_DATA_SET,
    AssociationAborted,
    Element,
    write_command,
)
from prefect_dicom.network.exchange import COMMANDS, Exchange, Response
from prefect_dicom.network.get import c_get
from prefect_dicom.network.information_models import QUERY_RETRIEVE_CLASSES, VERIFICATION
from prefect_dicom.network.logging import configure_logging
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.network.status import reason_for_status
from prefect_dicom.network.storage_scp.store_handler import StoreHandler
from prefect_dicom.network.upper_layer.negotiation import (
    ACCEPTED,
    request_pdu,
)
from prefect_dicom.network.upper_layer.pdu import ProtocolError
from prefect_dicom.network.upper_layer.stream import BUFFER_BYTES

_ANNOUNCED_PDU_BYTES = 16382
_LOW_PRIORITY = 2

# PACS drop idle associations after 30 s (Orthanc) or more; one about to go is not used.
_IDLE_SECONDS = 15.0
_PENDING_WITH_ALL_KEYS = 0xFF00
_CANCEL_SECONDS = 5.0


class Requestor(NodeClient):
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
    ...     seconds = requestor.echo()
    ...     studies = find_studies(requestor, {"PatientID": "000123"})
    """

    node: PacsNode

    def __init__(self, node: PacsNode, answered: set[str] | None = None) -> None:
        configure_logging()
        super().__init__(node, answered)
        self._association: Association | None = None
        self._message_id = 0
        self._last_used = 0.0

    def model(self, service: str) -> str:
        """SOP class UID that stands for a service at this node."""
        if service == "C-ECHO":
            return VERIFICATION
        return QUERY_RETRIEVE_CLASSES[service][self.node.information_model]

    # --- services

    def echo(self) -> float:
        """Send a C-ECHO and wait for its response, up to the time limit of an association request.

        An answer proves the address, both AE titles and the negotiation. It does not prove the
        permission to query or to move: PACS answer a C-ECHO to anybody.

        Returns
        -------
        float
            Seconds from the request to the answer, without the opening of the association.

        Raises
        ------
        PacsError
            With the cause, or with what the status stands for.
        """
        patience = self.node.timeouts.acse_seconds
        self.open()
        started = time.monotonic()
        exchange = self.send("C-ECHO")
        response = exchange.next(patience)
        if response is None:
            exchange.abort()
            raise PacsError("pacs-silent", f"no answer to a C-ECHO within {patience:g} s")
        code = reason_for_status("C-ECHO", response.status)
        if code is not None:
            raise PacsError(code, f"C-ECHO status {response.status:04X}")
        return time.monotonic() - started

    def character_sets(self, texts: Sequence[str]) -> Iterator[str]:
        """The usual character sets that have the texts; first the one that has found some."""
        return character_sets_for(texts, self.characters)

    def find_responses(self, identifier: Dataset) -> Generator[Response]:
        """Send a C-FIND and yield its responses as they come, the final one last.

        An association that turns out to be gone before the first response is opened anew, once.
        When the caller closes the generator early, the query is cancelled.

        Raises
        ------
        PacsError
            Without a final response: the association could not be opened or has ended, or no
            response came for ``timeouts.find_seconds``.
        """
        seconds = self.node.timeouts.find_seconds
        exchange = self.send("C-FIND", identifier)
        try:
            while True:
                try:
                    response = exchange.next(seconds)
                except PacsError:
                    if exchange.answered or exchange.fresh:
                        raise
                    exchange = self.send("C-FIND", identifier)
                    continue
                if response is None:
                    code = "association-stalled" if exchange.answered else "pacs-silent"
                    raise PacsError(code, f"no answer to a C-FIND within {seconds:g} s")
                yield response
                if not response.is_pending:
                    return
        except GeneratorExit:
            _cancel(exchange)
            raise
        finally:
            if not exchange.ended:
                exchange.abort()

    def answers(self, identifier: Dataset, level: str) -> Generator[Dataset]:
        """Send a C-FIND and yield its answers as they come; closed early, it is cancelled.

        Raises
        ------
        PacsError
            As :meth:`find_responses`; with what the final status stands for; ``answers-capped``
            where the PACS reports that there are more; ``answer-unusable`` at the end, where an
            answer had no data set that decodes: the list is then not whole.
        """
        unreadable = False
        with contextlib.closing(self.find_responses(identifier)) as responses:
            for response in responses:
                if not response.is_pending:
                    code = reason_for_status("C-FIND", response.status)
                    if code is not None:
                        detail = f"C-FIND status {response.status:04X} at {level} level"
                        raise PacsError(code, detail)
                    continue
                self.ignores_keys |= response.status != _PENDING_WITH_ALL_KEYS
                answer = _decoded(response)
                if answer is None:
                    unreadable = True
                else:
                    yield answer
        if unreadable:
            raise PacsError("answer-unusable", f"an answer at {level} level does not decode")

    def get(
        self,
        identifier: Dataset,
        *,
        contexts: Sequence[tuple[str, str]],
        store_handler: StoreHandler,
        should_stop: Callable[[], bool] | None = None,
        without_roles: bool = True,
    ) -> RetrieveResult:
        """Send one C-GET, see :func:`~prefect_dicom.network.get.c_get`.

        It goes over an association of its own; the one of the other services is released.
        """
        self.close()
        return c_get(
            self.node,
            identifier,
            contexts=contexts,
            store_handler=store_handler,
            should_stop=should_stop,
            without_roles=without_roles,
        )

    # --- the association

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
            Element.COMMAND_FIELD: COMMANDS[service],
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
            [(self.model(service), TRANSFER_SYNTAXES) for service in COMMANDS],
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
        if all(association.context_result(_context_id(service)) for service in COMMANDS):
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
    return 2 * list(COMMANDS).index(service) + 1


def _decoded(response: Response) -> Dataset | None:
    """The identifier of an answer; None where it is empty or no data set."""
    try:
        answer = response.identifier()
        last = answer.get_item(max(answer.keys()))
        # pydicom takes what there is of a value that is cut off.
        whole = isinstance(last, DataElement) or len(last.value or b"") == last.length  # type: ignore[unreachable]
    except Exception:
        # Whatever a data set does that is none, or empty.
        return None
    return answer if whole else None


def _cancel(exchange: Exchange) -> None:
    """Cancel a query and take the answers under way, so that the association can be used."""
    if exchange.ended:
        return
    deadline = time.monotonic() + _CANCEL_SECONDS
    with contextlib.suppress(PacsError):
        exchange.cancel()
        while not exchange.ended and time.monotonic() < deadline:
            exchange.next(1.0)
