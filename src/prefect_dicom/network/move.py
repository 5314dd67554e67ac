"""C-MOVE, PS3.4 C.4.2: let a node send to our receiver, and supervise it.

Responses are no sign of life: a PACS sends them sparsely, late or not at all, and may take
minutes before the first. Instances that arrive at the receiver are; the caller counts them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pydicom.dataset import Dataset

from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.uids import normal_uid
from prefect_dicom.network.dimse import Element, unsigned_short
from prefect_dicom.network.exchange import Response
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.network.status import SUCCESS

_LOOK_SECONDS = 1.0
# Both peers we know stop within two images of a C-CANCEL; others ignore it.
_CANCEL_SECONDS = 10.0
# For a run that is to stop: people wait for it.
_STOP_SECONDS = 2.0


def move(
    requestor: Requestor,
    identifier: Dataset,
    destination: str,
    message_id: int,
    *,
    progress: Callable[[], int] | None = None,
    should_stop: Callable[[], str | None] | None = None,
    on_pending: Callable[[RetrieveResult], None] | None = None,
) -> RetrieveResult:
    """Send a C-MOVE and wait for its end.

    Ends with the peer's final response, with the loss of the association, or by our own decision:
    when neither an instance nor a response has come for ``timeouts.first_byte_seconds`` (before
    the first) or ``timeouts.stall_seconds`` (after it), or when ``should_stop`` returns a code.
    Then a C-CANCEL is sent, and the association aborted if it is not answered within 10 s, or
    2 s where ``should_stop`` ended it. The peer may go on sending after any of these but the
    first (PS3.4 C.4.2.3.1).

    Parameters
    ----------
    requestor : Requestor
        The association to use.
    identifier : Dataset
        Made by :func:`~prefect_dicom.network.query_keys.retrieve_identifier`.
    destination : str
        AE title of our receiver.
    message_id : int
        1 to 65535, of this request alone: the peer repeats it with every instance it sends.
    progress : callable, optional
        How many instances have arrived so far. Called about once a second; a change restarts
        the time limit as a response does.
    should_stop : callable, optional
        Called about once a second; a code of :mod:`prefect_dicom.core.reasons` ends the request.
    on_pending : callable, optional
        Called with the counters of every pending response. For display; they may be wrong.

    Returns
    -------
    RetrieveResult
        ``lost`` is ``association-stalled`` or the code of ``should_stop`` where we ended it;
        ``status`` is then what the peer answered to the C-CANCEL, or None.

    Raises
    ------
    PacsError
        Where the request could not be sent at all.
    """
    timeouts = requestor.node.timeouts
    exchange = requestor.send("C-MOVE", identifier, destination=destination, message_id=message_id)
    last = RetrieveResult(None)
    arrived = progress() if progress else 0
    moved = False
    since = time.monotonic()
    patience = timeouts.first_byte_seconds
    stopped: str | None = None
    try:
        while True:
            response = exchange.next(_LOOK_SECONDS)
            now = time.monotonic()
            if response is not None:
                last = _result(response, last, stopped)
                if not response.is_pending:
                    return last
                moved, since = True, now if stopped is None else since
                if on_pending:
                    on_pending(last)
            if stopped is not None:
                if now - since >= patience:
                    return _lost(last, stopped)
                continue
            if progress and (count := progress()) != arrived:
                arrived, moved, since = count, True, now
            patience = timeouts.stall_seconds if moved else timeouts.first_byte_seconds
            if now - since >= patience:
                stopped, patience = "association-stalled", _CANCEL_SECONDS
            elif should_stop and (stopped := should_stop()) is not None:
                patience = _STOP_SECONDS
            if stopped is not None:
                since = now
                exchange.cancel()
    except PacsError as error:
        return _lost(last, stopped or error.code)
    finally:
        if not exchange.ended:
            exchange.abort()


def _result(response: Response, last: RetrieveResult, stopped: str | None) -> RetrieveResult:
    def counter(element: int, before: int | None) -> int | None:
        value = unsigned_short(response.elements, element)
        return before if value is None else value

    final = not response.is_pending
    return RetrieveResult(
        status=response.status if final else None,
        # Of all counters this one must not outlive its response.
        remaining=counter(Element.REMAINING_SUBOPERATIONS, None),
        completed=counter(Element.COMPLETED_SUBOPERATIONS, last.completed),
        failed=counter(Element.FAILED_SUBOPERATIONS, last.failed),
        warning=counter(Element.WARNING_SUBOPERATIONS, last.warning),
        failed_sop_instance_uids=_failed(response) if final else (),
        error_comment_present=bool(response.elements.get(Element.ERROR_COMMENT, b"").strip(b" \0")),
        # A request that was finished before it could be cancelled was not ended by us.
        lost=stopped if final and response.status != SUCCESS else None,
    )


def _failed(response: Response) -> tuple[str, ...]:
    try:
        identifier = response.identifier()
        value = identifier.get_item("FailedSOPInstanceUIDList").value or b""
        text = value.decode("latin-1") if isinstance(value, bytes) else "\\".join(value)
    except Exception:
        # Absent, or no data set: it would only have been a hint.
        return ()
    return tuple(uid for uid in map(normal_uid, text.split("\\")) if uid)


def _lost(last: RetrieveResult, code: str) -> RetrieveResult:
    return RetrieveResult(
        None, last.remaining, last.completed, last.failed, last.warning, lost=code
    )
