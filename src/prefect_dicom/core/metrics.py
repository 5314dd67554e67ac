"""Instruments of a process, for Prometheus: counters, gauges and histograms.

Nothing is recorded unless :func:`prefect_dicom.core.metrics_endpoint.serving` is entered. No label
holds patient data or a UID.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported only where metrics are served: it takes time
    from prometheus_client.registry import CollectorRegistry

_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30)
_SLOW = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3600)


@dataclass(frozen=True, slots=True)
class Value:
    """A number that is read at each scrape, with its labels."""

    name: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


READ: Mapping[str, str] = {
    "prefect_dicom_associations": "Associations open at the receiver.",
    "prefect_dicom_requests": "Retrieve requests for which the receiver expects instances.",
    "prefect_dicom_runs": "Runs that hold a lease on the receiver.",
    "prefect_dicom_dead_runs_total": "Runs that left the receiver without ending their requests.",
    "prefect_dicom_connections_total": "Connections to the receiver, by result.",
    "prefect_dicom_turned_away_total": "Connections turned away by the receiver, by reason.",
    "prefect_dicom_certificate_seconds_left": "Seconds until a certificate of ours expires.",
    "prefect_dicom_refused_objects_total": "Instances refused: the spool was full or failed.",
    "prefect_dicom_spool_free_bytes": "Bytes that may be written to the spool, above its reserve.",
    "prefect_dicom_spool_bytes": "Bytes of instances that wait in the spool to be archived.",
    "prefect_dicom_studies": "Studies of the cohort, by state.",
    "prefect_dicom_deliveries": "Deliveries of the cohort to a target, by state.",
    "prefect_dicom_rows": "Rows of the cohort, by verdict.",
    "prefect_dicom_node_disabled": "1 where a node is disabled, with the reason, else 0.",
    "prefect_dicom_node_window_open": "1 while an access window of a node is open, else 0.",
    "prefect_dicom_node_waiting_seconds": "Seconds until a waiting node is asked again.",
    "prefect_dicom_node_associations": "Requests that may be under way at a node, at present.",
    "prefect_dicom_node_breaker": "1 for the state of a node's circuit breaker, else 0.",
    "prefect_dicom_studies_to_archive": "Studies that were retrieved and wait for the archive.",
}
"""Meaning of each metric that is read at each scrape."""


class Instruments:
    """Counters, gauges and histograms; one set for each process that serves metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self.received = Counter(
            "prefect_dicom_received_objects",
            "Received instances, by result: kept, quarantined.",
            ["outcome"],
            registry=registry,
        )
        self.received_bytes = Counter(
            "prefect_dicom_received_bytes", "Bytes of the received instances.", registry=registry
        )
        self.store_seconds = Histogram(
            "prefect_dicom_store_seconds",
            "From the first byte of an instance to its file in the spool.",
            buckets=_FAST,
            registry=registry,
        )
        self.first_object_seconds = Histogram(
            "prefect_dicom_first_object_seconds",
            "From a retrieve request to its first instance.",
            buckets=_SLOW,
            registry=registry,
        )
        self.answer_seconds = Histogram(
            "prefect_dicom_answer_seconds",
            "From a request to the first response of the node.",
            ["node", "service"],
            buckets=_SLOW,
            registry=registry,
        )
        self.uploaded = Counter(
            "prefect_dicom_uploaded_objects",
            "Uploads of instances, by result: stored, failed.",
            ["outcome"],
            registry=registry,
        )
        self.uploaded_bytes = Counter(
            "prefect_dicom_uploaded_bytes", "Bytes that the archive accepted.", registry=registry
        )
        self.upload_seconds = Histogram(
            "prefect_dicom_upload_seconds",
            "From the begin of an upload to the archive's response.",
            buckets=_SLOW,
            registry=registry,
        )
        self.uploads_waiting = Gauge(
            "prefect_dicom_uploads_waiting",
            "Instances that wait for upload or are being uploaded.",
            registry=registry,
        )
        self.sent = Counter(
            "prefect_dicom_sent_objects",
            "Instances sent to targets, by result: accepted, refused.",
            ["outcome"],
            registry=registry,
        )
        self.sent_bytes = Counter(
            "prefect_dicom_sent_bytes", "Bytes that targets accepted.", registry=registry
        )
        self.events = Counter(
            "prefect_dicom_events",
            "Events of the run: studies that ended, nodes that were disabled, …",
            ["event", "node", "reason"],
            registry=registry,
        )
        # Created at the beginning: a rate needs a zero before the first one.
        self.received_as = {name: self.received.labels(name) for name in ("kept", "quarantined")}
        self.sent_as = {name: self.sent.labels(name) for name in ("accepted", "refused")}
        self.uploaded_as = {name: self.uploaded.labels(name) for name in ("stored", "failed")}


_live: Instruments | None = None


def use_instruments(instruments: Instruments | None) -> None:
    """Record with these instruments from now on; None: record nothing."""
    global _live
    _live = instruments


# --- recording; each function does nothing where no metrics are served


def object_received(outcome: str, size_bytes: int, seconds: float) -> None:
    """Count a received instance, which is ``kept`` or ``quarantined``."""
    if _live is not None:
        _live.received_as[outcome].inc()
        _live.received_bytes.inc(size_bytes)
        _live.store_seconds.observe(seconds)


def first_object(seconds: float) -> None:
    """Record the seconds from a retrieve request to its first instance."""
    if _live is not None:
        _live.first_object_seconds.observe(seconds)


def answered(node: str, service: str, seconds: float) -> None:
    """Record the seconds from a request to the first response of a node."""
    if _live is not None:
        _live.answer_seconds.labels(node, service).observe(seconds)


def upload_waits() -> None:
    """Count an instance that waits for upload."""
    if _live is not None:
        _live.uploads_waiting.inc()


def uploaded(size_bytes: int, seconds: float) -> None:
    """Record a completed upload."""
    if _live is not None:
        _live.uploaded_bytes.inc(size_bytes)
        _live.upload_seconds.observe(seconds)


def upload_ended(future: Future[Any]) -> None:
    """Count the result of an upload."""
    if _live is not None:
        _live.uploads_waiting.dec()
        if not future.cancelled():
            _live.uploaded_as["stored" if future.exception() is None else "failed"].inc()


def sent(outcome: str, size_bytes: int) -> None:
    """Count an instance that was sent to a target, which has ``accepted`` or ``refused`` it."""
    if _live is not None:
        _live.sent_as[outcome].inc()
        if outcome == "accepted":
            _live.sent_bytes.inc(size_bytes)


def happened(event: str, node: str, reason: str) -> None:
    """Count an event of a run."""
    if _live is not None:
        _live.events.labels(event, node, reason).inc()
