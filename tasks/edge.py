"""What all tasks have in common: when they are tried again, and what may leave them or a flow.

Prefect stores exceptions, parameters and names in plain text. Our own errors hold no patient
data by construction; anything else is replaced here by its type, and only the places it came
through (no values) go to the local log.
"""

from __future__ import annotations

import contextlib
import logging
import random
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from prefect.cache_policies import NO_CACHE
from prefect.states import Cancelled, Completed, State

from prefect_dicom.core.errors import Interrupted, PacsError, PrefectDicomError, passes_by_itself
from prefect_dicom.run.planning import current_plan

log = logging.getLogger(__name__)

_WAITS = (10.0, 20.0)
"""Seconds before a task is tried again, and once more."""


def worth_retrying(task: Any, task_run: Any, state: Any) -> bool:
    """Retry what passes by itself, unless it is the PACS: how often that is asked, and when, is
    the business of its node's clock.

    The wait is here, and not Prefect's: in that one nothing is heard of a run that is to end.
    """
    error = state.result(raise_on_failure=False)
    if not passes_by_itself(error) or isinstance(error, PacsError):
        return False
    seconds = _WAITS[min(task_run.run_count, len(_WAITS)) - 1]
    return current_plan().rest(seconds * random.uniform(0.8, 1.2))


ONE_CHUNK: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": len(_WAITS),
    "retry_condition_fn": worth_retrying,
}
"""Options of the tasks that work on one chunk. The ledger is their cache."""


def ended(step: Callable[[], str]) -> State:
    """How a task ends: ``Completed`` with what the step says, ``Cancelled`` where it was told to
    stop, by people or by the clock: nothing has failed then."""
    try:
        with without_phi():
            return Completed(message=step())
    except Interrupted as error:
        return Cancelled(message=str(error), data=error)


@contextlib.contextmanager
def without_phi() -> Iterator[None]:
    """Let only errors of this package out, without those they were made from.

    For the body of every flow and task.
    """
    try:
        yield
    except PrefectDicomError as error:
        # Prefect logs the whole chain of a traceback, and further up stands what others said.
        error.__cause__ = error.__context__ = None
        raise
    except Exception as error:
        places = "".join(traceback.format_tb(error.__traceback__))
        log.error("%s\n%s", type(error).__name__, places)
        raise PrefectDicomError("unexpected", type(error).__name__) from None
