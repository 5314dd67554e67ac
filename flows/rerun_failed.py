"""The flow ``rerun-failed``: the same pipeline over what the ledger has as retriable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import flow, get_run_logger, runtime
from prefect.client.schemas.objects import State
from prefect.states import Completed

from prefect_dicom.blocks import resolve_site
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.core.errors import Interrupted, PrefectDicomError
from prefect_dicom.flows.prefect_engine import PrefectEngine, state_of, task_runner
from prefect_dicom.ledger import Ledger
from prefect_dicom.run.engine import EndName
from prefect_dicom.run.error_translation import without_phi
from prefect_dicom.run.pipeline import rerun
from prefect_dicom.run.registration import cohorts_to_rerun


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
                return state_of(rerun(PrefectEngine(), settings, ledger, cohort, chosen))
            return _rerun_all(settings, ledger, chosen)


def _rerun_all(site: Site, ledger: Ledger, chosen: Mapping[str, tuple[Any, ...]]) -> State:
    """Rerun cohort after cohort; an error of one does not stop the others."""
    trouble: PrefectDicomError | None = None
    whole, partial = 0, 0
    for name in cohorts_to_rerun(site, chosen, ledger=ledger):
        try:
            end = rerun(PrefectEngine(), site, ledger, name, chosen)
        except Interrupted:
            raise
        except PrefectDicomError as error:
            get_run_logger().error("cohort %s: %s", name, error)
            trouble = trouble or error
            continue
        if end.name is EndName.CANCELLED:
            return state_of(end)
        get_run_logger().info("cohort %s: %s", name, end.message)
        whole += end.name is EndName.COMPLETED
        partial += end.name is not EndName.COMPLETED
    if trouble is not None:
        raise trouble
    words = f"{whole} cohorts archived as a whole, {partial} with rows left"
    return Completed(name="Partial", message=words) if partial else Completed(message=words)
