"""The state of a cohort, for people and as JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.table import Table

from prefect_dicom.cli.app import DEFAULT_SITE, Exit, counted, output
from prefect_dicom.config.access_schedule import format_schedule_state
from prefect_dicom.config.site import Site
from prefect_dicom.core.model import Verdict
from prefect_dicom.core.reasons import REASONS

if TYPE_CHECKING:
    from prefect_dicom.ledger import Cohort, Ledger, LivingRun, Totals


def print_schedules(site: Site, nodes: Iterable[str]) -> None:
    """Print the state of the nodes' access schedules."""
    for words in format_schedules(site, nodes).values():
        output.print(words, markup=False, soft_wrap=True)


def format_schedules(site: Site, nodes: Iterable[str]) -> dict[str, str]:
    """Format the state of the nodes' access schedules, by name of the node."""
    now = datetime.now(UTC)
    return {
        name: f"node {name}: "
        + format_schedule_state(schedule, now, site.effective_node(name).limits.associations)
        for name in nodes
        if name in site.nodes and (schedule := site.nodes[name].access_schedule) is not None
    }


def control_state(cohort: Cohort, runs: Collection[LivingRun]) -> dict[str, Any]:
    """Requested state of a cohort and state of its runs, for the JSON output."""
    return {
        "paused": cohort.paused,
        "priority": cohort.priority,
        "runs": [
            {
                "number": run.number,
                "kind": run.kind,
                "started_at": run.started_at.isoformat(timespec="seconds"),
                "waits": run.paused_at is not None,
                "cancelled": run.cancelled,
                "waits_for": run.waits,
            }
            for run in runs
        ],
    }


def format_runs(cohort: Cohort, runs: Collection[LivingRun]) -> str:
    """Format the state of a cohort's runs."""
    words = ["paused"] if cohort.paused else []
    if cohort.priority:
        words.append(f"priority {cohort.priority}")
    ending = sum(run.cancelled for run in runs)
    waiting = sum(run.paused_at is not None and not run.cancelled for run in runs)
    states = (
        (len(runs) - ending - waiting, "under way"),
        (waiting, "waiting to be resumed"),
        (ending, "ending"),
    )
    words += [f"{counted(number, 'run')} {state}" for number, state in states if number]
    words += dict.fromkeys(run.waits for run in runs if run.waits)
    return ", ".join(words if runs else [*words, "no run under way"])


def print_next_command(cohort: Cohort, reference: str) -> None:
    """Print the command that continues a cohort."""
    print_command(f"{'resume' if cohort.paused else 'rerun'} {cohort.name}", reference)


def print_command(command: str, reference: str) -> None:
    """Print a command to go on with, at the site that the user named."""
    option = "" if reference == DEFAULT_SITE else f" --site {reference}"
    output.print(f"Go on with: prefect-dicom {command}{option}", markup=False, soft_wrap=True)


def show(
    site: Site,
    reference: str,
    ledger: Ledger,
    cohort: Cohort,
    as_json: bool,
    error: BaseException | None = None,
) -> int:
    """Print the state of a cohort and what to do next; the exit code says whether all is archived.

    Parameters
    ----------
    reference : str
        How the user named the site.
    error : BaseException, optional
        The error that ended the run; its code is part of the JSON output.
    """
    from prefect_dicom.report import (
        CANDIDATES,
        REPORT,
        RESULTS,
        format_acceptance,
        format_totals,
        is_archived,
        open_questions,
        reason_table,
        unarchived_rows,
    )

    totals = ledger.progress.totals(cohort.number)
    reasons = reason_table(ledger.rows.verdicts(cohort.number))
    folder = site.reports / cohort.name
    missing = unarchived_rows(totals)
    notes = ledger.cohorts.notes(cohort.number)
    # As it stands now: somebody may have paused it since the run began.
    cohort, runs = ledger.cohorts.get(cohort.name), ledger.runs.under_way(cohort.number)
    is_whole = is_archived(totals, may_be_empty=cohort.may_be_empty)
    code = Exit.ALL_WELL if is_whole else Exit.NOT_ALL
    if runs and not cohort.paused:
        reasons = [row | _of_a_living_run(row, runs) for row in reasons]
    if as_json:
        result = figures(cohort, totals) | control_state(cohort, runs)
        result |= {"reasons": reasons, "reports": str(folder)}
        result["notes"] = [{"node": node, "words": words} for node, words in notes]
        result["windows"] = list(format_schedules(site, cohort.nodes).values())
        if error is not None:
            result["error"] = getattr(error, "code", "unexpected")
        print(json.dumps(result, indent=1))
        return code
    table = Table(title=f"Cohort {cohort.number}: {cohort.name}", title_justify="left")
    table.add_column("rows", justify="right")
    table.add_column("verdict", no_wrap=True)
    table.add_column("reason", no_wrap=True)
    table.add_column("what to do")
    for row in reasons:
        table.add_row(str(row["rows"]), row["verdict"], row["reason"], row["what_to_do"])
    output.print(table)
    output.print(format_totals(totals), markup=False, soft_wrap=not output.is_terminal)
    if not is_whole and not missing:
        output.print("Nothing is archived: every row is excluded.")
    if runs or cohort.paused or cohort.priority:
        output.print(f"{format_runs(cohort, runs)}.".capitalize(), soft_wrap=True)
    print_schedules(site, cohort.nodes)
    _print_notes(notes)
    if (folder / REPORT).exists():
        output.print(f"Report: {folder / REPORT}", markup=False, soft_wrap=True)
    if (folder / RESULTS).exists():
        output.print(f"Results: {folder / RESULTS}", markup=False, soft_wrap=True)
    if (folder / CANDIDATES).exists():
        output.print(f"Candidates: {folder / CANDIDATES}", markup=False, soft_wrap=True)
    for each in ledger.acceptances.of_cohort(cohort.number):
        output.print(f"Accepted: {format_acceptance(each)}.", markup=False, soft_wrap=True)
    if waiting := open_questions(ledger, cohort):
        output.print(
            f"{counted(len(waiting), 'study waits', 'studies wait')} for a decision: "
            f"prefect-dicom accept {cohort.name}",
            markup=False,
            soft_wrap=True,
        )
    if missing and (cohort.paused or not runs):
        print_next_command(cohort, reference)
    return code


def _print_notes(notes: Iterable[tuple[str, str]]) -> None:
    for node, words in notes:
        output.print(f"Note ({node}): {words}.", markup=False, soft_wrap=True)


def _of_a_living_run(row: Mapping[str, Any], runs: Collection[LivingRun]) -> dict[str, Any]:
    """What is said otherwise of rows that a run is at work on."""
    if row["verdict"] != Verdict.PENDING:
        return {}
    waits = "; ".join(dict.fromkeys(run.waits for run in runs if run.waits))
    return {
        "meaning": "A run is under way, and has not come to it or not finished it.",
        "what_to_do": f"Nothing: a run is at work on it{f' ({waits})' if waits else ''}.",
    }


def show_estimate(
    site: Site,
    reference: str,
    ledger: Ledger,
    cohort: Cohort,
    as_json: bool,
    error: BaseException | None = None,
) -> int:
    """Print the estimate of a cohort; the exit code says whether all of its rows were found."""
    from prefect_dicom.report import RESULTS, format_bytes
    from prefect_dicom.report.estimate import ESTIMATE, estimate_pull
    from prefect_dicom.report.formatting import format_estimate

    estimate = estimate_pull(ledger, cohort, site)
    folder = site.reports / cohort.name
    code = Exit.NOT_ALL if estimate.unfound_rows else Exit.ALL_WELL
    if as_json:
        result = _named(cohort) | estimate.as_result() | {"reports": str(folder)}
        if error is not None:
            result["error"] = getattr(error, "code", "unexpected")
        print(json.dumps(result, indent=1))
        return code
    table = Table(title=f"Cohort {cohort.number}: {cohort.name}, a dry run", title_justify="left")
    table.add_column("modality", no_wrap=True)
    for name in ("studies", "series", "instances", "size", "an instance"):
        table.add_column(name, justify="right")
    table.add_column("its size", no_wrap=True)
    for share in (*estimate.shares, estimate.total):
        if share is estimate.total:
            table.add_section()
        table.add_row(
            share.modality,
            *(f"{number:,}" for number in (share.studies, share.series, share.instances)),
            format_bytes(share.size_bytes),
            format_bytes(share.instance_bytes),
            "" if share is estimate.total else "as archived before" if share.learned else "assumed",
        )
    output.print(table)
    for (word, reason), count in estimate.rows.most_common():
        what = f": {REASONS[reason].meaning} {REASONS[reason].what_to_do}" if reason else ""
        output.print(f"{counted(count, 'row')} {word}{what}", markup=False, soft_wrap=True)
    output.print(format_estimate(estimate), markup=False, soft_wrap=not output.is_terminal)
    _print_notes(ledger.cohorts.notes(cohort.number))
    if (folder / RESULTS).exists():
        output.print(f"Results: {folder / RESULTS}", markup=False, soft_wrap=True)
        output.print(f"This table: {folder / ESTIMATE}.csv", markup=False, soft_wrap=True)
    return code


def figures(cohort: Cohort, totals: Totals) -> dict[str, Any]:
    """The state of a cohort, for the JSON output."""
    return _named(cohort) | {
        "rows": {str(v): n for v, n in totals.rows.items() if n},
        "studies": {str(s): n for s, n in totals.studies.items() if n},
        "expected_instances": totals.expected,
        "archived_instances": totals.stored,
        "size_bytes": totals.size_bytes,
        "unproved": dict(totals.unproved.most_common()),
        "evidence": {str(e): n for e, n in totals.evidence.items() if n},
    }


def _named(cohort: Cohort) -> dict[str, Any]:
    return {
        "cohort": cohort.name,
        "number": cohort.number,
        "node": cohort.node,
        "nodes": [*cohort.nodes],
    }
