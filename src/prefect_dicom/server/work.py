"""What the flow runs of a local Prefect server are doing, asked without importing Prefect."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from prefect_dicom.core.proxies import direct_opener

STRANDED_AFTER = timedelta(minutes=5)
"""A run that is pending for longer has not been begun by its worker."""
_ANSWERS_SECONDS = 2.0
_MOST_PENDING = 20


@dataclass(frozen=True, slots=True)
class StrandedRun:
    """A flow run that holds a place in its queue, and that nothing will begin."""

    id: str
    name: str
    since: datetime
    """When a worker took it, in local time."""


@dataclass(frozen=True, slots=True)
class Work:
    """Flow runs on the server: running, waiting and the next scheduled one."""

    running: int
    waiting: int
    """Runs that are due and have not started."""
    next_at: datetime | None
    """Start time of the next scheduled run, or None."""
    stranded: tuple[StrandedRun, ...] = ()
    """Pending runs whose worker has gone, some of them."""


def work_of(url: str, processes: Collection[str]) -> Work | None:
    """Count the flow runs of a server; None if it does not answer.

    Parameters
    ----------
    url : str
        URL of the API, on loopback.
    processes : collection of str
        Ids of the flow runs that have a process on this machine.
    """
    scheduled = {"type": {"any_": ["SCHEDULED"]}}
    is_pending = {"state": {"type": {"any_": ["PENDING"]}}}
    now = datetime.now().astimezone()
    due = {"before_": now.isoformat()}
    try:
        running = _ask(url, "count", {"state": {"type": {"any_": ["RUNNING", "CANCELLING"]}}})
        waiting = _ask(url, "count", is_pending)
        waiting += _ask(url, "count", {"state": scheduled, "expected_start_time": due})
        pending = _ask(url, "filter", is_pending, limit=_MOST_PENDING) if waiting else []
        later = _ask(
            url,
            "filter",
            {"state": scheduled, "expected_start_time": {"after_": now.isoformat()}},
            sort="EXPECTED_START_TIME_ASC",
            limit=1,
        )
    except (OSError, ValueError):
        return None
    times = [datetime.fromisoformat(run["expected_start_time"]) for run in later]
    return Work(
        running,
        waiting,
        times[0].astimezone() if times else None,
        tuple(
            StrandedRun(run["id"], run["name"], since.astimezone())
            for run in pending
            if run["id"] not in processes
            and now - (since := datetime.fromisoformat(run["state"]["timestamp"])) > STRANDED_AFTER
        ),
    )


def format_stranded(runs: Collection[StrandedRun], url: str) -> str:
    """Say which runs hold their queue, and what to do; empty if there are none."""
    if not runs:
        return ""
    first = min(run.since for run in runs)
    commands = "; ".join(f"prefect flow-run delete {run.id}" for run in runs)
    one = len(runs) == 1
    return (
        f"{len(runs)} of them {'is' if one else 'are'} pending since {first:%Y-%m-%d %H:%M} and "
        f"{'has' if one else 'have'} no process, because the worker has gone, and "
        f"{'holds a place' if one else 'hold places'} in the queue. Free "
        f"{'it' if one else 'them'} with PREFECT_API_URL={url}: {commands}"
    )


def answers(url: str) -> bool:
    """Whether a server on this machine answers its health check."""
    try:
        with direct_opener().open(f"{url}/health", timeout=_ANSWERS_SECONDS) as answer:
            return int(answer.status) == 200
    except OSError:
        return False


def _ask(url: str, what: str, runs: dict[str, Any], **more: Any) -> Any:
    body = json.dumps({"flow_runs": runs, **more}).encode()
    request = urllib.request.Request(
        f"{url}/flow_runs/{what}", body, {"Content-Type": "application/json"}
    )
    with direct_opener().open(request, timeout=_ANSWERS_SECONDS) as answer:
        return json.load(answer)
