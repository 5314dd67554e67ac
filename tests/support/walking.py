"""A clock for runs of which a test says how fast it goes."""

from __future__ import annotations

import threading

from prefect_dicom.core.clock import Clock


class Walk(Clock):
    """Time that passes when the test says so, and where the run waits."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds

    def wait(self, event: threading.Event, seconds: float) -> bool:
        # A thread in the background only looks around: the run does not wait for it.
        if not threading.current_thread().daemon:
            self.seconds += seconds
        # Others are to have their turn as well.
        return event.wait(0.001)
