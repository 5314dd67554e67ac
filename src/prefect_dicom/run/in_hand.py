"""The studies that a run has retrieved and not archived yet."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from prefect_dicom.core.model import Chunk, StudyReference
from prefect_dicom.retrieval.study_task import StudyTask


class StudiesInHand:
    """Studies between their retrieval and their archiving. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tasks: dict[StudyReference, StudyTask] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, tasks: Iterable[StudyTask]) -> None:
        """Keep studies for their archiving, or for the next try of it."""
        with self._lock:
            self._tasks.update((task.reference, task) for task in tasks)

    def take(self, chunk: Chunk) -> list[StudyTask]:
        """Take the studies of a chunk, in its order."""
        with self._lock:
            return [self._tasks.pop(r) for r in chunk.studies if r in self._tasks]
