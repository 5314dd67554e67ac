"""The order of work both pulling flows share: discover, then chunks through a bounded window.

A chunk is retrieved by one task and archived by another, so that one arrives while another is
uploaded. New retrieves are held back, never an object under way, while uploads lag or the
spool's reserve is near.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from functools import partial

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.futures import PrefectFuture
from prefect.states import State

from prefect_dicom.errors import ConfigurationError, PrefectDicomError
from prefect_dicom.ledger import Totals
from prefect_dicom.model import Chunk, Disposition
from prefect_dicom.report import write_reports
from prefect_dicom.steps import Pull
from prefect_dicom.tasks.archive import archive_chunk
from prefect_dicom.tasks.discover import discover_rows
from prefect_dicom.tasks.edge import passes_by_itself
from prefect_dicom.tasks.report import ProgressArtifact, publish_results
from prefect_dicom.tasks.retrieve import retrieve_chunk

MOST_TASKS = 128
"""Threads of a flow's task runner; the window keeps far fewer busy."""
_CHUNKS_WAITING_FOR_UPLOAD = 2
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
    progress = ProgressArtifact(pull.cohort.name)
    with _share_of_the_node(pull):
        trouble = _one_pass(pull, progress)
        for delay in pull.site.retry_after_seconds:
            if not _worth_another_pass(pull, trouble):
                break
            get_run_logger().info("again in %g s: what a passing reason has stopped", delay)
            pull.stop.wait(delay)
            trouble = _one_pass(pull, progress)
    totals = pull.ledger.totals(pull.cohort.number)
    progress.show(lambda: totals, now=True)
    folder = write_reports(pull.ledger, pull.cohort, pull.site.reports)
    publish_results(pull.ledger, pull.cohort, folder)
    if trouble is not None:
        get_run_logger().error("%s %s", trouble.reason.meaning, trouble.reason.advice)
        raise trouble
    return totals


def _worth_another_pass(pull: Pull, trouble: PrefectDicomError | None) -> bool:
    """Whether anything is left that failed, or was kept from its end, for a passing reason."""
    if pull.halted or (trouble is not None and not passes_by_itself(trouble)):
        return False
    reopened = pull.reopen_transient()
    return reopened or trouble is not None


def _one_pass(pull: Pull, progress: ProgressArtifact) -> PrefectDicomError | None:
    """All open rows, then all open studies, once; returns what kept it from its end."""
    count = partial(pull.ledger.totals, pull.cohort.number)
    for first_line, last_line in pull.discovery_pages():
        state = discover_rows(first_line, last_line, return_state=True)
        if not state.is_completed():
            return _error_of(state)
        progress.show(count)
    return _pull_studies(pull, progress)


def _pull_studies(pull: Pull, progress: ProgressArtifact) -> PrefectDicomError | None:
    chunks = pull.chunks()
    count = partial(pull.ledger.totals, pull.cohort.number)
    associations = pull.site.nodes[pull.cohort.node].limits.associations
    finished: queue.SimpleQueue[PrefectFuture] = queue.SimpleQueue()
    retrieving: dict[PrefectFuture, Chunk] = {}
    archiving: dict[PrefectFuture, Chunk] = {}
    trouble: PrefectDicomError | None = None
    failed_in_a_row = 0
    exhausted = False

    def submit(task, chunk: Chunk, stage: dict[PrefectFuture, Chunk]) -> None:
        future = task.submit(chunk.number, chunk.node, chunk.studies)
        stage[future] = chunk
        future.add_done_callback(finished.put)

    try:
        while True:
            while (
                not exhausted
                and len(retrieving) < associations
                and len(archiving) < associations + _CHUNKS_WAITING_FOR_UPLOAD
                and (pull.spool.free_bytes() > 0 or not (retrieving or archiving))
            ):
                # With a full spool one chunk at a time: what lies there may be part of it.
                if (chunk := next(chunks, None)) is None:
                    exhausted = True
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
                    exhausted = (
                        exhausted
                        or trouble.disposition is Disposition.OPERATOR
                        or failed_in_a_row >= _FAILED_CHUNKS_BEFORE_STOPPING
                    )
                else:
                    failed_in_a_row = 0
                    if stage is retrieving:
                        submit(archive_chunk, chunk, archiving)
            progress.show(count)
    except BaseException:
        # Told to stop. What is under way ends first: it needs what the caller closes next.
        pull.stop.set()
        for future in (*retrieving, *archiving):
            future.wait()
        raise


def _error_of(state: State) -> PrefectDicomError:
    error = state.result(raise_on_failure=False)
    return error if isinstance(error, PrefectDicomError) else PrefectDicomError("unexpected")


@contextlib.contextmanager
def _share_of_the_node(pull: Pull) -> Iterator[None]:
    """Hold this run's associations of the limit ``pacs-<node>``, where the site has made one.

    Held for the whole run: Prefect's limits poll, and waste most of what they grant for short
    holds. Within the run the window bounds what is under way.
    """
    limit = f"pacs-{pull.cohort.node}"
    with get_client(sync_client=True) as client:
        try:
            known = client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound:
            yield
            return
    occupied = pull.site.nodes[pull.cohort.node].limits.associations
    if known.active and known.limit < occupied:
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
