"""Searches: pages that are not trusted, keys that are ignored, values that no URL can hold."""

from __future__ import annotations

import pytest

from prefect_dicom.config.web_node import WebNode
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import Verdict
from prefect_dicom.network.find.list_instances import list_instances
from prefect_dicom.network.find.list_studies import find_studies, list_studies
from prefect_dicom.testing import Behaviour, ScriptedWeb, tiny_instances
from prefect_dicom.web import search
from prefect_dicom.web.client import WebClient
from tests.support.sites import study
from tests.support.web import web_site


@pytest.fixture(autouse=True)
def short_pages(monkeypatch):
    monkeypatch.setattr(search, "PAGE_ANSWERS", 4)


@pytest.fixture(scope="module")
def eleven():
    with ScriptedWeb(tiny_instances(1, instances=11)) as web:
        yield web


@pytest.fixture
def web(eleven):
    eleven.script.clear()
    eleven.log.clear()
    return eleven


def client_of(web) -> WebClient:
    return WebClient(WebNode(dicomweb=web.url, timeouts={"find_seconds": 5, "connect_seconds": 5}))


def listed(web) -> int:
    [uid] = web.holdings.study_instance_uids()
    with client_of(web) as client:
        return len(list_instances(client, uid).instances)


@pytest.mark.parametrize(
    "behaviour",
    [
        None,
        Behaviour("web.short", answers=3),
        Behaviour("web.short", answers=1),
        Behaviour("web.no_content"),
        Behaviour("web.paging", limit=False),
        Behaviour("web.paging", limit=False, offset=False),
        Behaviour("web.frame", framing="chunked", chunk_bytes=5),
        Behaviour("web.frame", framing="close", chunk_bytes=50),
        Behaviour("web.shift", by_number=1, times=1),
        Behaviour("web.shift", by_number=-1, times=1),
        Behaviour("web.shift", by_number=3, times=1),
        Behaviour("web.compress"),
    ],
    ids=repr,
)
def test_a_list_is_whole_whatever_the_pages_are_like(web, behaviour):
    if behaviour is not None:
        web.script.append(behaviour)
    assert listed(web) == 11


@pytest.mark.parametrize(
    "behaviour",
    [
        Behaviour("web.paging", offset=False),
        Behaviour("web.cap", answers=6, warning=True),
        Behaviour("web.status", status=413),
    ],
    ids=repr,
)
def test_a_list_that_ends_before_its_end_is_not_used(web, behaviour):
    web.script.append(behaviour)
    with pytest.raises(PacsError, match="answers-capped"):
        listed(web)


@pytest.mark.parametrize("body", [b"not JSON", b"{}", b"[1]", b"[" * 100_000, b'["\xff"]'])
def test_an_answer_that_is_none_is_not_used(web, body):
    web.script.append(Behaviour("web.body", body=body))
    with pytest.raises(PacsError, match="answer-unusable"):
        listed(web)


@pytest.mark.parametrize(
    "behaviour",
    [Behaviour("web.endless", what="body"), Behaviour("web.compress", mebibytes=100)],
    ids=repr,
)
def test_an_answer_without_end_costs_no_more_than_its_bound(web, behaviour, monkeypatch):
    monkeypatch.setattr("prefect_dicom.web.client._MOST_PAGE_BYTES", 1024 * 1024)
    web.script.append(behaviour)
    with pytest.raises(PacsError, match="answer-unusable"):
        listed(web)


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "PatientID", "AccessionNumber"])
def test_a_key_that_is_ignored_does_not_read_the_archive(tmp_path, keyword):
    with ScriptedWeb(tiny_instances(40)) as web:
        web.script.append(Behaviour("web.ignore_keys", keys=[keyword]))
        place = web_site(tmp_path, web.url, web)
        value = list(web.holdings)[30].attributes[keyword]
        place.pull(place.cohort([{keyword: value}]))
        assert Verdict.ARCHIVED not in place.totals().rows
        assert len(web.log) < 15
        assert web.requests("WADO-RS") == []


@pytest.mark.parametrize("patient_id", ["A B", "A&B=1", "50%", "A+B", "A,B", "Ä7", "A#1", "DOE^J"])
@pytest.mark.parametrize("decodes", [True, False])
def test_a_patient_is_found_whatever_the_number_is_made_of(patient_id, decodes):
    held = [*study(5, PatientID=patient_id), *study(6, PatientID="A1B")]
    with ScriptedWeb(held) as web, client_of(web) as client:
        if not decodes:
            web.script.append(Behaviour("web.literal"))
        found = find_studies(client, {"PatientID": patient_id})
        assert [one.patient_id for one in found] == [patient_id]
        assert client.decodes in (None, decodes)


def test_what_is_found_without_encoding_is_not_encoded(web):
    with client_of(web) as client:
        list_studies(client, {"PatientName": "DOE^JOHN"}, wildcards={"PatientID": "1*"})
    [query] = {request.query.split("&limit")[0] for request in web.log}
    assert "PatientName=DOE^JOHN" in query
    assert "PatientID=1*" in query


def test_the_archive_is_never_asked_for_by_wildcards_alone(web):
    web.script.append(Behaviour("web.literal"))
    with client_of(web) as client, pytest.raises(PacsError, match="request-refused"):
        find_studies(client, {"PatientID": "山田"})
    assert not [request for request in web.log if "=*" in request.query]


def test_a_uid_that_climbs_out_of_its_path_is_not_asked_for(web):
    with client_of(web) as client, pytest.raises(PacsError, match="request-refused"):
        list_instances(client, "..")
    assert web.log == []
