"""Run control: pause, resume and cancel a run that is under way.

People request a state of a run in the ledger (``pause``, ``resume``, ``cancel``), on whatever host
it is, and in Prefect's UI. A run looks once a second at most.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Protocol

from prefect_dicom.core.clock import Clock
from prefect_dicom.core.errors import Interrupted, LedgerError
from prefect_dicom.core.events import EventBus
from prefect_dicom.core.model import Chunk, RequestedState
from prefect_dicom.ledger import Cohort, Ledger
from prefect_dicom.ledger import Run as RunRecord

_LOOK_SECONDS = 1.0
_PRECEDENCE = list(RequestedState)


class ControlledRun(Protocol):
    """A run that follows the state that is requested of it, and publishes what happens in it."""

    @property
    def cohort(self) -> Cohort:
        """The cohort it works on."""

    @property
    def control(self) -> RunControl:
        """The state that is requested of it."""

    @property
    def events(self) -> EventBus:
        """What it publishes."""


class DeliveringRun(ControlledRun, Protocol):
    """A run that delivers studies to another node."""

    def deliver(self, chunk: Chunk) -> str:
        """Deliver the studies of a chunk. Returns what the final state of this step says."""


class RunControl:
    """The state that is requested of a run, and the waits that end when it changes. Thread-safe.

    Parameters
    ----------
    ledger : Ledger
        Where people request it.
    record : ledger.Run
        The run, as the ledger knows it.
    clock : Clock
        How the run waits.
    """

    def __init__(self, ledger: Ledger, record: RunRecord, clock: Clock) -> None:
        self.stop = threading.Event()
        """Set where this process ends the run; wakes everything that waits."""
        self.external_state: Callable[[], RequestedState] = lambda: RequestedState.RUNNING
        """The state that is requested in Prefect's UI."""
        self._ledger = ledger
        self._record = record
        self._clock = clock
        self._lock = threading.Lock()
        self._ledger_state = RequestedState.RUNNING
        self._look_at = float("-inf")

    def requested_state(self) -> RequestedState:
        """The requested state; read from the ledger once a second at most."""
        with self._lock:
            if self.stop.is_set():
                return RequestedState.CANCELLED
            if time.monotonic() >= self._look_at:
                # A ledger that is away fails what has to be written to it, not this look.
                with contextlib.suppress(LedgerError):
                    self._ledger_state = self._ledger.run_control.requested_state(self._record)
                self._look_at = time.monotonic() + _LOOK_SECONDS
            return max(self._ledger_state, self.external_state(), key=_PRECEDENCE.index)

    def is_stopping(self) -> bool:
        """Whether nothing new may begin, because the run is paused or cancelled."""
        return self.requested_state() is not RequestedState.RUNNING

    def is_cancelled(self) -> bool:
        """Whether the run is to end."""
        return self.requested_state() is RequestedState.CANCELLED

    @property
    def is_paused_in_ledger(self) -> bool:
        """Whether ``prefect-dicom resume`` ends the pause, and not Prefect's UI."""
        return self._ledger_state is RequestedState.PAUSED

    def check(self) -> None:
        """Raise :class:`Interrupted` where the run is paused or cancelled."""
        if self.is_stopping():
            raise Interrupted()

    def sleep(self, seconds: float) -> bool:
        """Wait; False, and earlier, where the run is paused or cancelled meanwhile."""
        until = self._clock.monotonic() + seconds
        while not self.is_stopping():
            if (left := until - self._clock.monotonic()) <= 0:
                return True
            self._clock.wait(self.stop, min(left, _LOOK_SECONDS))
        return False

    def wait_while_paused(self, look: Callable[[], None]) -> bool:
        """Wait until the run is resumed or cancelled; whether it is resumed.

        Parameters
        ----------
        look : callable
            Called every second.
        """
        self._ledger.run_control.record_paused(self._record, True)
        while self.requested_state() is RequestedState.PAUSED:
            look()
            self._clock.wait(self.stop, _LOOK_SECONDS)
        self._ledger.run_control.record_paused(self._record, False)
        return self.requested_state() is RequestedState.RUNNING
