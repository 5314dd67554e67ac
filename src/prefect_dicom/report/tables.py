"""Result tables: what became of every row, and the cohort's manifest of instances.

Row results name a row by its line in the cohort file and hold no patient data; the instance
manifest holds UIDs, as the archive's own keys do. The table of candidates holds what a person needs
to choose by, names and birth dates too.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect_dicom.archive.manifest import decode_manifest
from prefect_dicom.cohort.filters import explain_undecided
from prefect_dicom.cohort.row_matching import explain_near_miss
from prefect_dicom.core.model import (
    CohortFilters,
    CohortRow,
    RowVerdict,
    Study,
    StudyState,
    Verdict,
)
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.core.uids import normal_uid
from prefect_dicom.ledger import Cohort, Ledger, Totals
from prefect_dicom.report.acceptances import ACCEPTANCES, write_acceptances
from prefect_dicom.report.files import (
    quoted_identifier,
    replacing,
    spreadsheet_cell,
    write_table_for_people,
)
from prefect_dicom.report.formatting import format_totals

if TYPE_CHECKING:
    import pyarrow

RESULTS = "results.csv"
INSTANCES = "instances"
CANDIDATES = "candidates.csv"
REPORT = "report.html"
ROWS_PER_WRITE = 5_000
"""Lines of a table of instances that are in memory at a time."""

RESULT_COLUMNS = {
    "line": "int64",
    "verdict": "string",
    "reason": "string",
    "studies": "string",
    "expected_instances": "int64",
    "archived_instances": "int64",
    "withheld_instances": "int64",
    "missing_instances": "int64",
    "size_bytes": "int64",
    "meaning": "string",
    "what_to_do": "string",
    "gaps": "string",
    "evidence": "string",
    "nodes": "string",
    "faults": "string",
}
"""Column of ``results.csv`` to type."""
_CANDIDATE_COLUMNS = (
    "Take",
    "CandidateOf",
    "Why",
    "PatientID",
    "IssuerOfPatientID",
    "PatientName",
    "PatientBirthDate",
    "AccessionNumber",
    "StudyInstanceUID",
    "StudyDate",
    "Modalities",
    "StudyDescription",
    "Guessed",
    "Bytes",
)
_INSTANCE_COLUMNS = {
    "study": "int64",
    "StudyInstanceUID": "string",
    "SeriesInstanceUID": "string",
    "SOPInstanceUID": "string",
    "SOPClassUID": "string",
    "TransferSyntaxUID": "string",
    "key": "string",
    "size_bytes": "int64",
    "sha256": "string",
    "version_id": "string",
    "warnings": "string",
}
"""Column of ``instances.parquet`` to Arrow type."""


def finished_fraction(totals: Totals) -> float:
    """How much of a cohort is finished, from 0 to 1; while studies are being found, of its rows.

    Then finished studies count whole, listed ones by the instances that are archived of them; what
    is not listed yet counts as not begun.
    """
    studies = sum(totals.studies.values())
    rows = sum(totals.rows.values())
    if totals.unasked:
        return 1 - totals.unasked / rows
    if not studies:
        return 1 - totals.rows[Verdict.PENDING] / rows if rows else 1.0
    ended = totals.studies[StudyState.ARCHIVED] + totals.studies[StudyState.FAILED]
    if ended == studies or not totals.expected:
        return ended / studies
    listed = studies - totals.studies[StudyState.PENDING]
    stored = min(1.0, totals.stored / totals.expected)
    return max(ended, listed * stored * 0.99) / studies


def next_count(began: float, ended: float, least_seconds: float) -> float:
    """When to count a cohort again: counting may take a twentieth of the time.

    Parameters
    ----------
    began, ended : float
        The last count, in seconds of any clock.
    least_seconds : float
        From one beginning to the next, however little it costs.

    Examples
    --------
    >>> next_count(100, 100.01, 1), next_count(100, 103, 1)
    (101, 160)
    """
    return began + max(least_seconds, 20 * (ended - began))


def unarchived_rows(totals: Totals) -> int:
    """How many rows are not archived (excluded ones are not wanted); pending ones count."""
    return sum(count for verdict, count in totals.rows.items() if not verdict.is_as_wanted)


def is_archived(totals: Totals, *, may_be_empty: bool = False) -> bool:
    """Whether what a cohort asks for is archived: no row is left, and not all are excluded.

    Parameters
    ----------
    may_be_empty : bool
        All rows may be excluded: they are days on which there may have been no study.
    """
    if unarchived_rows(totals):
        return False
    taken = totals.rows[Verdict.ARCHIVED] + totals.rows[Verdict.INCOMPLETE]
    return may_be_empty or taken > 0 or not totals.rows.total()


def reason_table(verdicts: Iterable[RowVerdict]) -> list[dict[str, Any]]:
    """Rows by verdict and reason, the most frequent first, each with what to do."""
    counts = Counter((v.verdict, v.reason) for v in verdicts)
    return [
        {
            "rows": count,
            "verdict": str(verdict),
            "reason": code,
            "meaning": reason_for(code).meaning,
            "what_to_do": reason_for(code).what_to_do,
        }
        for (verdict, code), count in counts.most_common()
    ]


def summary_markdown(
    cohort: Cohort, totals: Totals, reasons: Iterable[Mapping[str, Any]], folder: Path
) -> str:
    """A cohort's summary for Prefect's UI.

    Parameters
    ----------
    reasons : iterable of mapping
        Its :func:`reason_table`.
    folder : Path
        Where its reports lie.
    """
    lines = "".join(
        f"- **{row['rows']} {row['verdict']}** (`{row['reason']}`): {row['meaning']} "
        f"{row['what_to_do']}\n"
        for row in reasons
    )
    return (
        f"# Cohort {cohort.name}\n\n{format_totals(totals)}\n\n{lines}\n"
        f"On the worker, in `{folder}`:\n\n"
        f"- `{REPORT}`: one page for people, to be opened in a browser\n"
        f"- `{RESULTS}`: a verdict and a reason for every line of the cohort file\n"
        f"- `{INSTANCES}.parquet`, `{INSTANCES}.csv`: every archived instance with its key, "
        "size and SHA-256\n"
        f"- `{CANDIDATES}`, where there are any: studies that are nearly what a line asks for, to "
        "choose from (patient data)\n"
        f"- `{ACCEPTANCES}`, where there are any: studies that a person can accept, and those that "
        "one has accepted (patient data)\n"
    )


def write_reports(ledger: Ledger, cohort: Cohort, reports: Path) -> Path:
    """Write ``results.csv``, ``instances.parquet`` and ``instances.csv``; returns their folder.

    And ``candidates.csv``, where there are any: the answers that were nearly what a row asks for,
    in a form that :func:`~prefect_dicom.cohort.rows.read_cohort` reads; and ``accept.csv``, where
    a person can decide about studies or has done so. Each file is replaced as a
    whole. Memory does not grow with the cohort.
    """
    folder = reports / cohort.name
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / RESULTS) as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(RESULT_COLUMNS))
        writer.writeheader()
        writer.writerows(result_rows(ledger, cohort))
    _write_candidates(ledger, cohort, folder / CANDIDATES)
    write_acceptances(ledger, cohort, folder)
    _write_instances(ledger, cohort, folder)
    return folder


def result_rows(ledger: Ledger, cohort: Cohort) -> Iterator[dict[str, Any]]:
    """The lines of ``results.csv``; a value that there is none of is an empty text."""
    for verdict in ledger.rows.verdicts(cohort.number):
        reason = reason_for(verdict.reason)
        yield {
            "line": verdict.line,
            "verdict": str(verdict.verdict),
            "reason": verdict.reason,
            "studies": " ".join(map(str, verdict.studies)),
            "expected_instances": verdict.expected_instances,
            "archived_instances": verdict.archived_instances,
            "withheld_instances": verdict.withheld_instances,
            "missing_instances": verdict.missing_instances,
            "size_bytes": verdict.size_bytes,
            "meaning": reason.meaning,
            "what_to_do": reason.what_to_do,
            "gaps": "; ".join(verdict.gaps),
            "evidence": str(verdict.evidence or ""),
            "nodes": "; ".join(verdict.nodes),
            "faults": "; ".join(verdict.faults),
        }


def _write_candidates(ledger: Ledger, cohort: Cohort, target: Path) -> None:
    filters = ledger.cohorts.filters(cohort.number)
    candidates = (
        _candidate(row, reason, study, filters)
        for row, reason, studies in ledger.rows.candidates(cohort.number)
        for study in studies
    )
    write_table_for_people(target, _CANDIDATE_COLUMNS, candidates)


def _candidate(
    row: CohortRow, reason: str | None, study: Study, filters: CohortFilters
) -> dict[str, Any]:
    why = explain_near_miss(row, study)
    if not why and reason == "filter-undecided":
        why = explain_undecided(filters, study)
    return {
        "Take": "",
        "CandidateOf": row.line,
        "Why": "; ".join(why) or reason,
        # A spreadsheet would make a number or a date of an identifier, and lose its zeros.
        "PatientID": quoted_identifier(study.patient_id),
        "AccessionNumber": quoted_identifier(study.accession_number),
        "StudyInstanceUID": quoted_identifier(normal_uid(study.study_instance_uid)),
        "IssuerOfPatientID": spreadsheet_cell(study.issuer_of_patient_id),
        "PatientName": spreadsheet_cell(study.patient_name),
        "PatientBirthDate": spreadsheet_cell(study.patient_birth_date),
        "StudyDate": spreadsheet_cell(study.study_date),
        "Modalities": spreadsheet_cell(" ".join(study.modalities)),
        "StudyDescription": spreadsheet_cell(study.study_description),
        "Guessed": " ".join(study.guessed),
        "Bytes": " ".join(f"{keyword}:{octets}" for keyword, octets in study.original),
    }


def _write_instances(ledger: Ledger, cohort: Cohort, folder: Path) -> None:
    # Imported where it is wanted: it takes a quarter of a second, and most commands write nothing.
    import pyarrow.parquet

    rows = instance_rows(ledger, cohort)
    with (
        replacing(folder / f"{INSTANCES}.csv") as text,
        replacing(folder / f"{INSTANCES}.parquet") as table,
        text.open("w", newline="") as file,
        pyarrow.parquet.ParquetWriter(table, instance_schema()) as parquet,
    ):
        writer = csv.DictWriter(file, list(_INSTANCE_COLUMNS))
        writer.writeheader()
        while batch := list(islice(rows, ROWS_PER_WRITE)):
            parquet.write_table(_as_table(batch))
            for row in batch:
                writer.writerow({name: spreadsheet_cell(value) for name, value in row.items()})


def _as_table(rows: Iterable[Mapping[str, Any]]) -> pyarrow.Table:
    """Rows as an Arrow table.

    By way of JSON: from Python's own values Arrow makes none without importing pandas, which takes
    half a second and 50 MB.
    """
    import pyarrow.json

    lines = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    options = pyarrow.json.ParseOptions(
        explicit_schema=instance_schema(), unexpected_field_behavior="error"
    )
    return pyarrow.json.read_json(pyarrow.BufferReader(lines), parse_options=options)


def instance_schema() -> pyarrow.Schema:
    """The Arrow schema of ``instances.parquet``."""
    import pyarrow

    return pyarrow.schema(
        [(name, getattr(pyarrow, kind)()) for name, kind in _INSTANCE_COLUMNS.items()]
    )


def instance_rows(ledger: Ledger, cohort: Cohort) -> Iterator[dict[str, Any]]:
    """The lines of ``instances.parquet``."""
    for reference, data in ledger.manifests.of_cohort(cohort.number):
        manifest = decode_manifest(data)
        for instance in manifest.instances:
            yield {
                "study": reference,
                "StudyInstanceUID": manifest.study_instance_uid,
                "SeriesInstanceUID": instance.series_instance_uid,
                "SOPInstanceUID": instance.sop_instance_uid,
                "SOPClassUID": instance.sop_class_uid,
                "TransferSyntaxUID": instance.transfer_syntax_uid,
                "key": instance.key,
                "size_bytes": instance.size_bytes,
                "sha256": instance.sha256,
                "version_id": instance.version_id,
                "warnings": " ".join(instance.warnings),
            }
