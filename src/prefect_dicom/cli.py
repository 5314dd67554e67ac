"""The command line: a thin face over the flows and steps.

Exit codes: 0 all archived (or all well), 1 something unexpected, 2 some rows are not archived
(or a check found faults), 3 configuration or cohort file, 4 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from prefect_dicom import __version__
from prefect_dicom.configuration import Site, ledger_url, load_site
from prefect_dicom.errors import FaultyFileError, Interrupted, PrefectDicomError
from prefect_dicom.ledger import Cohort, Ledger
from prefect_dicom.model import CohortRow, Disposition, Level
from prefect_dicom.report import (
    RESULTS,
    bytes_in_words,
    finished_fraction,
    in_words,
    reason_table,
    unarchived_rows,
)


class Exit(IntEnum):
    """What the exit code says."""

    ALL_WELL = 0
    UNEXPECTED = 1
    NOT_ALL = 2
    CONFIGURATION = 3
    INTERRUPTED = 4


app = App(
    name="prefect-dicom",
    version=__version__,
    help="Pull a cohort out of a PACS into an archive, with a proof for every study and a "
    "verdict for every row. Begin with `prefect-dicom demo`, then `prefect-dicom doctor`.",
)
receiver = App(name="receiver", help="The managed storage SCP that C-MOVE sends to.")
app.command(receiver)

console = Console(stderr=True)

SiteOption = Annotated[str, Parameter(name=["--site", "-s"], help="Site file, or block:NAME.")]
JsonOption = Annotated[bool, Parameter(name="--json", help="Print the result as JSON.")]
CohortName = Annotated[str | None, Parameter(help="Name or number of a cohort.")]


@app.command
def doctor(
    *,
    site: SiteOption = "site.yaml",
    node: Annotated[tuple[str, ...], Parameter(help="Only these nodes.")] = (),
    study: Annotated[str | None, Parameter(help="StudyInstanceUID to try with.")] = None,
    accession: Annotated[str | None, Parameter(help="AccessionNumber to try with.")] = None,
    patient: Annotated[str | None, Parameter(help="PatientID to try with.")] = None,
    json_: JsonOption = False,
) -> int:
    """Prove a set-up before a long run.

    Opens the ledger and the spool, puts and checks a small object in the archive, starts the
    receiver, and for each PACS node does a C-ECHO, a C-FIND, reads one instance list and
    retrieves one instance over the configured way. Names what is broken and what to do, and
    prints the line to add to the PACS's table of known nodes.
    """
    from prefect_dicom.doctor import entry_for_the_pacs, examine

    settings = _site(site)
    row = None
    if study or accession or patient:
        row = CohortRow(0, patient, accession, study)
    findings = []
    for finding in examine(settings, node, row):
        findings.append(finding)
        if not json_:
            mark = "[green]ok  [/]" if finding.ok else "[red]FAIL[/]"
            console.print(f"{mark} {finding.part}: {finding.check}  [dim]{finding.words}[/]")
            if finding.advice:
                console.print(f"       {finding.advice}", markup=False, highlight=False)
    if json_:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        console.print("\nWhat the PACS has to know of this site:")
        for name, one in settings.nodes.items():
            if not node or name in node:
                console.print(f"[bold]{name}[/]")
                console.print(entry_for_the_pacs(settings, one), markup=False, highlight=False)
    return Exit.ALL_WELL if all(f.ok for f in findings) else Exit.NOT_ALL


@app.command
def pull(
    cohort: Annotated[Path, Parameter(help="CSV, XLSX or Parquet file.")],
    *,
    site: SiteOption = "site.yaml",
    node: Annotated[str | None, Parameter(help="PACS node to ask, if there are several.")] = None,
    name: Annotated[str | None, Parameter(help="A name for the cohort.")] = None,
    json_: JsonOption = False,
) -> int:
    """Pull every study of a cohort file into the archive.

    Columns by DICOM keyword or plain name: PatientID, AccessionNumber, StudyInstanceUID,
    StudyDate (or a range), Modality, StudyDescription. Each row needs a PatientID, an
    AccessionNumber or a StudyInstanceUID. Running it again moves only what is missing.
    """
    from prefect_dicom.steps import register_cohort

    settings = _site(site)
    known = register_cohort(settings, cohort, node, name)

    def flow() -> Any:
        from prefect_dicom.flows import pull_cohort

        return pull_cohort(str(cohort), site, node, name, return_state=True)

    return _run(settings, known, flow, json_)


@app.command
def rerun(
    cohort: Annotated[str, Parameter(help="Name or number of a cohort; see `status`.")],
    *,
    site: SiteOption = "site.yaml",
    reason: Annotated[tuple[str, ...], Parameter(help="Only failures with this code.")] = (),
    node: Annotated[tuple[str, ...], Parameter(help="Only studies of this node.")] = (),
    line: Annotated[tuple[int, ...], Parameter(help="Only this line of the file.")] = (),
    json_: JsonOption = False,
) -> int:
    """Go on with a cohort: what was interrupted, and what failed and can be retried.

    Without filters everything that is not permanent. With `--reason` exactly these failures,
    permanent ones too. Only missing instances are asked for.
    """
    settings = _site(site)
    with Ledger.open(ledger_url(settings)) as ledger:
        known = ledger.cohort(cohort)

    def flow() -> Any:
        from prefect_dicom.flows import rerun_failed

        return rerun_failed(known.name, site, reason, node, line, return_state=True)

    return _run(settings, known, flow, json_)


@app.command
def status(
    cohort: CohortName = None, *, site: SiteOption = "site.yaml", json_: JsonOption = False
) -> int:
    """Show where cohorts stand: all in a line each, or one with its verdicts by reason."""
    settings = _site(site)
    with Ledger.open(ledger_url(settings)) as ledger:
        if cohort is None:
            lines = [(c, ledger.totals(c.number)) for c in ledger.cohorts()]
            if json_:
                print(json.dumps([{"cohort": c.name, **_totals(t)} for c, t in lines], indent=1))
            for known, totals in [] if json_ else lines:
                console.print(f"[bold]{known.name}[/] ({known.node}): {in_words(totals)}")
            if not lines and not json_:
                console.print("No cohort yet: `prefect-dicom pull cohort.csv`")
            return Exit.ALL_WELL
        known = ledger.cohort(cohort)
        return _show(settings, ledger, known, json_)


@app.command
def verify(
    cohort: Annotated[str, Parameter(help="Name or number of a cohort.")],
    *,
    site: SiteOption = "site.yaml",
    level: Annotated[Level, Parameter(help="How hard to look.")] = Level.CHECKSUM,
    json_: JsonOption = False,
) -> int:
    """Check that every archived study still is what its manifest says.

    `exists` and `size` list the archive, `checksum` compares the SHA-256 that the store keeps,
    `read` downloads and hashes every object. The PACS is not asked.
    """
    from prefect_dicom.verification import verify_cohort

    faulty = studies = instances = 0
    for study in verify_cohort(_site(site), cohort, level):
        studies, instances = studies + 1, instances + study.instances
        if study.faults:
            faulty += 1
            counts = ", ".join(f"{n} {code}" for code, n in sorted(study.faults.items()))
            console.print(f"[red]study {study.reference}[/]: {counts}")
    result = {"studies": studies, "instances": instances, "faulty_studies": faulty}
    if json_:
        print(json.dumps({**result, "level": level}))
    else:
        console.print(
            f"{studies} studies with {instances} instances checked at level {level}: "
            + (f"[red]{faulty} with faults[/]" if faulty else "[green]no faults[/]")
        )
    return Exit.NOT_ALL if faulty else Exit.ALL_WELL


@receiver.command(name="run")
def receiver_run(*, site: SiteOption = "site.yaml") -> int:
    """Run the receiver in the foreground until it is stopped (for service managers).

    Runs start it by themselves when they need it; this is for sites that want it always on.
    """
    from prefect_dicom.receiver.client import assignment_of
    from prefect_dicom.receiver.server import serve_forever

    settings = _site(site)
    console.print(
        f"{settings.receiver.ae_title} on {settings.receiver.bind}:{settings.receiver.port}"
    )
    serve_forever(assignment_of(settings))
    return Exit.ALL_WELL


@receiver.command(name="status")
def receiver_status(*, site: SiteOption = "site.yaml", json_: JsonOption = False) -> int:
    """Show whether the receiver runs, and for whom."""
    from prefect_dicom.receiver import running_receiver

    lease = running_receiver(_site(site))
    if lease is None:
        print(json.dumps(None)) if json_ else console.print("The receiver does not run.")
        return Exit.NOT_ALL
    with lease:
        facts = lease.status()
    if json_:
        print(json.dumps(facts, indent=1))
    else:
        for key, value in facts.items():
            console.print(f"{key}: {value}")
    return Exit.ALL_WELL


@receiver.command(name="stop")
def receiver_stop(*, site: SiteOption = "site.yaml") -> int:
    """Stop the receiver; objects under way are finished first."""
    from prefect_dicom.receiver import running_receiver

    lease = running_receiver(_site(site))
    if lease is not None:
        with lease:
            lease.stop()
    console.print("Stopped." if lease else "The receiver did not run.")
    return Exit.ALL_WELL


@app.command
def demo(
    folder: Annotated[Path, Parameter(help="Where the demo lives.")] = Path("demo"),
    *,
    studies: Annotated[int, Parameter(help="Studies to generate.")] = 12,
) -> int:
    """See it work in a minute: a small PACS on this machine, a cohort, a local archive.

    Generates studies of several modalities, starts a PACS that holds them on loopback, pulls
    them with the real flow, and pulls them again to show that nothing moves. Needs nothing but
    Python.
    """
    from prefect_dicom.testing.demo import prepared_demo

    with prepared_demo(folder, studies) as ready:
        console.print(f"A PACS with {ready.instances} instances listens on port {ready.port}.")
        console.print(f"[bold]prefect-dicom pull {ready.cohort} --site {ready.site}[/]\n")
        first = pull(ready.cohort, site=str(ready.site))
        sent = ready.requests()
        console.print("\n[bold]The same again[/]: nothing is asked for, nothing moves.\n")
        second = pull(ready.cohort, site=str(ready.site))
        moved = ready.requests() - sent
        console.print(
            f"\nRequests the PACS saw in the first pull: {sent}; in the second: {moved}."
            f"\nEverything lies in {folder}: site.yaml, cohort.csv, archive/, reports/, ledger."
            "\nNext: copy site.yaml, enter your PACS, and run `prefect-dicom doctor`."
        )
    return max(first, second, Exit.ALL_WELL if not moved else Exit.UNEXPECTED)


def main() -> None:
    """Entry point: exceptions become messages and exit codes."""
    os.umask(0o077)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        code = app()
    except FaultyFileError as error:
        console.print(f"[red]{error.source}[/]: {len(error.faults)} faults")
        for fault in error.faults:
            console.print(f"  - {fault}", markup=False, highlight=False)
        code = Exit.CONFIGURATION
    except PrefectDicomError as error:
        _print_error(error)
        code = _exit_for(error)
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    sys.exit(code if isinstance(code, int) else Exit.ALL_WELL)


# --- around a flow


def _run(site: Site, cohort: Cohort, flow: Any, as_json: bool) -> int:
    """Run a flow with a live display, then show where the cohort stands."""
    _settle_prefect()
    try:
        with _display(site, cohort):
            state = flow()
            error = None if state.is_completed() else state.result(raise_on_failure=False)
    except KeyboardInterrupt:
        console.print(f"Interrupted. Go on with: prefect-dicom rerun {cohort.name}")
        return Exit.INTERRUPTED
    with Ledger.open(ledger_url(site)) as ledger:
        code = _show(site, ledger, cohort, as_json)
    if isinstance(error, PrefectDicomError):
        _print_error(error)
        return _exit_for(error)
    if error is not None:
        console.print(f"[red]The flow did not complete[/] ({type(error).__name__}).")
        return Exit.UNEXPECTED
    return code


def _settle_prefect() -> None:
    """Prefect's settings for a run of its own; whatever the user has set stays."""
    for name, value in {
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    }.items():
        os.environ.setdefault(name, value)


@contextlib.contextmanager
def _display(site: Site, cohort: Cohort) -> Iterator[None]:
    """A live line about the cohort, read from the ledger about once a second."""
    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    done = threading.Event()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting Prefect", total=100)

        def watch() -> None:
            seen: list[tuple[float, int, int]] = []
            with Ledger.open(ledger_url(site)) as ledger:
                pause = 1.0
                while not done.wait(pause):
                    began = time.monotonic()
                    totals = ledger.totals(cohort.number)
                    # Counting a large cohort takes a while; it may not take the whole while.
                    pause = max(1.0, 20 * (time.monotonic() - began))
                    here = totals.stored + totals.received
                    seen.append((progress.get_time(), here, totals.size_bytes))
                    del seen[:-10]
                    seconds = max(seen[-1][0] - seen[0][0], 1e-9)
                    rate = max(0, seen[-1][1] - seen[0][1]) / seconds
                    speed = max(0, seen[-1][2] - seen[0][2]) / seconds
                    ended = sum(n for s, n in totals.studies.items() if s.is_final)
                    progress.update(
                        task,
                        completed=100 * finished_fraction(totals),
                        description=(
                            f"{ended}/{sum(totals.studies.values())} studies, "
                            f"{here}/{totals.expected} instances, {rate:.0f}/s, "
                            f"{bytes_in_words(speed)}/s"
                        ),
                    )

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _show(site: Site, ledger: Ledger, cohort: Cohort, as_json: bool) -> int:
    totals = ledger.totals(cohort.number)
    reasons = reason_table(ledger.verdicts(cohort.number))
    folder = site.reports / cohort.name
    missing = unarchived_rows(totals)
    if as_json:
        result = {
            "cohort": cohort.name,
            **_totals(totals),
            "reasons": reasons,
            "reports": str(folder),
        }
        print(json.dumps(result, indent=1))
        return Exit.NOT_ALL if missing else Exit.ALL_WELL
    table = Table(title=f"Cohort {cohort.name}")
    table.add_column("rows", justify="right")
    table.add_column("verdict")
    table.add_column("reason")
    table.add_column("what to do")
    for row in reasons:
        table.add_row(str(row["rows"]), row["verdict"], row["reason"], row["what_to_do"])
    console.print(table)
    console.print(in_words(totals))
    if folder.exists():
        console.print(f"Row by row: {folder / RESULTS}")
    if missing:
        console.print(f"Go on with: prefect-dicom rerun {cohort.name}")
    return Exit.NOT_ALL if missing else Exit.ALL_WELL


def _totals(totals: Any) -> dict[str, Any]:
    return {
        "rows": {str(v): n for v, n in totals.rows.items()},
        "studies": {str(s): n for s, n in totals.studies.items()},
        "expected_instances": totals.expected,
        "archived_instances": totals.stored,
        "size_bytes": totals.size_bytes,
    }


def _print_error(error: PrefectDicomError) -> None:
    console.print(f"[red]{error.reason.meaning}[/] ({error.code})")
    if error.detail:
        console.print(f"  {error.detail}", markup=False, highlight=False)
    console.print(f"  {error.reason.advice}", markup=False, highlight=False)


def _exit_for(error: PrefectDicomError) -> Exit:
    if isinstance(error, Interrupted):
        return Exit.INTERRUPTED
    if error.disposition is Disposition.OPERATOR:
        return Exit.CONFIGURATION
    if error.code != "unexpected":
        return Exit.NOT_ALL
    return Exit.UNEXPECTED


def _site(reference: str) -> Site:
    if reference.startswith("block:"):
        _settle_prefect()
        from prefect_dicom.blocks import resolve_site

        return resolve_site(reference)
    return load_site(reference)


if __name__ == "__main__":
    main()
