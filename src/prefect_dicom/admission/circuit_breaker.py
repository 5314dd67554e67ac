"""Circuit breaker and concurrency limit of a node, with the signs of health they go by."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from enum import StrEnum

from prefect_dicom.core.model import (
    Disposition,
    StudyReference,
)
from prefect_dicom.core.reasons import reason_for


class BreakerState(StrEnum):
    """Whether a node may be asked."""

    CLOSED = "closed"
    """By all."""
    HALF_OPEN = "half-open"
    """By one at a time, until one has succeeded."""
    OPEN = "open"
    """Not now."""
    DISABLED = "disabled"
    """Not before a person has acted."""


_MUTE_STUDIES = 3
_MUTE_STUDIES_AFTER_OTHERS = 10
_FAILED_QUERIES = 10
JITTER = 0.2
"""Waits are longer or shorter by up to this part: runs that failed together do not return so."""

EASE_SECONDS = 300.0
"""After so long without strain, a node that was asked for less is asked for one more at a time."""
_LATELY = 10
_SIGNS = 3
"""Signs of strain from so many different studies among the last :data:`_LATELY` requests."""
_SLOW_TIMES = 4.0
_SLOW_SECONDS = 3.0
"""A request is slow that takes several times the usual to begin, and at least so long."""
_USUAL_OF = 51
_USUAL_FROM = 8
"""The usual is the median of so many requests, at most and at least."""


def _lot() -> float:
    return random.uniform(1 - JITTER, 1 + JITTER)


class RequestKind(StrEnum):
    """Kinds of requests; how long they take to begin is compared with others of the kind."""

    QUERY = "query"
    RETRIEVE = "retrieve"


Heard = Callable[[str, str | None, Mapping[str, int | float]], None]
"""Told the name of an event, its reason code and its figures."""


class NodeAdmission:
    """When one PACS node may be asked, for how much at a time, and whether at all. Thread-safe.

    There is one for each node of a run, and all its studies and threads go by it: what one
    learns of the node spares the others the same.

    *A breaker.* A node that fails for a passing reason is left alone for the first of the waits,
    then for the second, and so on. When a wait is over, one caller is to probe the node with
    what costs it least (:meth:`begin_probe`); when that was answered, one caller at a time may
    ask (:meth:`try_acquire`), until a request has succeeded. A node that fails once more after the
    last wait, or for a reason that a person has to act on, is *disabled*: nothing is sent to it any
    more, and what was to be asked stays as it is.

    *Less at a time.* A node that refuses for want of resources, or shows signs of strain (slow
    to begin, out of resources, success with nothing sent) at several studies of late, is asked
    for half as much at a time; after each :data:`EASE_SECONDS` without, for one more.

    Parameters
    ----------
    waits : sequence of float
        Seconds. How long to leave the node alone after so many failures in a row.
    associations : int
        How many requests it may be sent at a time.
    now : callable
        The time in seconds, of any clock that does not go backwards.
    lot : callable, optional
        What a wait is multiplied with.
    heard : callable, optional
        Told what changes, after it has.
    """

    def __init__(
        self,
        waits: Sequence[float],
        associations: int,
        *,
        now: Callable[[], float],
        lot: Callable[[], float] = _lot,
        heard: Heard | None = None,
    ) -> None:
        self.now = now
        self.disabled_for: str | None = None
        """The reason code, where the node is left alone until a person has acted."""
        self.worked = False
        """Whether the node has done anything for this run yet."""
        self._waits = tuple(waits)
        self._lot = lot
        self._lock = threading.Lock()
        self._heard = heard
        self._news: list[tuple[str, str | None, Mapping[str, int | float]]] = []
        self._failures = 0
        self._failed_at: float | None = None
        self._not_before = now()
        self._waiting_for: str | None = None
        self._probing = False
        self._probed = False
        self._turn: int | None = None
        """The thread that may ask while the breaker is half-open."""
        self.has_delivered = False
        """Whether anything has ever arrived from it in this run."""
        self._mute: set[StudyReference] = set()
        self._failed_queries = 0
        # How much at a time: never more than the most; of late not more than the ceiling; and
        # after a failure one, and then one more with each success.
        self._most = self._ceiling = self._width = associations
        self._strained_at = now()
        self._strained_for: str | None = None
        self._lately = {kind: deque(maxlen=_LATELY) for kind in RequestKind}
        self._took = {kind: deque(maxlen=_USUAL_OF) for kind in RequestKind}

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock; tell what has changed when it is free again."""
        with self._lock:
            yield
            news, self._news = self._news, []
        if self._heard is not None:
            for one in news:
                self._heard(*one)

    # --- what may be done

    @property
    def associations(self) -> int:
        """How many requests may be under way: one after a failure, then one more at a time."""
        return self._width

    @property
    def most(self) -> int:
        """How many may be under way when nothing is wrong."""
        return self._most

    @property
    def ceiling(self) -> int:
        """How many may be under way as it stood strain of late."""
        return self._ceiling

    @property
    def strained_for(self) -> str | None:
        """The reason code for which it is asked for less at a time, while it is."""
        return self._strained_for

    def seconds_left(self) -> float:
        """How long the node is still to be left alone."""
        return max(0.0, self._not_before - self.now())

    @property
    def waiting_for(self) -> str | None:
        """The reason code of the wait, while there is one that a failure has brought about."""
        return self._waiting_for if self.seconds_left() else None

    @property
    def state(self) -> BreakerState:
        """Whether the node may be asked by all, by one, by none now, or by none any more."""
        if self.disabled_for:
            return BreakerState.DISABLED
        if not self._failures:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if self._probed else BreakerState.OPEN

    def begin_probe(self) -> bool:
        """Whether the caller is to probe the node now; then it calls :meth:`end_probe`."""
        with self._lock:
            if self.state is not BreakerState.OPEN or self._probing or self.seconds_left():
                return False
            self._probing = True
            return True

    def end_probe(self, *, answered: bool) -> None:
        """The probe is over; where it failed, :meth:`record_failure` was told as well."""
        with self._lock:
            self._probing = False
            self._probed = answered and bool(self._failures)

    def try_acquire(self) -> bool:
        """Whether this thread may ask now. While the breaker is half-open, one at a time may."""
        with self._lock:
            if self.state is BreakerState.CLOSED:
                return True
            own = threading.get_ident()
            if self.state is not BreakerState.HALF_OPEN or self._turn not in (None, own):
                return False
            self._turn = own
            return True

    def release(self) -> None:
        """This thread asks no more: the next one may, if it had the turn."""
        with self._lock:
            if self._turn == threading.get_ident():
                self._turn = None

    # --- what has happened

    def record_failure(self, code: str, asked_at: float) -> None:
        """The node cannot be used, or not now; ``asked_at`` is when it was asked what failed.

        What was asked before the last failure failed with it, and counts once.
        """
        with self._changing():
            if self.disabled_for or (self._failed_at is not None and asked_at < self._failed_at):
                return
            self._failed_at = self.now()
            self._failures += 1
            self._probed, self._turn = False, None
            if code == "pacs-busy":
                self._narrow(code)
            self._width = 1
            reason, most = reason_for(code), len(self._waits) + 1
            transient = reason.disposition is Disposition.TRANSIENT
            if not (transient and (self.worked or reason.transient_before_success)):
                most = min(reason.disables_node_after, most)
            if self._failures >= most:
                self._disable(code)
            else:
                self._wait(self._waits[self._failures - 1], code)
                figures = {"failures": self._failures, "seconds": round(self.seconds_left(), 1)}
                self._news.append(("breaker.opened", code, figures))

    def delay_next_pass(self, passes: int) -> bool:
        """Leave the node alone after so many passes over the cohort; False after the last."""
        with self._lock:
            if self.disabled_for or passes > len(self._waits):
                return False
            self._wait(self._waits[passes - 1], None)
            return True

    def _wait(self, seconds: float, code: str | None) -> None:
        self._not_before = max(self._not_before, self.now() + seconds * self._lot())
        self._waiting_for = code

    def _disable(self, code: str) -> None:
        self.disabled_for = code
        self._news.append(("node.disabled", code, {}))

    def record_answer(self) -> None:
        """A query was answered."""
        with self._lock:
            self._failed_queries = 0

    def record_failed_query(self) -> None:
        """A query failed for a reason that may be its own; ten in a row are the node's."""
        with self._changing():
            self._failed_queries += 1
            if self._failed_queries >= _FAILED_QUERIES and not self.disabled_for:
                self._disable("requests-keep-failing")

    def record_success(self) -> None:
        """Something was done that need not be done again: the failures before it are over.

        Not those of a wait that goes on: it was asked for before them.
        """
        with self._changing():
            self.worked = True
            self._failed_queries = 0
            if self._failures and self.seconds_left():
                return
            if self._failures:
                self._news.append(("breaker.closed", None, {"failures": self._failures}))
            self._failures, self._probed, self._turn = 0, False, None
            self._ease()
            self._width = min(self._ceiling, self._width + 1)

    def record_delivery(self) -> None:
        """Objects have arrived, so the way from the node to here is open."""
        self.record_success()
        with self._lock:
            self.has_delivered = True
            self._mute.clear()

    def record_nothing_sent(self, study: StudyReference, code: str) -> None:
        """The node lists the study, and was asked for it, and nothing came; it said why.

        Some studies lie damaged on their PACS; but after three of them with nothing before, or
        ten in a row after others, it is the way to here that is closed.
        """
        with self._changing():
            self._mute.add(study)
            most = _MUTE_STUDIES_AFTER_OTHERS if self.has_delivered else _MUTE_STUDIES
            if len(self._mute) >= most and not self.disabled_for:
                for_a_person = reason_for(code).disposition is Disposition.OPERATOR
                self._disable(code if for_a_person else "node-sends-nothing")

    # --- how much at a time

    def record_latency(self, kind: RequestKind, seconds: float, about: Hashable = None) -> None:
        """A request took so long to begin: until its first answer, or its first object.

        ``about`` is the study, or the row, where it was about one.
        """
        with self._changing():
            before = self._took[kind]
            usual = statistics.median(before) if len(before) >= _USUAL_FROM else math.inf
            before.append(seconds)
            slow = seconds >= max(_SLOW_SECONDS, _SLOW_TIMES * usual)
            self._note(kind, "pacs-slow" if slow else None, about)

    def record_strain(self, kind: RequestKind, code: str, about: Hashable = None) -> None:
        """A request ended as it does where too much is asked at a time; or for the study's fault.

        Which of the two is told by whether it happens to several studies.
        """
        with self._changing():
            self._note(kind, code, about)

    def _note(self, kind: RequestKind, code: str | None, about: Hashable) -> None:
        lately = self._lately[kind]
        lately.append((code, about))
        if code is None:
            return
        signs = [who for sign, who in lately if sign is not None]
        if len({who for who in signs if who is not None}) + signs.count(None) >= _SIGNS:
            self._narrow(code)

    def _narrow(self, code: str) -> None:
        """Ask for half as much at a time."""
        for lately in self._lately.values():
            lately.clear()
        self._strained_at = self.now()
        before = self._ceiling
        self._ceiling = max(1, min(self._ceiling, self._width) // 2)
        self._width = min(self._width, self._ceiling)
        if self._ceiling < before:
            self._strained_for = code
            self._news.append(("node.narrowed", code, {"associations": self._ceiling}))

    def _ease(self) -> None:
        """Ask for one more at a time, where that has been less, and not of late."""
        if self._ceiling == self._most or self.now() - self._strained_at < EASE_SECONDS:
            return
        self._strained_at = self.now()
        self._ceiling += 1
        if self._ceiling == self._most:
            self._strained_for = None
        self._news.append(("node.widened", None, {"associations": self._ceiling}))
