"""Metrics of a run that delivers, for Prometheus."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prefect_dicom.config.tls_files import certificate_values
from prefect_dicom.core.deliveries import DeliveryState
from prefect_dicom.core.metrics import Value
from prefect_dicom.core.metrics_endpoint import CachedReading
from prefect_dicom.delivery.run import DeliveryRun
from prefect_dicom.run.monitoring import values_of_nodes, values_served


@contextlib.contextmanager
def delivery_measured(run: DeliveryRun) -> Iterator[None]:
    """Serve the metrics of a run while the block runs, if the site has a port for metrics."""
    context = run.context
    # Cached: counting a large cohort takes a while.
    totals = CachedReading(run.totals)

    def values() -> Iterator[Value]:
        states = totals().states
        for state in DeliveryState:
            labels = {"cohort": str(run.cohort.number), "target": context.target}
            yield Value("prefect_dicom_deliveries", states[state], {**labels, "state": state.value})
        yield from certificate_values(context.site.tls_settings())
        yield from values_of_nodes(context.site, context.access, context.clock)

    with values_served(context.site, run.events, values):
        yield
