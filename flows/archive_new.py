"""Archive all studies of the last days: a cohort by date, pulled like any other.

A study that reaches the PACS days after its StudyDate is found by a later run, because every run
looks back over several days. Archived instances are not requested again.
"""

from __future__ import annotations

from datetime import date

from prefect import Flow, flow, get_run_logger
from prefect.client.schemas.objects import State

from prefect_dicom.blocks import resolve_site
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.flows.binding import bound
from prefect_dicom.flows.cancellation import final_state
from prefect_dicom.flows.pipeline import run_pipeline, task_runner
from prefect_dicom.ledger import Cohort, Ledger
from prefect_dicom.report import format_totals
from prefect_dicom.run.monitoring import measured
from prefect_dicom.run.registration import register_new
from prefect_dicom.run.run import open_run
from prefect_dicom.tasks.error_translation import without_phi


@flow(
    name="archive-new",
    task_runner=task_runner(),
    persist_result=False,
)
def archive_new(site: str = "site.yaml", node: str | None = None, days: int = 7) -> State:
    """Archive every study of the last days.

    Parameters
    ----------
    site : str
        Path of the site's YAML file, or ``block:NAME`` of a DicomSite block.
    node : str, optional
        Which of the site's PACS nodes to query; needed where it has several.
    days : int
        How many days to look back; the last one is yesterday in this host's time zone.

    Returns
    -------
    State
        ``Completed``, or ``Partial`` (a completed state) where studies are not archived;
        ``Cancelled`` where it was cancelled.
    """
    with without_phi():
        settings = resolve_site(site)
        with Ledger.open(ledger_url(settings)) as ledger:
            cohort = register_new(settings, node, date.today(), days, ledger=ledger)
            return _archive(settings, ledger, cohort)


def archive_registered(site: Site, ledger: Ledger, cohort: Cohort) -> Flow[..., State]:
    """The flow :func:`archive_new` over a cohort that is registered in an open ledger."""

    def body() -> State:
        with without_phi():
            return _archive(site, ledger, cohort)

    return bound(archive_new, None, body)


def _archive(site: Site, ledger: Ledger, cohort: Cohort) -> State:
    with open_run(site, cohort.number, ledger=ledger) as run, measured(run):
        totals = run_pipeline(run)
        end = final_state(run, totals)
    get_run_logger().info("cohort %s: %s", cohort.name, format_totals(totals))
    return end
