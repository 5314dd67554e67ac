"""A column that marks rows as wanted or not chooses nothing, and is not passed over either."""

from __future__ import annotations

import pytest

from prefect_dicom.cohort.list_options import ListOptions
from prefect_dicom.cohort.row_choices import marks_rows
from prefect_dicom.cohort.rows import read_excluded, read_list
from prefect_dicom.core.errors import CohortError
from tests.support.lists import FORMATS, read_as

TAKES = "Include|Included?|Consent|Consent (y/n)|consent_given|Einwilligung|Selected|Use|Einschluss"
LEAVES = "Exclude|Excluded|Withdrawn|Consent withdrawn|opt-out|Opted out|Ausschluss|do not use"
NEITHER = "Consent date|Included on|Inclusion criteria|Status|Group|ignore Consent|Use of contrast"


@pytest.mark.parametrize(
    ("names", "marks"), [(TAKES, True), (LEAVES, False), (NEITHER, None)], ids=[1, 2, 3]
)
def test_such_columns_are_known_by_their_names(names, marks):
    assert {name: marks_rows(name) for name in names.split("|")} == dict.fromkeys(
        names.split("|"), marks
    )


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("column", "wanted", "unwanted"),
    [
        ("Consent", "yes", "no"),
        ("Include", "x", ""),
        ("Einwilligung", "ja", "nein"),
        ("Included", "1", "0"),
        ("Excluded", "", "moved away"),
        ("Withdrawn", "no", "2023-01-05"),
    ],
)
def test_a_row_that_is_marked_as_not_wanted_refuses_the_list(
    tmp_path, kind, column, wanted, unwanted
):
    with pytest.raises(CohortError) as caught:
        read_as(kind, tmp_path, ("MRN", column), ("1", wanted), ("2", unwanted), ("3", wanted))
    [fault] = caught.value.faults
    assert fault.startswith(f'line 3, column "{column}": marks the row as one that is not wanted')
    assert "moved" not in fault


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("Consent", ["yes", "x"]),
        ("Consent", ["", ""]),
        ("Consent", ["form 3", "2020"]),
        ("Excluded", ["no", ""]),
        ("Withdrawn", ["n/a", "-"]),
        ("Excluded", [None, float("nan")]),
        ("ignore Consent", ["yes", "no"]),
    ],
)
def test_a_column_that_leaves_no_row_out_is_ignored_and_named(tmp_path, kind, column, values):
    given = read_as(kind, tmp_path, ("MRN", column), *zip("12", values, strict=True))
    assert len(given.rows) == 2
    assert given.notes == (f'columns that are ignored: "{column}"',)


def test_such_rows_can_be_set_apart(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("MRN,Consent\n1,yes\n2,no\n3,\n")
    given = read_list(path, options=ListOptions(faulty_lines="set-apart"))
    assert [row.patient_id for row in given.rows] == ["1"]
    assert [line.line for line in given.faulty] == [3, 4]


def test_in_a_list_of_what_is_not_wanted_they_say_nothing_new(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("MRN,Withdrawn\n1,yes\n2,2023\n")
    assert len(read_excluded(path)) == 2
