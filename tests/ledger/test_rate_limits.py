"""Association slots and leaky buckets of a node, shared by all living runs of a ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from prefect_dicom.ledger import Ledger, Usage
from prefect_dicom.ledger.records import Run
from tests.support import postgres
from tests.support.sites import until

NODE = "pacs"
RATE = Usage(None, None, None, None)


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(postgres.ledger_url(request.param, tmp_path)) as ledger:
        yield ledger


@pytest.fixture
def begin(ledger: Ledger) -> Iterator[Callable[..., tuple[Run, Callable[[], None]]]]:
    """Begins a run; the second of what it gives lets it die without a word."""
    with ExitStack() as rest:

        def begin(cohort: int | None = None) -> tuple[Run, Callable[[], None]]:
            lock = ledger._database.locks.hold()
            number = lock.__enter__()
            run = Run(ledger.runs._begin("pull", number, cohort), "pull")
            alive = [True]

            def die() -> None:
                if alive.pop():
                    alive.append(False)
                    lock.__exit__(None, None, None)
                    # PostgreSQL notices a little later that the connection has gone.
                    until(lambda: not is_held(number), "its lock has gone with it")

            def is_held(number: int) -> bool:
                with ledger._database.engine.begin() as connection:
                    return ledger._database.locks.is_held(connection, number)

            rest.callback(lambda: alive[0] and lock.__exit__(None, None, None))
            return run, die

        yield begin


def test_no_more_slots_are_taken_than_there_are_and_who_came_first_is_first(ledger, begin):
    (one, _), (other, _) = begin(), begin()
    first, taken = ledger.rate_limits.take_slot(one, NODE, 2, None)
    assert taken
    assert ledger.rate_limits.take_slot(other, NODE, 2, None)[1]
    waiting, taken = ledger.rate_limits.take_slot(one, NODE, 2, None)
    assert not taken
    later, taken = ledger.rate_limits.take_slot(other, NODE, 2, None)
    assert not taken

    ledger.rate_limits.release_slot(first)

    assert not ledger.rate_limits.take_slot(other, NODE, 2, later)[1]
    assert ledger.rate_limits.take_slot(one, NODE, 2, waiting) == (waiting, True)
    assert not ledger.rate_limits.take_slot(other, NODE, 2, later)[1]
    assert ledger.rate_limits.take_slot(one, "another", 1, None)[1]


def test_the_slots_of_a_dead_run_are_free_and_those_of_one_that_has_ended(ledger, begin):
    (dead, die), (living, _) = begin(), begin()
    assert ledger.rate_limits.take_slot(dead, NODE, 1, None)[1]
    waiting, taken = ledger.rate_limits.take_slot(living, NODE, 1, None)
    assert not taken

    die()

    assert ledger.rate_limits.take_slot(living, NODE, 1, waiting) == (waiting, True)
    ledger.rate_limits.release_slot(waiting)
    with ledger.runs.begin("pull") as ended:
        assert ledger.rate_limits.take_slot(ended, NODE, 1, None)[1]
    assert ledger.rate_limits.take_slot(living, NODE, 1, None)[1]


def test_a_dead_run_in_the_queue_holds_nobody_up(ledger, begin):
    (holder, _), (dead, die), (living, _) = begin(), begin(), begin()
    slot, _ = ledger.rate_limits.take_slot(holder, NODE, 1, None)
    assert not ledger.rate_limits.take_slot(dead, NODE, 1, None)[1]
    waiting, taken = ledger.rate_limits.take_slot(living, NODE, 1, None)
    assert not taken
    die()
    ledger.rate_limits.release_slot(slot)
    assert ledger.rate_limits.take_slot(living, NODE, 1, waiting)[1]


def test_where_there_are_fewer_slots_than_before_the_last_ones_are_to_be_given_up(ledger, begin):
    run, _ = begin()
    numbers = [ledger.rate_limits.take_slot(run, NODE, 3, None)[0] for _ in range(3)]
    assert [ledger.rate_limits.check_slot(n, run, NODE, 3)[0] for n in numbers] == [
        True,
        True,
        True,
    ]
    assert [ledger.rate_limits.check_slot(n, run, NODE, 1)[0] for n in numbers] == [
        True,
        False,
        False,
    ]


def test_the_holder_of_a_slot_learns_that_other_runs_wait_but_not_its_own(ledger, begin):
    (one, _), (other, _) = begin(), begin()
    slot, _ = ledger.rate_limits.take_slot(one, NODE, 1, None)
    ledger.rate_limits.take_slot(one, NODE, 1, None)
    assert ledger.rate_limits.check_slot(slot, one, NODE, 1) == (True, False)
    ledger.rate_limits.take_slot(other, NODE, 1, None)
    assert ledger.rate_limits.check_slot(slot, one, NODE, 1) == (True, True)


def test_runs_of_a_cohort_with_a_higher_priority_come_first(ledger, begin):
    cohorts = [ledger.cohorts.add(digest, NODE, []) for digest in ("one", "other")]
    ledger.run_control.prioritise(cohorts[1].number, 5)
    (holder, _), (one, _), (other, _) = begin(), begin(cohorts[0].number), begin(cohorts[1].number)
    slot, _ = ledger.rate_limits.take_slot(holder, NODE, 1, None)
    first, _ = ledger.rate_limits.take_slot(one, NODE, 1, None)
    later, _ = ledger.rate_limits.take_slot(other, NODE, 1, None)
    ledger.rate_limits.release_slot(slot)
    assert not ledger.rate_limits.take_slot(one, NODE, 1, first)[1]
    assert ledger.rate_limits.take_slot(other, NODE, 1, later)[1]


def test_requests_are_as_far_apart_as_the_rate_says_whichever_run_sends_them(ledger, begin):
    (one, _), (other, _) = begin(), begin()
    slots = [ledger.rate_limits.take_slot(run, NODE, 2, None)[0] for run in (one, other)]
    rates = Usage(0.1, None, None, None)
    now, sent = 1000.0, []
    for number in range(40):
        slot = slots[number % 2]
        if not (wait := ledger.rate_limits.begin_request(NODE, slot, rates, Usage(1), now)):
            sent.append(now)
            ledger.rate_limits.end_request(NODE, slot, rates, Usage(1), Usage(1), now)
        now += wait
    assert len(sent) == 20
    assert [round(b - a, 6) for a, b in zip(sent, sent[1:], strict=False)] == [10.0] * 19


def test_what_a_request_brought_beyond_what_was_expected_is_paid_for_before_the_next(ledger, begin):
    run, _ = begin()
    slot, _ = ledger.rate_limits.take_slot(run, NODE, 1, None)
    rates, expected = Usage(None, 2.0, 1000.0, None), Usage(1, 20, 0)
    assert ledger.rate_limits.begin_request(NODE, slot, rates, expected, 0.0) == 0
    ledger.rate_limits.end_request(NODE, slot, rates, expected, Usage(1, 100, 20_000), 5.0)
    # 100 instances less the 10 of five seconds, and 20 kB: the instances take longer.
    assert ledger.rate_limits.begin_request(NODE, slot, rates, expected, 5.0) == pytest.approx(45.0)
    assert ledger.rate_limits.begin_request(NODE, slot, rates, expected, 49.0) == pytest.approx(1.0)
    assert ledger.rate_limits.begin_request(NODE, slot, rates, expected, 50.0) == 0


@pytest.mark.parametrize(("utilisation", "associations"), [(0.2, 1), (0.5, 3)])
@pytest.mark.needs("time")
def test_associations_are_busy_for_the_part_of_the_time_that_is_allowed(
    ledger, begin, utilisation, associations
):
    """Ten minutes of requests of 10 s each, begun whenever it is allowed."""
    run, _ = begin()
    slots = [
        ledger.rate_limits.take_slot(run, NODE, associations, None)[0] for _ in range(associations)
    ]
    rates = Usage(None, None, None, utilisation * associations)
    now, busy_until, busy = 0.0, dict.fromkeys(slots, 0.0), 0.0
    ready = dict.fromkeys(slots, 0.0)
    under_way: set[int] = set()
    while now < 600:
        slot = min(slots, key=lambda p: (ready[p], p))
        now = max(now, ready[slot])
        if slot in under_way:
            under_way.discard(slot)
            ledger.rate_limits.end_request(NODE, slot, rates, Usage(), Usage(), now)
        if wait := ledger.rate_limits.begin_request(NODE, slot, rates, Usage(), now):
            ready[slot] = now + wait
        else:
            under_way.add(slot)
            busy += min(10.0, 600 - now)
            ready[slot] = busy_until[slot] = now + 10
    assert busy / (600 * associations) == pytest.approx(utilisation, rel=0.02)


def test_what_a_run_was_busy_with_when_it_died_is_not_held_against_the_next(ledger, begin):
    (dead, die), (living, _) = begin(), begin()
    rates = Usage(None, None, None, 0.2)
    slot, _ = ledger.rate_limits.take_slot(dead, NODE, 2, None)
    assert ledger.rate_limits.begin_request(NODE, slot, rates, Usage(), 0.0) == 0
    die()
    slot, _ = ledger.rate_limits.take_slot(living, NODE, 2, None)
    assert ledger.rate_limits.begin_request(NODE, slot, rates, Usage(), 30_000.0) == 0


def test_a_clock_that_is_put_back_makes_nobody_wait_for_it(ledger, begin):
    run, _ = begin()
    slot, _ = ledger.rate_limits.take_slot(run, NODE, 1, None)
    rates = Usage(1.0, None, None, None)
    assert ledger.rate_limits.begin_request(NODE, slot, rates, Usage(1), 10_000.0) == 0
    assert ledger.rate_limits.begin_request(NODE, slot, rates, Usage(1), 100.0) == pytest.approx(
        1.0
    )
    ledger.rate_limits.end_request(NODE, slot, rates, Usage(1), Usage(1), 100.0)
    assert ledger.rate_limits.begin_request(NODE, slot, rates, Usage(1), 101.1) == 0


def test_the_ledger_has_a_clock_of_its_own_for_the_buckets(ledger, begin):
    run, _ = begin()
    slot, _ = ledger.rate_limits.take_slot(run, NODE, 1, None)
    rates = Usage(0.001, None, None, None)
    assert ledger.rate_limits.begin_request(NODE, slot, rates, Usage(1)) == 0
    assert 990 < ledger.rate_limits.begin_request(NODE, slot, rates, Usage(1)) <= 1000
