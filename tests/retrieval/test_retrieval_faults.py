"""A retrieve may go wrong in any way: each fault has one reaction, and none breaks the promise.

:data:`CASES` is the table: the fault, the knobs of the scripted PACS that make it, and the
reaction that has to be seen. Every case runs through the real steps, over real sockets, with the
real receiver. Whatever the reaction: what is reported archived is complete in the archive, with
the right hashes; what is not says why; no request names what had come before it; and once the
fault is gone a rerun archives everything.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial

import pytest

from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import Disposition, Verdict
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.network import get, move
from prefect_dicom.network.status import reason_for_status
from prefect_dicom.run.loop import work_through
from prefect_dicom.testing import KNOBS, Behaviour, Request, StoredInstance, tiny_instances
from prefect_dicom.testing.instances import changed
from prefect_dicom.testing.sending import StoreAssociation, context_key
from tests.support.campaign import subset
from tests.support.sites import LOOPBACK, Place, site_around, until

pytestmark = pytest.mark.campaign("PACS: retrieval")

BY_MOVE, BY_GET = "c-move", "c-get"
BOTH = (BY_MOVE, BY_GET)
FAULTS = [f"F{group}{digit}" for group in "23" for digit in "0123456789ABCDEF"]
RT_STRUCTURE_SET = "1.2.840.10008.5.1.4.1.1.481.3"
UNIQUE_KEYS = {
    "STUDY": "StudyInstanceUID",
    "SERIES": "SeriesInstanceUID",
    "IMAGE": "SOPInstanceUID",
}


class Reaction(StrEnum):
    """What has to be seen, besides the end."""

    ACCEPT = "accept"
    """One request, and everything was sent once."""
    MISSING = "missing"
    """Asked again, by name, for what had not come and nothing else."""
    NARROW = "narrow"
    """Smaller and smaller requests, until what fails has been asked for alone."""
    SWITCH = "switch"
    """Another way of asking."""
    FAIL = "fail"
    """The study fails alone, with the reason; what came of it is kept."""
    DISABLE = "disable"
    """The node is disabled until a person has acted; the studies stay pending."""
    WAIT = "wait"
    """The node is waiting; the studies stay pending."""
    QUARANTINE = "quarantine"
    """Kept apart, and everything that was asked for is archived."""


class Scene:
    """One site and its PACS, while a case is played."""

    def __init__(self, objects: Sequence[StoredInstance], method: str) -> None:
        self.objects = list(objects)
        self.uids = [o.sop_instance_uid for o in self.objects]
        self.method = method
        self.place: Place
        self.released = threading.Event()
        """Set when the fault goes away."""
        self.times: list[float] = []

    @property
    def service(self) -> str:
        return self.method.upper()

    def retrieves(self) -> list[Request]:
        return [r for r in list(self.place.pacs.log) if r.service in ("C-MOVE", "C-GET")]

    def cancelled(self) -> bool:
        return bool(self.place.pacs.requests("C-CANCEL"))


class When(threading.Event):
    """In place of an event that a script waits for: goes on as soon as the condition holds."""

    def __init__(self, condition: Callable[[], object]) -> None:
        super().__init__()
        self._condition = condition

    def wait(self, timeout: float | None = None) -> bool:
        return bool(self._condition()) or super().wait(timeout)


class Meanwhile(threading.Event):
    """In place of an event that a script waits for: does something instead of waiting."""

    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self._act = act

    def wait(self, timeout: float | None = None) -> bool:
        self._act()
        return True


class Pause(threading.Event):
    """In place of an event that a script waits for: lets this much time go by."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def wait(self, timeout: float | None = None) -> bool:
        time.sleep(self._seconds)
        return True


class Queue:
    """A place in a queue, that is had at the third look."""

    def __init__(self) -> None:
        self.looks = 0

    def acquire(self, timeout: float) -> bool:
        self.looks += 1
        return self.looks > 3

    def release(self) -> None:
        self.looks = 0


Script = Callable[[Scene], Sequence[Behaviour]]
Look = Callable[[Scene], None]


@dataclass(frozen=True)
class Case:
    """A fault, and the reaction to it.

    ``knob`` is the one of the fault; ``script`` may combine it with others. ``end`` is the reason
    of the study (or of the disabled node), None where it is archived in the same run.
    ``at_once`` is False where what came of the study is not known to the PACS when it is asked
    again.
    """

    fault: str
    words: str
    knob: str
    script: Script
    reaction: Reaction
    end: str | None = None
    methods: tuple[str, ...] = BOTH
    objects: Callable[[], Sequence[StoredInstance]] = partial(tiny_instances, 1, instances=6)
    node: Mapping[str, Mapping] = field(default_factory=dict)
    look: Look | None = None
    """What else has to be seen while the fault is there."""
    rerun: bool = True
    sent_again: bool = False
    """Whether it is the PACS that sends again what nobody asked for again."""

    def __str__(self) -> str:
        return f"{self.fault}: {self.words}"


def always(*behaviours: tuple[str, Mapping]) -> Script:
    """The knobs; those that a query could meet as well, at retrieves only."""

    def script(scene: Scene) -> list[Behaviour]:
        of_retrieves = {"service": scene.service}
        return [
            Behaviour(knob, **(of_retrieves if knob.startswith("net.") else {}), **arguments)
            for knob, arguments in behaviours
        ]

    return script


def first(knob: str, **arguments: object) -> Script:
    """The knob, at the first request only."""
    return always((knob, {"times": 1, **arguments}))


def ever(knob: str, **arguments: object) -> Script:
    return always((knob, arguments))


NO_C_GET = {
    "is not allowed": 0x0124,
    "is not supported": 0x0122,
    "is not recognised": 0x0211,
    "is answered by an abort": None,
}
STALL = {"timeouts": {"stall_seconds": 0.3}}
FIRST_BYTE = {"timeouts": {"first_byte_seconds": 0.3}}
TWO_MISSING_ONCE = ("move.drop_instances", {"instances": 2, "times": 1})


# --- what the table needs


def studies(number: int, instances: int = 2) -> Callable[[], Sequence[StoredInstance]]:
    return partial(tiny_instances, number, instances=instances)


def with_a_rare_class() -> list[StoredInstance]:
    *images, one, two = tiny_instances(1, instances=6)
    rare = [changed(o, SOPClassUID=RT_STRUCTURE_SET) for o in (one, two)]
    return [images[0], rare[0], *images[1:], rare[1]]


def delete_when_listed(number: int | None = None) -> Script:
    """Objects vanish from the PACS after its list was read, and before they are asked for."""

    def script(scene: Scene) -> list[Behaviour]:
        gone = scene.uids if number is None else scene.uids[-number:]

        def change(pacs) -> None:
            for uid in gone:
                pacs.holdings.remove(uid)

        return [Behaviour("pacs.mutate", change=change, times=1)]

    return script


def one_corrupt(stops: bool) -> Script:
    def script(scene: Scene) -> list[Behaviour]:
        corrupt = [Behaviour("pacs.corrupt", instances=[scene.uids[4]])]
        return corrupt + ([Behaviour("move.stop_at_failure")] if stops else [])

    return script


def many_corrupt(scene: Scene) -> list[Behaviour]:
    """More than are tried in a row, and others stand behind them."""
    corrupt = Behaviour("pacs.corrupt", instances=scene.uids[:25])
    return [corrupt, Behaviour("move.stop_at_failure")]


def all_others_came(scene: Scene) -> None:
    archived = scene.place.archived()
    came = {uid for uid in scene.uids if any(uid in key for key in archived)}
    assert came == set(scene.uids[25:])
    assert all("manifest" not in key for key in archived)


def delete_when_sent(scene: Scene) -> list[Behaviour]:
    """The study vanishes from the PACS when all of it has been sent."""

    def delete() -> None:
        for uid in scene.uids:
            scene.place.pacs.holdings.remove(uid)

    hold, number = Meanwhile(delete), len(scene.uids)
    return [Behaviour("net.stall_after", answers=number, hold=hold, service=scene.service)]


def archived_but_not_complete(scene: Scene) -> None:
    archived = scene.place.archived()
    assert len(archived) == len(scene.uids)
    assert all("manifest" not in key for key in archived)


def corrupt_alone(scene: Scene) -> None:
    """All others are archived, and a rerun asks for the corrupt one alone, and disables nothing."""
    place, corrupt = scene.place, scene.uids[4]
    came = {uid for uid in scene.uids if any(uid in key for key in place.archived())}
    assert came == set(scene.uids) - {corrupt}
    before = len(scene.retrieves())
    assert place.rerun().rows == {Verdict.PARTIAL: 1}
    assert place.reasons() == [("failed", "instances-missing")]
    assert {r.keys["SOPInstanceUID"] for r in scene.retrieves()[before:]} == {corrupt}


def failed_list(kind: str) -> Script:
    lists = {
        "absent": (),
        "foreign": ("1.2.3.4.5", "9.9.9"),
        "too long": tuple(f"2.25.{10**57 + n}" for n in range(1200)),
    }

    def script(scene: Scene) -> list[Behaviour]:
        uids = scene.uids[:1] if kind == "incomplete" else lists[kind]
        return [
            Behaviour("pacs.corrupt", instances=2, times=1),
            Behaviour("move.failed_list", uids=uids, times=1),
        ]

    return script


def one_uid_at_a_time(scene: Scene) -> None:
    """A list was tried, and never again."""
    lists = ["\\" in r.keys[UNIQUE_KEYS[r.level]] for r in scene.retrieves()]
    assert lists[0] or lists[1]
    assert sum(lists) == 1, lists


def by_series(scene: Scene) -> None:
    assert scene.retrieves()[-1].level == "SERIES"
    assert scene.place.quarantined() == []


def by_move(scene: Scene) -> None:
    """One C-GET is sent, and the switch to C-MOVE is noted once."""
    assert [r.service for r in scene.retrieves()].count("C-GET") == 1
    with scene.place.ledger() as ledger:
        [(node, words)] = ledger.cohorts.notes(1)
    assert node == "pacs" and "C-MOVE is used for the rest of the run" in words


def classes_in_turn(scene: Scene) -> None:
    assert len(scene.retrieves()) > 1
    assert len(scene.place.pacs.sent_instances()) == len(scene.uids)


def goes_on_when_cancelled(how: str, *more: tuple[str, Mapping], after: int = 2) -> Script:
    """Falls silent until it is cancelled, and then goes on sending."""

    def script(scene: Scene) -> list[Behaviour]:
        stall = Behaviour(
            "net.stall_after",
            answers=after,
            hold=When(scene.cancelled),
            times=1,
            service=scene.service,
        )
        others = [Behaviour(knob, **arguments) for knob, arguments in more]
        return [stall, Behaviour("move.ignore_cancel", how=how, times=1), *others]

    return script


def late(scene: Scene) -> list[Behaviour]:
    return [Behaviour("move.late", instances=2, hold=scene.released, times=1)]


def late_ones_are_kept_apart(scene: Scene) -> None:
    """They came again by name, so those of the first request are nobody's when they come."""
    place, [first_request, again] = scene.place, scene.retrieves()
    assert len(first_request.sent) == 4
    assert len(again.sent) == 2
    scene.released.set()
    until(lambda: [s.status for s in first_request.sent] == [0] * 6, "the late ones have come")
    assert len(place.quarantined()) == 2
    assert all('"not-requested"' in note.read_text() for note in place.quarantined())


def knocking(scene: Scene) -> list[Behaviour]:
    """Scanners and health checks knock at the receiver's port while it receives."""

    def knock() -> None:
        address = (LOOPBACK, scene.place.site.receiver.port)
        for data in (b"", b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x00\x2f", b"\0" * 64):
            with contextlib.suppress(ConnectionError), socket.create_connection(address) as probe:
                probe.sendall(data)
        StoreAssociation(
            "CHECKER", scene.place.site.receiver.ae_title, address, [context_key(scene.objects[0])]
        ).release()

    return [Behaviour("net.stall_after", answers=2, hold=Meanwhile(knock), service="C-MOVE")]


def nagling(scene: Scene) -> list[Behaviour]:
    def timed(operation_data: Callable[[], bytes]) -> Callable[[], bytes]:
        def data() -> bytes:
            scene.times.append(time.monotonic())
            return operation_data()

        return data

    for stored in scene.objects:
        scene.place.pacs.holdings.add(
            StoredInstance(stored.attributes, stored.transfer_syntax_uid, timed(stored.encoded))
        )
    return [Behaviour("net.nagle")]


def never_waits_for_a_delayed_acknowledgement(scene: Scene) -> None:
    """The kernel would delay each by 40 ms."""
    between = [b - a for a, b in zip(scene.times, scene.times[1:], strict=False)]
    assert statistics.median(between) < 0.035


def pipelined(scene: Scene) -> None:
    """The PACS has as many sub-operations outstanding as we take, and no more."""
    [request] = scene.retrieves()
    assert request.most_outstanding == 64


def goes_away(answers: int) -> Script:
    return lambda scene: [
        Behaviour(
            "pacs.restart", answers=answers, back=scene.released, times=1, service=scene.service
        )
    ]


def slowly(scene: Scene) -> list[Behaviour]:
    """Longer in all than it may fall silent, and never so long at a time."""
    return [
        Behaviour("move.no_pending"),
        *(
            Behaviour("net.stall_after", answers=n, hold=Pause(0.25), service=scene.service)
            for n in (1, 2, 3, 4)
        ),
    ]


def queued(scene: Scene) -> list[Behaviour]:
    return [Behaviour("assoc.queue", turn=Queue())]


# --- the table

C = Case
R = Reaction
CASES = (
    C("F20", "success and nothing, for ever", "move.success_nothing",
      ever("move.success_nothing"), R.FAIL, "nothing-arrived"),
    C("F20", "success and nothing, once", "move.success_nothing",
      first("move.success_nothing"), R.MISSING),
    C("F20", "success and nothing: the study is gone", "pacs.mutate",
      delete_when_listed(), R.FAIL, "study-gone", rerun=False),
    C("F20", "the study is gone when it has been sent", "net.stall_after",
      delete_when_sent, R.FAIL, "study-gone", rerun=False, look=archived_but_not_complete),
    C("F21", "the rest comes after the success", "move.early_success",
      ever("move.early_success", after=1), R.ACCEPT, methods=(BY_MOVE,)),
    C("F22", "a few are never sent", "move.drop_instances",
      ever("move.drop_instances", instances=2), R.FAIL, "instances-missing"),
    C("F22", "a few are not sent at first", "move.drop_instances",
      first("move.drop_instances", instances=2), R.MISSING),
    C("F23", "a failure with everything there (C000)", "move.fail_but_all",
      ever("move.fail_but_all"), R.ACCEPT),
    C("F23", "a failure with everything there (A702)", "move.fail_but_all",
      ever("move.fail_but_all", status=0xA702), R.ACCEPT),
    C("F24", "a failure with zero counters, and some arrived", "move.zero_counts",
      always(TWO_MISSING_ONCE, ("move.zero_counts", {"status": 0xC000, "times": 1})), R.MISSING),
    C("F25", "counters beyond their two bytes", "move.bad_counts",
      ever("move.bad_counts"), R.ACCEPT),
    C("F25", "counters that are as large as can be", "move.bad_counts",
      ever("move.bad_counts", counts=(0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF)), R.ACCEPT),
    C("F25", "no counters", "move.bad_counts",
      ever("move.bad_counts", counts=(None, None, None, None)), R.ACCEPT),
    C("F26", "no pending response", "move.no_pending", ever("move.no_pending"), R.ACCEPT),
    C("F26", "no pending response, and slow", "move.no_pending", slowly, R.ACCEPT,
      node={"timeouts": {"stall_seconds": 0.6}}),
    C("F27", "it stops at the first failure", "move.stop_at_failure",
      one_corrupt(stops=True), R.NARROW, "instances-missing",
      objects=studies(1, 12), look=corrupt_alone),
    C("F27", "it stops at the first of many failures", "move.stop_at_failure",
      many_corrupt, R.FAIL, "instances-missing", objects=studies(1, 60), look=all_others_came),
    C("F28", "no list of what failed", "move.failed_list", failed_list("absent"), R.MISSING),
    C("F28", "half a list of what failed", "move.failed_list",
      failed_list("incomplete"), R.MISSING),
    C("F28", "a list of others", "move.failed_list", failed_list("foreign"), R.MISSING),
    C("F28", "a list beyond 64 KiB", "move.failed_list", failed_list("too long"), R.MISSING),
    C("F29", "unknown UIDs are skipped", "pacs.mutate", delete_when_listed(2), R.ACCEPT,
      sent_again=True),
    C("F2A", "of a list of studies the first is sent", "move.no_list",
      ever("move.no_list"), R.SWITCH, objects=studies(8), look=one_uid_at_a_time,
      node={"limits": {"chunk_studies": 4}}),
    C("F2A", "a list of studies is refused", "move.no_list",
      ever("move.no_list", status=0xA900), R.SWITCH, objects=studies(8), look=one_uid_at_a_time,
      node={"limits": {"chunk_studies": 4}}),
    C("F2A", "of a list of instances the first is sent", "move.no_list",
      always(("move.drop_instances", {"instances": 4, "times": 1}), ("move.no_list", {})),
      R.SWITCH, look=one_uid_at_a_time),
    C("F2B", "requests for instances are refused", "move.no_image_level",
      always(TWO_MISSING_ONCE, ("move.no_image_level", {})), R.SWITCH,
      look=by_series, sent_again=True),
    C("F2B", "requests for instances bring the study", "move.no_image_level",
      always(TWO_MISSING_ONCE, ("move.no_image_level", {"status": None})), R.MISSING,
      sent_again=True),
    C("F2C", "others' studies come along", "store.unsolicited",
      lambda scene: [
          Behaviour("store.unsolicited", extra=list(tiny_instances(3, instances=2, seed=7)),
                    originator=True)
      ], R.QUARANTINE, sent_again=True),
    C("F2D", "one is corrupt on the PACS", "pacs.corrupt", one_corrupt(stops=False),
      R.NARROW, "instances-missing", look=corrupt_alone),
    *(
        C("F2E", f"C-GET {words}", "get.disabled", ever("get.disabled", status=status), R.SWITCH,
          methods=(BY_GET,), look=by_move)
        for words, status in NO_C_GET.items()
    ),
    C("F2F", "it stops at a class that was not proposed", "get.stop_on_class",
      always(("get.stop_on_class", {}), ("find.omit_keys", {"keys": ["SOPClassUID"]})),
      R.SWITCH, methods=(BY_GET,), objects=with_a_rare_class, look=classes_in_turn),
    *(
        C("F30", f"lost midway by {how}", "net.drop_after",
          first("net.drop_after", answers=3, how=how), R.MISSING)
        for how in ("abort", "close", "reset")
    ),
    C("F31", "slower than a stall, and no slower than allowed", "net.first_byte",
      lambda scene: [Behaviour("net.first_byte", hold=Pause(0.9), service=scene.service)],
      R.ACCEPT, node=STALL),
    C("F31", "slower than allowed, once", "net.first_byte",
      lambda scene: [
          Behaviour("net.first_byte", hold=scene.released, service=scene.service, times=1)
      ], R.MISSING, node=FIRST_BYTE),
    C("F31", "slower than allowed, always", "net.first_byte",
      lambda scene: [Behaviour("net.first_byte", hold=scene.released, service=scene.service)],
      R.FAIL, "association-stalled", methods=(BY_MOVE,), node=FIRST_BYTE),
    C("F31", "slower than allowed, always", "net.first_byte",
      lambda scene: [Behaviour("net.first_byte", hold=scene.released, service=scene.service)],
      R.FAIL, "pacs-silent", methods=(BY_GET,), node=FIRST_BYTE),
    C("F32", "silent midway", "net.stall_after",
      lambda scene: [
          Behaviour("net.stall_after", answers=2, hold=scene.released, times=1,
                    service=scene.service)
      ], R.MISSING, node=STALL),
    C("F33", "the connection leads nowhere", "net.blackhole",
      lambda scene: [Behaviour("net.blackhole", answers=2, service=scene.service, times=1)],
      R.MISSING, node=STALL),
    C("F34", "it thinks longer than any other waiting time of ours", "net.first_byte",
      lambda scene: [Behaviour("net.first_byte", hold=Pause(1.5), service=scene.service)],
      R.ACCEPT,
      node={"timeouts": {"acse_seconds": 0.7, "find_seconds": 0.7, "stall_seconds": 0.7}}),
    C("F35", "it goes on sending after we gave up", "move.keep_sending",
      goes_on_when_cancelled("ignore", ("move.keep_sending", {"times": 1})), R.ACCEPT,
      methods=(BY_MOVE,), node=STALL),
    C("F35", "it goes on sending after the association was lost", "move.keep_sending",
      always(("net.drop_after", {"answers": 2, "keep_sending": True, "times": 1})), R.ACCEPT,
      methods=(BY_MOVE,)),
    C("F36", "some come when the run is over", "move.late", late, R.MISSING,
      methods=(BY_MOVE,), look=late_ones_are_kept_apart, sent_again=True),
    C("F37", "Nagle's algorithm at the PACS", "net.nagle", nagling, R.ACCEPT,
      objects=studies(1, 40), look=never_waits_for_a_delayed_acknowledgement),
    C("F38", "a silent queue", "assoc.queue", queued, R.ACCEPT),
    C("F38", "one association at a time", "assoc.max",
      ever("assoc.max", associations=1), R.ACCEPT),
    C("F39", "a cancel changes nothing", "move.ignore_cancel",
      goes_on_when_cancelled("ignore"), R.ACCEPT, methods=(BY_MOVE,), node=STALL),
    C("F39", "a cancel is answered, and storing goes on", "move.ignore_cancel",
      goes_on_when_cancelled("answer"), R.ACCEPT, methods=(BY_MOVE,), node=STALL),
    C("F39", "a cancel is answered, and storing begins", "move.ignore_cancel",
      goes_on_when_cancelled("answer", after=0), R.ACCEPT, methods=(BY_MOVE,), node=FIRST_BYTE),
    C("F39", "a cancel is answered by an abort", "move.ignore_cancel",
      goes_on_when_cancelled("abort"), R.MISSING, methods=(BY_MOVE,), node=STALL),
    C("F3A", "maintenance begins between two studies", "pacs.restart",
      lambda scene: [
          Behaviour("pacs.restart", back=scene.released, on_request=2, service=scene.service)
      ], R.WAIT, "pacs-refused", objects=studies(3), node={"limits": {"chunk_studies": 1}}),
    C("F3B", "an association for each object", "move.many_assocs",
      ever("move.many_assocs"), R.ACCEPT, methods=(BY_MOVE,), objects=studies(1, 15)),
    C("F3C", "associations with nothing over them", "move.empty_assoc",
      ever("move.empty_assoc", associations=3), R.ACCEPT, methods=(BY_MOVE,)),
    C("F3C", "associations that stay open", "move.empty_assoc",
      ever("move.empty_assoc", associations=3, stay_open=True), R.ACCEPT, methods=(BY_MOVE,)),
    C("F3D", "all requests at once", "store.async_flood", ever("store.async_flood"), R.ACCEPT,
      objects=studies(1, 60)),
    C("F3D", "as many requests at once as are granted", "store.pipeline",
      ever("store.pipeline"), R.ACCEPT, objects=studies(1, 100), look=pipelined),
    C("F3D", "more requests at once than are granted", "store.pipeline",
      ever("store.pipeline", beyond=20), R.ACCEPT, objects=studies(1, 100)),
    C("F3D", "requests of many sizes at once", "store.pipeline",
      always(("store.pipeline", {}), ("store.huge", {"instances": 3, "mebibytes": 2})),
      R.ACCEPT, objects=studies(1, 12)),
    C("F3D", "an abort with requests outstanding", "store.pipeline",
      # The one that was broken off is sent again.
      first("store.pipeline", abort_within=8), R.MISSING, methods=(BY_MOVE,),
      objects=studies(1, 20), sent_again=True),
    C("F3E", "scanners and health checks", "net.stall_after", knocking, R.ACCEPT,
      methods=(BY_MOVE,)),
    C("F3F", "the PACS restarts and forgets the request", "pacs.restart",
      lambda scene: [Behaviour("pacs.restart", answers=3, times=1, service=scene.service)],
      R.MISSING),
    C("F3F", "the PACS goes down midway, and is away", "pacs.restart",
      goes_away(3), R.WAIT, "pacs-refused"),
)  # fmt: skip


def test_every_fault_is_in_the_table():
    assert sorted({case.fault for case in CASES}) == FAULTS
    assert {case.knob for case in CASES} <= KNOBS.keys()


# --- the play


@pytest.fixture
def around(tmp_path, standing, monkeypatch):
    """Builds the site: of objects, and what else :func:`~sites.site_around` takes."""
    monkeypatch.setattr(move, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(move, "_CANCEL_SECONDS", 0.3)
    monkeypatch.setattr(get, "_CANCEL_SECONDS", 0.3)
    return partial(site_around, tmp_path, standing=standing)


def wait_briefly(place: Place) -> None:
    """Between two tries of a node that fails for a transient reason."""
    place.file.write_text(place.file.read_text() + "\nretry_after_seconds: [0.05, 0.05]\n")


@contextlib.contextmanager
def played(around, case: Case, method: str) -> Iterator[Scene]:
    scene = Scene(case.objects(), method)
    timeouts = {"stall_seconds": 20, "settle_seconds": 0.3}
    node = {**case.node, "timeouts": timeouts | dict(case.node.get("timeouts", {}))}
    with around(scene.objects, retrieve=method, node=node) as place:
        scene.place = place
        wait_briefly(place)
        place.pacs.script.extend(case.script(scene))
        assert case.knob in {b.knob for b in place.pacs.script} | {"move.keep_sending"}
        try:
            yield scene
        finally:
            scene.released.set()


WITH_METHODS = [(case, method) for case in CASES for method in case.methods]


@pytest.mark.parametrize("play", subset(WITH_METHODS, 7), ids=lambda p: f"{p[0]}, {p[1]}")
def test_a_fault_gets_its_reaction_and_costs_nothing(around, play):
    case, method = play
    with played(around, case, method) as scene:
        place = scene.place
        if case.reaction in (Reaction.DISABLE, Reaction.WAIT):
            stays_pending(scene, case)
        else:
            ends_so(scene, case)
        check_requests(scene, case)
        place.audit()
        if case.look is not None:
            case.look(scene)
            place.audit()
        # The fault goes away.
        place.pacs.script.clear()
        scene.released.set()
        until(lambda: place.pacs._server is not None, "the PACS is back")
        if not case.rerun:
            return
        place.rerun()
        assert place.totals().rows == {Verdict.ARCHIVED: len(place.studies())}
        if not case.sent_again:
            only_missing_was_asked_for(scene)
        asked = place.asked_for()
        place.rerun()
        assert place.asked_for() == asked
        place.audit()


def ends_so(scene: Scene, case: Case) -> None:
    place = scene.place
    place.pull()
    number = len(place.studies())
    if case.end is None:
        assert place.reasons() == [("archived", None)] * number
        assert {v.verdict for v in place.verdicts()} == {Verdict.ARCHIVED}
    else:
        assert place.reasons() == [("failed", case.end)] * number
        came = any(not key.endswith("manifest.json") for key in place.archived())
        expected = Verdict.PARTIAL if came else Verdict.FAILED
        assert {v.verdict for v in place.verdicts()} == {expected}
        assert {v.reason for v in place.verdicts()} == {case.end}


def stays_pending(scene: Scene, case: Case) -> None:
    place = scene.place
    with place.opened() as pull, pytest.raises(PacsError) as caught:
        work_through(pull)
    assert caught.value.code == case.end
    operator = caught.value.disposition is Disposition.OPERATOR
    assert operator == (case.reaction is Reaction.DISABLE)
    assert "failed" not in {state for state, _ in place.reasons()}
    assert Verdict.PENDING in place.totals().rows


def check_requests(scene: Scene, case: Case) -> None:
    requests, sent = scene.retrieves(), scene.place.pacs.sent_instances()
    mine = [uid for uid in sent if uid in scene.uids]
    for request in requests:
        # Never a request that could select what nobody wants.
        for level in ("STUDY", "SERIES", "IMAGE")[: 1 + list(UNIQUE_KEYS).index(request.level)]:
            key = request.keys[UNIQUE_KEYS[level]]
            assert key and not set(key) & set("*?")
    match case.reaction:
        case Reaction.ACCEPT:
            if not case.sent_again:
                assert len(requests) == 1
                assert sorted(sent) == sorted(scene.uids)
        case Reaction.MISSING | Reaction.SWITCH:
            assert len(requests) > 1
        case Reaction.NARROW:
            assert scene.uids[4] in {r.keys.get("SOPInstanceUID") for r in requests}
        case Reaction.QUARANTINE:
            strangers = set(sent) - set(scene.uids)
            assert strangers
            assert len(scene.place.quarantined()) >= len(strangers)
            assert not any(uid in key for uid in strangers for key in scene.place.archived())
    if not case.sent_again:
        only_missing_was_asked_for(scene)
        assert len(mine) == len(set(mine))


def only_missing_was_asked_for(scene: Scene) -> None:
    """No request names an instance, or all of a series or study, that had come before it."""
    came: set[str] = set()
    for request in scene.retrieves():
        named = set(request.keys[UNIQUE_KEYS[request.level]].split("\\"))
        attribute = UNIQUE_KEYS[request.level]
        for uid in named:
            members = {o.sop_instance_uid for o in scene.objects if o.attributes[attribute] == uid}
            assert not members or members - came
        came |= {s.sop_instance_uid for s in request.sent if s.status == 0}


@pytest.mark.parametrize("words", subset(NO_C_GET, 1))
def test_a_c_get_that_is_refused_stops_the_node_where_nothing_can_be_received(tmp_path, words):
    disabled = Behaviour("get.disabled", status=NO_C_GET[words])
    objects = tiny_instances(3)
    with site_around(tmp_path, objects, retrieve="c-get", script=[disabled]) as place:
        assert not place.site.receives
        with pytest.raises(PacsError) as caught:
            place.pull()
        # The advice says which key of the site file to change, and to what.
        assert "retrieve: c-move" in reason_for(caught.value.code).advice
        assert place.asked_for("C-MOVE") == 0
        assert place.totals().rows == {Verdict.PENDING: 3}


@pytest.mark.parametrize("refused", ["assoc.contexts", "assoc.no_roles"])
def test_a_c_get_that_is_not_negotiated_is_switched_too(tmp_path, standing, refused):
    """For the whole run, and whatever is asked at the same time."""
    arguments = {"result": 3, "services": ["C-GET"]} if refused == "assoc.contexts" else {}
    script = [Behaviour(refused, **arguments)]
    objects = list(tiny_instances(6, instances=2))
    with site_around(
        tmp_path, objects, retrieve="c-get", script=script, standing=standing
    ) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 6}
        # A PACS that says nothing of roles may send all the same: that is tried once.
        assert place.asked_for("C-GET") == (refused == "assoc.no_roles")
        assert place.asked_for("C-MOVE") >= 1
        with place.ledger() as ledger:
            assert len(ledger.cohorts.notes(1)) == 1
        place.audit()


@pytest.mark.parametrize("method", BOTH)
def test_a_study_at_whose_first_instance_the_pacs_stops_still_gives_the_others(around, method):
    """Though it is one of many, and as a whole brings nothing."""
    objects = list(tiny_instances(3, instances=4))
    corrupt = objects[4].sop_instance_uid
    script = [
        Behaviour("pacs.corrupt", instances=[corrupt]),
        Behaviour("move.stop_at_failure"),
    ]
    with around(objects, retrieve=method, script=script) as place:
        place.pull()
        assert place.reasons().count(("archived", None)) == 2
        assert ("failed", "instances-missing") in place.reasons()
        missing = {
            o.sop_instance_uid
            for o in objects
            if not any(o.sop_instance_uid in key for key in place.archived())
        }
        assert missing == {corrupt}
        place.audit()
        place.pacs.script.clear()
        assert place.rerun().rows == {Verdict.ARCHIVED: 3}
        assert len(place.pacs.sent_instances()) == len(objects)
        place.audit()


# --- the statuses

STATUSES = (
    *(0x0001, 0x0105, 0x0106, 0x0107, 0x0110, 0x0111, 0x0112, 0x0113, 0x0114, 0x0115, 0x0116),
    *(0x0117, 0x0118, 0x0119, 0x0120, 0x0121, 0x0122, 0x0123, 0x0124, 0x0210, 0x0211, 0x0212),
    *(0x0213, 0xFE00, 0xB000, 0xB123, 0xA701, 0xA702, 0xA7FF, 0xA801, 0xA900, 0xA9FF, 0xAA00),
    *(0xAA01, 0xAA02, 0xAA03, 0xAA04, 0xC000, 0xC001, 0xCFFF, 0x0300, 0xD000),
)
"""All of PS3.7 Annex C and PS3.4 C.4.2.1.5 and C.4.3.1.4, and some that are in no table."""

WITH_STATUSES = [(status, method) for status in STATUSES for method in BOTH]


@pytest.mark.parametrize("answer", subset(WITH_STATUSES, 2), ids=lambda a: f"{a[0]:04X}, {a[1]}")
@pytest.mark.parametrize("arrived", ["nothing", "some", "all"])
def test_a_status_is_believed_no_further_than_what_arrived(around, answer, arrived):
    """With nothing arrived it is the reason; with some or all it only says that it is over."""
    status, method = answer
    objects = list(tiny_instances(1, instances=4))
    service = method.upper()
    with around(objects, retrieve=method, node={"timeouts": {"settle_seconds": 0.1}}) as place:
        wait_briefly(place)
        if arrived == "nothing":
            place.pacs.script.append(Behaviour("move.refuse", status=status))
            code = reason_for_status(service, status) or "nothing-arrived"
            disables = reason_for(code).disposition is Disposition.OPERATOR
            if code == "pacs-busy" or disables and code != "move-destination-failed":
                with pytest.raises(PacsError, match=code):
                    place.pull()
                assert place.reasons() == [("listed", None)]
            else:
                place.pull()
                assert place.reasons() == [("failed", code)]
            assert place.archived() == {}
            place.pacs.script.clear()
            with place.opened() as pull:
                pull.ledger.cohorts.reopen(1, reasons=[code])
                work_through(pull)
        else:
            if arrived == "some":
                place.pacs.script.append(Behaviour(*TWO_MISSING_ONCE[:1], **TWO_MISSING_ONCE[1]))
            place.pacs.script.append(Behaviour("move.final_status", status=status, times=1))
            place.pull()
            requests = place.pacs.requests(service)
            assert len(requests) == (1 if arrived == "all" else 2)
            assert requests[0].status == status
            assert len(place.pacs.sent_instances()) == 4
        assert place.totals().rows == {Verdict.ARCHIVED: 1}
        place.audit()
