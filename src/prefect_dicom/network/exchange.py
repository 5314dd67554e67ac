"""One request over an association and the responses to it."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom.dsutils import decode

from prefect_dicom.core.errors import Interrupted, PacsError
from prefect_dicom.network.association import Association
from prefect_dicom.network.association_errors import aborted
from prefect_dicom.network.dimse import (
    RESPONSE,
    AssociationAborted,
    CommandField,
    Element,
    Elements,
    Message,
    cancel_command,
    unsigned_short,
)
from prefect_dicom.network.status import PENDING
from prefect_dicom.network.upper_layer.pdu import ProtocolError

COMMANDS = {
    "C-ECHO": CommandField.C_ECHO_RQ,
    "C-FIND": CommandField.C_FIND_RQ,
    "C-MOVE": CommandField.C_MOVE_RQ,
}
"""The services of an exchange."""

# How late, at worst, a cancellation is noticed while an answer is waited for.
_LOOK_SECONDS = 0.2


class AssociationUser(Protocol):
    """Who sends requests over an association, and has to know when it has ended."""

    answered: set[str]
    now: Callable[[], float]
    stopping: Callable[[], bool]
    first_answer: Callable[[str, float], object]

    def abort(self, source: int = 0, reason: int = 0) -> None:
        """Abort the association."""

    def drop(self) -> None:
        """Close the connection of an association that the peer has ended."""

    def touch(self) -> None:
        """Note that the association was used just now."""


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
    """One request under way and the responses to it. Made by a requestor."""

    def __init__(
        self,
        user: AssociationUser,
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
        self._user = user
        self._association = association
        self._service = service
        self._context_id = context_id
        self._message_id = message_id
        self._sent_at = user.now()

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
                if self._service != "C-MOVE" and self._user.stopping():
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
        self._user.abort(source, reason)

    def _lost(self, source: int | None, reason: int | None) -> PacsError:
        self.ended = True
        self._user.drop()
        # PACS that know our AE title from no table accept the association, answer
        # C-ECHO, and abort at the first request that needs a permission.
        first = not self.answered and self._service not in self._user.answered
        seconds = self._user.now() - self._sent_at
        return aborted(source, reason, first_request=first, seconds=seconds)

    def _take(self, message: Message) -> Response:
        elements = message.elements
        status = unsigned_short(elements, Element.STATUS)
        if (
            message.context_id != self._context_id
            or unsigned_short(elements, Element.COMMAND_FIELD) != COMMANDS[self._service] | RESPONSE
            or unsigned_short(elements, Element.MESSAGE_ID_BEING_RESPONDED_TO) != self._message_id
            or status is None
        ):
            self.abort()
            raise PacsError("answer-unusable", f"no answer to a {self._service} where one was due")
        if not self.answered:
            self._user.first_answer(self._service, self._user.now() - self._sent_at)
        self.answered = True
        self._user.answered.add(self._service)
        syntax = self._association.transfer_syntax(self._context_id)
        response = Response(status, elements, message.data_set, syntax)
        if not response.is_pending:
            self.ended = True
            self._user.touch()
        return response
