"""A pull from Orthanc's DICOMweb plugin: searched by QIDO-RS, retrieved by WADO-RS."""

from __future__ import annotations

import pytest

from prefect_dicom.core.model import Verdict
from prefect_dicom.network.find.list_studies import find_studies
from prefect_dicom.testing import generate_cohort
from prefect_dicom.testing.web_server import part10_of
from prefect_dicom.web.client import WebClient
from tests.support.sites import study
from tests.support.web import WebOrthanc, archived_hashes, rows_of, web_site

pytestmark = pytest.mark.skipif(WebOrthanc.absent() is not None, reason=str(WebOrthanc.absent()))


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("orthanc")
    files = generate_cohort(folder / "files", studies=4, instances_per_series=6)
    with WebOrthanc(folder / "orthanc") as server:
        server.load(files)
        yield server


def test_every_instance_is_archived_byte_for_byte(orthanc, tmp_path):
    place = web_site(tmp_path, orthanc.url)
    held = orthanc.hashes()
    totals = place.pull(place.cohort(rows_of(one.study for one in orthanc.instances())))
    assert set(totals.rows) == {Verdict.ARCHIVED}
    assert archived_hashes(place) == held


def test_only_what_is_missing_is_asked_for_again(orthanc, tmp_path):
    place = web_site(tmp_path, orthanc.url)
    cohort = place.cohort(rows_of(one.study for one in orthanc.instances()))
    place.pull(cohort)
    before = orthanc.log.read_text().count("/dicom-web/studies")
    place.pull(cohort)
    assert orthanc.log.read_text().count("/dicom-web/studies") == before


def test_a_patient_whose_id_needs_encoding_is_found_though_it_is_not_undone(orthanc, tmp_path):
    uploaded = _with_patient_id(orthanc, tmp_path, "A B&C")
    place = web_site(tmp_path / "site", orthanc.url)
    totals = place.pull(place.cohort([{"PatientID": "A B&C"}]))
    assert dict(totals.rows) == {Verdict.ARCHIVED: 1}
    assert set(archived_hashes(place)) == {uploaded}
    with WebClient(place.site.nodes["pacs"]) as client:
        assert [s.patient_id for s in find_studies(client, {"PatientID": "A B&C"})] == ["A B&C"]
        assert client.decodes is False


def _with_patient_id(orthanc: WebOrthanc, folder, patient_id: str) -> str:
    [stored] = study(99, instances=1, PatientID=patient_id)
    path = folder / "odd.dcm"
    path.write_bytes(part10_of(stored))
    orthanc.load([path])
    return stored.sop_instance_uid
