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
    AccessionNumber or a StudyInstanceUID; docs/cohort-files.md has what is taken and refused. A
    definition (docs/cohorts.md) has filters for studies and series as well, and needs no list.
    Running it again transfers only what is missing.
    """
    from prefect_dicom.ledger import Ledger
    from prefect_dicom.run.engine import FlowCall
    from prefect_dicom.run.pipeline import plan
    from prefect_dicom.run.pipeline import pull as run_pull
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

        call = FlowCall(
            "pull-cohort",
            f"pull-{known.digest[:12]}",
            {
                "cohort": str(cohort),
                "site": site,
                "node": list(node) or None,
                "name": name,
                "dry_run": dry_run,
                "every_node": every_node,
                "hidden_rows": hidden_rows,
                "faulty_lines": faulty_lines,
            },
            lambda engine: (plan if dry_run else run_pull)(engine, settings, ledger, known),
        )
        display = show_estimate if dry_run else show
        return run_flow(settings, site, ledger, known, call, json_, display)


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
    from prefect_dicom.run.engine import FlowCall
    from prefect_dicom.run.pipeline import rerun as run_rerun
    from prefect_dicom.run.run import check_first

    settings = site_of(site)
    check_known("--reason", reason, REASONS)
    check_known("--node", node, settings.nodes)
    with Ledger.open(ledger_url(settings)) as ledger:
        known = ledger.cohorts.get(cohort)
        # What has failed is reopened later.
        check_first(settings, ledger)

        chosen: dict[str, tuple[Any, ...]] = {"reasons": reason, "nodes": node, "lines": line}
        call = FlowCall(
            "rerun-failed",
            f"rerun-{known.name}",
            {"cohort": known.name, "site": site, **chosen},
            lambda engine: run_rerun(engine, settings, ledger, known.name, chosen),
        )
        return run_flow(settings, site, ledger, known, call, json_, show)


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
    from prefect_dicom.run.engine import FlowCall
    from prefect_dicom.run.pipeline import pull as run_pull
    from prefect_dicom.run.registration import register_new
    from prefect_dicom.run.run import check_first

    settings = site_of(site)
    with Ledger.open(ledger_url(settings)) as ledger:
        known = register_new(settings, node, date.today(), days, ledger=ledger)
        check_first(settings, ledger, known)

        call = FlowCall(
            "archive-new",
            None,
            {"site": site, "node": node, "days": days},
            lambda engine: run_pull(engine, settings, ledger, known),
        )
        return run_flow(settings, site, ledger, known, call, json_, show)


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
