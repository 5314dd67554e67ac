"""Runs that hold a queue, and that nothing will begin, are told apart from those that begin."""

from __future__ import annotations

from datetime import timedelta

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.states import Pending

from prefect_dicom.server import work
from prefect_dicom.server.work import format_stranded, work_of


@flow
def waits() -> None:
    """Is never run."""


@pytest.fixture
def pending(prefect_api):
    with get_client(sync_client=True) as client:
        runs = [client.create_flow_run(waits, state=Pending()) for _ in range(2)]
        yield [str(run.id) for run in runs]
        for run in runs:
            client.delete_flow_run(run.id)


def stranded(url: str, *processes: str) -> set[str]:
    found = work_of(url, processes)
    assert found is not None
    return {run.id for run in found.stranded}


def test_a_pending_run_without_a_process_is_stranded_after_minutes(
    prefect_api, pending, monkeypatch
):
    url = prefect_api["PREFECT_API_URL"]
    assert not stranded(url) & set(pending)
    monkeypatch.setattr(work, "STRANDED_AFTER", timedelta())
    assert set(pending) <= stranded(url)
    assert stranded(url, pending[0]) & set(pending) == {pending[1]}


def test_it_is_said_which_they_are_and_how_their_places_come_free(
    prefect_api, pending, monkeypatch
):
    url = prefect_api["PREFECT_API_URL"]
    monkeypatch.setattr(work, "STRANDED_AFTER", timedelta())
    runs = [run for run in work_of(url, ()).stranded if run.id in pending]
    words = format_stranded(runs, url)
    assert words.startswith("2 of them are pending since 20") and "\n" not in words
    for number in pending:
        assert f"prefect flow-run delete {number}" in words
    assert f"PREFECT_API_URL={url}" in words
    assert format_stranded((), url) == ""
