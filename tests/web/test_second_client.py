"""Another client reads the same from the scripted server: it is one of DICOMweb, not of ours."""

from __future__ import annotations

import pytest

from prefect_dicom.testing import ScriptedWeb, tiny_instances

api = pytest.importorskip("dicomweb_client.api", reason="dicomweb-client is not installed")


def test_dicomweb_client_searches_and_retrieves_the_same():
    with ScriptedWeb(tiny_instances(2, instances=3)) as web:
        client = api.DICOMwebClient(url=web.url)
        held = {one.sop_instance_uid: one for one in web.holdings}
        uids = [one["0020000D"]["Value"][0] for one in client.search_for_studies()]
        assert sorted(uids) == sorted(web.holdings.study_instance_uids())
        found = {
            str(data_set.SOPInstanceUID): str(data_set.PatientID)
            for uid in uids
            for data_set in client.retrieve_study(uid, media_types=(("application/dicom", "*"),))
        }
        assert found == {uid: one.patient_id for uid, one in held.items()}
