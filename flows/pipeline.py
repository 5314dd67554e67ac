"""The steps that the pulling flows share: discover, pull, report.

A dry run ends after discovery, with an estimate. A run that is
cancelled ends at once, without reports.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from prefect import get_run_logger
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from prefect_dicom.core.errors import PrefectDicomError
from prefect_dicom.flows.cancellation import controlled_by_prefect
from prefect_dicom.flows.chunks import error_of, pull_in_chunks
from prefect_dicom.flows.concurrency_limits import concurrency_limits_of_nodes
from prefect_dicom.ledger import Totals
from prefect_dicom.report import write_reports
from prefect_dicom.report.estimate import Estimate, estimate_pull, write_estimate
from prefect_dicom.run.loop import DiscoveryLoop, PullLoop, note_disabled_nodes, remaining_error
from prefect_dicom.run.run import DryRun, Run
from prefect_dicom.tasks.discover import discover_rows
from prefect_dicom.tasks.events import events_to_prefect
from prefect_dicom.tasks.report import (
    ProgressArtifact,
    link_report,
    publish_estimate,
    publish_results,
)

_MOST_TASKS = 128
"""Threads of a flow's task runner; the concurrency limits of the nodes keep far fewer busy."""


def task_runner() -> TaskRunner[Any]:
    """The task runner of the flows: threads of the flow's own process."""
    return ThreadPoolTaskRunner(max_workers=_MOST_TASKS)


def run_pipeline(run: Run) -> Totals:
    """Discover and pull a registered cohort as far as possible now, and report.

    Returns
    -------
    Totals
        Rows and studies of the cohort, by verdict and by state.

    Raises
    ------
    PrefectDicomError
        The error that stopped the last pass; archived studies and written reports stay.
    """
    progress = ProgressArtifact(run.cohort.name)
    with events_to_prefect(run):
        link_report(run.cohort, run.site.reports)
        loop = PullLoop(
            run=run,
            discover=partial(_discover, run),
            pull=lambda: pull_in_chunks(run, loop.look),
            show=progress.show,
            say=get_run_logger().info,
            limits=partial(concurrency_limits_of_nodes, run),
        )
        with controlled_by_prefect(run):
            trouble = loop.work_through()
        totals = run.reporting.totals()
        progress.show(lambda: totals, run.reporting.format_waits(), now=True)
        if run.control.is_cancelled():
            return totals
        run.reporting.publish_end(trouble, totals)
        folder = write_reports(run.ledger, run.cohort, run.site.reports)
        run.reporting.write_page(trouble)
        publish_results(run.ledger, run.cohort, totals, folder)
        _raise_remaining(run, trouble, totals)
        return totals


def run_dry(run: DryRun) -> Estimate:
    """Discover the studies of a registered cohort as far as possible now, without a retrieve.

    Returns
    -------
    Estimate
        What pulling them would take.

    Raises
    ------
    PrefectDicomError
        The error that stopped the last pass; found studies and written reports stay.
    """
    progress = ProgressArtifact(run.cohort.name)
    loop = DiscoveryLoop(
        run=run,
        discover=partial(_discover, run),
        show=progress.show,
        say=get_run_logger().info,
        limits=partial(concurrency_limits_of_nodes, run),
    )
    with events_to_prefect(run), controlled_by_prefect(run):
        trouble = loop.work_through()
    run.discovery.limit_per_patient()
    totals = run.reporting.totals()
    progress.show(lambda: totals, now=True)
    estimate = estimate_pull(run.ledger, run.cohort, run.site)
    folder = write_reports(run.ledger, run.cohort, run.site.reports)
    write_estimate(estimate, folder)
    run.reporting.write_page(trouble)
    publish_estimate(run.cohort, estimate)
    _raise_remaining(run, trouble, totals)
    return estimate


def _discover(run: DryRun, first_line: int, last_line: int) -> PrefectDicomError | None:
    state = discover_rows(run, first_line, last_line, return_state=True)
    return None if state.is_completed() else error_of(state)


def _raise_remaining(run: DryRun, trouble: PrefectDicomError | None, totals: Totals) -> None:
    note_disabled_nodes(run)
    error = remaining_error(run, trouble, totals)
    if error is not None:
        get_run_logger().error("%s %s", error.reason.meaning, error.reason.what_to_do)
        raise error
