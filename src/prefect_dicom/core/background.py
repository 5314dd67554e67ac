"""Work that is handed to a thread of its own, and done in the order in which it was handed over."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

logger = logging.getLogger(__name__)


class Background:
    """Does what one thread hands over, beside it and in order.

    Its own thread begins with the first task.

    Parameters
    ----------
    name : str
        Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._handed_over = 0
        self._done = 0

    @property
    def idle(self) -> bool:
        """Whether everything is done that was handed over."""
        return self._done == self._handed_over

    def hand_over(self, task: Callable[[], object]) -> None:
        """Have a task done; at once where no thread can be started. It handles its own errors."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except RuntimeError:
                task()
                return
            self._thread = thread
        self._handed_over += 1
        self._tasks.put(task)

    def wait(self) -> None:
        """Return when everything is done that was handed over."""
        if not self.idle:
            done = threading.Event()
            self.hand_over(done.set)
            done.wait()

    def close(self) -> None:
        """Wait for everything, and end the thread."""
        if self._thread is not None:
            self._tasks.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except Exception as error:
                # No text: it may hold what a peer has sent.
                logger.error("a task in the background failed: %s", type(error).__name__)
            # It may hold views of a buffer, which are not to stay until the next one comes.
            del task
            self._done += 1


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
