"""A selection of series is carried through: only these are expected, asked for, archived, proved.

The manifest says with which selection it was made and which series it leaves out, so that nobody
takes it for the whole study; and an archive holds a study under one selection.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from pydicom.dataset import FileMetaDataset

from prefect_dicom.archive.manifest import encode_manifest
from prefect_dicom.core.failpoints import POINTS
from prefect_dicom.core.model import Evidence
from prefect_dicom.core.uids import manifest_key
from prefect_dicom.ledger import RebuildOutcome
from prefect_dicom.operations.rebuild import rebuild_ledger
from prefect_dicom.run.loop import work_through
from prefect_dicom.testing import Behaviour, StoredInstance
from prefect_dicom.testing.audit import Auditor
from prefect_dicom.testing.instances import decoded
from tests.support import crashes, peers
from tests.support.campaign import subset
from tests.support.series import series, series_uid, study_uid
from tests.support.sites import Place, site_around

AXIAL = series(1, 1, 3, Modality="CT", SeriesDescription="Axial")
SCOUT = series(1, 2, 1, Modality="CT", SeriesDescription="Scout")
REPORT = series(1, 3, 1, Modality="SR", SeriesDescription="Report")
# Nothing of it is unwanted.
PLAIN = series(2, 1, 2, Modality="CT", SeriesDescription="Axial")
MR = series(3, 1, 2, Modality="MR", SeriesDescription="T1", PatientID="P2")
HELD = [*AXIAL, *SCOUT, *REPORT, *PLAIN, *MR]

CT = 'list: list.csv\nseries: {Modality: CT, SeriesDescription: {not: "*scout*"}}\n'
IN_WORDS = 'Modality is "CT"; SeriesDescription is not "*scout*"'
WHOLE = "list: list.csv\n"


@pytest.fixture(params=["c-move", "c-get"])
def method(request) -> str:
    return request.param


def site(folder: Path, method: str = "c-get", script=(), standing=None, held=HELD):
    receiver = standing if method == "c-move" else None
    return site_around(folder, held, script=script, retrieve=method, standing=receiver)


def pull(place: Place, text: str = CT, rows: str = "PatientID\nP1\n") -> list[tuple[str, str]]:
    """Verdict and reason of each row."""
    (place.folder / "list.csv").write_text(rows)
    path = place.folder / "cohort.yaml"
    path.write_text(text)
    with place.opened(path) as run:
        work_through(run)
        verdicts = list(run.ledger.rows.verdicts(run.cohort.number))
    return [(str(verdict.verdict), verdict.reason) for verdict in verdicts]


def uids(objects: list[StoredInstance]) -> list[str]:
    return sorted(stored.sop_instance_uid for stored in objects)


def sent(place: Place) -> Counter[str]:
    return Counter(
        each.sop_instance_uid
        for request in place.pacs.log
        if request.service in ("C-MOVE", "C-GET")
        for each in request.sent
    )


def objects_in_the_archive(place: Place) -> list[str]:
    return sorted(Path(key).stem for key in place.archived() if key.endswith(".dcm"))


def whole(place: Place) -> None:
    """Nothing is amiss, also to those who share no code with what they look at."""
    place.audit()
    assert Auditor(place.site, place.pacs).audit(finished=True) == []


def test_only_the_wanted_series_are_asked_for_and_the_manifest_says_which_they_are(
    tmp_path, standing, method
):
    with site(tmp_path, method, standing=standing) as place:
        rows = "PatientID\nP1\nP2\n"
        assert pull(place, rows=rows) == [
            ("archived", "all-archived"),
            ("excluded", "excluded-by-filter"),
        ]
        assert set(sent(place)) == set(uids([*AXIAL, *PLAIN]))
        assert objects_in_the_archive(place) == uids([*AXIAL, *PLAIN])
        manifest = place.manifest(study_uid(1))
        assert manifest.selection == IN_WORDS
        assert manifest.unwanted_series == (series_uid(1, 2), series_uid(1, 3))
        # A study of which everything was wanted was archived under the selection too.
        assert place.manifest(study_uid(2)).selection == IN_WORDS
        assert place.manifest(study_uid(2)).unwanted_series == ()
        assert {study.selection for study in place.studies().values()} == {IN_WORDS}
        totals = place.totals()
        assert (totals.expected, totals.stored) == (5, 5)
        whole(place)
        asked = place.asked_for()
        assert pull(place, rows=rows)[0] == ("archived", "all-archived")
        assert place.asked_for() == asked


def test_only_the_manifest_of_a_part_is_of_a_version_that_older_software_refuses(tmp_path):
    with site(tmp_path) as place:
        pull(place)
        body = json.loads(place.archived()[manifest_key(study_uid(1))])
        assert body["version"] == 2
        assert (body["selection"], len(body["unwanted_series"])) == (IN_WORDS, 2)
        pull(place, WHOLE, "PatientID\nP2\n")
        body = json.loads(place.archived()[manifest_key(study_uid(3))])
        assert body["version"] == 1
        assert not body.keys() & {"selection", "unwanted_series"}
        assert place.archived()[manifest_key(study_uid(3))] == encode_manifest(
            place.manifest(study_uid(3))
        )


def test_other_series_that_arrive_are_kept_apart_as_not_requested(tmp_path, standing, method):
    script = [Behaviour("store.unsolicited", extra=[*SCOUT, *REPORT], times=1)]
    with site(tmp_path, method, script, standing) as place:
        assert pull(place) == [("archived", "all-archived")]
        assert objects_in_the_archive(place) == uids([*AXIAL, *PLAIN])
        notes = [json.loads(note.read_text())["reason"] for note in place.quarantined()]
        assert notes == ["not-requested", "not-requested"]
        whole(place)


def test_a_pacs_that_sends_whole_studies_only_has_its_unwanted_series_kept_apart(tmp_path):
    # Asked for the instances of what is missing, it sends all of the study.
    script = [
        Behaviour("move.drop_instances", instances=uids(AXIAL)[:1], times=1),
        Behaviour("move.no_image_level", status=None),
    ]
    with site(tmp_path, script=script) as place:
        assert pull(place) == [("archived", "all-archived")]
        assert objects_in_the_archive(place) == uids([*AXIAL, *PLAIN])
        notes = [json.loads(note.read_text())["reason"] for note in place.quarantined()]
        assert set(notes) == {"not-requested"}
        whole(place)


def test_a_wanted_series_that_comes_to_the_study_meanwhile_is_fetched_and_an_unwanted_is_not(
    tmp_path, standing, method
):
    more = series(1, 4, 2, Modality="CT", SeriesDescription="Coronal")
    other = series(1, 5, 1, Modality="CT", SeriesDescription="Scout 2")

    def grow(pacs) -> None:
        for stored in (*more, *other):
            pacs.holdings.add(stored)

    script = [Behaviour("pacs.mutate", level="IMAGE", change=grow, times=1)]
    with site(tmp_path, method, script, standing) as place:
        assert pull(place) == [("archived", "all-archived")]
        assert objects_in_the_archive(place) == uids([*AXIAL, *PLAIN, *more])
        assert place.manifest(study_uid(1)).unwanted_series == tuple(
            series_uid(1, number) for number in (2, 3, 5)
        )
        whole(place)


def test_completeness_is_judged_by_the_wanted_series(tmp_path):
    script = [Behaviour("move.drop_instances", instances=uids(AXIAL)[:1])]
    with site(tmp_path, script=script) as place:
        assert pull(place) == [("partial", "some-archived")]
        record = place.studies()[study_uid(1)]
        assert (str(record.state), record.reason) == ("failed", "instances-missing")
        assert (record.expected, record.stored) == (3, 2)
        place.pacs.script.clear()
        place.rerun()
        assert str(place.studies()[study_uid(1)].state) == "archived"
        assert sent(place).keys() == set(uids([*AXIAL, *PLAIN]))
        whole(place)


LONG = "list: list.csv\nseries: {NumberOfSeriesRelatedInstances: {more_than: 2}}\n"


def test_what_a_pacs_does_not_tell_of_a_series_is_decided_by_nobody(tmp_path):
    script = [Behaviour("find.omit_keys", keys=["SeriesDescription"])]
    with site(tmp_path, script=script) as place:
        assert pull(place) == [("ambiguous", "filter-undecided")]
        assert place.asked_for("C-GET") == 0
        with place.ledger() as ledger:
            near = ledger.rows.near_misses(1, 2)
        assert {study.study_instance_uid for study in near} == {study_uid(1), study_uid(2)}
        # A person has looked at them, and wants one.
        rows = f"StudyInstanceUID\n{study_uid(1)}\n"
        text = "list: list.csv\nseries: {Modality: CT}\n"
        assert pull(place, text, rows) == [("archived", "all-archived")]
        assert objects_in_the_archive(place) == uids([*AXIAL, *SCOUT])


def test_series_that_turn_out_undecided_when_a_study_is_listed_are_not_guessed(tmp_path):
    # Told when the studies were found, and no more when they are listed.
    mute = Behaviour("find.omit_keys", keys=["SeriesDescription"])
    script = [
        Behaviour(
            "pacs.mutate", level="IMAGE", change=lambda pacs: pacs.script.append(mute), times=1
        )
    ]
    with site(tmp_path, script=script) as place:
        assert pull(place) == [("failed", "filter-undecided")]
        assert place.asked_for("C-GET") == 0
        place.pacs.script.clear()
        place.rerun()
        assert objects_in_the_archive(place) == uids([*AXIAL, *PLAIN])
        whole(place)


@pytest.mark.parametrize("status", [0x0000, 0xA900])
def test_one_key_that_spoils_the_query_hides_no_other(tmp_path, status):
    spoilt = [
        Behaviour("find.unsupported_key", keys=["ProtocolName"], returned=True, status=status)
    ]
    text = "list: list.csv\nseries: {Modality: CT, ProtocolName: {not: x}}\n"
    with site(tmp_path, script=spoilt) as place:
        assert pull(place, text) == [("ambiguous", "filter-undecided")]
        asked = [r for r in place.pacs.requests("C-FIND") if "ProtocolName" in r.keys]
        assert asked
        # Of a study without a series of the modality that is nothing to wonder about.
        assert pull(place, text, "PatientID\nP2\n") == [("excluded", "excluded-by-filter")]


@pytest.mark.parametrize("omitted", [[], ["NumberOfSeriesRelatedInstances"]])
def test_series_are_selected_by_their_length_whether_the_pacs_counts_or_only_lists(
    tmp_path, omitted
):
    script = [Behaviour("find.omit_keys", keys=omitted)]
    with site(tmp_path, script=script) as place:
        assert pull(place, LONG) == [("archived", "all-archived")]
        assert objects_in_the_archive(place) == uids(AXIAL)
        whole(place)


@pytest.mark.parametrize(("first", "second"), [(CT, WHOLE), (WHOLE, CT), (CT, CT + "#\n")])
def test_a_study_is_archived_under_one_selection(tmp_path, first, second):
    with site(tmp_path) as place:
        assert pull(place, first) == [("archived", "all-archived")]
        before, asked = place.archived(), place.asked_for("C-GET")
        same = second.startswith(first) and first == CT
        expected = ("archived", "all-archived") if same else ("failed", "selected-otherwise")
        assert pull(place, second) == [expected]
        assert place.archived() == before
        assert place.asked_for("C-GET") == asked
        with place.ledger() as ledger:
            totals = [ledger.progress.totals(number) for number in (1, 2)]
            assert list(ledger.manifests.of_cohort(2)) == (
                list(ledger.manifests.of_cohort(1)) if same else []
            )
        assert totals[0].studies == {"archived": 2}
        assert totals[1].studies == ({"archived": 2} if same else {"failed": 2})
        assert totals[1].stored == (totals[0].stored if same else 0)
        whole(place)


def test_a_study_that_was_found_only_may_still_be_selected_by_another_cohort(tmp_path):
    script = [Behaviour("get.disabled", status=0xC000)]
    with site(tmp_path, script=script) as place:
        (place.folder / "list.csv").write_text("PatientID\nP1\n")
        (place.folder / "first.yaml").write_text(WHOLE)
        with place.opened(place.folder / "first.yaml") as run:
            for first, last in run.discovery.pages():
                run.discovery.discover(first, last)
        place.pacs.script.clear()
        assert pull(place) == [("archived", "all-archived")]
        with place.ledger() as ledger:
            (other,) = ledger.rows.verdicts(1)
        assert (str(other.verdict), other.reason) == ("failed", "selected-otherwise")
        whole(place)


def test_a_rebuilt_ledger_knows_the_selection(tmp_path):
    with site(tmp_path) as place:
        pull(place)
        before = place.archived()
        place.lose_ledger()
        assert {study.outcome for study in rebuild_ledger(place.site)} == {RebuildOutcome.ADDED}
        asked = place.asked_for("C-GET")
        assert pull(place) == [("archived", "all-archived")]
        whole(place)
        assert pull(place, WHOLE) == [("failed", "selected-otherwise")]
        assert (place.archived(), place.asked_for("C-GET")) == (before, asked)


def test_an_archive_without_its_ledger_is_not_pulled_into_under_another_selection(tmp_path):
    with site(tmp_path) as place:
        pull(place)
        before, asked = place.archived(), place.asked_for("C-GET")
        place.lose_ledger()
        assert pull(place, WHOLE) == [("failed", "selected-otherwise")]
        assert (place.archived(), place.asked_for("C-GET")) == (before, asked)
        # The ledger now has it as listed otherwise; what the archive proves counts more.
        assert {study.outcome for study in rebuild_ledger(place.site)} == {RebuildOutcome.COMPLETED}
        assert pull(place) == [("archived", "all-archived")]
        assert (place.archived(), place.asked_for("C-GET")) == (before, asked)
        whole(place)


def test_the_auditor_finds_a_manifest_that_is_silent_about_what_it_leaves_out(tmp_path):
    with site(tmp_path) as place:
        pull(place)
        auditor = Auditor(place.site, place.pacs)
        assert auditor.audit(finished=True) == []
        path = place.folder / "archive" / manifest_key(study_uid(1))
        body = json.loads(path.read_text())

        def violations(**changes) -> set[str]:
            path.chmod(0o600)
            path.write_text(json.dumps(body | changes))
            return {each.what for each in auditor.audit() if each.invariant in ("I1", "I2")}

        assert "a manifest is not the PACS's inventory" in violations(unwanted_series=[])
        assert "a manifest leaves series out and does not say which" in violations(selection="")
        assert "the ledger's selection is not the manifest's" in violations(selection="other")
        assert "a manifest leaves out a series that is not there" in violations(
            unwanted_series=[*body["unwanted_series"], "2.25.9"]
        )


def test_where_only_series_are_listed_the_wanted_ones_are_judged_by_their_counts(tmp_path):
    with site(tmp_path, script=[Behaviour("find.no_image_level")]) as place:
        assert pull(place) == [("archived", "all-archived")]
        assert objects_in_the_archive(place) == uids([*AXIAL, *PLAIN])
        manifest = place.manifest(study_uid(1))
        assert (manifest.evidence, manifest.selection) == (Evidence.SERIES_COUNTS, IN_WORDS)
        assert manifest.unwanted_series == (series_uid(1, 2), series_uid(1, 3))
        whole(place)


# --- a run that dies


# What a C-GET of sound objects does not meet.
NOT_MET = {
    "expectation-noted",
    "list-extended",
    "receiver-started",
    "rejection-recorded",
    "set-aside",
}


@pytest.mark.campaign("crash: kill")
@pytest.mark.parametrize("point", subset(sorted(POINTS.keys() - NOT_MET), ["manifest-put"]))
def test_a_run_that_was_killed_anywhere_goes_on_with_its_selection(tmp_path, point):
    folder = tmp_path / "site"
    folder.mkdir()
    script = [Behaviour("store.unsolicited", extra=REPORT)]
    with site(folder, script=script) as place:
        (folder / "list.csv").write_text("PatientID\nP1\nP2\n")
        cohort = folder / "cohort.yaml"
        cohort.write_text(CT + "most_per_patient: {studies: 2}\n")
        auditor = Auditor(place.site, place.pacs, watch=folder)
        run = crashes.start(place.file, cohort, tmp_path / "log", f"{point}:1:kill")
        assert crashes.ended([run]) == [crashes.KILLED]
        assert auditor.audit() == []
        crashes.bring_to_its_end(place.file, cohort)
        assert auditor.audit(finished=True) == []
        assert objects_in_the_archive(place) == uids([*AXIAL, *PLAIN])
        assert place.manifest(study_uid(1)).selection == IN_WORDS
        again = auditor.audit_rerun(lambda: crashes.bring_to_its_end(place.file, cohort))
        assert again == []


# --- a PACS of the field


def part10(stored: StoredInstance, path: Path) -> Path:
    dataset = decoded(stored.encoded(), stored.transfer_syntax_uid)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = stored.transfer_syntax_uid
    dataset.file_meta.MediaStorageSOPClassUID = stored.sop_class_uid
    dataset.file_meta.MediaStorageSOPInstanceUID = stored.sop_instance_uid
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_orthanc_is_asked_for_the_wanted_series_only(tmp_path, new_archive):
    orthanc = new_archive(peers.Orthanc)
    held = [*AXIAL, *SCOUT, *REPORT, *MR]
    orthanc.load(part10(stored, tmp_path / f"{n}.dcm") for n, stored in enumerate(held))
    (tmp_path / "archive").mkdir()
    node = {
        "host": "127.0.0.1",
        "port": orthanc.port,
        "called_ae_title": orthanc.ae_title,
        "calling_ae_title": peers.US,
        "retrieve": "c-get",
    }
    settings = {
        "nodes": {"pacs": node},
        "archive": {"directory": "archive"},
        "spool": {"path": "spool", "reserve_bytes": 0},
    }
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "list.csv").write_text("PatientID\nP1\nP2\n")
    definition = tmp_path / "cohort.yaml"
    definition.write_text(
        """
        list: list.csv
        studies: {PatientSex: O, PatientAge: 18-, Modality: CT}
        series: {Modality: CT, NumberOfSeriesRelatedInstances: {more_than: 2}}
        """
    )
    place = Place(tmp_path, tmp_path / "site.yaml", None)
    place.pull(definition)
    assert [(str(v.verdict), v.reason) for v in place.verdicts()] == [
        ("archived", "all-archived"),
        ("excluded", "excluded-by-filter"),
    ]
    assert objects_in_the_archive(place) == uids(AXIAL)
    assert sorted(orthanc.sent()) == uids(AXIAL)
    manifest = place.manifest(study_uid(1))
    assert manifest.unwanted_series == (series_uid(1, 2), series_uid(1, 3))
    assert Auditor(place.site).audit(finished=True) == []


def test_without_a_list_of_instances_the_wanted_series_are_judged_by_their_counts(tmp_path):
    with site(tmp_path, script=[Behaviour("find.no_image_level")]) as place:
        assert pull(place) == [("archived", "all-archived")]
        assert sent(place) == Counter(uids([*AXIAL, *PLAIN]))
        manifest = place.manifest(study_uid(1))
        assert (manifest.evidence, manifest.selection) == ("series-counts", IN_WORDS)
        assert manifest.unwanted_series == (series_uid(1, 2), series_uid(1, 3))
        whole(place)


def test_without_counts_a_part_of_a_study_cannot_be_judged(tmp_path):
    script = [Behaviour("find.no_image_level"), Behaviour("find.counts", how="none")]
    with site(tmp_path, script=script) as place:
        place.change(validation={"evidence": "suboperation-counts"})
        pull(place)
        assert place.reasons() == [("failed", "evidence-too-weak"), ("archived", None)]
        assert objects_in_the_archive(place) == uids(PLAIN)
