"""A run's events as Prefect events: what automations make mails and messages of.

Prefect's client has a queue of its own without end, and takes seconds over each event while the
server is away. So a thread stands between: it takes what there is room for, hands over a few at a
time, and is left behind when the run ends. A run never waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any

from prefect.events import emit_event
from prefect.events.worker import EventsWorker

from prefect_dicom.core.events import Event
from prefect_dicom.core.reasons import REASONS
from prefect_dicom.ledger import Cohort
from prefect_dicom.run.run import DryRun

log = logging.getLogger(__name__)

PREFIX = "prefect-dicom"
_MOST_WAITING = 2000
_AT_A_TIME = 5
"""Events that Prefect's client may hold: as many as it is worth waiting for at the end."""
_END_SECONDS = 5.0


@contextlib.contextmanager
def events_to_prefect(run: DryRun) -> Iterator[None]:
    """Forward the events of a run to Prefect, until the block ends."""
    forwarder = _Forwarder(run.cohort)
    run.events.subscribe(forwarder.take)
    try:
        yield
    finally:
        run.events.unsubscribe(forwarder.take)
        forwarder.end()


class _Forwarder:
    """Takes events at once, and passes them on from a thread of its own."""

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
        """Keep an event for the thread, where there is room."""
        try:
            self._waiting.put_nowait(event)
        except queue.Full:
            self._lost += 1

    def end(self) -> None:
        """Give the thread a moment for what waits; the rest is lost."""
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


def prefect_event(event: Event, cohort: Cohort) -> dict[str, Any]:
    """The arguments of Prefect's ``emit_event``.

    The event concerns the study, else the node, else the cohort; the others are related to it.
    The payload has the reason, with what it means and what to do, and the figures.
    """
    of_cohort = {
        "prefect.resource.id": f"{PREFIX}.cohort.{cohort.number}",
        "prefect.resource.name": cohort.name,
    }
    resources = [of_cohort | {"prefect.resource.role": "cohort"}]
    payload: dict[str, Any] = {"cohort": cohort.name, **event.figures}
    if event.node is not None:
        node = f"{PREFIX}.node.{event.node}"
        resources.insert(0, {"prefect.resource.id": node, "prefect.resource.role": "node"})
        payload["node"] = event.node
    if event.reference is not None:
        study = f"{PREFIX}.study.{event.reference}"
        resources.insert(0, {"prefect.resource.id": study, "prefect.resource.role": "study"})
        payload["study"] = event.reference
    if event.reason is not None:
        reason = REASONS[event.reason]
        payload |= {"reason": reason.code, "meaning": reason.meaning, "advice": reason.what_to_do}
    return {
        "event": f"{PREFIX}.{event.name}",
        "occurred": event.at,
        "resource": resources[0],
        "related": resources[1:],
        "payload": payload,
    }
