"""A run's events as Prefect events, which trigger automations.

Prefect's client has an unbounded queue, and needs seconds for each event while the server is
unreachable. So a thread with a bounded queue forwards the events, a few at a time, and drops the
rest: a run waits for it a few seconds at its end, and never before.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Iterator
from contextvars import copy_context

from prefect.events import emit_event
from prefect.events.worker import EventsWorker

from prefect_dicom.core.events import Event
from prefect_dicom.ledger import Cohort
from prefect_dicom.run.artifacts import prefect_event
from prefect_dicom.run.control import ControlledRun

log = logging.getLogger(__name__)

_MOST_WAITING = 2000
_AT_A_TIME = 5
"""Events in the queue of Prefect's client: few enough to wait for at the end."""
_END_SECONDS = 5.0


@contextlib.contextmanager
def events_to_prefect(run: ControlledRun) -> Iterator[None]:
    """Forward the events of a run to Prefect, until the block ends."""
    forwarder = _Forwarder(run.cohort)
    run.events.subscribe(forwarder.take)
    try:
        yield
    finally:
        run.events.unsubscribe(forwarder.take)
        forwarder.end()


class _Forwarder:
    """Queues events without blocking, and forwards them from a thread of its own."""

    def __init__(self, cohort: Cohort) -> None:
        self._cohort = cohort
        self._waiting: queue.Queue[Event | None] = queue.Queue(_MOST_WAITING)
        self._over = threading.Event()
        self._lost = 0
        # With the context, so that Prefect finds the flow run that an event belongs to.
        in_context = copy_context().run
        self._thread = threading.Thread(
            target=in_context, args=(self._forward,), name="events", daemon=True
        )
        self._thread.start()

    def take(self, event: Event) -> None:
        """Queue an event; a full queue drops it."""
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self._lost += 1

    def end(self) -> None:
        """Let the thread forward queued events for a few seconds; the rest is dropped."""
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(_END_SECONDS)
        self._over.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._lost += self._waiting.get_nowait() is not None
        if lost := self._lost:
            log.warning("%d events did not reach Prefect", lost)

    def _forward(self) -> None:
        handed_over = 0
        while not self._over.is_set() and (event := self._waiting.get()) is not None:
            with contextlib.suppress(Exception):
                emit_event(**prefect_event(event, self._cohort))
                handed_over += 1
                if handed_over % _AT_A_TIME == 0:
                    EventsWorker.instance().wait_until_empty()
