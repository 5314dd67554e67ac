"""Running the same cohort again moves only what is missing; what changed meanwhile is noticed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from prefect_dicom.cohort.definition import CohortFile, read_cohort_file
from prefect_dicom.cohort.list_options import ListOptions
from prefect_dicom.core.errors import CohortError
from prefect_dicom.core.model import StudyState, Verdict
from prefect_dicom.run import registration
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.s3_server import S3Server
from tests.support.sites import credentials, site_around

METHODS = ("c-move", "c-get")


@pytest.fixture
def bucket(monkeypatch):
    with S3Server() as server:
        credentials(server, monkeypatch)
        yield server


@pytest.mark.parametrize("retrieve", METHODS)
def test_a_finished_cohort_asks_the_pacs_for_nothing_and_puts_nothing(tmp_path, bucket, retrieve):
    objects = tiny_instances(3, instances=3)
    with site_around(tmp_path, objects, retrieve=retrieve, bucket=bucket) as place:
        first = place.pull()
        assert first.rows == {Verdict.ARCHIVED: 3}
        asked, puts, held = place.asked_for(), bucket.requests["PutObject"], place.archived()
        assert puts == 3 * 3 + 3
        assert place.pull() == first
        assert place.rerun() == first
        assert place.asked_for() == asked
        assert bucket.requests["PutObject"] == puts
        assert bucket.requests["DeleteObject"] == 0
        assert place.archived() == held
        place.audit()


def test_a_second_cohort_with_the_same_studies_retrieves_nothing(tmp_path):
    with site_around(tmp_path, tiny_instances(2, instances=2)) as place:
        place.pull()
        moves = place.asked_for("C-MOVE")
        rows = [{"AccessionNumber": "T0000000000"}, {"AccessionNumber": "T0000000001"}]
        place.pull(place.cohort(rows))
        with place.ledger() as ledger:
            assert ledger.progress.totals(2).rows == {Verdict.ARCHIVED: 2}
        assert place.asked_for("C-MOVE") == moves


@pytest.mark.parametrize("retrieve", METHODS)
def test_a_lost_ledger_is_made_again_without_a_retrieve_or_a_put(tmp_path, bucket, retrieve):
    objects = tiny_instances(2, instances=3)
    with site_around(tmp_path, objects, retrieve=retrieve, bucket=bucket) as place:
        first = place.pull()
        puts, held = bucket.requests["PutObject"], place.archived()
        retrieves = place.asked_for("C-MOVE", "C-GET")
        place.lose_ledger()
        assert place.pull() == first
        assert place.asked_for("C-MOVE", "C-GET") == retrieves
        assert bucket.requests["PutObject"] == puts
        assert place.archived() == held
        place.audit()


def test_with_a_lost_ledger_an_unfinished_study_is_stored_under_the_same_keys(tmp_path, bucket):
    objects = list(tiny_instances(1, instances=4))
    script = [Behaviour("move.drop_instances", instances=1, study=objects[0].study_instance_uid)]
    with site_around(tmp_path, objects, retrieve="c-get", script=script, bucket=bucket) as place:
        assert place.pull().rows == {Verdict.PARTIAL: 1}
        held = place.archived()
        assert len(held) == 3
        place.lose_ledger()
        place.pacs.script.clear()
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert held.items() <= place.archived().items()
        place.audit()


@pytest.mark.parametrize("retrieve", METHODS)
def test_a_rerun_asks_for_the_missing_instances_by_name(tmp_path, retrieve):
    objects = list(tiny_instances(1, instances=6))
    script = [Behaviour("move.drop_instances", instances=2)]
    with site_around(tmp_path, objects, retrieve=retrieve, script=script) as place:
        place.pull()
        assert place.reasons() == [("failed", "instances-missing")]
        assert len(place.pacs.sent_instances()) == 4
        place.pacs.script.clear()
        asked = place.asked_for("C-MOVE", "C-GET")
        assert place.rerun().rows == {Verdict.ARCHIVED: 1}
        assert len(place.pacs.sent_instances()) == 6
        [request] = place.pacs.requests("C-MOVE" if retrieve == "c-move" else "C-GET")[asked:]
        assert request.level == "IMAGE"
        assert sorted(request.keys["SOPInstanceUID"].split("\\")) == sorted(
            o.sop_instance_uid for o in objects[4:]
        )
        place.audit()


def test_an_instance_that_joins_the_study_while_it_is_retrieved_is_archived_with_it(tmp_path):
    *objects, late = tiny_instances(1, instances=5)
    join = Behaviour("pacs.mutate", change=lambda pacs: pacs.holdings.add(late), times=1)
    with site_around(tmp_path, objects, script=[join]) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert len(place.manifest(late.study_instance_uid).instances) == 5
        # A list before, one that differs, and one that does not.
        assert [r.level for r in place.pacs.requests("C-FIND")].count("IMAGE") == 3
        assert sorted(place.pacs.sent_instances()) == sorted(
            o.sop_instance_uid for o in (*objects, late)
        )
        place.audit()


def test_an_instance_that_leaves_the_study_is_not_in_its_manifest(tmp_path):
    objects = list(tiny_instances(1, instances=4))
    gone = objects[-1]
    # Listed, and deleted on the PACS once it has been sent.
    leave = Behaviour(
        "pacs.mutate",
        on_request=4,
        change=lambda pacs: pacs.holdings.remove(gone.sop_instance_uid),
        level="SERIES",
    )
    with site_around(tmp_path, objects, script=[leave]) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        manifest = place.manifest(gone.study_instance_uid)
        assert len(manifest.instances) == 3
        assert gone.sop_instance_uid not in str(manifest)
        place.audit()


def test_a_study_that_never_settles_fails_for_now_and_is_archived_when_it_has(tmp_path):
    *objects, first, second, third, fourth, fifth = tiny_instances(1, instances=7)
    late = iter([first, second, third, fourth, fifth])

    def grow(pacs) -> None:
        for stored in itertools.islice(late, 1):
            pacs.holdings.add(stored)

    with site_around(tmp_path, objects, script=[Behaviour("pacs.mutate", change=grow)]) as place:
        place.pull()
        assert place.reasons() == [("failed", "study-changed")]
        assert not any(key.endswith("manifest.json") for key in place.archived())
        for stored in late:
            place.pacs.holdings.add(stored)
        place.pacs.script.clear()
        sent = len(place.pacs.sent_instances())
        assert place.rerun().rows == {Verdict.ARCHIVED: 1}
        assert len(place.pacs.sent_instances()) == 7
        assert 0 < sent < 7
        place.audit()


def test_a_file_damaged_in_the_spool_is_asked_for_again_and_nothing_else(tmp_path):
    objects = list(tiny_instances(1, instances=4))
    with site_around(tmp_path, objects) as place:
        with place.opened() as pull:
            for lines in pull.discovery.pages():
                pull.discovery.discover(*lines)
            [chunk] = pull.chunks.chunks()
            pull.retrieval.retrieve(chunk)
            damaged = place.spooled()[0]
            data = bytearray(damaged.read_bytes())
            data[-1] ^= 1
            damaged.write_bytes(data)
            assert pull.archiving.archive(chunk) == 1
        assert place.reasons() == [(str(StudyState.ARCHIVED), None)]
        assert len(place.pacs.sent_instances()) == 5
        place.audit()


def test_a_cohort_file_that_is_known_is_not_read_again(tmp_path, monkeypatch):
    with site_around(tmp_path, tiny_instances(1), retrieve="c-get") as place:
        cohort = place.cohort()
        known = registration.register_cohort(place.site, cohort, None, "trial")
        reads: list[Path] = []

        def read(path: Path, options: ListOptions) -> CohortFile:
            reads.append(path)
            return read_cohort_file(path, options)

        monkeypatch.setattr(registration, "read_cohort_file", read)
        assert registration.register_cohort(place.site, cohort, None) == known
        assert reads == []
        # It is known by its content: the same file with one line more is another one.
        cohort.write_text(cohort.read_text() + "***\n")
        with pytest.raises(CohortError):
            registration.register_cohort(place.site, cohort, None)
        assert reads == [cohort]


@pytest.mark.parametrize("there", ["nothing", "a directory"])
def test_a_cohort_file_that_cannot_be_read_is_a_fault(tmp_path, there):
    with site_around(tmp_path, tiny_instances(1), retrieve="c-get") as place:
        path = tmp_path / "missing.csv"
        if there == "a directory":
            path.mkdir()
        with pytest.raises(CohortError) as caught:
            registration.register_cohort(place.site, path, None)
        assert "path" in str(caught.value)
        assert not (tmp_path / "ledger.sqlite").exists()
