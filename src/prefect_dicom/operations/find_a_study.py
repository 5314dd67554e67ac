"""A study to try a node with: of a row, of the last days, or of any patient."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

from prefect_dicom.cohort.row_matching import identifies, study_query
from prefect_dicom.core.model import CohortRow, Study
from prefect_dicom.core.uids import is_safe_key
from prefect_dicom.network.find.list_studies import (
    find_some_studies,
    find_some_studies_by_prefix,
    find_studies,
)
from prefect_dicom.network.node_client import NodeClient

_WINDOWS_DAYS = (7, 90, 365, 3650)
# Of PatientIDs, until one brings a study.
_PREFIXES = "1203456789APMST"


def study_of_row(requestor: NodeClient, row: CohortRow) -> Study | None:
    """The study that a row names, if it is there and can be asked for."""
    studies = [s for s in find_studies(requestor, study_query(row)) if identifies(row, s)]
    return next((s for s in studies if is_safe_key(s.study_instance_uid)), None)


def study_by_patient(requestor: NodeClient) -> Study | None:
    """A study of any patient whose PatientID begins with a usual character."""
    for prefix in _PREFIXES:
        for study in find_some_studies_by_prefix(requestor, prefix):
            if is_safe_key(study.study_instance_uid):
                return study
    return None


def study_by_date(requestor: NodeClient) -> Study | None:
    """A study of the last days, or else of longer and longer ago."""
    today = datetime.now(UTC).date()
    for first in [today - timedelta(days=days) for days in _WINDOWS_DAYS] + [date(1900, 1, 1)]:
        for study in find_some_studies(requestor, first, today):
            if is_safe_key(study.study_instance_uid):
                return study
    return None
