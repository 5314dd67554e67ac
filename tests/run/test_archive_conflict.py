"""What is no file in the place of a study's manifest ends that study, and no other."""

from __future__ import annotations

from prefect_dicom.config.site import DirectoryArchive
from prefect_dicom.core.model import StudyState
from prefect_dicom.core.uids import manifest_key
from tests.support.sites import site_around, study


def test_a_taken_name_of_a_manifest_ends_its_study_alone(tmp_path):
    first, second = study(1), study(2)
    with site_around(tmp_path, [*first, *second]) as place:
        archive = place.site.archive
        assert isinstance(archive, DirectoryArchive)
        (archive.directory / manifest_key(first[0].study_instance_uid)).mkdir(parents=True)
        totals = place.pull()
        assert totals.studies[StudyState.FAILED] == totals.studies[StudyState.ARCHIVED] == 1
        reasons = {uid: record.reason for uid, record in place.studies().items()}
        assert reasons[first[0].study_instance_uid] == "archive-conflict"
