"""A study of which some instances never come can be accepted, and is never called whole."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest

from prefect_dicom.archive.manifest import decode_manifest, encode_manifest, manifest_at
from prefect_dicom.archive.verification import verify_cohort
from prefect_dicom.core.errors import ArchiveError, ConfigurationError
from prefect_dicom.core.model import (
    Evidence,
    Level,
    ManifestInstance,
    StudyManifest,
    StudyState,
    Verdict,
    WithheldInstance,
)
from prefect_dicom.core.uids import manifest_key, object_key, study_prefix
from prefect_dicom.operations.rebuild import rebuild_ledger
from prefect_dicom.report import RESULTS, format_totals, write_reports
from prefect_dicom.report.acceptances import open_questions
from prefect_dicom.report.estimate import estimate_pull
from prefect_dicom.report.frames import rows_frame
from prefect_dicom.report.page import write_page
from prefect_dicom.testing import Behaviour
from prefect_dicom.testing.audit import Auditor
from prefect_dicom.testing.instances import changed
from tests.support.commands import CommandLine
from tests.support.decisions import decide, go_on
from tests.support.sites import Place, site_around, study

METHODS = ("c-move", "c-get")
ROW = [{"AccessionNumber": "A1"}]
INCOMPLETE = ("incomplete", "missing-accepted")


def of_thirteen() -> list:
    return study(1, instances=13, AccessionNumber="A1", PatientID="P1")


@pytest.fixture
def around(tmp_path):
    objects = of_thirteen()
    never = Behaviour("move.drop_instances", instances=[o.sop_instance_uid for o in objects[:2]])
    return partial(site_around, tmp_path, objects, script=[never])


def outcome(place: Place) -> list[tuple[str, str]]:
    return [(str(v.verdict), v.reason) for v in place.verdicts()]


def accepted(place: Place) -> None:
    """Pull the study without two of its instances, and accept that."""
    place.pull(place.cohort(ROW))
    assert outcome(place) == [("partial", "instances-missing")]
    decide(place, studies=[record.reference for record in place.studies().values()])
    go_on(place)


@pytest.mark.parametrize("retrieve", METHODS)
def test_a_study_is_accepted_without_what_never_comes_and_its_manifest_names_it(around, retrieve):
    with around(retrieve=retrieve) as place:
        place.pull(place.cohort(ROW))
        with place.ledger() as ledger:
            (question,) = open_questions(ledger, ledger.cohorts.get("1"))
        assert (question.what, question.lines) == ("2 of 13 instances never came", (2,))
        requests = place.asked_for("C-MOVE", "C-GET")
        (decision,) = decide(place, reasons=["instances-missing"])
        assert len(decision.missing) == 2
        go_on(place)
        # It is not tried again: the one who decided knows.
        assert place.asked_for("C-MOVE", "C-GET") == requests
        assert outcome(place) == [INCOMPLETE]
        objects = of_thirteen()
        manifest = place.manifest(objects[0].study_instance_uid)
        assert {each.sop_instance_uid for each in manifest.missing} == {
            stored.sop_instance_uid for stored in objects[:2]
        }
        assert {each.reason for each in manifest.missing} == {"instances-missing"}
        assert (manifest.accepted_by, len(manifest.instances)) == ("J. Doe", 11)
        assert manifest.accepted_at.endswith("+00:00")
        body = json.loads(place.archived()[manifest_key(manifest.study_instance_uid)])
        assert body["version"] == 3
        place.audit()
        assert Auditor(place.site, place.pacs).audit(finished=True) == []


def test_tables_report_and_figures_count_what_is_missing(around):
    with around() as place:
        accepted(place)
        (verdict,) = place.verdicts()
        assert verdict.verdict is Verdict.INCOMPLETE and verdict.missing_instances == 2
        assert (verdict.expected_instances, verdict.archived_instances) == (13, 11)
        totals = place.totals()
        assert (totals.expected, totals.stored, totals.missing) == (13, 11, 2)
        assert dict(totals.rows) == {Verdict.INCOMPLETE: 1}
        assert "1 incomplete" in format_totals(totals)
        assert "2 accepted as missing" in format_totals(totals)
        with place.ledger() as ledger:
            known = ledger.cohorts.get("1")
            folder = write_reports(ledger, known, place.folder / "reports")
            page = write_page(ledger, known, place.folder / "reports").read_text()
            assert list(rows_frame(ledger, known)["missing_instances"]) == [2]
        assert "incomplete,missing-accepted" in (folder / RESULTS).read_text()
        assert "without 2 instances, by J. Doe" in page and "a tape" not in page


def test_the_commands_know_such_studies_and_never_call_them_whole(around):
    with around() as place:
        place.pull(place.cohort(ROW))
        command = CommandLine(place.folder, place.folder / "home")
        listed = command("accept", "1")
        assert "2 of 13 instances never came (instances-missing)" in listed.output
        assert "1 study waits for a decision" in command("status", "1").output
        refused = command("accept", "1", "--study", "99")
        assert refused.code == 3 and "does not wait for a decision" in refused.stderr
        assert command("accept", "1", "--reason", "no-match").code == 3
        done = command("accept", "1", "--study", "1", "--by", "J. Doe", "--note", "Alpha^Anna")
        assert done.code == 0 and "study 1 without 2 instances, by J. Doe" in done.output
        assert "Alpha" not in done.output + command("status", "1").output
        go_on(place)
        ended = command("status", "1")
        assert ended.code == 0 and "missing-accepted" in ended.output
        assert "study 1 without 2 instances, by J. Doe" in ended.output
        verified = command("verify", "1")
        assert (
            "1 study not whole" in verified.output and "2 instances as missing" in verified.output
        )
        assert command("verify", "1", "--json").result["missing_instances"] == 2
        again = command("accept", "1", "--json").result
        assert again["waiting"] == [] and again["accepted"][0]["accepted_by"] == "J. Doe"


def test_a_lost_ledger_is_rebuilt_with_what_is_missing(around):
    with around() as place:
        accepted(place)
        place.lose_ledger()
        (rebuilt,) = rebuild_ledger(place.site, Level.CHECKSUM)
        assert (rebuilt.instances, rebuilt.missing, rebuilt.faults.total()) == (11, 2, 0)
        (verified,) = verify_cohort(place.site, None, Level.READ)
        assert (verified.missing, verified.faults.total()) == (2, 0)
        requests = place.asked_for("C-MOVE", "C-GET")
        place.pull(place.cohort(ROW))
        assert outcome(place) == [INCOMPLETE]
        assert place.asked_for("C-MOVE", "C-GET") == requests


def test_a_pull_with_a_new_ledger_finds_the_manifest_and_says_what_is_missing(around):
    with around() as place:
        accepted(place)
        place.lose_ledger()
        requests = place.asked_for("C-MOVE", "C-GET")
        place.pull(place.cohort(ROW))
        assert outcome(place) == [INCOMPLETE]
        assert place.asked_for("C-MOVE", "C-GET") == requests


def test_what_comes_after_all_before_the_next_run_is_not_thrown_away(around):
    with around() as place:
        place.pull(place.cohort(ROW))
        decide(place, reasons=["instances-missing"])
        # The PACS lists one of the two no more: the manifest names the other one alone.
        place.pacs.holdings.remove(of_thirteen()[0].sop_instance_uid)
        go_on(place)
        manifest = place.manifest(of_thirteen()[0].study_instance_uid)
        assert len(manifest.missing) == 1
        assert outcome(place) == [INCOMPLETE]


def test_what_else_is_missing_is_not_accepted(around):
    with around() as place:
        place.pull(place.cohort(ROW))
        decide(place, reasons=["instances-missing"])
        grown = study(7, instances=1, AccessionNumber="A1", PatientID="P1")[0]
        series = of_thirteen()[0].series_instance_uid
        new = changed(
            grown,
            StudyInstanceUID=of_thirteen()[0].study_instance_uid,
            SeriesInstanceUID=series,
        )
        place.pacs.holdings.add(new)
        place.pacs.script[:] = [Behaviour("move.drop_instances", instances=[new.sop_instance_uid])]
        go_on(place)
        assert outcome(place) == [("partial", "instances-missing")]


def test_nothing_is_accepted_of_a_study_of_which_nothing_has_come(tmp_path):
    objects = of_thirteen()
    never = Behaviour("move.drop_instances", instances=13)
    with site_around(tmp_path, objects, script=[never], retrieve="c-get") as place:
        place.pull(place.cohort(ROW))
        with place.ledger() as ledger:
            assert open_questions(ledger, ledger.cohorts.get("1")) == []
        with pytest.raises(ConfigurationError):
            decide(place, studies=[1])
        assert place.studies()[objects[0].study_instance_uid].state is StudyState.FAILED


UID = "1.2.3"
STORED = ManifestInstance(
    "1.2.3.1", "1.2.3.1.1", "1.2", "1.2", object_key(UID, "1.2.3.1", "1.2.3.1.1"), 4, "a" * 64
)
GONE = WithheldInstance("1.2.3.1", "1.2.3.1.2", "instances-missing")
MANIFEST = StudyManifest(
    UID,
    "main",
    Evidence.INSTANCE_LIST,
    "2026-01-01T00:00:00+00:00",
    (STORED,),
    missing=(GONE,),
    accepted_by="J. Doe",
    accepted_at="2026-01-02T00:00:00+00:00",
)


@pytest.mark.parametrize("selection", ["", "Modality CT"])
def test_such_a_manifest_comes_back_as_it_was_written(selection):
    manifest = replace(MANIFEST, selection=selection, unwanted_series=("1.9",) if selection else ())
    data = encode_manifest(manifest)
    assert decode_manifest(data) == manifest
    assert manifest_at(study_prefix(UID), data) == manifest


@pytest.mark.parametrize("change", [{"missing": []}, {"accepted_by": ""}, {"version": 1}])
def test_a_manifest_with_gaps_says_which_and_who_accepted_them(change):
    body = json.loads(encode_manifest(MANIFEST)) | change
    data = json.dumps(body).encode()
    with pytest.raises(ArchiveError):
        decode_manifest(data)


def test_a_cohort_of_accepted_studies_is_done_and_lacks_nothing_that_a_dry_run_would_find(around):
    with around(retrieve="c-get") as place:
        accepted(place)
        with place.ledger() as ledger:
            cohort = ledger.cohorts.get("1")
            assert estimate_pull(ledger, cohort, place.site).unfound_rows == 0
            page = write_page(ledger, cohort, place.folder / "reports").read_text()
        assert "nothing to archive" not in page and ">done<" in page


def test_accepting_a_reason_that_no_study_waits_for_is_not_success(around):
    with around(retrieve="c-get") as place:
        place.pull(place.cohort(ROW))
        command = CommandLine(place.folder, place.folder / "home")
        for options in ([], ["--json"]):
            assert command("accept", "1", "--reason", "request-refused", *options).code == 2


def test_a_paused_cohort_is_resumed_after_an_acceptance(around):
    with around(retrieve="c-get") as place:
        place.pull(place.cohort(ROW))
        command = CommandLine(place.folder, place.folder / "home")
        assert command("pause", "1").code == 0
        assert "prefect-dicom resume" in command("accept", "1", "--study", "1").output
