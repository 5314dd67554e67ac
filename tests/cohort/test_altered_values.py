"""What a spreadsheet or a program has made of a value is a fault of its line, and never asked."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone

import pandas
import pytest

from prefect_dicom.cohort.rows import read_cohort
from prefect_dicom.core.errors import CohortError
from prefect_dicom.core.model import CohortRow, DateRange
from tests.support.lists import FORMATS, read_as, workbook

NOTHING = ["nan", "NaN", "NULL", "null", "None", "NA", "N/A", "n/a", "<NA>", "(null)", "#N/A"]
ERRORS = ["#REF!", "#VALUE!", "#DIV/0!", "#NAME?", "#NV", "#BEZUG!", "#WERT!"]
UNKNOWN = ["unknown", "Unbekannt", "inconnu", "desconocido", "keine Angabe", "-", "--", "不明"]


def faults(kind: str, folder, columns, *rows) -> list[str]:
    with pytest.raises(CohortError) as caught:
        read_as(kind, folder, columns, *rows)
    return list(caught.value.faults)


@pytest.mark.parametrize("kind", FORMATS)
def test_floats_and_words_for_nothing_are_faults_by_line(tmp_path, kind):
    columns = ("PatientID", "AccessionNumber")
    rows = [("000123", "4711.0"), ("000124", "nan "), ("000125", "A5")]
    found = faults(kind, tmp_path, columns, *rows)
    assert [fault.partition(": ")[0] for fault in found] == [
        'line 2, column "AccessionNumber"',
        'line 3, column "AccessionNumber"',
    ]
    assert "fraction of zero" in found[0] and "leave the cell empty" in found[1]


@pytest.mark.parametrize("word", NOTHING + ERRORS)
@pytest.mark.parametrize(
    "column",
    ["PatientID", "AccessionNumber", "StudyInstanceUID", "Modality", "StudyDescription"]
    + ["PatientName", "PatientBirthDate", "StudyDate", "from"],
)
def test_a_word_for_nothing_is_a_fault_in_any_column(tmp_path, column, word):
    key = "AccessionNumber" if column == "PatientID" else "PatientID"
    [fault] = faults("csv", tmp_path, (key, column), ("A1", f"{word} "))
    assert fault.startswith(f'line 2, column "{column}": ')
    assert "leave the cell empty" in fault or "wildcard" in fault


@pytest.mark.parametrize("word", UNKNOWN)
@pytest.mark.parametrize("column", ["PatientID", "AccessionNumber", "Modality"])
def test_an_identifier_that_is_not_known_is_a_fault(tmp_path, column, word):
    key = "StudyInstanceUID"
    [fault] = faults("csv", tmp_path, (key, column), ("1.2.3", word))
    assert "leave the cell empty" in fault


@pytest.mark.parametrize(
    "row",
    [
        {"StudyDescription": "Unknown"},
        {"PatientName": "Unknown"},
        {"PatientName": "Null^Jane"},
        {"StudyDescription": "NA3 protocol"},
        {"AccessionNumber": "NA-7"},
        {"AccessionNumber": "4711.5"},
        {"AccessionNumber": "#4711"},
        {"AccessionNumber": "1.2.0"},
        {"PatientID": "NULL-1"},
    ],
)
def test_what_only_resembles_them_is_asked_for(tmp_path, row):
    columns = ("StudyInstanceUID", *row)
    assert len(read_as("csv", tmp_path, columns, ("1.2.3", *row.values())).rows) == 1


@pytest.mark.parametrize("text", ["4711.0", "4711.00", "4711,0", "-1.0", "4711.000000"])
@pytest.mark.parametrize("column", ["PatientID", "AccessionNumber"])
def test_a_number_with_a_fraction_of_zero_is_a_fault(tmp_path, column, text):
    [fault] = faults("csv", tmp_path, (column,), (text,))
    assert "fraction of zero" in fault


@pytest.mark.parametrize("kind", ["xlsx", "parquet", "frame"])
def test_a_column_of_numbers_is_read_as_digits_and_gaps_as_nothing(tmp_path, kind):
    rows = [("000123", 4711.0), ("000124", float("nan")), ("000125", 4712.0)]
    read = read_as(kind, tmp_path, ("PatientID", "AccessionNumber"), *rows).rows
    assert [row.accession_number for row in read] == ["4711", None, "4712"]


# --- exponents

EXPONENTS = ["1e+05", "1E+11", "3e3", "60150001022e3"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("column", ["PatientID", "AccessionNumber"])
def test_exponents_in_a_column_of_digits_are_faults(tmp_path, kind, column):
    values = [*EXPONENTS, "100001"]
    found = faults(kind, tmp_path, (column,), *((value,) for value in values))
    assert [fault.partition(": ")[0] for fault in found] == [
        f'line {line}, column "{column}"' for line in (2, 3, 4, 5)
    ]
    assert all("format the column as text" in fault for fault in found)


@pytest.mark.parametrize("text", ["1E+11", "1.5E+11", "1,5e+11", "1.5E11", "1.23457E+11"])
def test_some_are_faults_anywhere(tmp_path, text):
    [fault] = faults("csv", tmp_path, ("AccessionNumber",), (text,), ("CT2024E05",))
    assert fault.startswith('line 2, column "AccessionNumber"')


@pytest.mark.parametrize(
    "values", [["12E4"], ["CT2024E05"], ["12E4", "13E5"], ["12E4", "100001", "CT2024E05"]]
)
def test_a_name_that_looks_like_one_is_asked_for(tmp_path, values):
    rows = read_as("csv", tmp_path, ("AccessionNumber",), *((v,) for v in values)).rows
    assert [row.accession_number for row in rows] == values


# --- moments

DAY = date(2024, 1, 31)
BERLIN = timezone(timedelta(hours=1))


@pytest.mark.parametrize("kind", ["parquet", "frame"])
@pytest.mark.parametrize(
    "moment",
    [
        datetime(2024, 1, 30, 23, tzinfo=UTC),
        datetime(2024, 1, 31, 15, 20),
        datetime(2024, 1, 31, 0, 0, 1),
        datetime(2024, 1, 31, 15, 20, tzinfo=BERLIN),
    ],
)
@pytest.mark.parametrize("column", ["StudyDate", "PatientBirthDate", "from"])
def test_a_moment_is_no_day(tmp_path, kind, moment, column):
    [fault] = faults(kind, tmp_path, ("PatientID", column), ("000123", moment))
    assert fault.startswith(f'line 2, column "{column}": ') and "write the day" in fault


@pytest.mark.parametrize("column", ["StudyDate", "PatientBirthDate"])
def test_a_moment_in_a_workbook_is_no_day(tmp_path, column):
    rows = [
        ["PatientID", column],
        ["1", datetime(2024, 1, 31, 15, 20)],
        ["2", datetime(2024, 1, 31)],
    ]
    with pytest.raises(CohortError) as caught:
        read_cohort(workbook(tmp_path / "list.xlsx", rows))
    [fault] = caught.value.faults
    assert fault.startswith(f'line 2, column "{column}": ') and "write the day" in fault


@pytest.mark.parametrize("kind", ["parquet", "frame"])
@pytest.mark.parametrize("zone", [None, UTC, BERLIN])
def test_midnight_in_its_own_zone_is_a_day(tmp_path, kind, zone):
    moments = [datetime(2024, 1, 31, tzinfo=zone)]
    rows = read_as(kind, tmp_path, ("PatientID", "StudyDate"), ("000123", moments[0])).rows
    assert rows == [CohortRow(2, "000123", study_date=DateRange(DAY, DAY))]


def test_moments_that_are_equal_are_read_by_their_own_zones(tmp_path):
    # The same instant: a day in one zone, and 23:00 of the day before in another.
    fine = read_as(
        "frame", tmp_path, ("PatientID", "StudyDate"), ("1", datetime(2024, 1, 31, tzinfo=BERLIN))
    )
    assert fine.rows[0].study_date == DateRange(DAY, DAY)
    rows = ("1", datetime(2024, 1, 30, 23, tzinfo=UTC))
    assert len(faults("frame", tmp_path, ("PatientID", "StudyDate"), rows)) == 1


@pytest.mark.parametrize(
    "text", ["2024-01-31T00:00:00Z", "2024-01-31 00:00:00+01:00", "2024-01-31 00:00:00.000 UTC"]
)
def test_midnight_as_text_is_a_day(tmp_path, text):
    [row] = read_as("csv", tmp_path, ("PatientID", "StudyDate"), ("000123", text)).rows
    assert row.study_date == DateRange(DAY, DAY)


@pytest.mark.parametrize(
    "text", ["2024-01-30T23:00:00Z", "2024-01-31 15:20", "20240131152000", "2024-01-31T15:20:00.5"]
)
def test_a_moment_as_text_is_no_day(tmp_path, text):
    [fault] = faults("csv", tmp_path, ("PatientID", "StudyDate"), ("000123", text))
    assert "is a moment" in fault and "write the day" in fault


def test_a_table_of_candidates_has_identifiers_as_the_pacs_has_them(tmp_path):
    (tmp_path / "candidates.csv").write_text(
        "Take,CandidateOf,PatientID,AccessionNumber,StudyInstanceUID,DOB\n"
        "x,2,'UNKNOWN,'1E+05,'1.2.3,19500101\nx,3,'NA,'100001,'1.2.4,\n"
    )
    rows = read_cohort(tmp_path / "candidates.csv")
    assert [(row.patient_id, row.accession_number) for row in rows] == [
        ("UNKNOWN", "1E+05"),
        ("NA", "100001"),
    ]


def test_a_frame_with_a_column_of_stamps_is_read_by_its_zone(tmp_path):
    stamps = pandas.to_datetime(["2024-01-31", "2024-02-29"]).tz_localize("Europe/Berlin")
    frame = pandas.DataFrame({"PatientID": ["1", "2"], "StudyDate": stamps})
    frame.to_parquet(tmp_path / "list.parquet")
    days = [row.study_date.first for row in read_cohort(tmp_path / "list.parquet")]
    assert days == [DAY, date(2024, 2, 29)]
    frame["StudyDate"] = frame["StudyDate"].dt.tz_convert("UTC")
    frame.to_parquet(tmp_path / "list.parquet")
    with pytest.raises(CohortError) as caught:
        read_cohort(tmp_path / "list.parquet")
    assert len(caught.value.faults) == 2
