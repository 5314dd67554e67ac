"""Two workers live through a week of windows together, and the PACS counts what it sees of them.

Over real sockets, by a clock that jumps over what everybody waits for. A worker is what a schedule
makes of runs: one that ends where a window closes, and the next one when a window opens.
"""

from __future__ import annotations

import csv
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from prefect_dicom.config.access_schedule import AccessSchedule, next_opening, schedule_states
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.core.errors import Interrupted, WindowClosed
from prefect_dicom.core.model import StudyState
from prefect_dicom.ledger import Ledger
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import Run, open_run
from prefect_dicom.testing import tiny_instances
from tests.support import sites
from tests.support.campaign import subset
from tests.support.simulated_time import Seen, SimulatedClock, WatchedPacs

BERLIN = "Europe/Berlin"
THREADS = 2
"""Of one worker: together they could have as many associations as the node's limit."""
_SLACK_SECONDS = 100
"""A request that begins at the edge of a window ends within so much less than the grace."""
TOLERANCE = 0.02


@dataclass(frozen=True)
class Case:
    """So many studies, and the stretch of time in which two workers ask for them."""

    begin: str
    days: float
    request_seconds: float
    studies: int
    side: int
    windows: tuple[dict, ...]
    holidays: tuple[str, ...] = ()


EDGE = Case(
    "2026-11-23T21:50",
    1.5 / 24,
    request_seconds=300,
    studies=50,
    side=4,
    windows=({"name": "night", "hours": "22:00-23:00", "associations": 3, "utilisation": "50%"},),
)
WEEK = Case(
    # The week in which summer time ends: the last night has an hour more.
    "2026-10-19T06:00",
    7,
    request_seconds=600,
    studies=2000,
    side=256,
    windows=(
        {"name": "night", "days": "mon-thu", "hours": "22:00-06:00", "utilisation": "60%"},
        {"name": "late", "days": "fri", "hours": "22:00-06:00", "retrieves_per_minute": 0.2},
        {"name": "sat", "days": "sat", "hours": "08:00-20:00", "instances_per_second": 0.004},
        {"name": "sun", "days": "sat", "hours": "22:00-06:00", "bytes_per_second": 300},
        {
            "name": "day",
            "days": "mon-fri",
            "hours": "08:00-18:00",
            "associations": 1,
            "utilisation": "20%",
        },
    ),
    holidays=("2026-10-21",),
)


@pytest.mark.campaign("operations")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "case", subset([EDGE, WEEK], [EDGE]), ids=lambda case: f"{case.days * 24:g} hours"
)
def test_windows_are_kept_by_all_runs_together(tmp_path, standing, case, capsys):
    zone = ZoneInfo(BERLIN)
    begin = datetime.fromisoformat(case.begin).replace(tzinfo=zone).astimezone(UTC)
    clock = SimulatedClock(begin)
    objects = list(tiny_instances(case.studies, instances=2, seed=7, side=case.side))
    destinations = {standing.title: (sites.LOOPBACK, standing.port)}
    with WatchedPacs(
        clock, case.request_seconds, instances=objects, destinations=destinations
    ) as pacs:
        site = _site(tmp_path, standing, pacs, case)
        end = case.days * 86_400
        cohorts = _cohorts(tmp_path, site, [o.study_instance_uid for o in objects])
        workers = [_Worker(site, cohort, clock, end) for cohort in cohorts]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.trouble for worker in workers] == [None, None]
        seen = pacs.seen
    schedule = site.nodes["pacs"].access_schedule
    lines = list(_lines(schedule, seen, begin, case))
    stopped = max(worker.stopped_in for worker in workers)
    with capsys.disabled():
        print(f"\n{_table(lines)}\nstopped within {stopped:.1f} s; {_figures(site)}")
    for line in lines:
        assert line.most <= line.associations, line
        assert line.kept <= line.allowed * (1 + TOLERANCE) + line.one_more, line
        assert line.kept >= line.allowed * (1 - TOLERANCE) - line.one_more, line
    assert stopped < 5
    with Ledger.open(ledger_url(site)) as ledger:
        assert not ledger.claims.live()
        for cohort in cohorts:
            assert not ledger.progress.totals(cohort).studies[StudyState.FAILED]


def _site(folder: Path, standing: sites.Standing, pacs: WatchedPacs, case: Case) -> Site:
    (folder / "archive").mkdir()
    node = {
        "host": sites.LOOPBACK,
        "port": pacs.port,
        "called_ae_title": pacs.ae_title,
        "limits": {
            "associations": 2 * THREADS,
            "chunk_studies": 2,
            "uids_per_request": 100,
            "instance_bytes": pacs.object_bytes,
        },
        "timeouts": {"settle_seconds": 0.4, "stall_seconds": 60},
        "access_schedule": {
            "time_zone": BERLIN,
            "holidays": case.holidays,
            "grace_seconds": case.request_seconds + _SLACK_SECONDS,
            "windows": case.windows,
        },
    }
    return Site(
        nodes={"pacs": node},
        receiver=standing.settings(),
        archive={"directory": folder / "archive"},
        ledger={"path": folder / "ledger.sqlite"},
        spool={"path": standing.spool, "reserve_bytes": 0},
        reports=folder / "reports",
    )


def _cohorts(folder: Path, site: Site, uids: list[str]) -> list[int]:
    """Two of half of the studies each."""
    numbers = []
    uids = list(dict.fromkeys(uids))
    for half in range(2):
        path = folder / f"cohort-{half}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["StudyInstanceUID"], *([uid] for uid in uids[half::2])])
        numbers.append(register_cohort(site, path, None, f"half-{half}").number)
    return numbers


class _Worker(threading.Thread):
    """Runs, one after the other, until the time is over; then it is told to end."""

    def __init__(self, site: Site, cohort: int, clock: SimulatedClock, end: float) -> None:
        super().__init__()
        self._site = site
        self._cohort = cohort
        self._clock = clock
        self._end = end
        self.trouble: BaseException | None = None
        self.stopped_in = 0.0

    def run(self) -> None:
        try:
            with self._clock.at_work():
                while self._clock.monotonic() < self._end:
                    self._one_run()
        except BaseException as error:
            self.trouble = error

    def _one_run(self) -> None:
        now = self._clock.now()
        opening = next_opening(self._site.nodes["pacs"].access_schedule, now)
        seconds = min((opening - now).total_seconds(), self._end - self._clock.monotonic())
        self._clock.wait(threading.Event(), seconds)
        reported = time.monotonic()
        with open_run(self._site, self._cohort, clock=self._clock) as pull:
            try:
                for first, last in pull.discovery.pages():
                    pull.discovery.discover(first, last)
                self._pull(pull)
                raise AssertionError("all was done before the time was over")
            except WindowClosed:
                return
            except Interrupted:
                reported = self._told
        self.stopped_in = time.monotonic() - reported

    def _pull(self, pull: Run) -> None:
        """Chunk after chunk in several threads; what ends one of them ends all."""
        chunks, lock = pull.chunks.chunks(), threading.Lock()
        ends: list[BaseException | None] = []

        def work() -> None:
            try:
                with self._clock.at_work():
                    while True:
                        if self._clock.monotonic() >= self._end and not pull.control.stop.is_set():
                            self._told = time.monotonic()
                            pull.control.stop.set()
                        with lock:
                            chunk = next(chunks, None)
                        if chunk is None:
                            break
                        try:
                            pull.retrieval.retrieve(chunk)
                            pull.archiving.archive(chunk)
                        finally:
                            pull.archiving.give_back(chunk)
                ends.append(None)
            except BaseException as error:
                ends.append(error)

        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        # They work in place of this one.
        with self._clock.away():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for end in ends:
            if end is not None and not isinstance(end, WindowClosed):
                raise end
        for end in ends:
            if end is not None:
                raise end


@dataclass(frozen=True)
class _Line:
    """A stretch of time: what was allowed in it, and what was kept."""

    begin: str
    window: str
    hours: float
    associations: int
    most: int
    meter: str
    allowed: float
    kept: float
    one_more: float
    """What one request more or less changes."""


def _lines(schedule: AccessSchedule, seen: Seen, begin: datetime, case: Case) -> Iterator[_Line]:
    after = begin + timedelta(days=case.days)
    grace = 0.0
    for moment, state in schedule_states(schedule, begin):
        if moment >= after:
            return
        until = min(state.until or after, after)
        first, last = (moment - begin).total_seconds(), (until - begin).total_seconds()
        shown = f"{moment.astimezone(ZoneInfo(BERLIN)):%a %H:%M}"
        hours = (last - first) / 3600
        if state.closed:
            most = seen.most_associations(first + grace, last)
            begun = sum(first + 2 < r.begin < last for r in seen.requests)
            yield _Line(shown, "closed", hours, 0, most, "requests", 0, begun, 0)
            continue
        rate_limits = state.rate_limits
        associations = rate_limits.associations or 2 * THREADS
        most = seen.most_associations(first + grace, last)
        retrieves = seen.retrieves(first, last)
        seconds = last - first
        each = retrieves[0] if retrieves else None
        objects = each.objects if each else 0
        size = each.size_bytes if each else 0
        if rate_limits.utilisation < 1:
            busy = seen.busy_seconds(first, last) / seconds / associations
            one = case.request_seconds / seconds / associations
            figures = ("utilisation", rate_limits.utilisation, busy, one)
        elif rate := rate_limits.retrieves_per_minute:
            figures = ("retrieves/min", rate, len(retrieves) * 60 / seconds, 60 / seconds)
        elif rate := rate_limits.instances_per_second:
            kept = sum(r.objects for r in retrieves) / seconds
            figures = ("instances/s", rate, kept, objects / seconds)
        else:
            kept = sum(r.size_bytes for r in retrieves) / seconds
            figures = ("bytes/s", rate_limits.bytes_per_second, kept, size / seconds)
        yield _Line(shown, state.name, hours, associations, most, *figures)
        grace = case.request_seconds + _SLACK_SECONDS


def _table(lines: list[_Line]) -> str:
    head = f"{'from':10}{'window':8}{'hours':>7}{'assoc.':>8}{'seen':>6}  {'meter':14}"
    rows = [f"{head}{'allowed':>10}{'kept':>10}{'of it':>8}"]
    for line in lines:
        share = f"{line.kept / line.allowed:8.1%}" if line.allowed else f"{'-':>8}"
        rows.append(
            f"{line.begin:10}{line.window:8}{line.hours:7.1f}{line.associations:8}{line.most:6}  "
            f"{line.meter:14}{line.allowed:10.4g}{line.kept:10.4g}{share}"
        )
    return "\n".join(rows)


def _figures(site: Site) -> str:
    with Ledger.open(ledger_url(site)) as ledger:
        totals = [ledger.progress.totals(cohort.number) for cohort in ledger.cohorts.all()]
    archived = sum(t.studies[StudyState.ARCHIVED] for t in totals)
    return f"{archived} studies archived"
