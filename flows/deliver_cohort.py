"""The flow ``deliver-cohort``: archived studies to another node, and the proof that they are there.

Studies that are verified at the node are not sent again, so running it again costs next to nothing.
"""

from __future__ import annotations

from prefect import flow, runtime
from prefect.client.schemas.objects import State

from prefect_dicom.blocks import resolve_site
from prefect_dicom.config.site import ledger_url
from prefect_dicom.delivery.pipeline import deliver
from prefect_dicom.flows.prefect_engine import PrefectEngine, state_of, task_runner
from prefect_dicom.ledger import Ledger
from prefect_dicom.run.error_translation import without_phi


def _flow_run_name() -> str:
    given = runtime.flow_run.parameters
    return f"deliver-{given['cohort']}-{given['to']}"


@flow(
    name="deliver-cohort",
    flow_run_name=_flow_run_name,
    task_runner=task_runner(),
    persist_result=False,
)
def deliver_cohort(
    cohort: str,
    to: str,
    site: str = "site.yaml",
    reason: list[str] | None = None,
    source: str | None = None,
) -> State:
    """Deliver the archived studies of a cohort to another node.

    Parameters
    ----------
    cohort : str
        Name or number of the cohort in the ledger.
    to : str
        The node, which has ``destination`` in the site file.
    site : str
        Path of the site's YAML file, or ``block:NAME`` of a DicomSite block.
    reason : list of str, optional
        Reason codes of failed deliveries that are to be tried again; by default those that are
        not permanent.
    source : str, optional
        A node that sends the studies to that one by C-MOVE, archived or not; by default they are
        sent from the archive.

    Returns
    -------
    State
        ``Completed``, or ``Partial`` (a completed state) where studies are not verified at the
        node; ``Cancelled`` where it was cancelled.
    """
    with without_phi():
        settings = resolve_site(site)
        with Ledger.open(ledger_url(settings)) as ledger:
            chosen = tuple(reason or ())
            return state_of(deliver(PrefectEngine(), settings, ledger, cohort, to, chosen, source))
