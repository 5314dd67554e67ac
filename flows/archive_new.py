"""Archive all studies of the last days: a cohort by date, pulled like any other.

A study that reaches the PACS days after its StudyDate is found by a later run, because every run
looks back over several days. Archived instances are not requested again.
"""

from __future__ import annotations

from datetime import date

from prefect import flow
from prefect.client.schemas.objects import State

from prefect_dicom.blocks import resolve_site
from prefect_dicom.config.site import ledger_url
from prefect_dicom.flows.prefect_engine import PrefectEngine, state_of, task_runner
from prefect_dicom.ledger import Ledger
from prefect_dicom.run.error_translation import without_phi
from prefect_dicom.run.pipeline import pull
from prefect_dicom.run.registration import register_new


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
            return state_of(pull(PrefectEngine(), settings, ledger, cohort))
