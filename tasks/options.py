"""Options, retries and final states of the tasks that work on one chunk.

A task gets its run as a parameter. Prefect neither stores nor logs the parameters of a task, and
the text of a run holds numbers only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prefect import runtime
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Cancelled, Completed

from prefect_dicom.core.errors import Interrupted
from prefect_dicom.run import steps
from prefect_dicom.run.control import ControlledRun
from prefect_dicom.run.error_translation import without_phi


def is_retried(task: Any, task_run: TaskRun, state: State[Any]) -> bool:
    """Prefect's retry condition."""
    return steps.is_retried(state.result(raise_on_failure=False))


CHUNK_OPTIONS: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": steps.RETRIES,
    "retry_condition_fn": is_retried,
    "tags": [steps.TAG],
}
"""Options of the tasks that work on one chunk. The ledger is their cache."""


def run_step(run: ControlledRun, step: Callable[[], str]) -> State:
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
            steps.delay_retry(run, (runtime.task_run.run_count or 1) - 1)
            return Completed(message=step())
    except Interrupted as error:
        return Cancelled(message=str(error), data=error)
