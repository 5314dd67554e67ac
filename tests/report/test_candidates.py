"""What nearly fits is shown in a table; a person marks what is right, and the table is a cohort."""

from __future__ import annotations

import csv
import stat
from pathlib import Path

import openpyxl
import pytest

from prefect_dicom.cohort.rows import read_cohort
from prefect_dicom.core.errors import CohortError
from prefect_dicom.report import CANDIDATES, write_reports
from prefect_dicom.testing import Behaviour
from tests.support.sites import Place, site_around, study

OF_ONE_PATIENT = study(
    1, PatientID="007", AccessionNumber="1E5", PatientName="Müller^Jörg", StudyDate="20240305"
)
OF_ANOTHER = study(2, PatientID="=1+1", AccessionNumber="1E5", PatientName="Meier^Eva")
WITH_ZEROS = study(3, PatientID="000123", AccessionNumber="A3")
A_STRANGER = study(4, PatientID="P4", AccessionNumber="A4", PatientName="Kowalski^Jan")
AT_MIDNIGHT = study(5, PatientID="P5", AccessionNumber="A5", StudyDate="20240201")
WILD = study(6, PatientID="***", AccessionNumber="A6")
TAME = study(7, PatientID="P7", AccessionNumber="A6")

HELD = [*OF_ONE_PATIENT, *OF_ANOTHER, *WITH_ZEROS, *A_STRANGER, *AT_MIDNIGHT, *WILD, *TAME]
COHORT = [
    {"AccessionNumber": "1E5"},
    {"PatientID": "123"},
    {"AccessionNumber": "A4", "PatientName": "Müller^Jörg"},
    {"AccessionNumber": "A5", "StudyDate": "20240101-20240131"},
    {"AccessionNumber": "A6"},
]
# An archive that matches without leading zeros, as the third row needs.
SCRIPT = [Behaviour("find.pad_ids")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with site_around(tmp_path_factory.mktemp("site"), HELD, script=SCRIPT) as place:
        place.pull(place.cohort(COHORT))
        yield place


def report(place: Place, cohort: str = "1") -> Path:
    with place.ledger() as ledger:
        return (
            write_reports(ledger, ledger.cohorts.get(cohort), place.folder / "reports") / CANDIDATES
        )


def lines(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def edited(place: Place, name: str, rows: list[dict[str, str]], encoding="utf-8") -> Path:
    path = place.folder / name
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_every_candidate_is_a_line_that_says_why_it_was_not_taken(place):
    assert [v.reason for v in place.verdicts()] == [
        *("several-patients", "no-match", "name-disagrees", "excluded-by-filter"),
        "several-patients",
    ]
    assert place.archived() == {}
    assert [(r["CandidateOf"], r["PatientID"], r["Why"]) for r in lines(report(place))] == [
        ("2", "'007", "several-patients"),
        ("2", "'=1+1", "several-patients"),
        ("3", "'000123", "PatientID differs in leading zeros"),
        ("4", "'P4", "PatientName is another"),
        ("5", "'P5", "StudyDate is one day off"),
        ("6", "'***", "several-patients"),
        ("6", "'P7", "several-patients"),
    ]


def test_the_table_shows_what_a_person_chooses_by_and_nobody_else_may_read_it(place):
    table = report(place)
    first = lines(table)[0]
    uid = OF_ONE_PATIENT[0].study_instance_uid
    assert first["PatientName"] == "Müller^Jörg"
    assert (first["AccessionNumber"], first["StudyDate"]) == ("'1E5", "20240305")
    assert first["StudyInstanceUID"] == f"'{uid}"
    assert first["Modalities"] and first["Take"] == ""
    assert stat.S_IMODE(table.stat().st_mode) == 0o600


def test_no_cell_is_a_formula_a_number_or_a_date_to_a_spreadsheet(place):
    for row in lines(report(place)):
        assert not any(cell.startswith(tuple("=+-@\t\r")) for cell in row.values())
        for keyword in ("PatientID", "AccessionNumber", "StudyInstanceUID"):
            assert row[keyword].startswith("'")


def test_candidates_that_are_marked_are_pulled_and_no_others(place):
    rows = lines(report(place))
    for row in rows:
        row["Take"] = "x" if row["PatientID"] in ("'=1+1", "'000123", "'P4", "'P5") else ""
    place.pull(edited(place, "marked.csv", rows))
    wanted = (OF_ANOTHER, WITH_ZEROS, A_STRANGER, AT_MIDNIGHT)
    archived = {key.split("/")[1] for key in place.archived()}
    assert archived == {objects[0].study_instance_uid for objects in wanted}
    # All that was in question has been chosen: nothing is left to choose from.
    assert not report(place, "2").exists()


def test_a_spreadsheet_program_may_save_the_table_as_its_own(place):
    rows = lines(report(place))
    book = openpyxl.Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        row["Take"] = "x" if row["PatientID"] == "'007" else None
        book.active.append(list(row.values()))
    book.save(place.folder / "candidates.xlsx")
    assert [r.patient_id for r in read_cohort(place.folder / "candidates.xlsx")] == ["007"]


def test_the_lines_that_are_left_are_meant_where_the_column_is_deleted_too(place):
    rows = [row for row in lines(report(place)) if row["PatientID"] == "'007"]
    for row in rows:
        del row["Take"]
    [row] = read_cohort(edited(place, "left.csv", rows))
    assert (row.patient_id, row.accession_number) == ("007", "1E5")
    assert row.study_instance_uid == OF_ONE_PATIENT[0].study_instance_uid
    # What is there for reading narrows nothing.
    assert (row.study_date, row.patient_name, row.study_description) == (None, None, None)


def test_a_table_that_nobody_has_edited_brings_no_stranger(place):
    with pytest.raises(CohortError) as error:
        read_cohort(report(place))
    assert "no candidate is marked" in str(error.value)


@pytest.mark.parametrize("mark", ["x", "X ", "yes", "1"])
def test_a_mark_is_a_cross_a_yes_or_a_one(place, mark):
    rows = lines(report(place))[:2]
    rows[0]["Take"], rows[1]["Take"] = mark, "no"
    assert [r.patient_id for r in read_cohort(edited(place, "mark.csv", rows))] == ["007"]


def test_another_mark_is_a_fault(place):
    rows = lines(report(place))[:2]
    rows[0]["Take"] = "perhaps"
    with pytest.raises(CohortError) as error:
        read_cohort(edited(place, "perhaps.csv", rows))
    assert 'column "Take": is neither x nor empty' in str(error.value)


def test_a_candidate_whose_identifier_would_select_others_is_refused_until_it_is_cleared(place):
    rows = [row | {"Take": "x"} for row in lines(report(place)) if row["PatientID"] == "'***"]
    with pytest.raises(CohortError) as error:
        read_cohort(edited(place, "wild.csv", rows))
    assert "holds a wildcard" in str(error.value)
    rows[0]["PatientID"] = ""
    [row] = read_cohort(edited(place, "cleared.csv", rows))
    assert (row.patient_id, row.study_instance_uid) == (None, WILD[0].study_instance_uid)


@pytest.mark.parametrize(
    "identifier", ["007", "'007", "''", "-1", "=A1", "1E5", "MAR1", "ÄÖ", "1-2"]
)
def test_every_identifier_comes_back_as_it_was(place, identifier):
    rows = [lines(report(place))[0] | {"Take": "x", "PatientID": f"'{identifier}"}]
    assert [r.patient_id for r in read_cohort(edited(place, "back.csv", rows))] == [identifier]


def test_a_blank_that_belongs_to_an_identifier_is_not_lost_without_a_word(place):
    rows = [lines(report(place))[0] | {"Take": "x", "PatientID": "'007\N{NO-BREAK SPACE}"}]
    with pytest.raises(CohortError, match="invisible"):
        read_cohort(edited(place, "blank.csv", rows))
