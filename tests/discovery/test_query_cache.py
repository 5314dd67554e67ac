"""Rows with the same query share an answer; rows that name studies share a query where possible.

What is saved is never believed for it: a list of UIDs that is not answered as single queries are
is not used.
"""

from __future__ import annotations

from collections import Counter

import pytest

from prefect_dicom.core.model import Study, Verdict
from prefect_dicom.discovery.query_cache import QueryCache
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_dry_run
from prefect_dicom.testing import Behaviour, tiny_instances
from prefect_dicom.testing.instances import changed
from tests.support.campaign import subset

STUDIES = 100


NO_LISTS = [
    # Nothing is found by a list; the first UID by itself shows that.
    Behaviour("find.no_list", uids=True),
    Behaviour("find.cap", answers=10, status=0),
    Behaviour("find.cap", answers=10, status=0xA700),
    Behaviour("find.refuse", status=0xA900, on_request=1),
    Behaviour("find.refuse", status=0xC001, on_request=1),
    Behaviour("net.drop_after", answers=5, service="C-FIND", on_request=1),
    Behaviour("find.garble", answers=(3,), on_request=1),
    Behaviour("find.ignore_keys", keys=("StudyInstanceUID",), on_request=1),
]


def plan(place, rows=None) -> None:
    registered = register_cohort(place.site, place.cohort(rows), None)
    with open_dry_run(place.site, registered.number) as planned:
        for page in planned.discovery.pages():
            planned.discovery.discover(*page)


def queries(place) -> list[list[str]]:
    """The StudyInstanceUIDs of each query."""
    return [r.keys["StudyInstanceUID"].split("\\") for r in place.pacs.requests("C-FIND")]


def test_rows_with_the_same_identifiers_are_one_query_whatever_their_filters(around):
    with around(tiny_instances(3)) as place:
        rows = [
            {"PatientID": f"{number % 3:08d}", "StudyDate": day, "Modality": modality}
            for number in range(60)
            for day, modality in [("20190101-20221231", "OT"), ("20000101-20001231", ""), ("", "")]
        ]
        plan(place, rows)
        assert place.asked_for() == 3
        found = Counter(bool(v.studies) for v in place.verdicts())
        assert found == {True: 120, False: 60}
        assert place.totals().rows == {Verdict.PENDING: 120, Verdict.EXCLUDED: 60}


def test_a_patient_that_is_not_there_is_asked_for_once_too(around):
    with around(tiny_instances(1)) as place:
        plan(place, [{"PatientID": "00000000"}, *[{"PatientID": "nobody"}] * 50])
        assert place.asked_for() == 2
        assert place.totals().rows == {Verdict.PENDING: 1, Verdict.NOT_FOUND: 50}


def test_rows_that_name_their_studies_are_asked_for_by_lists(around):
    with around(tiny_instances(STUDIES)) as place:
        plan(place)
        # Fifty at a time; one is left out of each where as many answers might be a limit.
        assert sorted(len(uids) for uids in queries(place)) == [1, 1, 49, 49]
        assert place.totals().rows == {Verdict.PENDING: STUDIES}
        assert len(place.studies()) == STUDIES
        assert place.totals().unasked == 0


def test_a_study_that_a_list_does_not_find_is_asked_for_by_itself(around):
    with around(tiny_instances(40)) as place:
        rows = [{"StudyInstanceUID": uid} for uid in place.pacs.holdings.study_instance_uids()]
        absent = [{"StudyInstanceUID": f"1.2.3.{number}"} for number in range(5)]
        plan(place, rows + absent)
        alone = {uids[0] for uids in queries(place) if len(uids) == 1}
        assert alone >= {row["StudyInstanceUID"] for row in absent}
        assert place.totals().rows == {Verdict.PENDING: 40, Verdict.NOT_FOUND: 5}
        # That they are absent says nothing against lists: the others came of one.
        assert len(alone) < 10


@pytest.mark.campaign("discovery by lists of UIDs")
@pytest.mark.parametrize(
    "behaviour",
    subset(NO_LISTS, [NO_LISTS[1], NO_LISTS[3], NO_LISTS[5]]),
    ids=repr,
)
def test_a_node_that_does_not_answer_lists_is_asked_one_by_one_for_good(around, behaviour):
    with around(tiny_instances(STUDIES), script=[behaviour]) as place:
        place.change(node={"limits": {"associations": 1}})
        plan(place)
        assert place.totals().rows == {Verdict.PENDING: STUDIES}
        assert len(place.studies()) == STUDIES
        asked = Counter(len(uids) for uids in queries(place))
        assert sum(count for length, count in asked.items() if length > 1) == 1
        assert asked[1] == STUDIES


def test_a_study_under_two_patients_is_seen_in_a_list_too(around):
    objects = list(tiny_instances(30))
    twice = changed(objects[7], PatientID="another", SOPInstanceUID="1.2.3.4")
    with around([*objects, twice]) as place:
        plan(place)
        verdicts = Counter(v.verdict for v in place.verdicts())
        assert verdicts == {Verdict.PENDING: 29, Verdict.AMBIGUOUS: 1}


def test_a_limit_as_long_as_a_list_is_not_taken_for_the_list(around):
    # The second answer to the last of them is cut off, and the number of answers fits.
    objects = list(tiny_instances(20))
    twice = changed(objects[-1], PatientID="another", SOPInstanceUID="1.2.3.4")
    cut = Behaviour("find.cap", answers=20, status=0)
    with around([*objects, twice], script=[cut]) as place:
        plan(place)
        verdicts = Counter(v.verdict for v in place.verdicts())
        assert verdicts == {Verdict.PENDING: 19, Verdict.AMBIGUOUS: 1}


def test_many_rows_are_asked_for_over_several_associations_and_few_over_one(around):
    with around(tiny_instances(60)) as place:
        place.change(node={"limits": {"associations": 3}})
        rows = [{"AccessionNumber": o.attributes["AccessionNumber"]} for o in place.pacs.holdings]
        plan(place, rows[:9])
        assert place.pacs.connections == 1
        plan(place, rows)
        assert place.pacs.connections == 1 + 3
        assert place.asked_for() == 9 + 60


def test_what_is_remembered_is_bounded_and_the_latest():
    cache = QueryCache(most_studies=10)
    for number in range(100):
        cache.put({"PatientID": str(number)}, (), [Study("1.2")])
    kept = [n for n in range(100) if cache.get({"PatientID": str(n)}, ()) is not None]
    assert kept == [95, 96, 97, 98, 99]
    cache.get({"PatientID": "95"}, ())
    cache.put({"PatientID": "new"}, (), [])
    assert cache.get({"PatientID": "95"}, ()) == [Study("1.2")]
    assert cache.get({"PatientID": "96"}, ()) is None
    assert cache.get({"PatientID": "new"}, ()) == []
    # With other keys to be returned it is another query.
    assert cache.get({"PatientID": "new"}, ("StudyDescription",)) is None
