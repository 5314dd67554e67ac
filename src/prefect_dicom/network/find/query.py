"""One C-FIND, PS3.4 C.4.1: its request, its responses and its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from prefect_dicom.core.errors import PacsError
from prefect_dicom.network.requestor import Exchange, Requestor, Response
from prefect_dicom.network.status import reason_for_status

_PENDING_WITH_ALL_KEYS = 0xFF00
_CANCEL_SECONDS = 5.0


def find_responses(requestor: Requestor, identifier: Dataset) -> Generator[Response]:
    """Send a C-FIND and yield its responses as they come, the final one last.

    An association that turns out to be gone before the first response is opened anew, once. When
    the caller closes the generator early, the query is cancelled.

    Raises
    ------
    PacsError
        Without a final response: the association could not be opened or has ended, or no response
        came for ``timeouts.find_seconds``.
    """
    seconds = requestor.node.timeouts.find_seconds
    exchange = requestor.send("C-FIND", identifier)
    try:
        while True:
            try:
                response = exchange.next(seconds)
            except PacsError:
                if exchange.answered or exchange.fresh:
                    raise
                exchange = requestor.send("C-FIND", identifier)
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


def find(requestor: Requestor, identifier: Dataset, level: str) -> Generator[Dataset]:
    """Send a C-FIND and yield its answers as they come; closed early, the query is cancelled.

    Parameters
    ----------
    requestor : Requestor
        The association to use.
    identifier : Dataset
        Keys to match and to return; made by
        :func:`~prefect_dicom.network.query_keys.query_identifier`.
    level : str
        ``STUDY``, ``SERIES`` or ``IMAGE``; set as QueryRetrieveLevel.

    Raises
    ------
    PacsError
        As :func:`find_responses`; with what the final status stands for; ``answers-capped`` where
        the PACS reports that there are more; ``answer-unusable`` at the end, where an answer had
        no data set that decodes: the list is then not whole.
    """
    identifier.QueryRetrieveLevel = level
    query = None if requestor.trace is None else requestor.trace.begin(level, _keys(identifier))
    if query is None:
        yield from _find(requestor, identifier, level)
        return
    try:
        with contextlib.closing(_find(requestor, identifier, level)) as answers:
            for answer in answers:
                query.answers += 1
                yield answer
    except PacsError as error:
        query.outcome = error.code
        raise


def _keys(identifier: Dataset) -> dict[str, str]:
    """The matching keys of an identifier."""
    values = {element.keyword: str(element.value or "") for element in identifier}
    return {
        keyword: value
        for keyword, value in values.items()
        if value and keyword not in ("QueryRetrieveLevel", "SpecificCharacterSet")
    }


def _find(requestor: Requestor, identifier: Dataset, level: str) -> Generator[Dataset]:
    unreadable = False
    with contextlib.closing(find_responses(requestor, identifier)) as responses:
        for response in responses:
            if not response.is_pending:
                code = reason_for_status("C-FIND", response.status)
                if code is not None:
                    detail = f"C-FIND status {response.status:04X} at {level} level"
                    raise PacsError(code, detail)
                continue
            requestor.ignores_keys |= response.status != _PENDING_WITH_ALL_KEYS
            answer = _decoded(response)
            if answer is None:
                unreadable = True
            else:
                yield answer
    if unreadable:
        raise PacsError("answer-unusable", f"an answer at {level} level does not decode")


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
