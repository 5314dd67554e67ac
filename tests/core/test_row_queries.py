"""What is kept of a row's queries is bounded, and each answer stands beside its own query."""

from __future__ import annotations

from prefect_dicom.core.model import Study
from prefect_dicom.core.row_queries import MOST_ANSWERS, MOST_QUERIES, RowTrace


def test_answers_to_queries_beyond_those_kept_are_not_given_to_the_last_one_kept():
    trace = RowTrace("pacs")
    for number in range(MOST_QUERIES + 5):
        trace.begin("STUDY", {"AccessionNumber": f"A{number}"})
        trace.keep(Study(f"1.2.{number}"))
    trace.answered_before({"AccessionNumber": "A0"}, [Study("1.2.0")])
    assert [[s.study_instance_uid for s in query.studies] for query in trace.queries] == [
        [f"1.2.{number}"] for number in range(MOST_QUERIES)
    ]


def test_answers_are_kept_as_far_as_there_is_room():
    trace = RowTrace("pacs")
    for _ in range(2):
        trace.begin("STUDY", {"PatientID": "1"})
        for number in range(MOST_ANSWERS - 1):
            trace.keep(Study(f"1.2.{number}"))
    assert [len(query.studies) for query in trace.queries] == [MOST_ANSWERS - 1, 1]
