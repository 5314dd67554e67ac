"""Clock of a run: all reading of the time and all waiting, so that tests can simulate a week."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime


class Clock:
    """Time of this machine. A run reads the time and waits through one of these alone.

    Time limits of sockets are not among them: a network has its own time.
    """

    look_seconds = 1.0
    """Longest time that a wait goes without checking whether it is still needed."""

    def now(self) -> datetime:
        """The current time, with its time zone."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds that never go backwards."""
        return time.monotonic()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait until the event is set, at most so many seconds. Returns whether it is set."""
        return event.wait(seconds)

    def shared(self) -> float | None:
        """Seconds of a clock that several hosts share; None: the ledger's own clock."""
        return None
