"""Queries of rows, as they are kept for people; see :mod:`prefect_dicom.core.row_queries`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, asdict, fields
from typing import Any

from sqlalchemy import Connection, select

from prefect_dicom.core.model import Study
from prefect_dicom.core.row_queries import RowQuery, without_taken
from prefect_dicom.ledger.database import Database
from prefect_dicom.ledger.queries import STUDY_COLUMNS, study_of, study_of_json
from prefect_dicom.ledger.records import RowFindings
from prefect_dicom.ledger.schema import row_queries, studies

_DEFAULTS = {each.name: each.default for each in fields(Study) if each.default is not MISSING}


def record_row_queries(
    database: Database, connection: Connection, cohort: int, entries: Iterable[RowFindings]
) -> None:
    """Keep the queries of rows instead of those of their last discovery."""
    kept = [
        {
            "cohort": cohort,
            "line": entry.line,
            "queries": [
                _as_json(without_taken(query, {s.study_instance_uid for s in entry.studies}))
                for query in entry.queries
            ],
        }
        for entry in entries
        if entry.queries
    ]
    if kept:
        statement = database.insert(row_queries)
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=[row_queries.c.cohort, row_queries.c.line],
                set_={"queries": statement.excluded.queries},
            ),
            kept,
        )


def read_row_queries(connection: Connection, cohort: int, line: int) -> tuple[RowQuery, ...]:
    """Return the queries of a row, with the studies that the ledger has as it has them now."""
    kept = connection.execute(
        select(row_queries.c.queries).where(
            row_queries.c.cohort == cohort, row_queries.c.line == line
        )
    ).scalar()
    queries = [
        RowQuery(**{**query, "studies": list(map(study_of_json, query["studies"]))})
        for query in kept or ()
    ]
    bare = {s.study_instance_uid for query in queries for s in query.studies if not s.patient_id}
    known = {
        row.study_instance_uid: study_of(row)
        for row in connection.execute(
            select(*STUDY_COLUMNS).where(studies.c.study_instance_uid.in_(bare))
        ).all()
    }
    for query in queries:
        query.studies = [
            known.get(study.study_instance_uid, study)
            if study == Study(study.study_instance_uid)
            else study
            for study in query.studies
        ]
    return tuple(queries)


def _as_json(query: RowQuery) -> dict[str, Any]:
    entry = asdict(query)
    entry["studies"] = [
        {name: value for name, value in study.items() if value != _DEFAULTS.get(name, MISSING)}
        for study in entry["studies"]
    ]
    return entry
