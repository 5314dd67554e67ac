"""A clock for living through a week of nights in minutes, and a PACS that is watched by it.

While anybody is at work it goes as fast as any clock; when all who work wait, it jumps to the
moment at which the first of them has waited long enough.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from prefect_dicom.core.clock import Clock
from prefect_dicom.testing import ScriptedPacs


class SimulatedClock(Clock):
    """Time that jumps over what everybody waits for."""

    look_seconds = 20.0

    def __init__(self, begin: datetime) -> None:
        self._begin = begin
        self._zero = time.monotonic()
        self._jumped = 0.0
        self._condition = threading.Condition()
        self._at_work: set[int] = set()
        self._deadlines: dict[object, tuple[float, bool]] = {}

    def monotonic(self) -> float:
        return time.monotonic() - self._zero + self._jumped

    def now(self) -> datetime:
        return self._begin + timedelta(seconds=self.monotonic())

    def shared(self) -> float:
        return self.now().timestamp()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """This thread does work, but where it waits by the clock."""
        with self._condition:
            self._at_work.add(threading.get_ident())
        try:
            yield
        finally:
            with self._condition:
                self._at_work.discard(threading.get_ident())
                self._jump()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """This thread leaves its work to others for a while."""
        with self._condition:
            self._at_work.discard(threading.get_ident())
            self._jump()
        try:
            yield
        finally:
            with self._condition:
                self._at_work.add(threading.get_ident())

    def wait(self, event: threading.Event, seconds: float) -> bool:
        self._wait(event, seconds, threading.get_ident() in self._at_work)
        return event.is_set()

    def work_for_another(self, seconds: float) -> None:
        """Let time pass in a thread for which one at work waits, at the other end of a wire."""
        self._wait(threading.Event(), seconds, True)

    def _wait(self, event: threading.Event, seconds: float, counts: bool) -> None:
        deadline = self.monotonic() + seconds
        own = object()
        with self._condition:
            self._deadlines[own] = deadline, counts
            try:
                while not event.is_set() and self.monotonic() < deadline:
                    self._jump()
                    left = deadline - self.monotonic()
                    if left > 0:
                        # An event that is set elsewhere wakes nobody here.
                        self._condition.wait(min(left, 0.2))
            finally:
                del self._deadlines[own]

    def _jump(self) -> None:
        """Go to the first deadline, if all who work wait for one."""
        waiting = sum(counts for _, counts in self._deadlines.values())
        if not self._deadlines or waiting < max(1, len(self._at_work)):
            return
        ahead = min(deadline for deadline, _ in self._deadlines.values()) - self.monotonic()
        if ahead > 0:
            self._jumped += ahead
            self._condition.notify_all()


@dataclass
class Asked:
    """A request as the PACS saw it, in seconds of the clock."""

    service: str
    begin: float
    end: float = float("inf")
    objects: int = 0
    size_bytes: int = 0


@dataclass
class Seen:
    """What a PACS has seen of those who ask it."""

    requests: list[Asked] = field(default_factory=list)
    associations: list[tuple[float, int]] = field(default_factory=list)
    """When one came (1) or went (-1)."""

    def most_associations(self, begin: float, end: float) -> int:
        """The most that stood at a time."""
        standing = most = 0
        for at, change in sorted(self.associations):
            if at >= end:
                break
            if at > begin:
                most = max(most, standing)
            standing += change
        return max(most, standing)

    def busy_seconds(self, begin: float, end: float) -> float:
        """For how long it was busy with requests, each by itself."""
        return sum(max(0.0, min(r.end, end) - max(r.begin, begin)) for r in self.requests)

    def retrieves(self, begin: float, end: float) -> list[Asked]:
        """The retrieves that began in a stretch of time."""
        return [
            r for r in self.requests if r.service in ("C-MOVE", "C-GET") and begin <= r.begin < end
        ]


class WatchedPacs(ScriptedPacs):
    """A PACS that takes its time for a retrieve, and notes what it sees by a clock."""

    def __init__(self, clock: SimulatedClock, seconds: float, **more: object) -> None:
        super().__init__(**more)
        self._clock = clock
        self._seconds = seconds
        self.seen = Seen()
        self._noted = threading.local()
        self.object_bytes = len(next(iter(self.holdings)).encoded())
        """All of them are as large as the first."""

    def _note(self, association: object, service: str, message: object) -> object:
        request = self._noted.request = super()._note(association, service, message)
        return request

    def _note_change(self, association: object, by: int) -> None:
        super()._note_change(association, by)
        self.seen.associations.append((self._clock.monotonic(), by))

    def _serve(self, association: object, message: object, context_id: int) -> None:
        service = type(message).__name__.replace("_", "-")
        asked = Asked(service, self._clock.monotonic())
        self.seen.requests.append(asked)
        try:
            if service in ("C-MOVE", "C-GET"):
                self._clock.work_for_another(self._seconds)
            super()._serve(association, message, context_id)
        finally:
            asked.end = self._clock.monotonic()
            sent = self._noted.request.sent
            asked.objects = len(sent)
            asked.size_bytes = len(sent) * self.object_bytes
