"""Reports of a run while it works: waits, samples, the report page, the final event."""

from __future__ import annotations

import contextlib

from prefect_dicom.config.access_schedule import schedule_state
from prefect_dicom.core.errors import LedgerError, PrefectDicomError
from prefect_dicom.core.events import Event
from prefect_dicom.core.model import RequestedState, StudyState, Verdict
from prefect_dicom.ledger import Totals
from prefect_dicom.report import next_count
from prefect_dicom.report.background import BackgroundPage
from prefect_dicom.run.context import RunContext

_SAMPLE_SECONDS = 30.0


class RunReporting:
    """Reports of a run for people: what it waits for, where its cohort stands, how it ended."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._sample_at = float("-inf")
        """When the next sample of the cohort is due."""
        self.page: BackgroundPage | None = None
        """The report of the cohort, while the run is under way."""

    def start(self) -> None:
        """Sample the cohort, and start the time to its first report."""
        self.sample(now=True)
        context = self._context
        self.page = BackgroundPage(context.site, context.cohort, context.record.number)

    def close(self) -> None:
        """Sample the cohort, and stop writing its report."""
        self.sample(now=True)
        if self.page is not None:
            self.page.close()

    def totals(self) -> Totals:
        """Where the cohort stands."""
        return self._context.ledger.progress.totals(self._context.cohort.number)

    def format_waits(self) -> str:
        """Format what the run waits for, or sends fewer requests for; empty if nothing."""
        context = self._context
        words = []
        if context.control.requested_state() is RequestedState.PAUSED:
            how = "it is resumed in Prefect"
            if context.control.is_paused_in_ledger:
                how = f"`prefect-dicom resume {context.cohort.number}`"
            words.append(f"paused, until {how}")
        for node in context.access.admissions() or [context.cohort.node]:
            words += [context.access.format_state(node), context.access.schedules.format(node)]
        return "; ".join(filter(None, words))

    def record_waits(self, words: str = "") -> None:
        """Record for ``status`` what the run waits for: these words, or what its nodes make it."""
        words = "; ".join(filter(None, (words, self.format_waits())))
        with contextlib.suppress(LedgerError):
            # What cannot be written now is written with the next change.
            self._context.ledger.runs.record_waits(self._context.record, words)

    def sample(self, *, now: bool = False) -> None:
        """Record where the cohort stands; at most every 30 s, all runs together, but ``now``.

        Also refreshes the report. If the ledger cannot be written, one point of a curve is lost;
        the next write that matters raises the error.
        """
        context = self._context
        if not now and self.page is not None:
            self.page.refresh()
        began = context.clock.monotonic()
        if not now and began < self._sample_at:
            return
        schedule = context.site.nodes[context.cohort.node].access_schedule
        at = context.clock.now()
        with contextlib.suppress(LedgerError):
            context.ledger.progress.record_sample(
                context.cohort.number,
                context.record,
                schedule_open=None if schedule is None else not schedule_state(schedule, at).closed,
                least_seconds=0 if now else _SAMPLE_SECONDS,
                at=at,
            )
        self._sample_at = next_count(began, context.clock.monotonic(), _SAMPLE_SECONDS)

    def publish_end(self, trouble: PrefectDicomError | None, totals: Totals) -> None:
        """Publish where the run leaves its cohort, and the error that stopped its last pass."""
        rows = {f"rows_{verdict}".replace("-", "_"): totals.rows[verdict] for verdict in Verdict}
        studies = {f"studies_{state}": totals.studies[state] for state in StudyState}
        instances = {"instances": totals.stored, "size_bytes": totals.size_bytes}
        self._context.events.publish(
            Event(
                name="cohort.finished",
                at=self._context.clock.now(),
                reason=None if trouble is None else trouble.code,
                figures={"rows": totals.rows.total()} | rows | studies | instances,
            )
        )

    def write_page(self, trouble: PrefectDicomError | None) -> None:
        """Write the report of the cohort as the run leaves it."""
        if trouble is not None:
            self._context.ledger.runs.record_reason(self._context.record, trouble.code)
        self.sample(now=True)
        if self.page is not None:
            self.page.write_last(self._context.ledger)
