"""What the pulling flows do, with any engine: discover, pull, report.

A dry run ends after discovery, with an estimate. A run that is
cancelled ends at once, without reports.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from prefect_dicom.config.site import Site
from prefect_dicom.core.errors import PrefectDicomError
from prefect_dicom.ledger import Cohort, Ledger, Totals
from prefect_dicom.report import format_totals, is_archived, write_reports
from prefect_dicom.report.estimate import Estimate, estimate_pull, write_estimate
from prefect_dicom.report.formatting import format_estimate
from prefect_dicom.run.artifacts import (
    ProgressArtifact,
    link_report,
    publish_estimate,
    publish_results,
)
from prefect_dicom.run.chunk_stages import pull_in_chunks
from prefect_dicom.run.engine import EndName, Engine, RunEnd
from prefect_dicom.run.loop import DiscoveryLoop, PullLoop, note_disabled_nodes, remaining_error
from prefect_dicom.run.monitoring import measured
from prefect_dicom.run.run import DryRun, Run, open_dry_run, open_run


def pull(engine: Engine, site: Site, ledger: Ledger, cohort: Cohort) -> RunEnd:
    """Pull a registered cohort as far as possible now."""
    with open_run(site, cohort.number, ledger=ledger) as run, measured(run):
        totals = run_pipeline(run, engine)
        end = end_of(run, totals)
    engine.info(f"cohort {cohort.name}: {format_totals(totals)}")
    return end


def plan(engine: Engine, site: Site, ledger: Ledger, cohort: Cohort) -> RunEnd:
    """Find the studies of a registered cohort, and estimate what pulling them would take."""
    with open_dry_run(site, cohort.number, ledger=ledger) as run, measured(run):
        words = format_estimate(run_dry(run, engine))
        if run.control.is_stopping():
            return end_of(run, run.reporting.totals())
    return RunEnd(EndName.PLANNED, words)


def rerun(
    engine: Engine, site: Site, ledger: Ledger, cohort: str, chosen: Mapping[str, tuple[Any, ...]]
) -> RunEnd:
    """Continue a cohort: what was interrupted, and the chosen failures.

    Parameters
    ----------
    cohort : str
        Name or number.
    chosen : mapping
        Which failures are retried: arguments of
        :meth:`~prefect_dicom.ledger.cohorts.Cohorts.reopen`.
    """
    with open_run(site, cohort, "rerun", ledger=ledger) as run, measured(run):
        reopened = ledger.cohorts.reopen(run.cohort.number, **chosen)
        engine.info(f"{reopened.studies} studies and {reopened.rows} rows again")
        return end_of(run, run_pipeline(run, engine))


def end_of(run: DryRun, totals: Totals) -> RunEnd:
    """How a run on a cohort ended that no error has stopped."""
    words = format_totals(totals)
    if is_archived(totals, may_be_empty=run.cohort.may_be_empty):
        return RunEnd(EndName.COMPLETED, words)
    if run.control.is_cancelled():
        return RunEnd(EndName.CANCELLED, f"{words}; a rerun continues from here")
    waits = run.reporting.format_waits()
    return RunEnd(EndName.PARTIAL, "; ".join(filter(None, (words, waits))))


def run_pipeline(run: Run, engine: Engine) -> Totals:
    """Discover and pull a registered cohort as far as possible now, and report.

    Returns
    -------
    Totals
        Rows and studies of the cohort, by verdict and by state.

    Raises
    ------
    PrefectDicomError
        The error that stopped the last pass; archived studies and written reports stay.
    """
    progress = ProgressArtifact(engine, run.cohort.name)
    with engine.events(run):
        link_report(engine, run.cohort, run.site.reports)
        loop = PullLoop(
            run=run,
            discover=partial(engine.discover, run),
            pull=lambda: pull_in_chunks(run, engine, loop.look),
            show=progress.show,
            say=engine.info,
            limits=partial(engine.limits, run),
        )
        with engine.controlled(run):
            trouble = loop.work_through()
        totals = run.reporting.totals()
        progress.show(lambda: totals, run.reporting.format_waits(), now=True)
        if run.control.is_cancelled():
            return totals
        run.reporting.publish_end(trouble, totals)
        folder = write_reports(run.ledger, run.cohort, run.site.reports)
        run.reporting.write_page(trouble)
        publish_results(engine, run.ledger, run.cohort, totals, folder)
        _raise_remaining(run, engine, trouble, totals)
        return totals


def run_dry(run: DryRun, engine: Engine) -> Estimate:
    """Discover the studies of a registered cohort as far as possible now, without a retrieve.

    Returns
    -------
    Estimate
        What pulling them would take.

    Raises
    ------
    PrefectDicomError
        The error that stopped the last pass; found studies and written reports stay.
    """
    progress = ProgressArtifact(engine, run.cohort.name)
    loop = DiscoveryLoop(
        run=run,
        discover=partial(engine.discover, run),
        show=progress.show,
        say=engine.info,
        limits=partial(engine.limits, run),
    )
    with engine.events(run), engine.controlled(run):
        trouble = loop.work_through()
    run.discovery.limit_per_patient()
    totals = run.reporting.totals()
    progress.show(lambda: totals, now=True)
    estimate = estimate_pull(run.ledger, run.cohort, run.site)
    folder = write_reports(run.ledger, run.cohort, run.site.reports)
    write_estimate(estimate, folder)
    run.reporting.write_page(trouble)
    publish_estimate(engine, run.cohort, estimate)
    _raise_remaining(run, engine, trouble, totals)
    return estimate


def _raise_remaining(
    run: DryRun, engine: Engine, trouble: PrefectDicomError | None, totals: Totals
) -> None:
    note_disabled_nodes(run)
    error = remaining_error(run, trouble, totals)
    if error is not None:
        engine.error(f"{error.reason.meaning} {error.reason.what_to_do}")
        raise error
