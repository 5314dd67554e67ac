"""Endpoint of the metrics of a host: one port for all of its processes.

Every process of a host (the receiver, each run) counts for itself; one port shows them all. The
first process that gets the configured port serves it, and asks the others, which listen on a
port of their own on loopback, when it is asked. When it ends, another one takes the port. So one
target is scraped for each host, however many runs there are, and no two of them collide.

The label ``process`` tells them apart: ``receiver-1``, ``run-1``, ``run-2``, …, the lowest number
that is free, so that labels stay few.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from prefect_dicom.core.files import is_locked, lock_file
from prefect_dicom.core.metrics import READ, Instruments, Value, use_instruments
from prefect_dicom.core.proxies import direct_opener

if TYPE_CHECKING:  # imported where metrics are served: nobody else pays for it
    from prometheus_client.metrics_core import Metric

log = logging.getLogger(__name__)

T = TypeVar("T")

RECEIVER = "receiver"
"""What the receiver's value of the label ``process`` begins with."""
_RUN = "run"
_TAKE_THE_PORT_SECONDS = 2.0
_SIBLING_SECONDS = 2.0
_KEPT_SECONDS = 10.0
_KEPT_TIMES = 20


class CachedReading(Generic[T]):
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
    global _endpoint
    if port is None:
        yield
        return
    with _entering:
        if _endpoint is None:
            _endpoint = _Endpoint(bind, port, spool, process)
            use_instruments(_endpoint.instruments)
        endpoint = _endpoint
        endpoint.readers.append(read)
    try:
        yield
    finally:
        with _entering:
            endpoint.readers.remove(read)
            if not endpoint.readers:
                use_instruments(None)
                _endpoint = None
                endpoint.close()


class _Endpoint:
    """The metrics of this process: on a port of its own, and on the configured one if it is free.

    A port that cannot be had is no reason for a run to fail: it is said once.
    """

    def __init__(self, bind: str, port: int, spool: Path, process: str) -> None:
        from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server

        # The time a counter was made doubles the text and tells nothing.
        disable_created_metrics()  # type: ignore[no-untyped-call]
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
        from prometheus_client.parser import text_string_to_metric_families

        for slot in sorted(self._folder.iterdir()):
            if slot.name == self.name or not (port := _port_of_the_living(slot)):
                continue
            # It may end at any moment.
            with contextlib.suppress(OSError, ValueError):
                url = f"http://127.0.0.1:{port}/metrics"
                with direct_opener().open(url, timeout=_SIBLING_SECONDS) as answer:
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
