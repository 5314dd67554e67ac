"""The command ``why``: what was asked for a row, what came, and what became of each answer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from prefect_dicom.cli.app import (
    DEFAULT_SITE,
    CohortName,
    Exit,
    JsonOption,
    SiteOption,
    app,
    counted,
    output,
)
from prefect_dicom.cli.flow_runner import site_of
from prefect_dicom.config.site import ledger_url
from prefect_dicom.core.errors import ConfigurationError
from prefect_dicom.core.model import CohortRow, DateRange, RowVerdict, Study
from prefect_dicom.core.reasons import REASONS
from prefect_dicom.core.row_queries import FROM_CACHE, FROM_UID_LIST, RowQuery
from prefect_dicom.core.uids import normal_uid

if TYPE_CHECKING:
    from prefect_dicom.cohort.answer_verdicts import AnswerVerdict
    from prefect_dicom.ledger import Cohort, Ledger

_ROW_KEYS = {
    "patient_id": "PatientID",
    "issuer_of_patient_id": "IssuerOfPatientID",
    "other_patient_id": "OtherPatientID",
    "accession_number": "AccessionNumber",
    "study_instance_uid": "StudyInstanceUID",
    "study_date": "StudyDate",
    "modality": "Modality",
    "study_description": "StudyDescription",
    "patient_name": "PatientName",
    "patient_birth_date": "PatientBirthDate",
}
_STUDY_KEYS = {
    "study_instance_uid": "StudyInstanceUID",
    "patient_id": "PatientID",
    "issuer_of_patient_id": "IssuerOfPatientID",
    "accession_number": "AccessionNumber",
    "patient_name": "PatientName",
    "patient_birth_date": "PatientBirthDate",
    "study_date": "StudyDate",
    "modalities": "ModalitiesInStudy",
    "study_description": "StudyDescription",
}
_SOURCES = {
    FROM_CACHE: "not sent: another row had asked the same",
    FROM_UID_LIST: "sent in a list of StudyInstanceUIDs, with other rows'",
}


@dataclass(frozen=True, slots=True)
class _Found:
    """All there is to say about a row."""

    row: CohortRow
    verdict: RowVerdict
    queries: list[tuple[RowQuery, list[tuple[Study, AnswerVerdict]]]]


@app.command(sort_key=4.2)
def why(
    cohort: CohortName,
    line: Annotated[int, Parameter(help="Line of the cohort file; the header is line 1.")],
    /,
    *,
    site: SiteOption = DEFAULT_SITE,
    json_: JsonOption = False,
) -> int:
    """Tell why a row is what it is: what was asked for it, what came, what dropped each answer.

    The output holds patient data, for your eyes. It is read from the ledger; no PACS is asked.
    """
    from prefect_dicom.ledger import Ledger

    with Ledger.open(ledger_url(site_of(site))) as ledger:
        found = _look_up(ledger, ledger.cohorts.get(cohort), line)
    if json_:
        print(json.dumps(_as_result(found), indent=1))
    else:
        _print(found)
    return Exit.ALL_WELL


def _look_up(ledger: Ledger, cohort: Cohort, line: int) -> _Found:
    from prefect_dicom.cohort.answer_verdicts import judge_answer

    at = ledger.rows.at(cohort.number, line)
    if at is None:
        fault = f"LINE: cohort {cohort.name} has no row of line {line}"
        raise ConfigurationError("command line", [fault])
    row, verdict = at
    filters = ledger.cohorts.filters(cohort.number)
    asked = ledger.rows.queries(cohort.number, line)
    # Only those of the answers that were kept: a month may have thousands of studies.
    uids = {normal_uid(study.study_instance_uid) for query in asked for study in query.studies}
    taken = {
        uid
        for uid in uids
        if (record := ledger.studies.find(uid)) is not None and record.reference in verdict.studies
    }
    queries = [
        (
            query,
            [
                (study, judge_answer(row, study, filters, taken, verdict.reason))
                for study in query.studies
            ],
        )
        for query in asked
    ]
    return _Found(row, verdict, queries)


def _as_result(found: _Found) -> dict[str, Any]:
    return {
        "line": found.row.line,
        "row": _values(found.row, _ROW_KEYS),
        "verdict": str(found.verdict.verdict),
        "reason": found.verdict.reason,
        "studies": list(found.verdict.studies),
        "queries": [
            {name: value for name, value in asdict(query).items() if name != "studies"}
            | {
                "shown": [
                    {**_values(study, _STUDY_KEYS), "verdict": judged.verdict, "why": judged.why}
                    for study, judged in answers
                ]
            }
            for query, answers in found.queries
        ],
    }


def _print(found: _Found) -> None:
    _say(f"Line {found.row.line}: {_words(_values(found.row, _ROW_KEYS))}")
    reason = REASONS.get(found.verdict.reason)
    more = f" ({reason.code}): {reason.meaning} {reason.what_to_do}" if reason else ""
    _say(f"Verdict: {found.verdict.verdict}{more}")
    if not found.queries:
        _say("No query is on record: the row has not been asked for yet.")
    for number, (query, answers) in enumerate(found.queries, 1):
        ended = REASONS.get(query.outcome or "")
        _say(
            f"\nQuery {number}, {query.node}, {query.level} level: {_words(query.keys)}\n"
            f"  {counted(query.answers, 'answer')}"
            + (f"; {_SOURCES[query.source]}" if query.source in _SOURCES else "")
            + (f"; ended by {ended.code}: {ended.meaning}" if ended else "")
        )
        for study, judged in answers:
            _say(f"  - {_words(_values(study, _STUDY_KEYS))}")
            _say(f"    {judged.verdict}{': ' if judged.why else ''}{'; '.join(judged.why)}")
        if query.level == "STUDY" and len(answers) < query.answers:
            _say(f"  - and {counted(query.answers - len(answers), 'answer')} not kept")


def _say(words: str) -> None:
    output.print(words, markup=False, soft_wrap=True)


def _values(record: CohortRow | Study, names: dict[str, str]) -> dict[str, str]:
    values = {keyword: getattr(record, name) for name, keyword in names.items()}
    return {
        keyword: _text(value) for keyword, value in values.items() if value not in (None, "", ())
    }


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "\\".join(value)
    if isinstance(value, DateRange):
        return value.text
    return f"{value:%Y%m%d}" if isinstance(value, date) else str(value)


def _words(values: Any) -> str:
    # A value of a peer may hold what a terminal takes for a command.
    return ", ".join(f"{keyword} {value!r}" for keyword, value in values.items())
