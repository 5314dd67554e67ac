"""Association pool per node, with slots that all runs on a ledger share.

An association is open only while its run holds a *slot* of the node (``ledger/rate_limits.py``),
so that all runs together open no more than the limits and the access schedule of the node allow.
The threads of a run have them in turn (:mod:`~prefect_dicom.admission.association_turns`).
A borrower has it by a *lease*. Returned, it stays open for the next borrower as long as no other
run waits for a slot. A run that is alone pays one write for each association, and two for each
request where the schedule limits more than associations.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from prefect_dicom.admission.association_turns import AssociationTurns
from prefect_dicom.admission.health import RequestKind
from prefect_dicom.admission.request_rates import RequestRates, RequestUsage
from prefect_dicom.admission.schedule import NodeSchedules
from prefect_dicom.core.clock import Clock
from prefect_dicom.core.errors import Interrupted, LedgerError, PacsError, WindowClosed
from prefect_dicom.ledger import Ledger, Run, Usage
from prefect_dicom.network.node_client import NodeClient

_IDLE_SECONDS = 15.0
"""An association that nobody borrows for so long is released."""
_LEASE_SECONDS = 10.0
"""How long a run keeps a slot while another run waits for one."""
_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS = 0.05, 1.0
_KEEP_SECONDS = 2.0
"""An association stays open through a wait that is no longer."""


@dataclass(slots=True, eq=False)
class _Lease:
    """A requestor, and the slot of its association."""

    node: str
    requestor: NodeClient
    slot: int | None = None
    slots: int = 0
    """How many slots the node had when the lease was last renewed."""
    since: float = 0.0
    renewed_at: float = 0.0
    turn: RequestKind | None = None
    """What its borrower has the turn for; None while it is idle, or has given up its slot."""
    kind: RequestKind = RequestKind.QUERY
    """What it was borrowed for."""

    @property
    def held_slot(self) -> int:
        """The slot of a lease that has one, as it has while a request is under way."""
        if self.slot is None:
            raise RuntimeError("the slot has been given up")
        return self.slot


class AssociationPool:
    """Associations to the nodes of a site, lent under slots and rate limits. Thread-safe.

    Parameters
    ----------
    clock : Clock
        The time, and how to wait.
    stop : threading.Event
        Ends every wait.
    check_node : callable
        Raises where the run or its node is to send no further request.
    new_requestor : callable
        Makes the requestor of another association to a node.
    """

    def __init__(
        self,
        ledger: Ledger,
        run: Run,
        clock: Clock,
        stop: threading.Event,
        *,
        schedules: NodeSchedules,
        rates: RequestRates,
        check_node: Callable[[str], object],
        new_requestor: Callable[[str], NodeClient],
    ) -> None:
        self._ledger = ledger
        self._run = run
        self._clock = clock
        self._stop = stop
        self._schedules = schedules
        self._rates = rates
        self._check_node = check_node
        self._new_requestor = new_requestor
        self._lock = threading.Lock()
        self._idle: dict[str, list[_Lease]] = defaultdict(list)
        self._lent: dict[int, _Lease] = {}
        self._turns: dict[str, AssociationTurns] = {}
        self._releaser: threading.Thread | None = None

    # --- associations

    @contextlib.contextmanager
    def requestor(self, node: str, kind: RequestKind = RequestKind.QUERY) -> Iterator[NodeClient]:
        """Borrow an association to a node, as soon as there is a slot for it.

        Parameters
        ----------
        kind : RequestKind
            What it is borrowed for: queries go before retrieves.

        Raises
        ------
        WindowClosed
            No requests may be sent to the node at this time.
        """
        lease = self._acquire(node, kind)
        with self._lock:
            self._lent[id(lease.requestor)] = lease
        try:
            yield lease.requestor
        except BaseException:
            self._discard(lease)
            raise
        else:
            self._return(lease)

    def is_free(self, node: str) -> bool:
        """Whether this run would have an association to a node at once."""
        return self._turns_of(node).is_free()

    def interruption(self, requestor: NodeClient) -> Interrupted:
        """The reason for which work with a borrowed requestor stops before its end."""
        try:
            self._schedules.check(self._lease_of(requestor).node)
        except WindowClosed as closed:
            return closed
        return Interrupted()

    def release_slot(self, requestor: NodeClient) -> None:
        """Close a borrowed association that is going to wait, and give up its slot.

        Others may need it, be it to see whether the node works again. The next request takes a
        slot again.
        """
        with self._lock:
            lease = self._lent.get(id(requestor))
        if lease is not None and lease.slot is not None:
            self._close(lease)

    def close(self) -> None:
        """Release all associations that are not lent out."""
        with self._lock:
            idle = [lease for leases in self._idle.values() for lease in leases]
            self._idle.clear()
        for lease in idle:
            self._discard(lease)

    # --- requests

    @contextlib.contextmanager
    def request(
        self, requestor: NodeClient, *, retrieve: bool = False, instances: int = 0
    ) -> Iterator[RequestUsage]:
        """Admit one request, or a few queries that belong together, under the rate limits.

        Parameters
        ----------
        requestor : NodeClient
            A borrowed one.
        retrieve : bool
            Whether it is a C-MOVE or C-GET, which is expected to bring so many ``instances``.

        Raises
        ------
        WindowClosed
            No requests may be sent to the node at this time, or no longer.
        """
        lease = self._lease_of(requestor)
        usage = RequestUsage()
        expected = self._rates.estimate(lease.node, retrieve=retrieve, instances=instances)
        rates = self._begin_request(lease, expected)
        try:
            yield usage
        except Interrupted:
            # Because of the schedule, where that is why.
            self._schedules.check(lease.node)
            raise
        finally:
            if rates is not None:
                brought = Usage(float(retrieve), float(usage.instances), float(usage.size_bytes))
                self._ledger.rate_limits.end_request(
                    lease.node, lease.held_slot, rates, expected, brought, self._clock.shared()
                )
            self._rates.record(lease.node, usage)

    def _begin_request(self, lease: _Lease, expected: Usage) -> Usage | None:
        """Wait until the request may start; returns the rates that it is charged by, if any."""
        while True:
            self._check_node(lease.node)
            self._schedules.check(lease.node)
            if lease.slot is None:
                self._reacquire(lease)
            elif not self._renew(lease):
                self._close(lease)
                continue
            rates = self._rates.rates(lease.node)
            if rates is None:
                return None
            wait = self._ledger.rate_limits.begin_request(
                lease.node, lease.held_slot, rates, expected, self._clock.shared()
            )
            if not wait:
                return rates
            if wait > _KEEP_SECONDS:
                self._close(lease)
            self._wait(lease.node, wait)

    def _wait(self, node: str, seconds: float) -> None:
        """Wait, but no longer than what is in force at the node."""
        in_force = self._schedules.seconds_in_force(node)
        if in_force is not None:
            seconds = min(seconds, in_force)
        deadline = self._clock.monotonic() + seconds
        while (left := deadline - self._clock.monotonic()) > 0:
            self._check_node(node)
            if self._clock.wait(self._stop, min(left, self._clock.look_seconds)):
                return

    # --- slots

    def _turns_of(self, node: str) -> AssociationTurns:
        with self._lock:
            if node not in self._turns:
                most = partial(self._schedules.associations, node)
                self._turns[node] = AssociationTurns(self._clock, most)
            return self._turns[node]

    def _acquire(self, node: str, kind: RequestKind, requestor: NodeClient | None = None) -> _Lease:
        """Wait for a turn and a slot, or for an association of this run that is idle."""
        turns = self._turns_of(node)
        turns.begin(kind, partial(self._check, node))
        try:
            lease = self._acquire_slot(node, requestor)
        except BaseException:
            turns.end(kind)
            raise
        lease.turn = lease.kind = kind
        lease.since = lease.renewed_at = self._clock.monotonic()
        return lease

    def _check(self, node: str) -> None:
        self._check_node(node)
        self._schedules.check(node)

    def _end_turn(self, lease: _Lease) -> None:
        kind, lease.turn = lease.turn, None
        if kind is not None:
            self._turns_of(lease.node).end(kind)

    def _acquire_slot(self, node: str, requestor: NodeClient | None) -> _Lease:
        waiting: int | None = None
        seconds = _FIRST_LOOK_SECONDS
        try:
            while True:
                self._check(node)
                if (idle := self._pop_idle(node)) is not None:
                    if self._renew(idle):
                        return idle
                    self._discard(idle)
                    continue
                most = self._schedules.associations(node)
                number, taken = self._ledger.rate_limits.take_slot(self._run, node, most, waiting)
                if taken:
                    waiting = None
                    return _Lease(node, requestor or self._new_requestor(node), number, most)
                waiting = number
                self._clock.wait(self._stop, seconds)
                seconds = min(2 * seconds, self._clock.look_seconds)
        finally:
            if waiting is not None:
                with contextlib.suppress(LedgerError):
                    self._ledger.rate_limits.release_slot(waiting)

    def _reacquire(self, lease: _Lease) -> None:
        """Take a slot again for a lease that has given up its own."""
        other = self._acquire(lease.node, lease.kind, lease.requestor)
        if other.requestor is not lease.requestor:
            # An idle one of this run: only its slot is needed.
            other.requestor.close()
        lease.slot, lease.slots = other.slot, other.slots
        lease.since, lease.renewed_at = other.since, other.renewed_at
        lease.turn, other.turn = other.turn, None

    def _pop_idle(self, node: str) -> _Lease | None:
        with self._lock:
            return self._idle[node].pop() if self._idle[node] else None

    def _return(self, lease: _Lease) -> None:
        """Keep a returned association open for the next borrower, if its slot may be kept."""
        with self._lock:
            self._lent.pop(id(lease.requestor), None)
        if lease.slot is None or not self._renew(lease):
            self._discard(lease)
            return
        lease.since = self._clock.monotonic()
        with self._lock:
            self._idle[lease.node].append(lease)
        self._end_turn(lease)
        self._start_releaser()

    def _lease_of(self, requestor: NodeClient) -> _Lease:
        with self._lock:
            return self._lent[id(requestor)]

    def _renew(self, lease: _Lease) -> bool:
        """Renew a lease; returns False where its slot has to be given up.

        The ledger is read once a second, and when the node has fewer slots than before.
        """
        slots = self._schedules.associations(lease.node)
        if slots == 0:
            return False
        if self._is_current(lease, slots):
            return True
        lease.renewed_at, lease.slots = self._clock.monotonic(), slots
        keeps, wanted = self._look_up(lease, slots)
        return keeps and not (wanted and lease.renewed_at - lease.since >= _LEASE_SECONDS)

    def _is_current(self, lease: _Lease, slots: int) -> bool:
        """Whether a lease was renewed within the last second, under no more slots than now."""
        age = self._clock.monotonic() - lease.renewed_at
        return slots >= lease.slots and age < _LAST_LOOK_SECONDS

    def _look_up(self, lease: _Lease, slots: int) -> tuple[bool, bool]:
        """Whether the slot of a lease is among so many, and whether other runs wait for one."""
        if lease.slot is None:
            return False, False
        return self._ledger.rate_limits.check_slot(lease.slot, self._run, lease.node, slots)

    def _discard(self, lease: _Lease) -> None:
        """Close an association for good, and give up its slot."""
        with self._lock:
            self._lent.pop(id(lease.requestor), None)
        self._close(lease)

    def _close(self, lease: _Lease) -> None:
        """Close an association, and give up its slot; its lease may take another."""
        lease.requestor.close()
        slot, lease.slot = lease.slot, None
        if slot is not None:
            # A run that cannot write it loses its slot when it ends.
            with contextlib.suppress(LedgerError):
                self._ledger.rate_limits.release_slot(slot)
        self._end_turn(lease)

    # --- idle associations

    def _start_releaser(self) -> None:
        """Release idle associations in a thread, while there are any."""
        with self._lock:
            if self._releaser is None:
                self._releaser = threading.Thread(
                    target=self._release_while_idle, daemon=True, name="idle"
                )
                self._releaser.start()

    def _release_while_idle(self) -> None:
        while True:
            if self._clock.wait(self._stop, _LAST_LOOK_SECONDS):
                self.close()
            with self._lock:
                nodes = list(self._idle)
            for node in nodes:
                self._release_idle(node)
            with self._lock:
                if not any(self._idle.values()):
                    self._releaser = None
                    return

    def _release_idle(self, node: str) -> None:
        now = self._clock.monotonic()
        with self._lock:
            idle = list(self._idle[node])
        for lease in idle:
            with contextlib.suppress(LedgerError, PacsError):
                if now - lease.since < _IDLE_SECONDS and self._may_stay_idle(lease):
                    continue
            # It stays on the list until here: borrowers and `close` find it at any time.
            with self._lock:
                if lease not in self._idle[node]:
                    continue
                self._idle[node].remove(lease)
            self._discard(lease)

    def _may_stay_idle(self, lease: _Lease) -> bool:
        """Whether the slot of an idle association stays, and no other run waits for it."""
        keeps, wanted = self._look_up(lease, self._schedules.associations(lease.node))
        return keeps and not wanted
