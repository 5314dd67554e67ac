"""What a process counts and times, for Prometheus; nothing, unless :func:`serving` is entered.

Every process of a host (the receiver, each run) counts for itself; one port shows them all. The
first process that gets the configured port serves it, and asks the others, which listen on a
port of their own on loopback, when it is asked. When it ends, another one takes the port. So one
target is scraped for each host, however many runs there are, and no two of them collide.

The label ``process`` tells them apart: ``receiver-1``, ``run-1``, ``run-2``, …, the lowest number
that is free, so that labels stay few. No label holds anything of a patient or a UID.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:  # imported where metrics are served: nobody else pays for it
    from prometheus_client.metrics_core import Metric
    from prometheus_client.registry import CollectorRegistry
from prefect_dicom.core.files import is_locked, lock_file

log = logging.getLogger(__name__)

T = TypeVar("T")

RECEIVER = "receiver"
"""What the receiver's value of the label ``process`` begins with."""
_RUN = "run"
_TAKE_THE_PORT_SECONDS = 2.0
_SIBLING_SECONDS = 2.0
_KEPT_SECONDS = 10.0
_KEPT_TIMES = 20
_FAST = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30)
_SLOW = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3600)


@dataclass(frozen=True, slots=True)
class Value:
    """A number that is read when somebody looks, with its labels."""

    name: str
    value: float
    labels: Mapping[str, str] = field(default_factory=dict)


READ: Mapping[str, str] = {
    "prefect_dicom_associations": "Associations open at the receiver.",
    "prefect_dicom_requests": "Retrieve requests the receiver expects objects of.",
    "prefect_dicom_runs": "Runs that hold a lease on the receiver.",
    "prefect_dicom_dead_runs_total": "Runs that left the receiver without ending their requests.",
    "prefect_dicom_connections_total": "Connections to the receiver, by what became of them.",
    "prefect_dicom_refused_objects_total": "Objects there was no room for, or that no disk took.",
    "prefect_dicom_spool_free_bytes": "Bytes that may be written to the spool, above its reserve.",
    "prefect_dicom_spool_bytes": "Bytes of objects that wait in the spool to be archived.",
    "prefect_dicom_studies": "Studies of the cohort, by state.",
    "prefect_dicom_rows": "Rows of the cohort, by verdict.",
    "prefect_dicom_node_disabled": "1 where a node is left alone until a person acts, with why.",
    "prefect_dicom_node_window_open": "1 where a node may be asked by its windows, else 0.",
    "prefect_dicom_node_waiting_seconds": "For how long a node is still left alone.",
    "prefect_dicom_node_associations": "Requests a node may be sent at a time, at present.",
    "prefect_dicom_node_breaker": "1 for the state in which a node's breaker is, else 0.",
    "prefect_dicom_studies_to_archive": "Studies that were retrieved and wait for the archive.",
}
"""Meaning of each metric that is read when somebody looks."""


class Instruments:
    """What is counted as it happens; one set for each process that serves metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        self.received = Counter(
            "prefect_dicom_received_objects",
            "Objects that arrived, by what became of them: kept, quarantined.",
            ["outcome"],
            registry=registry,
        )
        self.received_bytes = Counter(
            "prefect_dicom_received_bytes", "Bytes of the objects that arrived.", registry=registry
        )
        self.store_seconds = Histogram(
            "prefect_dicom_store_seconds",
            "From the first byte of an object to its place in the spool.",
            buckets=_FAST,
            registry=registry,
        )
        self.first_object_seconds = Histogram(
            "prefect_dicom_first_object_seconds",
            "From a retrieve request to the first object that it brings.",
            buckets=_SLOW,
            registry=registry,
        )
        self.answer_seconds = Histogram(
            "prefect_dicom_answer_seconds",
            "From a request to the first answer of the node.",
            ["node", "service"],
            buckets=_SLOW,
            registry=registry,
        )
        self.uploaded = Counter(
            "prefect_dicom_uploaded_objects",
            "Objects given to the archive, by how that ended: stored, failed.",
            ["outcome"],
            registry=registry,
        )
        self.uploaded_bytes = Counter(
            "prefect_dicom_uploaded_bytes", "Bytes the archive took.", registry=registry
        )
        self.upload_seconds = Histogram(
            "prefect_dicom_upload_seconds",
            "From the begin of an upload to the archive's answer.",
            buckets=_SLOW,
            registry=registry,
        )
        self.uploads_waiting = Gauge(
            "prefect_dicom_uploads_waiting",
            "Objects that wait for the archive or are on their way to it.",
            registry=registry,
        )
        self.events = Counter(
            "prefect_dicom_events",
            "Events of the run: studies that ended, nodes that were disabled, …",
            ["event", "node", "reason"],
            registry=registry,
        )
        # There from the beginning: a rate needs a zero before the first one.
        self.received_as = {name: self.received.labels(name) for name in ("kept", "quarantined")}
        self.uploaded_as = {name: self.uploaded.labels(name) for name in ("stored", "failed")}


class Seldom(Generic[T]):
    """A value that takes time to find out: read anew when somebody looks, but not too often.

    Parameters
    ----------
    read : callable
        Finds it out. It is kept for ten seconds, and for twenty times as long as that took.
    """

    def __init__(self, read: Callable[[], T]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._kept: list[T] = []
        self._until = 0.0

    def __call__(self) -> T:
        with self._lock:
            began = time.monotonic()
            if not self._kept or began > self._until:
                self._kept = [self._read()]
                took = time.monotonic() - began
                self._until = time.monotonic() + max(_KEPT_SECONDS, _KEPT_TIMES * took)
            return self._kept[0]


_live: Instruments | None = None


# --- what the code says as it works; each does nothing where no metrics are served


def object_received(outcome: str, size_bytes: int, seconds: float) -> None:
    """An object has arrived, and is ``kept`` or ``quarantined``."""
    if _live is not None:
        _live.received_as[outcome].inc()
        _live.received_bytes.inc(size_bytes)
        _live.store_seconds.observe(seconds)


def first_object(seconds: float) -> None:
    """A retrieve request has brought its first object."""
    if _live is not None:
        _live.first_object_seconds.observe(seconds)


def answered(node: str, service: str, seconds: float) -> None:
    """A node has sent its first answer to a request."""
    if _live is not None:
        _live.answer_seconds.labels(node, service).observe(seconds)


def upload_waits() -> None:
    """An object is to be uploaded."""
    if _live is not None:
        _live.uploads_waiting.inc()


def uploaded(size_bytes: int, seconds: float) -> None:
    """The archive has taken an object."""
    if _live is not None:
        _live.uploaded_bytes.inc(size_bytes)
        _live.upload_seconds.observe(seconds)


def upload_ended(future: Future[Any]) -> None:
    """An upload is over, however it ended."""
    if _live is not None:
        _live.uploads_waiting.dec()
        if not future.cancelled():
            _live.uploaded_as["stored" if future.exception() is None else "failed"].inc()


def happened(event: str, node: str, reason: str) -> None:
    """Something of note has happened to a run."""
    if _live is not None:
        _live.events.labels(event, node, reason).inc()


# --- serving them


_entering = threading.Lock()
_endpoint: _Endpoint | None = None


@contextlib.contextmanager
def serving(
    bind: str,
    port: int | None,
    spool: Path,
    read: Callable[[], Iterable[Value]],
    *,
    process: str = _RUN,
) -> Iterator[None]:
    """While the block runs, metrics are counted, and served with those of the host's others.

    Parameters
    ----------
    bind : str
        Address to listen on.
    port : int, optional
        None: nothing is counted, nothing listens.
    spool : Path
        The spool the processes share; they find each other in its folder ``metrics``.
    read : callable
        Asked for current values whenever somebody looks, in another thread.
    process : str
        What it is called there, before its number.
    """
    global _live, _endpoint
    if port is None:
        yield
        return
    with _entering:
        if _endpoint is None:
            _endpoint = _Endpoint(bind, port, spool, process)
            _live = _endpoint.instruments
        endpoint = _endpoint
        endpoint.readers.append(read)
    try:
        yield
    finally:
        with _entering:
            endpoint.readers.remove(read)
            if not endpoint.readers:
                _live = _endpoint = None
                endpoint.close()


class _Endpoint:
    """The metrics of this process: on a port of its own, and on the configured one if it is free.

    A port that cannot be had is no reason for a run to fail: it is said once.
    """

    def __init__(self, bind: str, port: int, spool: Path, process: str) -> None:
        from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

        # The time a counter was made doubles the text and tells nothing.
        disable_created_metrics()
        self.readers: list[Callable[[], Iterable[Value]]] = []
        self._registry = CollectorRegistry()
        self.instruments = Instruments(self._registry)
        self._registry.register(_Collected(self._read))
        self._bind, self._port = bind, port
        self._folder = spool / "metrics"
        # The spool first, which a dry run may be the first to make: nobody else may look into it,
        # and parents are made without that.
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        own, _ = start_http_server(0, "127.0.0.1", self._registry)
        self._servers = [own]
        self.name, self._slot = self._take_slot(process, own.server_port)
        self._over = threading.Event()
        self._taking = threading.Thread(target=self._take_the_port, daemon=True, name="metrics")
        if not self._serve_all():
            self._taking.start()

    def close(self) -> None:
        """Listen no more; the port is for another process of the host."""
        self._over.set()
        if self._taking.is_alive():
            self._taking.join()
        for server in self._servers:
            server.shutdown()
            server.server_close()
        os.close(self._slot)

    def _take_slot(self, process: str, port: int) -> tuple[str, int]:
        """The first name that no living process has, with the port it is asked at."""
        for number in itertools.count(1):
            name = f"{process}-{number}"
            try:
                # Held for as long as the process lives, and given up however it dies.
                slot = lock_file(self._folder / name, wait=False)
            except BlockingIOError:
                continue
            os.truncate(slot, 0)
            os.write(slot, str(port).encode())
            return name, slot
        raise AssertionError("numbers do not end")

    def _take_the_port(self) -> None:
        while not self._over.wait(_TAKE_THE_PORT_SECONDS):
            if self._serve_all():
                return

    def _serve_all(self) -> bool:
        from prometheus_client import CollectorRegistry, start_http_server

        everything = CollectorRegistry()
        everything.register(_Collected(self._of_all))
        try:
            server, _ = start_http_server(self._port, self._bind, everything)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                log.warning("no metrics: cannot listen on port %d", self._port)
                return True
            return False
        self._servers.append(server)
        return True

    def _read(self) -> Iterator[Metric]:
        values = [value for read in list(self.readers) for value in read()]
        yield from _families(values)

    def _of_all(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        own = (self.name, self._registry.collect())
        for process, families in (own, *self._siblings()):
            for family in families:
                into = merged.setdefault(family.name, family)
                samples = [
                    s._replace(labels={**s.labels, "process": process}) for s in family.samples
                ]
                into.samples = samples if into is family else [*into.samples, *samples]
        yield from merged.values()

    def _siblings(self) -> Iterator[tuple[str, list[Metric]]]:
        import urllib.request

        from prometheus_client.parser import text_string_to_metric_families

        for slot in sorted(self._folder.iterdir()):
            if slot.name == self.name or not (port := _port_of_the_living(slot)):
                continue
            # It may end at any moment.
            with contextlib.suppress(OSError, ValueError):
                url = f"http://127.0.0.1:{port}/metrics"
                with urllib.request.urlopen(url, timeout=_SIBLING_SECONDS) as answer:
                    text = answer.read().decode()
                yield slot.name, list(text_string_to_metric_families(text))


class _Collected:
    """A collector in the form prometheus_client asks for."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self.collect = collect

    def describe(self) -> list[Any]:
        """Nothing: names are known when values are."""
        return []


def _families(values: Iterable[Value]) -> Iterator[Metric]:
    from prometheus_client.metrics_core import Metric

    families: dict[str, Metric] = {}
    for value in values:
        family = families.get(value.name)
        if family is None:
            kind = "counter" if value.name.endswith("_total") else "gauge"
            family = Metric(value.name.removesuffix("_total"), READ[value.name], kind)
            families[value.name] = family
        family.add_sample(value.name, dict(value.labels), value.value)
    return iter(families.values())


def _port_of_the_living(slot: Path) -> int | None:
    try:
        text = slot.read_bytes() if is_locked(slot) else b""
    except OSError:
        return None
    return int(text) if text.isdigit() else None
