"""Access to the nodes of a run: circuit breakers, concurrency limits and the association pool.

Everything that a run sends to a node passes here: a request needs a breaker that lets it through,
an open access schedule and a slot of the association pool.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from functools import partial
from typing import Protocol

from prefect_dicom.admission.association_pool import AssociationPool
from prefect_dicom.admission.circuit_breaker import BreakerState
from prefect_dicom.admission.client import ClientFactory
from prefect_dicom.admission.health import RequestKind
from prefect_dicom.admission.node import NodeAdmission
from prefect_dicom.admission.request_rates import RequestRates
from prefect_dicom.admission.schedule import NodeSchedules
from prefect_dicom.config.site import Site
from prefect_dicom.core.clock import Clock
from prefect_dicom.core.errors import Interrupted, PacsError
from prefect_dicom.core.events import Event, EventBus
from prefect_dicom.core.metrics import answered
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.ledger import Ledger, Run
from prefect_dicom.network.node_client import NodeClient

log = logging.getLogger(__name__)

_QUERIES = ("C-FIND", "QIDO-RS")
_LOOK_SECONDS = 1.0
_PERMIT_SECONDS = 0.2


class Stopping(Protocol):
    """Whether a run is to stop, and what wakes its waits."""

    stop: threading.Event

    def is_stopping(self) -> bool:
        """Whether nothing new may begin."""

    def check(self) -> None:
        """Raise :class:`Interrupted` where nothing new may begin."""


class NodeAccess:
    """Access to each node of a site, for one run. Thread-safe.

    Parameters
    ----------
    record : Run
        The run, as the ledger knows it.
    clock : Clock
        What time it is, and how the run waits.
    control : Stopping
        Ends waits and requests when the run is paused or cancelled.
    events : EventBus
        Gets what changes.
    changed : callable
        Called when what a node may be asked for has changed, before the event is published.
    """

    def __init__(
        self,
        site: Site,
        ledger: Ledger,
        record: Run,
        clock: Clock,
        control: Stopping,
        events: EventBus,
        changed: Callable[[], None],
    ) -> None:
        self.schedules = NodeSchedules(site, clock, events.publish)
        """Access schedules of the nodes."""
        self.rates = RequestRates(site, self.schedules)
        """Rate limits of requests to the nodes."""
        self.pool = AssociationPool(
            ledger,
            record,
            clock,
            control.stop,
            schedules=self.schedules,
            rates=self.rates,
            check_node=self._check_ready,
            new_requestor=self._new_requestor,
        )
        """Associations to the nodes, under slots that all runs share."""
        self._site = site
        self._clock = clock
        self._control = control
        self._events = events
        self._changed = changed
        self._lock = threading.Lock()
        self._admissions: dict[str, NodeAdmission] = {}
        self._answered: dict[str, set[str]] = defaultdict(set)
        self._clients = {
            name: ClientFactory(node, site.capabilities[name]) for name, node in site.nodes.items()
        }
        self._character_sets: dict[str, str] = {}
        """By node, the character set in which it last found a text beyond ASCII."""

    # --- state

    def admission(self, node: str) -> NodeAdmission:
        """Admission of a node, shared by the whole run."""
        with self._lock:
            if node not in self._admissions:
                self._admissions[node] = NodeAdmission(
                    self._site.retry_after_seconds,
                    self._site.effective_node(node).limits.associations,
                    now=self._clock.monotonic,
                    on_change=partial(self._on_change, node),
                )
            return self._admissions[node]

    def admissions(self) -> dict[str, NodeAdmission]:
        """Admission of each node that has been used so far, by the node's name."""
        with self._lock:
            return dict(self._admissions)

    def associations(self, node: str) -> int:
        """Most requests at a time; one at least, whose failure says why there may be none."""
        return max(1, min(self.admission(node).associations, self.schedules.associations(node)))

    def chunks_ahead(self, node: str) -> int:
        """Chunks that may be listed before it is their turn to be retrieved: one an association.

        None while the node is asked for less than usual: its next lists would be a request more.
        """
        most = self.schedules.associations(node)
        return most if self.admission(node).associations >= most else 0

    def is_closed(self, node: str) -> bool:
        """Whether the access schedule of a node is closed now."""
        return self.schedules.state(node).closed

    def is_ending(self, node: str) -> bool:
        """Whether the requests that are under way at a node are to be cancelled."""
        return self._control.is_stopping() or self.schedules.is_over(node)

    def format_state(self, node: str) -> str:
        """Why a node is waited for, or asked for less than usual; empty where it is not."""
        admission = self.admission(node)
        if admission.disabled_for:
            return f"node {node}: disabled ({admission.disabled_for})"
        if left := admission.seconds_left():
            until = self._clock.now().astimezone() + timedelta(seconds=left)
            why = admission.waiting_for or "before another pass"
            return f"node {node}: waiting until {until:%H:%M:%S} ({why})"
        if admission.state is not BreakerState.CLOSED:
            return f"node {node}: one request at a time until one succeeds"
        if code := admission.strained_for:
            return (
                f"node {node}: asked for {admission.ceiling} of {admission.most} at a time ({code})"
            )
        return ""

    def _on_change(
        self, node: str, name: str, code: str | None, figures: Mapping[str, int | float]
    ) -> None:
        self._changed()
        match name:
            case "node.disabled" if code is not None:
                reason = reason_for(code)
                log.error("node %s: disabled. %s %s", node, reason.meaning, reason.what_to_do)
            case "breaker.opened":
                log.warning("%s", self.format_state(node))
            case "breaker.closed":
                log.info("node %s: works again", node)
            case "node.narrowed" | "node.widened":
                why = f" ({code})" if code else ""
                log.warning("node %s: asked for %d at a time%s", node, figures["associations"], why)
        self._events.publish(
            Event(name=name, at=self._clock.now(), node=node, reason=code, figures=figures)
        )

    # --- requests

    @contextlib.contextmanager
    def admitted(self, node: str, kind: RequestKind = RequestKind.QUERY) -> Iterator[NodeClient]:
        """Borrow an association when its node is ready for requests, and record its failures."""
        asked_at = self.wait_for(node)
        admission = self.admission(node)
        try:
            with self.requestor(node, kind) as requestor:
                # It may have been waited for.
                asked_at = admission.now()
                yield requestor
        except PacsError as error:
            admission.record_failure(error.code, asked_at, error.retry_after_seconds)
            raise
        finally:
            admission.release()

    def wait_for(
        self, node: str, *, acquire: bool = True, holding: NodeClient | None = None
    ) -> float:
        """Wait until a node is ready for a request; returns the monotonic time in seconds.

        A node that has failed is probed with a C-ECHO first. After that its breaker gives a permit
        to one thread at a time, until a request has succeeded.

        Parameters
        ----------
        acquire : bool
            Whether to acquire the permit of a half-open breaker, as :meth:`admitted` does.
        holding : NodeClient, optional
            Association that the thread has borrowed; its slot is released during a wait.

        Raises
        ------
        PacsError
            The node is disabled, or did not answer the probe.
        WindowClosed
            Its access schedule is closed.
        """
        admission = self.admission(node)
        while True:
            self._check_ready(node)
            self.schedules.check(node)
            left = admission.seconds_left()
            if not left and (
                admission.try_acquire() if acquire else admission.state is not BreakerState.OPEN
            ):
                return admission.now()
            if holding is not None:
                # The probe, and the thread with the permit, need an association as well.
                self.pool.release_slot(holding)
            if left:
                self._clock.wait(self._control.stop, min(left, _LOOK_SECONDS))
            elif admission.begin_probe():
                self._probe(node, admission)
            else:
                self._clock.wait(self._control.stop, _PERMIT_SECONDS)

    def _probe(self, node: str, admission: NodeAdmission) -> None:
        """Send a C-ECHO to a node that had failed, and record the result in its admission."""
        asked_at = admission.now()
        works = False
        try:
            with self.requestor(node) as requestor:
                requestor.echo()
            works = True
        except PacsError as error:
            works = error.reason.refuses_service  # It speaks DICOM, and may answer others.
            if not works:
                admission.record_failure(error.code, asked_at, error.retry_after_seconds)
                raise
        finally:
            admission.end_probe(answered=works)

    def record_failed_query(self, node: str, code: str) -> None:
        """Count a query that failed for its own sake; raise where too many did in a row.

        Raises
        ------
        PacsError
            The node is disabled.
        """
        if not reason_for(code).counts_against_node:
            return
        admission = self.admission(node)
        admission.record_failed_query()
        if admission.disabled_for:
            raise PacsError(admission.disabled_for)

    @contextlib.contextmanager
    def requestor(self, node: str, kind: RequestKind = RequestKind.QUERY) -> Iterator[NodeClient]:
        """Borrow an association to a node; it stays open for the next borrower."""
        with self.pool.requestor(node, kind) as requestor:
            learnt = self._site.capabilities[node].query_character_sets or ("",)
            requestor.characters = (
                self._character_sets.get(node) or learnt[0] or requestor.characters
            )
            requestor.now = self.admission(node).now
            requestor.first_answer = partial(self._record_latency, node, requestor)
            try:
                yield requestor
            except Interrupted:
                # Nobody waits for a peer that may have nothing more to say.
                requestor.abort()
                raise
            with self._lock:
                self._character_sets[node] = requestor.characters

    def close(self) -> None:
        """Release all associations that are not lent out."""
        self.pool.close()

    def _new_requestor(self, node: str) -> NodeClient:
        requestor = self._clients[node].new(self._answered[node])
        requestor.stopping = partial(self.is_ending, node)
        requestor.answers_lists &= self._site.capabilities[node].uid_lists_above is not False
        return requestor

    def _record_latency(
        self, node: str, requestor: NodeClient, service: str, seconds: float
    ) -> None:
        answered(node, service, seconds)
        if service in _QUERIES:
            self.admission(node).record_latency(RequestKind.QUERY, seconds, requestor.about)

    def check_running(self) -> None:
        """Raise :class:`Interrupted` where the run is to stop."""
        self._control.check()

    def _check_ready(self, node: str) -> None:
        """Raise where the run is to stop or the node is disabled."""
        self._control.check()
        if code := self.admission(node).disabled_for:
            raise PacsError(code)
