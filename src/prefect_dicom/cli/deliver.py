"""The command ``deliver``: archived studies to another node."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console

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
from prefect_dicom.cli.cohort_state import print_command
from prefect_dicom.cli.flow_runner import run_flow, site_of
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.core.reasons import REASONS

if TYPE_CHECKING:
    from prefect_dicom.ledger import Cohort, Ledger

_TICK_SECONDS = 1.0


@app.command(sort_key=5.5)
def deliver(
    cohort: CohortName,
    /,
    *,
    to: Annotated[str, Parameter(help="Node to deliver to; it has `destination` in the site.")],
    source: Annotated[
        str | None,
        Parameter(
            name="--from",
            help="Node that sends the studies by C-MOVE, instead of us from the archive.",
            show_default=False,
        ),
    ] = None,
    site: SiteOption = DEFAULT_SITE,
    reason: Annotated[
        tuple[str, ...],
        Parameter(
            help="Try failures with this code again, permanent ones too.", show_default=False
        ),
    ] = (),
    json_: JsonOption = False,
) -> int:
    """Deliver the archived studies of a cohort to another node, and prove that they are there.

    Instances are sent byte for byte as they were archived. A study is verified when the evidence
    that `destination.evidence` asks for was seen: the node lists it, commits to it, or sends back
    the same bytes. With `--from`, another node sends the studies, archived or not, and their
    bytes are not seen here. Running it again sends only what is missing.
    """
    from prefect_dicom.delivery.context import check_source, destination_of
    from prefect_dicom.delivery.pipeline import deliver as run_delivery
    from prefect_dicom.ledger import Ledger
    from prefect_dicom.run.engine import FlowCall
    from prefect_dicom.run.run import check_archive

    settings = site_of(site)
    check_known("--reason", reason, REASONS)
    destination_of(settings, to)
    check_source(settings, to, source)
    with Ledger.open(ledger_url(settings)) as ledger:
        known = ledger.cohorts.get(cohort)
        check_archive(settings)

        call = FlowCall(
            "deliver-cohort",
            f"deliver-{known.name}-{to}",
            {
                "cohort": known.name,
                "to": to,
                "site": site,
                "reason": list(reason) or None,
                "source": source,
            },
            lambda engine: run_delivery(engine, settings, ledger, known.name, to, reason, source),
        )
        display = partial(_show, to)
        progress = partial(_progress_shown, to)
        return run_flow(settings, site, ledger, known, call, json_, display, progress)


def _show(
    target: str,
    site: Site,
    reference: str,
    ledger: Ledger,
    cohort: Cohort,
    as_json: bool,
    error: BaseException | None = None,
) -> int:
    """Print how far the deliveries are; the exit code says whether all are verified."""
    from prefect_dicom.report.deliveries import DELIVERIES, format_delivery

    totals = ledger.deliveries.totals(cohort.number, target)
    table = site.reports / cohort.name / f"{DELIVERIES}-{target}.csv"
    code = Exit.ALL_WELL if totals.is_verified else Exit.NOT_ALL
    if as_json:
        result: dict[str, Any] = {
            "cohort": cohort.name,
            "target": target,
            "deliveries": {state.value: count for state, count in totals.states.items()},
            "evidence": dict(totals.evidence),
            "reasons": dict(totals.reasons),
            "not_archived": totals.not_due,
            "table": str(table),
        }
        if error is not None:
            result["error"] = getattr(error, "code", "unexpected")
        print(json.dumps(result, indent=1))
        return code
    output.print(f"To {target}: {format_delivery(totals)}", markup=False, soft_wrap=True)
    for name, count in totals.reasons.most_common():
        entry = REASONS[name]
        output.print(
            f"{count:>8} {name}: {entry.meaning} {entry.what_to_do}", markup=False, soft_wrap=True
        )
    if totals.states:
        output.print(f"Each study: {table}", markup=False, soft_wrap=True)
    if not totals.is_verified:
        print_command(f"deliver {cohort.name} --to {target}", reference)
    return code


@contextlib.contextmanager
def _progress_shown(
    target: str, console: Console, ledger: Ledger, cohort: Cohort
) -> Iterator[None]:
    """While the block runs, show how far the deliveries are."""
    from prefect_dicom.report.deliveries import format_delivery
    from prefect_dicom.report.formatting import format_bytes
    from prefect_dicom.run.progress import beside, counting_shown

    def watch(done: threading.Event) -> None:
        with counting_shown(console) as say:
            while not done.wait(_TICK_SECONDS):
                totals = ledger.deliveries.totals(cohort.number, target)
                sent = f"{totals.instances} instances sent, {format_bytes(totals.size_bytes)}"
                say(f"To {target}: {format_delivery(totals)}; {sent}")

    with beside(watch):
        yield
