"""An odd object is archived with a warning, asked for once, and costs the others nothing.

And what comes twice, late, or never, is told apart from what is wrong.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest

from prefect_dicom.core.model import Verdict
from prefect_dicom.retrieval.bounds import FAULTY_SAMPLE
from prefect_dicom.testing import Behaviour, StoredInstance, tiny_instances
from prefect_dicom.testing.instances import changed, decoded, encoded, instance_of_bytes
from tests.support.part10_objects import element
from tests.support.sites import Place, until

METHODS = ("c-move", "c-get")
IMPLICIT = "1.2.840.10008.1.2"
LEAVE_OUT = {"validation": {"faulty": "leave-out"}}


def sent_often(place: Place) -> int:
    """The most often that any instance was sent."""
    sent = place.pacs.sent_instances()
    return max(map(sent.count, set(sent)))


def warnings_of(place: Place) -> list[set[str]]:
    """The warnings in the manifests, a set for each archived instance that has some."""
    return [
        set(instance.warnings)
        for uid in place.pacs.holdings.study_instance_uids()
        for instance in place.manifest(uid).instances
        if instance.warnings
    ]


def with_bytes(stored: StoredInstance, change: Callable[[bytes], bytes]) -> StoredInstance:
    return replace(stored, encoded=lambda: change(stored.encoded()))


def implicit(stored: StoredInstance) -> StoredInstance:
    data = encoded(decoded(stored.encoded(), stored.transfer_syntax_uid), IMPLICIT)
    return instance_of_bytes(data, IMPLICIT)


# --- odd encodings


def explicit_meta(syntax: str) -> bytes:
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    return struct.pack("<HH2sH", 2, 0x10, b"UI", len(value)) + value


def implicit_meta(syntax: str) -> bytes:
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    return struct.pack("<HHL", 2, 0x10, len(value)) + value


def whole_meta(syntax: str) -> bytes:
    rest = struct.pack("<HH2sxxL", 2, 1, b"OB", 2) + b"\0\1" + explicit_meta(syntax)
    length = struct.pack("<HH2sHL", 2, 0, b"UL", 4, len(rest))
    return bytes(128) + b"DICM" + length + rest


PRIVATE_CREATOR = element(0x00290010, b"LO", b"ODD VENDOR")


def before_pixels(data: bytes, more: bytes) -> bytes:
    at = data.index(b"\xe0\x7f\x10\x00")
    return data[:at] + PRIVATE_CREATOR + more + data[at:]


def swapped_sequence(vr: bytes, items: int = 2, *, ends_swapped: bool = True) -> bytes:
    """A private sequence of undefined length whose items are in the other byte order."""
    inside = struct.pack(">HH2sH", 0x0029, 0x1001, b"LO", 4) + b"abcd"
    item = struct.pack(">HHL", 0xFFFE, 0xE000, len(inside)) + inside
    order = ">" if ends_swapped else "<"
    end = struct.pack(order + "HHL", 0xFFFE, 0xE0DD, 0)
    head = struct.pack("<HH2sxxL", 0x0029, 0x1010, vr, 0xFFFFFFFF)
    return head + item * items + end


def open_items_swapped() -> bytes:
    inside = struct.pack(">HH2sH", 0x0029, 0x1001, b"LO", 4) + b"abcd"
    item = struct.pack(">HHL", 0xFFFE, 0xE000, 0xFFFFFFFF) + inside
    item += struct.pack(">HHL", 0xFFFE, 0xE00D, 0)
    head = struct.pack("<HH2sxxL", 0x0029, 0x1010, b"UN", 0xFFFFFFFF)
    return head + item + struct.pack(">HHL", 0xFFFE, 0xE0DD, 0)


def no_items() -> bytes:
    """A private sequence that holds what nobody can walk, and its end."""
    head = struct.pack("<HH2sxxL", 0x0029, 0x1010, b"SQ", 0xFFFFFFFF)
    return head + b"\x01\x02\x03\x04" * 5 + struct.pack("<HHL", 0xFFFE, 0xE0DD, 0)


def of_odd_vr(vr: bytes, *, long: bool = False) -> bytes:
    head = struct.pack("<HH2s", 0x0029, 0x1001, vr)
    return head + (struct.pack("<xxL", 4) if long else struct.pack("<H", 4)) + b"data"


def in_front(meta: Callable[[str], bytes], stored: StoredInstance) -> StoredInstance:
    return with_bytes(stored, lambda data: meta(stored.transfer_syntax_uid) + data)


def within(more: bytes, stored: StoredInstance) -> StoredInstance:
    return with_bytes(stored, lambda data: before_pixels(data, more))


def behind(more: bytes, stored: StoredInstance) -> StoredInstance:
    return with_bytes(stored, lambda data: data + more)


INSIDE, MALFORMED, TRAILING = "file-meta-inside", "element-malformed", "trailing-bytes"

ODD = {
    "(0002,0010) in front, explicit": (partial(in_front, explicit_meta), INSIDE),
    "(0002,0010) in front, implicit": (partial(in_front, implicit_meta), INSIDE),
    "a whole file as a data set": (partial(in_front, whole_meta), INSIDE),
    "a VR of question marks": (partial(within, of_odd_vr(b"??")), MALFORMED),
    "a VR of question marks, long": (partial(within, of_odd_vr(b"??", long=True)), MALFORMED),
    "a VR of zeros": (partial(within, of_odd_vr(b"\0\0")), MALFORMED),
    "a VR of small letters": (partial(within, of_odd_vr(b"lo")), MALFORMED),
    "swapped items": (partial(within, swapped_sequence(b"UN")), MALFORMED),
    "swapped items, SQ": (partial(within, swapped_sequence(b"SQ")), MALFORMED),
    "swapped items, and an end that is not": (
        partial(within, swapped_sequence(b"UN", ends_swapped=False)),
        MALFORMED,
    ),
    "swapped items of undefined length": (partial(within, open_items_swapped()), MALFORMED),
    "a private sequence of anything": (partial(within, no_items()), MALFORMED),
    "a blank behind the last element": (partial(behind, b"\x20"), TRAILING),
    "many blanks behind the last element": (partial(behind, b"\x20" * 13), TRAILING),
    "zeros and blanks behind it": (partial(behind, b"\0\0\x20\0"), TRAILING),
}


@pytest.mark.parametrize("retrieve", METHODS)
@pytest.mark.parametrize("oddity", ODD)
def test_an_odd_object_is_archived_with_a_warning_and_asked_for_once(around, retrieve, oddity):
    make, code = ODD[oddity]
    *others, last = tiny_instances(1, instances=3)
    in_implicit = code == INSIDE
    objects = [*others, make(implicit(last) if in_implicit else last)]
    with around(objects, retrieve=retrieve, **LEAVE_OUT) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert warnings_of(place) == [{code}]
        assert sent_often(place) == 1
        assert place.quarantined() == []
        place.audit()


@pytest.mark.parametrize("meta", [explicit_meta, implicit_meta, whole_meta])
def test_in_a_c_move_of_twenty_studies_nothing_goes_to_quarantine(around, meta):
    """The study is read behind what does not belong there."""
    objects = [in_front(meta, implicit(o)) for o in tiny_instances(20)]
    node = {"limits": {"chunk_studies": 20}}
    with around(objects, node=node, **LEAVE_OUT) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 20}
        assert place.asked_for("C-MOVE") == 1
        assert place.quarantined() == []


@pytest.mark.parametrize("policy", ["archive", "leave-out"])
@pytest.mark.parametrize("retrieve", METHODS)
def test_a_hundred_objects_with_one_fault_are_not_asked_for_twice(around, retrieve, policy):
    """A few of them are; as these come as before, the others are judged like them."""
    angiography = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.12.1", "PixelData": None}
    objects = [changed(o, **angiography) for o in tiny_instances(1, instances=100)]
    verdict = Verdict.ARCHIVED if policy == "archive" else Verdict.PARTIAL
    with around(objects, retrieve=retrieve, validation={"faulty": policy}) as place:
        assert place.pull().rows == {verdict: 1}
        assert len(place.pacs.sent_instances()) == 100 + FAULTY_SAMPLE.most
        manifest = place.manifest(objects[0].study_instance_uid)
        said = [i.warnings for i in manifest.instances] + [(w.reason,) for w in manifest.withheld]
        assert said == [("pixel-data-length",)] * 100
        assert place.spooled() == []
        place.audit()


@pytest.mark.parametrize("retrieve", METHODS)
def test_a_hundred_objects_that_were_damaged_on_their_way_are_asked_for_again(around, retrieve):
    """Those that stood for the others come whole: so may the others."""
    objects = list(tiny_instances(1, instances=20))
    script = [Behaviour("store.truncate", instances=20, times=1)]
    with around(objects, retrieve=retrieve, script=script, **LEAVE_OUT) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        assert warnings_of(place) == []
        assert place.manifest(objects[0].study_instance_uid).withheld == ()
        place.audit()


# --- bytes that change from request to request

BREAKS_OFF = {"answers": 30, "times": 1}


def varying(retrieve: str, *more: Behaviour) -> list[Behaviour]:
    """Each request brings another time; the first ends after 30 of 50, and it sends no parts."""
    return [
        Behaviour("net.drop_after", service=retrieve.upper(), **BREAKS_OFF),
        Behaviour("move.no_image_level", status=None),
        Behaviour("store.vary", instances=50),
        *more,
    ]


@pytest.mark.parametrize("retrieve", METHODS)
@pytest.mark.parametrize("lists", ["instances", "series"])
def test_the_first_copies_are_kept_of_what_differs_in_times_only(around, retrieve, lists):
    objects = list(tiny_instances(1, instances=50))
    script = varying(retrieve)
    if lists == "series":
        script.append(Behaviour("find.no_image_level"))
    with around(objects, retrieve=retrieve, script=script) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}
        manifest = place.manifest(objects[0].study_instance_uid)
        assert len(manifest.instances) == 50
        assert manifest.warnings == ("times-vary",)
        assert place.quarantined() == []
        assert sent_often(place) == 2


@pytest.mark.parametrize("retrieve", METHODS)
@pytest.mark.parametrize(
    ("element_", "value"),
    [
        ("PatientBirthDate", "1950{:04d}"),
        ("ImageComments", "copy {}"),
        ("PixelData", "{:04d}"),
    ],
)
def test_copies_that_differ_in_more_are_a_conflict(around, retrieve, element_, value):
    objects = list(tiny_instances(1, instances=6))
    script = [
        Behaviour("net.drop_after", answers=3, times=1, service=retrieve.upper()),
        Behaviour("move.no_image_level", status=None),
        Behaviour("store.vary", instances=6, element=element_, value=value),
    ]
    with around(objects, retrieve=retrieve, script=script) as place:
        place.pull()
        assert place.reasons() == [("failed", "conflicting-content")]
        assert len(place.quarantined()) >= 3


# --- a series of which nothing is listed


@pytest.mark.parametrize("retrieve", METHODS)
@pytest.mark.parametrize("count", [None, 3])
def test_a_series_without_instances_is_named_and_the_others_are_archived(around, retrieve, count):
    objects = list(tiny_instances(1, instances=4))
    bare = changed(objects[0], SeriesInstanceUID="2.25.900", SOPInstanceUID="2.25.901")
    script = [Behaviour("find.empty_series", series=["2.25.900"], count=count)]
    with around([*objects, bare], retrieve=retrieve, script=script) as place:
        assert place.pull().rows == {Verdict.PARTIAL: 1}
        assert place.reasons() == [("failed", "series-without-instances")]
        assert len(place.archived()) == 4
        place.pacs.script.clear()
        assert place.rerun().rows == {Verdict.ARCHIVED: 1}
        place.audit()


def test_a_series_that_is_counted_as_empty_is_no_fault(around):
    objects = list(tiny_instances(1, instances=4))
    bare = changed(objects[0], SeriesInstanceUID="2.25.900", SOPInstanceUID="2.25.901")
    script = [Behaviour("find.empty_series", series=["2.25.900"], count=0)]
    with around([*objects, bare], script=script) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1}


# --- late objects


class Later(threading.Event):
    """In place of an event that a script waits for: set by a timer when it is waited for."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def wait(self, timeout: float | None = None) -> bool:
        # The time of the first look counts: it is taken at the end of the request.
        timer, self._seconds = self._seconds, 0.0
        if timer:
            threading.Timer(timer, self.set).start()
        return super().wait(timeout)


def late(seconds: float, *, promised: bool, studies: int) -> list[Behaviour]:
    """Each request is answered at once, and what it asks for comes so many seconds after it."""
    return [
        Behaviour("move.late", instances=3, hold=Later(seconds), promised=promised, on_request=n)
        for n in range(1, 10 * studies)
    ]


@pytest.mark.parametrize("promised", [True, False])
def test_what_comes_after_the_end_of_its_request_is_no_junk(around, promised):
    """4.5 settle times late, as 45 s are of 10 s; a node that promises is waited for."""
    objects = list(tiny_instances(8, instances=3))
    settle = 0.6
    script = late(4.5 * settle, promised=promised, studies=8)
    node = {"timeouts": {"settle_seconds": settle}, "limits": {"chunk_studies": 8}}
    with around(objects, script=script, node=node) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 8}
        assert sent_often(place) <= (1 if promised else 3)
        remarks = {
            code
            for uid in place.pacs.holdings.study_instance_uids()
            for code in place.manifest(uid).warnings
        }
        assert remarks == {"objects-late"}
        with place.ledger() as ledger:
            [(_, words)] = ledger.cohorts.notes(1)
        assert "came after the end of the request" in words


def test_what_comes_when_its_study_has_failed_is_kept_for_the_rerun(around):
    objects = list(tiny_instances(1, instances=3))
    released = threading.Event()
    script = [Behaviour("move.late", instances=3, hold=released)]
    node = {"timeouts": {"settle_seconds": 0.1}}
    with around(objects, script=script, node=node) as place:
        place.pull()
        assert place.reasons() == [("failed", "nothing-arrived")]
        released.set()
        until(lambda: len(set(place.pacs.sent_instances())) == 3, "the late ones have come")
        until(lambda: len(place.spooled()) == 3, "they are kept")
        asked = place.asked_for("C-MOVE")
        assert place.rerun().rows == {Verdict.ARCHIVED: 1}
        assert place.asked_for("C-MOVE") == asked


def test_late_objects_of_studies_that_were_listed_together_are_kept_for_each(around):
    """One of them is requested again and archived; the others wait for what was late."""
    objects = list(tiny_instances(2, instances=2))
    first, second = (o.study_instance_uid for o in objects[::2])
    released = threading.Event()
    script = [
        Behaviour("move.late", instances=2, hold=released, times=1),
        Behaviour("move.success_nothing", study=second, service="C-MOVE"),
    ]
    node = {"timeouts": {"settle_seconds": 0.1}}
    with around(objects, script=script, node=node) as place:
        place.pull()
        assert {uid: str(s.state) for uid, s in place.studies().items()} == {
            first: "archived",
            second: "failed",
        }
        released.set()
        until(lambda: len(place.spooled()) == 2, "those that are waited for are kept")
        until(lambda: len(place.quarantined()) == 2, "those that are not are set apart")
        asked = place.asked_for("C-MOVE")
        assert place.rerun().rows == {Verdict.ARCHIVED: 2}
        assert place.asked_for("C-MOVE") == asked
