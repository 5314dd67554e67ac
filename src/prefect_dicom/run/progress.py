"""How far a pull is, live on a terminal; elsewhere a line a minute. Read from the ledger alone."""

from __future__ import annotations

import contextlib
import importlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.text import Text

from prefect_dicom.core.model import StudyState
from prefect_dicom.ledger import Cohort, Ledger, Totals
from prefect_dicom.report import finished_fraction, format_bytes, format_duration, next_count

_TICK_SECONDS = 1.0
_RATE_SECONDS = 30.0
_TREND_SECONDS = 600.0
_LINE_SECONDS = 60.0
_LEAST_SECONDS = 5.0
"""Of work, before there is a word of how long it takes."""
_SETTLE_SECONDS = 60.0
"""In which the time left comes two thirds nearer to what the rate says now."""


@dataclass(frozen=True, slots=True)
class _Look:
    """Where a cohort stood at a time, in seconds of any clock."""

    time: float
    fraction: float
    asked: int
    arrived: int
    size_bytes: int


class Pace:
    """How fast a cohort moves: its rates of late, and the time that is left at this pace.

    Finding the studies and pulling them are two works, one after the other, each with a pace of
    its own. The time left follows the rate of the last ten minutes, slowly enough to be read.
    """

    def __init__(self) -> None:
        self._looks: deque[_Look] = deque()
        self._finding: bool | None = None
        self._left: float | None = None

    def note(self, now: float, totals: Totals) -> None:
        """Take in where the cohort stands at a time, in seconds of any clock."""
        finding = bool(totals.unasked) or not totals.studies.total()
        if finding != self._finding:
            # How long it takes to find studies says nothing of how fast they come.
            self._looks.clear()
            self._left, self._finding = None, finding
        since = now - self._looks[-1].time if self._looks else 0.0
        self._looks.append(
            _Look(
                now,
                finished_fraction(totals),
                totals.rows.total() - totals.unasked,
                totals.stored + totals.received,
                totals.size_bytes,
            )
        )
        while now - self._looks[0].time > _TREND_SECONDS:
            self._looks.popleft()
        self._follow(since)

    def _follow(self, since: float) -> None:
        first, last = self._looks[0], self._looks[-1]
        done, seconds = last.fraction - first.fraction, last.time - first.time
        if done <= 0 or seconds < _LEAST_SECONDS:
            left = None
        else:
            left = (1 - last.fraction) * seconds / done
        if self._left is None or left is None:
            self._left = left
            return
        # Where the last word would have come to by now, and from there a part of the way.
        expected = max(0.0, self._left - since)
        self._left = expected + (left - expected) * -math.expm1(-since / _SETTLE_SECONDS)

    def rates(self) -> tuple[float, float]:
        """Instances that arrived and bytes that were archived, per second."""
        seconds, then, now = self._late()
        if not seconds:
            return 0.0, 0.0
        return (
            max(0, now.arrived - then.arrived) / seconds,
            max(0, now.size_bytes - then.size_bytes) / seconds,
        )

    def rows_per_second(self) -> float:
        """Rows that the PACS was asked for, per second."""
        seconds, then, now = self._late()
        return max(0, now.asked - then.asked) / seconds if seconds else 0.0

    def _late(self) -> tuple[float, _Look, _Look]:
        now = self._looks[-1]
        # A large cohort is looked at less often than that: then since the look before.
        late = [look for look in self._looks if now.time - look.time <= _RATE_SECONDS]
        then = late[0] if len(late) > 1 else self._looks[max(0, len(self._looks) - 2)]
        return now.time - then.time, then, now

    def seconds_left(self) -> float | None:
        """None while nothing has been finished that could be counted on from."""
        return self._left

    def format_left(self) -> str:
        """The time left, for people; empty while nobody can tell."""
        return "" if self._left is None else f"about {format_duration(self._left)} left"

    def format_phase(self) -> str:
        """Which of the two works it is, where that is not plain; empty while studies are pulled."""
        return "finding studies" if self._finding else ""


def format_progress(totals: Totals, pace: Pace) -> str:
    """A pull under way in one line."""
    studies = sum(totals.studies.values())
    rows = sum(totals.rows.values())
    if totals.unasked:
        return (
            f"finding studies: {rows - totals.unasked} of {rows} rows queried, "
            f"{pace.rows_per_second():.0f}/s; {studies} studies found"
        )
    if not studies:
        return f"finding the studies of {rows} rows"
    words = f"{totals.studies[StudyState.ARCHIVED]} of {studies} studies archived"
    if failed := totals.studies[StudyState.FAILED]:
        words += f", {failed} failed so far"
    instances, size = pace.rates()
    here = totals.stored + totals.received
    return f"{words}; {here} instances, {instances:.0f}/s, {format_bytes(size)}/s"


@contextlib.contextmanager
def counting_shown(console: Console) -> Iterator[Callable[[str], None]]:
    """A function to say with how far something is; on a terminal the latest word stays in view."""
    if console.is_terminal:
        with console.status("") as status:
            yield lambda words: status.update(Text(words))
        return
    said = time.monotonic()

    def say(words: str) -> None:
        nonlocal said
        if time.monotonic() - said >= _LINE_SECONDS:
            said = time.monotonic()
            console.print(words, markup=False, highlight=False)

    yield say


@contextlib.contextmanager
def progress_shown(console: Console, ledger: Ledger, cohort: Cohort) -> Iterator[None]:
    """While the block runs, show how far the cohort is."""
    # Prefect imports it, meanwhile and in another thread. From its first to its last line
    # SQLAlchemy fails at every comparison with a value: `inspect()` looks up what is not there yet.
    importlib.import_module("sqlalchemy.orm")
    show = _show_live if console.is_terminal else _show_lines
    with beside(partial(show, console, ledger, cohort)):
        yield


@contextlib.contextmanager
def beside(watch: Callable[[threading.Event], None]) -> Iterator[None]:
    """While the block runs, watch in a thread; the event is set where it has ended."""
    done = threading.Event()
    watcher = threading.Thread(target=watch, args=(done,), name="progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _show_live(console: Console, ledger: Ledger, cohort: Cohort, done: threading.Event) -> None:
    bar = Progress(
        SpinnerColumn(),
        BarColumn(bar_width=40),
        TaskProgressColumn(),
        TextColumn("{task.description}"),
        console=console,
    )
    task = bar.add_task("", total=1)
    figures = Text("  starting Prefect")
    with Live(Group(bar, figures), console=console, transient=True):
        for totals, pace, paused in _looks(ledger, cohort, done):
            words = "paused" if paused else pace.format_left()
            bar.update(task, completed=finished_fraction(totals), description=words)
            figures.plain = f"  {format_progress(totals, pace)}"


def _show_lines(console: Console, ledger: Ledger, cohort: Cohort, done: threading.Event) -> None:
    said = time.monotonic()
    was_paused = False
    for totals, pace, paused in _looks(ledger, cohort, done):
        if time.monotonic() - said >= _LINE_SECONDS or paused != was_paused:
            said, was_paused = time.monotonic(), paused
            left = "paused" if paused else pace.format_left()
            words = ", ".join(filter(None, (format_progress(totals, pace), left)))
            console.print(words, markup=False, highlight=False, soft_wrap=True)


def _looks(
    ledger: Ledger, cohort: Cohort, done: threading.Event
) -> Iterator[tuple[Totals, Pace, bool]]:
    """From time to time: where the cohort stands, how fast it goes, and whether it is paused."""
    pace = Pace()
    seconds = _TICK_SECONDS
    while not done.wait(seconds):
        began = time.monotonic()
        totals = ledger.progress.totals(cohort.number)
        now = time.monotonic()
        pace.note(now, totals)
        seconds = next_count(began, now, _TICK_SECONDS) - now
        yield totals, pace, ledger.cohorts.get(cohort.name).paused
