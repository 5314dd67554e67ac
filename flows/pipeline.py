"""The order of work that the pulling flows share: discover, pull, report.

A dry run ends where the studies are found, with what pulling them would take. A run that is told
to end does so at once, without reports.
"""

from __future__ import annotations

from functools import partial

from prefect import get_run_logger

from prefect_dicom.core.errors import PrefectDicomError
from prefect_dicom.core.model import RequestedState
from prefect_dicom.flows.chunks import error_of, pull_in_chunks
from prefect_dicom.flows.hearing import hearing_of_prefect
from prefect_dicom.flows.shares import share_of_the_nodes
from prefect_dicom.ledger import Totals
from prefect_dicom.report import write_reports
from prefect_dicom.report.estimate import Estimate, estimate_pull, write_estimate
from prefect_dicom.run.loop import Passes, PullPasses, what_is_left
from prefect_dicom.run.planning import Plan
from prefect_dicom.run.steps import Pull
from prefect_dicom.tasks.discover import discover_rows
from prefect_dicom.tasks.events import told_to_prefect
from prefect_dicom.tasks.report import (
    ProgressArtifact,
    link_report,
    publish_estimate,
    publish_results,
)

MOST_TASKS = 128
"""Threads of a flow's task runner; the window keeps far fewer busy."""


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
    with told_to_prefect(pull):
        link_report(pull.cohort, pull.site.reports)
        passes = PullPasses(
            plan=pull,
            ask_for_rows=_ask_for_rows,
            pull_studies=lambda: pull_in_chunks(pull, passes.look),
            show=progress.show,
            say=get_run_logger().info,
            share=partial(share_of_the_nodes, pull),
        )
        with hearing_of_prefect(pull):
            trouble = passes.run()
        totals = pull.ledger.progress.totals(pull.cohort.number)
        progress.show(lambda: totals, pull.waits(), now=True)
        if pull.told() is RequestedState.CANCELLED:
            return totals
        pull.tell_of_the_end(trouble, totals)
        folder = write_reports(pull.ledger, pull.cohort, pull.site.reports)
        pull.write_page(trouble)
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
    passes = Passes(
        plan=plan,
        ask_for_rows=_ask_for_rows,
        show=progress.show,
        say=get_run_logger().info,
        share=partial(share_of_the_nodes, plan),
    )
    with told_to_prefect(plan), hearing_of_prefect(plan):
        trouble = passes.run()
    plan.limit_per_patient()
    totals = plan.ledger.progress.totals(plan.cohort.number)
    progress.show(lambda: totals, now=True)
    estimate = estimate_pull(plan.ledger, plan.cohort, plan.site)
    folder = write_reports(plan.ledger, plan.cohort, plan.site.reports)
    write_estimate(estimate, folder)
    plan.write_page(trouble)
    publish_estimate(plan.cohort, estimate)
    _raise(plan, trouble, totals)
    return estimate


def _ask_for_rows(first_line: int, last_line: int) -> PrefectDicomError | None:
    state = discover_rows(first_line, last_line, return_state=True)
    return None if state.is_completed() else error_of(state)


def _raise(plan: Plan, trouble: PrefectDicomError | None, totals: Totals) -> None:
    left = what_is_left(plan, trouble, totals)
    if left is not None:
        get_run_logger().error("%s %s", left.reason.meaning, left.reason.what_to_do)
        raise left
