"""Whose turn it is to use an association of a node: queries go before retrieves.

A query takes a moment, a retrieve minutes. While all associations of a node retrieve, queries for
the lists of the next studies wait, and those that decide about studies that are here. They go first
as soon as an association is free, one at a time: the others retrieve meanwhile.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence

from prefect_dicom.admission.health import RequestKind
from prefect_dicom.core.clock import Clock
from prefect_dicom.core.waiting_line import WaitingLine


class _Place:
    """A place in the line. Compared by identity."""

    def __init__(self, kind: RequestKind) -> None:
        self.kind = kind


class AssociationTurns:
    """Turns of the threads of a run at the associations of one node. Thread-safe.

    Parameters
    ----------
    most : callable
        How many associations may be used now.
    """

    def __init__(self, clock: Clock, most: Callable[[], int]) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._using: Counter[RequestKind] = Counter()
        self._line: WaitingLine[_Place] = WaitingLine(clock, self._choose)

    def begin(self, kind: RequestKind, check: Callable[[], object]) -> None:
        """Wait until an association may be used; :meth:`end` must follow.

        Parameters
        ----------
        check : callable
            Raises where it is not waited for any longer.
        """
        self._line.wait(_Place(kind), check, lambda place: self.end(place.kind))

    def end(self, kind: RequestKind) -> None:
        """An association is not used any longer."""
        with self._lock:
            self._using[kind] -= 1
        self._line.advance()

    def is_free(self) -> bool:
        """Whether an association could be used at once."""
        most = max(1, self._most())
        with self._lock:
            return self._using.total() < most

    def _choose(self, waiting: Sequence[_Place]) -> _Place | None:
        queries = [place for place in waiting if place.kind is RequestKind.QUERY]
        retrieves = [place for place in waiting if place.kind is RequestKind.RETRIEVE]
        most = max(1, self._most())
        with self._lock:
            if self._using.total() >= most:
                return None
            retrieve = bool(retrieves) and (not queries or self._using[RequestKind.QUERY] > 0)
            place = retrieves[0] if retrieve else queries[0]
            self._using[place.kind] += 1
        return place
