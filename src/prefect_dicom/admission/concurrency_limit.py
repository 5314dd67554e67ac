"""Concurrency limit of one PACS node: additive increase, multiplicative decrease (AIMD)."""

from __future__ import annotations

from collections.abc import Callable

EASE_SECONDS = 300.0
"""After so long without strain the ceiling of a strained node rises by one."""


class ConcurrencyLimit:
    """How many requests may be under way at a node; guarded by the lock of its admission.

    Strain halves the *ceiling*; each :data:`EASE_SECONDS` without strain raises it by one, up to
    the *most* that the site file allows. The *width* is what may be under way now: after a failure
    one request, then one more with each success, up to the ceiling.

    Parameters
    ----------
    most : int
        Requests that may be under way when nothing is wrong.
    now : callable
        Monotonic time in seconds.
    """

    def __init__(self, most: int, *, now: Callable[[], float]) -> None:
        self.most = most
        self.ceiling = most
        self.width = most
        self.strained_for: str | None = None
        """Reason code for which the ceiling is below the most, or None."""
        self._now = now
        self._strained_at = now()

    def decrease(self, code: str) -> bool:
        """Halve the ceiling after strain; returns whether it is lower now."""
        self._strained_at = self._now()
        before = self.ceiling
        self.ceiling = max(1, min(self.ceiling, self.width) // 2)
        self.width = min(self.width, self.ceiling)
        if self.ceiling == before:
            return False
        self.strained_for = code
        return True

    def collapse(self) -> None:
        """Let one request be under way after a failure."""
        self.width = 1

    def increase(self) -> bool:
        """Widen by one after a success, and ease the ceiling; returns whether that is higher."""
        eased = self._ease()
        self.width = min(self.ceiling, self.width + 1)
        return eased

    def _ease(self) -> bool:
        if self.ceiling == self.most or self._now() - self._strained_at < EASE_SECONDS:
            return False
        self._strained_at = self._now()
        self.ceiling += 1
        if self.ceiling == self.most:
            self.strained_for = None
        return True
