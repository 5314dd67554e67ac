"""Two-stage pipeline over chunks of studies, with back-pressure from uploads and spool.

A chunk is retrieved by one step and archived by another, so that one is received while another is
uploaded. While uploads lag or the spool's reserve is near, no new retrieve starts; those under way
continue.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable

from prefect_dicom.core.errors import Interrupted, PacsError, PrefectDicomError, WindowClosed
from prefect_dicom.core.model import Chunk, Disposition
from prefect_dicom.retrieval.requests import CHUNKS_WAITING_FOR_UPLOAD
from prefect_dicom.run.engine import Engine, StepRun
from prefect_dicom.run.loop import TICK_SECONDS
from prefect_dicom.run.run import Run

_FAILED_CHUNKS_BEFORE_STOPPING = 2

_Stage = dict[StepRun, Chunk]
"""The chunks of one stage that are under way."""


def pull_in_chunks(run: Run, engine: Engine, look: Callable[[], None]) -> PrefectDicomError | None:
    """Pull every unfinished study once. Returns the error that stopped it, or None.

    Parameters
    ----------
    look : callable
        Called every two seconds, and whenever a step has ended.
    """
    chunks = run.chunks.chunks_by_node()
    alone = len(chunks) == 1
    finished: queue.SimpleQueue[StepRun] = queue.SimpleQueue()
    retrieving: _Stage = {}
    archiving: _Stage = {}
    trouble: PrefectDicomError | None = None
    failed_in_a_row = 0

    def submit(begin: Callable[[Run, Chunk], StepRun], chunk: Chunk, stage: _Stage) -> None:
        step = begin(run, chunk)
        stage[step] = chunk
        step.add_done_callback(finished.put)

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
                        submit(engine.retrieve, chunk, retrieving)
            if not retrieving and not archiving:
                return trouble
            with contextlib.suppress(queue.Empty):
                step = finished.get(timeout=TICK_SECONDS)
                error = step.wait()
                stage = retrieving if step in retrieving else archiving
                chunk = stage.pop(step)
                if error is not None:
                    run.archiving.give_back(chunk)
                    trouble = error
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
                        submit(engine.archive, chunk, archiving)
            look()
    except BaseException:
        # Interrupted. Steps under way end first: they use what the caller closes next.
        run.control.stop.set()
        for step in (*retrieving, *archiving):
            step.wait()
        raise
