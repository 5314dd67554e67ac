"""The commands that inform: ``status``, ``report``, ``explain``."""

from __future__ import annotations

import json
from typing import Annotated

from cyclopts import Parameter
from rich.markdown import Markdown

from prefect_dicom.cli.app import (
    DEFAULT_SITE,
    CohortName,
    Exit,
    JsonOption,
    SiteOption,
    app,
    check_known,
    console,
    output,
)
from prefect_dicom.cli.cohort_state import (
    control_state,
    figures,
    format_runs,
    print_schedules,
    show,
)
from prefect_dicom.cli.flow_runner import site_of
from prefect_dicom.cli.server import print_server
from prefect_dicom.config.site import ledger_url
from prefect_dicom.core.reasons import REASONS


@app.command(sort_key=4)
def status(
    cohort: Annotated[str | None, Parameter(help="Name or number of a cohort.")] = None,
    /,
    *,
    site: SiteOption = DEFAULT_SITE,
    json_: JsonOption = False,
) -> int:
    """Show the state of cohorts: a line for each, or one cohort with its verdicts by reason.

    With a cohort, the exit code says whether all its rows are archived. Without one, it also shows
    the state of the server that `up` has started.
    """
    from prefect_dicom.ledger import Ledger
    from prefect_dicom.report import format_totals

    settings = site_of(site)
    with Ledger.open(ledger_url(settings)) as ledger:
        if cohort is not None:
            return show(settings, site, ledger, ledger.cohorts.get(cohort), json_)
        lines = [
            (known, ledger.progress.totals(known.number), ledger.runs.under_way(known.number))
            for known in ledger.cohorts.all()
        ]
    if json_:
        results = [
            figures(known, totals) | control_state(known, runs) for known, totals, runs in lines
        ]
        print(json.dumps(results, indent=1))
        return Exit.ALL_WELL
    for known, totals, runs in lines:
        nodes = ", ".join(known.nodes)
        words = f"{known.number}  [bold]{known.name}[/] ({nodes}): {format_totals(totals)}"
        if runs or known.paused or known.priority:
            words += f"; {format_runs(known, runs)}"
        output.print(words, soft_wrap=not output.is_terminal)
    if not lines:
        console.print("No cohort yet: prefect-dicom pull cohort.csv")
    print_schedules(settings, settings.nodes)
    print_server(settings)
    return Exit.ALL_WELL


@app.command(sort_key=4.5)
def report(
    cohort: CohortName,
    /,
    *,
    with_identifiers: Annotated[
        bool,
        Parameter(
            help="Name patients and studies, in a separate file: patient data.", show_default=False
        ),
    ] = False,
    site: SiteOption = DEFAULT_SITE,
    json_: JsonOption = False,
) -> int:
    """Write the report of a cohort: one HTML page with its progress and failures.

    The page needs no network, and holds no patient data without `--with-identifiers`. Runs write it
    too, each minute and at their end; the command prints its path.
    """
    from prefect_dicom.ledger import Ledger
    from prefect_dicom.report.page import write_page

    settings = site_of(site)
    with Ledger.open(ledger_url(settings)) as ledger:
        known = ledger.cohorts.get(cohort)
        # A ledger may be older than the site's name for a node.
        node = settings.effective_node(known.node) if known.node in settings.nodes else None
        path = write_page(
            ledger,
            known,
            settings.reports,
            schedule=node.access_schedule if node else None,
            associations=node.limits.associations if node else 1,
            with_identifiers=with_identifiers,
        )
    print(json.dumps({"report": str(path)}) if json_ else path)
    return Exit.ALL_WELL


@app.command(sort_key=10)
def explain(
    code: Annotated[
        str | None, Parameter(help="A reason code, like no-match; without one, all are listed.")
    ] = None,
    /,
) -> int:
    """Explain a reason code: causes by PACS, what to do, and whether a rerun helps.

    Without a code it lists all of them with their meanings.
    """
    if code is None:
        width = max(map(len, REASONS))
        for reason in sorted(REASONS.values(), key=lambda reason: reason.code):
            print(f"{reason.code:<{width}}  {reason.meaning}")
        return Exit.ALL_WELL
    check_known("CODE", (code,), REASONS)
    section = REASONS[code].section()
    if output.is_terminal:
        output.print(Markdown(section))
    else:
        print(section, end="")
    return Exit.ALL_WELL
