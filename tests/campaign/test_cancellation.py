"""Cancel and Pause in Prefect's UI reach a run on a worker, and cost it nothing.

What the buttons send is sent to a real server; a real worker has begun the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from prefect_dicom.testing import tiny_instances
from tests.run.test_control import (
    PROMISED_SECONDS,
    last_asked,
    nothing_was_taken_twice,
    of_retrieves,
)
from tests.support.prefect_server import ROOT, PrefectServer
from tests.support.sites import Place, site_around, until

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.campaign("operations"),
    pytest.mark.whole_campaign,
]
STUDIES, INSTANCES = 4, 6


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    """A server, and a worker in an empty folder."""
    folder = tmp_path_factory.mktemp("prefect")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with PrefectServer(folder) as server:
        server.run("work-pool", "create", "dicom", "--type", "process")
        file = str(Path("deployments", "prefect.yaml"))
        server.run("--no-prompt", "deploy", "--prefect-file", file, "--all", cwd=ROOT)
        server.start("worker", "prefect", "worker", "start", "--pool", "dicom", cwd=elsewhere)
        yield server


@pytest.fixture(params=["c-move", "c-get"])
def place(request, tmp_path: Path) -> Iterator[Place]:
    """A PACS that sends slowly, so that there is a middle of a run."""
    with site_around(
        tmp_path,
        tiny_instances(STUDIES, instances=INSTANCES),
        script=of_retrieves("net.slow", seconds=0.5),
        retrieve=request.param,
    ) as place:
        yield place


@pytest.fixture
def number(server: PrefectServer, place: Place) -> str:
    """A flow run in the middle of its retrieve."""
    number = server.begin("pull-cohort/cohort", cohort=str(place.cohort()), site=str(place.file))
    until(lambda: len(place.pacs.sent_instances()) >= 3, "objects come", 120)
    return number


def set_state(server: PrefectServer, number: str, **state: Any) -> None:
    content = {"state": state, "force": True}
    result = server.ask("POST", f"/flow_runs/{number}/set_state", json=content)
    assert result["status"] == "ACCEPT", result


def state_of(server: PrefectServer, number: str) -> str:
    return server.flow_run(number)["state"]["name"]


def no_run_lives(place: Place) -> bool:
    with place.ledger() as ledger:
        return not ledger.runs.under_way(1)


def seconds_until(condition: Callable[[], object], what: str) -> float:
    began = time.monotonic()
    until(condition, what, 60)
    return time.monotonic() - began


def test_cancel_ends_the_run_within_five_seconds_and_a_rerun_goes_on(server, place, number):
    began = time.monotonic()
    set_state(server, number, type="CANCELLING", name="Cancelling")
    took = seconds_until(lambda: no_run_lives(place), "the run has ended")
    assert took < PROMISED_SECONDS
    until(lambda: state_of(server, number) == "Cancelled", "Prefect says so", 60)
    assert last_asked(place) - began < PROMISED_SECONDS
    place.audit()
    place.pacs.script.clear()
    rerun = server.begin("rerun-failed/failures", cohort="1", site=str(place.file))
    assert server.finished(rerun)["state"]["name"] == "Completed"
    place.is_whole()
    nothing_was_taken_twice(place)


def test_pause_ends_the_process_and_resume_begins_another_that_goes_on(server, place, number):
    began = time.monotonic()
    later = datetime.now(UTC) + timedelta(minutes=5)
    details = {"pause_timeout": later.isoformat(), "pause_reschedule": True}
    set_state(server, number, type="PAUSED", name="Suspended", state_details=details)
    took = seconds_until(lambda: no_run_lives(place), "the run has ended")
    assert took < PROMISED_SECONDS
    assert last_asked(place) - began < PROMISED_SECONDS
    place.audit()
    time.sleep(3)
    assert state_of(server, number) == "Suspended"
    place.pacs.script.clear()
    server.ask("POST", f"/flow_runs/{number}/resume")
    assert server.finished(number)["state"]["name"] == "Completed"
    place.is_whole()
    nothing_was_taken_twice(place)


def test_a_run_that_is_paused_without_an_end_of_its_process_waits_in_place(server, place, number):
    began = time.monotonic()

    def waits() -> bool:
        with place.ledger() as ledger:
            (run,) = ledger.runs.under_way(1)
        return run.paused_at is not None

    set_state(server, number, type="PAUSED", name="Paused")
    took = seconds_until(waits, "the run waits")
    assert took < PROMISED_SECONDS
    assert last_asked(place) - began < PROMISED_SECONDS
    place.pacs.script.clear()
    server.ask("POST", f"/flow_runs/{number}/resume")
    assert server.finished(number)["state"]["name"] == "Completed"
    place.is_whole()
    nothing_was_taken_twice(place)
