"""Many studies are listed by a few queries, and none of the lists is shorter than it should be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import date

import pytest

from prefect_dicom.config.node import PacsNode
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import InformationModel, Study, Verdict
from prefect_dicom.network.find.list_instances import list_instances
from prefect_dicom.network.find.list_studies import find_studies
from prefect_dicom.network.find.list_together import list_together
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.testing import Behaviour, ScriptedPacs, tiny_instances
from prefect_dicom.testing.generate import generate_cohort
from tests.support.sites import site_around

MOST_UNCOUNTED = 99
"""More answers than this may have been cut at a limit, where nothing counts them."""

ALL_DATES = {"StudyDate": f"{date(1900, 1, 1):%Y%m%d}-{date(2099, 12, 31):%Y%m%d}"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return generate_cohort(tmp_path_factory.mktemp("files"), studies=6, seed=11)


@pytest.fixture
def pacs(files):
    with ScriptedPacs(files) as pacs:
        yield pacs


def _node(pacs, **changes) -> PacsNode:
    return PacsNode(host="127.0.0.1", port=pacs.port, called_ae_title=pacs.ae_title, **changes)


def _one_by_one(requestor: Requestor, studies: list[Study]) -> dict:
    return {
        study.study_instance_uid: list_instances(
            requestor, study.study_instance_uid, study.patient_id
        )
        for study in studies
    }


def _same(together: dict, singly: dict) -> None:
    for uid, listed in together.items():
        assert set(listed.instances) == set(singly[uid].instances)
        assert len(listed.instances) == len(singly[uid].instances)


@pytest.mark.needs("time")
def test_two_queries_list_all_studies_of_a_chunk(pacs):
    with Requestor(_node(pacs)) as requestor:
        studies = find_studies(requestor, ALL_DATES)
        before = len(pacs.requests("C-FIND"))
        together = list_together(requestor, studies)
        assert len(pacs.requests("C-FIND")) - before == 2
        assert len(together) == len(studies) == 6
        _same(together, _one_by_one(requestor, studies))


@pytest.mark.parametrize("archive", ["orthanc", "dcmqrscp"])
def test_real_archives_list_together_what_they_list_one_by_one(archive, request):
    peer = request.getfixturevalue(archive)
    with Requestor(_node(peer)) as requestor:
        found = find_studies(requestor, ALL_DATES)
        singly = {}
        for study in found:
            with contextlib.suppress(PacsError, ValueError):
                singly |= _one_by_one(requestor, [study])
        together = {}
        for chunk in _believable_chunks(found, singly):
            together.update(list_together(requestor, chunk))
        assert requestor.answers_lists
        _same(together, singly)
        # Not all: what an archive counts otherwise than it lists is asked for again.
        assert len(together) > len(singly) / 2


def _believable_chunks(studies: list[Study], singly: dict) -> Iterator[list[Study]]:
    """Twenty studies each; of those without counts as many as one short answer may list."""
    chunk: list[Study] = []
    instances = 0
    for study in studies:
        if not study.study_instance_uid:
            continue
        listed = singly.get(study.study_instance_uid)
        size = len(listed.instances) if listed and study.number_of_series is None else 0
        if size > MOST_UNCOUNTED:
            continue
        if chunk and (len(chunk) == 20 or instances + size > MOST_UNCOUNTED):
            yield chunk
            chunk, instances = [], 0
        chunk.append(study)
        instances += size
    if chunk:
        yield chunk


LIES = {
    "nothing for a list": Behaviour("find.no_list", uids=True),
    "other counts than instances": Behaviour("find.counts", how="off_by", by_number=1),
    "counts of zero": Behaviour("find.counts", how="zero"),
    "every match twice": Behaviour("find.duplicate", copies=1),
    "a silent end after 3 answers": Behaviour("find.cap", answers=3, status=0x0000),
    "a declared end after 3 answers": Behaviour("find.cap", answers=3),
    "a refusal": Behaviour("find.refuse", status=0xA900),
    "a failure": Behaviour("find.refuse", status=0xC000),
    "no series UIDs at the IMAGE level": Behaviour("find.omit_keys", keys=["SeriesInstanceUID"]),
    "no study UIDs": Behaviour("find.omit_keys", keys=["StudyInstanceUID"]),
    "all there is, whatever is asked": Behaviour(
        "find.ignore_keys", keys=["StudyInstanceUID", "SeriesInstanceUID"]
    ),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.needs("time")
def test_an_archive_that_answers_lists_with(lie, pacs):
    with Requestor(_node(pacs)) as requestor:
        studies = find_studies(requestor, ALL_DATES)
        honest = _one_by_one(requestor, studies)
        pacs.script.append(LIES[lie])
        _same(list_together(requestor, studies), honest)


def test_an_archive_that_does_not_answer_lists_is_not_asked_again(pacs):
    with Requestor(_node(pacs)) as requestor:
        studies = find_studies(requestor, ALL_DATES)
        pacs.script.append(Behaviour("find.refuse", status=0xC000))
        assert list_together(requestor, studies) == {}
        before = len(pacs.requests("C-FIND"))
        assert list_together(requestor, studies) == {}
        assert len(pacs.requests("C-FIND")) == before


@pytest.mark.needs("time")
def test_without_counts_only_short_answers_are_believed(pacs):
    with Requestor(_node(pacs)) as requestor:
        studies = find_studies(requestor, ALL_DATES)
        honest = _one_by_one(requestor, studies)
        assert sum(len(listed.instances) for listed in honest.values()) > 99
        pacs.script.append(Behaviour("find.counts", how="none"))
        uncounted = find_studies(requestor, ALL_DATES)
        assert all(study.number_of_series is None for study in uncounted)
        assert list_together(requestor, uncounted) == {}
        small = min(uncounted, key=lambda s: len(honest[s.study_instance_uid].instances))
        requestor.answers_lists = True
        _same(together := list_together(requestor, [small]), honest)
        assert len(together) == 1


def test_the_patient_root_which_needs_a_patient_for_each_study_is_asked_one_by_one(pacs):
    with Requestor(_node(pacs)) as requestor:
        studies = find_studies(requestor, ALL_DATES)
    node = _node(pacs, information_model=InformationModel.PATIENT_ROOT)
    with Requestor(node) as requestor:
        assert list_together(requestor, studies) == {}


def test_a_node_that_is_away_is_no_lack_of_lists(pacs):
    node = _node(pacs)
    with Requestor(node) as requestor:
        studies = find_studies(requestor, ALL_DATES)
    pacs.close()
    with Requestor(node) as requestor, pytest.raises(PacsError) as error:
        list_together(requestor, studies)
    assert error.value.code == "pacs-refused"


def queries_below(place) -> int:
    """The queries for series and instances."""
    return sum(request.level != "STUDY" for request in place.pacs.requests("C-FIND"))


def test_a_chunk_is_listed_before_and_after_by_two_queries_each(tmp_path):
    with site_around(tmp_path, tiny_instances(8, instances=2), retrieve="c-get") as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 8}
        assert queries_below(place) == 4
        place.audit()


def test_where_lists_are_not_answered_each_study_is_listed_alone(tmp_path):
    script = [Behaviour("find.no_list", uids=True)]
    objects = tiny_instances(8, instances=2)
    with site_around(tmp_path, objects, retrieve="c-get", script=script) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 8}
        # One in vain, then series and instances of each, before and after.
        assert queries_below(place) == 1 + 2 * 2 * 8
        place.audit()


def test_a_study_that_grows_meanwhile_is_seen_to_have_grown(tmp_path):
    objects = list(tiny_instances(4, instances=3))
    late = objects[1]
    with site_around(tmp_path, [o for o in objects if o is not late], retrieve="c-get") as place:
        place.pacs.script.append(
            Behaviour("pacs.mutate", change=lambda pacs: pacs.holdings.add(late), times=1)
        )
        assert place.pull().rows == {Verdict.ARCHIVED: 4}
        assert len(place.archived()) == 12 + 4
        place.audit()
