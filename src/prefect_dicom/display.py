"""How far a pull is, live on a terminal; elsewhere a line a minute. Read from the ledger alone."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.text import Text

from prefect_dicom.configuration import Site, ledger_url
from prefect_dicom.ledger import Cohort, Ledger, Totals
from prefect_dicom.model import StudyState
from prefect_dicom.report import bytes_in_words, finished_fraction, next_count

_TICK_SECONDS = 1.0
_RATE_SECONDS = 30.0
_TREND_SECONDS = 600.0
_LINE_SECONDS = 60.0


class Pace:
    """How fast a cohort moves: its rates of late, and the time that is left at this pace."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float, int, int]] = deque()
        self._found = False

    def note(self, now: float, totals: Totals) -> None:
        """Take in where the cohort stands at a time, in seconds of any clock."""
        if not self._found:
            # How long it takes to find studies says nothing of how fast they come.
            self._seen.clear()
            self._found = totals.studies.total() > 0
        here = totals.stored + totals.received
        self._seen.append((now, finished_fraction(totals), here, totals.size_bytes))
        while now - self._seen[0][0] > _TREND_SECONDS:
            self._seen.popleft()

    def rates(self) -> tuple[float, float]:
        """Instances that arrived and bytes that were archived, per second."""
        now, _, here, size = self._seen[-1]
        # A large cohort is looked at less often than that: then since the look before.
        late = [seen for seen in self._seen if now - seen[0] <= _RATE_SECONDS]
        then = late[0] if len(late) > 1 else self._seen[max(0, len(self._seen) - 2)]
        seconds = now - then[0]
        if not seconds:
            return 0.0, 0.0
        return max(0, here - then[2]) / seconds, max(0, size - then[3]) / seconds

    def seconds_left(self) -> float | None:
        """None while nothing has been finished that could be counted on from."""
        first, last = self._seen[0], self._seen[-1]
        done = last[1] - first[1]
        return (1 - last[1]) * (last[0] - first[0]) / done if done > 0 else None


def duration_in_words(seconds: float) -> str:
    """A duration for people.

    Examples
    --------
    >>> [duration_in_words(s) for s in (4.2, 90, 12_000, 200_000)]
    ['4 s', '1 min 30 s', '3 h 20 min', '2 d 7 h']
    """
    rest = round(seconds)
    parts = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def figures_in_words(totals: Totals, pace: Pace) -> str:
    """A pull under way in one line."""
    studies = sum(totals.studies.values())
    if not studies:
        return f"finding the studies of {sum(totals.rows.values())} rows"
    words = f"{totals.studies[StudyState.ARCHIVED]} of {studies} studies archived"
    if failed := totals.studies[StudyState.FAILED]:
        words += f", {failed} failed so far"
    instances, size = pace.rates()
    here = totals.stored + totals.received
    return f"{words}; {here} instances, {instances:.0f}/s, {bytes_in_words(size)}/s"


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
def progress_shown(console: Console, site: Site, cohort: Cohort) -> Iterator[None]:
    """While the block runs, show how far the cohort is."""
    done = threading.Event()
    show = _show_live if console.is_terminal else _show_lines
    watcher = threading.Thread(target=show, args=(console, site, cohort, done), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _show_live(console: Console, site: Site, cohort: Cohort, done: threading.Event) -> None:
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
        for totals, pace in _looks(site, cohort, done):
            left = pace.seconds_left()
            words = "" if left is None else f"about {duration_in_words(left)} left"
            bar.update(task, completed=finished_fraction(totals), description=words)
            figures.plain = f"  {figures_in_words(totals, pace)}"


def _show_lines(console: Console, site: Site, cohort: Cohort, done: threading.Event) -> None:
    said = time.monotonic()
    for totals, pace in _looks(site, cohort, done):
        if time.monotonic() - said >= _LINE_SECONDS:
            said = time.monotonic()
            console.print(figures_in_words(totals, pace), markup=False, highlight=False)


def _looks(site: Site, cohort: Cohort, done: threading.Event) -> Iterator[tuple[Totals, Pace]]:
    pace = Pace()
    seconds = _TICK_SECONDS
    with Ledger.open(ledger_url(site)) as ledger:
        while not done.wait(seconds):
            began = time.monotonic()
            totals = ledger.totals(cohort.number)
            now = time.monotonic()
            pace.note(now, totals)
            seconds = next_count(began, now, _TICK_SECONDS) - now
            yield totals, pace
