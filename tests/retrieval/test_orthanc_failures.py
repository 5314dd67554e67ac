"""Orthanc answers C000 to nearly everything; what it means is diagnosed by further requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import RetrieveMethod, StudyState, Verdict
from prefect_dicom.run.retrieving import ChunkRetrieval
from prefect_dicom.testing.generate import generate_cohort
from prefect_dicom.testing.instances import instance_of_file
from tests.support import peers
from tests.support.sites import Place, site_around

STUDIES = 5


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    return generate_cohort(tmp_path_factory.mktemp("generated"), studies=STUDIES, seed=7)


@dataclass
class Setting:
    """A site that asks a real Orthanc, which knows us as a caller and knows no destination."""

    place: Place
    orthanc: peers.Orthanc

    def know_the_receiver(self, port: int | None = None) -> None:
        receiver = self.place.site.receiver
        self.orthanc.know(receiver.ae_title, port or receiver.port)

    def delete(self, study_instance_uid: str) -> None:
        for one in self.orthanc._json("/studies?expand"):
            if one["MainDicomTags"]["StudyInstanceUID"] == study_instance_uid:
                self.orthanc.rest(f"/studies/{one['ID']}", "DELETE")


@pytest.fixture
def setting(tmp_path, new_archive, files) -> Iterator[Setting]:
    orthanc = new_archive(peers.Orthanc, {peers.US: peers.free_port()})
    assert orthanc.load(files).stored == len(files)
    node = orthanc.node(settle_seconds=0.3)
    reported = node.model_dump(mode="json", include={"host", "port", "called_ae_title", "timeouts"})
    # The scripted PACS beside it holds the same, for the audit to compare with.
    with site_around(tmp_path, map(instance_of_file, files)) as place:
        place.change(node={**reported, "calling_ae_title": peers.US})
        yield Setting(place, orthanc)


def disabled(place: Place) -> str:
    with pytest.raises(PacsError) as caught:
        place.pull()
    # Of the five none has failed for good, and most have not been tried.
    states = place.totals().studies
    assert states[StudyState.ARCHIVED] == states[StudyState.FAILED] == 0
    assert place.totals().rows == {Verdict.PENDING: STUDIES}
    place.audit()
    return caught.value.code


def test_a_destination_it_does_not_know(setting):
    assert disabled(setting.place) == "node-sends-nothing"
    setting.know_the_receiver()
    assert setting.place.rerun().rows == {Verdict.ARCHIVED: STUDIES}
    setting.place.audit()


def test_a_destination_at_a_port_where_nothing_listens(setting):
    setting.know_the_receiver(peers.free_port())
    assert disabled(setting.place) == "node-sends-nothing"
    setting.know_the_receiver()
    assert setting.place.rerun().rows == {Verdict.ARCHIVED: STUDIES}
    setting.place.audit()


@pytest.mark.parametrize("retrieve", [RetrieveMethod.C_MOVE, RetrieveMethod.C_GET])
def test_a_study_it_no_longer_has(setting, monkeypatch, retrieve):
    setting.know_the_receiver()
    place = setting.place
    place.change(node={"retrieve": str(retrieve), "limits": {"chunk_studies": 1}})
    gone = place.pacs.holdings.study_instance_uids()[0]
    fetch = ChunkRetrieval._fetch

    def meanwhile(self, chunk, retrieval, tasks, hand_over):
        if any(task.claim.study_instance_uid == gone for task in tasks):
            setting.delete(gone)
        return fetch(self, chunk, retrieval, tasks, hand_over)

    monkeypatch.setattr(ChunkRetrieval, "_fetch", meanwhile)
    assert place.pull().rows == {Verdict.ARCHIVED: STUDIES - 1, Verdict.FAILED: 1}
    assert place.studies()[gone].reason == "study-gone"


def test_a_caller_that_may_not_query(setting):
    setting.place.change(node={"calling_ae_title": "NOBODY"})
    with pytest.raises(PacsError, match="not-permitted"):
        setting.place.pull()
    assert setting.place.totals().rows == {Verdict.PENDING: STUDIES}
