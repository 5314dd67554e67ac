"""Instances that come long after the end of their request: how long they are waited for."""

from __future__ import annotations

from collections.abc import Collection
from threading import Lock

from prefect_dicom.core.model import StudyReference

LATE_NOTE = (
    "what was asked for came after the end of the request; raise `timeouts.settle_seconds`, so "
    "that nothing is asked for twice"
)
_LONGER = 6
"""A node that says to have sent what has not come is given this many settle times, at first."""
_MARGIN = 1.5
_LONGEST_SECONDS = 300.0


class LateArrivals:
    """What a run has seen of instances that came after the end of their C-MOVE. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._seconds = 0.0
        self._in_vain = False
        self._awaited: dict[StudyReference, float] = {}

    def patience_seconds(self, settle_seconds: float, *, promised: bool) -> float:
        """How long to wait for what has not come when a request is over.

        Parameters
        ----------
        settle_seconds : float
            The node's settle time.
        promised : bool
            Whether the node says to have sent more than has come. It is given more time for that
            once a run: where nothing comes even then, its word is worth no more waiting.
        """
        with self._lock:
            if self._seconds:
                return min(max(settle_seconds, _MARGIN * self._seconds), _LONGEST_SECONDS)
            if promised and not self._in_vain:
                return min(_LONGER * settle_seconds, _LONGEST_SECONDS)
            return settle_seconds

    def record_wait(self, seconds: float, *, came: bool) -> None:
        """A wait beyond the settle time has ended, with instances or without."""
        with self._lock:
            if came:
                self._seconds = max(self._seconds, seconds)
            else:
                self._in_vain = True

    def expect(self, studies: Collection[StudyReference], now: float) -> None:
        """A request for these studies has ended, and not all of it has come."""
        with self._lock:
            for study in studies:
                self._awaited.setdefault(study, now)

    def forget(self, studies: Collection[StudyReference]) -> None:
        """Nothing more is to come for these studies."""
        with self._lock:
            for study in studies:
                self._awaited.pop(study, None)

    def is_awaited(self, study: StudyReference) -> bool:
        """Whether something may come for a study of which a request has ended short."""
        with self._lock:
            return study in self._awaited

    def record_arrival(self, study: StudyReference, now: float) -> None:
        """Instances of a study were found that no request under way has brought."""
        with self._lock:
            ended = self._awaited.get(study)
            if ended is not None:
                self._seconds = max(self._seconds, now - ended)
