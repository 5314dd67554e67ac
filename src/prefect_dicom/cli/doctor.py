"""The command ``doctor``."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from prefect_dicom.cli.app import (
    DEFAULT_SITE,
    Exit,
    JsonOption,
    SiteOption,
    app,
    check_known,
    counted,
    output,
    print_error,
)
from prefect_dicom.cli.flow_runner import settle_prefect, site_of
from prefect_dicom.config.node import PacsNode
from prefect_dicom.config.site import Site
from prefect_dicom.core.errors import ConfigurationError, PrefectDicomError
from prefect_dicom.core.model import CohortRow
from prefect_dicom.core.proxies import proxy_variables
from prefect_dicom.core.uids import is_safe_key

if TYPE_CHECKING:
    from prefect_dicom.operations.findings import Finding
    from prefect_dicom.operations.probe_node import ProbeResult


@app.command(sort_key=2)
def doctor(
    *,
    site: SiteOption = DEFAULT_SITE,
    node: Annotated[tuple[str, ...], Parameter(help="Only this node.", show_default=False)] = (),
    study: Annotated[str | None, Parameter(help="StudyInstanceUID to try with.")] = None,
    accession: Annotated[str | None, Parameter(help="AccessionNumber to try with.")] = None,
    patient: Annotated[str | None, Parameter(help="PatientID to try with.")] = None,
    probe: Annotated[
        bool,
        Parameter(
            help="Probe the capabilities of each node instead, and write them to a file.",
            show_default=False,
        ),
    ] = False,
    json_: JsonOption = False,
) -> int:
    """Test a set-up before a long run.

    Opens the ledger and the spool, puts and checks a small object in the archive, starts the
    receiver, and for each PACS node sends a C-ECHO and a C-FIND, reads one instance list and
    retrieves one instance by the configured service; then connects to Prefect's server, where one
    is needed. Prints each fault with what to do, and the line to add to the PACS's table of known
    nodes.

    With `--probe` it probes the capabilities of each node, with some 60 requests and at most 120,
    and writes them beside the site file, where runs read them: capabilities/NODE.yaml. Nothing is
    stored on the node or deleted; a few instances are retrieved and deleted here.
    """
    if probe and site.startswith("block:"):
        fault = "--probe: capabilities lie beside a site file, and blocks have none; name a file"
        raise ConfigurationError("command line", [fault])
    settings = site_of(site)
    check_known("--node", node, settings.nodes)
    given = {"--study": study, "--accession": accession, "--patient": patient}
    faults = [
        f"{option}: is empty or holds a wildcard or a backslash; it would select other studies"
        for option, value in given.items()
        if value is not None and not is_safe_key(value)
    ]
    if faults:
        raise ConfigurationError("command line", faults)
    row = CohortRow(0, patient, accession, study) if any(given.values()) else None
    if probe:
        return _probe(settings, site, node or tuple(settings.nodes), row, json_)

    from prefect_dicom.operations.doctor import entries_for_the_pacs, examine

    findings: list[Finding] = []
    for finding in chain(examine(settings, node, row), _examine_prefect(settings)):
        if not json_:
            _print_finding(finding, findings[-1].part if findings else "")
        findings.append(finding)
    well = all(finding.ok for finding in findings)
    entries = {
        name: entries_for_the_pacs(settings, settings.nodes[name])
        for name in node or settings.nodes
    }
    if json_:
        result = {
            "well": well,
            "findings": [asdict(finding) for finding in findings],
            "entries": {name: [asdict(e) for e in some] for name, some in entries.items()},
        }
        print(json.dumps(result, indent=1))
        return Exit.ALL_WELL if well else Exit.NOT_ALL
    for name, some in entries.items():
        peer = settings.nodes[name]
        if not isinstance(peer, PacsNode):
            continue
        output.print(
            f"\nWhat [bold]{name}[/] ({escape(peer.called_ae_title)} at {peer.host}:{peer.port}) "
            "has to have configured for this site:",
            soft_wrap=True,
        )
        for place in dict.fromkeys(entry.place for entry in some):
            output.print(f"  {place}:", style="dim", markup=False)
            for entry in some:
                if entry.place == place:
                    output.print(f"    {entry.line}", markup=False, soft_wrap=True)
    faulty = sum(not finding.ok for finding in findings)
    warnings = sum(finding.ok and bool(finding.advice) for finding in findings)
    output.print(
        f"\n{len(findings)} checks: "
        + (f"[red]{counted(faulty, 'fault')}[/]" if faulty else "[green]no fault[/]")
        + (f", [yellow]{counted(warnings, 'note')}[/]" if warnings else "")
    )
    return Exit.ALL_WELL if well else Exit.NOT_ALL


def _examine_prefect(site: Site) -> Iterator[Finding]:
    """Check what every pull needs of Prefect: a home, and a server that answers or can start."""
    from prefect_dicom.operations.findings import Finding, failed_finding

    check = "its home can be written"
    try:
        home = settle_prefect(site)
        advice = "Let HOME or PREFECT_HOME name a folder that this user can write."
        yield Finding(
            "prefect",
            check,
            True,
            str(home.path),
            home.instead_of and f"{home.instead_of}. {advice}",
        )
        if proxies := proxy_variables(os.environ):
            words = f"{', '.join(proxies)} set; hosts on loopback are asked directly"
            yield Finding("prefect", "proxy", True, words)
        from prefect_dicom.server.needs import why_a_server_is_needed
        from prefect_dicom.server.serverless import unrecorded

        if why_a_server_is_needed(home.path, os.environ):
            check = "its server answers"
            # Prefect takes two seconds to import, and reads its settings then.
            from prefect_dicom.server.connection import reach_server

            yield Finding("prefect", check, True, reach_server())
        else:
            words = "without a server; runs are recorded in its database when they have ended"
            yield Finding("prefect", "runs are recorded", True, words, unrecorded(home.path))
    except ConfigurationError as error:
        yield Finding("prefect", check, False, error.faults[0], error.reason.what_to_do)
    except PrefectDicomError as error:
        yield failed_finding("prefect", check, error)


def _probe(
    site: Site, reference: str, nodes: Collection[str], row: CohortRow | None, as_json: bool
) -> int:
    from prefect_dicom.config.capabilities import capabilities_path, values_of, write_capabilities
    from prefect_dicom.operations.probe_node import probe_node

    folder = Path(reference).expanduser().absolute().parent
    results: dict[str, Any] = {}
    code = Exit.ALL_WELL
    for name in nodes:
        try:
            result = probe_node(site, name, row)
        except PrefectDicomError as error:
            if not as_json:
                output.print(f"[bold]{name}[/]: the probe failed", soft_wrap=True)
                print_error(error)
            results[name] = {"error": error.code}
            code = Exit.NOT_ALL
            continue
        path = capabilities_path(folder, name)
        try:
            write_capabilities(path, result.capabilities, datetime.now(UTC))
        except OSError as error:
            fault = f"cannot be written ({error.strerror}); let this user write there"
            raise ConfigurationError(str(path), [fault]) from None
        results[name] = {
            "capabilities": values_of(result.capabilities),
            "file": str(path),
            "requests": result.requests,
            "instances": result.instances,
            "notes": result.notes,
        }
        if not as_json:
            _print_capabilities(name, result, path)
    if as_json:
        print(json.dumps(results, indent=1))
    return code


def _print_capabilities(name: str, result: ProbeResult, path: Path) -> None:
    from prefect_dicom.config.capabilities import format_capabilities

    table = Table(title=f"Capabilities of {name}", title_justify="left")
    table.add_column("key", no_wrap=True)
    table.add_column("value")
    table.add_column("means")
    for key, value, meaning in format_capabilities(result.capabilities):
        table.add_row(Text(key), Text(value), Text(meaning))
    output.print(table)
    for note in result.notes:
        output.print(f"  {note}", style="yellow", markup=False, soft_wrap=True)
    asked = counted(result.requests, "request")
    output.print(
        f"Probed with {asked} and {counted(result.instances, 'instance')}, deleted here; runs use "
        f"this file from now on: {path}",
        markup=False,
        soft_wrap=True,
    )


def _print_finding(finding: Finding, part_before: str) -> None:
    mark, style = ("FAIL", "bold red") if not finding.ok else ("ok", "green")
    if finding.ok and finding.advice:
        mark, style = "note", "yellow"
    line = Table.grid(padding=(0, 1))
    line.add_column(width=12, overflow="fold")
    line.add_column(width=4)
    line.add_column()
    part = finding.part if finding.part != part_before else ""
    words = f"{finding.check}: {finding.words}" if finding.words else finding.check
    line.add_row(Text(part, style="bold"), Text(mark, style=style), Text(words))
    for advice in finding.advice.splitlines():
        line.add_row("", "", Text(advice, style="" if finding.ok else "bold"))
    output.print(line)
