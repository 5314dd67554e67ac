"""How a workbook or an export is laid out must not make a row select more than it says."""

from __future__ import annotations

import openpyxl
import pytest

from prefect_dicom.cohort.rows import read_list
from prefect_dicom.core.errors import CohortError
from tests.support.lists import FORMATS, read_as


def saved(path, rows, change=lambda sheet: None):
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    change(book.active)
    book.save(path)
    return path


def refused(path) -> tuple[str, ...]:
    with pytest.raises(CohortError) as caught:
        read_list(path)
    return caught.value.faults


@pytest.mark.parametrize("cells", ["A2:A3", "A2:B3"])
def test_a_cell_that_only_shows_the_value_of_another_is_a_fault(tmp_path, cells):
    rows = [("MRN", "AccessionNumber"), ("1", "A1"), (None, "A2"), ("2", "A3")]
    path = saved(tmp_path / "list.xlsx", rows, lambda sheet: sheet.merge_cells(cells))
    faults = refused(path)
    assert faults and all("cells that are merged" in fault for fault in faults)


def test_merged_cells_elsewhere_are_no_fault(tmp_path):
    rows = [("MRN", "Ward"), ("1", "W"), ("2", None)]
    path = saved(tmp_path / "list.xlsx", rows, lambda sheet: sheet.merge_cells("B2:B3"))
    assert [row.patient_id for row in read_list(path).rows] == ["1", "2"]


def test_a_header_that_is_a_formula_names_no_column_and_refuses_the_list(tmp_path):
    rows = [("MRN", '="Accession"&"Number"'), ("1", "A1")]
    [fault] = refused(saved(tmp_path / "list.xlsx", rows))
    assert fault.startswith("line 1, column 2: the name of the column is a formula")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "rows",
    [
        [("Patient", "", "Study"), ("MRN", "DOB", "AccessionNumber"), ("1", "", "A1")],
        [("MRN", "AccessionNumber"), ("1", "A1"), ("MRN", "AccessionNumber"), ("2", "A2")],
    ],
)
def test_a_second_header_line_refuses_the_list(tmp_path, kind, rows):
    with pytest.raises(CohortError) as caught:
        read_as(kind, tmp_path, *rows)
    assert any("is a header line, and the list has one above" in f for f in caught.value.faults)


def test_other_sheets_with_something_in_them_are_named(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(("MRN",))
    book.active.append(("1",))
    book.create_sheet("Alpha^Anna").append(("Legend",))
    book.create_sheet("empty")
    book.save(tmp_path / "list.xlsx")
    assert read_list(tmp_path / "list.xlsx").notes == (
        "sheets without the header of a cohort, ignored: number 2",
    )


def test_a_row_of_almost_no_height_is_hidden(tmp_path):
    def flatten(sheet):
        sheet.row_dimensions[3].height = 0.5

    [fault] = refused(saved(tmp_path / "list.xlsx", [("MRN",), ("1",), ("2",)], flatten))
    assert fault.startswith("1 of 2 rows are hidden")


@pytest.mark.parametrize("word", ["all", "ANY", "alle", "multiple"])
def test_a_word_for_any_modality_is_a_fault(tmp_path, word):
    with pytest.raises(CohortError, match="leave the cell empty for studies of any"):
        read_as("csv", tmp_path, ("MRN", "Modality"), ("1", word))


@pytest.mark.parametrize("value", ["=A2", '=HYPERLINK("x","A1")', "=$B$7", "=concat(A1,B1)"])
def test_a_formula_of_an_export_is_no_identifier(tmp_path, value):
    with pytest.raises(CohortError, match="is a spreadsheet formula"):
        read_as("csv", tmp_path, ("MRN", "AccessionNumber"), (value, "A1"))
