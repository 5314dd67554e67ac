"""Rows of a workbook that a person does not see are asked about, never taken or left in silence."""

from __future__ import annotations

import zipfile
from pathlib import Path

import openpyxl
import pytest

from prefect_dicom.cohort.definition import cohort_file_digest, read_cohort_file
from prefect_dicom.cohort.list_options import ListOptions
from prefect_dicom.cohort.rows import read_cohort, read_excluded
from prefect_dicom.core.errors import CohortError
from prefect_dicom.core.model import Excluded
from tests.support.lists import choose, workbook

ROWS = [["PatientID"], *([f"P{number:02}"] for number in range(1, 51))]
SEEN = [*range(2, 14), 51]
BY_FILTER = {line: {"hidden": True} for line in range(2, 52) if line not in SEEN}
WAYS = {
    "a filter or a hand": {"hidden": True},
    "a closed group": {"hidden": True, "outlineLevel": 1},
}


@pytest.fixture
def filtered(tmp_path: Path) -> Path:
    """A workbook of 50 patients, 37 of them hidden by its filter."""
    path = workbook(tmp_path / "list.xlsx", ROWS, hidden=BY_FILTER)
    book = openpyxl.load_workbook(path)
    book.active.auto_filter.ref = "A1:A51"
    book.active.auto_filter.add_filter_column(0, ["P01"])
    book.save(path)
    return path


def question(read, *arguments: object) -> str:
    with pytest.raises(CohortError) as caught:
        read(*arguments)
    return caught.value.faults[-1]


def test_hidden_rows_are_counted_and_asked_about(filtered):
    asked = question(read_cohort, filtered)
    assert asked.startswith("37 of 50 rows are hidden")
    assert "--hidden-rows take" in asked and "--hidden-rows leave-out" in asked


def test_they_are_taken_or_left_out_as_a_person_says(filtered):
    taken = choose(filtered, hidden_rows="take")
    assert [row.line for row in taken.rows] == list(range(2, 52))
    assert taken.notes == ("37 of 50 rows are hidden and were taken",)
    left = choose(filtered, hidden_rows="leave-out")
    assert [row.line for row in left.rows] == SEEN
    assert left.notes == ("37 of 50 rows are hidden and were left out",)


@pytest.mark.parametrize("way", WAYS)
def test_it_does_not_matter_how_they_are_hidden(tmp_path, way):
    path = workbook(tmp_path / "list.xlsx", [["MRN"], ["1"], ["2"]], hidden={3: WAYS[way]})
    assert question(read_cohort, path).startswith("1 of 2 rows are hidden")


def test_the_forms_of_other_programs_are_known(tmp_path):
    # LibreOffice writes true and false, and others put a prefix before each element.
    made = workbook(tmp_path / "made.xlsx", [["MRN"], ["1"], ["2"], ["3"]])
    for hidden, expected in (('hidden="true"', 1), ('hidden="false"', 0), ('ht="0.0"', 1)):
        path = tmp_path / "list.xlsx"
        with zipfile.ZipFile(made) as source, zipfile.ZipFile(path, "w") as target:
            for name in source.namelist():
                text = source.read(name).decode()
                if name == "xl/worksheets/sheet1.xml":
                    text = text.replace('<row r="3"', f'<row {hidden} r="3"')
                    text = text.replace(' r="4"', "")
                target.writestr(name, text)
        if expected:
            assert question(read_cohort, path).startswith(f"{expected} of 3 rows are hidden")
        else:
            assert len(read_cohort(path)) == 3


def test_a_hidden_sheet_is_asked_about(tmp_path):
    sheets = ([["Notes"]], [["MRN"], ["1"], ["2"]])
    path = workbook(tmp_path / "list.xlsx", *sheets, states=("visible", "hidden"))
    assert question(read_cohort, path).startswith("2 of 2 rows are hidden")
    path = workbook(tmp_path / "list.xlsx", *sheets, states=("visible", "veryHidden"))
    assert question(read_cohort, path).startswith("2 of 2 rows are hidden")
    assert len(choose(path, hidden_rows="take").rows) == 2
    assert question(lambda: choose(path, hidden_rows="leave-out")).startswith("holds no rows but")


def test_what_hides_no_row_needs_no_choice(tmp_path):
    path = workbook(tmp_path / "list.xlsx", [["MRN", "Ward"], ["1", "A"], ["2", "B"], [], [None]])
    book = openpyxl.load_workbook(path)
    sheet = book.active
    sheet.column_dimensions["B"].hidden = True
    sheet.auto_filter.ref = "A1:B3"
    # Rows without anything in them, and the header.
    for line in (1, 4, 5, 9):
        sheet.row_dimensions[line].hidden = True
    sheet.row_dimensions[2].outlineLevel = 1
    book.save(path)
    assert [row.patient_id for row in read_cohort(path)] == ["1", "2"]


def test_faults_of_rows_that_are_left_out_are_no_faults(tmp_path):
    rows = [["MRN"], ["1"], ["*"], ["2"]]
    path = workbook(tmp_path / "list.xlsx", rows, hidden={3: {"hidden": True}})
    assert [row.line for row in choose(path, hidden_rows="leave-out").rows] == [2, 4]
    with pytest.raises(CohortError, match="wildcard"):
        choose(path, hidden_rows="take")


def test_of_candidates_only_marked_ones_are_asked_about(tmp_path):
    rows = [
        ["Take", "CandidateOf", "PatientID", "StudyInstanceUID"],
        ["x", 2, "'1", "'1.2.3"],
        [None, 2, "'2", "'1.2.4"],
        ["x", 3, "'3", "'1.2.5"],
    ]
    path = workbook(tmp_path / "candidates.xlsx", rows, hidden={3: {"hidden": True}})
    assert [row.line for row in read_cohort(path)] == [2, 4]
    path = workbook(tmp_path / "candidates.xlsx", rows, hidden={4: {"hidden": True}})
    assert question(read_cohort, path).startswith("1 of 2 rows are hidden")


# --- definitions


def test_a_definition_asks_for_its_list_and_its_exclusions(tmp_path):
    workbook(tmp_path / "list.xlsx", [["MRN"], ["1"], ["2"]], hidden={3: {"hidden": True}})
    workbook(tmp_path / "out.xlsx", [["MRN"], ["8"], ["9"]], hidden={2: {"hidden": True}})
    path = tmp_path / "cohort.yaml"
    path.write_text("list: list.xlsx\nexclude: out.xlsx\n")
    with pytest.raises(CohortError) as caught:
        read_cohort_file(path)
    assert [fault.partition(" rows")[0] for fault in caught.value.faults] == [
        "list: 1 of 2",
        "exclude: 1 of 2",
    ]
    assert question(read_excluded, tmp_path / "out.xlsx").startswith("1 of 2 rows are hidden")
    path.write_text("list: list.xlsx\nexclude: out.xlsx\nhidden_rows: take\n")
    file = read_cohort_file(path)
    assert [row.patient_id for row in file.rows] == ["1", "2"]
    assert file.filters.excluded == {Excluded("8"), Excluded("9")}
    assert file.notes == ("1 of 2 rows are hidden and were taken",)
    # What is said with the command comes first.
    file = read_cohort_file(path, ListOptions(hidden_rows="leave-out"))
    assert [row.patient_id for row in file.rows] == ["1"]
    assert file.filters.excluded == {Excluded("9")}
    path.write_text("list: list.xlsx\nhidden_rows: perhaps\n")
    assert "hidden_rows" in question(read_cohort_file, path)


def test_another_choice_is_another_cohort(filtered):
    choices = [ListOptions(), ListOptions("take"), ListOptions("leave-out")]
    choices += [ListOptions(faulty_lines="set-apart"), ListOptions("take", "set-apart")]
    assert len({cohort_file_digest(filtered, each) for each in choices}) == 5
