"""The doctor at a DICOMweb node: what it finds, and what it learns."""

from __future__ import annotations

import pytest

from prefect_dicom.config.capabilities import Match, Service
from prefect_dicom.core.model import CohortRow
from prefect_dicom.operations.doctor import entries_for_the_pacs, examine
from prefect_dicom.operations.probe_node import probe_node
from prefect_dicom.testing import Behaviour, ScriptedWeb, tiny_instances
from tests.support.web import web_site


@pytest.fixture
def web():
    with ScriptedWeb(tiny_instances(2, instances=2)) as server:
        yield server


@pytest.fixture
def place(web, tmp_path):
    return web_site(tmp_path, web.url, web)


def findings(place):
    return [one for one in examine(place.site) if one.part == "pacs"]


def row_of(web) -> CohortRow:
    return CohortRow(1, study_instance_uid=web.holdings.study_instance_uids()[0])


def test_it_searches_lists_and_retrieves_one_instance(web, place):
    found = findings(place)
    assert [(one.check, one.ok) for one in found] == [
        ("HTTP", True),
        ("QIDO-RS", True),
        ("instance list", True),
        ("WADO-RS of one instance", True),
    ]
    assert len(web.sent_instances()) == 1
    assert place.spooled() == []
    assert entries_for_the_pacs(place.site, place.site.nodes["pacs"]) == []


def test_it_names_what_a_person_has_to_change(web, place):
    web.script.append(Behaviour("web.status", service="WADO-RS", status=403))
    last = findings(place)[-1]
    assert not last.ok
    assert "not-permitted" in last.words


@pytest.mark.parametrize("decodes", [True, False])
def test_it_learns_whether_percent_encoding_is_undone(web, place, decodes):
    if not decodes:
        web.script.append(Behaviour("web.literal"))
    known = probe_node(place.site, "pacs", row_of(web)).capabilities
    assert known.percent_decoding is decodes
    assert known.wado_rs is Service.WORKS
    assert known.keys is not None
    assert {key.match for key in known.keys.values()} == {Match.MATCHED}


def test_it_learns_which_keys_are_ignored(web, place):
    web.script.append(Behaviour("web.ignore_keys", keys=["AccessionNumber"]))
    result = probe_node(place.site, "pacs", row_of(web))
    assert result.capabilities.keys is not None
    assert result.capabilities.keys["AccessionNumber"].match is Match.IGNORED
    assert any("AccessionNumber" in note for note in result.notes)
