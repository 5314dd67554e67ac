"""Summary of a cohort in figures, from the ledger, for the report page and its plots.

Long tables are counted in the ledger, or read row by row and kept as counts and a few examples: a
summary of 100,000 rows is as large as one of a hundred.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from functools import cached_property
from zoneinfo import ZoneInfo

from prefect_dicom.config.access_schedule import (
    AccessSchedule,
    format_schedule_state,
    schedule_state,
    schedule_states,
)
from prefect_dicom.core.model import CohortRow, Disposition, RowVerdict, StudyState, Verdict
from prefect_dicom.core.reasons import Reason, reason_for
from prefect_dicom.ledger import (
    Acceptance,
    Cohort,
    Ledger,
    LivingRun,
    Sample,
    StudyGroup,
    StudyRecord,
    Totals,
)
from prefect_dicom.report.formatting import format_modalities
from prefect_dicom.report.tables import finished_fraction

ROWS_NAMED = 12
"""Rows listed per verdict and reason; ``results.csv`` lists all."""
STUDIES_NAMED_OF_A_REASON = 8
STUDIES_NAMED = 100
SLOWEST_NAMED = 10
MODALITIES_NAMED = 15
_LATE = timedelta(minutes=10)
"""Work time that the recent rate covers; the pace covers a day of it."""
_TREND = timedelta(days=1)
_LEAST_SECONDS = 60.0
"""Work time below which no end is estimated."""


@dataclass(slots=True)
class RowGroup:
    """Rows of a cohort with one verdict and one reason."""

    verdict: Verdict
    reason: Reason
    rows: int = 0
    examples: list[tuple[CohortRow, RowVerdict]] = field(default_factory=list)

    @property
    def retried_by_rerun(self) -> bool:
        """Whether a rerun retries these rows."""
        return self.verdict.has_failures and self.reason.disposition is not Disposition.PERMANENT


@dataclass(slots=True)
class ModalityTotals:
    """Studies of one modality: counts and size."""

    modality: str
    studies: int = 0
    archived: int = 0
    failed: int = 0
    instances: int = 0
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Interval:
    """Time between two samples of the ledger, and the increments in it."""

    begin: datetime
    end: datetime
    worked: bool
    """Whether a run was at work."""
    instances: int
    size_bytes: int
    studies: int
    """Studies that ended, archived or failed."""
    rows: int
    """Rows that were queried."""
    done: float
    """Increment of the finished fraction of the cohort."""
    schedule_open: bool

    @property
    def seconds(self) -> float:
        """Length of the interval in seconds."""
        return (self.end - self.begin).total_seconds()


@dataclass(frozen=True, slots=True)
class Rates:
    """Totals over some work time, and rates from them."""

    seconds: float
    instances: int
    size_bytes: int
    studies: int
    rows: int
    done: float

    @property
    def bytes_per_second(self) -> float:
        """Bytes archived per second of work."""
        return self.size_bytes / self.seconds if self.seconds else 0.0

    @property
    def instances_per_second(self) -> float:
        """Instances archived per second of work."""
        return self.instances / self.seconds if self.seconds else 0.0

    @property
    def studies_per_hour(self) -> float:
        """Studies that ended per hour of work."""
        return 3600 * self.studies / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class CohortSummary:
    """Summary of a cohort. Times are UTC; :attr:`zone` is the time zone of the site."""

    cohort: Cohort
    at: datetime
    zone: tzinfo
    totals: Totals
    row_groups: list[RowGroup]
    """The most frequent first."""
    groups: list[StudyGroup]
    failed: list[StudyRecord]
    slowest: list[StudyRecord]
    samples: list[Sample]
    notes: list[tuple[str, str]]
    accepted: list[Acceptance]
    """What people have accepted of its studies."""
    runs: list[LivingRun]
    """Runs that are at work."""
    trouble: Reason | None
    """Reason that stopped the last run, if none is at work."""
    schedule: AccessSchedule | None
    associations: int

    # --- how far

    @property
    def fraction(self) -> float:
        """Finished fraction of the cohort, from 0 to 1."""
        return finished_fraction(self.totals)

    @property
    def finding(self) -> bool:
        """Whether discovery is under way, which has a pace of its own."""
        return bool(self.totals.unasked)

    @property
    def studies(self) -> int:
        """Number of studies."""
        return self.totals.studies.total()

    @property
    def left(self) -> int:
        """Studies neither archived nor failed."""
        ended = self.totals.studies[StudyState.ARCHIVED] + self.totals.studies[StudyState.FAILED]
        return self.studies - ended

    @property
    def is_over(self) -> bool:
        """Whether every row and study has ended."""
        return not self.left and not self.totals.rows[Verdict.PENDING]

    @cached_property
    def modalities(self) -> list[ModalityTotals]:
        """Studies by modality, largest first."""
        kinds: dict[str, ModalityTotals] = {}
        for group in self.groups:
            name = label_of(group.modalities)
            kind = kinds.setdefault(name, ModalityTotals(name))
            kind.studies += group.studies
            kind.archived += group.studies * (group.state is StudyState.ARCHIVED)
            kind.failed += group.studies * (group.state is StudyState.FAILED)
            kind.instances += group.instances
            kind.size_bytes += group.size_bytes
        return sorted(kinds.values(), key=lambda k: (-k.size_bytes, -k.studies, k.modality))

    @property
    def failures(self) -> Counter[str]:
        """Failed studies by reason."""
        counts: Counter[str] = Counter()
        for group in self.groups:
            if group.state is StudyState.FAILED and group.reason:
                counts[group.reason] += group.studies
        return counts

    # --- how fast

    @cached_property
    def intervals(self) -> list[Interval]:
        """Intervals between the samples."""
        return list(_intervals(self.samples, self.cohort.rows, self.schedule))

    def rates(self, recent: timedelta | None = None) -> Rates:
        """Sum up the latest work time, by default all of it."""
        worked = [s for s in reversed(self.intervals) if s.worked]
        seconds = done = 0.0
        instances = size = studies = rows = 0
        for interval in worked:
            if recent is not None and seconds >= recent.total_seconds():
                break
            seconds += interval.seconds
            instances += interval.instances
            size += interval.size_bytes
            studies += interval.studies
            rows += interval.rows
            done += interval.done
        return Rates(seconds, instances, size, studies, rows, done)

    @property
    def recent_rates(self) -> Rates:
        """Rates of the last minutes of work."""
        return self.rates(_LATE)

    @property
    def seconds_left(self) -> float | None:
        """Remaining work time at the pace of the last day of work; None while unknown."""
        rates = self.rates(_TREND)
        if self.is_over or rates.seconds < _LEAST_SECONDS or rates.done <= 0:
            return None
        return (1 - self.fraction) * rates.seconds / rates.done

    @property
    def ends_at(self) -> datetime | None:
        """Estimated end, if a run works whenever the node's access schedule is open."""
        left = self.seconds_left
        if left is None:
            return None
        if self.schedule is None:
            return self.at + timedelta(seconds=left)
        return _end_of_work(self.schedule, self.at, left)

    @property
    def window_use(self) -> tuple[float, float] | None:
        """Seconds the schedule was open since the first sample, and seconds of work in them."""
        if self.schedule is None or not self.samples:
            return None
        begin = self.samples[0].at
        opened = sum(
            (until - at).total_seconds()
            for at, until, is_open in windows(self.schedule, begin, self.at)
            if is_open
        )
        used = sum(s.seconds for s in self.intervals if s.worked and s.schedule_open)
        return opened, min(used, opened)

    @property
    def window_now(self) -> str:
        """State of the node's access schedule now, in words; empty without one."""
        if self.schedule is None:
            return ""
        return format_schedule_state(self.schedule, self.at, self.associations)


def summarize(
    ledger: Ledger,
    cohort: Cohort,
    *,
    schedule: AccessSchedule | None = None,
    associations: int = 1,
    without_run: int | None = None,
    at: datetime | None = None,
) -> CohortSummary:
    """Summarize a cohort from its ledger.

    Parameters
    ----------
    ledger : Ledger
        Ledger with the cohort.
    cohort : Cohort
        The cohort.
    schedule : AccessSchedule, optional
        Access schedule of the node.
    associations : int
        Limit on the node's associations.
    without_run : int, optional
        Number of a run that is about to end and does not count as at work.
    at : datetime, optional
        Time of the summary; now by default.
    """
    # The studies first: rows are judged later, so none seems to be lost in between.
    groups = ledger.progress.study_groups(cohort.number)
    totals = ledger.progress.study_totals(cohort.number)
    row_groups: dict[tuple[Verdict, str], RowGroup] = {}
    for row, verdict in ledger.rows.with_verdicts(cohort.number):
        key = verdict.verdict, verdict.reason
        group = row_groups.get(key)
        if group is None:
            group = row_groups[key] = RowGroup(verdict.verdict, reason_for(verdict.reason))
        group.rows += 1
        if len(group.examples) < ROWS_NAMED:
            group.examples.append((row, verdict))
        totals.rows[verdict.verdict] += 1
        totals.unproved.update(verdict.gaps)
    living = [run for run in ledger.runs.under_way(cohort.number) if run.number != without_run]
    trouble = None if living else ledger.runs.last_reason(cohort.number)
    zone = ZoneInfo(schedule.time_zone) if schedule else datetime.now().astimezone().tzinfo
    return CohortSummary(
        cohort=cohort,
        at=at or datetime.now(UTC),
        zone=zone or UTC,
        totals=totals,
        row_groups=sorted(row_groups.values(), key=lambda e: (-e.rows, e.verdict, e.reason.code)),
        groups=groups,
        failed=ledger.studies.latest_failures(cohort.number, STUDIES_NAMED_OF_A_REASON)[
            :STUDIES_NAMED
        ],
        slowest=ledger.studies.slowest(cohort.number, SLOWEST_NAMED),
        samples=ledger.progress.samples(cohort.number),
        notes=ledger.cohorts.notes(cohort.number),
        accepted=ledger.acceptances.of_cohort(cohort.number),
        runs=living,
        trouble=reason_for(trouble) if trouble else None,
        schedule=schedule,
        associations=associations,
    )


def label_of(modalities: Iterable[str]) -> str:
    """Return the modality of a study for display; unprintable characters become ``?``."""
    name = format_modalities(modalities)[:24]
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def windows(
    schedule: AccessSchedule, begin: datetime, end: datetime
) -> Iterator[tuple[datetime, datetime, bool]]:
    """Yield begin, end and openness of the schedule's windows between two times."""
    for at, state in schedule_states(schedule, begin):
        if at >= end:
            return
        yield at, min(end, state.until or end), not state.closed


def _intervals(
    samples: Sequence[Sample], rows: int, schedule: AccessSchedule | None
) -> Iterator[Interval]:
    for before, after in zip(samples, samples[1:], strict=False):
        is_open = after.schedule_open
        if is_open is None:
            is_open = schedule is None or not schedule_state(schedule, before.at).closed
        # During discovery the number of studies grows, which says nothing of the pace.
        pulled = not before.unasked and not after.unasked
        yield Interval(
            begin=before.at,
            end=after.at,
            worked=after.run_began is not None and after.run_began <= before.at,
            instances=max(0, after.stored - before.stored),
            size_bytes=max(0, after.size_bytes - before.size_bytes),
            studies=max(0, _ended(after) - _ended(before)),
            rows=max(0, before.unasked - after.unasked),
            done=max(0.0, _fraction(after, rows) - _fraction(before, rows)) if pulled else 0.0,
            schedule_open=is_open,
        )


def _ended(sample: Sample) -> int:
    return sample.studies[StudyState.ARCHIVED] + sample.studies[StudyState.FAILED]


def _fraction(sample: Sample, rows: int) -> float:
    if not sample.studies.total():
        return 0.0
    return finished_fraction(
        Totals(
            rows=Counter({Verdict.PENDING: rows}),
            studies=sample.studies,
            expected=sample.expected,
            received=sample.received,
            stored=sample.stored,
            rejected=0,
            size_bytes=sample.size_bytes,
            unasked=sample.unasked,
        )
    )


def _end_of_work(schedule: AccessSchedule, now: datetime, seconds: float) -> datetime | None:
    """Return when the schedule has been open for so long; None if not within a year."""
    for at, state in schedule_states(schedule, now):
        if at - now > timedelta(days=366):
            return None
        if state.closed:
            continue
        if state.until is None or (state.until - at).total_seconds() >= seconds:
            return at + timedelta(seconds=seconds)
        seconds -= (state.until - at).total_seconds()
    return None
