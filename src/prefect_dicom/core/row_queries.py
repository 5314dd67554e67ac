"""What was asked of a PACS for one row of a cohort, and what it answered, for people.

It is kept in the ledger alone, where candidates are. It is bounded: the first queries and answers
show what happens to a row, and a window of days brings thousands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from prefect_dicom.core.model import Study

MOST_QUERIES = 20
MOST_ANSWERS = 40
"""Answers that are kept of all queries of a row together."""

BY_QUERY = "query"
FROM_CACHE = "cache"
FROM_UID_LIST = "uid-list"


@dataclass(slots=True)
class RowQuery:
    """One query that a row's discovery needed.

    Attributes
    ----------
    node : str
        Name of the node.
    level : str
        ``STUDY``, ``SERIES`` or ``IMAGE``.
    keys : mapping of str to str
        The matching keys as they were sent, by keyword.
    source : str
        ``query``: sent for this row; ``cache``: answered before, to another row with the same
        keys; ``uid-list``: answered as one of a list of StudyInstanceUIDs.
    answers : int
        How many answers came.
    outcome : str or None
        Reason code of a query that failed.
    studies : list of Study
        The first of the answers at STUDY level.
    """

    node: str
    level: str
    keys: Mapping[str, str] = field(repr=False)
    source: str = BY_QUERY
    answers: int = 0
    outcome: str | None = None
    studies: list[Study] = field(default_factory=list, repr=False)


class RowTrace:
    """Collects the queries of one row on one node, up to the bounds of this module.

    Parameters
    ----------
    node : str
        Name of the node.
    cached_from : str
        Where answers come from that are not queried for: ``cache`` or ``uid-list``.
    """

    def __init__(self, node: str, cached_from: str = FROM_CACHE) -> None:
        self.queries: list[RowQuery] = []
        self._latest: RowQuery | None = None
        """The last query, if it is one of those that are kept."""
        self._node = node
        self._cached_from = cached_from
        self._room = MOST_ANSWERS

    def begin(self, level: str, keys: Mapping[str, str]) -> RowQuery:
        """Note a query that is sent; its answers are counted by the caller."""
        query = RowQuery(self._node, level, keys)
        self._latest = query if len(self.queries) < MOST_QUERIES else None
        if self._latest is not None:
            self.queries.append(query)
        return query

    def keep(self, study: Study) -> None:
        """Keep an answer to the last query, if that is kept, as long as there is room."""
        if self._room and self._latest is not None:
            self._room -= 1
            self._latest.studies.append(study)

    def answered_before(self, keys: Mapping[str, str], studies: list[Study]) -> None:
        """Note a query that was not sent, because its answers are known."""
        query = self.begin("STUDY", keys)
        query.source, query.answers = self._cached_from, len(studies)
        for study in studies[: self._room]:
            self.keep(study)


def without_taken(query: RowQuery, taken: set[str]) -> RowQuery:
    """The query with the UIDs alone of studies that the ledger has anyway."""
    return replace(
        query,
        studies=[
            Study(study.study_instance_uid) if study.study_instance_uid in taken else study
            for study in query.studies
        ],
    )
