"""A node that is strained is asked for less at a time, and for more again when it is not.

And one that has failed is probed before a study's request is spent on it. The admission is walked
by hand, in tables and around a PACS over real sockets.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import islice

import pytest

from prefect_dicom.admission.circuit_breaker import BreakerState
from prefect_dicom.admission.concurrency_limit import EASE_SECONDS
from prefect_dicom.admission.health import RequestKind
from prefect_dicom.admission.node import NodeAdmission
from prefect_dicom.cli.status import status
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.events import Event
from prefect_dicom.core.model import Chunk
from prefect_dicom.run.run import Run
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.campaign import subset
from tests.support.sites import Place, site_around
from tests.support.walking import Walk

WAITS = (30, 60)


class Time:
    """A clock of a test's own."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def reported() -> list:
    return []


@pytest.fixture
def admission(time, reported) -> NodeAdmission:
    def listen(name, code, figures) -> None:
        reported.append((name, code, figures.get("associations")))

    return NodeAdmission(WAITS, 8, now=time, jitter=lambda: 1.0, on_change=listen)


def usual(
    admission: NodeAdmission, seconds: float = 0.5, kind: RequestKind = RequestKind.RETRIEVE
) -> None:
    """Ten requests that take as long as they always do."""
    for study in range(100, 110):
        admission.record_latency(kind, seconds, study)


# --- less at a time


@pytest.mark.parametrize("code", ["pacs-busy", "nothing-arrived", "association-stalled"])
def test_signs_of_strain_from_three_studies_halve_what_is_asked_for(admission, reported, code):
    widths = []
    for study in range(1, 10):
        admission.record_strain(RequestKind.RETRIEVE, code, study)
        widths.append(admission.associations)
    assert widths == [8, 8, 4, 4, 4, 2, 2, 2, 1]
    assert reported == [("node.narrowed", code, width) for width in (4, 2, 1)]
    for study in range(10, 20):
        admission.record_strain(RequestKind.RETRIEVE, code, study)
    assert admission.associations == 1 and len(reported) == 3


def test_one_study_that_shows_them_again_and_again_is_at_fault_itself(admission):
    for _ in range(50):
        admission.record_strain(RequestKind.RETRIEVE, "nothing-arrived", 7)
    assert admission.associations == 8


def test_signs_that_are_rare_are_those_of_studies(admission):
    for study in range(300):
        if study % 5:
            admission.record_latency(RequestKind.RETRIEVE, 0.1, study)
        else:
            admission.record_strain(RequestKind.RETRIEVE, "nothing-arrived", study)
    assert admission.associations == 8


# What requests usually take to begin, how long three then take, and whether that is slow.
TIMES = [
    (0.5, 3.0, True),
    (0.5, 2.9, False),
    (0.01, 2.9, False),
    (0.01, 3.0, True),
    (2.0, 7.9, False),
    (2.0, 8.0, True),
    (600.0, 1200.0, False),
    (600.0, 2400.0, True),
]


@pytest.mark.parametrize("kind", RequestKind)
@pytest.mark.parametrize(("before", "then", "slow"), TIMES)
def test_slow_is_what_takes_several_times_the_usual_of_the_node(
    admission, kind, before, then, slow
):
    usual(admission, before, kind)
    for study in range(3):
        admission.record_latency(kind, then, study)
    assert admission.associations == (4 if slow else 8)
    assert admission.strained_for == ("pacs-slow" if slow else None)


def test_a_single_slow_study_changes_nothing(admission):
    usual(admission)
    for _ in range(40):
        admission.record_latency(RequestKind.RETRIEVE, 1800.0, 7)
    assert admission.associations == 8


def test_nothing_is_slow_before_it_is_known_what_is_usual(admission):
    for study in range(7):
        admission.record_latency(RequestKind.RETRIEVE, 100.0 * study, study)
    assert admission.associations == 8


def test_queries_are_not_compared_with_retrieves(admission):
    usual(admission, 0.01, RequestKind.QUERY)
    usual(admission, 60.0, RequestKind.RETRIEVE)
    for study in range(10):
        admission.record_latency(RequestKind.RETRIEVE, 90.0, study)
    assert admission.associations == 8


def test_what_stays_slow_becomes_the_usual(admission, time):
    usual(admission)
    for study in range(500):
        time.now += 20
        admission.record_latency(RequestKind.RETRIEVE, 20.0, study)
        admission.record_delivery()
    assert admission.associations == 8 and admission.strained_for is None


def test_it_recovers_by_one_after_each_time_without_strain(admission, time, reported):
    for study in range(6):
        admission.record_strain(RequestKind.RETRIEVE, "nothing-arrived", study)
    assert admission.associations == 2
    walked = []
    for _ in range(8):
        time.now += EASE_SECONDS - 1
        admission.record_success()
        walked.append(admission.associations)
        time.now += 1
        admission.record_success()
        walked.append(admission.associations)
    assert walked == [2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 8, 8, 8]
    assert [words for words in reported if words[0] == "node.widened"] == [
        ("node.widened", None, width) for width in range(3, 9)
    ]
    assert admission.strained_for is None


def test_strain_puts_the_recovery_off(admission, time):
    for study in range(3):
        admission.record_strain(RequestKind.RETRIEVE, "nothing-arrived", study)
    time.now += EASE_SECONDS - 1
    for study in range(3):
        admission.record_strain(RequestKind.RETRIEVE, "nothing-arrived", study)
    time.now += EASE_SECONDS - 1
    admission.record_success()
    assert admission.associations == 2


def test_time_alone_recovers_nothing(admission, time):
    for study in range(3):
        admission.record_strain(RequestKind.RETRIEVE, "nothing-arrived", study)
    time.now += 10 * EASE_SECONDS
    assert admission.associations == 4


def test_a_refusal_for_want_of_resources_halves_at_once(admission, time):
    admission.record_failure("pacs-busy", time())
    time.now += 30
    widths = []
    for _ in range(6):
        admission.record_success()
        widths.append(admission.associations)
    assert widths == [2, 3, 4, 4, 4, 4]
    time.now += EASE_SECONDS
    admission.record_success()
    assert admission.associations == 5


# --- the breaker


def test_a_failure_opens_it_a_probe_half_opens_it_and_a_success_closes_it(
    admission, time, reported
):
    assert admission.state is BreakerState.CLOSED and admission.try_acquire()
    admission.record_failure("pacs-refused", time())
    assert admission.state is BreakerState.OPEN
    assert not admission.begin_probe() and not admission.try_acquire()
    time.now += 30
    assert not admission.try_acquire()
    assert admission.begin_probe()
    assert not admission.begin_probe()
    admission.end_probe(answered=True)
    assert admission.state is BreakerState.HALF_OPEN
    assert admission.try_acquire()
    admission.record_success()
    assert admission.state is BreakerState.CLOSED
    assert [name for name, *_ in reported] == ["breaker.opened", "breaker.closed"]


def test_a_probe_that_fails_opens_it_again_with_the_next_wait(admission, time):
    admission.record_failure("pacs-refused", time())
    time.now += 30
    assert admission.begin_probe()
    admission.record_failure("pacs-refused", time())
    admission.end_probe(answered=False)
    assert admission.state is BreakerState.OPEN and admission.seconds_left() == 60
    time.now += 60
    assert admission.begin_probe()
    admission.record_failure("pacs-refused", time())
    admission.end_probe(answered=False)
    assert admission.state is BreakerState.DISABLED and admission.disabled_for == "pacs-refused"
    assert not admission.try_acquire()


def test_a_request_that_fails_after_a_probe_was_answered_opens_it_again(admission, time):
    admission.record_failure("pacs-silent", time())
    time.now += 30
    assert admission.begin_probe()
    admission.end_probe(answered=True)
    assert admission.try_acquire()
    admission.record_failure("pacs-silent", time())
    assert admission.state is BreakerState.OPEN and admission.seconds_left() == 60


def test_while_it_is_half_open_one_thread_asks_at_a_time(admission, time):
    admission.record_failure("pacs-silent", time())
    time.now += 30
    assert admission.begin_probe()
    admission.end_probe(answered=True)

    def in_another_thread() -> bool:
        may = []
        thread = threading.Thread(target=lambda: may.append(admission.try_acquire()))
        thread.start()
        thread.join()
        return may[0]

    assert admission.try_acquire() and admission.try_acquire()
    assert not in_another_thread()
    admission.release()
    # Which had nothing to say of the node: the next one tries.
    assert in_another_thread()
    assert not admission.try_acquire()
    admission.record_success()
    assert admission.try_acquire() and in_another_thread()


def test_what_was_asked_for_before_a_failure_does_not_close_it(admission, time):
    admission.record_failure("pacs-refused", time())
    time.now += 5
    admission.record_delivery()
    assert admission.state is BreakerState.OPEN and admission.seconds_left() == 25
    assert admission.associations == 1


def test_a_rest_between_passes_needs_no_probe(admission):
    assert admission.delay_next_pass(1)
    assert admission.state is BreakerState.CLOSED and not admission.begin_probe()


# --- around a PACS


class Gate(threading.Event):
    """Holds requests at the PACS until as many are there as are asked for at a time."""

    def __init__(self, walk: Walk) -> None:
        super().__init__()
        self._walk = walk
        self._lock = threading.Lock()
        self._inside: set[int] = set()
        self.slow_seconds = 0.0
        self.expected = 0

    def expect(self, requests: int) -> None:
        self.clear()
        self._inside.clear()
        self.expected = requests

    def wait(self, timeout: float | None = None) -> bool:
        with self._lock:
            self._inside.add(threading.get_ident())
            if len(self._inside) == self.expected and not self.is_set():
                self._walk.seconds += self.slow_seconds
                self.set()
        return super().wait(timeout)


class Counting(threading.Event):
    """Counts the requests by association, and holds them until something is so."""

    def __init__(self, is_so: Callable[[], bool]) -> None:
        super().__init__()
        self.answered: Counter[int] = Counter()
        self._is_so = is_so

    def wait(self, timeout: float | None = None) -> bool:
        if not self._is_so():
            return super().wait(timeout)
        self.answered[threading.get_ident()] += 1
        return True


@pytest.fixture
def walk() -> Walk:
    return Walk()


def site(folder, objects, script=(), associations=4) -> AbstractContextManager[Place]:
    limits = {"associations": associations, "chunk_studies": 1}
    return site_around(folder, objects, script=script, retrieve="c-get", node={"limits": limits})


def strain_by_delay(gate: Gate, place: Place, studies: list[str]) -> None:
    gate.slow_seconds = 30.0


def strain_by(knob: str, **arguments):
    """Each of the studies is refused once; asked for again, it comes."""

    def strain(gate: Gate, place: Place, studies: list[str]) -> None:
        place.pacs.script.extend(
            Behaviour(knob, service="C-GET", study=uid, times=1, **arguments) for uid in studies
        )

    return strain


STRAINS = {
    "slow": (strain_by_delay, "pacs-slow"),
    "out of resources": (strain_by("move.final_status", status=0xA701), "pacs-busy"),
    "empty success": (strain_by("move.success_nothing"), "nothing-arrived"),
}


@pytest.mark.campaign("operations")
@pytest.mark.parametrize("strain", subset(STRAINS, ["out of resources"]))
def test_fewer_associations_stand_at_a_strained_pacs_and_then_more_again(
    tmp_path, walk, strain, capsys
):
    cause, code = STRAINS[strain]
    gate = Gate(walk)
    script = [Behaviour("net.first_byte", service="C-GET", hold=gate)]
    reported: list[Event] = []
    with site(tmp_path, tiny_instances(19), script) as place, place.opened(clock=walk) as pull:
        pull.events.subscribe(reported.append)
        for pages in pull.discovery.pages():
            pull.discovery.discover(*pages)
        admission, chunks = pull.access.admission("pacs"), pull.chunks.chunks()
        uids = {s.reference: uid for uid, s in place.studies().items()}
        walked = []

        def asked_at_a_time() -> int:
            """As the flow does: as many chunks at a time as the admission allows."""
            together = list(islice(chunks, admission.associations))
            gate.expect(len(together))
            if cause is not strain_by_delay and len(walked) == 1:
                cause(gate, place, [uids[c.studies[0]] for c in together[:3]])
            with ThreadPoolExecutor(len(together)) as pool:
                for ended in [pool.submit(bring, pull, chunk) for chunk in together]:
                    ended.result()
            return len(together)

        usual(admission)
        walked.append(asked_at_a_time())
        if cause is strain_by_delay:
            cause(gate, place, [])
        walked.append(asked_at_a_time())
        gate.slow_seconds = 0.0
        walked.append(asked_at_a_time())
        with place.ledger() as ledger:
            (run,) = ledger.runs.under_way(1)
        assert (
            run.waits
            == pull.reporting.format_waits()
            == f"node pacs: asked for 2 of 4 at a time ({code})"
        )
        status(site=str(place.file))
        assert run.waits in capsys.readouterr().out
        for _ in range(3):
            walk.seconds += EASE_SECONDS
            walked.append(asked_at_a_time())
        # Each was held until all of its round were there, at the same time.
        assert walked == [4, 4, 2, 2, 3, 4]
        assert pull.reporting.format_waits() == ""
        place.audit()
    of_node = [(e.name, e.reason, dict(e.figures)) for e in reported if e.name.startswith("node")]
    assert of_node == [
        ("node.narrowed", code, {"associations": 2}),
        ("node.widened", None, {"associations": 3}),
        ("node.widened", None, {"associations": 4}),
    ]
    archived = [event.reference for event in reported if event.name == "study.archived"]
    assert len(archived) == len(set(archived)) == sum(walked)


def test_discovery_goes_on_over_fewer_associations_where_the_node_is_slow(tmp_path, walk):
    gate = Gate(walk)
    gate.expect(4)
    gate.slow_seconds = 30.0
    with site(tmp_path, tiny_instances(60)) as place, place.opened(clock=walk) as pull:
        pull.discovery.capabilities("pacs").answers_lists = False
        admission = pull.access.admission("pacs")
        usual(admission, kind=RequestKind.QUERY)
        counting = Counting(lambda: admission.associations == 2)
        place.pacs.script += [
            Behaviour("net.first_byte", service="C-FIND", hold=counting),
            Behaviour("net.first_byte", service="C-FIND", hold=gate, times=4),
        ]
        for pages in pull.discovery.pages():
            pull.discovery.discover(*pages)
        # Four rows were slow at the same time: three are enough to ask for half as much.
        assert pull.reporting.format_waits() == "node pacs: asked for 2 of 4 at a time (pacs-slow)"
        assert place.totals().unasked == 0
        # Two of the four associations had been lent another question by then, at the most.
        others = sorted(counting.answered.values())[:-2]
        assert counting.answered.total() == 60 - 4 and sum(others) <= 2


def bring(pull: Run, chunk: Chunk) -> None:
    pull.retrieval.retrieve(chunk)
    pull.archiving.archive(chunk)


BUSY = {"result": 2, "source": 3, "reason": 2}


@pytest.mark.parametrize("rejected", [1, 2])
def test_a_node_that_failed_is_probed_before_a_study_is_asked_for(tmp_path, walk, rejected):
    reported: list[Event] = []
    with site(tmp_path, tiny_instances(3)) as place, place.opened(clock=walk) as pull:
        pull.events.subscribe(reported.append)
        for pages in pull.discovery.pages():
            pull.discovery.discover(*pages)
        pull.access.close()
        chunks = list(pull.chunks.chunks())
        place.pacs.script.append(Behaviour("assoc.reject", times=rejected, **BUSY))
        before, began = len(place.pacs.log), walk.seconds
        for _ in range(rejected):
            # The second time it is the probe that is refused: the study is not asked for.
            with pytest.raises(PacsError, match="pacs-busy"):
                pull.retrieval.retrieve(chunks[0])
            assert pull.reporting.format_waits().startswith("node pacs: waiting until ")
        bring(pull, chunks[0])
        services = [request.service for request in place.pacs.log[before:]]
        assert services[:2] == ["C-ECHO", "C-FIND"] and services.count("C-ECHO") == 1
        first, second = place.site.retry_after_seconds[:2]
        waited = walk.seconds - began
        least = first if rejected == 1 else first + second
        assert 0.8 * least <= waited <= 1.2 * least + 2
        assert pull.access.admission("pacs").state is BreakerState.CLOSED
        bring(pull, chunks[1])
    names = [event.name for event in reported if event.name.startswith("breaker")]
    assert names == ["breaker.opened"] * rejected + ["breaker.closed"]


def test_a_node_whose_wait_is_over_is_asked_by_one_thread_until_that_has_succeeded(tmp_path, walk):
    gate = Gate(walk)
    gate.expect(1)
    script = [Behaviour("net.first_byte", service="C-GET", hold=gate)]
    with site(tmp_path, tiny_instances(4), script) as place, place.opened(clock=walk) as pull:
        for pages in pull.discovery.pages():
            pull.discovery.discover(*pages)
        pull.access.admission("pacs").record_failure("pacs-busy", walk.seconds)
        with ThreadPoolExecutor(4) as pool:
            ended = [pool.submit(bring, pull, chunk) for chunk in pull.chunks.chunks()]
            for one in ended:
                one.result()
        asked = [r for r in place.pacs.log if r.service in ("C-ECHO", "C-FIND", "C-GET")]
        first_get = next(i for i, r in enumerate(asked) if r.service == "C-GET")
        echo = next(i for i, r in enumerate(asked) if r.service == "C-ECHO")
        # One study listed and asked for; the others wait for what becomes of it.
        listed = {r.keys["StudyInstanceUID"] for r in asked[echo:first_get] if r.level == "SERIES"}
        assert len(listed) == 1
        assert len(place.pacs.requests("C-ECHO")) == 1
        place.audit()


@pytest.mark.parametrize("associations", [1, 2])
def test_who_waits_for_a_node_holds_no_association_that_others_need(tmp_path, associations):
    busy = Behaviour("move.refuse", service="C-GET", status=0xA701, times=associations)
    with site(tmp_path, tiny_instances(4), [busy], associations) as place:
        place.file.write_text(place.file.read_text() + "retry_after_seconds: [0.1, 0.1, 0.1]\n")
        with place.opened() as pull:
            for pages in pull.discovery.pages():
                pull.discovery.discover(*pages)
            # More at a time than there are associations: somebody who has none may be the first
            # to see whether the node works again.
            with ThreadPoolExecutor(4) as pool:
                for one in [pool.submit(bring, pull, chunk) for chunk in pull.chunks.chunks()]:
                    one.result()
        assert len(place.pacs.requests("C-ECHO")) >= 1
        place.is_whole()
