"""Flows bound to the site, ledger and cohort that their caller has open."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

from prefect import Flow
from prefect.client.schemas.objects import State

from prefect_dicom.core.errors import Interrupted
from prefect_dicom.flows.archive_new import archive_new
from prefect_dicom.flows.deliver_cohort import deliver_cohort
from prefect_dicom.flows.prefect_engine import PrefectEngine, state_of
from prefect_dicom.flows.pull_cohort import pull_cohort
from prefect_dicom.flows.rerun_failed import rerun_failed
from prefect_dicom.run.engine import Engine, FlowCall, RunEnd
from prefect_dicom.run.error_translation import without_phi

P = ParamSpec("P")

_FLOWS: dict[str, Flow[..., State]] = {
    flow.name: flow for flow in (archive_new, deliver_cohort, pull_cohort, rerun_failed)
}


def run_with_prefect(call: FlowCall) -> BaseException | None:
    """Run a flow by Prefect's engine. Returns the error that it ended with, or None."""
    flow = bound(_FLOWS[call.flow], call.name, call.body)
    state: State = flow(**call.parameters, return_state=True)
    if state.is_cancelled():
        return Interrupted()
    if state.is_completed():
        return None
    error = state.result(raise_on_failure=False)
    assert isinstance(error, BaseException), "it has failed"
    return error


def bound(
    flow: Flow[P, State], flow_run_name: str | None, body: Callable[[Engine], RunEnd]
) -> Flow[P, State]:
    """The same flow for Prefect, by name and parameters, with another body.

    The command line has read the site, opened the ledger and registered the cohort before it
    starts a flow over them. None of that can be a parameter of the flow: Prefect stores these.

    Parameters
    ----------
    body : callable
        Does the work of the flow, on what the caller has open.
    """

    @functools.wraps(flow.fn)
    def fn(*args: Any, **kwargs: Any) -> State:
        with without_phi():
            return state_of(body(PrefectEngine()))

    return Flow(
        fn,
        name=flow.name,
        flow_run_name=flow_run_name,
        task_runner=flow.task_runner,
        persist_result=False,
    )
