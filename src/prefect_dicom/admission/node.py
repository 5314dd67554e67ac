"""Admission of one PACS node: circuit breaker, concurrency limit and health signals together."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

from prefect_dicom.admission.circuit_breaker import BreakerState, CircuitBreaker, random_jitter
from prefect_dicom.admission.concurrency_limit import ConcurrencyLimit
from prefect_dicom.admission.health import HealthSignals, RequestKind
from prefect_dicom.core.model import Disposition, RetrieveMethod, StudyReference
from prefect_dicom.core.reasons import reason_for

ChangeListener = Callable[[str, str | None, Mapping[str, int | float]], None]
"""Called with the name of an event, its reason code and its figures."""


class NodeAdmission:
    """Whether requests may be sent to one PACS node, and how many at a time. Thread-safe.

    A run has one for each node, used by discovery and retrieval alike: what one thread learns of
    the node spares the others the same. It makes no request and waits for nothing itself.

    Parameters
    ----------
    retry_after_seconds : sequence of float
        Wait of the node after the first, second, … failure in a row.
    associations : int
        Requests that may be under way when nothing is wrong.
    now : callable
        Monotonic time in seconds.
    jitter : callable, optional
        Factor by which each wait is multiplied.
    on_change : callable, optional
        Listener to changes of breaker and limit, called without the lock.
    """

    def __init__(
        self,
        retry_after_seconds: Sequence[float],
        associations: int,
        *,
        now: Callable[[], float],
        jitter: Callable[[], float] = random_jitter,
        on_change: ChangeListener | None = None,
    ) -> None:
        self.now = now
        self._breaker = CircuitBreaker(retry_after_seconds, now=now, jitter=jitter)
        self._limit = ConcurrencyLimit(associations, now=now)
        self._health = HealthSignals()
        self._on_change = on_change
        self._lock = threading.Lock()
        self._changes: list[tuple[str, str | None, Mapping[str, int | float]]] = []

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock; publish the changes when it is free again."""
        with self._lock:
            yield
            changes, self._changes = self._changes, []
        if self._on_change is not None:
            for change in changes:
                self._on_change(*change)

    # --- what holds now

    @property
    def state(self) -> BreakerState:
        """State of the circuit breaker."""
        return self._breaker.state

    @property
    def disabled_for(self) -> str | None:
        """Reason code for which the node is disabled until a person has acted, or None."""
        return self._breaker.disabled_for

    def seconds_left(self) -> float:
        """Seconds for which the node is still waiting."""
        return self._breaker.seconds_left()

    @property
    def waiting_for(self) -> str | None:
        """Reason code of the current wait, or None where no failure has caused one."""
        return self._breaker.waiting_for

    @property
    def associations(self) -> int:
        """Requests that may be under way now: one after a failure, then one more at a time."""
        return self._limit.width

    @property
    def ceiling(self) -> int:
        """Requests that may be under way as the node has stood strain of late."""
        return self._limit.ceiling

    @property
    def most(self) -> int:
        """Requests that may be under way when nothing is wrong."""
        return self._limit.most

    @property
    def strained_for(self) -> str | None:
        """Reason code for which the ceiling is lowered, or None."""
        return self._limit.strained_for

    @property
    def has_delivered(self) -> bool:
        """Whether any instance has arrived from the node in this run."""
        return self._health.has_delivered

    # --- permits

    def begin_probe(self) -> bool:
        """Take the probe, if one is due; the caller then calls :meth:`end_probe`."""
        with self._lock:
            return self._breaker.begin_probe()

    def end_probe(self, *, answered: bool) -> None:
        """End the probe; where it failed, :meth:`record_failure` was called before."""
        with self._lock:
            self._breaker.end_probe(answered=answered)

    def try_acquire(self) -> bool:
        """Take the permit of this thread to send requests, if it may now.

        While the breaker is half-open, one thread at a time has it.
        """
        with self._lock:
            return self._breaker.try_acquire()

    def release(self) -> None:
        """Give the permit back, if this thread has it."""
        with self._lock:
            self._breaker.release()

    def delay_next_pass(self, passes: int) -> bool:
        """Wait before the next pass over the cohort; returns False after the last wait."""
        with self._lock:
            return self._breaker.delay_next_pass(passes)

    # --- results of requests

    def record_failure(
        self, code: str, requested_at: float, retry_after_seconds: float | None = None
    ) -> None:
        """Open or disable the breaker: the node cannot be used, or not now.

        Parameters
        ----------
        code : str
            Reason code.
        requested_at : float
            When the failed request was sent. What was sent before the last failure failed with
            it, and counts once.
        retry_after_seconds : float, optional
            How long the node itself asks to be left alone; no shorter wait follows.
        """
        with self._changing():
            if not self._breaker.counts(requested_at):
                return
            if code == "pacs-busy":
                self._decrease(code)
            self._limit.collapse()
            self._breaker.record_failure(
                code, has_worked=self._health.has_worked, at_least=retry_after_seconds or 0.0
            )
            if self._breaker.disabled_for:
                self._changes.append(("node.disabled", code, {}))
            else:
                seconds = round(self._breaker.seconds_left(), 1)
                figures = {"failures": self._breaker.failures, "seconds": seconds}
                self._changes.append(("breaker.opened", code, figures))

    def record_success(self) -> None:
        """Close the breaker and widen the limit: a request did what need not be repeated.

        The breaker of a wait that goes on stays open: the request was sent before the failure.
        """
        with self._changing():
            self._health.record_success()
            if self._breaker.failures and self._breaker.seconds_left():
                return
            if failures := self._breaker.close():
                self._changes.append(("breaker.closed", None, {"failures": failures}))
            if self._limit.increase():
                figures = {"associations": self._limit.ceiling}
                self._changes.append(("node.widened", None, figures))

    def record_answer(self) -> None:
        """A query was answered."""
        with self._lock:
            self._health.record_answer()

    def record_failed_query(self) -> None:
        """A query failed for a reason that may be its own; ten in a row disable the node."""
        with self._changing():
            if self._health.record_failed_query():
                self._disable("requests-keep-failing")

    def record_delivery(self) -> None:
        """Instances have arrived."""
        self.record_success()
        with self._lock:
            self._health.record_delivery()

    def record_nothing_sent(
        self, study: StudyReference, code: str, method: RetrieveMethod = RetrieveMethod.C_MOVE
    ) -> None:
        """The node sent nothing of a study it lists; several such studies disable it.

        Parameters
        ----------
        study : int
            Reference of the study.
        code : str
            Reason code of its last request.
        method : RetrieveMethod
            How it was requested: by C-MOVE alone there is a way back that could be closed.
        """
        with self._changing():
            if self._health.record_nothing_sent(study):
                match method:
                    case RetrieveMethod.C_MOVE:
                        general = "node-sends-nothing"
                    case RetrieveMethod.C_GET:
                        general = "c-get-sends-nothing"
                    case RetrieveMethod.WADO_RS:
                        general = "wado-sends-nothing"
                for_a_person = reason_for(code).disposition is Disposition.OPERATOR
                self._disable(code if for_a_person else general)

    def record_latency(self, kind: RequestKind, seconds: float, about: Hashable = None) -> None:
        """Seconds from a request to its first answer or instance.

        Parameters
        ----------
        about : hashable, optional
            The study or row of the request, where it was about one.
        """
        with self._changing():
            slow = self._health.record_latency(kind, seconds)
            self._record_request(kind, "pacs-slow" if slow else None, about)

    def record_strain(self, kind: RequestKind, code: str, about: Hashable = None) -> None:
        """A request ended as requests to an overloaded node do, or because of its study.

        Signs at several studies show that it is the node.
        """
        with self._changing():
            self._record_request(kind, code, about)

    # --- changes

    def _record_request(self, kind: RequestKind, sign: str | None, about: Hashable) -> None:
        if self._health.record_request(kind, sign, about) and sign is not None:
            self._decrease(sign)

    def _decrease(self, code: str) -> None:
        self._health.forget_strain()
        if self._limit.decrease(code):
            self._changes.append(("node.narrowed", code, {"associations": self._limit.ceiling}))

    def _disable(self, code: str) -> None:
        if not self._breaker.disabled_for:
            self._breaker.disable(code)
            self._changes.append(("node.disabled", code, {}))
