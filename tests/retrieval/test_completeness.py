"""Where a PACS lists no instances, its counts are judged instead, and everything says so.

The list of instances is preferred wherever it can be had. The auditor knows what the scripted
PACS holds: whatever is archived here is all of it, unless a test says how that is fooled.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from prefect_dicom.config.site import load_site
from prefect_dicom.core.failpoints import POINTS
from prefect_dicom.core.model import Evidence, Verdict
from prefect_dicom.network.find.list_studies import find_studies
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.report import RESULTS, format_totals, write_reports
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_run
from prefect_dicom.testing import Behaviour, StoredInstance, tiny_instances
from prefect_dicom.testing.audit import Auditor
from prefect_dicom.testing.instances import changed
from tests.support import crashes
from tests.support.campaign import subset
from tests.support.commands import CommandLine
from tests.support.peers import free_port
from tests.support.sites import LOOPBACK

pytestmark = pytest.mark.campaign("evidence")

BY_LIST, BY_COUNTS, BY_SUBOPERATIONS = Evidence


def study(seed: int, *, instances: int, series: int = 1) -> list[StoredInstance]:
    """A study with so many instances in each of its series."""
    objects = tiny_instances(1, instances=instances * series, seed=seed)
    return [
        changed(
            stored,
            SeriesInstanceUID=f"{stored.series_instance_uid}{number % series}",
            SeriesNumber=str(number % series + 1),
        )
        for number, stored in enumerate(objects)
    ]


LARGE, SMALL = study(1, instances=3, series=2), study(2, instances=2)
HELD = [*LARGE, *SMALL]
UID = LARGE[0].study_instance_uid
OTHERS = SMALL[0].study_instance_uid

NO_LIST = ("find.no_image_level", {})
NO_COUNTS = ("find.counts", {"how": "none"})
NO_SERIES = ("find.no_series_level", {})
ONE_TOO_MANY = ("find.counts", {"how": "off_by", "by_number": 1})
ONE_TOO_FEW = ("find.counts", {"how": "off_by", "by_number": -1})
DROPS = ("move.drop_instances", {"instances": 1, "study": UID})
SAYS_ALL = ("move.bad_counts", {"counts": (None, 6, 0, 0), "study": UID})

CUTS = ("store.truncate", {"study": UID, "keep": 1.0, "less_bytes": 2})

ARCHIVED = ("archived", None)
MISSING = ("failed", "instances-missing")
UNKNOWN = ("failed", "completeness-unknown")
TOO_WEAK = ("failed", "evidence-too-weak")

Knob = tuple[str, Mapping[str, Any]]


def once(knob: Knob) -> Knob:
    name, arguments = knob
    return name, {**arguments, "times": 1}


@dataclass(frozen=True)
class Case:
    """What the PACS does, what the site accepts, and what becomes of the larger study."""

    story: str
    knobs: Sequence[Knob]
    accepted: Evidence
    reason: tuple[str, str | None]
    evidence: Evidence | None
    warnings: tuple[str, ...] = ()
    requests: int | None = None
    """How many retrieves of the study that takes; None: not the point."""
    other: tuple[str, str | None] = ARCHIVED
    """What becomes of the smaller study."""
    believed: bool = False
    """The PACS lies so well that what it dropped is not missed."""
    more: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.story


CASES = [
    Case("the list is preferred, whatever is accepted", (), BY_SUBOPERATIONS, ARCHIVED, BY_LIST),
    Case("also where counts are wrong", [ONE_TOO_MANY], BY_COUNTS, ARCHIVED, BY_LIST),
    *(
        Case(
            f"no IMAGE level, {status:04X}",
            [("find.no_image_level", {"status": status})],
            BY_COUNTS,
            ARCHIVED,
            BY_COUNTS,
            requests=1,
        )
        for status in (0xC000, 0xA900, 0x0000)
    ),
    Case(
        "the IMAGE level is refused only at first",
        # Once together, then with and without a PatientID: the second list is of instances.
        [("find.no_image_level", {"times": 3, "study": UID})],
        BY_COUNTS,
        ARCHIVED,
        BY_LIST,
    ),
    Case(
        "the site asks for lists",
        [NO_LIST],
        BY_LIST,
        TOO_WEAK,
        None,
        requests=0,
        other=TOO_WEAK,
    ),
    # --- counts that lie
    Case(
        "one too many is counted",
        [NO_LIST, ONE_TOO_MANY],
        BY_COUNTS,
        MISSING,
        BY_COUNTS,
        other=MISSING,
    ),
    Case(
        "one too many, and less would do",
        [NO_LIST, ONE_TOO_MANY],
        BY_SUBOPERATIONS,
        MISSING,
        BY_COUNTS,
        other=MISSING,
    ),
    Case(
        "one too few is counted",
        [NO_LIST, ONE_TOO_FEW],
        BY_COUNTS,
        TOO_WEAK,
        BY_COUNTS,
        other=TOO_WEAK,
    ),
    Case(
        "one too few, and less will do",
        [NO_LIST, ONE_TOO_FEW],
        BY_SUBOPERATIONS,
        ARCHIVED,
        BY_SUBOPERATIONS,
        warnings=("series-count-wrong",),
        requests=1,
    ),
    Case(
        "counts of zero count nothing",
        [NO_LIST, ("find.counts", {"how": "zero"})],
        BY_SUBOPERATIONS,
        ARCHIVED,
        BY_SUBOPERATIONS,
    ),
    # --- a retrieve that is not whole, and counts to tell
    Case(
        "one is dropped in silence once",
        [NO_LIST, once(DROPS)],
        BY_COUNTS,
        ARCHIVED,
        BY_COUNTS,
        requests=2,
    ),
    Case("one is dropped in silence always", [NO_LIST, DROPS], BY_COUNTS, MISSING, BY_COUNTS),
    Case(
        "all counters are zero",
        [NO_LIST, ("move.zero_counts", {})],
        BY_COUNTS,
        ARCHIVED,
        BY_COUNTS,
        requests=1,
    ),
    Case(
        "the association is lost half way",
        [NO_LIST, ("net.drop_after", {"answers": 3, "service": "C-GET", "times": 1})],
        BY_COUNTS,
        ARCHIVED,
        BY_COUNTS,
    ),
    Case(
        "no request at SERIES level is taken",
        [NO_LIST, once(DROPS), ("move.refuse", {"status": 0xA900, "on_request": 2})],
        BY_COUNTS,
        ARCHIVED,
        BY_COUNTS,
    ),
    # --- no counts
    Case("no counts", [NO_LIST, NO_COUNTS], BY_COUNTS, TOO_WEAK, None, requests=0, other=TOO_WEAK),
    Case(
        "no counts, and the retrieve's will do",
        [NO_LIST, NO_COUNTS],
        BY_SUBOPERATIONS,
        ARCHIVED,
        BY_SUBOPERATIONS,
        requests=1,
    ),
    Case("no SERIES level", [NO_SERIES], BY_SUBOPERATIONS, ARCHIVED, BY_SUBOPERATIONS, requests=1),
    Case(
        "an empty SERIES level",
        [("find.no_series_level", {"status": 0})],
        BY_SUBOPERATIONS,
        ARCHIVED,
        BY_SUBOPERATIONS,
    ),
    Case(
        "fewer are sent than are said to be",
        [NO_LIST, NO_COUNTS, DROPS, SAYS_ALL],
        BY_SUBOPERATIONS,
        UNKNOWN,
        BY_SUBOPERATIONS,
    ),
    Case(
        "fewer are sent than are said to be, once",
        [NO_LIST, NO_COUNTS, once(DROPS), once(SAYS_ALL)],
        BY_SUBOPERATIONS,
        ARCHIVED,
        BY_SUBOPERATIONS,
        requests=2,
    ),
    Case(
        "the retrieve has no counters",
        [NO_LIST, NO_COUNTS, ("move.bad_counts", {"counts": (None, None, None, None)})],
        BY_SUBOPERATIONS,
        UNKNOWN,
        BY_SUBOPERATIONS,
        other=UNKNOWN,
    ),
    Case(
        "all of the retrieve's counters are zero",
        [NO_LIST, NO_COUNTS, ("move.zero_counts", {})],
        BY_SUBOPERATIONS,
        UNKNOWN,
        BY_SUBOPERATIONS,
        other=UNKNOWN,
    ),
    Case(
        "one has failed on the PACS",
        [NO_LIST, NO_COUNTS, ("pacs.corrupt", {"study": UID})],
        BY_SUBOPERATIONS,
        UNKNOWN,
        BY_SUBOPERATIONS,
    ),
    Case(
        "nothing comes",
        [NO_LIST, NO_COUNTS, ("move.success_nothing", {"study": UID})],
        BY_SUBOPERATIONS,
        ("failed", "nothing-arrived"),
        BY_SUBOPERATIONS,
    ),
    Case(
        "fewer are sent than the study is to have",
        [NO_SERIES, DROPS],
        BY_SUBOPERATIONS,
        UNKNOWN,
        BY_SUBOPERATIONS,
    ),
    Case(
        "what nobody can tell is believed",
        [NO_LIST, NO_COUNTS, DROPS],
        BY_SUBOPERATIONS,
        ARCHIVED,
        BY_SUBOPERATIONS,
        believed=True,
    ),
    # --- what arrives
    Case("objects come twice", [NO_LIST, ("store.duplicate", {})], BY_COUNTS, ARCHIVED, BY_COUNTS),
    Case(
        "objects come twice, and nothing is counted",
        [NO_LIST, NO_COUNTS, ("store.duplicate", {})],
        BY_SUBOPERATIONS,
        ARCHIVED,
        BY_SUBOPERATIONS,
        requests=1,
    ),
    Case("an object is cut short once", [NO_LIST, once(CUTS)], BY_COUNTS, ARCHIVED, BY_COUNTS),
    Case("an object is cut short always", [NO_LIST, CUTS], BY_COUNTS, ARCHIVED, BY_COUNTS),
    Case(
        "an object is cut short always, and nothing is counted",
        [NO_LIST, NO_COUNTS, CUTS],
        BY_SUBOPERATIONS,
        ARCHIVED,
        BY_SUBOPERATIONS,
    ),
    Case(
        "an object is cut short always, and left out",
        [NO_LIST, CUTS],
        BY_COUNTS,
        ARCHIVED,
        BY_COUNTS,
        more={"faulty": "leave-out"},
    ),
    Case(
        "an object is another patient's",
        [NO_LIST, ("store.other_patient", {"study": UID})],
        BY_COUNTS,
        ("failed", "wrong-patient"),
        BY_COUNTS,
    ),
]


@dataclass(frozen=True)
class Way:
    """A case, by one of the two services."""

    case: Case
    retrieve: str

    def __str__(self) -> str:
        return f"{self.case} ({self.retrieve})"


WAYS = [Way(case, how) for case in CASES for how in ("c-get", "c-move")]
ALWAYS = {
    "no IMAGE level, A900 (c-get)",
    "the IMAGE level is refused only at first (c-get)",
    "one too many is counted (c-get)",
    "one too few, and less will do (c-get)",
    "one is dropped in silence once (c-move)",
    "no SERIES level (c-get)",
    "no counts, and the retrieve's will do (c-move)",
    "fewer are sent than are said to be, once (c-get)",
    "objects come twice, and nothing is counted (c-get)",
    "an object is cut short always, and left out (c-get)",
}


def scripted(knobs: Sequence[Knob]) -> list[Behaviour]:
    return [Behaviour(name, **arguments) for name, arguments in knobs]


@pytest.mark.parametrize("way", subset(WAYS, [w for w in WAYS if str(w) in ALWAYS]), ids=str)
def test_a_study_is_archived_by_the_best_evidence_or_says_why_not(way, around):
    case = way.case
    validation = {"evidence": str(case.accepted), **case.more}
    with around(
        HELD, script=scripted(case.knobs), retrieve=way.retrieve, validation=validation
    ) as place:
        auditor = Auditor(place.site, place.pacs)
        place.pull()
        reported = place.studies()
        assert (str(reported[UID].state), reported[UID].reason) == case.reason
        assert (str(reported[OTHERS].state), reported[OTHERS].reason) == case.other
        assert reported[UID].evidence == case.evidence
        violations = [v.what for v in auditor.audit()]
        assert violations == (["a manifest is not the PACS's inventory"] if case.believed else [])
        if case.requests is not None:
            retrieves = place.pacs.requests(way.retrieve.upper())
            assert len([r for r in retrieves if r.keys["StudyInstanceUID"] == UID]) == case.requests
        if case.reason == ARCHIVED:
            manifest = place.manifest(UID)
            assert manifest.evidence is case.evidence
            assert manifest.warnings == case.warnings
        # Whatever it was, it was the PACS's doing: without it the rest comes.
        place.pacs.script.clear()
        if not case.believed:
            assert set(place.rerun().rows) <= {Verdict.ARCHIVED, Verdict.PARTIAL}
            assert auditor.audit(finished=True) == []


def test_evidence_is_in_order():
    assert [e for e in Evidence if e.satisfies(BY_COUNTS)] == [BY_LIST, BY_COUNTS]
    assert all(BY_LIST.satisfies(weakest) for weakest in Evidence)
    assert [e for e in Evidence if BY_SUBOPERATIONS.satisfies(e)] == [BY_SUBOPERATIONS]


# --------------------------------------------------------------------------- what is read again


def adds(stored: StoredInstance):
    return lambda pacs: pacs.holdings.add(stored)


@pytest.mark.parametrize("knobs", [(), (NO_COUNTS,)], ids=["counts", "no counts"])
def test_a_study_that_grew_meanwhile_is_asked_for_again(knobs, around):
    late, *early = LARGE
    script = [
        *scripted([NO_LIST, *knobs]),
        Behaviour("pacs.mutate", change=adds(late), level="SERIES", times=1),
    ]
    accepted = {"evidence": "suboperation-counts"}
    if knobs:
        # Without counts a series more shows, and an instance more does not: it came with all.
        late = changed(late, SeriesInstanceUID=f"{late.series_instance_uid}9")
        script[-1].arguments["change"] = adds(late)
    with around(early, script=script, retrieve="c-get", validation=accepted) as place:
        auditor = Auditor(place.site, place.pacs)
        place.pull()
        assert place.reasons() == [ARCHIVED]
        assert auditor.audit(finished=True) == []


def test_what_comes_of_a_series_that_is_not_listed_is_not_requested(around):
    stranger = changed(LARGE[0], SeriesInstanceUID="1.2.3.4.5", SOPInstanceUID="1.2.3.4.5.6")
    script = [*scripted([NO_LIST]), Behaviour("store.unsolicited", extra=[stranger], study=UID)]
    with around(HELD, script=script, retrieve="c-get") as place:
        place.pull()
        assert place.reasons() == [ARCHIVED, ARCHIVED]
        [note] = place.quarantined()
        assert json.loads(note.read_text())["reason"] == "not-requested"
        assert Auditor(place.site, place.pacs).audit(finished=True) == []


def test_what_came_of_a_study_that_may_not_be_whole_is_kept(around):
    script = scripted([NO_LIST, DROPS])
    with around(LARGE, script=script, retrieve="c-get") as place:
        place.pull()
        [verdict] = place.verdicts()
        assert (verdict.archived_instances, verdict.expected_instances) == (5, 6)
        place.pacs.script.pop()
        before = len(place.pacs.sent_instances())
        place.rerun()
        assert place.reasons() == [ARCHIVED]
        # Only of the series of which one was missing.
        assert len(place.pacs.sent_instances()) - before == 3


def test_after_the_ledger_was_lost_counts_find_the_study_again(around):
    with around(HELD, script=scripted([NO_LIST]), retrieve="c-get") as place:
        place.pull()
        for name in ("", "-wal", "-shm"):
            place.folder.joinpath(f"ledger.sqlite{name}").unlink(missing_ok=True)
        moved = place.asked_for("C-GET")
        assert place.pull().rows == {Verdict.ARCHIVED: 2}
        assert place.asked_for("C-GET") == moved
        assert {s.evidence for s in place.studies().values()} == {BY_COUNTS}


# --------------------------------------------------------------------------- the keys it wants


def test_the_keys_that_a_pacs_wants_are_learnt_once(around):
    objects = [o for seed in range(1, 7) for o in study(seed, instances=2)]
    script = [Behaviour("find.demand_keys", status=0xA900)]
    node = {"limits": {"chunk_studies": 2, "associations": 1}}
    with around(objects, script=script, retrieve="c-get", node=node) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 6}
        assert {s.evidence for s in place.studies().values()} == {BY_LIST}
        # Together, and one by one with all keys and with few.
        refused = [r for r in place.pacs.requests("C-FIND") if r.status == 0xA900]
        assert len(refused) == 3
        place.audit()


def test_a_level_that_is_refused_is_not_asked_at_for_ever(around):
    objects = [o for seed in range(1, 9) for o in study(seed, instances=2)]
    node = {"limits": {"chunk_studies": 2, "associations": 1}}
    with around(objects, script=scripted([NO_LIST]), retrieve="c-get", node=node) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 8}
        asked = [r for r in place.pacs.requests("C-FIND") if r.level == "IMAGE"]
        # Once together, and three times with and without a PatientID.
        assert len(asked) == 7


# ---------------------------------------------------------------------------- where it is shown


def test_weaker_evidence_is_shown_wherever_figures_are(around):
    script = [Behaviour("find.no_image_level", study=UID)]
    with around(HELD, script=script, retrieve="c-get") as place:
        totals = place.pull()
        assert totals.evidence == {BY_COUNTS: 1, BY_LIST: 1}
        assert ", 1 study by series counts" in format_totals(totals)
        with place.ledger() as ledger:
            cohort = ledger.cohorts.get("1")
            folder = write_reports(ledger, cohort, place.site.reports)
        with (folder / RESULTS).open(newline="") as file:
            shown = {row["studies"]: row["evidence"] for row in csv.DictReader(file)}
        reference = str(place.studies()[UID].reference)
        assert shown.pop(reference) == "series-counts"
        assert set(shown.values()) == {"instance-list"}
        ended = CommandLine(place.folder, place.folder / "home")("status", "--json")
        reported = json.loads(ended.output)
        assert reported[0]["evidence"] == {"series-counts": 1, "instance-list": 1}


# -------------------------------------------------------------------------------- crash safety


@dataclass(frozen=True)
class Death:
    """A point to be killed at, and by what the studies are judged."""

    point: str
    evidence: Evidence
    retrieve: str

    def __str__(self) -> str:
        return f"{self.point}-{self.evidence}-{self.retrieve}"


_NOT_MET = {
    "expectation-noted",
    "list-half-read",
    "quarantine-noted",
    "receiver-started",
    "rejection-recorded",
    "set-aside",
}
"""Where neither evidence nor what has arrived plays a part, or not in these runs."""
DEATHS = [
    Death(point, evidence, how)
    for point in POINTS
    if point not in _NOT_MET
    for evidence in (BY_COUNTS, BY_SUBOPERATIONS)
    for how in ("c-get", "c-move")
]
SOME_DEATHS = [
    Death("list-extended", BY_COUNTS, "c-get"),
    Death("manifest-put", BY_SUBOPERATIONS, "c-get"),
]


@pytest.mark.parametrize("death", subset(DEATHS, SOME_DEATHS), ids=str)
def test_a_run_that_is_killed_converges(death, around, tmp_path):
    knobs = [NO_LIST] if death.evidence is BY_COUNTS else [NO_LIST, NO_COUNTS]
    validation = {"evidence": str(death.evidence)}
    with around(
        HELD, script=scripted(knobs), retrieve=death.retrieve, validation=validation
    ) as place:
        cohort, note, log = place.cohort(), tmp_path / "note", tmp_path / "log"
        auditor = Auditor(place.site, place.pacs)
        fault = f"{death.point}:1:kill:{note}"
        crashes.ended([crashes.start(place.file, cohort, log, fault)])
        in_the_receiver = death.retrieve == "c-move" and not note.exists()
        assert note.exists() or in_the_receiver, log.read_text()
        assert auditor.audit() == []
        crashes.bring_to_its_end(place.file, cohort)
        assert auditor.audit(finished=True) == []
        assert place.reasons() == [ARCHIVED, ARCHIVED]
        assert {s.evidence for s in place.studies().values()} == {death.evidence}
        assert auditor.audit_rerun(lambda: crashes.bring_to_its_end(place.file, cohort)) == []


def test_what_a_killed_run_left_in_the_spool_is_not_asked_for_again(around, tmp_path):
    with around(LARGE, script=scripted([NO_LIST]), retrieve="c-get") as place:
        cohort = place.cohort()
        run = crashes.start(place.file, cohort, tmp_path / "log", "list-extended:1:kill")
        assert crashes.ended([run]) == [crashes.KILLED]
        crashes.bring_to_its_end(place.file, cohort)
        assert place.asked_for("C-GET") == 1
        assert place.reasons() == [ARCHIVED]


# ------------------------------------------------------------------------------ a real archive


def test_an_archive_that_counts_nothing_and_tells_no_classes_is_judged_by_its_list(
    tmp_path, dcmqrscp
):
    document = {
        "nodes": {
            "pacs": {
                "host": LOOPBACK,
                "port": dcmqrscp.port,
                "called_ae_title": dcmqrscp.ae_title,
                "retrieve": "c-get",
            }
        },
        "receiver": {"ae_title": f"T{free_port()}", "port": free_port()},
        "archive": {"directory": "archive"},
        "ledger": {"path": "ledger.sqlite"},
        "spool": {"path": "spool", "reserve_bytes": 0},
    }
    (tmp_path / "archive").mkdir()
    file = tmp_path / "site.yaml"
    file.write_text(yaml.safe_dump(document))
    with Requestor(dcmqrscp.node()) as requestor:
        first = find_studies(requestor, {"StudyDate": "19000101-20991231"})[0]
    cohort = tmp_path / "cohort.csv"
    cohort.write_text(f"StudyInstanceUID\n{first.study_instance_uid}\n")
    registered = register_cohort(load_site(file), cohort, None)
    with open_run(load_site(file), registered.number) as pull:
        work_through(pull)
        [reported] = pull.ledger.studies.of_cohort(registered.number)
    assert (str(reported.state), reported.evidence) == ("archived", BY_LIST)
    assert reported.study.number_of_instances is None
