"""What people want of runs reaches them through the ledger, on whatever host they are."""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime, timedelta

import pytest

from prefect_dicom.core.model import CohortRow, RequestedState
from prefect_dicom.ledger import Ledger
from tests.support.postgres import ledger_url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    return ledger_url(request.param, tmp_path)


@pytest.fixture
def ledger(url):
    with Ledger.open(url) as opened:
        yield opened


@pytest.fixture
def cohort(ledger) -> int:
    return ledger.cohorts.add("d" * 64, "main", [CohortRow(2, "P", None, None)]).number


@pytest.fixture
def other_cohort(ledger, cohort) -> int:
    return ledger.cohorts.add("e" * 64, "main", [CohortRow(2, "P", None, None)]).number


def test_a_cohort_that_nobody_has_touched_is_to_go_on(ledger, cohort):
    known = ledger.cohorts.get(str(cohort))
    assert (known.paused, known.priority) == (False, 0)
    with ledger.runs.begin("pull", cohort) as run:
        assert ledger.run_control.requested_state(run) is RequestedState.RUNNING


def test_a_pause_holds_for_all_runs_of_the_cohort_and_those_to_come_until_it_is_resumed(
    ledger, url, cohort, other_cohort
):
    with ledger.runs.begin("pull", cohort) as run, ledger.runs.begin("pull", other_cohort) as other:
        with Ledger.open(url) as somewhere_else:
            somewhere_else.run_control.pause(cohort)
        assert ledger.run_control.requested_state(run) is RequestedState.PAUSED
        assert ledger.run_control.requested_state(other) is RequestedState.RUNNING
    assert ledger.cohorts.get(str(cohort)).paused
    with ledger.runs.begin("rerun", cohort) as later:
        assert ledger.run_control.requested_state(later) is RequestedState.PAUSED
        ledger.run_control.resume(cohort)
        assert ledger.run_control.requested_state(later) is RequestedState.RUNNING


def test_a_cancellation_is_for_the_runs_that_are_under_way(ledger, url, cohort, other_cohort):
    with (
        ledger.runs.begin("pull", cohort) as run,
        ledger.runs.begin("plan", cohort) as second,
        ledger.runs.begin("pull", other_cohort) as other,
    ):
        with Ledger.open(url) as somewhere_else:
            assert somewhere_else.run_control.cancel(cohort) == [run.number, second.number]
        for ended in (run, second):
            assert ledger.run_control.requested_state(ended) is RequestedState.CANCELLED
        assert ledger.run_control.requested_state(other) is RequestedState.RUNNING
        with ledger.runs.begin("rerun", cohort) as later:
            assert ledger.run_control.requested_state(later) is RequestedState.RUNNING
    assert ledger.run_control.cancel(cohort) == []


def test_a_cancelled_run_does_not_wait_to_be_resumed(ledger, cohort):
    with ledger.runs.begin("pull", cohort) as run:
        ledger.run_control.pause(cohort)
        ledger.run_control.cancel(cohort)
        assert ledger.run_control.requested_state(run) is RequestedState.CANCELLED


def test_the_requested_state_of_a_run_without_a_cohort_is_running(ledger, cohort):
    with ledger.runs.begin("doctor") as run:
        ledger.run_control.pause(cohort)
        assert ledger.run_control.cancel(cohort) == []
        assert ledger.run_control.requested_state(run) is RequestedState.RUNNING


def test_the_runs_under_way_are_those_that_live(ledger, url, cohort):
    child = os.fork()
    if not child:
        with Ledger.open(url) as own, own.runs.begin("pull", cohort):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert ledger.runs.under_way(cohort) == []
    with ledger.runs.begin("rerun", cohort) as run:
        ledger.run_control.record_paused(run, True)
        assert ledger.run_control.cancel(cohort) == [run.number]
        (living,) = ledger.runs.under_way(cohort)
        assert (living.number, living.kind, living.cancelled) == (run.number, "rerun", True)
        for moment in (living.started_at, living.paused_at):
            assert timedelta() <= datetime.now(UTC) - moment < timedelta(minutes=1)
        ledger.run_control.record_paused(run, False)
        assert ledger.runs.under_way(cohort)[0].paused_at is None
    assert ledger.runs.under_way(cohort) == []


def test_a_cohort_keeps_its_priority(ledger, cohort, other_cohort):
    ledger.run_control.prioritise(cohort, -3)
    assert ledger.cohorts.get(str(cohort)).priority == -3
    assert ledger.cohorts.get(str(other_cohort)).priority == 0
