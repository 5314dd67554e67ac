"""Cohort file to studies to bucket to report: the flow a user runs.

Order: read and register the cohort (all complaints at once, nothing sent), discover its rows,
pull its studies chunk by chunk, try again what failed for a passing reason, report. What is
finished creates no task runs, so running a finished cohort again costs next to nothing.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow, get_run_logger, runtime
from prefect.states import Completed, State
from prefect.task_runners import ThreadPoolTaskRunner

from prefect_dicom.blocks import resolve_site
from prefect_dicom.cohort.definition import cohort_file_digest
from prefect_dicom.core.errors import CohortError
from prefect_dicom.flows.hearing import end_of
from prefect_dicom.flows.pipeline import MOST_TASKS, run_pipeline, run_plan
from prefect_dicom.report import format_totals
from prefect_dicom.report.formatting import format_estimate
from prefect_dicom.run.monitoring import measured
from prefect_dicom.run.planning import open_plan
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.steps import open_pull
from prefect_dicom.tasks.edge import without_phi


def _flow_run_name() -> str:
    try:
        digest = cohort_file_digest(Path(runtime.flow_run.parameters["cohort"]))
    except (OSError, CohortError):
        return "pull"
    return f"pull-{digest[:12]}"


@flow(
    name="pull-cohort",
    flow_run_name=_flow_run_name,
    task_runner=ThreadPoolTaskRunner(max_workers=MOST_TASKS),
    persist_result=False,
)
def pull_cohort(
    cohort: str,
    site: str = "site.yaml",
    node: str | list[str] | None = None,
    name: str | None = None,
    dry_run: bool = False,
    every_node: bool = False,
) -> State:
    """Pull every study of a cohort into the archive.

    Parameters
    ----------
    cohort : str
        Path of the cohort file (CSV, XLSX or Parquet, or a definition in YAML).
    site : str
        Path of the site's YAML file, or ``block:NAME`` of a DicomSite block.
    node : str or list of str, optional
        Which of the site's PACS nodes to ask; needed where it has several. Several in the order
        in which they are asked, for what those before have no answer for or cannot deliver.
    name : str, optional
        A name for the cohort; by default the beginning of the file's SHA-256.
    dry_run : bool
        Find the studies, which the pull that follows needs not do again, and estimate what
        pulling them would take. Nothing is retrieved or archived, and no receiver is started.
    every_node : bool
        Ask each of several nodes for every row.

    Returns
    -------
    State
        ``Completed``, or ``Partial`` (a completed state) where rows are not archived; after a dry
        run ``Planned``; ``Cancelled`` where it was told to end.
    """
    with without_phi():
        settings = resolve_site(site)
        registered = register_cohort(settings, Path(cohort), node, name, every_node=every_node)
        if dry_run:
            with open_plan(settings, registered.number) as plan, measured(plan):
                words = format_estimate(run_plan(plan))
                if plan.is_stopping():
                    return end_of(plan, plan.ledger.progress.totals(registered.number))
            return Completed(name="Planned", message=words)
        with open_pull(settings, registered.number, "pull") as pull, measured(pull):
            totals = run_pipeline(pull)
            end = end_of(pull, totals)
    get_run_logger().info("cohort %s: %s", registered.name, format_totals(totals))
    return end
