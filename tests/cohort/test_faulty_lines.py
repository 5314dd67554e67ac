"""Faulty lines refuse their list, all faults at once, unless a person has them set apart."""

from __future__ import annotations

import csv

import pytest

from prefect_dicom.cohort.definition import read_cohort_file
from prefect_dicom.cohort.list_options import ListOptions
from prefect_dicom.cohort.rows import read_list
from prefect_dicom.core.errors import CohortError
from prefect_dicom.core.model import FaultyLine, Verdict
from prefect_dicom.report import is_archived, write_reports
from prefect_dicom.run.registration import register_cohort
from tests.support.lists import choose
from tests.support.sites import site_around, study

LIST = (
    "PatientID,AccessionNumber,Modality\n"
    "000123,A1,\n"
    "*,A2,MG/US\n"
    ",,\n"
    "000124,4711.0,\n"
    "000125,A3,\n"
    "000126,3e3,\n"
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(LIST)
    return path


def test_by_default_all_faults_refuse_the_list(path):
    for options in (ListOptions(), ListOptions(faulty_lines="refuse")):
        with pytest.raises(CohortError) as caught:
            read_list(path, options=options)
        lines = [fault.partition(",")[0].partition(":")[0] for fault in caught.value.faults]
        assert lines == ["line 3", "line 3", "line 4", "line 5"]


def test_they_are_set_apart_where_a_person_says_so(path):
    given = choose(path, faulty_lines="set-apart")
    assert [row.line for row in given.rows] == [2, 6, 7]
    assert [(faulty.line, len(faulty.faults)) for faulty in given.faulty] == [
        (3, 2),
        (4, 1),
        (5, 1),
    ]
    assert given.notes == ("3 of 6 lines have faults and were set apart",)


def test_a_column_of_exponents_is_judged_as_a_whole_there_too(path):
    path.write_text("AccessionNumber\n100001\n3e3\n100002\n")
    given = choose(path, faulty_lines="set-apart")
    assert [row.line for row in given.rows] == [2, 4]
    assert [faulty.line for faulty in given.faulty] == [3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MRN,Accession #\n1,2\n", "looks like AccessionNumber"),
        ("Ward\nA\n", "no column that identifies"),
        ('MRN\n1\n"2\n', "double quote"),
        ("MRN\n*\n?\n", "wildcard"),
        ("MRN\n", "holds no rows"),
    ],
)
def test_faults_of_the_whole_list_and_of_all_its_lines_refuse_it_all_the_same(path, text, words):
    path.write_text(text)
    with pytest.raises(CohortError, match=words):
        choose(path, faulty_lines="set-apart")


def test_a_definition_may_say_so_and_its_exclusions_are_never_set_apart(path):
    definition = path.with_name("cohort.yaml")
    definition.write_text("list: list.csv\nfaulty_lines: set-apart\n")
    file = read_cohort_file(definition)
    assert [faulty.line for faulty in file.faulty] == [3, 4, 5]
    path.with_name("out.csv").write_text("MRN\n1\n4711.0\n")
    definition.write_text("list: list.csv\nfaulty_lines: set-apart\nexclude: out.csv\n")
    with pytest.raises(CohortError) as caught:
        read_cohort_file(definition)
    [fault] = caught.value.faults
    assert fault.startswith("exclude: line 3")


def test_the_others_are_pulled_and_each_faulty_line_has_its_verdict(tmp_path):
    held = [
        *study(1, PatientID="000123", AccessionNumber="A1"),
        *study(2, PatientID="000125", AccessionNumber="A3"),
        *study(3, PatientID="000126", AccessionNumber="3e3"),
    ]
    with site_around(tmp_path, held, retrieve="c-get") as place:
        path = tmp_path / "list.csv"
        path.write_text(LIST)
        options = ListOptions(faulty_lines="set-apart")
        known = register_cohort(place.site, path, None, options=options)
        with place.ledger() as ledger:
            totals = ledger.progress.totals(known.number)
            assert (totals.rows, totals.unasked) == ({Verdict.FAULTY: 3, Verdict.PENDING: 3}, 3)
        again = register_cohort(place.site, path, None, options=options)
        assert again.number == known.number
        totals = place.pull(path, options)
        assert totals.rows == {Verdict.ARCHIVED: 3, Verdict.FAULTY: 3}
        assert not is_archived(totals)
        asked = place.asked_for()
        with place.ledger() as ledger:
            # There is nothing in them that could be asked for.
            reopened = ledger.cohorts.reopen(known.number, reasons=["line-faulty"])
            assert reopened.rows == 0
            folder = write_reports(ledger, ledger.cohorts.get(known.name), tmp_path / "reports")
            assert [note for _, note in ledger.cohorts.notes(known.number)] == [
                "3 of 6 lines have faults and were set apart"
            ]
        assert place.asked_for() == asked
        with (folder / "results.csv").open(newline="") as file:
            results = {int(row["line"]): row for row in csv.DictReader(file)}
        assert [results[line]["verdict"] for line in range(2, 8)] == [
            *("archived", "faulty", "faulty", "faulty", "archived", "archived")
        ]
        assert results[5]["reason"] == "line-faulty"
        assert results[5]["faults"].startswith('line 5, column "AccessionNumber": is a number with')
        assert results[3]["faults"].count("line 3, column") == 2
        assert results[2]["faults"] == ""
        assert (
            FaultyLine(5, (results[5]["faults"],)) in choose(path, faulty_lines="set-apart").faulty
        )
