"""One query, PS3.4 C.4.1: its keys, its answers and its end."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

from pydicom.dataset import Dataset

from prefect_dicom.core.errors import PacsError
from prefect_dicom.network.node_client import NodeClient


def find(requestor: NodeClient, identifier: Dataset, level: str) -> Generator[Dataset]:
    """Send a query and yield its answers as they come; closed early, the query is cancelled.

    Parameters
    ----------
    requestor : NodeClient
        The client of the node.
    identifier : Dataset
        Keys to match and to return; made by
        :func:`~prefect_dicom.network.query_keys.query_identifier`.
    level : str
        ``STUDY``, ``SERIES`` or ``IMAGE``; set as QueryRetrieveLevel.

    Raises
    ------
    PacsError
        See :meth:`~prefect_dicom.network.node_client.NodeClient.answers`; ``answers-capped`` where
        the PACS reports that there are more; ``answer-unusable`` at the end, where an answer does
        not decode: the list is then not whole.
    """
    identifier.QueryRetrieveLevel = level
    query = None if requestor.trace is None else requestor.trace.begin(level, _keys(identifier))
    if query is None:
        yield from requestor.answers(identifier, level)
        return
    try:
        with contextlib.closing(requestor.answers(identifier, level)) as answers:
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
