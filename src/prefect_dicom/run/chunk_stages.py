"""Two-stage pipeline over chunks of studies.

A chunk is retrieved by one step and archived by another, so that one is received while another is
uploaded. The step that retrieves a chunk claims and lists it while others are retrieved, and waits
for its turn (:mod:`prefect_dicom.run.retrieval_turns`); one chunk an association is listed ahead.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable

from prefect_dicom.core.errors import Interrupted, PacsError, PrefectDicomError, WindowClosed
from prefect_dicom.core.model import Chunk, Disposition
from prefect_dicom.run.engine import Engine, StepRun
from prefect_dicom.run.loop import TICK_SECONDS
from prefect_dicom.run.run import Run

_FAILED_CHUNKS_BEFORE_STOPPING = 2


def ends_a_pass(error: PrefectDicomError, failed_in_a_row: int) -> bool:
    """Whether no further chunk is begun in a pass, after a step that failed.

    Parameters
    ----------
    failed_in_a_row : int
        Steps that have failed without one that succeeded among them, with this one.
    """
    return (
        isinstance(error, PacsError | Interrupted)
        or error.disposition is Disposition.OPERATOR
        or failed_in_a_row >= _FAILED_CHUNKS_BEFORE_STOPPING
    )


_Stage = dict[StepRun, Chunk]
"""The chunks of one stage that are under way."""


def pull_in_chunks(run: Run, engine: Engine, look: Callable[[], None]) -> PrefectDicomError | None:
    """Pull every unfinished study once. Returns the error that stopped it, or None.

    Parameters
    ----------
    look : callable
        Called every two seconds, and whenever something has ended.
    """
    return _Pull(run, engine, look).work_through()


class _Pull:
    """One pass over the chunks of a run. For one thread: what happens in others wakes it."""

    def __init__(self, run: Run, engine: Engine, look: Callable[[], None]) -> None:
        self._run = run
        self._engine = engine
        self._look = look
        self._chunks = run.chunks.chunks_by_node()
        self._alone = len(self._chunks) == 1
        self._events: queue.SimpleQueue[StepRun | None] = queue.SimpleQueue()
        self._retrieving: _Stage = {}
        self._archiving: _Stage = {}
        self._begun: set[int] = set()
        """The numbers of chunks whose archiving has begun; each has one step for it."""
        self._given_up: set[int] = set()
        """The numbers of those whose archiving has failed."""
        self._trouble: PrefectDicomError | None = None
        self._failed_in_a_row = 0

    def work_through(self) -> PrefectDicomError | None:
        """Pull all chunks. Returns the error that stopped it, or None."""
        run = self._run
        run.in_hand.on_change = self._wake
        try:
            with run.turns.one_pass():
                return self._until_all_ended()
        except BaseException:
            # Interrupted. Steps under way end first: they use what the caller closes next.
            run.control.stop.set()
            for step in (*self._retrieving, *self._archiving):
                step.wait()
            raise
        finally:
            run.in_hand.on_change = lambda: None

    def _until_all_ended(self) -> PrefectDicomError | None:
        while True:
            self._stop_where_closed()
            self._submit()
            if not self._retrieving and not self._archiving:
                return self._trouble
            with contextlib.suppress(queue.Empty):
                step = self._events.get(timeout=TICK_SECONDS)
                if step is not None:
                    self._end(step)
            self._look()

    def _wake(self) -> None:
        """Studies have come into hand, or have left it: another chunk may have its turn."""
        self._run.turns.advance()
        self._events.put(None)

    # --- what is begun

    def _stop_where_closed(self) -> None:
        run = self._run
        if run.control.is_stopping():
            self._trouble = Interrupted()
            self._chunks.clear()
        for node in [node for node in self._chunks if run.access.is_closed(node)]:
            self._trouble = self._trouble or WindowClosed()
            del self._chunks[node]

    def _submit(self) -> None:
        """Begin what may begin now."""
        for node in list(self._chunks):
            while node in self._chunks and self._may_be_listed(node):
                if (chunk := next(self._chunks[node], None)) is None:
                    del self._chunks[node]
                else:
                    self._run.in_hand.open(chunk)
                    self._begin(self._engine.retrieve, chunk, self._retrieving)
        for chunk in self._run.in_hand.to_archive():
            if chunk.number not in self._begun:
                self._begun.add(chunk.number)
                self._begin(self._engine.archive, chunk, self._archiving)

    def _may_be_listed(self, node: str) -> bool:
        """Whether one more chunk may be listed: its turn has come, or it is one of the next."""
        turns, access = self._run.turns, self._run.access
        chunks = [c for c in self._retrieving.values() if self._alone or c.node == node]
        nodes = {chunk.node for chunk in chunks} | {node}
        ahead = len(chunks) - sum(map(turns.retrieving, nodes))
        if not turns.has_room(node):
            return ahead < access.chunks_ahead(node)
        return len(chunks) < access.associations(node) + access.chunks_ahead(node)

    def _begin(self, begin: Callable[[Run, Chunk], StepRun], chunk: Chunk, stage: _Stage) -> None:
        step = begin(self._run, chunk)
        stage[step] = chunk
        if stage is self._retrieving:
            # However it has ended: its archiving waits for no more of it.
            step.add_done_callback(lambda _: self._run.in_hand.close(chunk))
        step.add_done_callback(self._events.put)

    # --- what has ended

    def _end(self, step: StepRun) -> None:
        error = step.wait()
        stage = self._retrieving if step in self._retrieving else self._archiving
        chunk = stage.pop(step)
        if error is None:
            self._failed_in_a_row = 0
        else:
            if stage is self._archiving:
                self._given_up.add(chunk.number)
            self._judge(chunk, error)
        if chunk.number in self._given_up:
            # Also what has come since, where its retrieval went on.
            self._run.archiving.give_back(chunk)

    def _judge(self, chunk: Chunk, trouble: PrefectDicomError) -> None:
        """A step has failed: decide what is not begun any more."""
        self._trouble = trouble
        self._failed_in_a_row += 1
        of_the_node = isinstance(trouble, WindowClosed) or (
            isinstance(trouble, PacsError) and self._run.failover.continue_without(chunk.node)
        )
        if of_the_node:
            self._chunks.pop(chunk.node, None)
            self._run.turns.withdraw(chunk.node)
            self._failed_in_a_row = 0
        elif ends_a_pass(trouble, self._failed_in_a_row):
            self._chunks.clear()
            for node in {chunk.node for chunk in self._retrieving.values()}:
                self._run.turns.withdraw(node)
