"""The studies that a run has retrieved and not archived yet, by chunk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from prefect_dicom.core.model import Chunk
from prefect_dicom.retrieval.study_task import StudyTask

_LOOK_SECONDS = 1.0


@dataclass(slots=True)
class _ChunkInHand:
    chunk: Chunk
    is_open: bool = False
    """Whether more studies of it may come."""
    waiting: list[StudyTask] = field(default_factory=list)
    taken: int = 0
    """How many studies its archiving works on."""

    @property
    def studies(self) -> int:
        return len(self.waiting) + self.taken


class StudiesInHand:
    """Studies between their retrieval and their archiving. Thread-safe.

    The archiving of a chunk may begin while its retrieval goes on. Then it waits for the studies
    that are still to come; a chunk that is not open has no more than it has now.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._chunks: dict[int, _ChunkInHand] = {}
        self.on_change: Callable[[], object] = lambda: None
        """Called when studies were added or have ended, without the lock."""

    def __len__(self) -> int:
        with self._changed:
            return sum(held.studies for held in self._chunks.values())

    def open(self, chunk: Chunk) -> None:
        """Studies of a chunk may come, until it is closed."""
        with self._changed:
            self._of(chunk).is_open = True

    def close(self, chunk: Chunk) -> None:
        """No more studies of a chunk will come."""
        with self._changed:
            self._of(chunk).is_open = False
            self._forget_empty(chunk)
            self._changed.notify_all()
        self.on_change()

    def add(self, chunk: Chunk, tasks: Sequence[StudyTask]) -> None:
        """Keep studies of a chunk for their archiving, or for the next try of it."""
        if not tasks:
            return
        with self._changed:
            self._of(chunk).waiting += tasks
            self._changed.notify_all()
        self.on_change()

    def take(self, chunk: Chunk) -> list[StudyTask]:
        """Take what there is of a chunk, without waiting, in the order of the chunk."""
        with self._changed:
            tasks = self._take(chunk)
            self._forget_empty(chunk)
        self.on_change()
        return tasks

    def batches(
        self, chunk: Chunk, has_work: Callable[[], bool] = lambda: False
    ) -> Generator[list[StudyTask], None, None]:
        """Take the studies of a chunk as they come; they are in hand until they are finished.

        Parameters
        ----------
        has_work : callable
            Whether the caller has something to do though no study has come. Asked once a second;
            it gets an empty batch then.
        """
        try:
            while True:
                with self._changed:
                    held = self._of(chunk)
                    while held.is_open and not held.waiting and not has_work():
                        self._changed.wait(_LOOK_SECONDS)
                    is_last = not held.is_open
                    tasks = self._take(chunk)
                    held.taken += len(tasks)
                yield tasks
                if is_last:
                    return
        finally:
            with self._changed:
                self._of(chunk).taken = 0
                self._forget_empty(chunk)
            self.on_change()

    def to_archive(self) -> list[Chunk]:
        """The chunks of which studies wait for their archiving."""
        with self._changed:
            return [held.chunk for held in self._chunks.values() if held.waiting]

    def chunks(self, node: str) -> set[int]:
        """The numbers of the chunks of a node of which studies are in hand."""
        with self._changed:
            held = self._chunks.items()
            return {n for n, h in held if h.chunk.node == node and h.studies > 0}

    def is_open(self, chunk: Chunk) -> bool:
        """Whether studies of a chunk may still come."""
        with self._changed:
            return chunk.number in self._chunks and self._chunks[chunk.number].is_open

    def finish(self, chunk: Chunk, studies: int) -> None:
        """So many of the studies that were taken are not in hand any more."""
        with self._changed:
            held = self._of(chunk)
            held.taken = max(0, held.taken - studies)
        self.on_change()

    def _of(self, chunk: Chunk) -> _ChunkInHand:
        return self._chunks.setdefault(chunk.number, _ChunkInHand(chunk))

    def _take(self, chunk: Chunk) -> list[StudyTask]:
        held = self._of(chunk)
        tasks, held.waiting = held.waiting, []
        order = {reference: place for place, reference in enumerate(chunk.studies)}
        return sorted(tasks, key=lambda task: order.get(task.reference, len(order)))

    def _forget_empty(self, chunk: Chunk) -> None:
        held = self._of(chunk)
        if not held.is_open and not held.studies:
            del self._chunks[chunk.number]
