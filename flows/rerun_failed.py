"""The same pipeline over what the ledger says can be tried again."""

from __future__ import annotations

from prefect import flow, get_run_logger
from prefect.states import State
from prefect.task_runners import ThreadPoolTaskRunner

from prefect_dicom.blocks import resolve_site
from prefect_dicom.flows.hearing import end_of
from prefect_dicom.flows.pipeline import MOST_TASKS, run_pipeline
from prefect_dicom.monitoring import measured
from prefect_dicom.steps import open_pull
from prefect_dicom.tasks.edge import without_phi


@flow(
    name="rerun-failed",
    flow_run_name="rerun-{cohort}",
    task_runner=ThreadPoolTaskRunner(max_workers=MOST_TASKS),
    persist_result=False,
)
def rerun_failed(
    cohort: str,
    site: str = "site.yaml",
    reasons: tuple[str, ...] = (),
    nodes: tuple[str, ...] = (),
    lines: tuple[int, ...] = (),
) -> State:
    """Go on with a cohort: what was interrupted, and what failed and can be retried.

    Parameters
    ----------
    cohort : str
        Name or number of the cohort in the ledger.
    site : str
        Path of the site's YAML file, or ``block:NAME`` of a DicomSite block.
    reasons : tuple of str
        Only failures with these reason codes, permanent ones too; by default all that are not
        permanent.
    nodes, lines : tuple
        Only studies of these nodes, or of these lines of the cohort file.
    """
    with without_phi(), open_pull(resolve_site(site), cohort, "rerun") as pull, measured(pull):
        reopened = pull.ledger.reopen(pull.cohort.number, reasons=reasons, nodes=nodes, lines=lines)
        get_run_logger().info("%d studies and %d rows again", reopened.studies, reopened.rows)
        return end_of(pull, run_pipeline(pull))
