"""Counts and reasons as Prefect artifacts; no patient data, no UIDs."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from prefect_dicom.ledger import Cohort, Ledger, Totals
from prefect_dicom.report import (
    REPORT,
    finished_fraction,
    format_totals,
    next_count,
    reason_table,
    summary_markdown,
)
from prefect_dicom.report.estimate import Estimate
from prefect_dicom.report.formatting import format_estimate
from prefect_dicom.run.progress import Pace

_EVERY_SECONDS = 10.0


class ProgressArtifact:
    """A progress bar in Prefect's UI. An unreachable server never stops the work."""

    def __init__(self, cohort: str) -> None:
        self._pace = Pace()
        self._key = artifact_key("progress", cohort)
        self._id: UUID | None = None
        self._next = float("-inf")

    def show(self, count: Callable[[], Totals], waits: str = "", *, now: bool = False) -> None:
        """Show the progress of the cohort and what it waits for: every ten seconds, or ``now``.

        ``count`` is called only then, and seldom enough that counting takes less than a twentieth
        of the time.
        """
        began = time.monotonic()
        if not now and began < self._next:
            return
        totals = count()
        self._pace.note(began, totals)
        self._next = next_count(began, time.monotonic(), _EVERY_SECONDS)
        percent = round(100 * finished_fraction(totals), 1)
        parts = (self._pace.format_phase(), format_totals(totals), self._pace.format_left(), waits)
        words = "; ".join(filter(None, parts))
        with contextlib.suppress(Exception):
            if self._id is None:
                created = create_progress_artifact(percent, key=self._key, description=words)
                # Prefect returns a coroutine inside an event loop; a run has none.
                self._id = created if isinstance(created, UUID) else None
            else:
                update_progress_artifact(self._id, percent, description=words)


def link_report(cohort: Cohort, reports: Path) -> None:
    """Link the report of a cohort, which is written after a minute of a run or at its end."""
    with contextlib.suppress(Exception):
        create_link_artifact(
            (reports / cohort.name / REPORT).absolute().as_uri(),
            link_text=f"{REPORT} of {cohort.name}",
            key=artifact_key("report", cohort.name),
            description="On the worker; rewritten about every minute while a run is under way",
        )


def publish_results(ledger: Ledger, cohort: Cohort, totals: Totals, folder: Path) -> None:
    """Publish the result table and the summary of a cohort, whose reports are in ``folder``."""
    key = artifact_key("results", cohort.name)
    table = reason_table(ledger.rows.verdicts(cohort.number))
    create_table_artifact(table, key=key, description="Rows by verdict and reason, and what to do")
    create_markdown_artifact(
        summary_markdown(cohort, totals, table, folder),
        key=f"{key}-summary",
        description="State of the cohort, and paths of its reports",
    )


def publish_estimate(cohort: Cohort, estimate: Estimate) -> None:
    """Publish what pulling a cohort would take, by modality."""
    lines = [*estimate.shares, estimate.total]
    create_table_artifact(
        [asdict(line) for line in lines],
        key=artifact_key("estimate", cohort.name),
        description=format_estimate(estimate),
    )


def artifact_key(kind: str, cohort: str) -> str:
    """An artifact key: lower-case letters, digits and dashes only."""
    return re.sub("[^a-z0-9]", "-", f"dicom-{kind}-{cohort}".lower())
