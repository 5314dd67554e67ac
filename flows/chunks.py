"""Two-stage pipeline over chunks of studies, with back-pressure from uploads and spool.

A chunk is retrieved by one task and archived by another, so that one is received while another is
uploaded. While uploads lag or the spool's reserve is near, no new retrieve starts; those under way
continue.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable

from prefect import Task
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture

from prefect_dicom.core.errors import Interrupted, PacsError, PrefectDicomError, WindowClosed
from prefect_dicom.core.model import Chunk, Disposition
from prefect_dicom.retrieval.requests import CHUNKS_WAITING_FOR_UPLOAD
from prefect_dicom.run.loop import TICK_SECONDS
from prefect_dicom.run.run import Run
from prefect_dicom.tasks.archive import archive_chunk
from prefect_dicom.tasks.retrieve import retrieve_chunk

_FAILED_CHUNKS_BEFORE_STOPPING = 2

_ChunkTask = Task[[Run, int, str, tuple[int, ...]], State]
_Stage = dict[PrefectFuture[State], Chunk]
"""The chunks of one stage that are under way."""


def pull_in_chunks(run: Run, look: Callable[[], None]) -> PrefectDicomError | None:
    """Pull every unfinished study once. Returns the error that stopped it, or None.

    Parameters
    ----------
    look : callable
        Called every two seconds, and whenever a task has ended.
    """
    chunks = run.chunks.chunks_by_node()
    alone = len(chunks) == 1
    finished: queue.SimpleQueue[PrefectFuture[State]] = queue.SimpleQueue()
    retrieving: _Stage = {}
    archiving: _Stage = {}
    trouble: PrefectDicomError | None = None
    failed_in_a_row = 0

    def submit(task: _ChunkTask, chunk: Chunk, stage: _Stage) -> None:
        future = task.submit(run, chunk.number, chunk.node, chunk.studies)
        stage[future] = chunk
        future.add_done_callback(finished.put)

    def has_room(node: str) -> bool:
        """Whether one more chunk may be retrieved from a node."""
        here, waiting = (
            sum(alone or chunk.node == node for chunk in stage.values())
            for stage in (retrieving, archiving)
        )
        most = run.access.associations(node)
        return (
            here < most
            and waiting < most + CHUNKS_WAITING_FOR_UPLOAD
            # With a full spool one chunk at a time: its instances may be what fills the spool.
            and (run.spool.free_bytes() > 0 or not (retrieving or archiving))
        )

    try:
        while True:
            if run.control.is_stopping():
                trouble = Interrupted()
                chunks.clear()
            for node in [node for node in chunks if run.access.is_closed(node)]:
                trouble = trouble or WindowClosed()
                del chunks[node]
            for node in list(chunks):
                while node in chunks and has_room(node):
                    if (chunk := next(chunks[node], None)) is None:
                        del chunks[node]
                    else:
                        submit(retrieve_chunk, chunk, retrieving)
            if not retrieving and not archiving:
                return trouble
            with contextlib.suppress(queue.Empty):
                future = finished.get(timeout=TICK_SECONDS)
                future.wait()  # reads the state from the thread; without it Prefect asks its API
                failed = not future.state.is_completed()
                stage = retrieving if future in retrieving else archiving
                chunk = stage.pop(future)
                if failed:
                    run.archiving.give_back(chunk)
                    trouble = error_of(future.state)
                    failed_in_a_row += 1
                    of_the_node = isinstance(trouble, WindowClosed) or (
                        isinstance(trouble, PacsError) and run.failover.continue_without(chunk.node)
                    )
                    if of_the_node:
                        chunks.pop(chunk.node, None)
                        failed_in_a_row = 0
                    elif (
                        isinstance(trouble, PacsError | Interrupted)
                        or trouble.disposition is Disposition.OPERATOR
                        or failed_in_a_row >= _FAILED_CHUNKS_BEFORE_STOPPING
                    ):
                        chunks.clear()
                else:
                    failed_in_a_row = 0
                    if stage is retrieving:
                        submit(archive_chunk, chunk, archiving)
            look()
    except BaseException:
        # Interrupted. Tasks under way end first: they use what the caller closes next.
        run.control.stop.set()
        for future in (*retrieving, *archiving):
            future.wait()
        raise


def error_of(state: State) -> PrefectDicomError:
    """The error of a task whose state is not completed."""
    if not state.is_final():
        # Prefect starts no further task of a run that was suspended.
        return Interrupted()
    error = state.result(raise_on_failure=False)
    return error if isinstance(error, PrefectDicomError) else PrefectDicomError("unexpected")
