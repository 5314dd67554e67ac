"""Circuit breaker of one PACS node: closed, open, half-open or disabled.

The states of the literature, and one more: a breaker that is *disabled* does not close by itself,
because a person has to act first.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from enum import StrEnum

from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons import reason_for

JITTER = 0.2
"""Waits are longer or shorter by up to this part: runs that failed together do not return so."""


class BreakerState(StrEnum):
    """Who may send requests to a node."""

    CLOSED = "closed"
    """All threads."""
    HALF_OPEN = "half-open"
    """One thread at a time, until a request has succeeded."""
    OPEN = "open"
    """Nobody now."""
    DISABLED = "disabled"
    """Nobody before a person has acted."""


def random_jitter() -> float:
    """Factor of a wait, between 1 - :data:`JITTER` and 1 + :data:`JITTER`."""
    return random.uniform(1 - JITTER, 1 + JITTER)


class CircuitBreaker:
    """Circuit breaker with growing waits; guarded by the lock of its :class:`NodeAdmission`.

    A node that fails for a transient reason is waiting for the first of the waits, then for the
    second, and so on. After a wait one caller probes the node (:meth:`begin_probe`) with the
    request that costs it least. When the probe was answered, one thread at a time may send
    requests (:meth:`try_acquire`) until one has succeeded. A node that fails once more after the
    last wait, or for a reason that a person has to act on, is disabled.

    Parameters
    ----------
    retry_after_seconds : sequence of float
        Wait after the first, second, … failure in a row.
    now : callable
        Monotonic time in seconds.
    jitter : callable
        Factor by which each wait is multiplied.
    """

    def __init__(
        self,
        retry_after_seconds: Sequence[float],
        *,
        now: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        self.disabled_for: str | None = None
        """Reason code for which the breaker is disabled, or None."""
        self.failures = 0
        """Failures in a row."""
        self._retry_after_seconds = tuple(retry_after_seconds)
        self._now = now
        self._jitter = jitter
        self._failed_at: float | None = None
        self._not_before = now()
        self._waiting_for: str | None = None
        self._probing = False
        self._probed = False
        self._permit: int | None = None
        """The thread that may send requests while the breaker is half-open."""

    # --- queries

    @property
    def state(self) -> BreakerState:
        """The state now."""
        if self.disabled_for:
            return BreakerState.DISABLED
        if not self.failures:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if self._probed else BreakerState.OPEN

    def seconds_left(self) -> float:
        """Seconds for which the node is still waiting."""
        return max(0.0, self._not_before - self._now())

    @property
    def waiting_for(self) -> str | None:
        """Reason code of the current wait, or None where no failure has caused one."""
        return self._waiting_for if self.seconds_left() else None

    def counts(self, requested_at: float) -> bool:
        """Whether the failure of a request of that time is a failure of its own.

        A request that was sent before the last failure failed with it, and counts once.
        """
        if self.disabled_for:
            return False
        return self._failed_at is None or requested_at >= self._failed_at

    # --- permits

    def begin_probe(self) -> bool:
        """Take the probe, if one is due; the caller then calls :meth:`end_probe`."""
        if self.state is not BreakerState.OPEN or self._probing or self.seconds_left():
            return False
        self._probing = True
        return True

    def end_probe(self, *, answered: bool) -> None:
        """End the probe; the caller has recorded a failure before."""
        self._probing = False
        self._probed = answered and bool(self.failures)

    def try_acquire(self) -> bool:
        """Take the permit of this thread to send requests, if it may now."""
        if self.state is BreakerState.CLOSED:
            return True
        thread = threading.get_ident()
        if self.state is not BreakerState.HALF_OPEN or self._permit not in (None, thread):
            return False
        self._permit = thread
        return True

    def release(self) -> None:
        """Give the permit back, if this thread has it."""
        if self._permit == threading.get_ident():
            self._permit = None

    # --- transitions

    def record_failure(self, code: str, *, has_worked: bool, at_least: float = 0.0) -> None:
        """Open the breaker after a failure that :meth:`counts`, or disable it.

        Parameters
        ----------
        code : str
            Reason code of the failure.
        has_worked : bool
            Whether the node has done anything for this run yet.
        at_least : float
            Seconds that the node itself asks to be left alone; the wait is no shorter.
        """
        self._failed_at = self._now()
        self.failures += 1
        self._probed, self._permit = False, None
        reason = reason_for(code)
        attempts = len(self._retry_after_seconds) + 1
        transient = reason.disposition is Disposition.TRANSIENT
        if not transient or not (has_worked or reason.transient_before_success):
            attempts = min(reason.disables_node_after, attempts)
        if self.failures >= attempts:
            self.disable(code)
        else:
            self._wait(self._retry_after_seconds[self.failures - 1], code, at_least)

    def disable(self, code: str) -> None:
        """Send no further request before a person has acted."""
        self.disabled_for = code

    def close(self) -> int:
        """Close the breaker after a success; returns the number of failures before it."""
        failures, self.failures = self.failures, 0
        self._probed, self._permit = False, None
        return failures

    def delay_next_pass(self, passes: int) -> bool:
        """Wait before the next pass over the cohort; returns False after the last wait."""
        if self.disabled_for or passes > len(self._retry_after_seconds):
            return False
        self._wait(self._retry_after_seconds[passes - 1], None)
        return True

    def _wait(self, seconds: float, code: str | None, at_least: float = 0.0) -> None:
        # Jitter makes no wait shorter than the node has asked for.
        wait = max(seconds * self._jitter(), at_least)
        self._not_before = max(self._not_before, self._now() + wait)
        self._waiting_for = code
