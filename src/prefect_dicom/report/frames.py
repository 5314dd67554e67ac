"""What a cohort has found and what became of it, as pandas frames: the result tables in memory.

Like the files of :mod:`prefect_dicom.report.tables`, all but :func:`findings_frame` hold no patient
data beside UIDs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import pandas

from prefect_dicom.core.model import RowVerdict, StudyState
from prefect_dicom.core.uids import manifest_key, normal_uid
from prefect_dicom.ledger import Cohort, Ledger, StudyRecord
from prefect_dicom.report.tables import (
    RESULT_COLUMNS,
    ROWS_PER_WRITE,
    instance_rows,
    instance_schema,
    result_rows,
)

_STUDY_COLUMNS = {
    "study": "int64",
    "StudyInstanceUID": "string",
    "state": "string",
    "reason": "string",
    "evidence": "string",
    "node": "string",
    "expected_instances": "int64",
    "archived_instances": "int64",
    "withheld_instances": "int64",
    "missing_instances": "int64",
    "size_bytes": "int64",
    "manifest_key": "string",
}
_FINDING_COLUMNS = {
    "line": "int64",
    "study": "Int64",
    "StudyInstanceUID": "string",
    "PatientID": "string",
    "AccessionNumber": "string",
    "StudyDate": "string",
    "ModalitiesInStudy": "string",
    "StudyDescription": "string",
    "NumberOfStudyRelatedInstances": "Int64",
    "node": "string",
    "verdict": "string",
    "reason": "string",
}


def rows_frame(ledger: Ledger, cohort: Cohort) -> pandas.DataFrame:
    """The verdict of every row: the columns of ``results.csv``."""
    return _frame(result_rows(ledger, cohort), RESULT_COLUMNS)


def studies_frame(ledger: Ledger, cohort: Cohort) -> pandas.DataFrame:
    """Every study that a cohort takes, by its reference in the column ``study``."""
    return _frame(map(_study, ledger.studies.of_cohort(cohort.number)), _STUDY_COLUMNS)


def instances_frame(ledger: Ledger, cohort: Cohort) -> pandas.DataFrame:
    """Every archived instance: the columns of ``instances.parquet``."""
    import pyarrow

    schema = instance_schema()
    rows = instance_rows(ledger, cohort)
    batches = []
    while batch := list(islice(rows, ROWS_PER_WRITE)):
        batches.append(pyarrow.Table.from_pylist(batch, schema))
    table = pyarrow.concat_tables(batches) if batches else schema.empty_table()
    texts = {pyarrow.string(): pandas.StringDtype()}
    frame: pandas.DataFrame = table.to_pandas(types_mapper=texts.get)
    return frame


def findings_frame(ledger: Ledger, cohort: Cohort) -> pandas.DataFrame:
    """What the PACS says of each study of each row, and rows without studies with their verdict.

    Holds patient data.
    """
    verdicts = list(ledger.rows.verdicts(cohort.number))
    # Afterwards: what a row has found by then is among them.
    studies = {study.reference: study for study in ledger.studies.of_cohort(cohort.number)}
    return _frame(
        (line for verdict in verdicts for line in _findings(verdict, studies)), _FINDING_COLUMNS
    )


def _study(record: StudyRecord) -> dict[str, Any]:
    uid = record.study.study_instance_uid
    archived = record.state is StudyState.ARCHIVED
    return {
        "study": record.reference,
        "StudyInstanceUID": normal_uid(uid),
        "state": str(record.state),
        "reason": record.reason,
        "evidence": str(record.evidence or ""),
        "node": record.node,
        "expected_instances": record.expected,
        "archived_instances": record.stored,
        "withheld_instances": record.withheld,
        "missing_instances": record.missing,
        "size_bytes": record.size_bytes,
        "manifest_key": manifest_key(uid) if archived else None,
    }


def _findings(verdict: RowVerdict, studies: Mapping[int, StudyRecord]) -> Iterator[dict[str, Any]]:
    of_row = {
        "line": verdict.line,
        "verdict": str(verdict.verdict),
        "reason": verdict.reason,
    }
    for reference in verdict.studies:
        record = studies.get(reference)
        yield {"study": reference, **of_row, **({} if record is None else _answer(record))}
    if not verdict.studies:
        yield of_row


def _answer(record: StudyRecord) -> dict[str, Any]:
    study = record.study
    return {
        "StudyInstanceUID": normal_uid(study.study_instance_uid),
        "PatientID": study.patient_id,
        "AccessionNumber": study.accession_number,
        "StudyDate": study.study_date,
        "ModalitiesInStudy": " ".join(study.modalities),
        "StudyDescription": study.study_description,
        "NumberOfStudyRelatedInstances": study.number_of_instances,
        "node": record.node,
    }


def _frame(rows: Iterator[dict[str, Any]], columns: Mapping[str, str]) -> pandas.DataFrame:
    """A frame with these types, in which an empty text is a missing value."""
    values = [tuple(None if row.get(c) == "" else row.get(c) for c in columns) for row in rows]
    return pandas.DataFrame(values, columns=list(columns)).astype(dict(columns))
