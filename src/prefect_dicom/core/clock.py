"""The time a run goes by: one seam, so that a week of nights can be lived through in a minute."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime


class Clock:
    """The time of this machine. What waits or looks at the time in a run does it by one of these.

    Waiting for bytes on a socket is not among it: a network has its own time.
    """

    look_seconds = 1.0
    """How long a wait goes without a look at whether it is still called for."""

    def now(self) -> datetime:
        """The moment, aware of its zone."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds that never go backwards."""
        return time.monotonic()

    def wait(self, event: threading.Event, seconds: float) -> bool:
        """Wait until the event is set, and no longer than so many seconds; whether it is set."""
        return event.wait(seconds)

    def shared(self) -> float | None:
        """Seconds by which the runs of several hosts agree; None: the ledger's own."""
        return None
