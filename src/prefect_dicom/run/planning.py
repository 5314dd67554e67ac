"""Cohort rows to studies: what a run asks its node before anything is retrieved; no Prefect.

Rows are queried in groups: rows with the same identifiers are one, and rows that name
their study go into lists of UIDs where the node answers these. Several groups are under way
at a time, as the node's admission allows; what they found goes into the ledger in batches. A run
that is killed asks again for no more than :data:`ROWS_PER_WRITE` rows, and for the groups
that were under way.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, partial

from prefect_dicom.admission.association_pool import AssociationPool
from prefect_dicom.admission.circuit_breaker import BreakerState
from prefect_dicom.admission.health import RequestKind
from prefect_dicom.admission.node import NodeAdmission
from prefect_dicom.admission.request_rates import RequestRates
from prefect_dicom.admission.retry import retry_once
from prefect_dicom.admission.schedule import NodeSchedules
from prefect_dicom.cohort.row_matching import Discovery
from prefect_dicom.config.access_schedule import schedule_state
from prefect_dicom.config.capabilities import NodeCapabilities
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.core.clock import Clock
from prefect_dicom.core.errors import (
    Interrupted,
    LedgerError,
    PacsError,
    PrefectDicomError,
    WindowClosed,
)
from prefect_dicom.core.events import Event, Subscriber
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.metrics import answered
from prefect_dicom.core.model import (
    NO_FILTERS,
    CohortFilters,
    CohortRow,
    Disposition,
    RequestedState,
    StudyState,
    Verdict,
)
from prefect_dicom.core.reasons import REASONS, Scope, reason_for
from prefect_dicom.discovery.failover import Answer, combine_answers, settles
from prefect_dicom.discovery.filter_queries import filter_studies
from prefect_dicom.discovery.row_query import StudyQueryCapabilities, discover, query_uid_lists
from prefect_dicom.ledger import Cohort, Ledger, RowFindings, Run, Totals
from prefect_dicom.network.echo import echo
from prefect_dicom.network.find.query_capabilities import QueryCapabilities
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.report import next_count
from prefect_dicom.report.background import BackgroundPage

log = logging.getLogger(__name__)

ROWS_PER_PAGE = 500
"""Rows of one call of :meth:`Plan.discover`."""
ROWS_PER_WRITE = 100
"""Rows that have been answered and are not in the ledger yet, at most."""
_GROUPS_WORTH_AN_ASSOCIATION = 10
"""An association more is opened for no fewer: that costs as much as a handful of queries."""
_LOOK_SECONDS = 1.0
_SAMPLE_SECONDS = 30.0
_TURN_SECONDS = 0.2
_ANEW = "`prefect-dicom doctor --probe` writes it anew"

_current: ContextVar[Plan] = ContextVar("prefect_dicom_plan")


def current_plan() -> Plan:
    """The run this thread works for; tasks find it here instead of carrying it around."""
    return _current.get()


@dataclass(kw_only=True)
class Plan:
    """What one run needs to find the studies of its cohort. Use :func:`open_plan`."""

    site: Site
    cohort: Cohort
    ledger: Ledger
    run: Run
    filters: CohortFilters = NO_FILTERS
    """What the cohort wants of what its rows find."""
    stop: threading.Event = field(default_factory=threading.Event)
    """Set where this process is to end the run."""
    hears: Callable[[], RequestedState] = lambda: RequestedState.RUNNING
    """What is wanted of it by others than the ledger's people: in Prefect's UI."""
    clock: Clock = field(default_factory=Clock)
    """What time it is, and how the run waits."""
    subscribers: list[Subscriber] = field(default_factory=list)
    """Who is told what happens; appended to before the work begins."""
    _study_queries: dict[str, StudyQueryCapabilities] = field(default_factory=dict)
    _queries: dict[str, QueryCapabilities] = field(
        default_factory=lambda: defaultdict(QueryCapabilities)
    )
    """What each of the cohort's nodes makes of queries that its filters need."""
    _turned: threading.Event = field(default_factory=threading.Event)
    schedules: NodeSchedules = field(init=False)
    """Access schedules of the nodes."""
    rates: RequestRates = field(init=False)
    """Rate limits of requests to the nodes."""
    pool: AssociationPool = field(init=False)
    """Associations to the nodes, under slots that all runs share."""
    _answered: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    _characters: dict[str, str] = field(default_factory=dict)
    """By node, the character set in which it last found a text beyond ASCII."""
    _admissions: dict[str, NodeAdmission] = field(default_factory=dict)
    _noted: set[tuple[str, str]] = field(default_factory=set)
    _sample_at: float = float("-inf")
    """When the next sample of the cohort is due."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _hearing: threading.Lock = field(default_factory=threading.Lock)
    _heard: RequestedState = RequestedState.RUNNING
    _listen_at: float = float("-inf")

    def __post_init__(self) -> None:
        self.schedules = NodeSchedules(self.site, self.clock, self.tell)
        self.rates = RequestRates(self.site, self.schedules)
        self.pool = AssociationPool(
            self.ledger,
            self.run,
            self.clock,
            self.stop,
            schedules=self.schedules,
            rates=self.rates,
            check_node=self._check_going_on,
            new_requestor=self._new_requestor,
        )

    # --- discovery

    def discovery_pages(self) -> Iterator[tuple[int, int]]:
        """Ranges of lines (first, last) that are still to be discovered, and by no other run."""
        # What was answered in an earlier pass may be hours old.
        for node in self.cohort.nodes:
            self.study_queries(node).query_cache.clear()
        after = 0
        while rows := self.ledger.rows.take(self.run, self.cohort.number, after, ROWS_PER_PAGE):
            yield rows[0].line, rows[-1].line
            after = rows[-1].line

    def rows_of_others(self) -> tuple[int, bool]:
        """How many rows other runs are about to ask for, and whether dead ones have left some."""
        held, left = self.ledger.rows.taken_by_others(self.run, self.cohort.number)
        return held, left > 0

    def discover(self, first_line: int, last_line: int) -> int:
        """Ask the PACS for the studies of these rows; returns how many rows were asked for.

        Of several nodes one after the other, each for the rows that those before have no answer
        for, or for all of them.

        Raises
        ------
        PacsError
            The node cannot be used, and no other; rows that were asked before are recorded.
        """
        rows = self.ledger.rows.to_discover(
            self.cohort.number, first_line - 1, ROWS_PER_PAGE, self.run
        )
        rows = [row for row in rows if row.line <= last_line]
        found = _Found(self.ledger, self.cohort.number)
        nodes = self.cohort.nodes
        try:
            if len(nodes) == 1:
                self._ask_all(nodes[0], rows, lambda row, answer: found.add(_findings(row, answer)))
            else:
                self._ask_several(rows, found)
        finally:
            found.record()
        return found.count

    def _ask_several(self, rows: Sequence[CohortRow], found: _Found) -> None:
        """Ask one node after the other for what those before have not settled."""
        every = self.cohort.order.every
        answers: dict[int, list[tuple[str, Answer]]] = defaultdict(list)
        closed: WindowClosed | None = None
        for node in self.cohort.nodes:
            heard: dict[int, Answer] = {}
            try:
                if rows and not self.admission(node).disabled_for:
                    self._ask_all(
                        node, rows, lambda row, answer, to=heard: to.update({row.line: answer})
                    )
            except PacsError:
                if not self.others_go_on(node):
                    raise
            except WindowClosed as error:
                # Whoever may be asked is asked: the windows of two nodes may never be the same.
                closed = error
            left = []
            for row in rows:
                answers[row.line].append((node, heard.get(row.line)))
                if settles(row, heard.get(row.line), every=every):
                    found.add(combine_answers(row, answers[row.line], every=every))
                else:
                    left.append(row)
            rows = left
        if rows and all(self.admission(node).disabled_for for node in self.cohort.nodes):
            raise PacsError(self.admission(self.cohort.node).disabled_for)
        for row in rows:
            if (findings := combine_answers(row, answers[row.line], every=every)) is not None:
                found.add(findings)
        if closed is not None and rows:
            raise closed

    def others_go_on(self, node: str) -> bool:
        """Whether a node is left alone for the rest of the run, and another of the cohort not."""
        if not self.admission(node).disabled_for:
            return False
        goes_on = any(not self.admission(other).disabled_for for other in self.cohort.nodes)
        if goes_on:
            reason = reason_for(self.admission(node).disabled_for)
            self.note(node, f"left alone by a run ({reason.code}): {reason.what_to_do}")
            self._turned.set()
        return goes_on

    def seconds_left(self) -> float:
        """How long all nodes of the cohort that are not left alone for good are left alone."""
        admissions = [
            admission
            for admission in map(self.admission, self.cohort.nodes)
            if not admission.disabled_for
        ]
        return min((admission.seconds_left() for admission in admissions), default=0.0)

    def take_turned(self) -> bool:
        """Whether something is to be asked of another node now, since this was asked last."""
        turned = self._turned.is_set()
        self._turned.clear()
        return turned

    def study_queries(self, node: str) -> StudyQueryCapabilities:
        """How a node answers queries for studies, as far as is known."""
        with self._lock:
            if node not in self._study_queries:
                self._study_queries[node] = StudyQueryCapabilities()
                self._study_queries[node].start_from(
                    self.site.capabilities.get(node, NodeCapabilities())
                )
            return self._study_queries[node]

    def _ask_all(
        self, node: str, rows: Sequence[CohortRow], take: Callable[[CohortRow, Answer], None]
    ) -> None:
        """Ask a node for the rows, over as many associations as are allowed and worth it."""
        most = self.site.effective_node(node).limits.uids_per_request
        groups = _query_groups(rows, most if self.study_queries(node).answers_lists else 1)
        left = iter(groups)
        lock, over = threading.Lock(), threading.Event()

        def ask_what_is_left(number: int = 0) -> None:
            try:
                with self._asking(node) as requestor:
                    # While the node is asked for less than at the beginning, by fewer.
                    while not over.is_set() and (number == 0 or number < self.associations(node)):
                        with lock:
                            group = next(left, None)
                        if group is None:
                            break
                        self._ask(node, requestor, group, take, over)
                    self._doubt_capabilities(node, requestor)
            except BaseException:
                over.set()
                raise

        worth = 1 + len(groups) // _GROUPS_WORTH_AN_ASSOCIATION
        if (at_once := min(self.associations(node), worth)) == 1:
            ask_what_is_left()
            return
        with ThreadPoolExecutor(at_once, thread_name_prefix="discovery") as pool:
            asking = [pool.submit(ask_what_is_left, number) for number in range(at_once)]
            try:
                wait(asking)
            finally:
                over.set()
        for future in asking:
            future.result()

    def _ask(
        self,
        node: str,
        requestor: Requestor,
        group: QueryGroup,
        take: Callable[[CohortRow, Answer], None],
        over: threading.Event,
    ) -> None:
        """Discover the rows of a query group; together what can be had together."""
        if len(group) > 1:
            first = [rows[0] for rows in group]
            with self.pool.request(requestor):
                retry_once(lambda: query_uid_lists(requestor, first, self.study_queries(node)))
        for rows in group:
            for row in rows:
                self._check_stop()
                if over.is_set():
                    return
                take(row, self._discover_row(node, requestor, row))
                failpoint("row-answered")

    def _discover_row(self, node: str, requestor: Requestor, row: CohortRow) -> Discovery | str:
        requestor.about = ("row", row.line)
        try:
            with self.pool.request(requestor):
                result = retry_once(lambda: self._wanted_of(node, requestor, row))
        except PacsError as error:
            if error.scope is not Scope.REQUEST:
                raise
            self._count_failed_query(node, error.code)
            return error.code
        self.admission(node).record_success()
        return result

    def _wanted_of(self, node: str, requestor: Requestor, row: CohortRow) -> Discovery:
        found = discover(requestor, row, self.study_queries(node))
        return filter_studies(requestor, row, found, self.filters, self._queries[node])

    def limit_per_patient(self) -> None:
        """Leave out what is more than the cohort takes of a patient, when all rows were asked."""
        if self.filters.per_patient is not None:
            self.ledger.rows.limit_per_patient(self.cohort.number, self.filters.per_patient)

    # --- around

    def tell(self, event: Event) -> None:
        """Tell the subscribers; one that fails disturbs neither the run nor the others."""
        for subscriber in self.subscribers:
            try:
                subscriber(event)
            except Exception as error:
                log.warning("nobody was told of %s: %s", event.name, type(error).__name__)

    def reopen_transient(self) -> bool:
        """Make ready for another pass what failed for a passing reason; whether there is any."""
        codes = [r.code for r in REASONS.values() if r.disposition is Disposition.TRANSIENT]
        reopened = self.ledger.cohorts.reopen(self.cohort.number, reasons=codes)
        return bool(reopened.studies or reopened.rows)

    def admission(self, node: str) -> NodeAdmission:
        """Admission of a node, shared by the whole run."""
        with self._lock:
            if node not in self._admissions:
                self._admissions[node] = NodeAdmission(
                    self.site.retry_after_seconds,
                    self.site.effective_node(node).limits.associations,
                    now=self.clock.monotonic,
                    on_change=partial(self._hear, node),
                )
            return self._admissions[node]

    def admissions(self) -> dict[str, NodeAdmission]:
        """Admission of each node that has been used so far, by the node's name."""
        with self._lock:
            return dict(self._admissions)

    def wait_for(self, node: str, *, turn: bool = True, holding: Requestor | None = None) -> float:
        """Wait until a node may be asked; returns the monotonic time.

        One that has failed is probed with a C-ECHO before anything is asked of it again, and
        then asked by one thread at a time until something has succeeded.

        Parameters
        ----------
        turn : bool
            Whether the thread is going to ask at once, inside :meth:`_asking`.
        holding : Requestor, optional
            What it has borrowed; put down where it has to wait.

        Raises
        ------
        PacsError
            It may not be asked any more, or did not answer the probe: with the reason why.
        WindowClosed
            It may not be asked at this time of the week.
        """
        admission = self.admission(node)
        while True:
            self._check_stop()
            if admission.disabled_for:
                raise PacsError(admission.disabled_for)
            self.schedules.check(node)
            left = admission.seconds_left()
            if not left and (
                admission.try_acquire() if turn else admission.state is not BreakerState.OPEN
            ):
                return admission.now()
            if holding is not None:
                # The probe, and whoever has the turn, need an association as well.
                self.pool.release_slot(holding)
            if left:
                self.clock.wait(self.stop, min(left, _LOOK_SECONDS))
            elif admission.begin_probe():
                self._probe(node, admission)
            else:
                self.clock.wait(self.stop, _TURN_SECONDS)

    def _probe(self, node: str, admission: NodeAdmission) -> None:
        """Ask a node that had failed for a C-ECHO; record what comes of it in its admission."""
        asked_at = admission.now()
        works = False
        try:
            with self.requestor(node) as requestor:
                echo(requestor)
            works = True
        except PacsError as error:
            works = error.reason.refuses_service  # It speaks DICOM, and may answer others.
            if not works:
                admission.record_failure(error.code, asked_at)
                raise
        finally:
            admission.end_probe(answered=works)

    def _hear(
        self, node: str, name: str, code: str | None, figures: Mapping[str, int | float]
    ) -> None:
        """Say, once, what has changed in how a node may be asked."""
        with contextlib.suppress(LedgerError):
            # For `status`; what cannot be written now is written with the next change.
            self.ledger.runs.record_waits(self.run, self.waits())
        match name:
            case "node.disabled":
                reason = reason_for(code)
                log.error("node %s: left alone. %s %s", node, reason.meaning, reason.what_to_do)
            case "breaker.opened":
                log.warning("%s", self._wait_of(node))
            case "breaker.closed":
                log.info("node %s: works again", node)
            case "node.narrowed" | "node.widened":
                why = f" ({code})" if code else ""
                log.warning("node %s: asked for %d at a time%s", node, figures["associations"], why)
        self.tell(Event(name=name, at=self.clock.now(), node=node, reason=code, figures=figures))

    def waits(self) -> str:
        """What the run waits for, or asks less for, in words for people; empty where nothing."""
        words = []
        if self.told() is RequestedState.PAUSED:
            how = "it is resumed in Prefect"
            if self._heard is RequestedState.PAUSED:
                how = f"`prefect-dicom resume {self.cohort.number}`"
            words.append(f"paused, until {how}")
        for node in self.admissions() or [self.cohort.node]:
            words += [self._wait_of(node), self.schedules.format(node)]
        return "; ".join(filter(None, words))

    def _wait_of(self, node: str) -> str:
        admission = self.admission(node)
        if admission.disabled_for:
            return f"node {node}: left alone ({admission.disabled_for})"
        if left := admission.seconds_left():
            until = self.clock.now().astimezone() + timedelta(seconds=left)
            why = admission.waiting_for or "before another pass"
            return f"node {node}: waiting until {until:%H:%M:%S} ({why})"
        if admission.state is not BreakerState.CLOSED:
            return f"node {node}: asked for one thing, to see whether it works again"
        if code := admission.strained_for:
            return (
                f"node {node}: asked for {admission.ceiling} of {admission.most} at a time ({code})"
            )
        return ""

    @contextlib.contextmanager
    def _asking(self, node: str) -> Iterator[Requestor]:
        """Borrow an association when its node may be asked; record failures in its admission."""
        asked_at = self.wait_for(node)
        admission = self.admission(node)
        try:
            with self.requestor(node) as requestor:
                # It may have been waited for.
                asked_at = admission.now()
                yield requestor
        except PacsError as error:
            admission.record_failure(error.code, asked_at)
            raise
        finally:
            admission.release()

    def _count_failed_query(self, node: str, code: str) -> None:
        """One query that fails is its own affair; where one after the other does, stop asking."""
        if not reason_for(code).counts_against_node:
            return
        admission = self.admission(node)
        admission.record_failed_query()
        if admission.disabled_for:
            raise PacsError(admission.disabled_for)

    @contextlib.contextmanager
    def requestor(self, node: str) -> Iterator[Requestor]:
        """Borrow an association to a node; it stays open for the next borrower."""
        with self.pool.requestor(node) as requestor:
            learnt = self.site.capabilities[node].query_character_sets or ("",)
            requestor.characters = self._characters.get(node) or learnt[0]
            requestor.now = self.admission(node).now
            requestor.first_answer = partial(self._take_time, node, requestor)
            try:
                yield requestor
            except Interrupted:
                # Nobody waits for a peer that may have nothing more to say.
                requestor.abort()
                raise
            with self._lock:
                self._characters[node] = requestor.characters

    def _new_requestor(self, node: str) -> Requestor:
        requestor = Requestor(self.site.nodes[node], self._answered[node])
        requestor.stopping = partial(self.is_ending, node)
        requestor.answers_lists = self.site.capabilities[node].uid_lists_above is not False
        return requestor

    def associations(self, node: str) -> int:
        """How many requests this run may have under way: one at least, to hear why it may not."""
        return max(1, min(self.admission(node).associations, self.schedules.associations(node)))

    def _take_time(self, node: str, requestor: Requestor, service: str, seconds: float) -> None:
        answered(node, service, seconds)
        if service == "C-FIND":
            self.admission(node).record_latency(RequestKind.QUERY, seconds, requestor.about)

    def close_requestors(self) -> None:
        """Release all associations that are not lent out."""
        self.pool.close()

    def note(self, node: str, words: str) -> None:
        """Say what this run has found out about a node, once, and keep it with the cohort."""
        with self._lock:
            known = (node, words) in self._noted
            self._noted.add((node, words))
        if not known:
            log.warning("node %s: %s", node, words)
            self.ledger.cohorts.add_note(self.cohort.number, node, words)

    def sample(self, *, now: bool = False) -> None:
        """Write down where the cohort stands; at most every 30 s, all runs together, but ``now``.

        And see to it that its report follows. What is lost by a ledger that cannot be written
        just then is a point of a curve, and the next write that matters says so.
        """
        if not now:
            self.page.refresh()
        began = self.clock.monotonic()
        if not now and began < self._sample_at:
            return
        schedule = self.site.nodes[self.cohort.node].access_schedule
        at = self.clock.now()
        with contextlib.suppress(LedgerError):
            self.ledger.progress.record_sample(
                self.cohort.number,
                self.run,
                schedule_open=None if schedule is None else not schedule_state(schedule, at).closed,
                least_seconds=0 if now else _SAMPLE_SECONDS,
                at=at,
            )
        self._sample_at = next_count(began, self.clock.monotonic(), _SAMPLE_SECONDS)

    def tell_of_the_end(self, trouble: PrefectDicomError | None, totals: Totals) -> None:
        """Tell where the run leaves its cohort, and what kept it from its end, if something did."""
        rows = {f"rows_{verdict}".replace("-", "_"): totals.rows[verdict] for verdict in Verdict}
        studies = {f"studies_{state}": totals.studies[state] for state in StudyState}
        instances = {"instances": totals.stored, "size_bytes": totals.size_bytes}
        self.tell(
            Event(
                name="cohort.finished",
                at=self.clock.now(),
                reason=None if trouble is None else trouble.code,
                figures={"rows": totals.rows.total()} | rows | studies | instances,
            )
        )

    def write_page(self, trouble: PrefectDicomError | None) -> None:
        """Write the report of the cohort as the run leaves it."""
        if trouble is not None:
            self.ledger.runs.record_reason(self.run, trouble.code)
        self.sample(now=True)
        self.page.write_last(self.ledger)

    @cached_property
    def page(self) -> BackgroundPage:
        """The report of the cohort, while this run is under way."""
        return BackgroundPage(self.site, self.cohort, self.run.number)

    def _doubt_capabilities(self, node: str, requestor: Requestor) -> None:
        """Note where a node did otherwise than its capabilities say: what a run sees counts."""
        known = self.site.capabilities[node]
        for key, seen in self._seen_otherwise(node, requestor).items():
            if seen and getattr(known, key):
                self.note(node, f"it did otherwise than `{key}` of its capabilities says; {_ANEW}")

    def _seen_otherwise(self, node: str, requestor: Requestor) -> dict[str, bool]:
        """By key of the capabilities, whether the run has seen the opposite."""
        queries = self.study_queries(node)
        return {
            "optional_return_keys": queries.simple,
            "uid_lists_in_queries": not queries.answers_lists,
            "uid_lists_above": not requestor.answers_lists,
        }

    def told(self) -> RequestedState:
        """What people want of this run; looked up once a second at most, whoever asks."""
        with self._hearing:
            if self.stop.is_set():
                return RequestedState.CANCELLED
            if time.monotonic() >= self._listen_at:
                # A ledger that is away fails what has to be written to it; nothing is heard of it.
                with contextlib.suppress(LedgerError):
                    self._heard = self.ledger.run_control.requested_state(self.run)
                self._listen_at = time.monotonic() + _LOOK_SECONDS
            return max(self._heard, self.hears(), key=list(RequestedState).index)

    def is_stopping(self) -> bool:
        """Whether nothing new is to be begun: the run is to end, or to wait."""
        return self.told() is not RequestedState.RUNNING

    def rest(self, seconds: float) -> bool:
        """Wait so long; False, and earlier, where something else is wanted of the run."""
        until = self.clock.monotonic() + seconds
        while not self.is_stopping():
            if (left := until - self.clock.monotonic()) <= 0:
                return True
            self.clock.wait(self.stop, min(left, _LOOK_SECONDS))
        return False

    def is_closed(self, node: str) -> bool:
        """Whether a node may not be asked at this time of the week."""
        return self.schedules.state(node).closed

    def is_ending(self, node: str) -> bool:
        """Whether what is under way at a node is to be cancelled."""
        return self.is_stopping() or self.schedules.is_over(node)

    def wait_in_place(self, look: Callable[[], None]) -> bool:
        """Wait while the run is to pause, asking for nothing; whether it is to go on then.

        Parameters
        ----------
        look : callable
            Called every second.
        """
        if self.told() is RequestedState.PAUSED:
            self.close_requestors()
            self.ledger.run_control.record_paused(self.run, True)
            while self.told() is RequestedState.PAUSED:
                look()
                self.stop.wait(_LOOK_SECONDS)
            self.ledger.run_control.record_paused(self.run, False)
        return self.told() is RequestedState.RUNNING

    def _check_stop(self) -> None:
        if self.is_stopping():
            raise Interrupted()

    def _check_going_on(self, node: str) -> None:
        """Pass, where the run and the node are to be gone on with."""
        self._check_stop()
        if code := self.admission(node).disabled_for:
            raise PacsError(code)


@contextlib.contextmanager
def open_plan(site: Site, cohort: str | int) -> Iterator[Plan]:
    """Open what it takes to find the studies of a registered cohort, and close it again.

    No receiver, no spool and no archive: nothing can be retrieved with it.

    Parameters
    ----------
    cohort : str or int
        Name or number of a cohort in the ledger.
    """
    with contextlib.ExitStack() as stack:
        ledger = stack.enter_context(Ledger.open(ledger_url(site)))
        known = ledger.cohorts.get(str(cohort))
        run = stack.enter_context(ledger.runs.begin("plan", known.number))
        filters = ledger.cohorts.filters(known.number)
        plan = Plan(site=site, cohort=known, ledger=ledger, run=run, filters=filters)
        stack.enter_context(at_work(plan))
        yield plan


@contextlib.contextmanager
def at_work(plan: Plan) -> Iterator[None]:
    """Make this the plan of the context; its associations end with the block."""
    token = _current.set(plan)
    plan.sample(now=True)
    # From here on there is a minute to the first report.
    _ = plan.page
    try:
        yield
    except BaseException:
        plan.stop.set()
        raise
    finally:
        plan.sample(now=True)
        plan.page.close()
        _current.reset(token)
        plan.close_requestors()


QueryGroup = list[list[CohortRow]]
"""What is asked for at a time: rows with the same identifiers, or several such by list of UIDs."""


def _query_groups(rows: Iterable[CohortRow], most: int) -> list[QueryGroup]:
    """Rows with the same identifiers together, and up to so many StudyInstanceUIDs together."""
    alike: dict[tuple, list[CohortRow]] = {}
    for row in rows:
        key = (row.patient_id, row.accession_number, row.study_instance_uid)
        # A row without identifiers is a window of its own.
        alike.setdefault(key if any(key) else (row.line,), []).append(row)
    by_uid: list[list[CohortRow]] = []
    groups: list[QueryGroup] = []
    for its_rows in alike.values():
        if most > 1 and its_rows[0].study_instance_uid is not None:
            by_uid.append(its_rows)
        else:
            groups.append([its_rows])
    for first in range(0, len(by_uid), most):
        groups.append(by_uid[first : first + most])
    return groups


def _findings(row: CohortRow, answer: Discovery | str) -> RowFindings:
    """What a row found on its cohort's only node."""
    if isinstance(answer, str):
        return RowFindings(row.line, reason=answer)
    return RowFindings(row.line, answer.studies, answer.reason, answer.near_misses, answer.gaps)


class _Found:
    """What rows have found, on its way into the ledger. Thread-safe."""

    def __init__(self, ledger: Ledger, cohort: int) -> None:
        self.count = 0
        self._ledger = ledger
        self._cohort = cohort
        self._waiting: list[RowFindings] = []
        self._lock = threading.Lock()

    def add(self, found: RowFindings) -> None:
        """Take in one row's end; with enough of them they are recorded."""
        with self._lock:
            self.count += 1
            self._waiting.append(found)
            if len(self._waiting) < ROWS_PER_WRITE:
                return
            waiting, self._waiting = self._waiting, []
        self._ledger.rows.record_discoveries(self._cohort, waiting)

    def record(self) -> None:
        """Record what waits."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        self._ledger.rows.record_discoveries(self._cohort, waiting)
