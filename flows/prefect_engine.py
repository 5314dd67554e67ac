"""Prefect's engine: each step is a task run of the flow run, with Prefect's retries."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from uuid import UUID

from prefect import get_run_logger
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.states import Cancelled, Completed
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from prefect_dicom.core.errors import Interrupted, PrefectDicomError
from prefect_dicom.core.model import Chunk
from prefect_dicom.flows.cancellation import controlled_by_prefect
from prefect_dicom.flows.concurrency_limits import concurrency_limits_of_nodes
from prefect_dicom.run.control import ControlledRun, DeliveringRun
from prefect_dicom.run.engine import MOST_STEPS, Artifact, EndName, RunEnd, StepRun
from prefect_dicom.run.run import DryRun, Run
from prefect_dicom.tasks import report
from prefect_dicom.tasks.archive import archive_chunk
from prefect_dicom.tasks.deliver import deliver_chunk
from prefect_dicom.tasks.discover import discover_rows
from prefect_dicom.tasks.events import events_to_prefect
from prefect_dicom.tasks.retrieve import retrieve_chunk


def task_runner() -> TaskRunner[Any]:
    """The task runner of the flows: threads of the flow's own process."""
    return ThreadPoolTaskRunner(max_workers=MOST_STEPS)


class PrefectEngine:
    """Runs the steps of a run as task runs. To be used inside of a flow run."""

    def discover(self, run: DryRun, first_line: int, last_line: int) -> PrefectDicomError | None:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        return error_of(discover_rows(run, first_line, last_line, return_state=True))

    def retrieve(self, run: Run, chunk: Chunk) -> StepRun:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        return _TaskRun(retrieve_chunk.submit(run, chunk.number, chunk.node, chunk.studies))

    def archive(self, run: Run, chunk: Chunk) -> StepRun:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        return _TaskRun(archive_chunk.submit(run, chunk.number, chunk.node, chunk.studies))

    def deliver(self, run: DeliveringRun, chunk: Chunk) -> StepRun:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        return _TaskRun(deliver_chunk.submit(run, chunk.number, chunk.node, chunk.studies))

    def limits(self, run: DryRun) -> AbstractContextManager[None]:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        return concurrency_limits_of_nodes(run)

    def controlled(self, run: ControlledRun) -> AbstractContextManager[None]:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        return controlled_by_prefect(run)

    def events(self, run: ControlledRun) -> AbstractContextManager[None]:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        return events_to_prefect(run)

    def info(self, words: str) -> None:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        get_run_logger().info(words)

    def error(self, words: str) -> None:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        get_run_logger().error(words)

    def create_artifact(self, artifact: Artifact) -> UUID | None:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        return report.create_artifact(artifact)

    def update_progress(self, artifact: UUID, percent: float, description: str) -> None:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        report.update_progress(artifact, percent, description)


class _TaskRun:
    """A submitted task."""

    def __init__(self, future: PrefectFuture[State]) -> None:
        self._future = future

    def add_done_callback(self, callback: Callable[[StepRun], None]) -> None:
        self._future.add_done_callback(lambda _: callback(self))

    def wait(self) -> PrefectDicomError | None:
        # Reads the state from the thread; without it Prefect asks its API.
        self._future.wait()
        return error_of(self._future.state)


def error_of(state: State) -> PrefectDicomError | None:
    """The error that a task run ended with, or None."""
    if state.is_completed():
        return None
    if not state.is_final():
        # Prefect starts no further task of a run that was suspended.
        return Interrupted()
    error = state.result(raise_on_failure=False)
    return error if isinstance(error, PrefectDicomError) else PrefectDicomError("unexpected")


def state_of(end: RunEnd) -> State:
    """The state in which a flow run ends: ``Completed`` by that or another name, or ``Cancelled``.

    Rows that are not archived make no failure of the flow run.
    """
    if end.name is EndName.CANCELLED:
        return Cancelled(message=end.message)
    if end.name is EndName.COMPLETED:
        return Completed(message=end.message)
    return Completed(name=str(end.name), message=end.message)
