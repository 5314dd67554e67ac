"""What people want of a flow run in Prefect's UI, and how a flow ends that was told to.

*Cancel* on a worker or in `serve` is a SIGTERM, which the flow's main thread meets as an
exception; elsewhere nobody would act on it. The *Pause* of the UI suspends: the run ends, its
process too, and Prefect starts it again when it is resumed. A state `Paused` set through the API
leaves the process to wait in place. All of these show in the state of the flow run, which is read
every two seconds.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import copy_context
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.client.orchestration import get_client
from prefect.exceptions import Pause
from prefect.states import Cancelled, Completed, State

from prefect_dicom.core.model import RequestedState
from prefect_dicom.ledger import Totals
from prefect_dicom.report import format_totals, unarchived_rows
from prefect_dicom.run.planning import Plan

_LOOK_SECONDS = 2.0
_LEAVE_SECONDS = 1.0


class Hearing:
    """What the state of a flow run says is wanted of it."""

    def __init__(self) -> None:
        self.wish = RequestedState.RUNNING
        self.suspended: State | None = None
        """The state in which Prefect keeps the run until it starts it again."""

    def hear(self, state: State | None) -> None:
        """Take note of a state. Who was told to end is not told otherwise."""
        if state is None or self.wish is RequestedState.CANCELLED:
            return
        if state.is_cancelling() or state.is_cancelled():
            self.wish = RequestedState.CANCELLED
        elif not state.is_paused():
            self.wish = RequestedState.RUNNING
        elif state.state_details.pause_reschedule:
            self.suspended = state
            self.wish = RequestedState.CANCELLED
        else:
            self.wish = RequestedState.PAUSED


@contextlib.contextmanager
def hearing_of_prefect(plan: Plan) -> Iterator[None]:
    """While the block runs, let the plan hear what is wanted of this flow run in Prefect's UI.

    Raises
    ------
    prefect.exceptions.Pause
        At the end of the block, where the run was suspended: it has no end of its own then.
    """
    hearing, over = Hearing(), threading.Event()
    number = runtime.flow_run.id

    def listen() -> None:
        while not over.wait(_LOOK_SECONDS):
            # A server that is away stops nothing: it is asked again.
            with contextlib.suppress(Exception), get_client(sync_client=True) as client:
                while not over.is_set():
                    hearing.hear(client.read_flow_run(UUID(number)).state)
                    over.wait(_LOOK_SECONDS)

    listener = threading.Thread(
        target=copy_context().run, args=(listen,), name="hearing", daemon=True
    )
    listener.start()
    plan.hears = lambda: hearing.wish
    try:
        yield
    finally:
        over.set()
        listener.join(_LEAVE_SECONDS)
    if hearing.suspended is not None:
        get_run_logger().info("suspended; it goes on from the ledger when it is resumed")
        raise Pause(state=hearing.suspended)


def end_of(plan: Plan, totals: Totals) -> State:
    """How a flow over a cohort ends.

    ``Cancelled`` where it was told to end, ``Completed`` otherwise: by the name of ``Partial``
    where rows are left.
    """
    words = format_totals(totals)
    if not unarchived_rows(totals):
        return Completed(message=words)
    if plan.told() is RequestedState.CANCELLED:
        return Cancelled(message=f"{words}; a rerun goes on from here")
    return Completed(name="Partial", message="; ".join(filter(None, (words, plan.waits()))))
