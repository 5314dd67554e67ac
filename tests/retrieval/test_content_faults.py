"""Received instances may be faulty: each fault has one reaction, and none breaks the promise.

:data:`CASES` is the table: the fault, the knob of the scripted PACS (or the odd study it holds),
and the reaction that has to be seen. Every case runs through the real steps, over real sockets, by
C-MOVE and by C-GET. After it, whatever the reaction: nothing that was not requested is in the
archive; what is archived is complete, with the right hashes; what is quarantined is there, with
the reason; and once the fault is gone a rerun archives everything, and another one moves nothing.
"""

from __future__ import annotations

import csv
import hashlib
import json
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest

from prefect_dicom.core.model import Verdict
from prefect_dicom.core.reasons import REASONS
from prefect_dicom.core.uids import manifest_key, object_key
from prefect_dicom.network.storage_scp import ReceiverLease
from prefect_dicom.network.upper_layer.pdu import Pdu
from prefect_dicom.report import write_reports
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.run import open_run
from prefect_dicom.testing import KNOBS, Behaviour, StoredInstance, tiny_instances
from prefect_dicom.testing.instances import changed, instance_of_bytes
from prefect_dicom.testing.peculiar import PECULIARITIES, peculiar_instances
from tests.support.campaign import subset
from tests.support.disks import small_disk
from tests.support.part10_objects import ct, encapsulated, encoded
from tests.support.sites import LOOPBACK, Place, site_around, until
from tests.support.wire import association_request, responses, statuses, store_message

pytestmark = [
    pytest.mark.campaign("PACS: content"),
    pytest.mark.filterwarnings("ignore::UserWarning:pydicom"),
]

METHODS = ("c-move", "c-get")
FAULTS = [f"F4{digit}" for digit in "0123456789ABCDEFGHIJ"]
RLE = "1.2.840.10008.1.2.5"
IMPLICIT = "1.2.840.10008.1.2"


@dataclass(frozen=True)
class Reaction:
    """What has to be seen of a study of four instances.

    ``reason`` is the study's, where it fails; ``quarantine`` the reasons of the notes;
    ``warnings`` those in the manifest; ``sent`` how often the afflicted instance is sent.
    """

    archived: bool = True
    reason: str | None = None
    quarantine: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    sent: int | None = None


ACCEPTED = Reaction()


def kept_apart(reason: str, study: str | None = None) -> Reaction:
    """Quarantined; the study lacks the instance and says why."""
    return Reaction(False, study or reason, (reason,))


def warned(*codes: str, sent: int = 1) -> Reaction:
    return Reaction(warnings=codes, sent=sent)


def four() -> list[StoredInstance]:
    return list(tiny_instances(1, instances=4))


def of_umlaut() -> list[StoredInstance]:
    return [changed(stored, PatientID="M\xdcLLER-7") for stored in four()]


def compressed() -> list[StoredInstance]:
    """Encapsulated pixel data, with a delimiter at its end."""
    return [
        instance_of_bytes(
            changed(stored, PixelData=None).encoded() + encapsulated(b"\1\0\0\0fragment"), RLE
        )
        for stored in four()
    ]


@dataclass(frozen=True)
class Case:
    """A fault as one knob makes it (of the last instance, where it takes ``instances``)."""

    fault: str
    how: str
    knob: str
    reaction: Reaction
    arguments: Mapping[str, object] = field(default_factory=dict)
    objects: Callable[[], list[StoredInstance]] = four
    times: int | None = None
    by_c_get: Reaction | None = None
    """Where C-GET reacts differently."""
    with_knob: str | None = None
    """Another knob that is turned too."""
    methods: tuple[str, ...] = METHODS

    def __str__(self) -> str:
        return f"{self.fault}: {self.how}"

    def script(self) -> list[Behaviour]:
        if self.knob not in KNOBS:
            return []
        more = [Behaviour(self.with_knob)] if self.with_knob else []
        return [Behaviour(self.knob, times=self.times, **self.arguments), *more]


def holding(fault: str, how: str, kind: str, reaction: Reaction = ACCEPTED) -> Case:
    """A case of a PACS that does nothing wrong, and holds what is odd."""
    return Case(fault, how, kind, reaction, objects=partial(peculiar_instances, kind))


_BY_MOVE_ONLY = ("c-move",)
"""The PACS is made with pynetdicom, which sends no UID of more than 64 characters in a C-GET."""
_CUT = "instance-truncated"
_UNREADABLE = "instance-unreadable"

CASES = (
    Case("F40", "another patient", "store.other_patient", kept_apart("wrong-patient")),
    Case(
        "F40",
        "another patient, the first time",
        "store.other_patient",
        Reaction(quarantine=("wrong-patient",), sent=2),
        times=1,
    ),
    Case(
        "F40",
        "another patient, all of the study",
        "store.other_patient",
        Reaction(False, "patient-id-differs", ("patient-id-differs",) * 4, sent=1),
        {"instances": 4},
    ),
    Case(
        "F40",
        "only the name differs",
        "store.coerce",
        ACCEPTED,
        {"elements": {"PatientName": "Married^Ada"}},
    ),
    Case(
        "F40",
        "the same PatientID without its umlaut",
        "store.coerce",
        warned("patient-id-reencoded"),
        {"elements": {"PatientID": b"M?LLER-7"}},
        of_umlaut,
    ),
    Case(
        "F41",
        "another study",
        "store.other_study",
        kept_apart("uid-mismatch", "instances-missing"),
    ),
    Case(
        "F41",
        "another series",
        "store.coerce",
        kept_apart("not-requested", "instances-missing"),
        {"elements": {"SeriesInstanceUID": "2.25.41"}},
    ),
    Case(
        "F42",
        "objects that nobody asked for, with the originator's name",
        "store.unsolicited",
        Reaction(quarantine=("uid-mismatch",)),
        {"extra": list(tiny_instances(1, seed=42)), "originator": True},
    ),
    Case(
        "F42",
        "objects that nobody asked for",
        "store.unsolicited",
        Reaction(quarantine=("not-requested",)),
        {"extra": list(tiny_instances(1, seed=42))},
        # What comes over the association of our own request answers that.
        by_c_get=Reaction(quarantine=("uid-mismatch",)),
    ),
    Case("F43", "the same twice", "store.duplicate", Reaction(sent=2)),
    Case(
        "F43",
        "the same twice, each time over another association",
        "store.duplicate",
        Reaction(sent=2),
        with_knob="move.many_assocs",
    ),
    Case(
        "F44",
        "another content under one UID",
        "store.conflict",
        Reaction(False, "conflicting-content", ("conflicting-content",)),
    ),
    Case(
        "F44",
        "the same object in two transfer syntaxes",
        "store.conflict",
        Reaction(False, "conflicting-content", ("conflicting-content",)),
        {"transfer_syntax_uid": IMPLICIT},
    ),
    holding("F44", "one UID in two series of the archive", "one-uid-in-two-series"),
    Case(
        "F45",
        "the command names another instance",
        "store.uid_mismatch",
        kept_apart("uid-mismatch"),
    ),
    Case(
        "F45",
        "the data set names no instance",
        "store.coerce",
        kept_apart("uid-mismatch"),
        {"elements": {"SOPInstanceUID": None}},
    ),
    Case(
        "F45",
        "the data set names no study",
        "store.coerce",
        kept_apart("uid-mismatch"),
        {"elements": {"StudyInstanceUID": None}},
    ),
    Case(
        "F45",
        "the data set names another SOP class",
        "store.coerce",
        kept_apart("uid-mismatch"),
        {"elements": {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2"}},
    ),
    Case("F46", "a blank behind the UID", "store.odd_uid", ACCEPTED, {"how": "blank"}),
    Case("F46", "NULs behind the UID", "store.odd_uid", ACCEPTED, {"how": "nul"}),
    *(
        Case(
            "F46",
            f"a UID with {how}, listed without",
            "store.odd_uid",
            kept_apart("not-requested", "instances-missing"),
            {"how": how},
            methods=_BY_MOVE_ONLY if how == "long" else METHODS,
        )
        for how in ("zeros", "long", "letters")
    ),
    Case(
        "F46",
        "UIDs that are none, as they are listed",
        "odd-uids",
        ACCEPTED,
        objects=partial(peculiar_instances, "odd-uids"),
        methods=_BY_MOVE_ONLY,
    ),
    holding("F47", "paths, formulas and format strings", "hostile-text"),
    Case("F48", "cut on its way", "store.truncate", Reaction(sent=2), times=1),
    Case("F48", "cut at its source", "store.truncate", warned(_CUT, sent=2)),
    Case(
        "F48",
        "without its last delimiter",
        "store.truncate",
        warned(_CUT, sent=2),
        {"keep": 1.0, "less_bytes": 8},
        compressed,
    ),
    Case(
        "F48",
        "with other bytes behind it",
        "store.truncate",
        warned(_UNREADABLE, sent=2),
        {"keep": 1.0, "behind": b"\xde\xad\xbe\xef" * 8},
    ),
    Case(
        "F48",
        "with zeros behind it",
        "store.truncate",
        warned("trailing-bytes"),
        {"keep": 1.0, "behind": bytes(64)},
    ),
    Case(
        "F48",
        "no DICOM at all, on its way",
        "store.truncate",
        Reaction(sent=2),
        {"keep": 0.0, "behind": b"<html>502 Bad Gateway</html>"},
        times=1,
    ),
    Case(
        "F49",
        "not in the negotiated syntax",
        "store.wrong_syntax",
        warned("wrong-transfer-syntax", sent=2),
    ),
    Case(
        "F49",
        "not in the negotiated syntax, once",
        "store.wrong_syntax",
        Reaction(sent=2),
        times=1,
    ),
    Case("F4A", "re-encoded", "store.transcode", ACCEPTED),
    Case("F4A", "re-encoded with loss", "store.transcode", ACCEPTED, {"lossy": True}),
    holding("F4B", "private and retired SOP classes", "private-classes"),
    holding(
        "F4B", "private and retired syntaxes", "retired-syntaxes", warned("transfer-syntax-unknown")
    ),
    Case("F4C", "a value of odd length", "store.odd_length", Reaction(sent=1)),
    Case("F4D", "very many frames", "store.huge", Reaction(sent=1), {"mebibytes": 24}),
    Case(
        "F4E",
        "many tiny objects",
        "tiny_instances",
        Reaction(sent=1),
        objects=lambda: list(tiny_instances(1, instances=60)),
    ),
    holding("F4F", "no names, no PatientID, no Modality", "nameless"),
    holding("F4F", "character sets that are not those declared", "lying-character-sets"),
    Case(
        "F4F",
        "no PatientID, though one is listed",
        "store.coerce",
        warned("patient-id-missing"),
        {"elements": {"PatientID": None, "Modality": None, "PatientName": ""}},
    ),
    Case(
        "F4G",
        "PatientID coerced on the way",
        "store.coerce",
        kept_apart("wrong-patient"),
        {"elements": {"PatientID": "SITE2-00000000"}},
    ),
    Case(
        "F4G",
        "dates coerced on the way",
        "store.coerce",
        ACCEPTED,
        {"elements": {"StudyDate": "19000101", "PatientBirthDate": ""}},
    ),
    Case(
        "F4G",
        "all UIDs coerced on the way",
        "store.coerce",
        kept_apart("uid-mismatch", "instances-missing"),
        {
            "elements": {
                "StudyInstanceUID": "2.25.70",
                "SeriesInstanceUID": "2.25.71",
                "SOPInstanceUID": "2.25.72",
            }
        },
    ),
    holding("F4H", "objects that are no images", "non-images"),
    Case("F4I", "in any order", "store.shuffle", ACCEPTED, {"lot": 5}),
    Case(
        "F4J",
        "more than was listed",
        "pacs.mutate",
        ACCEPTED,
        {"change": lambda pacs: pacs.holdings.add(list(tiny_instances(1, instances=5))[-1])},
        times=1,
    ),
)

FEW = 11
"""Cases that always run."""


def rows_of(objects: list[StoredInstance]) -> list[dict[str, str]]:
    """A cohort that names the study in a way that cannot be odd itself."""
    return [{"AccessionNumber": objects[0].attributes["AccessionNumber"]}]


def notes(place: Place) -> list[dict]:
    return [json.loads(path.read_text()) for path in place.quarantined()]


def warnings_in(place: Place, study: str) -> dict[str, tuple[str, ...]]:
    instances = place.manifest(study).instances
    return {i.sop_instance_uid: i.warnings for i in instances if i.warnings}


def keeps_the_promise(place: Place) -> None:
    """What holds whatever has arrived."""
    place.audit()
    held = list(place.pacs.holdings)
    requested = {
        object_key(o.study_instance_uid, o.series_instance_uid, o.sop_instance_uid) for o in held
    } | {manifest_key(o.study_instance_uid) for o in held}
    archived = place.archived()
    assert archived.keys() <= requested
    hashes = {hashlib.sha256(data).hexdigest() for data in archived.values()}
    for note in place.quarantined():
        data = note.with_suffix(".dcm").read_bytes()
        assert hashlib.sha256(data).hexdigest() == note.stem
        reason = json.loads(note.read_text())["reason"]
        assert reason in REASONS
        # What nobody asked for at first may have been asked for later, and be right.
        if reason in ("wrong-patient", "uid-mismatch"):
            assert note.stem not in hashes
    own = ("archive", "cohort.csv", "ledger.sqlite", "site.yaml")
    strange = [path for path in place.folder.iterdir() if not path.name.startswith(own)]
    assert strange == [], "something was written beside the site"


def every_answer_was_success(place: Place) -> bool:
    """One answer other than success makes some archives stop the whole transfer."""
    sent = [one for request in list(place.pacs.log) for one in request.sent]
    return {one.status for one in sent} == {0x0000}


# --- the table


def test_the_table_names_every_fault_and_every_behaviour():
    assert {case.fault for case in CASES} == set(FAULTS)
    knobs = {case.knob for case in CASES}
    assert knobs <= {*KNOBS, *PECULIARITIES, tiny_instances.__name__}
    assert set(PECULIARITIES) <= knobs
    documented = (Path(__file__).parents[2] / "docs" / "scripted-pacs.md").read_text()
    assert [kind for kind in PECULIARITIES if f"| `{kind}` |" not in documented] == []
    # Of how a peer sends, not of what it sends, other tables tell.
    how = {f"store.{name}" for name in ("titles", "items", "source", "contexts", "long_pdus")}
    how |= {"store.async_flood", "store.pipeline", "store.vary"}
    assert {name for name in KNOBS if name.startswith("store.")} - knobs == how
    assert len({str(case) for case in CASES}) == len(CASES)


def again(place: Place) -> dict[Verdict, int]:
    """Rerun whatever has failed, for whatever reason."""
    reasons = [reason for _, reason in place.reasons() if reason]
    with open_run(place.site, 1, "rerun") as pull:
        pull.ledger.cohorts.reopen(1, reasons=reasons)
        work_through(pull)
        return dict(pull.ledger.progress.totals(1).rows)


@pytest.mark.parametrize(
    "case_and_method",
    subset([(case, method) for case in CASES for method in case.methods], FEW),
    ids=lambda pair: f"{pair[0]}, {pair[1]}",
)
def test_what_is_received_gets_its_reaction(around, case_and_method):
    case, retrieve = case_and_method
    objects, afflicted = case.objects(), case.objects()[-1]
    study = objects[0].study_instance_uid
    reaction = case.by_c_get if retrieve == "c-get" and case.by_c_get else case.reaction
    with around(objects, script=case.script(), retrieve=retrieve) as place:
        before = dict(place.pull(place.cohort(rows_of(objects))).rows)
        if reaction.archived:
            assert before == {Verdict.ARCHIVED: 1}
            assert place.reasons() == [("archived", None)]
            said = warnings_in(place, study)
            assert set(said.values()) == ({reaction.warnings} if reaction.warnings else set())
            assert len(place.manifest(study).instances) == len(list(place.pacs.holdings))
        else:
            assert before in ({Verdict.PARTIAL: 1}, {Verdict.FAILED: 1})
            assert place.reasons() == [("failed", reaction.reason)]
            assert manifest_key(study) not in place.archived()
        assert tuple(note["reason"] for note in notes(place)) == reaction.quarantine
        if reaction.sent is not None:
            sent = place.pacs.sent_instances().count(afflicted.sop_instance_uid)
            assert sent == reaction.sent
        assert every_answer_was_success(place)
        assert all(behaviour.used for behaviour in place.pacs.script)
        keeps_the_promise(place)

        place.pacs.script.clear()
        assert again(place) == {Verdict.ARCHIVED: 1}
        keeps_the_promise(place)
        if not reaction.archived:
            # What came at last is what the PACS holds, byte for byte.
            archived = place.archived()
            for stored in place.pacs.holdings:
                key = object_key(study, stored.series_instance_uid, stored.sop_instance_uid)
                assert archived[key].endswith(stored.encoded())
        asked, archived = place.asked_for("C-MOVE", "C-GET"), place.archived()
        assert dict(place.rerun().rows) == {Verdict.ARCHIVED: 1}
        assert place.asked_for("C-MOVE", "C-GET") == asked
        assert place.archived() == archived


# --- what does not fit into one row


@pytest.mark.parametrize("retrieve", METHODS)
def test_f40_all_studies_go_on_when_one_brings_another_patient(around, retrieve):
    objects = list(tiny_instances(3, instances=2))
    other = Behaviour("store.other_patient", study=objects[2].study_instance_uid)
    with around(objects, script=[other], retrieve=retrieve) as place:
        assert dict(place.pull().rows) == {Verdict.ARCHIVED: 2, Verdict.PARTIAL: 1}
        keeps_the_promise(place)


def test_f41_an_instance_of_a_study_that_is_in_flight_too_is_assigned_to_it(around):
    objects = list(tiny_instances(2, instances=3))
    one, other = objects[0].study_instance_uid, objects[3].study_instance_uid
    hold = threading.Event()
    script = [
        Behaviour("net.first_byte", service="C-MOVE", study=one, hold=hold, times=1),
        Behaviour("store.unsolicited", study=other, extra=objects[:1], originator=True, times=1),
    ]
    node = {"limits": {"chunk_studies": 1}}
    with (
        around(objects, script=script, node=node) as place,
        ThreadPoolExecutor(1) as pool,
    ):
        first = pool.submit(place.pull)
        until(lambda: place.asked_for("C-MOVE") == 1, "the first study has been asked for")
        place.pull(place.cohort([{"StudyInstanceUID": other}]))
        arrived = [path.parent.name for path in place.spooled()]
        hold.set()
        assert dict(first.result(30).rows) == {Verdict.ARCHIVED: 2}
        assert arrived == ["1"]
        assert place.quarantined() == []
        keeps_the_promise(place)


def test_f41_an_instance_with_the_uid_of_a_study_in_flight_is_held_to_its_list(around):
    objects = list(tiny_instances(2, instances=3))
    one, other = objects[0].study_instance_uid, objects[3].study_instance_uid
    mixed = Behaviour("store.other_study", study=one, study_instance_uid=other)
    with around(objects, script=[mixed]) as place:
        assert dict(place.pull().rows) == {Verdict.ARCHIVED: 1, Verdict.PARTIAL: 1}
        assert {note["reason"] for note in notes(place)} == {"not-requested"}
        keeps_the_promise(place)
        place.pacs.script.clear()
        assert dict(place.rerun().rows) == {Verdict.ARCHIVED: 2}
        keeps_the_promise(place)


def test_f42_what_another_sender_sends_while_nothing_is_asked_for_is_kept_apart(around):
    stranger = next(tiny_instances(1, seed=7))
    with around(four()) as place, ReceiverLease(place.site):
        assert place.store(stranger) == 0x0000
        # An originator that nobody is makes it no more wanted.
        assert place.store(four()[0], originator=("NOBODY", 77)) == 0x0000
        assert [note["reason"] for note in notes(place)] == ["not-requested"] * 2
        assert {note["calling_ae_title"] for note in notes(place)} == {"STRANGER"}
        assert dict(place.pull().rows) == {Verdict.ARCHIVED: 1}
        assert len(place.quarantined()) == 2
        keeps_the_promise(place)


def test_f43_an_instance_that_comes_again_after_it_was_archived_changes_nothing(around):
    objects = list(tiny_instances(1, instances=8))
    again = Behaviour("store.unsolicited", extra=objects[:4], originator=True)
    gone = Behaviour("move.drop_instances", instances=2, times=1)
    with around(objects, script=[gone, again], archive={"connections": 1}) as place:
        assert dict(place.pull().rows) == {Verdict.ARCHIVED: 1}
        assert len(place.pacs.sent_instances()) > 8
        assert notes(place) == []
        keeps_the_promise(place)


@pytest.mark.parametrize("retrieve", METHODS)
def test_f48_what_is_cut_at_its_source_is_left_out_where_the_site_says_so(around, retrieve):
    script = [Behaviour("store.truncate", instances=1)]
    policy = {"faulty": "leave-out"}
    with around(four(), script=script, retrieve=retrieve, validation=policy) as place:
        assert dict(place.pull().rows) == {Verdict.PARTIAL: 1}
        [withheld] = place.manifest(four()[0].study_instance_uid).withheld
        assert withheld.reason == "instance-truncated"
        keeps_the_promise(place)


@pytest.mark.parametrize(
    "uid",
    ["1.2.*", "1.2.?", "1.2\\1.3", "", "1.2\n3"],
    ids=["star", "mark", "list", "none", "line"],
)
def test_f47_a_uid_that_would_select_others_is_never_sent(around, uid):
    odd = [changed(stored, SOPInstanceUID=uid) for stored in four()[:1]]
    with around([*odd, *four()[1:]]) as place:
        totals = place.pull()
        assert not any(uid == r.keys.get("SOPInstanceUID") for r in place.pacs.requests("C-MOVE"))
        assert sum(totals.rows.values()) == 1
        if Verdict.ARCHIVED not in totals.rows:
            assert place.reasons() == [("failed", "unsafe-uid")]
        keeps_the_promise(place)


def test_f47_no_text_of_a_pacs_becomes_a_formula_or_a_path_in_a_report(around, tmp_path):
    objects = peculiar_instances("hostile-text")
    with around(objects) as place:
        place.pull(place.cohort(rows_of(objects)))
        with place.ledger() as ledger:
            folder = write_reports(ledger, ledger.cohorts.get("1"), place.folder / "archive")
        cells = [
            cell
            for path in folder.glob("*.csv")
            for row in csv.reader(path.open(newline=""))
            for cell in row
        ]
        assert cells
        assert not [cell for cell in cells if cell[:1] in "=+-@\t\r" and cell]


@pytest.mark.parametrize("retrieve", METHODS)
def test_f4d_an_instance_of_many_frames_goes_through_no_memory(around, retrieve, scale):
    mebibytes = scale(40, 1024)
    script = [Behaviour("store.huge", instances=1, mebibytes=mebibytes)]
    objects = list(tiny_instances(1, instances=2, side=64))
    with (
        around(objects, script=script, retrieve=retrieve) as place,
        ReceiverLease(place.site) as lease,
    ):
        receiver = lease.status()["pid"]
        before = peak_bytes(receiver)
        assert dict(place.pull().rows) == {Verdict.ARCHIVED: 1}
        sizes = [i.size_bytes for i in place.manifest(objects[0].study_instance_uid).instances]
        assert max(sizes) > mebibytes << 20
        assert peak_bytes(receiver) - before < 32 << 20
        keeps_the_promise(place)


def peak_bytes(pid: int) -> int:
    """The most memory that a process has had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (peak,) = [line for line in lines if line.startswith("VmHWM:")]
    return int(peak.split()[1]) * 1024


def test_f4e_thousands_of_tiny_instances_are_recorded_in_batches(around, scale):
    many = scale(50, 3_000)
    with around(tiny_instances(many // 50, instances=50)) as place:
        assert dict(place.pull().rows) == {Verdict.ARCHIVED: many // 50}
        assert place.totals().stored == many
        keeps_the_promise(place)


@pytest.mark.parametrize("retrieve", METHODS)
def test_f4j_what_comes_with_a_study_and_was_not_listed_counts_once_it_is_listed(around, retrieve):
    *listed, late = tiny_instances(1, instances=4)
    added = Behaviour(
        "pacs.mutate", change=lambda pacs: pacs.holdings.add(late), level="IMAGE", times=1
    )
    with around(listed, script=[added], retrieve=retrieve) as place:
        assert dict(place.pull().rows) == {Verdict.ARCHIVED: 1}
        assert len(place.manifest(late.study_instance_uid).instances) == 4
        assert place.quarantined() == []
        assert place.pacs.sent_instances().count(late.sop_instance_uid) == 1
        keeps_the_promise(place)


def test_faults_come_together_by_lot_and_the_promise_holds(around, seed, scale):
    studies = scale(4, 60)
    objects = list(tiny_instances(studies, instances=4))
    script = [
        Behaviour(knob, probability=0.3, seed=seed + number, **arguments)
        for number, (knob, arguments) in enumerate(
            (
                ("store.shuffle", {"lot": seed}),
                ("store.duplicate", {"instances": 2}),
                ("store.truncate", {}),
                ("store.other_patient", {}),
                ("store.coerce", {"elements": {"SeriesInstanceUID": "2.25.41"}}),
                ("store.unsolicited", {"extra": list(tiny_instances(1, seed=42))}),
                ("store.odd_length", {}),
                ("store.wrong_syntax", {}),
            )
        )
    ]
    node = {"limits": {"chunk_studies": 2}}
    with around(objects, script=script, node=node) as place:
        place.pull()
        keeps_the_promise(place)
        place.pacs.script.clear()
        assert again(place) == {Verdict.ARCHIVED: studies}
        keeps_the_promise(place)


# --- what we answer as a receiver


@dataclass(frozen=True)
class Answer:
    """What a sender is told, and where the object lies then."""

    situation: str
    stored: Callable[[], StoredInstance]
    status: int = 0x0000
    lies_in: str = "quarantine"
    reason: str | None = None
    before: Callable[[], StoredInstance] | None = None


def wanted() -> StoredInstance:
    return four()[0]


ANSWERS = (
    Answer("it is written", wanted, lies_in="ready"),
    Answer("the same again", wanted, lies_in="ready", before=wanted),
    Answer(
        "the same UID, other bytes",
        lambda: changed(wanted(), ImageComments="Second version."),
        lies_in="ready",
        before=wanted,
    ),
    Answer("another study", lambda: next(tiny_instances(1, seed=7)), reason="uid-mismatch"),
    # Held to the list, and quarantined, by whoever asked for it.
    Answer("another patient", lambda: changed(wanted(), PatientID="OTHER"), lies_in="ready"),
    Answer(
        "an unreadable data set, of a request for one study",
        lambda: replace(wanted(), encoded=lambda: b"<html>502 Bad Gateway</html>"),
        lies_in="ready",
    ),
)


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.situation)
def test_a_sender_gets_success_for_whatever_could_be_written(around, answer):
    with (
        around([]) as place,
        ReceiverLease(place.site) as lease,
        lease.expecting({wanted().study_instance_uid: 1}, "US") as request,
    ):
        originator = ("US", request.message_id)
        if answer.before is not None:
            assert place.store(answer.before(), originator=originator) == 0x0000
        assert place.store(answer.stored(), originator=originator) == answer.status
        spool = place.site.spool.path
        found = [
            p for p in spool.rglob("*.dcm") if p.read_bytes().endswith(answer.stored().encoded())
        ]
        assert [path.relative_to(spool).parts[0] for path in found] == [answer.lies_in]
        assert [path.stem for path in found] == [
            hashlib.sha256(path.read_bytes()).hexdigest() for path in found
        ]
        assert [note["reason"] for note in notes(place)] == (
            [answer.reason] if answer.reason else []
        )


def test_a_sender_gets_out_of_resources_only_while_there_is_no_room(tmp_path):
    with small_disk(tmp_path / "disk", mebibytes=4) as disk:
        parts = {"spool": {"path": str(disk / "spool"), "reserve_bytes": 2 << 20}}
        with site_around(tmp_path, [], **parts) as place, ReceiverLease(place.site):
            reported = [place.store(stored) for stored in tiny_instances(1, instances=2)]
            filler = disk / "filler"
            filler.write_bytes(bytes(2 << 20))
            reported += [place.store(stored) for stored in tiny_instances(1, instances=2, seed=1)]
            filler.unlink()
            reported += [place.store(stored) for stored in tiny_instances(1, instances=2, seed=2)]
            assert reported == [0, 0, 0xA700, 0xA700, 0, 0]
            assert len(place.quarantined()) == 4
            assert place.spooled() == []


def test_a_receiver_that_shuts_down_answers_the_instance_under_way_and_aborts(tmp_path):
    with site_around(tmp_path, []) as place, ReceiverLease(place.site) as lease:
        receiver = place.site.receiver
        address = (LOOPBACK, receiver.port)
        request = association_request().replace(
            b"PREFECTDICOM".ljust(16), receiver.ae_title.encode().ljust(16)
        )
        message = store_message("1.2.3", encoded(ct(SOPInstanceUID="1.2.3")))
        with socket.create_connection(address, 10) as connection:
            connection.settimeout(20)
            connection.sendall(request)
            assert connection.recv(64 * 1024)[0] == Pdu.ASSOCIATE_AC
            connection.sendall(message[:-100])
            until(lambda: lease.status()["open_bytes"], "the object is under way")
            lease.stop()
            until(partial(refuses, address), "it listens no more")
            connection.sendall(message[-100:])
            answer = b""
            while piece := connection.recv(64 * 1024):
                answer += piece
        assert statuses(answer) == [0x0000]
        assert responses(answer)[1][0] == Pdu.ABORT
        [note] = place.quarantined()
        assert note.with_suffix(".dcm").read_bytes().endswith(encoded(ct(SOPInstanceUID="1.2.3")))


def refuses(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, 1).close()
    except ConnectionRefusedError:
        return True
    return False
