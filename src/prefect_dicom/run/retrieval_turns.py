"""Whose turn it is to be retrieved, of the chunks that are listed.

A chunk is claimed and listed while others are retrieved, and waits for its turn then, so that an
association goes from retrieve to retrieve. While uploads lag or the spool's reserve is near, no
chunk gets a turn; those under way continue.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

from prefect_dicom.archive.spool import Spool
from prefect_dicom.core.model import Chunk
from prefect_dicom.core.waiting_line import WaitingLine
from prefect_dicom.retrieval.requests import CHUNKS_WAITING_FOR_UPLOAD
from prefect_dicom.run.context import RunContext
from prefect_dicom.run.in_hand import StudiesInHand


class RetrievalTurns:
    """Turns of the chunks of a run. Thread-safe."""

    def __init__(self, context: RunContext, spool: Spool, in_hand: StudiesInHand) -> None:
        self._context = context
        self._spool = spool
        self._in_hand = in_hand
        self._lock = threading.Lock()
        self._retrieving: list[Chunk] = []
        self._withdrawn: set[str] | None = None
        """The nodes whose chunks get no turn any more; None where there is no pass."""
        self._line: WaitingLine[Chunk] = WaitingLine(context.clock, self._choose)

    @contextlib.contextmanager
    def one_pass(self) -> Iterator[None]:
        """While the block runs, chunks of a node that has failed can be withdrawn."""
        with self._lock:
            self._withdrawn = set()
        try:
            yield
        finally:
            with self._lock:
                self._withdrawn = None

    def withdraw(self, node: str) -> None:
        """Let no further chunk of a node be retrieved in this pass."""
        with self._lock:
            if self._withdrawn is not None:
                self._withdrawn.add(node)
        self._line.advance()

    def advance(self) -> None:
        """Let chunks go whose turn has come, after an upload has ended."""
        self._line.advance()

    def retrieving(self, node: str) -> int:
        """How many chunks of a node are retrieved now."""
        with self._lock:
            return sum(chunk.node == node for chunk in self._retrieving)

    def has_room(self, node: str) -> bool:
        """Whether one more chunk of a node may be retrieved now."""
        most = self._context.access.associations(node)
        in_hand = self._in_hand.chunks(node)
        with self._lock:
            here = {chunk.number for chunk in self._retrieving if chunk.node == node}
            alone = not self._retrieving
        return (
            len(here) < most
            and len(in_hand - here) < most + CHUNKS_WAITING_FOR_UPLOAD
            # With a full spool one chunk at a time: its instances may be what fills the spool.
            and (self._spool.free_bytes() > 0 or (alone and not len(self._in_hand)))
        )

    @contextlib.contextmanager
    def turn(self, chunk: Chunk) -> Iterator[bool]:
        """Wait until a chunk may be retrieved; False where it was withdrawn.

        Raises
        ------
        Interrupted
            The run is to stop, or the access schedule of the node closed meanwhile.
        """

        def check() -> None:
            self._context.control.check()
            self._context.access.schedules.check(chunk.node)

        self._line.wait(chunk, check, self._end)
        try:
            yield not self._is_withdrawn(chunk)
        finally:
            self._end(chunk)

    def _is_withdrawn(self, chunk: Chunk) -> bool:
        with self._lock:
            return chunk.node in (self._withdrawn or ())

    def _end(self, chunk: Chunk) -> None:
        with self._lock:
            self._retrieving.remove(chunk)
        self._line.advance()

    def _choose(self, waiting: Sequence[Chunk]) -> Chunk | None:
        for chunk in waiting:
            if self._is_withdrawn(chunk) or self.has_room(chunk.node):
                with self._lock:
                    self._retrieving.append(chunk)
                return chunk
        return None
