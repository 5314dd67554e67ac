"""The commands that control runs: ``pause``, ``resume``, ``cancel``, ``prioritise``."""

from __future__ import annotations

import json
import time
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
from prefect_dicom.cli.cohort_state import format_runs, hands, print_how_to_go_on
from prefect_dicom.cli.flow_runner import site_of
from prefect_dicom.config.site import ledger_url

if TYPE_CHECKING:
    from prefect_dicom.ledger import Cohort, Ledger, LivingRun


@app.command(sort_key=5)
def pause(
    cohort: CohortName, /, *, site: SiteOption = DEFAULT_SITE, json_: JsonOption = False
) -> int:
    """Pause all runs of a cohort, on every host, until `resume`.

    Waits until they have heard, which takes seconds: requests under way are cancelled, what has
    arrived is kept. A run that begins while the cohort is paused ends at once.
    """

    def wish(ledger: Ledger, known: Cohort) -> None:
        ledger.run_control.pause(known.number)

    def is_heard(runs: Collection[LivingRun]) -> bool:
        return all(run.paused_at is not None for run in runs)

    return _steer(site, cohort, json_, wish, is_heard)


@app.command(sort_key=5)
def resume(
    cohort: CohortName, /, *, site: SiteOption = DEFAULT_SITE, json_: JsonOption = False
) -> int:
    """Resume the runs of a paused cohort."""

    def wish(ledger: Ledger, known: Cohort) -> None:
        ledger.run_control.resume(known.number)

    def is_heard(runs: Collection[LivingRun]) -> bool:
        return all(run.paused_at is None for run in runs)

    return _steer(site, cohort, json_, wish, is_heard)


@app.command(sort_key=5)
def cancel(
    cohort: CohortName, /, *, site: SiteOption = DEFAULT_SITE, json_: JsonOption = False
) -> int:
    """Cancel the runs of a cohort that are under way, on every host.

    Waits until they have ended, which takes seconds. What has arrived is kept, and `rerun` goes
    on from there.
    """
    told: set[int] = set()

    def wish(ledger: Ledger, known: Cohort) -> None:
        told.update(ledger.run_control.cancel(known.number))

    def is_heard(runs: Collection[LivingRun]) -> bool:
        return not told & {run.number for run in runs}

    return _steer(site, cohort, json_, wish, is_heard)


@app.command(sort_key=5)
def prioritise(
    cohort: CohortName,
    priority: Annotated[int, Parameter(help="Any number; without one a cohort has 0.")],
    /,
    *,
    site: SiteOption = DEFAULT_SITE,
    json_: JsonOption = False,
) -> int:
    """Let the runs of a cohort come before or behind those of others that ask the same node.

    Where the node's associations do not suffice for all, those of higher numbers have them first.
    """

    def wish(ledger: Ledger, known: Cohort) -> None:
        ledger.run_control.prioritise(known.number, priority)

    return _steer(site, cohort, json_, wish, lambda runs: True)


_HEARD_SECONDS = 30.0


def _steer(
    reference: str,
    cohort: str,
    as_json: bool,
    wish: Callable[[Ledger, Cohort], None],
    is_heard: Callable[[Collection[LivingRun]], bool],
) -> int:
    """Write a wish into the ledger, wait until the runs have heard it, and say where it stands."""
    from prefect_dicom.ledger import Ledger
    from prefect_dicom.report import unarchived_rows

    with Ledger.open(ledger_url(site_of(reference))) as ledger:
        known = ledger.cohorts.get(cohort)
        wish(ledger, known)
        deadline = time.monotonic() + _HEARD_SECONDS
        while not (heard := is_heard(runs := ledger.runs.under_way(known.number))):
            if time.monotonic() >= deadline:
                break
            time.sleep(0.2)
        known = ledger.cohorts.get(known.name)
        left = unarchived_rows(ledger.progress.totals(known.number))
    if as_json:
        print(json.dumps({"cohort": known.name, **hands(known, runs), "heard": heard}, indent=1))
    else:
        output.print(f"Cohort {known.number}: {format_runs(known, runs)}.", soft_wrap=True)
        if not heard:
            output.print("Not all of them have heard of it yet: look at `status` again.")
        if left and (not runs or known.paused):
            print_how_to_go_on(known, reference)
    return Exit.ALL_WELL if heard else Exit.NOT_ALL
