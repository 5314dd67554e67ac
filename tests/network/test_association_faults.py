"""Every failure of an association is reported with its cause, and costs no row.

:data:`CASES` is the table: what the scripted PACS does to connections and associations, the
reason that must come of it, and what is done next. Rejections and aborts are tables of numbers.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import Verdict
from prefect_dicom.network import requestor
from prefect_dicom.operations.doctor import examine
from prefect_dicom.run.loop import work_through
from prefect_dicom.testing import Behaviour, tiny_instances
from prefect_dicom.testing.knobs_association import ASSOCIATION_KNOBS
from tests.support.campaign import subset
from tests.support.peers import free_port
from tests.support.sites import Place, site_around, until_it_listens

pytestmark = pytest.mark.campaign("PACS: association")

HELD = list(tiny_instances(2, instances=2))
PATIENT = {"timeouts": {"connect_seconds": 10, "acse_seconds": 10, "find_seconds": 10}}
QUICK = {"timeouts": {"connect_seconds": 0.5, "acse_seconds": 0.5}}
"""Where silence is met. Elsewhere a busy machine must not look like a silent PACS."""


@pytest.fixture
def around(tmp_path: Path):
    """Builds a site that asks by C-GET, which needs no receiver."""
    return partial(site_around, tmp_path, HELD, retrieve="c-get", node=PATIENT)


# --------------------------------------------------------------------------------- the table

STOPPED, WAITED = "stopped", "waited"
"""Nothing more is sent until a person has acted; or the node is waiting."""


@dataclass(frozen=True)
class Case:
    """What the PACS does, and the reaction that must be seen."""

    story: str
    knobs: tuple[tuple[str, Mapping[str, Any]], ...]
    code: str | None
    """The reason; None: the pull is complete all the same."""
    then: str = STOPPED
    detail: str = ""
    """Words that the error has."""
    connections: int | None = None
    """How many connections were opened until it was given up."""
    answered: Callable[[Place], None] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return self.story


def knob(name: str, **arguments: Any) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return ((name, arguments),)


def nothing_was_asked(place: Place) -> None:
    assert place.asked_for() == 0


CASES = [
    # --- TCP
    Case(
        "goes down for ever as the first connection comes",
        knob("net.refuse", back="never"),
        "pacs-refused",
        WAITED,
        connections=1,
        answered=nothing_was_asked,
    ),
    Case(
        "resets one connection",
        knob("net.reset", on_request=1),
        None,
    ),
    Case(
        "resets every connection",
        knob("net.reset"),
        "pacs-reset",
        answered=nothing_was_asked,
    ),
    Case("speaks TLS", knob("net.tls"), "pacs-reset", answered=nothing_was_asked),
    Case(
        "accepts a connection and is silent",
        knob("assoc.silent", hold="never"),
        "pacs-silent",
        WAITED,
        connections=1,
        answered=nothing_was_asked,
    ),
    # --- presentation contexts
    *(
        Case(
            f"refuses all contexts with result {result}",
            knob("assoc.contexts", result=result),
            "service-not-offered",
            answered=nothing_was_asked,
        )
        for result in (1, 2, 3, 4)
    ),
    *(
        Case(
            f"refuses the contexts of queries with result {result}",
            knob("assoc.contexts", result=result, services=["C-FIND"]),
            "service-not-offered",
            detail=f"C-FIND: context result {result}",
            answered=nothing_was_asked,
        )
        for result in (1, 2, 3, 4)
    ),
    *(
        Case(
            f"refuses the contexts of C-GET with result {result}",
            knob("assoc.contexts", result=result, services=["C-GET"]),
            "service-not-offered",
        )
        for result in (1, 2, 3, 4)
    ),
    Case(
        "accepts the association and no context",
        knob("assoc.no_contexts"),
        "service-not-offered",
        connections=1,
    ),
    # --- the end of connections
    *(
        Case(
            f"drops the connection ({how}) {words}",
            knob("assoc.drop", when=when, how=how, **limits),
            code,
            then,
        )
        for how in ("close", "reset")
        for words, when, limits, code, then in (
            ("once, instead of an answer", "instead", {"on_request": 1}, None, ""),
            ("once, after the acceptance", "accepted", {"on_request": 1}, None, ""),
            ("once, at the first request", "request", {"on_request": 1}, None, ""),
            ("always, instead of an answer", "instead", {}, "pacs-reset", STOPPED),
        )
    ),
    Case(
        "accepts one association at a time, and one more comes for the retrieval",
        knob("assoc.max", associations=1),
        None,
    ),
    Case("accepts two associations at a time", knob("assoc.max", associations=2), None),
]


def test_every_knob_of_associations_is_in_a_table():
    used = {name for case in CASES for name, _ in case.knobs}
    used |= {"assoc.reject", "assoc.abort", "assoc.no_roles", "assoc.items"}
    assert used == {knob.name for knob in ASSOCIATION_KNOBS}


# ------------------------------------------------------------------------------- the reaction


def scripted(knobs, never: threading.Event) -> list[Behaviour]:
    return [
        Behaviour(name, **{k: never if v == "never" else v for k, v in arguments.items()})
        for name, arguments in knobs
    ]


def meets(place: Place, code: str, then: str, detail: str = "") -> None:
    """Pull until the fault is met; nothing that was to be done may be lost by it."""
    with place.opened() as pull:
        with pytest.raises(PacsError) as error:
            work_through(pull)
        assert error.value.code == code
        assert detail in error.value.detail
        admission = pull.access.admission("pacs")
        if then == STOPPED:
            assert admission.disabled_for == code
            before = place.pacs.connections
            # Nothing is sent any more: requests raise the reason.
            with pytest.raises(PacsError):
                work_through(pull)
            assert place.pacs.connections == before
        else:
            assert admission.disabled_for is None
            assert admission.waiting_for == code
    assert {v.verdict for v in place.verdicts()} == {Verdict.PENDING}


def doctor_names(place: Place, code: str) -> None:
    (fault,) = [f for f in examine(place.site) if f.part == "pacs" and not f.ok]
    assert f"({code}" in fault.words
    assert fault.advice


def goes_down(place: Place) -> None:
    """Connect, which brings it down: who connects at that moment may still see a connection."""
    address = ("127.0.0.1", place.pacs.port)
    with (
        pytest.raises(ConnectionResetError),
        socket.create_connection(address, 5) as connection,
    ):
        connection.recv(1)


def is_pulled_when_it_is_over(place: Place, never: threading.Event) -> None:
    place.pacs.script.clear()
    never.set()
    until_it_listens(place.pacs.port)
    assert place.pull().rows == {Verdict.ARCHIVED: 2}
    place.audit()


@pytest.mark.parametrize("case", subset(CASES, 6), ids=str)
def test_a_fault_of_the_association_gets_its_reaction(case, around):
    never = threading.Event()
    with around(script=scripted(case.knobs, never)) as place:
        try:
            if case.code is None:
                assert place.pull().rows == {Verdict.ARCHIVED: 2}
                place.audit()
                return
            if case.code == "pacs-silent":
                place.change(node=QUICK)
            meets(place, case.code, case.then, case.detail)
            place.change(node=PATIENT)
            if case.connections is not None:
                assert place.pacs.connections == case.connections
            if case.answered is not None:
                case.answered(place)
            is_pulled_when_it_is_over(place, never)
        finally:
            never.set()


class _NoticedAtOnce(requestor.Association):
    """An association whose end is there before anybody looks at it for the first time."""

    def look(self) -> None:
        self._reader.wait(time.monotonic() + 10)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_an_association_that_ends_as_it_begins_is_no_refusal_of_services(how, around, monkeypatch):
    drop = Behaviour("assoc.drop", when="accepted", how=how, on_request=1)
    with around(script=[drop]) as place, monkeypatch.context() as patch:
        patch.setattr(requestor, "Association", _NoticedAtOnce)
        with (
            requestor.Requestor(place.site.nodes["pacs"]) as opened,
            pytest.raises(PacsError) as error,
        ):
            opened.open()
        assert error.value.code == "pacs-reset"


@pytest.mark.parametrize(
    "case",
    subset([c for c in CASES if c.code and "C-GET" not in c.story], 2),
    ids=str,
)
def test_the_doctor_names_a_fault_of_the_association(case, around):
    never = threading.Event()
    with around(script=scripted(case.knobs, never)) as place:
        try:
            if case.code == "pacs-silent":
                place.change(node=QUICK)
            if case.code == "pacs-refused":
                goes_down(place)
            doctor_names(place, case.code)
        finally:
            never.set()


# ------------------------------------------------------------- where nothing of the PACS is met


def test_a_host_name_that_does_not_resolve(around):
    with around() as place:
        place.change(node={"host": "no-such-host.invalid"})
        meets(place, "pacs-address", STOPPED)
        doctor_names(place, "pacs-address")
        place.change(node={"host": "127.0.0.1"})
        assert place.pull().rows == {Verdict.ARCHIVED: 2}


def test_a_port_where_nothing_listens(around):
    with around() as place:
        place.change(node={"port": free_port()})
        meets(place, "pacs-refused", WAITED)
        doctor_names(place, "pacs-refused")
        place.change(node={"port": place.pacs.port})
        assert place.pull().rows == {Verdict.ARCHIVED: 2}


@contextlib.contextmanager
def full_queue() -> Iterator[int]:
    """A listener whose queue is full: Linux drops what comes, as a firewall does."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_an_address_that_drops_what_comes(around):
    with around() as place, full_queue() as port:
        place.change(node={"port": port, **QUICK})
        meets(place, "pacs-unreachable", WAITED)
        doctor_names(place, "pacs-unreachable")


# ---------------------------------------------------------------------------- A-ASSOCIATE-RJ

TITLE_OF_OURS, TITLE_OF_THEIRS = "calling-ae-title-unknown", "called-ae-title-unknown"
NO_PEER, NO_REASON, BUSY = "protocol-not-supported", "association-rejected", "pacs-busy"

REJECTIONS = {
    # PS3.8 table 9-21: result, source, reason.
    (1, 1, 1): NO_REASON,
    (1, 1, 2): NO_PEER,
    (1, 1, 3): TITLE_OF_OURS,
    (1, 1, 7): TITLE_OF_THEIRS,
    (1, 2, 1): NO_REASON,
    (1, 2, 2): NO_PEER,
    # Vendors set the result carelessly: a limit is one that passes.
    (1, 3, 1): BUSY,
    (1, 3, 2): BUSY,
    (2, 1, 1): BUSY,
    (2, 1, 2): BUSY,
    (2, 1, 3): NO_REASON,
    (2, 1, 7): NO_REASON,
    (2, 2, 1): BUSY,
    (2, 2, 2): BUSY,
    (2, 3, 1): BUSY,
    (2, 3, 2): BUSY,
    # Reserved, and outside of the standard.
    **{(1, 1, reason): NO_REASON for reason in (0, 4, 5, 6, 8, 9, 10, 255)},
    **{(2, 1, reason): BUSY for reason in (0, 4, 5, 6, 8, 9, 10, 255)},
    **{(1, 2, reason): NO_REASON for reason in (0, 3, 255)},
    **{(1, 3, reason): NO_REASON for reason in (0, 3, 4, 5, 6, 7, 255)},
    **{(2, 3, reason): BUSY for reason in (0, 3, 4, 5, 6, 7, 255)},
    **{(result, 3, 1): BUSY for result in (0, 3, 255)},
    **{(result, 1, 1): NO_REASON for result in (0, 3, 255)},
    **{(1, source, 1): NO_REASON for source in (0, 4, 255)},
    (255, 255, 255): NO_REASON,
}


@pytest.mark.parametrize("numbers", subset(REJECTIONS, 3), ids=str)
def test_a_rejection_is_reported_by_its_three_numbers(numbers, around):
    code = REJECTIONS[numbers]
    words = dict(zip(("result", "source", "reason"), numbers, strict=True))
    with around(script=[Behaviour("assoc.reject", **words)]) as place:
        said = f"rejected ({numbers[0]},{numbers[1]},{numbers[2]})"
        # What may pass is waited for, and the numbers are reported when no time is left.
        meets(place, code, WAITED if code in (BUSY, NO_REASON) else STOPPED, said)
        assert place.pacs.connections == 1
        nothing_was_asked(place)
        is_pulled_when_it_is_over(place, threading.Event())


# ------------------------------------------------------------------------------------ A-ABORT

LOST, NO_PERMISSION = "association-lost", "not-permitted"
ABORTS = {
    (0, 0): NO_PERMISSION,
    (0, 1): NO_PERMISSION,
    (2, 0): LOST,
    (2, 1): LOST,
    (2, 2): LOST,
    (2, 3): LOST,
    (2, 4): NO_PEER,
    (2, 5): NO_PEER,
    (2, 6): NO_PEER,
    (1, 0): LOST,
    (9, 200): LOST,
}
"""PS3.8 9.3.8, source and reason: what it means in answer to the very first request."""


@pytest.mark.parametrize("when", ["instead", "accepted", "request"])
@pytest.mark.parametrize("numbers", subset(ABORTS, 2), ids=str)
def test_an_abort_at_the_beginning_is_reported_by_its_two_numbers(numbers, when, around):
    code = ABORTS[numbers]
    source, reason = numbers
    script = [Behaviour("assoc.abort", when=when, source=source, reason=reason)]
    with around(script=script) as place:
        if code != LOST:
            meets(place, code, STOPPED, f"aborted ({source},{reason})")
            assert place.pacs.connections == 1
        elif when == "instead":
            # No question has been asked yet: it is the node's, and it has never worked.
            meets(place, "pacs-reset", STOPPED, f"aborted ({source},{reason})")
            assert place.pacs.connections == 2, "once more at once"
        elif when == "accepted":
            # It meets us before our first question or behind it; either way no row is lost.
            with contextlib.suppress(PacsError):
                place.pull()
            found = {(v.verdict, v.reason) for v in place.verdicts()}
            assert found <= {(Verdict.FAILED, LOST), (Verdict.PENDING, "interrupted")}
        else:
            # It may be this one question: each row is asked, twice, and says so.
            place.pull()
            assert {(v.verdict, v.reason) for v in place.verdicts()} == {(Verdict.FAILED, LOST)}
            assert place.pacs.connections == 4
        place.pacs.script.clear()
        with place.ledger() as ledger:
            ledger.cohorts.reopen(1)
        assert place.pull().rows == {Verdict.ARCHIVED: 2}
        place.audit()


@pytest.mark.parametrize(
    "numbers", subset([pair for pair, code in ABORTS.items() if code == LOST], 1), ids=str
)
def test_an_abort_once_costs_one_association_more(numbers, around):
    source, reason = numbers
    abort = Behaviour("assoc.abort", when="request", source=source, reason=reason, times=1)
    with around(script=[abort]) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 2}
        assert abort.used == 1
        place.audit()


@pytest.mark.parametrize("numbers", subset(ABORTS, 2), ids=str)
@pytest.mark.parametrize("answers", [0, 1])
def test_an_abort_later_is_no_lack_of_permission_and_costs_one_association(
    numbers, answers, around
):
    source, reason = numbers
    drop = {"answers": answers, "source": source, "reason": reason}
    later = Behaviour("net.drop_after", service="C-FIND", on_request=2, **drop)
    with around(script=[later]) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 2}
        assert later.used == 1
        place.audit()


@pytest.mark.parametrize("how", ["abort", "close", "reset"])
def test_a_query_under_which_associations_always_end_ends_its_own_row(how, around):
    last = HELD[-1].study_instance_uid
    broken = Behaviour("net.drop_after", answers=1, how=how, study=last, service="C-FIND")
    with around(script=[broken]) as place:
        assert place.pull().rows == {Verdict.ARCHIVED: 1, Verdict.FAILED: 1}
        assert [v.reason for v in place.verdicts()] == ["all-archived", LOST]
        place.audit()


# ------------------------------------------------------------------- what only retrievals meet


def test_an_archive_that_ignores_roles_brings_nothing_by_c_get_and_says_so(around):
    with around(script=[Behaviour("assoc.no_roles")]) as place:
        place.pull()
        assert {(v.verdict, v.reason) for v in place.verdicts()} == {
            (Verdict.FAILED, "sop-classes-refused")
        }
        assert place.archived() == {}


@pytest.mark.parametrize("result", [1, 2, 3, 4])
def test_storage_classes_that_are_refused_are_named_as_the_cause(result, around):
    script = [Behaviour("assoc.contexts", result=result, services=["C-STORE"])]
    with around(script=script) as place:
        place.pull()
        assert {v.reason for v in place.verdicts()} == {"sop-classes-refused"}


@pytest.mark.parametrize("result", [1, 2, 3, 4])
def test_a_retrieve_service_that_is_refused_stops_the_node(result, tmp_path, standing):
    script = [Behaviour("assoc.contexts", result=result, services=["C-MOVE"])]
    with site_around(tmp_path, HELD, script=script, standing=standing) as place:
        meets(place, "service-not-offered", STOPPED, f"C-MOVE: context result {result}")
        assert place.asked_for("C-MOVE") == 0
        place.pacs.script.clear()
        assert place.pull().rows == {Verdict.ARCHIVED: 2}


# ------------------------------------------------------------------------- by lot, and together


def test_associations_that_fail_by_lot_cost_no_study(around, scale, seed):
    for number in range(scale(1, 40)):
        lots = {"probability": 0.15, "seed": seed + number}
        script = [
            Behaviour("net.reset", **lots),
            Behaviour("assoc.drop", when="accepted", **lots),
            Behaviour("assoc.abort", when="request", source=2, reason=0, **lots),
            Behaviour("net.drop_after", answers=1, how="close", **lots),
        ]
        with around(script=script) as place:
            with place.file.open("a") as file:
                file.write("retry_after_seconds: [0, 0, 0, 0]\n")
            for _ in range(30):
                with contextlib.suppress(PacsError):
                    place.pull()
                    break
            place.pacs.script.clear()
            place.rerun()
            assert place.totals().rows == {Verdict.ARCHIVED: 2}
            place.audit()
        clear(place.folder)


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
