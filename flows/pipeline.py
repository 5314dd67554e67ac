"""The order of work both pulling flows share: discover, then chunks through a bounded window.

A dry run ends where the studies are found, with what pulling them would take.

A chunk is retrieved by one task and archived by another, so that one arrives while another is
uploaded. New retrieves are held back, never an object under way, while uploads lag or the
spool's reserve is near.

A pass that the node has kept from its end is followed by another when the node's clock says so:
one that stopped at a failure of the node, and one that left something undone for a passing
reason, wait by the same clock. When that is used up, or a person has to act first, what is left
stays pending for a rerun.

A run whose cohort is paused gives back what it has in hand, waits in place and goes on with
another pass. One that is told to end does so at once, without reports: what it leaves is what a
run leaves that was killed, and the ledger knows all of it.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator
from functools import partial

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.futures import PrefectFuture
from prefect.states import State

from prefect_dicom.errors import (
    ConfigurationError,
    Interrupted,
    PacsError,
    PrefectDicomError,
    WindowClosed,
)
from prefect_dicom.estimate import Estimate, estimate_pull, write_estimate
from prefect_dicom.events import Event
from prefect_dicom.flows.hearing import hearing_of_prefect
from prefect_dicom.ledger import Totals
from prefect_dicom.model import Chunk, Disposition, StudyState, Verdict, Wish
from prefect_dicom.planning import Plan
from prefect_dicom.policy import CHUNKS_WAITING_FOR_UPLOAD
from prefect_dicom.report import write_reports
from prefect_dicom.steps import Pull
from prefect_dicom.tasks.archive import archive_chunk
from prefect_dicom.tasks.discover import discover_rows
from prefect_dicom.tasks.edge import passes_by_itself
from prefect_dicom.tasks.events import told_to_prefect
from prefect_dicom.tasks.report import (
    ProgressArtifact,
    link_report,
    publish_estimate,
    publish_results,
)
from prefect_dicom.tasks.retrieve import retrieve_chunk

MOST_TASKS = 128
"""Threads of a flow's task runner; the window keeps far fewer busy."""
_FAILED_CHUNKS_BEFORE_STOPPING = 2
_TICK_SECONDS = 2.0


def run_pipeline(pull: Pull) -> Totals:
    """Bring a registered cohort as far as it can be brought now, and report.

    Returns
    -------
    Totals
        Where the cohort stands.

    Raises
    ------
    PrefectDicomError
        What kept the last pass from its end; what was archived and reported before stays.
    """
    with told_to_prefect(pull):
        progress = ProgressArtifact(pull.cohort.name)
        link_report(pull.cohort, pull.site.reports)
        trouble = _passes(pull, progress, lambda: _one_pass(pull, progress))
        totals = pull.ledger.totals(pull.cohort.number)
        progress.show(lambda: totals, pull.waits(), now=True)
        if pull.told() is Wish.CANCEL:
            return totals
        _tell_of_the_end(pull, trouble, totals)
        folder = write_reports(pull.ledger, pull.cohort, pull.site.reports)
        _write_page(pull, trouble)
        publish_results(pull.ledger, pull.cohort, totals, folder)
        _raise(pull, trouble, totals)
        return totals


def run_plan(plan: Plan) -> Estimate:
    """Find the studies of a registered cohort, as far as they can be found now, and no more.

    Returns
    -------
    Estimate
        What pulling them would take.

    Raises
    ------
    PrefectDicomError
        What kept the last pass from its end; what was found and reported before stays.
    """
    progress = ProgressArtifact(plan.cohort.name)
    with told_to_prefect(plan):
        trouble = _passes(plan, progress, lambda: _find_studies(plan, progress))
    plan.limit_per_patient()
    totals = plan.ledger.totals(plan.cohort.number)
    progress.show(lambda: totals, now=True)
    estimate = estimate_pull(plan.ledger, plan.cohort, plan.site)
    folder = write_reports(plan.ledger, plan.cohort, plan.site.reports)
    write_estimate(estimate, folder)
    _write_page(plan, trouble)
    publish_estimate(plan.cohort, estimate)
    _raise(plan, trouble, totals)
    return estimate


def _tell_of_the_end(plan: Plan, trouble: PrefectDicomError | None, totals: Totals) -> None:
    figures = {f"rows_{verdict}".replace("-", "_"): totals.rows[verdict] for verdict in Verdict}
    figures |= {f"studies_{state}": totals.studies[state] for state in StudyState}
    plan.tell(
        Event(
            name="cohort.finished",
            at=plan.clock_time.now(),
            reason=None if trouble is None else trouble.code,
            figures={
                "rows": totals.rows.total(),
                **figures,
                "instances": totals.stored,
                "size_bytes": totals.size_bytes,
            },
        )
    )


def _write_page(plan: Plan, trouble: PrefectDicomError | None) -> None:
    """The report of the cohort at the end of the run, with what kept it from its end."""
    if trouble is not None:
        plan.ledger.record_trouble(plan.run, trouble.code)
    plan.sample(now=True)
    plan.page.write_last(plan.ledger)


def _passes(
    plan: Plan, progress: ProgressArtifact, one_pass: Callable[[], PrefectDicomError | None]
) -> PrefectDicomError | None:
    """Pass after pass, while there is reason to; returns what kept the last one from its end.

    A run that begins while its cohort is paused ends at once: those that a schedule begins do
    not pile up. One that was under way waits.
    """
    if plan.told() is Wish.PAUSE:
        return Interrupted()
    count = partial(plan.ledger.totals, plan.cohort.number)
    with hearing_of_prefect(plan):
        while True:
            trouble = _passes_until_told(plan, progress, one_pass)
            if not isinstance(trouble, Interrupted):
                return trouble
            if isinstance(trouble, WindowClosed) and not plan.is_stopping():
                if not _wait_for_window(plan, progress):
                    return trouble
                continue
            if not plan.wait_in_place(partial(_look, plan, progress, count)):
                return trouble


def _look(plan: Plan, progress: ProgressArtifact, count: Callable[[], Totals]) -> None:
    progress.show(count, plan.waits())
    plan.sample()


def _passes_until_told(
    plan: Plan, progress: ProgressArtifact, one_pass: Callable[[], PrefectDicomError | None]
) -> PrefectDicomError | None:
    """The same, until people want something else of the run."""
    passes = 0
    with _share_of_the_node(plan):
        trouble = one_pass()
        while _worth_another_pass(plan, trouble, passes := passes + 1):
            get_run_logger().info("%s", plan.waits() or "another pass")
            _wait(plan, progress)
            trouble = one_pass()
    return trouble


def _wait_for_window(plan: Plan, progress: ProgressArtifact) -> bool:
    """Wait until a node may be asked again, where the site wants it so; whether to go on."""
    closed = [node for node in plan.cohort.nodes if plan.turns.is_waited_for(node)]
    if not closed:
        return False
    count = partial(plan.ledger.totals, plan.cohort.number)
    plan.close_requestors()
    progress.show(count, plan.waits(), now=True)
    while left := min(map(plan.turns.seconds_closed, closed)):
        plan.clock_time.wait(plan.stop, min(left, plan.clock_time.look_seconds))
        if plan.is_stopping():
            break
        _look(plan, progress, count)
    return True


def _raise(plan: Plan, trouble: PrefectDicomError | None, totals: Totals) -> None:
    missing = next((n for n in plan.cohort.nodes if plan.others_go_on(n)), None)
    if missing is not None and (trouble is None or isinstance(trouble, PacsError)):
        if not totals.rows[Verdict.PENDING]:
            # Noted with the cohort, which has come to its end without that node.
            return
        trouble = trouble or PacsError(plan.clock(missing).halted)
    if trouble is not None and not isinstance(trouble, Interrupted):
        if isinstance(trouble, PacsError):
            trouble = _with_what_is_left(plan, trouble, totals)
        get_run_logger().error("%s %s", trouble.reason.meaning, trouble.reason.what_to_do)
        raise trouble


def _worth_another_pass(plan: Plan, trouble: PrefectDicomError | None, passes: int) -> bool:
    """Whether there is to be another pass; the node's clock then says when."""
    clocks = [clock for clock in map(plan.clock, plan.cohort.nodes) if not clock.halted]
    if not clocks or plan.is_stopping():
        return False
    if isinstance(trouble, PacsError) and len(clocks) < len(plan.cohort.nodes):
        # What that node was to be asked for, the others are.
        trouble = None
    if isinstance(trouble, PacsError) and any(clock.seconds_left() for clock in clocks):
        return True
    if trouble is not None and not passes_by_itself(trouble):
        return False
    # Last, because it changes what has failed: only where it is going to be tried again.
    rested = [clock.rest(passes) for clock in clocks]
    return any(rested) and (plan.reopen_transient() or trouble is not None)


def _wait(plan: Plan, progress: ProgressArtifact) -> None:
    """Wait until a node may be asked, and show it."""
    count = partial(plan.ledger.totals, plan.cohort.number)
    progress.show(count, plan.waits(), now=True)
    while left := plan.seconds_left():
        if plan.clock_time.wait(plan.stop, min(left, _TICK_SECONDS)) or plan.is_stopping():
            return
        _look(plan, progress, count)


def _with_what_is_left(plan: Plan, trouble: PacsError, totals: Totals) -> PacsError:
    """The same, with what its halt means for the cohort."""
    left = totals.rows[Verdict.PENDING]
    nodes = [node for node in plan.cohort.nodes if plan.clock(node).halted] or plan.cohort.nodes
    named = " and ".join(f"node {node}" for node in nodes)
    words = f"{named} is left alone now; {left} rows stay pending, none is lost"
    return PacsError(trouble.code, "; ".join(filter(None, (trouble.detail, words))))


def _one_pass(pull: Pull, progress: ProgressArtifact) -> PrefectDicomError | None:
    """All open rows, then all open studies, once; returns what kept it from its end.

    What other runs were working on belongs to it: they may die over it, on other hosts too.
    """
    if all(map(pull.is_closed, pull.cohort.nodes)):
        # No task is begun only to say that its time has not come.
        return WindowClosed()
    trouble = _find_studies(pull, progress)
    needs_all = pull.selection.per_patient is not None
    if trouble is None or (isinstance(trouble, WindowClosed) and not needs_all):
        # Of several nodes another one may be asked, for what was found there.
        trouble = _pull_and_turn(pull, progress) or trouble
    while trouble is None and _others_leave_some(pull, progress, pull.left_to_others, "studies"):
        trouble = _pull_and_turn(pull, progress)
    return trouble


def _pull_and_turn(pull: Pull, progress: ProgressArtifact) -> PrefectDicomError | None:
    """All open studies; what one node has failed at, the next one is asked for at once."""
    pull.take_turned()
    trouble = _pull_studies(pull, progress)
    while pull.take_turned() and not pull.is_stopping():
        trouble = _pull_studies(pull, progress) or trouble
    return trouble


def _others_leave_some(
    plan: Plan, progress: ProgressArtifact, look: Callable[[], tuple[int, bool]], what: str
) -> bool:
    """Wait for what other runs work on; whether some of it has fallen free, unfinished.

    Parameters
    ----------
    look : callable
        Says how much of it they hold, and whether some has fallen free.
    """
    count = partial(plan.ledger.totals, plan.cohort.number)
    told = False
    # What falls free may be a halted node's, which this run does not ask any more.
    halted = any(plan.clock(node).halted for node in plan.cohort.nodes)
    while not plan.is_stopping():
        held, fallen_free = look()
        if fallen_free or not held or halted:
            return fallen_free and not halted
        words = f"waiting for {held} {what} that another run works on"
        if not told:
            told = True
            get_run_logger().info("%s", words)
        progress.show(count, words)
        plan.clock_time.wait(plan.stop, _TICK_SECONDS)
    # Told to wait or to end: what is left is not done, and that is what keeps it from its end.
    return True


def _find_studies(plan: Plan, progress: ProgressArtifact) -> PrefectDicomError | None:
    """All open rows, once, those that another run has taken among them: which studies there are
    of a patient is known when all have been asked for."""
    trouble = _ask_for_rows(plan, progress)
    while trouble is None and _others_leave_some(plan, progress, plan.rows_of_others, "rows"):
        trouble = _ask_for_rows(plan, progress)
    return trouble


def _ask_for_rows(plan: Plan, progress: ProgressArtifact) -> PrefectDicomError | None:
    if plan.is_stopping():
        return Interrupted()
    count = partial(plan.ledger.totals, plan.cohort.number)
    for first_line, last_line in plan.discovery_pages():
        state = discover_rows(first_line, last_line, return_state=True)
        if not state.is_completed():
            return _error_of(state)
        _look(plan, progress, count)
    return None


def _pull_studies(pull: Pull, progress: ProgressArtifact) -> PrefectDicomError | None:
    chunks = pull.chunks_by_node()
    alone = len(chunks) == 1
    count = partial(pull.ledger.totals, pull.cohort.number)
    finished: queue.SimpleQueue[PrefectFuture] = queue.SimpleQueue()
    retrieving: dict[PrefectFuture, Chunk] = {}
    archiving: dict[PrefectFuture, Chunk] = {}
    trouble: PrefectDicomError | None = None
    failed_in_a_row = 0

    def submit(task, chunk: Chunk, stage: dict[PrefectFuture, Chunk]) -> None:
        future = task.submit(chunk.number, chunk.node, chunk.studies)
        stage[future] = chunk
        future.add_done_callback(finished.put)

    def has_room(node: str) -> bool:
        """Whether a chunk more may be asked of a node."""
        here, waiting = (
            sum(alone or chunk.node == node for chunk in stage.values())
            for stage in (retrieving, archiving)
        )
        most = pull.associations(node)
        return (
            here < most
            and waiting < most + CHUNKS_WAITING_FOR_UPLOAD
            # With a full spool one chunk at a time: what lies there may be part of it.
            and (pull.spool.free_bytes() > 0 or not (retrieving or archiving))
        )

    try:
        while True:
            if pull.is_stopping():
                trouble = Interrupted()
                chunks.clear()
            for node in [node for node in chunks if pull.is_closed(node)]:
                trouble = trouble or WindowClosed()
                del chunks[node]
            for node in list(chunks):
                while node in chunks and has_room(node):
                    if (chunk := next(chunks[node], None)) is None:
                        del chunks[node]
                    else:
                        submit(retrieve_chunk, chunk, retrieving)
            if not retrieving and not archiving:
                return trouble
            with contextlib.suppress(queue.Empty):
                future = finished.get(timeout=_TICK_SECONDS)
                future.wait()  # takes the state from the thread; without it the API is asked
                failed = not future.state.is_completed()
                stage = retrieving if future in retrieving else archiving
                chunk = stage.pop(future)
                if failed:
                    pull.give_back(chunk)
                    trouble = _error_of(future.state)
                    failed_in_a_row += 1
                    of_the_node = isinstance(trouble, WindowClosed) or (
                        isinstance(trouble, PacsError) and pull.others_go_on(chunk.node)
                    )
                    if of_the_node:
                        chunks.pop(chunk.node, None)
                        failed_in_a_row = 0
                    elif (
                        isinstance(trouble, PacsError | Interrupted)
                        or trouble.disposition is Disposition.OPERATOR
                        or failed_in_a_row >= _FAILED_CHUNKS_BEFORE_STOPPING
                    ):
                        chunks.clear()
                else:
                    failed_in_a_row = 0
                    if stage is retrieving:
                        submit(archive_chunk, chunk, archiving)
            _look(pull, progress, count)
    except BaseException:
        # Told to stop. What is under way ends first: it needs what the caller closes next.
        pull.stop.set()
        for future in (*retrieving, *archiving):
            future.wait()
        raise


def _error_of(state: State) -> PrefectDicomError:
    if not state.is_final():
        # Prefect begins no task any more of a run that was suspended.
        return Interrupted()
    error = state.result(raise_on_failure=False)
    return error if isinstance(error, PrefectDicomError) else PrefectDicomError("unexpected")


@contextlib.contextmanager
def _share_of_the_node(plan: Plan) -> Iterator[None]:
    """Hold this run's associations of the limits ``pacs-<node>``, where the site has made some.

    Held for the whole run: Prefect's limits poll, and waste most of what they grant for short
    holds. Within the run the window bounds what is under way.
    """
    with contextlib.ExitStack() as stack:
        # In one order for all runs, so that no two wait for each other.
        for node in sorted(plan.cohort.nodes):
            stack.enter_context(_share_of(plan, node))
        yield


@contextlib.contextmanager
def _share_of(plan: Plan, node: str) -> Iterator[None]:
    limit = f"pacs-{node}"
    with get_client(sync_client=True) as client:
        try:
            known = client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound:
            known = None
    if known is None or not known.active:
        yield
        return
    occupied = plan.site.asked(node).limits.associations
    if known.limit < occupied:
        # Prefect would wait for ever.
        fault = f"allows {known.limit} associations, limits.associations of the node is {occupied}"
        raise ConfigurationError(f"Prefect's concurrency limit {limit}", [fault])
    with concurrency(
        limit,
        occupy=occupied,
        strict=True,
        lease_duration=60,
        raise_on_lease_renewal_failure=False,
    ):
        yield
