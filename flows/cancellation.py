"""Pause and cancellation of a flow run in Prefect's UI.

*Cancel* on a worker or in `serve` is a SIGTERM, which raises an exception in the flow's main
thread; elsewhere Prefect only changes the state of the flow run. The *Pause* of the UI suspends:
the run and its process end, and Prefect starts it again when it is resumed. A state `Paused` set
through the API leaves the process to wait in place. All of these change the state of the flow run,
which is read every two seconds.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from contextvars import copy_context
from typing import Any
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import Pause

from prefect_dicom.core.model import RequestedState
from prefect_dicom.run.control import ControlledRun

_LOOK_SECONDS = 2.0
_LEAVE_SECONDS = 1.0


class FlowRunState:
    """The state that is requested of a flow run in Prefect."""

    def __init__(self) -> None:
        self.requested = RequestedState.RUNNING
        self.suspended: State[Any] | None = None
        """State of the suspended run, which Prefect keeps until it starts the run again."""

    def update(self, state: State[Any] | None) -> None:
        """Take over the flow run's state. A cancellation is final."""
        if state is None or self.requested is RequestedState.CANCELLED:
            return
        if state.is_cancelling() or state.is_cancelled():
            self.requested = RequestedState.CANCELLED
        elif not state.is_paused():
            self.requested = RequestedState.RUNNING
        elif state.state_details.pause_reschedule:
            self.suspended = state
            self.requested = RequestedState.CANCELLED
        else:
            self.requested = RequestedState.PAUSED


@contextlib.contextmanager
def controlled_by_prefect(run: ControlledRun) -> Iterator[None]:
    """While the block runs, have the run follow what is requested of this flow run in Prefect.

    Raises
    ------
    prefect.exceptions.Pause
        At the end of the block, where the run was suspended: it has no final state then.
    """
    flow_run, over = FlowRunState(), threading.Event()
    number = runtime.flow_run.id

    def poll() -> None:
        while not over.wait(_LOOK_SECONDS):
            # An unreachable server stops nothing: the request is repeated.
            with contextlib.suppress(Exception), get_client(sync_client=True) as client:
                while not over.is_set():
                    flow_run.update(client.read_flow_run(UUID(number)).state)
                    over.wait(_LOOK_SECONDS)

    poller = threading.Thread(
        target=copy_context().run, args=(poll,), name="flow-run-state", daemon=True
    )
    poller.start()
    run.control.external_state = lambda: flow_run.requested
    try:
        yield
    finally:
        over.set()
        poller.join(_LEAVE_SECONDS)
    if flow_run.suspended is not None:
        get_run_logger().info("suspended; when resumed, it continues from the ledger")
        raise Pause(state=flow_run.suspended)
