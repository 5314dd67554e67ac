"""Metrics of a run for Prometheus: gauges of its cohort, nodes and spool, beside the counters.

:mod:`prefect_dicom.core.metrics` has the instruments, and
:mod:`prefect_dicom.core.metrics_endpoint` the port.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from prefect_dicom.admission.circuit_breaker import BreakerState
from prefect_dicom.admission.node_access import NodeAccess
from prefect_dicom.config.access_schedule import schedule_state
from prefect_dicom.config.site import Site
from prefect_dicom.config.tls_files import certificate_values
from prefect_dicom.core.clock import Clock
from prefect_dicom.core.events import Event, EventBus
from prefect_dicom.core.metrics import Value, happened
from prefect_dicom.core.metrics_endpoint import CachedReading, serving
from prefect_dicom.core.model import StudyState, Verdict
from prefect_dicom.run.run import DryRun, Run


@contextlib.contextmanager
def measured(run: DryRun) -> Iterator[None]:
    """Serve the metrics of a run while the block runs, if the site has a port for metrics."""
    with values_served(run.site, run.events, _Values(run)):
        yield


@contextlib.contextmanager
def values_served(
    site: Site, events: EventBus, values: Callable[[], Iterator[Value]]
) -> Iterator[None]:
    """Count the events of a run and serve values while the block runs, if the site has a port.

    Parameters
    ----------
    values : callable
        The gauges of the run, read at each scrape.
    """
    settings = site.metrics
    if settings.port is None:
        yield
        return
    events.subscribe(_count)
    try:
        with serving(settings.bind, settings.port, site.spool.path, values):
            yield
    finally:
        events.unsubscribe(_count)


def _count(event: Event) -> None:
    """Count an event of a run; a subscriber of its event bus."""
    happened(event.name, event.node or "", event.reason or "")


class _Values:
    """The gauges of a run, read at each scrape."""

    def __init__(self, run: DryRun) -> None:
        self._run = run
        # Cached: counting a large cohort takes a while.
        self._totals = CachedReading(run.reporting.totals)
        if isinstance(run, Run):
            self._spool_bytes = CachedReading(run.spool.waiting_bytes)

    def __call__(self) -> Iterator[Value]:
        cohort = str(self._run.cohort.number)
        totals = self._totals()
        for state in StudyState:
            labels = {"cohort": cohort, "state": state.value}
            yield Value("prefect_dicom_studies", totals.studies[state], labels)
        for verdict in Verdict:
            labels = {"cohort": cohort, "verdict": verdict.value}
            yield Value("prefect_dicom_rows", totals.rows[verdict], labels)
        run = self._run
        yield from certificate_values(run.site.tls_settings())
        yield from values_of_nodes(run.site, run.access, run.clock)
        if isinstance(self._run, Run):
            yield Value("prefect_dicom_studies_to_archive", len(self._run.in_hand))
            yield Value("prefect_dicom_spool_free_bytes", self._run.spool.free_bytes())
            yield Value("prefect_dicom_spool_bytes", self._spool_bytes())
            yield Value("prefect_dicom_refused_objects_total", self._run.spool.refusals)


def values_of_nodes(site: Site, access: NodeAccess, clock: Clock) -> Iterator[Value]:
    """The gauges of a site's nodes at present."""
    now = clock.now()
    for node, settings in site.nodes.items():
        schedule = settings.access_schedule
        open_now = schedule is None or not schedule_state(schedule, now).closed
        yield Value("prefect_dicom_node_window_open", open_now, {"node": node})
    for node, admission in access.admissions().items():
        labels = {"node": node}
        disabled = {**labels, "reason": admission.disabled_for or ""}
        yield Value("prefect_dicom_node_disabled", bool(admission.disabled_for), disabled)
        yield Value("prefect_dicom_node_waiting_seconds", admission.seconds_left(), labels)
        yield Value("prefect_dicom_node_associations", admission.associations, labels)
        for state in BreakerState:
            value = {**labels, "breaker": state.value}
            yield Value("prefect_dicom_node_breaker", admission.state is state, value)
