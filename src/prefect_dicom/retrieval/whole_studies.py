"""Studies that are whole leave their retrieval at once, while requests for others go on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from prefect_dicom.core.model import StudyReference
from prefect_dicom.retrieval.ingest import Ingest
from prefect_dicom.retrieval.ingest_beside import IngestBeside
from prefect_dicom.retrieval.strategy import is_final
from prefect_dicom.retrieval.study_task import StudyTask

HandOver = Callable[[Sequence[StudyTask]], object]
"""Takes studies of which all instances are here."""


class HandingOver:
    """Hands studies over that are whole, and knows which those were. Thread-safe."""

    def __init__(self, take: HandOver | None = None) -> None:
        self._take = take
        self._handed: set[StudyReference] = set()

    def left(self, tasks: Sequence[StudyTask]) -> list[StudyTask]:
        """Those of the studies that were not handed over."""
        return [task for task in tasks if task.reference not in self._handed]

    def hand_over(self, tasks: Sequence[StudyTask]) -> list[StudyTask]:
        """Hand over what is whole; returns the others."""
        whole = [] if self._take is None else [t for t in self.left(tasks) if is_whole(t)]
        if whole and self._take is not None:
            for task in whole:
                task.clear_failure()
            self._handed.update(task.reference for task in whole)
            self._take(whole)
        return self.left(tasks)

    @contextlib.contextmanager
    def ingesting(self, ingest: Ingest, tasks: Sequence[StudyTask]) -> Iterator[Callable[[], int]]:
        """While a request for these studies is under way, take in what arrives and hand it over.

        Not where nobody takes whole studies. Yields what says how many instances were received.
        """
        if self._take is None:
            yield lambda: 0
            return
        beside = IngestBeside(ingest, partial(self.left, tasks), partial(self.hand_over, tasks))
        with beside.running():
            yield lambda: beside.received


def is_whole(task: StudyTask) -> bool:
    """Whether all instances on a study's list are here, and nothing is to be decided about it."""
    whole = task.is_listed and not (task.held or task.missing())
    return whole and not is_final(task.failure)
