"""A line of threads that wait for their turn, woken as soon as it comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from prefect_dicom.core.clock import Clock

T = TypeVar("T")


class _Waiter(Generic[T]):
    def __init__(self, who: T) -> None:
        self.who = who
        self.chosen = threading.Event()


class WaitingLine(Generic[T]):
    """Threads that wait for their turn, in the order of their arrival. Thread-safe.

    Parameters
    ----------
    clock : Clock
        How they wait.
    choose : callable
        Of those that wait, whose turn it is now, which it takes note of; None if nobody's. Called
        by one thread at a time.
    """

    def __init__(self, clock: Clock, choose: Callable[[Sequence[T]], T | None]) -> None:
        self._clock = clock
        self._choose = choose
        self._lock = threading.Lock()
        self._waiting: list[_Waiter[T]] = []

    def wait(self, who: T, check: Callable[[], object], give_up: Callable[[T], object]) -> None:
        """Wait for a turn.

        Parameters
        ----------
        check : callable
            Called now and then while nobody has chosen this one; raises where it is to wait no
            longer.
        give_up : callable
            Called where it was chosen when ``check`` raised.
        """
        own = _Waiter(who)
        with self._lock:
            self._waiting.append(own)
        try:
            self.advance()
            while not own.chosen.is_set():
                check()
                self._clock.wait(own.chosen, self._clock.look_seconds)
                # What nobody announces may have changed: room on a disk, the time of day.
                self.advance()
        except BaseException:
            with self._lock:
                if not own.chosen.is_set():
                    self._waiting.remove(own)
                    raise
            give_up(who)
            raise

    def advance(self) -> None:
        """Let those go whose turn it is."""
        with self._lock:
            while self._waiting:
                who = self._choose([waiter.who for waiter in self._waiting])
                if who is None:
                    return
                chosen = next(waiter for waiter in self._waiting if waiter.who is who)
                self._waiting.remove(chosen)
                chosen.chosen.set()
