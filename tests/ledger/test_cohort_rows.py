"""Rows are kept as written, discovered until that has ended, and linked to their studies."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from datetime import date

from prefect_dicom.cohort.rows import read_cohort
from prefect_dicom.core.model import CohortRow, DateRange, Evidence, PerPatient, Verdict
from tests.support.ledgers import DIGEST, rows, study


def test_rows_come_back_as_they_were_written(ledger):
    written = [
        CohortRow(2, "  0012", "A\0\x1a9", None, DateRange(date(2020, 1, 2), None), "CT\\MR", "é*"),
        CohortRow(3, "\udce4\udcf6", study_date=DateRange(None, None)),
        CohortRow(9, study_instance_uid="1.2.3", study_date=DateRange(None, date(999, 12, 31))),
        CohortRow(11, "1", patient_name="Müller^J\udcf6rg", patient_birth_date=date(1931, 2, 28)),
    ]
    cohort = ledger.cohorts.add(DIGEST, "main", written).number
    assert ledger.rows.to_discover(cohort) == written
    assert [row for row, _ in ledger.rows.with_verdicts(cohort)] == written


def test_a_row_is_discovered_until_its_discovery_has_ended(ledger):
    cohort = ledger.cohorts.add(DIGEST, "main", rows(5)).number
    ledger.rows.record_discoveries(
        cohort,
        [
            (2, [study(2)], None, ()),
            (3, (), "no-match", ()),
            (4, (), "several-patients", [study(4), study(5)]),
            (5, (), "pacs-refused", ()),
        ],
    )
    assert [row.line for row in ledger.rows.to_discover(cohort)] == [5, 6]
    assert [row.line for row in ledger.rows.to_discover(cohort, after_line=5)] == [6]
    assert [row.line for row in ledger.rows.to_discover(cohort, limit=1)] == [5]
    assert [(v.line, v.verdict, v.reason) for v in ledger.rows.verdicts(cohort)] == [
        (2, Verdict.PENDING, "interrupted"),
        (3, Verdict.NOT_FOUND, "no-match"),
        (4, Verdict.AMBIGUOUS, "several-patients"),
        (5, Verdict.FAILED, "pacs-refused"),
        (6, Verdict.PENDING, "interrupted"),
    ]


def test_recording_a_discovery_twice_changes_nothing(ledger):
    cohort = ledger.cohorts.add(DIGEST, "main", rows(1)).number
    for _ in range(2):
        ledger.rows.record_discoveries(cohort, [(2, [study(1), study(2), study(1)], None, ())])
    (verdict,) = ledger.rows.verdicts(cohort)
    assert len(verdict.studies) == len(list(ledger.studies.of_cohort(cohort))) == 2


def test_a_row_with_gaps_is_partial_when_what_was_found_is_archived(ledger, run):
    cohort = ledger.cohorts.add(DIGEST, "main", rows(3)).number
    gaps = ["20240305-20240306", "studies without a date"]
    ledger.rows.record_discoveries(
        cohort,
        [
            (2, [study(2)], "list-unproved", (), gaps),
            (3, [study(3)], "list-unproved", (), gaps),
            (4, (), "list-unproved", (), gaps),
        ],
    )

    def verdicts() -> list[tuple[str, str]]:
        assert {v.gaps for v in ledger.rows.verdicts(cohort)} <= {tuple(gaps), ()}
        return [(str(v.verdict), v.reason) for v in ledger.rows.verdicts(cohort)]

    pending = ("pending", "interrupted")
    assert verdicts() == [pending, pending, ("failed", "list-unproved")]
    first, second = ledger.claims.acquire(
        run, [s.reference for s in ledger.studies.to_pull(cohort)]
    )
    ledger.instances.record_list(first, [], Evidence.INSTANCE_LIST)
    ledger.studies.record_archived(first, b"{}", instances=0, withheld=0, size_bytes=0)
    ledger.studies.record_failed(second, "pacs-busy")
    partial, failed = ("partial", "list-unproved"), ("failed", "list-unproved")
    assert verdicts() == [partial, failed, failed]
    assert ledger.progress.totals(cohort).unproved == Counter({gap: 3 for gap in gaps})
    # A rerun asks again. Until the PACS has answered, nothing is whole, and nothing is forgotten.
    assert ledger.cohorts.reopen(cohort).rows == 3
    assert verdicts()[0] == partial
    ledger.rows.record_discoveries(cohort, [(2, (), "association-lost", ())])
    (row, *_) = ledger.rows.verdicts(cohort)
    assert (str(row.verdict), row.studies) == ("failed", (first.reference,))
    ledger.rows.record_discoveries(cohort, [(2, [study(2)], None, ())])
    assert verdicts()[0] == ("archived", "all-archived")


def test_no_more_of_a_patient_is_taken_than_a_cohort_wants(ledger, run):
    cohort = ledger.cohorts.add(DIGEST, "main", rows(4)).number
    found = [
        replace(study(line), patient_id=patient, study_date=day)
        for line, patient, day in (
            (2, "P1", "20240101"),
            (3, "P1", "20240301"),
            (4, "P1", "20240201"),
            (5, "P2", "20240101"),
        )
    ]
    ledger.rows.record_discoveries(
        cohort, [(line, [each], None, ()) for line, each in enumerate(found, 2)]
    )

    def taken() -> list[str]:
        return [record.study.study_instance_uid for record in ledger.studies.to_pull(cohort)]

    def uids(*lines: int) -> list[str]:
        return [f"1.2.3.{line}" for line in lines]

    assert ledger.rows.limit_per_patient(cohort, PerPatient(1)) == 2
    assert taken() == uids(3, 5)
    assert [v.reason for v in ledger.rows.verdicts(cohort)][::2] == ["beyond-the-maximum"] * 2
    assert [len(v.studies) for v in ledger.rows.verdicts(cohort)] == [0, 1, 0, 1]
    assert ledger.progress.totals(cohort).studies == {"pending": 2}
    assert ledger.progress.totals(cohort).rows == {"excluded": 2, "pending": 2}
    # Decided anew, by all that is known then.
    assert ledger.rows.limit_per_patient(cohort, PerPatient(2)) == 1
    assert taken() == uids(3, 4, 5)
    assert ledger.rows.limit_per_patient(cohort, PerPatient(1, latest=False)) == 2
    assert taken() == uids(2, 5)
    # A row with one study that is taken is judged by that.
    ledger.rows.record_discoveries(cohort, [(2, found[:2], None, ())])
    ledger.rows.limit_per_patient(cohort, PerPatient(1))
    first = next(iter(ledger.rows.verdicts(cohort)))
    assert (str(first.verdict), len(first.studies)) == ("pending", 1)


def test_every_field_of_a_row_survives_from_file_to_ledger_and_back(ledger, tmp_path):
    cells = {
        "PatientID": "P-1",
        "AccessionNumber": "A-1",
        "StudyInstanceUID": "1.2.3",
        "StudyDate": "20240131",
        "Modality": "CT",
        "StudyDescription": "HEAD",
        "PatientName": "Doe^Jane",
        "PatientBirthDate": "19700102",
        "IssuerOfPatientID": "NORTH",
        "OtherPatientID": "P-0",
    }
    path = tmp_path / "cohort.csv"
    path.write_text(",".join(cells) + "\n" + ",".join(cells.values()) + "\n")
    (row,) = read_cohort(path)
    # A new field needs a column above, and a place on every way.
    assert [field.name for field in fields(row) if getattr(row, field.name) is None] == []
    cohort = ledger.cohorts.add(DIGEST, "main", [row]).number
    assert ledger.rows.to_discover(cohort) == [row]
    assert [kept for kept, _ in ledger.rows.with_verdicts(cohort)] == [row]
