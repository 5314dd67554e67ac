"""Columns, conditions and conversions of rows that several parts of the ledger share."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, or_, select

from prefect_dicom.core.model import CohortRow, NodeOrder, Study, StudyState
from prefect_dicom.ledger.records import Cohort
from prefect_dicom.ledger.schema import cohort_rows, cohorts, row_studies, studies

UNFINISHED = (StudyState.PENDING, StudyState.LISTED)
PAGE_SIZE = 1000
"""Rows read at a time by generators."""

ROW_COLUMNS = (
    cohort_rows.c.line,
    cohort_rows.c.patient_id,
    cohort_rows.c.accession_number,
    cohort_rows.c.study_instance_uid,
    cohort_rows.c.study_date,
    cohort_rows.c.modality,
    cohort_rows.c.study_description,
    cohort_rows.c.patient_name,
    cohort_rows.c.patient_birth_date,
    cohort_rows.c.issuer_of_patient_id,
    cohort_rows.c.other_patient_id,
)
VERDICT_COLUMNS = (
    cohort_rows.c.line,
    cohort_rows.c.reason,
    cohort_rows.c.gaps,
    cohort_rows.c.faults,
)
STUDY_COLUMNS = (
    studies.c.study_instance_uid,
    studies.c.patient_id,
    studies.c.accession_number,
    studies.c.study_date,
    studies.c.modalities,
    studies.c.study_description,
    studies.c.number_of_series,
    studies.c.number_of_instances,
)
ARCHIVED_COLUMNS = (
    studies.c.archived_instances,
    studies.c.withheld_instances,
    studies.c.missing_instances,
    studies.c.archived_bytes,
)


def listable_with(selection: Any) -> ColumnElement[bool]:
    """Condition on ``studies``: not listed yet, or listed with the same series."""
    return or_(studies.c.selection.is_(None), studies.c.selection == selection)


def selection_of(cohort: int) -> Any:
    """Subquery for the series that a cohort selects, in words."""
    return select(cohorts.c.selection).where(cohorts.c.number == cohort).scalar_subquery()


def to_discover(cohort: int, after_line: int = -1) -> ColumnElement[bool]:
    """Condition on ``cohort_rows``: discovery has not ended."""
    return and_(
        cohort_rows.c.cohort == cohort,
        cohort_rows.c.line > after_line,
        ~cohort_rows.c.discovered,
    )


def first_rows(connection: Connection, chosen: ColumnElement[bool], limit: int) -> list[CohortRow]:
    """Return the first of the chosen rows of ``cohort_rows``, by line."""
    rows = connection.execute(
        select(*ROW_COLUMNS).where(chosen).order_by(cohort_rows.c.line).limit(limit)
    )
    return [CohortRow(**row._mapping) for row in rows]


def study_of(row: Row[Any]) -> Study:
    """Return the study in a row that has STUDY_COLUMNS."""
    return Study(
        study_instance_uid=row.study_instance_uid,
        patient_id=row.patient_id,
        accession_number=row.accession_number,
        study_date=row.study_date,
        modalities=tuple(row.modalities),
        study_description=row.study_description,
        number_of_series=row.number_of_series,
        number_of_instances=row.number_of_instances,
    )


def study_of_json(study: dict[str, Any]) -> Study:
    """Return the study of an ``asdict`` that went through JSON, which has no tuples."""
    return Study(
        **{
            **study,
            "modalities": tuple(study.get("modalities", ())),
            "attributes": tuple((keyword, value) for keyword, value in study.get("attributes", ())),
            "original": tuple((keyword, value) for keyword, value in study.get("original", ())),
            "guessed": tuple(study.get("guessed", ())),
        }
    )


def cohort_of(row: Row[Any]) -> Cohort:
    """Return the cohort in a row of ``cohorts``."""
    return Cohort(
        number=row.number,
        name=row.name,
        digest=row.digest,
        order=NodeOrder.of(row.node),
        rows=row.rows,
        created_at=row.created_at,
        selection=row.selection,
        paused=row.paused,
        priority=row.priority,
        may_be_empty=row.may_be_empty,
    )


def taken_by(cohort: int) -> ColumnElement[bool]:
    """Condition on ``studies``: a cohort takes it."""
    return studies.c.reference.in_(
        select(row_studies.c.study).where(
            row_studies.c.cohort == cohort, row_studies.c.reason.is_(None)
        )
    )
