"""The flow ``pull-cohort``: from a cohort file to archived studies and a report.

Order: read and register the cohort (all faults at once, nothing sent), discover its rows,
pull its studies chunk by chunk, retry transient failures, report. Finished rows and studies create
no task runs, so running a finished cohort again costs next to nothing.
"""

from __future__ import annotations

from pathlib import Path

from prefect import flow, runtime
from prefect.client.schemas.objects import State

from prefect_dicom.blocks import resolve_site
from prefect_dicom.cohort.definition import cohort_file_digest
from prefect_dicom.cohort.list_options import ListOptions
from prefect_dicom.config.site import ledger_url
from prefect_dicom.core.errors import CohortError
from prefect_dicom.flows.prefect_engine import PrefectEngine, state_of, task_runner
from prefect_dicom.ledger import Ledger
from prefect_dicom.run.error_translation import without_phi
from prefect_dicom.run.pipeline import plan, pull
from prefect_dicom.run.registration import register_cohort


def _flow_run_name() -> str:
    try:
        given = runtime.flow_run.parameters
        options = ListOptions.of(given.get("hidden_rows"), given.get("faulty_lines"))
        digest = cohort_file_digest(Path(given["cohort"]), options)
    except (OSError, CohortError):
        return "pull"
    return f"pull-{digest[:12]}"


@flow(
    name="pull-cohort",
    flow_run_name=_flow_run_name,
    task_runner=task_runner(),
    persist_result=False,
)
def pull_cohort(
    cohort: str,
    site: str = "site.yaml",
    node: str | list[str] | None = None,
    name: str | None = None,
    dry_run: bool = False,
    every_node: bool = False,
    hidden_rows: str | None = None,
    faulty_lines: str | None = None,
) -> State:
    """Pull every study of a cohort into the archive.

    Parameters
    ----------
    cohort : str
        Path of the cohort file (CSV, XLSX or Parquet, or a definition in YAML).
    site : str
        Path of the site's YAML file, or ``block:NAME`` of a DicomSite block.
    node : str or list of str, optional
        Which of the site's PACS nodes to query; needed where it has several. Of several, each next
        one is used for what those before it lack or cannot deliver.
    name : str, optional
        A name for the cohort; by default the beginning of the file's SHA-256.
    dry_run : bool
        Find the studies, which a following pull does not repeat, and estimate what pulling them
        would take. Nothing is retrieved or archived, and no receiver is started.
    every_node : bool
        Query each of several nodes for every row.
    hidden_rows : {"take", "leave-out"}, optional
        Whether rows that a workbook hides are taken. By default a workbook that has some is
        refused, and says how many.
    faulty_lines : {"refuse", "set-apart"}, optional
        Whether lines with faults refuse the file, the default, or are set apart with the verdict
        ``faulty`` so that the others go on.

    Returns
    -------
    State
        ``Completed``, or ``Partial`` (a completed state) where rows are not archived; after a dry
        run ``Planned``; ``Cancelled`` where it was cancelled.
    """
    with without_phi():
        settings = resolve_site(site)
        with Ledger.open(ledger_url(settings)) as ledger:
            registered = register_cohort(
                settings,
                Path(cohort),
                node,
                name,
                every_node=every_node,
                options=ListOptions.of(hidden_rows, faulty_lines),
                ledger=ledger,
            )
            work = plan if dry_run else pull
            return state_of(work(PrefectEngine(), settings, ledger, registered))
