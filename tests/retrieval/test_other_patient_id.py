"""All objects of a study name the same other PatientID: kept apart, and for people to accept.

Every case runs over real sockets, by C-MOVE and by C-GET, and counts how often the PACS sends what.
"""

from __future__ import annotations

import csv
import json
import stat
from collections import Counter
from functools import partial

import pytest

from prefect_dicom.core.reasons import REASONS
from prefect_dicom.core.uids import manifest_key, object_key
from prefect_dicom.report import write_reports
from prefect_dicom.report.acceptances import open_questions
from prefect_dicom.testing import Behaviour
from tests.support.commands import CommandLine
from tests.support.decisions import decide, go_on
from tests.support.sites import Place, site_around, standing_receiver, study

METHODS = ("c-move", "c-get")
WAITING = ("failed", "patient-id-differs")
ARCHIVED = ("archived", "all-archived")


@pytest.fixture(scope="module")
def standing(tmp_path_factory):
    with standing_receiver(tmp_path_factory.mktemp("receiver")) as receiver:
        yield receiver


@pytest.fixture
def around(tmp_path, standing):
    return partial(site_around, tmp_path, standing=standing)


def of_before(listed: str, named: str, instances: int = 3, seed: int = 1, which: int | None = None):
    """A study listed under one PatientID, of which objects name another; and the knob for it."""
    objects = study(seed, instances=instances, PatientID=listed, AccessionNumber=f"A{seed}")
    script = Behaviour(
        "store.other_patient",
        patient_id=named,
        instances=instances if which is None else which,
        study=objects[0].study_instance_uid,
    )
    return objects, script


def outcome(place: Place) -> list[tuple[str, str]]:
    return [(str(v.verdict), v.reason) for v in place.verdicts()]


def times_sent(place: Place) -> int:
    """How often the most requested object was sent."""
    return max(Counter(place.pacs.sent_instances()).values(), default=0)


def notes(place: Place) -> list[str]:
    return [json.loads(path.read_text())["reason"] for path in place.quarantined()]


def all_is_archived_as_it_came(place: Place) -> None:
    for record in place.studies().values():
        manifest = place.manifest(record.study.study_instance_uid)
        assert {each.warnings for each in manifest.instances} == {("patient-id-accepted",)}
        for each in manifest.instances:
            assert place.archived()[each.key]
    assert place.spooled() == [] and place.quarantined() == []


@pytest.mark.parametrize("retrieve", METHODS)
@pytest.mark.parametrize(
    ("listed", "named", "words"),
    [
        ("NEW-1", "OLD-77", "is another number"),
        ("1", "0001", "differs in leading zeros"),
        ("P1", "P1^^^NORTH", "has text behind it"),
        ("JMS14673792", "14673792", "lacks text before it"),
        ("ab 1", "AB1", "differs in blanks and case"),
    ],
)
def test_the_same_other_number_has_a_reason_of_its_own_and_says_how_it_differs(
    around, listed, named, words, retrieve
):
    objects, script = of_before(listed, named)
    with around(objects, script=[script], retrieve=retrieve) as place:
        place.pull(place.cohort([{"AccessionNumber": "A1"}]))
        assert outcome(place) == [WAITING]
        assert place.archived() == {}
        assert notes(place) == ["patient-id-differs"] * 3
        assert times_sent(place) == 1
        with place.ledger() as ledger:
            (question,) = open_questions(ledger, ledger.cohorts.get("1"))
            (record,) = ledger.studies.of_cohort(1)
        assert question.what == f"all its instances name the same other PatientID, which {words}"
        assert record.detail == f"all 3 name the same other PatientID, which {words}"
        assert listed not in record.detail and named not in record.detail
        # A rerun asks for nothing: the same would come.
        asked = place.asked_for()
        place.rerun()
        assert place.asked_for() == asked
        place.audit()


@pytest.mark.parametrize("retrieve", METHODS)
def test_a_person_accepts_a_study_and_no_object_is_asked_for_again(around, retrieve):
    objects, script = of_before("NEW-1", "OLD-77")
    others, other_script = of_before("NEW-2", "OLD-78", seed=2)
    with around([*objects, *others], script=[script, other_script], retrieve=retrieve) as place:
        place.pull(place.cohort([{"AccessionNumber": "A1"}, {"AccessionNumber": "A2"}]))
        references = {r.study.patient_id: r.reference for r in place.studies().values()}
        (accepted,) = decide(place, studies=[references["NEW-1"]])
        assert (accepted.accepted_by, accepted.patient_id) == ("J. Doe", "OLD-77")
        sent = len(place.pacs.sent_instances())
        go_on(place)
        assert outcome(place) == [ARCHIVED, WAITING]
        assert len(place.pacs.sent_instances()) == sent
        uid = objects[0].study_instance_uid
        warnings = [each.warnings for each in place.manifest(uid).instances]
        assert warnings == [("patient-id-accepted",)] * 3
        for stored in objects:
            key = object_key(uid, stored.series_instance_uid, stored.sop_instance_uid)
            assert key in place.archived()
        place.audit()


@pytest.mark.parametrize("retrieve", METHODS)
def test_a_person_accepts_it_for_the_cohort_and_for_later_studies_of_it(around, retrieve):
    objects, script = of_before("NEW-1", "OLD-77")
    later, later_script = of_before("NEW-2", "OLD-78", seed=2)
    with around(objects, script=[script, later_script], retrieve=retrieve) as place:
        place.pull(place.cohort([{"AccessionNumber": "A1"}, {"AccessionNumber": "A2"}]))
        assert outcome(place) == [WAITING, ("not-found", "no-match")]
        decide(place, reasons=["patient-id-differs"])
        for stored in later:
            place.pacs.holdings.add(stored)
        with place.ledger() as ledger:
            ledger.cohorts.reopen(1, reasons=["no-match"])
        go_on(place)
        assert outcome(place) == [ARCHIVED, ARCHIVED]
        assert times_sent(place) == 1
        all_is_archived_as_it_came(place)
        place.audit()


@pytest.mark.parametrize("retrieve", METHODS)
@pytest.mark.parametrize(
    "row",
    [
        {"PatientID": "NEW-1", "OtherPatientID": "OLD-77"},
        {"AccessionNumber": "A1", "OtherPatientID": "OLD-77"},
        {"PatientID": "OLD-77", "OtherPatientID": "NEW-1"},
    ],
)
def test_a_column_of_the_cohort_file_accepts_it(around, row, retrieve):
    objects, script = of_before("NEW-1", "OLD-77")
    with around(objects, script=[script], retrieve=retrieve) as place:
        place.pull(place.cohort([row]))
        assert outcome(place) == [ARCHIVED]
        assert times_sent(place) == 1
        all_is_archived_as_it_came(place)


@pytest.mark.parametrize("retrieve", METHODS)
@pytest.mark.parametrize(("instances", "which"), [(3, 1), (3, 2), (40, 1)])
def test_some_that_name_another_patient_are_a_strangers(around, instances, which, retrieve):
    objects, script = of_before("NEW-1", "OLD-77", instances, which=which)
    with around(objects, script=[script], retrieve=retrieve) as place:
        place.pull(place.cohort([{"AccessionNumber": "A1"}]))
        assert outcome(place) == [("partial", "wrong-patient")]
        assert notes(place) == ["wrong-patient"] * which
        assert manifest_key(objects[0].study_instance_uid) not in place.archived()
        assert times_sent(place) <= 2
        # Once more where a person wants it tried again, and not twice: the same bytes come.
        before = Counter(place.pacs.sent_instances())
        place.rerun()
        assert {*(Counter(place.pacs.sent_instances()) - before).values()} == {1}
        with place.ledger() as ledger:
            assert not [
                q
                for q in open_questions(ledger, ledger.cohorts.get("1"))
                if q.reason == "patient-id-differs"
            ]


@pytest.mark.parametrize("retrieve", METHODS)
def test_two_other_numbers_are_nobodys_to_accept(around, retrieve):
    objects, script = of_before("NEW-1", "OLD-77", instances=4)
    last = [objects[-1].sop_instance_uid]
    third = Behaviour("store.other_patient", patient_id="THIRD", instances=last)
    with around(objects, script=[script, third], retrieve=retrieve) as place:
        place.pull(place.cohort([{"AccessionNumber": "A1"}]))
        assert outcome(place) == [("failed", "wrong-patient")]
        assert times_sent(place) <= 2
        assert place.archived() == {}


@pytest.mark.parametrize("retrieve", METHODS)
def test_acceptance_is_of_the_number_that_was_seen(around, retrieve):
    objects, script = of_before("NEW-1", "OLD-77")
    with around(objects, script=[script], retrieve=retrieve) as place:
        place.pull(place.cohort([{"AccessionNumber": "A1"}]))
        (reference,) = (record.reference for record in place.studies().values())
        decide(place, studies=[reference])
        for path in place.spooled():
            path.unlink()
        place.pacs.script[:] = [of_before("NEW-1", "OLD-99")[1]]
        go_on(place)
        assert outcome(place) == [WAITING]
        assert place.archived() == {}


@pytest.mark.parametrize("retrieve", METHODS)
@pytest.mark.parametrize("how", ["series", "none"])
def test_a_pacs_that_lists_no_instances_is_asked_no_more_often(around, retrieve, how):
    objects, script = of_before("NEW-1", "OLD-77")
    knobs = [script, Behaviour("find.no_image_level")]
    if how == "none":
        knobs.append(Behaviour("find.counts", how="none"))
    with around(objects, script=knobs, retrieve=retrieve) as place:
        place.change(validation={"evidence": "suboperation-counts"})
        place.pull(place.cohort([{"AccessionNumber": "A1"}]))
        assert outcome(place) == [WAITING]
        assert times_sent(place) == 1
        (reference,) = (record.reference for record in place.studies().values())
        decide(place, studies=[reference])
        go_on(place)
        assert outcome(place) == [ARCHIVED]
        assert times_sent(place) <= 2
        all_is_archived_as_it_came(place)


def test_what_identifies_patients_is_in_the_table_alone_and_nobody_else_may_read_it(around):
    objects, script = of_before("NEW-1", "OLD-77")
    with around(objects, script=[script]) as place:
        place.pull(place.cohort([{"AccessionNumber": "A1"}]))
        (reference,) = (record.reference for record in place.studies().values())
        for decision in ("waiting", "accepted"):
            with place.ledger() as ledger:
                folder = write_reports(ledger, ledger.cohorts.get("1"), place.folder / "reports")
            table = folder / "accept.csv"
            assert stat.S_IMODE(table.stat().st_mode) == 0o600
            with table.open(newline="", encoding="utf-8-sig") as file:
                (line,) = csv.DictReader(file)
            assert (line["Decision"], line["Study"]) == (decision, str(reference))
            assert (line["PatientID"], line["PatientIDOfInstances"]) == ("'NEW-1", "'OLD-77")
            decide(place, note="merged", studies=[reference] if decision == "waiting" else [])
        assert (line["AcceptedBy"], line["Note"]) == ("J. Doe", "merged")
        assert line["AcceptedAt"]


def test_objects_without_a_patient_id_are_no_evidence_for_either_number(around):
    objects, _ = of_before("NEW-1", "OLD-77")
    others = [o.sop_instance_uid for o in objects[:2]]
    script = [
        Behaviour("store.other_patient", patient_id="OLD-77", instances=others),
        Behaviour(
            "store.coerce", elements={"PatientID": None}, instances=[objects[2].sop_instance_uid]
        ),
    ]
    with around(objects, script=script) as place:
        place.pull(place.cohort([{"AccessionNumber": "A1"}]))
        assert outcome(place)[0][1] == "patient-id-differs"
        decide(place, reasons=["patient-id-differs"])
        go_on(place)
        assert outcome(place) == [ARCHIVED]


def test_the_words_of_the_reason_name_the_command():
    assert "prefect-dicom accept" in REASONS["patient-id-differs"].advice


def decisions_table(place: Place) -> str:
    (table,) = place.site.reports.glob("*/accept.csv")
    return table.read_text()


def test_a_decision_can_be_taken_back_until_something_is_archived_by_it(around):
    objects, script = of_before("NEW-1", "OLD-77")
    with around(objects, script=[script], retrieve="c-get") as place:
        place.pull(place.cohort([{"AccessionNumber": "A1"}]))
        decide(place, reasons=["patient-id-differs"])
        command = CommandLine(place.folder, place.folder / "home")
        taken_back = command("accept", "1", "--reason", "patient-id-differs", "--withdraw")
        assert taken_back.code == 0 and taken_back.output.count("withdrawn by") == 2
        assert "withdrawn" in decisions_table(place)
        go_on(place)
        assert outcome(place) == [WAITING]
        assert command("accept", "1", "--reason", "patient-id-differs", "--withdraw").code == 2
        assert command("accept", "1", "--withdraw").code == 3
        # Accepted again, and carried out: archived objects are not unmade.
        decide(place, studies=[1])
        go_on(place)
        assert outcome(place) == [ARCHIVED]
        refused = command("accept", "1", "--study", "1", "--withdraw")
        assert refused.code == 3 and "it is archived as it was accepted" in refused.stderr
        place.audit()
