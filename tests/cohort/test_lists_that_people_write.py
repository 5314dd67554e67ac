"""Lists as people write them, pulled from a PACS: no study but those that are asked for."""

from __future__ import annotations

import pytest

from prefect_dicom.cli import Exit
from prefect_dicom.cohort.list_options import ListOptions
from prefect_dicom.core.errors import CohortError
from prefect_dicom.core.model import Verdict
from prefect_dicom.report import is_archived, unarchived_rows
from tests.support.commands import CommandLine
from tests.support.lists import workbook
from tests.support.sites import site_around, study

LONG = "HOSPITAL-2024-001"
HELD = [
    *study(1, PatientID="000123", AccessionNumber="A1", StudyDate="20240101", Modality="CT"),
    *study(2, PatientID="000123", AccessionNumber="A2", StudyDate="20240202", Modality="MR"),
    *study(3, PatientID="000124", AccessionNumber=LONG, StudyDate="20240303", Modality="CT"),
]


@pytest.fixture
def place(tmp_path):
    with site_around(tmp_path, HELD, retrieve="c-get") as place:
        yield place


@pytest.mark.parametrize(
    "text", ["MRN,Accession #\n000123,A2\n", "PatientID,Exam Date\n000123,20240202\n"]
)
def test_a_row_is_not_widened(place, text):
    (place.folder / "list.csv").write_text(text)
    with pytest.raises(CohortError):
        place.pull(place.folder / "list.csv")
    assert place.asked_for() == 0


def test_an_accession_number_may_be_longer_than_the_standard_allows(place):
    (place.folder / "list.csv").write_text(f"AccessionNumber\n{LONG}\nA1\nHOSPITAL-2024-002\n")
    totals = place.pull(place.folder / "list.csv")
    assert totals.rows == {Verdict.ARCHIVED: 2, Verdict.NOT_FOUND: 1}


# --- exclusions and the exit code


def definition(place, text: str, rows: str = "AccessionNumber,Modality\nA1,\nA2,\n"):
    (place.folder / "list.csv").write_text(rows)
    path = place.folder / "cohort.yaml"
    path.write_text(f"list: list.csv\n{text}")
    return path


def test_a_cohort_of_which_all_is_excluded_is_not_archived(place):
    totals = place.pull(definition(place, "studies: {Modality: US}"))
    assert totals.rows == {Verdict.EXCLUDED: 2}
    assert (unarchived_rows(totals), is_archived(totals)) == (0, False)
    assert is_archived(totals, may_be_empty=True)


def test_one_of_which_some_is_excluded_is(place):
    totals = place.pull(definition(place, "studies: {Modality: MR}"))
    assert totals.rows == {Verdict.EXCLUDED: 1, Verdict.ARCHIVED: 1}
    assert is_archived(totals)


def test_a_workbook_with_hidden_rows_is_not_pulled_before_a_person_has_chosen(place):
    rows = [["AccessionNumber"], ["A1"], ["A2"], [LONG]]
    path = workbook(place.folder / "list.xlsx", rows, hidden={3: {"hidden": True}})
    run = CommandLine(place.folder, place.folder / "home")
    ended = run("pull", path)
    assert ended.code == Exit.CONFIGURATION
    assert "1 of 3 rows are hidden" in ended.stderr
    assert place.asked_for() == 0
    totals = place.pull(path, ListOptions(hidden_rows="leave-out"))
    assert totals.rows == {Verdict.ARCHIVED: 2}
    assert place.studies().keys().isdisjoint({HELD[2].study_instance_uid})


@pytest.mark.timeout(300)
def test_the_exit_code_says_whether_what_was_asked_for_is_archived(place, prefect_api):
    line = CommandLine(place.folder, place.folder / "home")

    def run(*arguments):
        return line(*arguments, **prefect_api)

    none = definition(place, "studies: {Modality: US}")
    for dry in (["--dry-run"], []):
        ended = run("pull", none, *dry)
        assert ended.code == Exit.NOT_ALL, ended
    assert "Nothing is archived: every row is excluded." in ended.output
    some = definition(place, "studies: {Modality: MR}")
    for dry in (["--dry-run"], []):
        assert run("pull", some, *dry).code == Exit.ALL_WELL
    # The choices of the command reach the list, and its notes the terminal.
    faulty = definition(place, "", "AccessionNumber,Remark\nA1,\n4711.0,x\n")
    ended = run("pull", faulty)
    assert ended.code == Exit.CONFIGURATION and "fraction of zero" in ended.stderr
    ended = run("pull", faulty, "--faulty-lines", "set-apart", "--hidden-rows", "take")
    assert ended.code == Exit.NOT_ALL
    assert "Note (cohort file): 1 of 2 lines have faults and were set apart." in ended.output
    assert 'Note (cohort file): columns that are ignored: "Remark".' in ended.output
