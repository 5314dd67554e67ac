"""What a person decides about studies of the first cohort, and the run that follows."""

from __future__ import annotations

from prefect_dicom.operations.acceptance import Decision, accept
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.run import open_run
from tests.support.sites import Place


def decide(place: Place, *, note: str = "a tape", **decision) -> list:
    """Accept studies, as ``prefect-dicom accept`` does."""
    with place.ledger() as ledger:
        known = ledger.cohorts.get("1")
        return accept(place.site, ledger, known, Decision(by="J. Doe", note=note, **decision))


def go_on(place: Place) -> None:
    """A rerun that reopens nothing of the cohort."""
    with open_run(place.site, 1, "rerun") as run:
        work_through(run)
