"""Ingest while a request is under way: a study can be archived before its request has ended."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from prefect_dicom.retrieval.ingest import Ingest
from prefect_dicom.retrieval.study_task import StudyTask

_LOOK_SECONDS = 0.25
_SHARE = 10
"""It looks so seldom that looking takes no more than this part of the time."""


class IngestBeside:
    """Takes in what arrives of listed studies during one request, in a thread of its own.

    Only instances about which there is nothing to decide: everything else is left to the look at
    the end of the request. Until then nobody else works on these studies.

    Parameters
    ----------
    ingest : Ingest
        Used by the thread alone while it runs.
    tasks : callable
        Returns the studies of the request that are to be looked at.
    arrived : callable
        Called in the thread after each look that has brought something.
    """

    def __init__(
        self,
        ingest: Ingest,
        tasks: Callable[[], Sequence[StudyTask]],
        arrived: Callable[[], object],
    ) -> None:
        self._ingest = ingest
        self._tasks = tasks
        self._arrived = arrived
        self._over = threading.Event()
        self._error: BaseException | None = None
        self.received = 0
        """How many instances were received so far."""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While the block runs; what has gone wrong in the thread is raised at its end."""
        thread = threading.Thread(target=self._run, name="ingest", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        pause = _LOOK_SECONDS
        left: set[str] = set()
        try:
            while not self._over.wait(pause):
                began = time.monotonic()
                received = self._ingest.scan_plain(self._tasks(), left)
                self.received += received
                if received:
                    self._arrived()
                pause = max(_LOOK_SECONDS, _SHARE * (time.monotonic() - began))
        except BaseException as error:
            self._error = error
