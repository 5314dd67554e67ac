"""Flows bound to the site, ledger and cohort that their caller has open."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

from prefect import Flow
from prefect.client.schemas.objects import State

P = ParamSpec("P")


def bound(
    flow: Flow[P, State], flow_run_name: str | None, body: Callable[[], State]
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
        return body()

    return Flow(
        fn,
        name=flow.name,
        flow_run_name=flow_run_name,
        task_runner=flow.task_runner,
        persist_result=False,
    )
