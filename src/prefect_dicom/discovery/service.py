"""Discovery service: find the studies of a cohort's rows, before anything is retrieved.

Rows are queried in groups: rows with the same identifiers are one group, and rows that name
their study go into lists of UIDs where the node answers these. Several queries are under way at a
time, as the node's concurrency limit allows; findings are recorded in the ledger in batches. After
a run was killed, at most :data:`ROWS_PER_WRITE` rows and the queries under way are repeated.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager

from prefect_dicom.admission.node_access import NodeAccess
from prefect_dicom.admission.node_failover import NodeFailover
from prefect_dicom.admission.node_notes import NodeNotes
from prefect_dicom.admission.retry import retry_once
from prefect_dicom.cohort.row_matching import Discovery
from prefect_dicom.config.capabilities import NodeCapabilities
from prefect_dicom.config.site import Site
from prefect_dicom.core.errors import PacsError, WindowClosed
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import CohortFilters, CohortRow
from prefect_dicom.core.reasons import Scope
from prefect_dicom.core.row_queries import FROM_CACHE, FROM_UID_LIST, RowQuery, RowTrace
from prefect_dicom.discovery.failover import Answer, combine_answers, settles
from prefect_dicom.discovery.filter_queries import filter_studies
from prefect_dicom.discovery.row_query import StudyQueryCapabilities, discover, query_uid_lists
from prefect_dicom.ledger import Cohort, Ledger, RowFindings, Run
from prefect_dicom.network.find.query_capabilities import QueryCapabilities
from prefect_dicom.network.node_client import NodeClient

ROWS_PER_PAGE = 500
"""Rows of one call of :meth:`DiscoveryService.discover`."""
ROWS_PER_WRITE = 100
"""Most rows whose findings are not recorded in the ledger yet."""
_GROUPS_WORTH_AN_ASSOCIATION = 10
"""Fewest groups for another association, which costs as much as a handful of queries."""

QueryGroup = list[list[CohortRow]]
"""Rows of one query: with the same identifiers, or with StudyInstanceUIDs for a list."""
Take = Callable[[CohortRow, Answer], None]
"""Takes the answer to a row."""


class DiscoveryService:
    """Finds the studies of a cohort for one run. Thread-safe.

    Parameters
    ----------
    record : Run
        The run, as the ledger knows it.
    filters : CohortFilters
        Which studies the cohort wants of those that its rows find.
    """

    def __init__(
        self,
        site: Site,
        ledger: Ledger,
        record: Run,
        cohort: Cohort,
        filters: CohortFilters,
        access: NodeAccess,
        failover: NodeFailover,
        notes: NodeNotes,
    ) -> None:
        self._site = site
        self._ledger = ledger
        self._record = record
        self._cohort = cohort
        self._filters = filters
        self._access = access
        self._failover = failover
        self._notes = notes
        self._lock = threading.Lock()
        self._capabilities: dict[str, StudyQueryCapabilities] = {}
        self._query_capabilities: dict[str, QueryCapabilities] = defaultdict(QueryCapabilities)
        """By node, how it answers the queries that filters need."""
        self._queries: dict[int, list[RowQuery]] = {}
        """By line, what was asked for rows whose findings are not recorded yet."""
        self._pages: dict[int, list[CohortRow]] = {}
        """By first line, the rows of pages that were not queried yet."""

    # --- pages of rows

    def pages(self) -> Iterator[tuple[int, int]]:
        """Take the unresolved rows in pages, so that no other run queries them.

        Yields
        ------
        tuple of int
            The first and the last line of a page.
        """
        # An answer of an earlier pass may be hours old.
        for node in self._cohort.nodes:
            self.capabilities(node).query_cache.clear()
        after = 0
        while rows := self._ledger.rows.take(
            self._record, self._cohort.number, after, ROWS_PER_PAGE
        ):
            with self._lock:
                self._queries.clear()
                self._pages = {rows[0].line: rows}
            yield rows[0].line, rows[-1].line
            after = rows[-1].line

    def rows_of_others(self) -> tuple[int, bool]:
        """How many rows other runs have taken, and whether ended runs have left some."""
        held, left = self._ledger.rows.taken_by_others(self._record, self._cohort.number)
        return held, left > 0

    def _rows(self, first_line: int, last_line: int) -> list[CohortRow]:
        """The rows of a page; from the ledger where it was begun before, without the finished."""
        with self._lock:
            rows = self._pages.pop(first_line, None)
        if rows is None or rows[-1].line != last_line:
            rows = self._ledger.rows.to_discover(
                self._cohort.number, first_line - 1, ROWS_PER_PAGE, self._record
            )
        return [row for row in rows if row.line <= last_line]

    # --- discovery

    def discover(self, first_line: int, last_line: int) -> int:
        """Query the nodes for the studies of these rows; returns how many rows were resolved.

        Several nodes are queried in order, each for the rows that the nodes before had no answer
        for, or for all rows.

        Raises
        ------
        PacsError
            No node can be used. Findings until then are recorded.
        """
        rows = self._rows(first_line, last_line)
        findings = _FindingsBatch(self._ledger, self._cohort.number, self._queries)
        nodes = self._cohort.nodes
        try:
            if len(nodes) == 1:
                self._query_node(
                    nodes[0], rows, lambda row, answer: findings.add(_findings(row, answer))
                )
            else:
                self._query_several_nodes(rows, findings)
        finally:
            findings.flush()
        return findings.count

    def limit_per_patient(self) -> None:
        """Exclude studies beyond the cohort's limit per patient, once all rows were queried."""
        if self._filters.per_patient is not None:
            self._ledger.rows.limit_per_patient(self._cohort.number, self._filters.per_patient)

    def capabilities(self, node: str) -> StudyQueryCapabilities:
        """How a node answers queries for studies, as far as is known."""
        with self._lock:
            if node not in self._capabilities:
                self._capabilities[node] = StudyQueryCapabilities()
                self._capabilities[node].start_from(
                    self._site.capabilities.get(node, NodeCapabilities())
                )
            return self._capabilities[node]

    def contradictions(self, node: str, requestor: NodeClient) -> dict[str, bool]:
        """By key of the capabilities, whether the run has seen the opposite."""
        capabilities = self.capabilities(node)
        return {
            "optional_return_keys": capabilities.simple,
            "uid_lists_in_queries": not capabilities.answers_lists,
            "uid_lists_above": not requestor.answers_lists,
        }

    def _query_several_nodes(self, rows: Sequence[CohortRow], findings: _FindingsBatch) -> None:
        """Query the nodes in order, each for the rows that the nodes before have not settled."""
        every = self._cohort.order.every
        answers: dict[int, list[tuple[str, Answer]]] = defaultdict(list)
        closed: WindowClosed | None = None
        for node in self._cohort.nodes:
            given: dict[int, Answer] = {}
            try:
                if rows and not self._failover.is_disabled(node):
                    self._query_node(node, rows, _collect_into(given))
            except PacsError:
                if not self._failover.continue_without(node):
                    raise
            except WindowClosed as error:
                # Go on with the others: the schedules of two nodes may never be open together.
                closed = error
            left = []
            for row in rows:
                answers[row.line].append((node, given.get(row.line)))
                if settles(row, given.get(row.line), every=every):
                    findings.add(combine_answers(row, answers[row.line], every=every))
                else:
                    left.append(row)
            rows = left
        disabled_for = self._access.admission(self._cohort.node).disabled_for
        if rows and disabled_for is not None and not self._failover.enabled():
            raise PacsError(disabled_for)
        for row in rows:
            findings.add(combine_answers(row, answers[row.line], every=every))
        if closed is not None and rows:
            raise closed

    def _query_node(self, node: str, rows: Sequence[CohortRow], take: Take) -> None:
        """Query a node for rows, over as many associations as its limit and their number allow."""
        most = self._site.effective_node(node).limits.uids_per_request
        groups = _query_groups(rows, most if self.capabilities(node).answers_lists else 1)
        left = iter(groups)
        lock, over = threading.Lock(), threading.Event()

        def query_remaining(number: int = 0) -> None:
            try:
                with self._access.admitted(node) as requestor:
                    # The concurrency limit may have decreased since the threads began.
                    while not over.is_set() and (
                        number == 0 or number < self._access.associations(node)
                    ):
                        with lock:
                            group = next(left, None)
                        if group is None:
                            break
                        self._query_group(node, requestor, group, take, over)
                    self._notes.add_contradictions(
                        node, self._site.capabilities[node], self.contradictions(node, requestor)
                    )
            except BaseException:
                over.set()
                raise

        worth = 1 + len(groups) // _GROUPS_WORTH_AN_ASSOCIATION
        if (at_once := min(self._access.associations(node), worth)) == 1:
            query_remaining()
            return
        with ThreadPoolExecutor(at_once, thread_name_prefix="discovery") as pool:
            futures = [pool.submit(query_remaining, number) for number in range(at_once)]
            try:
                wait(futures)
            finally:
                over.set()
        for future in futures:
            future.result()

    def _query_group(
        self, node: str, requestor: NodeClient, group: QueryGroup, take: Take, over: threading.Event
    ) -> None:
        """Discover the rows of a group, by one list of UIDs where there are several."""
        if len(group) > 1:
            first = [rows[0] for rows in group]
            with self._access.pool.request(requestor):
                retry_once(lambda: query_uid_lists(requestor, first, self.capabilities(node)))
        for rows in group:
            for row in rows:
                self._access.check_running()
                if over.is_set():
                    return
                source = FROM_UID_LIST if len(group) > 1 else FROM_CACHE
                take(row, self._discover_row(node, requestor, row, source))
                failpoint("row-answered")

    def _discover_row(
        self, node: str, requestor: NodeClient, row: CohortRow, cached_from: str
    ) -> Discovery | str:
        """Discover one row; returns a reason code where its query failed for its own sake."""
        requestor.about = ("row", row.line)
        try:
            with (
                self._access.pool.request(requestor),
                self._traced(requestor, row, RowTrace(node, cached_from)),
            ):
                result = retry_once(lambda: self._find_studies(node, requestor, row))
        except PacsError as error:
            if error.scope is not Scope.REQUEST:
                raise
            self._access.record_failed_query(node, error.code)
            return error.code
        self._access.admission(node).record_success()
        return result

    @contextmanager
    def _traced(self, requestor: NodeClient, row: CohortRow, trace: RowTrace) -> Iterator[None]:
        """Take down the queries of a row, until its findings are recorded."""
        requestor.trace = trace
        try:
            yield
        finally:
            requestor.trace = None
            with self._lock:
                self._queries.setdefault(row.line, []).extend(trace.queries)

    def _find_studies(self, node: str, requestor: NodeClient, row: CohortRow) -> Discovery:
        found = discover(requestor, row, self.capabilities(node))
        return filter_studies(requestor, row, found, self._filters, self._query_capabilities[node])


def _query_groups(rows: Iterable[CohortRow], most: int) -> list[QueryGroup]:
    """Rows with the same identifiers together, and up to ``most`` StudyInstanceUIDs together."""
    alike: dict[tuple[object, ...], list[CohortRow]] = {}
    for row in rows:
        key = (row.patient_id, row.accession_number, row.study_instance_uid)
        # A row without identifiers is a date window of its own.
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


def _collect_into(answers: dict[int, Answer]) -> Take:
    def take(row: CohortRow, answer: Answer) -> None:
        answers[row.line] = answer

    return take


def _findings(row: CohortRow, answer: Answer) -> RowFindings | None:
    """The findings of a row on its cohort's only node."""
    if isinstance(answer, str):
        return RowFindings(row.line, reason=answer)
    if answer is None:
        return None
    return RowFindings(row.line, answer.studies, answer.reason, answer.near_misses, answer.gaps)


class _FindingsBatch:
    """Findings on their way into the ledger, recorded in batches. Thread-safe."""

    def __init__(self, ledger: Ledger, cohort: int, queries: dict[int, list[RowQuery]]) -> None:
        self.count = 0
        self._queries = queries
        self._ledger = ledger
        self._cohort = cohort
        self._waiting: list[RowFindings] = []
        self._lock = threading.Lock()

    def add(self, findings: RowFindings | None) -> None:
        """Add the findings of a row, unless it stays open; a full batch is recorded."""
        if findings is None:
            return
        with self._lock:
            self.count += 1
            queries = self._queries.pop(findings.line, ())
            self._waiting.append(findings._replace(queries=queries))
            if len(self._waiting) < ROWS_PER_WRITE:
                return
            waiting, self._waiting = self._waiting, []
        self._ledger.rows.record_discoveries(self._cohort, waiting)

    def flush(self) -> None:
        """Record the findings that are waiting."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        self._ledger.rows.record_discoveries(self._cohort, waiting)
