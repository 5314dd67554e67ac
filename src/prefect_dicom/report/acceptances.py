"""Decisions that people take about studies: those that wait for one, and those that were taken.

The table ``accept.csv`` holds patient data: what the PACS lists and what the instances name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from prefect_dicom.core.model import (
    Evidence,
    InstanceKey,
    InstanceState,
    StudyReference,
)
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.dicom.value_matching import how_patient_ids_differ
from prefect_dicom.ledger import Acceptance, Cohort, Ledger, StudyRecord
from prefect_dicom.report.files import (
    quoted_identifier,
    spreadsheet_cell,
    write_table_for_people,
)

ACCEPTANCES = "accept.csv"
OTHER_PATIENT_ID = "patient-id-differs"
_COLUMNS = (
    "Study",
    "Lines",
    "Decision",
    "Reason",
    "What",
    "PatientID",
    "PatientIDOfInstances",
    "StudyInstanceUID",
    "StudyDate",
    "AcceptedBy",
    "AcceptedAt",
    "Note",
)


@dataclass(frozen=True, slots=True)
class Question:
    """A study that a person can accept as it is."""

    record: StudyRecord
    reason: str
    lines: tuple[int, ...] = ()
    missing: tuple[InstanceKey, ...] = field(default=(), repr=False)

    @property
    def what(self) -> str:
        """What there is to accept, in words without patient data."""
        if self.reason == OTHER_PATIENT_ID:
            named = self.record.patient_id_of_instances or ""
            words = how_patient_ids_differ(self.record.study.patient_id, named)
            return f"all its instances name the same other PatientID, which {words}"
        return f"{len(self.missing)} of {self.record.expected} instances never came"


def open_questions(ledger: Ledger, cohort: Cohort) -> list[Question]:
    """The failed studies of a cohort that a person can accept, by reference.

    Those whose instances all name the same other PatientID, and those of which the PACS lists
    instances that it did not send, while others are archived.
    """
    found = [
        question
        for record in ledger.studies.failed(cohort.number)
        if (question := _question(ledger, record)) is not None
    ]
    if not found:
        return []
    lines = _lines_of(ledger, cohort, {question.record.reference for question in found})
    return [replace(each, lines=tuple(lines[each.record.reference])) for each in found]


def _question(ledger: Ledger, record: StudyRecord) -> Question | None:
    code = record.reason or ""
    if code == OTHER_PATIENT_ID:
        return Question(record, code) if record.patient_id_of_instances else None
    if not reason_for(code).acceptable or not record.stored:
        return None
    if record.evidence is not Evidence.INSTANCE_LIST:
        # What is missing could not be named.
        return None
    missing = tuple(
        each.key
        for each in ledger.instances.of_study(record.reference)
        if each.state is InstanceState.EXPECTED
    )
    return Question(record, code, missing=missing) if missing else None


def _lines_of(
    ledger: Ledger, cohort: Cohort, references: set[StudyReference]
) -> dict[StudyReference, list[int]]:
    lines: dict[StudyReference, list[int]] = defaultdict(list)
    for verdict in ledger.rows.verdicts(cohort.number):
        for reference in references.intersection(verdict.studies):
            lines[reference].append(verdict.line)
    return lines


def format_acceptance(accepted: Acceptance) -> str:
    """What a person has accepted, in words without patient data."""
    whose = "every study" if accepted.study is None else f"study {accepted.study}"
    count = len(accepted.missing)
    what = f"without {count} instance{'s' * (count != 1)}" if count else "under another PatientID"
    at = f"{accepted.accepted_at:%Y-%m-%d %H:%M} UTC" if accepted.accepted_at else ""
    # Not the note: it is a person's own words, and may name a patient.
    words = f"{whose} {what}, by {accepted.accepted_by}, {at}"
    if accepted.withdrawn_at is not None:
        words += (
            f"; withdrawn by {accepted.withdrawn_by}, {accepted.withdrawn_at:%Y-%m-%d %H:%M} UTC"
        )
    return words


def write_acceptances(ledger: Ledger, cohort: Cohort, folder: Path) -> Path | None:
    """Write ``accept.csv``, or remove it where there is nothing to decide and nothing decided."""
    target = folder / ACCEPTANCES
    lines = chain(_waiting(open_questions(ledger, cohort)), _decided(ledger, cohort))
    return target if write_table_for_people(target, _COLUMNS, lines) else None


def _waiting(questions: Iterable[Question]) -> Iterator[dict[str, Any]]:
    for question in questions:
        yield _of_study(question.record) | {
            "Lines": " ".join(map(str, question.lines)),
            "Decision": "waiting",
            "Reason": question.reason,
            "What": question.what,
        }


def _decided(ledger: Ledger, cohort: Cohort) -> Iterator[dict[str, Any]]:
    for accepted in ledger.acceptances.of_cohort(cohort.number):
        record = None if accepted.study is None else ledger.studies.get(accepted.study)
        yield (_of_study(record) if record else {"Study": "all"}) | {
            "Decision": "accepted" if accepted.withdrawn_at is None else "withdrawn",
            "Reason": accepted.reason,
            "What": f"{len(accepted.missing)} instances missing" if accepted.missing else "",
            "PatientIDOfInstances": quoted_identifier(accepted.patient_id or ""),
            "AcceptedBy": spreadsheet_cell(accepted.accepted_by),
            "AcceptedAt": accepted.accepted_at.isoformat(timespec="seconds")
            if accepted.accepted_at
            else "",
            "Note": spreadsheet_cell(accepted.note),
        }


def _of_study(record: StudyRecord) -> dict[str, Any]:
    return {
        "Study": record.reference,
        "PatientID": quoted_identifier(record.study.patient_id),
        "PatientIDOfInstances": quoted_identifier(record.patient_id_of_instances or ""),
        "StudyInstanceUID": quoted_identifier(record.study.study_instance_uid),
        "StudyDate": spreadsheet_cell(record.study.study_date),
    }
