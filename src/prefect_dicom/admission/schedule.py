"""Access schedules of the nodes as a run applies them: what is in force now, and until when."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

from prefect_dicom.config.access_schedule import (
    AccessSchedule,
    RateLimits,
    ScheduleState,
    format_schedule_state,
    format_time,
    schedule_state,
)
from prefect_dicom.config.site import Site
from prefect_dicom.core.clock import Clock
from prefect_dicom.core.errors import WindowClosed
from prefect_dicom.core.events import Event

UNLIMITED = RateLimits()
_CANCEL_SECONDS = 3.0
"""Time a cancelled request takes to end: it is cancelled within a second, and has two to end."""


class NodeSchedules:
    """The schedule in force at each node. Thread-safe.

    Parameters
    ----------
    on_event : callable
        Receives an event when a node is first found closed, and when its schedule changes.
    """

    def __init__(self, site: Site, clock: Clock, on_event: Callable[[Event], None]) -> None:
        self._site = site
        self._clock = clock
        self._on_event = on_event
        self._lock = threading.Lock()
        self._states: dict[str, ScheduleState] = {}

    def state(self, node: str) -> ScheduleState:
        """What is in force at a node now; a change since the last call is published once."""
        schedule = self._site.nodes[node].access_schedule
        if schedule is None:
            return ScheduleState(UNLIMITED, None)
        now = self._clock.now()
        with self._lock:
            known = self._states.get(node)
            if known is not None and (known.until is None or now < known.until):
                return known
            state = self._states[node] = schedule_state(schedule, now)
        if known is not None or state.closed:
            self._publish(node, state)
        return state

    def _publish(self, node: str, state: ScheduleState) -> None:
        now = self._clock.now()
        figures: dict[str, float] = {"associations": self.associations(node)}
        if state.until is not None:
            figures["seconds"] = (state.until - now).total_seconds()
        name = "window.closed" if state.closed else "window.opened"
        reason = "window-closed" if state.closed else None
        self._on_event(Event(name=name, at=now, node=node, reason=reason, figures=figures))

    def associations(self, node: str) -> int:
        """Associations that all runs together may have open now; 0 while the node is closed."""
        most = self._site.effective_node(node).limits.associations
        rate_limits = self.state(node).rate_limits
        return 0 if rate_limits is None else min(most, rate_limits.associations or most)

    def check(self, node: str) -> None:
        """Pass if requests may be sent to the node at this time.

        Raises
        ------
        WindowClosed
            They may not; its text says when the next window opens.
        """
        schedule, state = self._site.nodes[node].access_schedule, self.state(node)
        if schedule is not None and state.closed:
            raise WindowClosed(detail=f"node {node}: {self._format_opening(schedule, state)}")

    def _format_opening(self, schedule: AccessSchedule, state: ScheduleState) -> str:
        if state.until is None:
            return "no window opens any more"
        opening = format_time(state.until, schedule, self._clock.now())
        return f"the next window opens at {opening} ({schedule.time_zone})"

    def is_over(self, node: str) -> bool:
        """Whether a request under way is to be cancelled: window and grace have ended."""
        schedule, state = self._site.nodes[node].access_schedule, self.state(node)
        if schedule is None or not state.closed:
            return False
        grace = max(0.0, schedule.grace_seconds - _CANCEL_SECONDS)
        # Closed all the while, if it was closed when the grace began.
        return schedule_state(schedule, self._clock.now() - timedelta(seconds=grace)).closed

    def waits_for_opening(self, node: str) -> bool:
        """Whether the node is closed, will open again, and runs are to wait for that."""
        schedule, state = self._site.nodes[node].access_schedule, self.state(node)
        if schedule is None or not state.closed or state.until is None:
            return False
        return schedule.on_close == "wait"

    def seconds_closed(self, node: str) -> float:
        """Seconds until a closed node opens; 0 for one that is open or never opens again."""
        state = self.state(node)
        return (self.seconds_in_force(node) or 0.0) if state.closed else 0.0

    def seconds_in_force(self, node: str) -> float | None:
        """Seconds until something else is in force at the node; None if that never happens."""
        until = self.state(node).until
        return None if until is None else max(0.0, (until - self._clock.now()).total_seconds())

    def format(self, node: str) -> str:
        """What is in force at a node, for people; empty for one without a schedule."""
        schedule = self._site.nodes[node].access_schedule
        if schedule is None:
            return ""
        most = self._site.effective_node(node).limits.associations
        return f"node {node}: {format_schedule_state(schedule, self._clock.now(), most)}"
