"""Prefect's global concurrency limits of a site's PACS nodes, where they exist."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound

from prefect_dicom.core.errors import ConfigurationError
from prefect_dicom.run.run import DryRun


@contextlib.contextmanager
def concurrency_limits_of_nodes(run: DryRun) -> Iterator[None]:
    """Occupy this run's slots of the limits ``pacs-<node>``, where they exist.

    For the whole run: Prefect's limits poll, so that slots held for a short time are mostly idle.
    Within the run, the concurrency limit of the node's admission applies.
    """
    with contextlib.ExitStack() as stack:
        # In the same order in all runs, against deadlocks.
        for node in sorted(run.cohort.nodes):
            stack.enter_context(_limit_of(run, node))
        yield


@contextlib.contextmanager
def _limit_of(run: DryRun, node: str) -> Iterator[None]:
    limit = f"pacs-{node}"
    with get_client(sync_client=True) as client:
        try:
            known = client.read_global_concurrency_limit_by_name(limit)
        except ObjectNotFound:
            known = None
    if known is None or not known.active:
        yield
        return
    occupied = run.site.effective_node(node).limits.associations
    if known.limit < occupied:
        # Prefect would wait for ever.
        fault = f"allows {known.limit} associations, limits.associations of the node is {occupied}"
        raise ConfigurationError(f"Prefect's concurrency limit {limit}", [fault])
    with concurrency(
        limit,
        occupy=occupied,
        strict=True,
        lease_duration=60,
        raise_on_lease_renewal_failure=False,
    ):
        yield
