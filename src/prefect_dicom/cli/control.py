"""The commands that control runs: ``pause``, ``resume``, ``cancel``, ``prioritise``."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from prefect_dicom.cli.app import (
    DEFAULT_SITE,
    CohortName,
    Exit,
    JsonOption,
    SiteOption,
    app,
    output,
)
from prefect_dicom.cli.cohort_state import control_state, format_runs, print_next_command
from prefect_dicom.cli.flow_runner import site_of
from prefect_dicom.config.site import ledger_url
from prefect_dicom.core.clock import Clock

if TYPE_CHECKING:
    from prefect_dicom.ledger import Cohort, Ledger, LivingRun


@app.command(sort_key=5)
def pause(
    cohort: CohortName, /, *, site: SiteOption = DEFAULT_SITE, json_: JsonOption = False
) -> int:
    """Pause all runs of a cohort, on every host, until `resume`.

    Waits until they have responded, which takes seconds: requests under way are cancelled, and
    instances received so far are kept. A run that starts while the cohort is paused ends at once.
    """

    def request(ledger: Ledger, known: Cohort) -> None:
        ledger.run_control.pause(known.number)

    def have_responded(runs: Collection[LivingRun]) -> bool:
        return all(run.paused_at is not None for run in runs)

    return _steer(site, cohort, json_, request, have_responded)


@app.command(sort_key=5)
def resume(
    cohort: CohortName, /, *, site: SiteOption = DEFAULT_SITE, json_: JsonOption = False
) -> int:
    """Resume the runs of a paused cohort."""

    def request(ledger: Ledger, known: Cohort) -> None:
        ledger.run_control.resume(known.number)

    def have_responded(runs: Collection[LivingRun]) -> bool:
        return all(run.paused_at is None for run in runs)

    return _steer(site, cohort, json_, request, have_responded)


@app.command(sort_key=5)
def cancel(
    cohort: CohortName, /, *, site: SiteOption = DEFAULT_SITE, json_: JsonOption = False
) -> int:
    """Cancel the runs of a cohort that are under way, on every host.

    Waits until they have ended, which takes seconds. Instances received so far are kept, and
    `rerun` goes on from there.
    """
    cancelled: set[int] = set()

    def request(ledger: Ledger, known: Cohort) -> None:
        cancelled.update(ledger.run_control.cancel(known.number))

    def have_responded(runs: Collection[LivingRun]) -> bool:
        return not cancelled & {run.number for run in runs}

    return _steer(site, cohort, json_, request, have_responded)


@app.command(sort_key=5)
def prioritise(
    cohort: CohortName,
    priority: Annotated[int, Parameter(help="Any integer; the default of a cohort is 0.")],
    /,
    *,
    site: SiteOption = DEFAULT_SITE,
    json_: JsonOption = False,
) -> int:
    """Set the priority of a cohort among the cohorts that use the same node.

    Where the node's slots do not suffice for all runs, those of higher priority get them first.
    """

    def request(ledger: Ledger, known: Cohort) -> None:
        ledger.run_control.prioritise(known.number, priority)

    return _steer(site, cohort, json_, request, lambda runs: True)


_RESPONSE_SECONDS = 30.0
_LOOK_SECONDS = 0.2


def _steer(
    reference: str,
    cohort: str,
    as_json: bool,
    request: Callable[[Ledger, Cohort], None],
    have_responded: Callable[[Collection[LivingRun]], bool],
) -> int:
    """Request a state of a cohort's runs, wait until they have it, and print their state."""
    from prefect_dicom.ledger import Ledger
    from prefect_dicom.report import unarchived_rows

    with Ledger.open(ledger_url(site_of(reference))) as ledger:
        known = ledger.cohorts.get(cohort)
        request(ledger, known)
        clock, never = Clock(), threading.Event()
        deadline = clock.monotonic() + _RESPONSE_SECONDS
        while not (responded := have_responded(runs := ledger.runs.under_way(known.number))):
            if clock.monotonic() >= deadline:
                break
            clock.wait(never, _LOOK_SECONDS)
        known = ledger.cohorts.get(known.name)
        left = unarchived_rows(ledger.progress.totals(known.number))
    if as_json:
        print(
            json.dumps(
                {"cohort": known.name, **control_state(known, runs), "responded": responded},
                indent=1,
            )
        )
    else:
        output.print(f"Cohort {known.number}: {format_runs(known, runs)}.", soft_wrap=True)
        if not responded:
            output.print("Not all of them have responded yet; see `status`.")
        if left and (not runs or known.paused):
            print_next_command(known, reference)
    return Exit.ALL_WELL if responded else Exit.NOT_ALL
