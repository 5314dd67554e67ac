"""The commands that pull: ``pull``, ``rerun``, ``archive-new`` and ``demo``."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from prefect_dicom.cli.app import (
    DEFAULT_SITE,
    CohortName,
    Exit,
    JsonOption,
    SiteOption,
    app,
    check_known,
    output,
)
from prefect_dicom.cli.cohort_state import show, show_estimate
from prefect_dicom.cli.flow_runner import run_flow, site_of
from prefect_dicom.cohort.list_options import FaultyLines, HiddenRows, ListOptions
from prefect_dicom.config.site import ledger_url
from prefect_dicom.core.reasons import REASONS


@app.command(sort_key=3)
def pull(
    cohort: Annotated[Path, Parameter(help="CSV, XLSX or Parquet list, or a definition in YAML.")],
    /,
    *,
    site: SiteOption = DEFAULT_SITE,
    node: Annotated[
        tuple[str, ...],
        Parameter(
            help="PACS node to query, if there are several; repeated, nodes for failover in order.",
            show_default=False,
        ),
    ] = (),
    every_node: Annotated[
        bool, Parameter(help="Query each of several nodes for every row.", show_default=False)
    ] = False,
    name: Annotated[str | None, Parameter(help="A name for the cohort.")] = None,
    hidden_rows: Annotated[
        HiddenRows | None,
        Parameter(
            help="Rows that a workbook hides, by a filter or otherwise: pull them too, or not.",
            show_default=False,
        ),
    ] = None,
    faulty_lines: Annotated[
        FaultyLines | None,
        Parameter(
            help="Lines with faults: refuse the file, the default, or set them apart, with the "
            "verdict `faulty`.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, Parameter(help="Only find the studies, and estimate what pulling them would take.")
    ] = False,
    json_: JsonOption = False,
) -> int:
    """Pull every study of a cohort file into the archive.

    Columns by DICOM keyword or plain name: PatientID, AccessionNumber, StudyInstanceUID,
    StudyDate (or a range), Modality, StudyDescription. Each row needs a PatientID, an
    AccessionNumber or a StudyInstanceUID. A definition (docs/cohorts.md) has filters for studies
    and series as well, and needs no list. Running it again transfers only what is missing.
    """
    from prefect_dicom.ledger import Ledger
    from prefect_dicom.run.registration import register_cohort
    from prefect_dicom.run.run import check_first

    settings = site_of(site)
    with Ledger.open(ledger_url(settings)) as ledger:
        known = register_cohort(
            settings,
            cohort,
            node,
            name,
            every_node=every_node,
            options=ListOptions(hidden_rows, faulty_lines),
            ledger=ledger,
        )
        if not dry_run:
            check_first(settings, ledger, known)

        def flow() -> Any:
            from prefect_dicom.flows.pull_cohort import pull_registered

            return pull_registered(settings, ledger, known, dry_run=dry_run)(
                str(cohort),
                site,
                list(node) or None,
                name,
                dry_run,
                every_node,
                hidden_rows,
                faulty_lines,
                return_state=True,
            )

        display = show_estimate if dry_run else show
        return run_flow(settings, site, ledger, known, flow, json_, display)


@app.command(sort_key=5)
def rerun(
    cohort: CohortName,
    /,
    *,
    site: SiteOption = DEFAULT_SITE,
    reason: Annotated[
        tuple[str, ...], Parameter(help="Only failures with this code.", show_default=False)
    ] = (),
    node: Annotated[
        tuple[str, ...], Parameter(help="Only studies of this node.", show_default=False)
    ] = (),
    line: Annotated[
        tuple[int, ...], Parameter(help="Only this line of the cohort file.", show_default=False)
    ] = (),
    json_: JsonOption = False,
) -> int:
    """Continue a cohort: what was interrupted, and what failed and can be retried.

    Without options, all failures that are not permanent. With `--reason`, exactly these failures,
    permanent ones too. Options may be repeated. Only missing instances are requested.
    """
    from prefect_dicom.ledger import Ledger
    from prefect_dicom.run.run import check_first

    settings = site_of(site)
    check_known("--reason", reason, REASONS)
    check_known("--node", node, settings.nodes)
    with Ledger.open(ledger_url(settings)) as ledger:
        known = ledger.cohorts.get(cohort)
        # What has failed is reopened later.
        check_first(settings, ledger)

        def flow() -> Any:
            from prefect_dicom.flows.rerun_failed import rerun_registered

            chosen = {"reasons": reason, "nodes": node, "lines": line}
            return rerun_registered(settings, ledger, known, chosen)(
                known.name, site, reason, node, line, return_state=True
            )

        return run_flow(settings, site, ledger, known, flow, json_, show)


@app.command(sort_key=3.5)
def archive_new(
    *,
    site: SiteOption = DEFAULT_SITE,
    node: Annotated[str | None, Parameter(help="PACS node to query, if there are several.")] = None,
    days: Annotated[int, Parameter(help="How many days to look back, up to yesterday.")] = 7,
    json_: JsonOption = False,
) -> int:
    """Archive every study of the last days; what is archived already is not requested.

    Looking back over several days finds studies that reached the PACS late. Each day has its own
    cohort and report.
    """
    from prefect_dicom.ledger import Ledger
    from prefect_dicom.run.registration import register_new
    from prefect_dicom.run.run import check_first

    settings = site_of(site)
    with Ledger.open(ledger_url(settings)) as ledger:
        known = register_new(settings, node, date.today(), days, ledger=ledger)
        check_first(settings, ledger, known)

        def flow() -> Any:
            from prefect_dicom.flows.archive_new import archive_registered

            return archive_registered(settings, ledger, known)(site, node, days, return_state=True)

        return run_flow(settings, site, ledger, known, flow, json_, show)


@app.command(sort_key=1)
def demo(
    folder: Annotated[Path, Parameter(help="Folder of the demo.")] = Path("demo"),
    /,
    *,
    studies: Annotated[int, Parameter(help="Studies to generate.")] = 12,
) -> int:
    """See it work in a minute: a small PACS on this machine, a cohort, a local archive.

    Generates studies of several modalities, starts a PACS that holds them on loopback, pulls
    them with the real flow, and pulls them again to show that nothing is transferred twice. Needs
    nothing but Python.
    """
    from prefect_dicom.testing.demo import prepared_demo

    with prepared_demo(folder, studies) as ready:
        output.print(f"A PACS with {ready.instances} instances listens on port {ready.port}.")
        output.print(f"[bold]prefect-dicom pull {ready.cohort} --site {ready.site}[/]\n")
        first = pull(ready.cohort, site=str(ready.site))
        if first != Exit.ALL_WELL:
            return first
        sent = ready.requests()
        output.print("\n[bold]The same again[/]: nothing is requested, nothing is transferred.\n")
        second = pull(ready.cohort, site=str(ready.site))
        moved = ready.requests() - sent
        output.print(
            f"\nRequests to the PACS in the first pull: {sent}; in the second: {moved}."
            f"\nAll files are in {folder}: site.yaml, cohort.csv, archive/, reports/, ledger."
            "\nNext: copy site.yaml, enter your PACS, and run `prefect-dicom doctor`."
        )
    return second if not moved else Exit.UNEXPECTED
