"""Notes for people on what a run finds out about a node."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from prefect_dicom.config.capabilities import NodeCapabilities
from prefect_dicom.ledger import Cohort, Ledger

log = logging.getLogger(__name__)

_PROBE_AGAIN = "`prefect-dicom doctor --probe` writes it anew"


class NodeNotes:
    """Notes on nodes, each logged once a run and kept with the cohort. Thread-safe."""

    def __init__(self, ledger: Ledger, cohort: Cohort) -> None:
        self._ledger = ledger
        self._cohort = cohort
        self._lock = threading.Lock()
        self._noted: set[tuple[str, str]] = set()

    def add(self, node: str, words: str) -> None:
        """Note something of a node, in words without identifiers."""
        with self._lock:
            known = (node, words) in self._noted
            self._noted.add((node, words))
        if not known:
            log.warning("node %s: %s", node, words)
            self._ledger.cohorts.add_note(self._cohort.number, node, words)

    def add_contradictions(
        self, node: str, known: NodeCapabilities, contradicted: Mapping[str, bool]
    ) -> None:
        """Note where a node behaves otherwise than its capabilities say: what a run sees counts.

        Parameters
        ----------
        contradicted : mapping of str to bool
            By key of the capabilities, whether the run has seen the opposite.
        """
        for key, seen in contradicted.items():
            if seen and getattr(known, key):
                self.add(
                    node, f"it did otherwise than `{key}` of its capabilities says; {_PROBE_AGAIN}"
                )
