"""Health signals of one PACS node: slow starts, failed queries, studies without instances."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Hashable
from enum import StrEnum

from prefect_dicom.core.model import StudyReference

_SILENT_STUDIES = 3
_SILENT_STUDIES_AFTER_DELIVERY = 10
_FAILED_QUERIES = 10
_RECENT_REQUESTS = 10
_SIGNS = 3
"""Signs of strain at so many different studies among the last :data:`_RECENT_REQUESTS`."""
_SLOW_FACTOR = 4.0
_SLOW_SECONDS = 3.0
"""A request is slow that takes several times the usual to begin, and at least so long."""
_USUAL_OF = 51
_USUAL_FROM = 8
"""The usual is the median of so many requests, at most and at least."""


class RequestKind(StrEnum):
    """Kinds of requests; the latency of a request is compared with others of its kind."""

    QUERY = "query"
    RETRIEVE = "retrieve"


class HealthSignals:
    """What the requests of a run show of a node's health; guarded by the lock of its admission.

    Each ``record_…`` method returns whether the signals have reached the point where the caller
    has to act.
    """

    def __init__(self) -> None:
        self.has_worked = False
        """Whether the node has done anything for this run yet."""
        self.has_delivered = False
        """Whether any instance has arrived from it in this run."""
        self._failed_queries = 0
        self._silent_studies: set[StudyReference] = set()
        self._latencies: dict[RequestKind, deque[float]] = {
            kind: deque(maxlen=_USUAL_OF) for kind in RequestKind
        }
        self._recent: dict[RequestKind, deque[tuple[str | None, Hashable]]] = {
            kind: deque(maxlen=_RECENT_REQUESTS) for kind in RequestKind
        }

    def record_success(self) -> None:
        """A request has done something that need not be repeated."""
        self.has_worked = True
        self._failed_queries = 0

    def record_delivery(self) -> None:
        """Instances have arrived, so the way from the node to here is open."""
        self.has_delivered = True
        self._silent_studies.clear()

    def record_answer(self) -> None:
        """A query was answered."""
        self._failed_queries = 0

    def record_failed_query(self) -> bool:
        """A query failed for a reason that may be its own; ten in a row are the node's."""
        self._failed_queries += 1
        return self._failed_queries >= _FAILED_QUERIES

    def record_nothing_sent(self, study: StudyReference) -> bool:
        """The node lists a study and sent nothing of it when that was requested.

        Some studies lie damaged on their PACS. After three with nothing before, or ten in a row
        after others, the way to here is closed.
        """
        self._silent_studies.add(study)
        most = _SILENT_STUDIES_AFTER_DELIVERY if self.has_delivered else _SILENT_STUDIES
        return len(self._silent_studies) >= most

    def record_latency(self, kind: RequestKind, seconds: float) -> bool:
        """Seconds until the first answer or instance; returns whether the request was slow."""
        before = self._latencies[kind]
        usual = statistics.median(before) if len(before) >= _USUAL_FROM else math.inf
        before.append(seconds)
        return seconds >= max(_SLOW_SECONDS, _SLOW_FACTOR * usual)

    def record_request(self, kind: RequestKind, sign: str | None, about: Hashable) -> bool:
        """Count a request; returns whether the recent ones show that the node is strained.

        Parameters
        ----------
        sign : str or None
            Reason code of a sign of strain, None for a request without.
        about : hashable
            The study or row of the request, None where it was about none. Signs at one study only
            are the study's fault.
        """
        recent = self._recent[kind]
        recent.append((sign, about))
        if sign is None:
            return False
        signs = [who for code, who in recent if code is not None]
        return len({who for who in signs if who is not None}) + signs.count(None) >= _SIGNS

    def forget_strain(self) -> None:
        """Start counting signs of strain anew."""
        for recent in self._recent.values():
            recent.clear()
