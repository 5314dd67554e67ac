"""The report of a cohort as one HTML page that needs nothing else: no script, no font, no network.

Whoever sends objects or cohort files decides what is in their texts; all of it is escaped, and
the page's own policy lets no script run.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta, tzinfo
from functools import cache
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, pass_context
from jinja2.runtime import Context
from markupsafe import Markup, escape

from prefect_dicom.config.access_schedule import AccessSchedule
from prefect_dicom.core.files import create_file
from prefect_dicom.core.model import CohortRow, DateRange, Disposition, StudyState, Verdict
from prefect_dicom.ledger import Cohort, Ledger, StudyRecord
from prefect_dicom.report import plots
from prefect_dicom.report.acceptances import format_acceptance
from prefect_dicom.report.files import replacing
from prefect_dicom.report.formatting import format_bytes, format_duration, format_gaps
from prefect_dicom.report.summary import (
    MODALITIES_NAMED,
    ROWS_NAMED,
    CohortSummary,
    RowGroup,
    label_of,
    summarize,
)
from prefect_dicom.report.tables import (
    REPORT,
    is_archived,
    unarchived_rows,
)

REPORT_WITH_IDENTIFIERS = "report-with-identifiers.html"
_STEPS = 4
_COLOURS = {
    Verdict.ARCHIVED: "archived",
    Verdict.INCOMPLETE: "pending",
    Verdict.PENDING: "pending",
    Verdict.EXCLUDED: "pending",
}


def write_page(
    ledger: Ledger,
    cohort: Cohort,
    reports: Path,
    *,
    schedule: AccessSchedule | None = None,
    associations: int = 1,
    without_run: int | None = None,
    with_identifiers: bool = False,
) -> Path:
    """Write ``report.html`` into a cohort's folder, or put a new one in its place.

    Parameters
    ----------
    reports : Path
        The site's folder of reports.
    with_identifiers : bool
        Name patients and studies as the cohort file and the PACS do; the page is
        ``report-with-identifiers.html`` then, for this user alone.

    The others are those of :func:`~prefect_dicom.report.summary.summarize`.

    Returns
    -------
    Path
        Of the page.
    """
    summary = summarize(
        ledger, cohort, schedule=schedule, associations=associations, without_run=without_run
    )
    folder = reports / cohort.name
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / (REPORT_WITH_IDENTIFIERS if with_identifiers else REPORT)
    # What is left of bytes in an undeclared character set has no form in UTF-8.
    data = page(summary, with_identifiers=with_identifiers).encode("utf-8", "replace")
    with replacing(target) as path:
        mode = 0o600 if with_identifiers else 0o666
        with open(create_file(path, mode), "wb") as file:
            file.write(data)
    return target


def page(summary: CohortSummary, *, with_identifiers: bool = False) -> str:
    """The report as HTML."""
    totals = summary.totals
    # Pending rows are shown as progress, not as something that went wrong.
    unwell = [
        group
        for group in summary.row_groups
        if not group.verdict.is_as_wanted and group.verdict is not Verdict.PENDING
    ]
    drawable = len(summary.samples) > 1 and summary.samples[-1].studies.total() > 0
    kinds = summary.modalities[:MODALITIES_NAMED]
    identifying = "PatientID, AccessionNumber, StudyDate, StudyDescription"
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            summary=summary,
            with_identifiers=with_identifiers,
            identifying=[(identifying, "")] if with_identifiers else [],
            percent=_percent(summary.fraction),
            state=_state(summary),
            parts=[
                ("archived", totals.studies[StudyState.ARCHIVED], "archived"),
                ("failed", totals.studies[StudyState.FAILED], "failed"),
                ("under way", totals.studies[StudyState.LISTED], "under-way"),
                ("pending", totals.studies[StudyState.PENDING], "pending"),
            ],
            late=summary.recent_rates,
            all=summary.rates(),
            best=_best_hour(summary),
            ends=_format_end(summary),
            window_use=summary.window_use,
            unwell=unwell,
            accepted=[format_acceptance(each) for each in summary.accepted],
            ambiguous=any(group.verdict is Verdict.AMBIGUOUS for group in unwell),
            steps=_what_next(summary, unwell),
            progress=plots.progress(summary) if drawable else "",
            throughput=plots.throughput(summary) if drawable else "",
            sizes=plots.sizes(kinds) if any(kind.size_bytes for kind in kinds) else "",
            kinds=kinds,
            rows_named=ROWS_NAMED,
            colours={verdict: _COLOURS.get(verdict, "failed") for verdict in Verdict},
            zone=summary.at.astimezone(summary.zone).tzname(),
            version=version("prefect-dicom"),
        )
    )


def _percent(fraction: float) -> str:
    """Whole percents; what is not finished is not 100 of them."""
    return str(100 if fraction >= 1 else min(99, int(100 * fraction)))


def _state(summary: CohortSummary) -> tuple[str, str]:
    """What the cohort is at: a class of its pill, and the words on it."""
    if summary.runs:
        if all(run.paused_at for run in summary.runs):
            return "waits", "paused"
        if summary.window_now.startswith("closed"):
            return "waits", "waiting for a window"
        if all("waiting" in run.waits for run in summary.runs):
            return "waits", "waiting"
        return "works", "at work" if len(summary.runs) == 1 else f"{len(summary.runs)} at work"
    if not summary.is_over:
        return "stuck", "not at work"
    if unarchived := unarchived_rows(summary.totals):
        return "stuck", f"ended, {_counted(unarchived, 'row')} not archived"
    if not is_archived(summary.totals, may_be_empty=summary.cohort.may_be_empty):
        return "stuck", "ended, nothing to archive"
    return "done", "done"


def _what_next(summary: CohortSummary, unwell: list[RowGroup]) -> list[str]:
    """What is to be done, the most urgent first; backquotes around what is typed."""
    name = summary.cohort.name
    steps = []
    pending = summary.totals.rows[Verdict.PENDING]
    if summary.trouble is not None and not summary.is_over:
        reason = summary.trouble
        steps.append(f"The last run was kept from its end: {reason.meaning} {reason.what_to_do}")
    for run in summary.runs:
        if run.paused_at:
            steps.append(f"Paused: `prefect-dicom resume {name}` lets it go on.")
            break
        if run.waits:
            steps.append(f"Now: {run.waits}.")
    if not summary.runs and pending:
        steps.append(
            f"No run is at work, and {_counted(pending, 'row')} not begun or not finished: "
            f"`prefect-dicom rerun {name}` goes on with them."
        )
    for group in unwell[: _STEPS - 1]:
        rows = _counted(group.rows, "row")
        if group.reason.disposition is Disposition.TRANSIENT and summary.runs:
            steps.append(f"{rows} `{group.reason.code}`: tried again before the run ends.")
        else:
            steps.append(f"{rows} `{group.reason.code}`: {group.reason.what_to_do}")
    if summary.runs:
        steps.append("The run goes on by itself." if unwell else "Nothing: the run goes on.")
    elif any(group.retried_by_rerun for group in unwell) and not pending:
        steps.append(f"Then `prefect-dicom rerun {name}`.")
    if not steps:
        steps.append(
            f"Nothing. `prefect-dicom verify {name}` tells any time whether the archive is still "
            "what it was."
        )
    return steps


def _format_end(summary: CohortSummary) -> str:
    left = summary.seconds_left
    if left is None:
        return ""
    words = f"About {format_duration(left)} of work left"
    if not summary.runs:
        return f"{words}, once a run is at work."
    ends = summary.ends_at
    if ends is None:
        return f"{words}, and no window in which to do it."
    return f"{words}: done about {_moment(ends, summary.zone, summary.at)}."


def _best_hour(summary: CohortSummary) -> float | None:
    """The most bytes per second over an hour; None where it has not worked for two."""
    intervals = summary.intervals
    if not intervals or intervals[-1].end - intervals[0].begin < timedelta(hours=2):
        return None
    best, size, first = 0.0, 0, 0
    for interval in intervals:
        size += interval.size_bytes
        while interval.end - intervals[first].begin > timedelta(hours=1) and (
            intervals[first] is not interval
        ):
            size -= intervals[first].size_bytes
            first += 1
        seconds = (interval.end - intervals[first].begin).total_seconds()
        best = max(best, size / max(3600.0, seconds))
    return best


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("prefect_dicom.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters.update(
        number=lambda count: f"{count:,}",
        counted=_counted,
        # A number and its unit stay on one line.
        bytes=lambda size: _kept_together(format_bytes(size)),
        duration=lambda seconds: _kept_together(format_duration(seconds)),
        advice=_advice,
        lines=_lines,
        identity=_identity,
        asked_for=_asked_for,
        modality=_modality,
        gaps=format_gaps,
        moment=_moment_there,
    )
    return environment


@pass_context
def _moment_there(context: Context, at: datetime) -> str:
    summary = context["summary"]
    return _moment(at, summary.zone, summary.at)


def _moment(at: datetime, zone: tzinfo, now: datetime) -> str:
    there, here = at.astimezone(zone), now.astimezone(zone)
    year = "" if there.year == here.year else f" {there:%Y}"
    return f"{there:%a %d %b}{year}, {there:%H:%M}"


def _counted(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _kept_together(words: str) -> str:
    return words.replace(" ", "\N{NO-BREAK SPACE}")


def _advice(text: str) -> Markup:
    """A sentence of ours or of a peer, with what stands between backquotes as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _lines(group: RowGroup) -> str:
    named = ", ".join(str(row.line) for row, _ in group.examples)
    more = group.rows - len(group.examples)
    return f"{named} and {more:,} more" if more else named


def _identity(record: StudyRecord) -> str:
    its = record.study
    return _joined(its.patient_id, its.accession_number, its.study_date, its.study_description)


def _asked_for(row: CohortRow) -> str:
    dates = _dates(row.study_date)
    return _joined(row.patient_id, row.accession_number, row.study_instance_uid, dates)


def _joined(*texts: str | None) -> str:
    return " \N{MIDDLE DOT} ".join(text for text in texts if text)


def _dates(dates: DateRange | None) -> str:
    return "" if dates is None else dates.text


def _modality(study: StudyRecord) -> str:
    return label_of(study.study.modalities)
