"""The engine of a run without a Prefect server: threads of this process, and a journal.

Steps, retries and states are those of Prefect's engine (``flows/prefect_engine.py``); the journal
has them for Prefect's database. Concurrency limits and requests of Prefect's UI are on a server
only, and where there are any a server is used (``server/needs.py``).
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from uuid import UUID

from prefect_dicom.core.errors import Interrupted, PrefectDicomError
from prefect_dicom.core.events import Event
from prefect_dicom.core.model import Chunk
from prefect_dicom.run import steps
from prefect_dicom.run.artifacts import prefect_event
from prefect_dicom.run.control import ControlledRun, DeliveringRun
from prefect_dicom.run.engine import (
    MOST_STEPS,
    Artifact,
    ArtifactKind,
    EndName,
    FlowCall,
    StepRun,
)
from prefect_dicom.run.error_translation import without_phi
from prefect_dicom.run.journal import Journal, StateType
from prefect_dicom.run.run import DryRun, Run


def run_locally(call: FlowCall, journal: Journal) -> BaseException | None:
    """Run a flow in this process. Returns the error that it ended with, or None."""
    journal.begin(call.flow, call.name, call.parameters)
    journal.state(journal.flow_run, StateType.PENDING)
    journal.state(journal.flow_run, StateType.RUNNING)
    end = partial(journal.state, journal.flow_run)
    try:
        with LocalEngine(journal) as engine, without_phi():
            ended = call.body(engine)
    except PrefectDicomError as error:
        end(StateType.FAILED, message=f"Flow run encountered an exception: {error}")
        return error
    except BaseException as error:
        end(StateType.CRASHED, message=f"Flow run was ended by {type(error).__name__}")
        raise
    if ended.name is EndName.CANCELLED:
        end(StateType.CANCELLED, message=ended.message)
        return Interrupted()
    end(StateType.COMPLETED, ended.name, ended.message)
    return None


class LocalEngine:
    """Runs the steps of a run in threads, and writes what Prefect is to show of them."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._threads = ThreadPoolExecutor(MOST_STEPS, thread_name_prefix="step")
        self._begun: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()

    def discover(self, run: DryRun, first_line: int, last_line: int) -> PrefectDicomError | None:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        name = f"discover-lines-{first_line}-{last_line}"
        task = self._begin("discover_rows", name)
        return self._work(run, task, partial(steps.discover_rows, run, first_line, last_line))

    def retrieve(self, run: Run, chunk: Chunk) -> StepRun:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        task = self._begin("retrieve_chunk", f"retrieve-{chunk.number:06d}")
        return self._submit(run, task, partial(steps.retrieve_chunk, run, chunk))

    def archive(self, run: Run, chunk: Chunk) -> StepRun:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        task = self._begin("archive_chunk", f"archive-{chunk.number:06d}")
        return self._submit(run, task, partial(steps.archive_chunk, run, chunk))

    def deliver(self, run: DeliveringRun, chunk: Chunk) -> StepRun:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        task = self._begin("deliver_chunk", f"deliver-{chunk.number:06d}")
        return self._submit(run, task, partial(run.deliver, chunk))

    def limits(self, run: DryRun) -> AbstractContextManager[None]:
        """See :class:`~prefect_dicom.run.engine.Engine`; there are none."""
        return nullcontext()

    def controlled(self, run: ControlledRun) -> AbstractContextManager[None]:
        """See :class:`~prefect_dicom.run.engine.Engine`; nobody sees it in Prefect's UI yet."""
        return nullcontext()

    @contextmanager
    def events(self, run: ControlledRun) -> Iterator[None]:
        """See :class:`~prefect_dicom.run.engine.Engine`."""

        def take(event: Event) -> None:
            self._journal.event(prefect_event(event, run.cohort))

        run.events.subscribe(take)
        try:
            yield
        finally:
            run.events.unsubscribe(take)

    def info(self, words: str) -> None:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        self._journal.log(logging.INFO, words)

    def error(self, words: str) -> None:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        self._journal.log(logging.ERROR, words)

    def create_artifact(self, artifact: Artifact) -> UUID | None:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        kind, data = str(artifact.kind), artifact.data
        if artifact.kind is ArtifactKind.LINK:
            kind, data = ArtifactKind.MARKDOWN, f"[{artifact.link_text}]({data})"
        elif artifact.kind is ArtifactKind.TABLE:
            data = json.dumps(data)
        return UUID(self._journal.artifact(kind, artifact.key, artifact.description, data))

    def update_progress(self, artifact: UUID, percent: float, description: str) -> None:
        """See :class:`~prefect_dicom.run.engine.Engine`."""
        self._journal.progress(str(artifact), percent, description)

    # --- steps

    def _begin(self, task: str, name: str) -> str:
        with self._lock:
            number = self._begun[task]
            self._begun[task] += 1
        number_of_run = self._journal.task_run(task, name, number, steps.TAG)
        self._journal.state(number_of_run, StateType.PENDING)
        return number_of_run

    def _submit(self, run: ControlledRun, task: str, step: Callable[[], str]) -> StepRun:
        return _Submitted(self._threads.submit(self._work, run, task, step))

    def _work(
        self, run: ControlledRun, task: str, step: Callable[[], str]
    ) -> PrefectDicomError | None:
        """Run a step, and again while that helps. Returns the error that it ended with, or None."""
        state = partial(self._journal.state, task)
        retries = 0
        while True:
            state(StateType.RUNNING, "Retrying" if retries else "")
            try:
                with without_phi():
                    steps.delay_retry(run, retries)
                    message = step()
            except Interrupted as error:
                state(StateType.CANCELLED, message=str(error))
                return error
            except PrefectDicomError as error:
                if steps.is_retried(error) and retries < steps.RETRIES:
                    retries += 1
                    continue
                state(StateType.FAILED, message=f"Task run encountered an exception: {error}")
                return error
            except BaseException as error:
                state(StateType.CRASHED, message=f"Task run was ended by {type(error).__name__}")
                raise
            state(StateType.COMPLETED, message=message)
            return None


class _Submitted:
    """A step in a thread."""

    def __init__(self, future: Future[PrefectDicomError | None]) -> None:
        self._future = future

    def add_done_callback(self, callback: Callable[[StepRun], None]) -> None:
        self._future.add_done_callback(lambda _: callback(self))

    def wait(self) -> PrefectDicomError | None:
        return self._future.result()
