"""What was asked for a row, what came, and what dropped each answer, from the ledger alone."""

from __future__ import annotations

import pytest

from prefect_dicom.cli import Exit
from prefect_dicom.core.row_queries import MOST_ANSWERS
from prefect_dicom.testing import Behaviour
from tests.support.commands import CommandLine, Ended
from tests.support.sites import Place, site_around, study

HELD = [
    *study(1, PatientID="000123", AccessionNumber="4711", StudyDate="20240131", Modality="CT"),
    *study(2, PatientID="000123", AccessionNumber="4712", StudyDate="20240301", Modality="MR"),
    *study(3, PatientID="000124", AccessionNumber="4713", StudyDate="20240131", Modality="CT"),
]


@pytest.fixture
def place(tmp_path):
    with site_around(tmp_path, HELD, retrieve="c-get") as place:
        yield place


def why(place: Place, line: int, *options: str) -> Ended:
    command = CommandLine(place.folder, place.folder / "home")
    return command("why", "1", str(line), *options)


def queries(place: Place, line: int) -> list[dict]:
    ended = why(place, line, "--json")
    assert ended.code == Exit.ALL_WELL, ended.stderr
    return ended.result["queries"]


def test_each_answer_is_taken_or_dropped_for_a_reason(place):
    place.pull(place.cohort([{"PatientID": "000123", "Modality": "CT"}]))
    (query,) = queries(place, 2)
    assert query["keys"] == {"PatientID": "000123"}
    assert (query["node"], query["level"], query["source"]) == ("pacs", "STUDY", "query")
    assert query["answers"] == 2
    shown = {answer["AccessionNumber"]: answer for answer in query["shown"]}
    assert shown["4711"]["verdict"] == "taken" and not shown["4711"]["why"]
    assert shown["4712"]["verdict"] == "dropped"
    assert shown["4712"]["why"] == ["Modality is another"]
    assert shown["4712"]["ModalitiesInStudy"] == "MR"
    # The studies that were taken are read where the ledger has them.
    assert shown["4711"]["StudyDate"] == "20240131"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"PatientID": "000123", "AccessionNumber": "4713"}, "AccessionNumber is another"),
        ({"PatientID": "000123", "StudyDate": "20240201"}, "StudyDate is not in the row's range"),
        ({"PatientID": "000123", "StudyDescription": "Head*"}, "StudyDescription does not match"),
        ({"PatientID": "000123", "PatientName": "Nobody^At All"}, "PatientName is another"),
    ],
)
def test_what_drops_an_answer_is_named(place, row, words):
    place.pull(place.cohort([row]))
    shown = [answer for query in queries(place, 2) for answer in query["shown"]]
    assert shown and all(answer["verdict"] == "dropped" for answer in shown)
    assert any(words in answer["why"] for answer in shown)


def test_people_read_what_was_asked_and_what_came(place):
    place.pull(place.cohort([{"PatientID": "000123", "Modality": "CT"}, {"PatientID": "9"}]))
    found = why(place, 2)
    assert found.code == Exit.ALL_WELL
    lines = found.output.splitlines()
    assert lines[0] == "Line 2: PatientID '000123', Modality 'CT'"
    assert lines[1].startswith("Verdict: archived")
    assert "Query 1, pacs, STUDY level: PatientID '000123'" in lines
    assert "    dropped: Modality is another" in lines and "    taken" in lines
    absent = why(place, 3)
    assert "Verdict: not-found (no-match): " in absent.output
    assert "0 answers" in absent.output
    assert not absent.modules & {"prefect", "pynetdicom", "pandas", "boto3"}


def test_a_row_that_another_one_has_asked_for_says_so(place):
    row = {"PatientID": "000123", "Modality": "CT"}
    place.pull(place.cohort([row, row | {"Modality": "MR"}]))
    sources = [[query["source"] for query in queries(place, line)] for line in (2, 3)]
    assert sorted(sources) == [["cache"], ["query"]]
    assert "another row had asked the same" in why(place, 2).output + why(place, 3).output


def test_rows_that_were_asked_for_by_a_list_of_uids_say_so(tmp_path):
    held = [each for number in range(1, 13) for each in study(number)]
    with site_around(tmp_path, held, retrieve="c-get") as place:
        uids = list(place.pacs.holdings.study_instance_uids())
        place.pull(place.cohort([{"StudyInstanceUID": uid} for uid in uids]))
        (query,) = queries(place, 2)
        assert (query["source"], query["answers"]) == ("uid-list", 1)
        assert "in a list of StudyInstanceUIDs" in why(place, 2).output


def test_a_query_that_failed_is_there_with_its_reason(tmp_path):
    refusal = Behaviour("find.refuse", status=0xA900)
    with site_around(tmp_path, HELD, retrieve="c-get", script=[refusal]) as place:
        place.pull(place.cohort([{"PatientID": "000123"}]))
        assert {query["outcome"] for query in queries(place, 2)} == {"request-refused"}
        assert "ended by request-refused" in why(place, 2).output


def test_of_many_answers_the_first_are_kept(tmp_path):
    held = [
        each
        for number in range(1, MOST_ANSWERS + 6)
        for each in study(number, PatientID="1", AccessionNumber=f"A{number}")
    ]
    with site_around(tmp_path, held, retrieve="c-get") as place:
        place.pull(place.cohort([{"PatientID": "1", "AccessionNumber": "A9"}, {"PatientID": "1"}]))
        # Others look for more: a list of this length may have been cut short.
        query, *_ = queries(place, 3)
        assert query["answers"] == MOST_ANSWERS + 5 and len(query["shown"]) == MOST_ANSWERS
        assert "and 5 answers not kept" in why(place, 3).output


def test_a_line_that_is_none_is_named(place):
    place.pull(place.cohort([{"PatientID": "000123"}]))
    ended = why(place, 7)
    assert ended.code == Exit.CONFIGURATION
    assert "has no row of line 7" in ended.stderr
