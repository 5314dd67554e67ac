"""The flow ``rerun-failed``: the same pipeline over what the ledger has as retriable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import Flow, flow, get_run_logger, runtime
from prefect.client.schemas.objects import State
from prefect.states import Completed

from prefect_dicom.blocks import resolve_site
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.core.errors import Interrupted, PrefectDicomError
from prefect_dicom.flows.binding import bound
from prefect_dicom.flows.cancellation import final_state
from prefect_dicom.flows.pipeline import run_pipeline, task_runner
from prefect_dicom.ledger import Cohort, Ledger
from prefect_dicom.run.monitoring import measured
from prefect_dicom.run.registration import cohorts_to_rerun
from prefect_dicom.run.run import open_run
from prefect_dicom.tasks.error_translation import without_phi


def _flow_run_name() -> str:
    return f"rerun-{runtime.flow_run.parameters['cohort'] or 'all'}"


@flow(
    name="rerun-failed",
    flow_run_name=_flow_run_name,
    task_runner=task_runner(),
    persist_result=False,
)
def rerun_failed(
    cohort: str | None = None,
    site: str = "site.yaml",
    reasons: tuple[str, ...] = (),
    nodes: tuple[str, ...] = (),
    lines: tuple[int, ...] = (),
) -> State:
    """Continue a cohort: what was interrupted, and what failed and can be retried.

    Parameters
    ----------
    cohort : str, optional
        Name or number of the cohort in the ledger; without one, all cohorts with unfinished or
        retriable rows, those of higher priority first. Paused ones are not started.
    site : str
        Path of the site's YAML file, or ``block:NAME`` of a DicomSite block.
    reasons : tuple of str
        Only failures with these reason codes, permanent ones too; by default all that are not
        permanent.
    nodes, lines : tuple
        Only studies of these nodes, or of these lines of the cohort file.
    """
    chosen = {"reasons": reasons, "nodes": nodes, "lines": lines}
    with without_phi():
        settings = resolve_site(site)
        with Ledger.open(ledger_url(settings)) as ledger:
            if cohort is not None:
                return _rerun(settings, ledger, cohort, chosen)
            return _rerun_all(settings, ledger, chosen)


def rerun_registered(
    site: Site, ledger: Ledger, cohort: Cohort, chosen: Mapping[str, tuple[Any, ...]]
) -> Flow[..., State]:
    """The flow :func:`rerun_failed` over a cohort in an open ledger.

    Parameters
    ----------
    chosen : mapping
        Which failures are retried, as in :func:`rerun_failed`.
    """

    def body() -> State:
        with without_phi():
            return _rerun(site, ledger, cohort.name, chosen)

    return bound(rerun_failed, f"rerun-{cohort.name}", body)


def _rerun(site: Site, ledger: Ledger, cohort: str, chosen: Mapping[str, tuple[Any, ...]]) -> State:
    with open_run(site, cohort, "rerun", ledger=ledger) as run, measured(run):
        reopened = ledger.cohorts.reopen(run.cohort.number, **chosen)
        get_run_logger().info("%d studies and %d rows again", reopened.studies, reopened.rows)
        return final_state(run, run_pipeline(run))


def _rerun_all(site: Site, ledger: Ledger, chosen: Mapping[str, tuple[Any, ...]]) -> State:
    """Rerun cohort after cohort; an error of one does not stop the others."""
    trouble: PrefectDicomError | None = None
    whole, partial = 0, 0
    for name in cohorts_to_rerun(site, chosen, ledger=ledger):
        try:
            end = _rerun(site, ledger, name, chosen)
        except Interrupted:
            raise
        except PrefectDicomError as error:
            get_run_logger().error("cohort %s: %s", name, error)
            trouble = trouble or error
            continue
        if end.is_cancelled():
            return end
        get_run_logger().info("cohort %s: %s", name, end.message)
        whole += end.name == "Completed"
        partial += end.name != "Completed"
    if trouble is not None:
        raise trouble
    words = f"{whole} cohorts archived as a whole, {partial} with rows left"
    return Completed(name="Partial", message=words) if partial else Completed(message=words)
