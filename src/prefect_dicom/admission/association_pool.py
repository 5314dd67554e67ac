"""Whose turn it is to ask a node: associations, windows and what is spent, run by run and together.

An association is open only while the run has a place at its node (``ledger/shares.py``), so that
all runs of a ledger together open no more than the node's limits and its windows allow. It stays
open for the next borrower as long as no other run waits for a place. A run that is alone pays one
write for each association, and two for each request where the node's windows meter more than
associations.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

from prefect_dicom.config.access_schedule import (
    RateLimits,
    ScheduleState,
    format_schedule_state,
    format_time,
    schedule_state,
)
from prefect_dicom.config.site import Site
from prefect_dicom.core.clock import Clock
from prefect_dicom.core.errors import Interrupted, LedgerError, PacsError, WindowClosed
from prefect_dicom.core.events import Event
from prefect_dicom.ledger import Ledger, Run, Usage
from prefect_dicom.network.requestor import Requestor

_UNLIMITED = RateLimits()
_IDLE_SECONDS = 15.0
"""An association that nobody wants for so long is released."""
_TURN_SECONDS = 10.0
"""How long a run has an association for itself while another waits for one."""
_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS = 0.05, 1.0
_KEEP_SECONDS = 2.0
"""An association stays open through a wait that is no longer."""
_CANCEL_SECONDS = 3.0
"""What a request takes to end that has been cancelled: it is told a second later, and has two."""
_ENOUGH_OBJECTS = 50
"""For a mean of their sizes."""


@dataclass(slots=True)
class Spent:
    """What a request brought; filled in by who sent it."""

    objects: int = 0
    size_bytes: int = 0


@dataclass(slots=True, eq=False)
class _Lent:
    """A requestor, and the place of its association."""

    node: str
    requestor: Requestor
    place: int | None = None
    places: int = 0
    """How many there were when the place was last looked at."""
    since: float = 0.0
    looked_at: float = 0.0


@dataclass(slots=True)
class _Node:
    """What a run knows of a node's turns."""

    state: ScheduleState | None = None
    idle: list[_Lent] = field(default_factory=list)
    objects: int = 0
    size_bytes: int = 0


class AssociationPool:
    """When this run may ask which node, over how many associations. Thread-safe.

    Parameters
    ----------
    time : Clock
        What time it is.
    stop : threading.Event
        Ends every wait.
    ready : callable
        Raises where the run or its node is not to be gone on with.
    new_requestor : callable
        Makes the requestor of an association more.
    tell : callable
        Told of windows that open and close.
    """

    def __init__(
        self,
        site: Site,
        ledger: Ledger,
        run: Run,
        time: Clock,
        stop: threading.Event,
        *,
        ready: Callable[[str], object],
        new_requestor: Callable[[str], Requestor],
        tell: Callable[[Event], None],
    ) -> None:
        self._site = site
        self._ledger = ledger
        self._run = run
        self._time = time
        self._stop = stop
        self._ready = ready
        self._new_requestor = new_requestor
        self._tell = tell
        self._lock = threading.Lock()
        self._nodes: dict[str, _Node] = defaultdict(_Node)
        self._lent: dict[int, _Lent] = {}
        self._keeper: threading.Thread | None = None

    # --- windows

    def state(self, node: str) -> ScheduleState:
        """What the node's windows say now."""
        schedule = self._site.nodes[node].access_schedule
        if schedule is None:
            return ScheduleState(_UNLIMITED, None)
        now = self._time.now()
        with self._lock:
            known = self._nodes[node].state
            if known is not None and (known.until is None or now < known.until):
                return known
            state = self._nodes[node].state = schedule_state(schedule, now)
        if known is not None or state.closed:
            self._tell_of(node, state)
        return state

    def _tell_of(self, node: str, state: ScheduleState) -> None:
        now = self._time.now()
        figures: dict[str, float] = {"associations": self.associations(node)}
        if state.until is not None:
            figures["seconds"] = (state.until - now).total_seconds()
        name = "window.closed" if state.closed else "window.opened"
        reason = "window-closed" if state.closed else None
        self._tell(Event(name=name, at=now, node=node, reason=reason, figures=figures))

    def associations(self, node: str) -> int:
        """How many associations all runs together may have open now; 0 where none."""
        most = self._site.effective_node(node).limits.associations
        rate_limits = self.state(node).rate_limits
        return 0 if rate_limits is None else min(most, rate_limits.associations or most)

    def check(self, node: str) -> None:
        """Pass, where the node may be asked at this time.

        Raises
        ------
        WindowClosed
            It may not; with when it may.
        """
        state = self.state(node)
        if state.closed:
            raise WindowClosed(detail=f"node {node}: {self._format_closed(node, state)}")

    def _format_closed(self, node: str, state: ScheduleState) -> str:
        schedule = self._site.nodes[node].access_schedule
        if state.until is None:
            return "no window opens any more"
        opening = format_time(state.until, schedule, self._time.now())
        return f"the next window opens at {opening} ({schedule.time_zone})"

    def interruption(self, requestor: Requestor) -> Interrupted:
        """Why what is done with a borrowed requestor ends before its end."""
        with self._lock:
            node = self._lent[id(requestor)].node
        try:
            self.check(node)
        except WindowClosed as closed:
            return closed
        return Interrupted()

    def is_over(self, node: str) -> bool:
        """Whether a request under way is to be cancelled: its window and the grace have ended."""
        state = self.state(node)
        if not state.closed:
            return False
        schedule = self._site.nodes[node].access_schedule
        grace = max(0.0, schedule.grace_seconds - _CANCEL_SECONDS)
        # Closed all the while, if it was closed when the grace began.
        return schedule_state(schedule, self._time.now() - timedelta(seconds=grace)).closed

    def waits_for_opening(self, node: str) -> bool:
        """Whether the node is closed, will open again, and the site has runs wait for that."""
        schedule, state = self._site.nodes[node].access_schedule, self.state(node)
        return state.closed and state.until is not None and schedule.on_close == "wait"

    def seconds_closed(self, node: str) -> float:
        """How long until what holds now is over, where the node is closed; 0 where it is not."""
        state = self.state(node)
        if not state.closed or state.until is None:
            return 0.0
        return max(0.0, (state.until - self._time.now()).total_seconds())

    def format_waits(self, node: str) -> str:
        """What the node's windows say, for people; empty where it has none."""
        schedule = self._site.nodes[node].access_schedule
        if schedule is None:
            return ""
        most = self._site.effective_node(node).limits.associations
        return f"node {node}: {format_schedule_state(schedule, self._time.now(), most)}"

    # --- sizes

    def request_instances(self, node: str) -> int:
        """The most listed instances of a request: those that come in a minute."""
        limits = self._site.effective_node(node).limits
        rate_limits = self.state(node).rate_limits or _UNLIMITED
        bound = rate_limits.request_instances(max(1, int(self._mean_bytes(node))))
        return min(limits.request_instances, bound or limits.request_instances)

    def _mean_bytes(self, node: str) -> float:
        with self._lock:
            seen = self._nodes[node]
            if seen.objects >= _ENOUGH_OBJECTS:
                return seen.size_bytes / seen.objects
        return self._site.nodes[node].limits.instance_bytes

    # --- associations

    @contextlib.contextmanager
    def requestor(self, node: str) -> Iterator[Requestor]:
        """Borrow an association to a node, when there is a place for it.

        Raises
        ------
        WindowClosed
            The node may not be asked at this time.
        """
        lent = self._borrow(node)
        with self._lock:
            self._lent[id(lent.requestor)] = lent
        try:
            yield lent.requestor
        except BaseException:
            self._discard(lent)
            raise
        else:
            with self._lock:
                self._lent.pop(id(lent.requestor), None)
            if lent.place is None or not self._keeps_place(lent):
                self._discard(lent)
                return
            lent.since = self._time.monotonic()
            with self._lock:
                self._nodes[node].idle.append(lent)
            self._keep_watch()

    def _borrow(self, node: str) -> _Lent:
        return self._place(node) or _Lent(node, self._new_requestor(node))

    def _place(self, node: str, requestor: Requestor | None = None) -> _Lent:
        """Wait for a place, or for an association of our own that nobody needs any more."""
        waiting: int | None = None
        seconds = _FIRST_LOOK_SECONDS
        try:
            while True:
                self._ready(node)
                self.check(node)
                with self._lock:
                    idle = self._nodes[node].idle
                    lent = idle.pop() if idle else None
                if lent is not None:
                    if self._keeps_place(lent):
                        break
                    self._discard(lent)
                    continue
                most = self.associations(node)
                number, taken = self._ledger.rate_limits.take_slot(self._run, node, most, waiting)
                if taken:
                    waiting = None
                    lent = _Lent(node, requestor or self._new_requestor(node), number, most)
                    break
                waiting = number
                self._time.wait(self._stop, seconds)
                seconds = min(2 * seconds, self._time.look_seconds)
        finally:
            if waiting is not None:
                with contextlib.suppress(LedgerError):
                    self._ledger.rate_limits.release_slot(waiting)
        lent.since = lent.looked_at = self._time.monotonic()
        return lent

    def release_slot(self, requestor: Requestor) -> None:
        """Close a borrowed association that is going to wait, and give up its place.

        Others may need it, be it to see whether the node works again. The next request has a
        place again.
        """
        with self._lock:
            lent = self._lent.get(id(requestor))
        if lent is not None and lent.place is not None:
            requestor.close()
            self._leave(lent)

    def _keeps_place(self, lent: _Lent) -> bool:
        """Whether an association may stay open; looked up once a second, and when less is allowed.

        One that another run waits for is given up when its turn is over.
        """
        now = self._time.monotonic()
        most = self.associations(lent.node)
        if most == 0:
            return False
        if most >= lent.places and now - lent.looked_at < _LAST_LOOK_SECONDS:
            return True
        lent.looked_at, lent.places = now, most
        keeps, others = self._ledger.rate_limits.check_slot(lent.place, self._run, lent.node, most)
        return keeps and not (others and now - lent.since >= _TURN_SECONDS)

    def _discard(self, lent: _Lent) -> None:
        """Close an association, and give up its place."""
        with self._lock:
            self._lent.pop(id(lent.requestor), None)
        lent.requestor.close()
        self._leave(lent)

    def _leave(self, lent: _Lent) -> None:
        place, lent.place = lent.place, None
        if place is not None:
            # A run that cannot write it loses its place when it ends.
            with contextlib.suppress(LedgerError):
                self._ledger.rate_limits.release_slot(place)

    # --- requests

    @contextlib.contextmanager
    def request(
        self, requestor: Requestor, *, retrieve: bool = False, objects: int = 0
    ) -> Iterator[Spent]:
        """The turn of one request, or of a few queries that belong together.

        Parameters
        ----------
        requestor : Requestor
            A borrowed one.
        retrieve : bool
            It is a C-MOVE or C-GET, which is expected to bring so many ``objects``.

        Raises
        ------
        WindowClosed
            The node may not be asked at this time, or not any more.
        """
        with self._lock:
            lent = self._lent[id(requestor)]
        spent = Spent()
        size = objects * self._mean_bytes(lent.node)
        expected = Usage(float(retrieve), float(objects), size)
        rates = self._admitted(lent, expected)
        try:
            yield spent
        except Interrupted:
            # Because of the window, where that is why.
            self.check(lent.node)
            raise
        finally:
            if rates is not None:
                brought = Usage(float(retrieve), float(spent.objects), float(spent.size_bytes))
                self._ledger.rate_limits.end_request(
                    lent.node, lent.place, rates, expected, brought, self._time.shared()
                )
            with self._lock:
                seen = self._nodes[lent.node]
                seen.objects += spent.objects
                seen.size_bytes += spent.size_bytes

    def _admitted(self, lent: _Lent, expected: Usage) -> Usage | None:
        """Wait for the turn; the rates that it is metered by, if it is."""
        while True:
            self._ready(lent.node)
            self.check(lent.node)
            if lent.place is None:
                self._have_place_again(lent)
            elif not self._keeps_place(lent):
                lent.requestor.close()
                self._leave(lent)
                continue
            rate_limits = self.state(lent.node).rate_limits
            if rate_limits is None or not rate_limits.is_metered:
                return None
            rates = self._rates(lent.node, rate_limits)
            wait = self._ledger.rate_limits.begin_request(
                lent.node, lent.place, rates, expected, self._time.shared()
            )
            if not wait:
                return rates
            if wait > _KEEP_SECONDS:
                lent.requestor.close()
                self._leave(lent)
            self._wait(lent.node, wait)

    def _have_place_again(self, lent: _Lent) -> None:
        other = self._place(lent.node, lent.requestor)
        if other.requestor is not lent.requestor:
            # Our own idle one: its place is what counts.
            other.requestor.close()
        lent.place, lent.places = other.place, other.places
        lent.since, lent.looked_at = other.since, other.looked_at

    def _wait(self, node: str, seconds: float) -> None:
        """Wait; no longer than the window."""
        closes = self.state(node).until
        if closes is not None:
            seconds = min(seconds, (closes - self._time.now()).total_seconds())
        deadline = self._time.monotonic() + seconds
        while (left := deadline - self._time.monotonic()) > 0:
            self._ready(node)
            if self._time.wait(self._stop, min(left, self._time.look_seconds)):
                return

    def _rates(self, node: str, rate_limits: RateLimits) -> Usage:
        busy = rate_limits.utilisation * self.associations(node)
        return Usage(
            None if (a := rate_limits.retrieves_per_minute) is None else a / 60,
            rate_limits.instances_per_second,
            rate_limits.bytes_per_second,
            busy if rate_limits.utilisation < 1 else None,
        )

    # --- around

    def _keep_watch(self) -> None:
        """Let a thread close what stays idle, while anything is."""
        with self._lock:
            if self._keeper is None:
                self._keeper = threading.Thread(target=self._watch, daemon=True, name="idle")
                self._keeper.start()

    def _watch(self) -> None:
        while True:
            if self._time.wait(self._stop, _LAST_LOOK_SECONDS):
                self.close()
            with self._lock:
                known = list(self._nodes)
            for node in known:
                self._release_idle(node)
            with self._lock:
                if not any(known.idle for known in self._nodes.values()):
                    self._keeper = None
                    return

    def _release_idle(self, node: str) -> None:
        now = self._time.monotonic()
        with self._lock:
            idle, self._nodes[node].idle = self._nodes[node].idle, []
        for lent in idle:
            with contextlib.suppress(LedgerError, PacsError):
                if now - lent.since < _IDLE_SECONDS and self._is_unwanted(lent):
                    with self._lock:
                        self._nodes[node].idle.append(lent)
                    continue
            self._discard(lent)

    def _is_unwanted(self, lent: _Lent) -> bool:
        """Whether no other run waits for an idle association's place."""
        most = self.associations(lent.node)
        keeps, others = self._ledger.rate_limits.check_slot(lent.place, self._run, lent.node, most)
        return keeps and not others

    def close(self) -> None:
        """Release all associations that are not lent out."""
        with self._lock:
            idle = [lent for known in self._nodes.values() for lent in known.idle]
            for known in self._nodes.values():
                known.idle = []
        for lent in idle:
            self._discard(lent)
