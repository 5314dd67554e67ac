"""Cohorts as data frames: read like files, and written as lists with the same lines."""

from __future__ import annotations

from datetime import date, datetime
from pathlib import Path

import numpy
import pandas
import pytest

from prefect_dicom.cohort.data_frame import (
    COLUMNS,
    frame_of_rows,
    list_of_rows,
    read_frame,
    read_frame_as_list,
)
from prefect_dicom.cohort.rows import read_cohort
from prefect_dicom.core.errors import CohortError
from prefect_dicom.core.model import CohortRow, DateRange

DAY = date(2024, 1, 31)
ROWS = [
    CohortRow(2, "000123", study_date=DateRange(DAY, date(2024, 3, 31)), modality="CT"),
    CohortRow(3, accession_number="A4711", study_date=DateRange(DAY, DAY)),
    CohortRow(5, study_instance_uid="2.25.1", study_date=DateRange(DAY, None)),
    CohortRow(
        9,
        'P "2", öß',
        study_date=DateRange(None, DAY),
        study_description="Head, routine; 2",
        patient_name="Doe^Jane",
        patient_birth_date=date(1970, 1, 2),
    ),
]


def faults_of(frame: pandas.DataFrame | dict) -> tuple[str, ...]:
    with pytest.raises(CohortError) as raised:
        read_frame(frame)
    return raised.value.faults


def test_rows_become_texts_with_missing_values():
    frame = frame_of_rows(ROWS)
    assert (frame.index.name, list(frame.index)) == ("line", [2, 3, 5, 9])
    assert tuple(frame.columns) == COLUMNS
    assert {str(kind) for kind in frame.dtypes} == {"string"}
    assert list(frame.StudyDate) == ["20240131-20240331", "20240131", "20240131-", "-20240131"]
    assert frame.loc[9, "PatientBirthDate"] == "19700102"
    assert list(frame.PatientID.isna()) == [False, True, True, False]
    assert {str(kind) for kind in frame_of_rows([]).dtypes} == {"string"}


def test_a_frame_is_read_as_the_rows_that_it_was_made_of():
    assert read_frame(frame_of_rows(ROWS)) == ROWS


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [0], [3], [1, 3], [2], [1]])
def test_a_list_has_each_row_on_its_line(tmp_path: Path, chosen: list[int]):
    rows = [ROWS[index] for index in chosen]
    (tmp_path / "list.csv").write_text(list_of_rows(rows), encoding="utf-8")
    assert read_cohort(tmp_path / "list.csv") == rows


@pytest.mark.parametrize("number", ["4711.0", "nan", "'4711", "6.0E+10", "#N/A", "NULL"])
def test_candidates_of_a_frame_are_taken_as_a_pacs_has_answered_them(tmp_path: Path, number: str):
    frame = pandas.DataFrame({"CandidateOf": [2], "Take": ["x"], "PatientID": ["'" + number]})
    given = read_frame_as_list(frame)
    assert given.rows == [CohortRow(2, number)]
    text = list_of_rows(given.rows, of_candidates=given.is_of_candidates)
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    assert read_cohort(tmp_path / "list.csv") == given.rows


def test_the_order_of_a_frame_is_of_no_account():
    frame = frame_of_rows(ROWS)
    assert list_of_rows(read_frame(frame[::-1])) == list_of_rows(ROWS)


def test_a_frame_without_lines_counts_from_two():
    frame = pandas.DataFrame({"patient": ["1", "2", "3"], "age": [1, 2, 3]})
    assert read_frame(frame[frame.age > 1]) == [CohortRow(2, "2"), CohortRow(3, "3")]


def test_an_index_with_the_name_of_a_column_is_one():
    frame = pandas.DataFrame({"PatientID": ["1"], "accession": ["A"]})
    assert read_frame(frame.set_index("PatientID")) == [CohortRow(2, "1", "A")]
    frame.index.name = "patientid"
    assert read_frame(frame.set_index(["accession"])) == [CohortRow(2, "1", "A")]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (123, "123"),
        (123.0, "123"),
        (numpy.int64(123), "123"),
        (numpy.float64(123), "123"),
        (" 0123 ", "0123"),
        (numpy.str_("0123"), "0123"),
    ],
)
def test_numbers_are_their_digits(value: object, text: str):
    assert read_frame({"PatientID": value}) == [CohortRow(2, text)]
    assert read_frame(pandas.DataFrame({"PatientID": [value]})) == [CohortRow(2, text)]


@pytest.mark.parametrize("nothing", [None, numpy.nan, pandas.NA, pandas.NaT, ""])
def test_what_is_missing_is_missing(nothing: object):
    frame = pandas.DataFrame({"PatientID": ["1"], "Modality": [nothing], "StudyDate": [nothing]})
    assert read_frame(frame) == [CohortRow(2, "1")]


@pytest.mark.parametrize(
    "day",
    [DAY, datetime(2024, 1, 31), pandas.Timestamp("2024-01-31"), "20240131", "2024-01-31"],
)
def test_days_may_be_dates(day: object):
    row = {"PatientID": "1", "StudyDate": day, "PatientBirthDate": day}
    expected = CohortRow(2, "1", study_date=DateRange(DAY, DAY), patient_birth_date=DAY)
    assert read_frame(row) == [expected]
    assert read_frame(pandas.DataFrame([row])) == [expected]


def test_all_faults_are_reported_at_once_by_line_and_column_and_without_contents():
    frame = pandas.DataFrame(
        {
            "PatientID": ["Zyx*", None, "1", DAY, "1"],
            "Modality": ["CT", "CT", "CT", "CT", ["CT"]],
            "from": ["", "", "20240202", "", ""],
            "to": ["", "", "20240101", "", ""],
        },
        index=pandas.Index([4, 5, 6, 7, 8], name="line"),
    )
    faults = faults_of(frame)
    begins = [fault.split(":")[0] for fault in faults]
    assert begins == [
        'line 4, column "PatientID"',
        "line 5",
        "line 6",
        'line 7, column "PatientID"',
        'line 8, column "Modality"',
    ]
    assert "Zyx" not in " ".join(faults)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (pandas.DataFrame({"Modality": ["CT"]}), "no column that identifies"),
        (pandas.DataFrame({"PatientID": []}), "holds no rows"),
        (pandas.DataFrame([["1", "2"]], columns=["PatientID", "patient"]), "both mean PatientID"),
        ({"PatientID": ["1", "2"]}, "neither text nor a whole number"),
        ({}, "no column that identifies"),
        (
            pandas.DataFrame({"PatientID": ["1"]}, pandas.Index(["2"], name="PatientID")),
            "its index has the name",
        ),
        (frame_of_rows([ROWS[0], ROWS[0]]), "more than once"),
        (frame_of_rows([CohortRow(1, "1")]), "something else than line numbers"),
        (frame_of_rows([CohortRow(10**12, "1")]), "something else than line numbers"),
        (
            pandas.DataFrame({"PatientID": ["1"]}, pandas.Index(["2"], name="line")),
            "something else than line numbers",
        ),
    ],
)
def test_what_is_no_cohort_is_refused(frame, words):
    (fault,) = faults_of(frame)
    assert words in fault


def test_a_marked_table_of_candidates_may_be_a_frame():
    frame = pandas.DataFrame(
        {"Take": ["x", ""], "CandidateOf": [2, 2], "PatientID": ["'01", "'02"], "Modality": "?"}
    )
    assert read_frame(frame) == [CohortRow(2, "01")]
