"""Rate limits of the requests to a node: what a request is charged, and how large it may be."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass

from prefect_dicom.admission.schedule import UNLIMITED, NodeSchedules
from prefect_dicom.config.site import Site
from prefect_dicom.ledger import Usage

_ENOUGH_INSTANCES = 50
"""For a mean of their sizes."""


@dataclass(slots=True)
class RequestUsage:
    """Instances and bytes that a request brought; filled in by who sends it."""

    instances: int = 0
    size_bytes: int = 0


class RequestRates:
    """Estimates and rates of requests by node. Thread-safe; charges nothing itself."""

    def __init__(self, site: Site, schedules: NodeSchedules) -> None:
        self._site = site
        self._schedules = schedules
        self._lock = threading.Lock()
        self._received: dict[str, RequestUsage] = defaultdict(RequestUsage)

    def rates(self, node: str) -> Usage | None:
        """Usage a node may be charged per second now; None where only associations count."""
        limits = self._schedules.state(node).rate_limits
        if limits is None or not limits.is_metered:
            return None
        busy = limits.utilisation * self._schedules.associations(node)
        retrieves = limits.retrieves_per_minute
        return Usage(
            None if retrieves is None else retrieves / 60,
            limits.instances_per_second,
            limits.bytes_per_second,
            busy if limits.utilisation < 1 else None,
        )

    def estimate(self, node: str, *, retrieve: bool, instances: int) -> Usage:
        """Usage that a request is expected to bring."""
        return Usage(float(retrieve), float(instances), instances * self._mean_instance_bytes(node))

    def record(self, node: str, usage: RequestUsage) -> None:
        """Count what a request brought, for the mean size of an instance."""
        with self._lock:
            received = self._received[node]
            received.instances += usage.instances
            received.size_bytes += usage.size_bytes

    def request_instances(self, node: str) -> int:
        """The most listed instances of a request: no more than arrive in a minute."""
        most = self._site.effective_node(node).limits.request_instances
        limits = self._schedules.state(node).rate_limits or UNLIMITED
        bound = limits.request_instances(max(1, int(self._mean_instance_bytes(node))))
        return min(most, bound or most)

    def _mean_instance_bytes(self, node: str) -> float:
        with self._lock:
            received = self._received[node]
            if received.instances >= _ENOUGH_INSTANCES:
                return received.size_bytes / received.instances
        return self._site.nodes[node].limits.instance_bytes
