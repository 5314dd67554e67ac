"""Who has sent to a storage SCP over TLS: address, AE title, version, suite and certificate."""

from __future__ import annotations

import threading
from typing import Any

from prefect_dicom.config.certificates import Certificate
from prefect_dicom.network.storage_scp.association_events import AssociationEvent, Happening
from prefect_dicom.network.tls import TlsPeer

# Peers choose their titles: memory may not grow with them.
_MOST_KEPT = 64


class VerifiedSenders:
    """The last association over TLS of each sender. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[tuple[str, str], TlsPeer] = {}

    def note(self, event: AssociationEvent) -> None:
        """Keep the sender of an accepted association."""
        if event.happening is not Happening.ACCEPTED or event.tls is None:
            return
        key = event.peer_address, event.calling_ae_title
        with self._lock:
            self._last.pop(key, None)
            self._last[key] = event.tls
            if len(self._last) > _MOST_KEPT:
                del self._last[next(iter(self._last))]

    def to_message(self) -> list[dict[str, Any]]:
        """As the control protocol has it, the latest last."""
        with self._lock:
            last = list(self._last.items())
        return [
            {
                "address": address,
                "calling_ae_title": title,
                "version": peer.version,
                "suite": peer.suite,
                "chain": [one.words for one in peer.chain],
                "days_left": _days_left(peer.chain),
            }
            for (address, title), peer in last
        ]


def _days_left(chain: tuple[Certificate, ...]) -> int | None:
    return chain[0].days_left() if chain else None
