"""A node that is strained is asked for less at a time, and for more again when it is not.

And one that has failed is probed before a study's request is spent on it. The clock is walked by
hand, in tables and around a PACS over real sockets.
"""

from __future__ import annotations

import threading

import pytest

from prefect_dicom.policy import EASE_SECONDS, Asked, Breaker, NodeClock

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
def told() -> list:
    return []


@pytest.fixture
def clock(time, told) -> NodeClock:
    def hear(name, code, figures) -> None:
        told.append((name, code, figures.get("associations")))

    return NodeClock(WAITS, 8, now=time, lot=lambda: 1.0, heard=hear)


def usual(clock: NodeClock, seconds: float = 0.5, kind: Asked = Asked.RETRIEVE) -> None:
    """Ten requests that take as long as they always do."""
    for study in range(100, 110):
        clock.took(kind, seconds, study)


# --- less at a time


@pytest.mark.parametrize("code", ["pacs-busy", "nothing-arrived", "association-stalled"])
def test_signs_of_strain_from_three_studies_halve_what_is_asked_for(clock, told, code):
    widths = []
    for study in range(1, 10):
        clock.strained(Asked.RETRIEVE, code, study)
        widths.append(clock.associations)
    assert widths == [8, 8, 4, 4, 4, 2, 2, 2, 1]
    assert told == [("node.narrowed", code, width) for width in (4, 2, 1)]
    for study in range(10, 20):
        clock.strained(Asked.RETRIEVE, code, study)
    assert clock.associations == 1 and len(told) == 3


def test_one_study_that_shows_them_again_and_again_is_at_fault_itself(clock):
    for _ in range(50):
        clock.strained(Asked.RETRIEVE, "nothing-arrived", 7)
    assert clock.associations == 8


def test_signs_that_are_rare_are_those_of_studies(clock):
    for study in range(300):
        if study % 5:
            clock.took(Asked.RETRIEVE, 0.1, study)
        else:
            clock.strained(Asked.RETRIEVE, "nothing-arrived", study)
    assert clock.associations == 8


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


@pytest.mark.parametrize("kind", Asked)
@pytest.mark.parametrize(("before", "then", "slow"), TIMES)
def test_slow_is_what_takes_several_times_the_usual_of_the_node(clock, kind, before, then, slow):
    usual(clock, before, kind)
    for study in range(3):
        clock.took(kind, then, study)
    assert clock.associations == (4 if slow else 8)
    assert clock.strained_for == ("pacs-slow" if slow else None)


def test_a_single_slow_study_changes_nothing(clock):
    usual(clock)
    for _ in range(40):
        clock.took(Asked.RETRIEVE, 1800.0, 7)
    assert clock.associations == 8


def test_nothing_is_slow_before_it_is_known_what_is_usual(clock):
    for study in range(7):
        clock.took(Asked.RETRIEVE, 100.0 * study, study)
    assert clock.associations == 8


def test_queries_are_not_compared_with_retrieves(clock):
    usual(clock, 0.01, Asked.QUERY)
    usual(clock, 60.0, Asked.RETRIEVE)
    for study in range(10):
        clock.took(Asked.RETRIEVE, 90.0, study)
    assert clock.associations == 8


def test_what_stays_slow_becomes_the_usual(clock, time):
    usual(clock)
    for study in range(500):
        time.now += 20
        clock.took(Asked.RETRIEVE, 20.0, study)
        clock.delivered()
    assert clock.associations == 8 and clock.strained_for is None


def test_it_recovers_by_one_after_each_time_without_strain(clock, time, told):
    for study in range(6):
        clock.strained(Asked.RETRIEVE, "nothing-arrived", study)
    assert clock.associations == 2
    walked = []
    for _ in range(8):
        time.now += EASE_SECONDS - 1
        clock.succeeded()
        walked.append(clock.associations)
        time.now += 1
        clock.succeeded()
        walked.append(clock.associations)
    assert walked == [2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 8, 8, 8]
    assert [words for words in told if words[0] == "node.widened"] == [
        ("node.widened", None, width) for width in range(3, 9)
    ]
    assert clock.strained_for is None


def test_strain_puts_the_recovery_off(clock, time):
    for study in range(3):
        clock.strained(Asked.RETRIEVE, "nothing-arrived", study)
    time.now += EASE_SECONDS - 1
    for study in range(3):
        clock.strained(Asked.RETRIEVE, "nothing-arrived", study)
    time.now += EASE_SECONDS - 1
    clock.succeeded()
    assert clock.associations == 2


def test_time_alone_recovers_nothing(clock, time):
    for study in range(3):
        clock.strained(Asked.RETRIEVE, "nothing-arrived", study)
    time.now += 10 * EASE_SECONDS
    assert clock.associations == 4


def test_a_refusal_for_want_of_resources_halves_at_once(clock, time):
    clock.failed("pacs-busy", time())
    time.now += 30
    widths = []
    for _ in range(6):
        clock.succeeded()
        widths.append(clock.associations)
    assert widths == [2, 3, 4, 4, 4, 4]
    time.now += EASE_SECONDS
    clock.succeeded()
    assert clock.associations == 5


# --- the breaker


def test_a_failure_opens_it_a_probe_half_opens_it_and_a_success_closes_it(clock, time, told):
    assert clock.breaker is Breaker.CLOSED and clock.take_turn()
    clock.failed("pacs-refused", time())
    assert clock.breaker is Breaker.OPEN
    assert not clock.begin_probe() and not clock.take_turn()
    time.now += 30
    assert not clock.take_turn()
    assert clock.begin_probe()
    assert not clock.begin_probe()
    clock.end_probe(answered=True)
    assert clock.breaker is Breaker.HALF_OPEN
    assert clock.take_turn()
    clock.succeeded()
    assert clock.breaker is Breaker.CLOSED
    assert [name for name, *_ in told] == ["breaker.opened", "breaker.closed"]


def test_a_probe_that_fails_opens_it_again_with_the_next_wait(clock, time):
    clock.failed("pacs-refused", time())
    time.now += 30
    assert clock.begin_probe()
    clock.failed("pacs-refused", time())
    clock.end_probe(answered=False)
    assert clock.breaker is Breaker.OPEN and clock.seconds_left() == 60
    time.now += 60
    assert clock.begin_probe()
    clock.failed("pacs-refused", time())
    clock.end_probe(answered=False)
    assert clock.breaker is Breaker.HALTED and clock.halted == "pacs-refused"
    assert not clock.take_turn()


def test_a_request_that_fails_after_a_probe_was_answered_opens_it_again(clock, time):
    clock.failed("pacs-silent", time())
    time.now += 30
    assert clock.begin_probe()
    clock.end_probe(answered=True)
    assert clock.take_turn()
    clock.failed("pacs-silent", time())
    assert clock.breaker is Breaker.OPEN and clock.seconds_left() == 60


def test_while_it_is_half_open_one_thread_asks_at_a_time(clock, time):
    clock.failed("pacs-silent", time())
    time.now += 30
    assert clock.begin_probe()
    clock.end_probe(answered=True)

    def in_another_thread() -> bool:
        may = []
        thread = threading.Thread(target=lambda: may.append(clock.take_turn()))
        thread.start()
        thread.join()
        return may[0]

    assert clock.take_turn() and clock.take_turn()
    assert not in_another_thread()
    clock.end_turn()
    # Which had nothing to say of the node: the next one tries.
    assert in_another_thread()
    assert not clock.take_turn()
    clock.succeeded()
    assert clock.take_turn() and in_another_thread()


def test_what_was_asked_for_before_a_failure_does_not_close_it(clock, time):
    clock.failed("pacs-refused", time())
    time.now += 5
    clock.delivered()
    assert clock.breaker is Breaker.OPEN and clock.seconds_left() == 25
    assert clock.associations == 1


def test_a_rest_between_passes_needs_no_probe(clock):
    assert clock.rest(1)
    assert clock.breaker is Breaker.CLOSED and not clock.begin_probe()
