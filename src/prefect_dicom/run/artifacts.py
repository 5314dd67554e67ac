"""What Prefect shows of a run: counts and reasons as artifacts and events.

No patient data, no UIDs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect_dicom.core.events import Event
from prefect_dicom.core.reasons import REASONS
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
from prefect_dicom.run.engine import Artifact, ArtifactKind, Engine
from prefect_dicom.run.progress import Pace

PREFIX = "prefect-dicom"
_EVERY_SECONDS = 10.0


class ProgressArtifact:
    """A progress bar in Prefect's UI. An unreachable server never stops the work."""

    def __init__(self, engine: Engine, cohort: str) -> None:
        self._engine = engine
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
        if self._id is None:
            artifact = Artifact(ArtifactKind.PROGRESS, self._key, words, percent)
            self._id = self._engine.create_artifact(artifact)
        else:
            self._engine.update_progress(self._id, percent, words)


def link_report(engine: Engine, cohort: Cohort, reports: Path) -> None:
    """Link the report of a cohort, which is written after a minute of a run or at its end."""
    engine.create_artifact(
        Artifact(
            ArtifactKind.LINK,
            artifact_key("report", cohort.name),
            "On the worker; rewritten about every minute while a run is under way",
            (reports / cohort.name / REPORT).absolute().as_uri(),
            f"{REPORT} of {cohort.name}",
        )
    )


def publish_results(
    engine: Engine, ledger: Ledger, cohort: Cohort, totals: Totals, folder: Path
) -> None:
    """Publish the result table and the summary of a cohort, whose reports are in ``folder``."""
    key = artifact_key("results", cohort.name)
    table = reason_table(ledger.rows.verdicts(cohort.number))
    words = "Rows by verdict and reason, and what to do"
    engine.create_artifact(Artifact(ArtifactKind.TABLE, key, words, table))
    engine.create_artifact(
        Artifact(
            ArtifactKind.MARKDOWN,
            f"{key}-summary",
            "State of the cohort, and paths of its reports",
            summary_markdown(cohort, totals, table, folder),
        )
    )


def publish_estimate(engine: Engine, cohort: Cohort, estimate: Estimate) -> None:
    """Publish what pulling a cohort would take, by modality."""
    lines = [asdict(line) for line in (*estimate.shares, estimate.total)]
    key = artifact_key("estimate", cohort.name)
    engine.create_artifact(Artifact(ArtifactKind.TABLE, key, format_estimate(estimate), lines))


def artifact_key(kind: str, cohort: str) -> str:
    """An artifact key: lower-case letters, digits and dashes only."""
    return re.sub("[^a-z0-9]", "-", f"dicom-{kind}-{cohort}".lower())


def prefect_event(event: Event, cohort: Cohort) -> dict[str, Any]:
    """The arguments of Prefect's ``emit_event``.

    The resource is the study, else the node, else the cohort; the others are related resources.
    The payload has the reason, with what it means and what to do, and the figures.
    """
    of_cohort = {
        "prefect.resource.id": f"{PREFIX}.cohort.{cohort.number}",
        "prefect.resource.name": cohort.name,
    }
    resources = [of_cohort | {"prefect.resource.role": "cohort"}]
    payload: dict[str, Any] = {"cohort": cohort.name, **event.figures}
    if event.node is not None:
        node = f"{PREFIX}.node.{event.node}"
        resources.insert(0, {"prefect.resource.id": node, "prefect.resource.role": "node"})
        payload["node"] = event.node
    if event.reference is not None:
        study = f"{PREFIX}.study.{event.reference}"
        resources.insert(0, {"prefect.resource.id": study, "prefect.resource.role": "study"})
        payload["study"] = event.reference
    if event.reason is not None:
        reason = REASONS[event.reason]
        payload |= {"reason": reason.code, "meaning": reason.meaning, "advice": reason.what_to_do}
    return {
        "event": f"{PREFIX}.{event.name}",
        "occurred": event.at,
        "resource": resources[0],
        "related": resources[1:],
        "payload": payload,
    }
