"""Options, retries and final states of the tasks that work on one chunk.

A task gets its run as a parameter. Prefect neither stores nor logs the parameters of a task, and
the text of a run holds numbers only.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from prefect import runtime
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Cancelled, Completed

from prefect_dicom.core.errors import Interrupted, PacsError, is_transient
from prefect_dicom.run.run import DryRun
from prefect_dicom.tasks.error_translation import without_phi

_RETRY_DELAYS_SECONDS = (10.0, 20.0)
"""Delays before the first and the second retry of a task."""


def is_retried(task: Any, task_run: TaskRun, state: State[Any]) -> bool:
    """Prefect's retry condition: retry transient failures, unless they are of the PACS.

    When a request to a PACS is repeated, its node's admission decides.
    """
    error = state.result(raise_on_failure=False)
    return is_transient(error) and not isinstance(error, PacsError)


CHUNK_OPTIONS: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": len(_RETRY_DELAYS_SECONDS),
    "retry_condition_fn": is_retried,
}
"""Options of the tasks that work on one chunk. The ledger is their cache."""


def run_step(run: DryRun, step: Callable[[], str]) -> State:
    """Run the body of a task.

    A retry is delayed here, and not by Prefect, whose delay a pause or a cancellation does not end.

    Returns
    -------
    State
        ``Completed`` with what the step returns as message; ``Cancelled`` where people or an
        access schedule stopped it, which is no failure.
    """
    try:
        with without_phi():
            _delay_retry(run)
            return Completed(message=step())
    except Interrupted as error:
        return Cancelled(message=str(error), data=error)


def _delay_retry(run: DryRun) -> None:
    retries = (runtime.task_run.run_count or 1) - 1
    if retries < 1:
        return
    seconds = _RETRY_DELAYS_SECONDS[min(retries, len(_RETRY_DELAYS_SECONDS)) - 1]
    if not run.control.sleep(seconds * random.uniform(0.8, 1.2)):
        raise Interrupted()
