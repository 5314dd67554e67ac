"""Chunk planning: the studies that a run still has to pull, without those of other runs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from prefect_dicom.archive.spool import Spool
from prefect_dicom.core.failover import choose_node
from prefect_dicom.core.model import Chunk, StudyReference
from prefect_dicom.retrieval.requests import plan_chunks
from prefect_dicom.run.context import RunContext

_STUDIES_PER_PAGE = 500

Planned = tuple[StudyReference, str, int | None]
"""A study, the node to retrieve it from, and its number of instances if the node gave one."""


class ChunkPlanner:
    """Plans the chunks of a run. Thread-safe."""

    def __init__(self, context: RunContext, spool: Spool) -> None:
        self._context = context
        self._spool = spool
        self._lock = threading.Lock()
        self._held_by_others: set[StudyReference] = set()
        self._next_number = 1

    def chunks_by_node(self) -> dict[str, Iterator[Chunk]]:
        """The chunks by the node to retrieve them from, in the order of the cohort's nodes."""
        nodes = self._context.cohort.nodes
        if len(nodes) == 1:
            return {nodes[0]: self.chunks()}
        return {node: self.chunks(node) for node in nodes}

    def chunks(self, node: str | None = None) -> Iterator[Chunk]:
        """The studies that are still to be pulled, in chunks. Finished ones appear in none.

        Neither do those that other runs are working on: see :meth:`studies_of_others`.

        Parameters
        ----------
        node : str, optional
            For a cohort with several nodes: only the studies to retrieve from this one now.
        """
        context = self._context
        if context.filters.per_patient is not None:
            context.ledger.rows.limit_per_patient(
                context.cohort.number, context.filters.per_patient
            )
        limits = context.site.nodes[node or context.cohort.node].limits
        planned = plan_chunks(
            self._studies_to_pull() if node is None else self._studies_for_node(node),
            chunk_studies=limits.chunk_studies,
            chunk_instances=limits.chunk_instances,
        )
        for chunk in planned:
            if free := self._not_held_by_others(chunk.studies):
                # Several nodes have their chunks in turn.
                yield replace(chunk, number=self._next_number, studies=free)
                self._next_number += 1

    def leave_to_others(self, studies: Iterable[StudyReference]) -> None:
        """Remember studies that other runs have claimed."""
        with self._lock:
            self._held_by_others.update(studies)

    def studies_of_others(self) -> tuple[int, bool]:
        """Count the unfinished studies that this run has found claimed by other runs.

        Returns
        -------
        tuple of int and bool
            Studies that are still claimed, and whether a claim of another one has ended without the
            study: its run released it, or is dead. Each is reported once.
        """
        with self._lock:
            left = tuple(self._held_by_others)
        held = self._context.ledger.studies.unfinished(left, self._context.cohort.selection)
        with self._lock:
            self._held_by_others.intersection_update(study for study in held if held[study])
        return sum(held.values()), not all(held.values())

    def _not_held_by_others(self, studies: Sequence[StudyReference]) -> tuple[StudyReference, ...]:
        held = self._context.ledger.studies.unfinished(studies, self._context.cohort.selection)
        self.leave_to_others(study for study in studies if held.get(study))
        return tuple(study for study in studies if held.get(study) is False)

    def _studies_to_pull(self) -> Iterator[Planned]:
        """Unfinished studies; those with failed attempts come last.

        A few that are never sent would otherwise stop every run at its beginning, as a node that
        sends nothing. Studies with instances in the spool come early: they may fill the disk.
        Those in the spool of another host are better finished there, and come last too.
        """
        context = self._context
        here = self._spool.studies()
        tried: list[Planned] = []
        after = 0
        while page := context.ledger.studies.to_pull(
            context.cohort.number, after, _STUDIES_PER_PAGE
        ):
            for record in page:
                if record.node in context.site.nodes:
                    study = record.reference, record.node, record.study.number_of_instances
                    if record.attempt and record.reference not in here:
                        tried.append(study)
                    else:
                        yield study
            after = page[-1].reference
        yield from tried

    def _studies_for_node(self, node: str) -> Iterator[Planned]:
        """The unfinished studies to retrieve from this one of several nodes now."""
        context = self._context
        nodes = context.cohort.nodes
        after = 0
        while page := context.ledger.studies.to_pull(
            context.cohort.number, after, _STUDIES_PER_PAGE
        ):
            known = context.ledger.study_locations.of_studies(record.reference for record in page)
            disabled = context.failover.disabled()
            for record in page:
                locations = known.get(record.reference, {})
                if all(each in locations and locations[each].reason is not None for each in nodes):
                    # Another cohort has tried them all for it; this one has not.
                    locations = {}
                if choose_node(nodes, locations, disabled) == node:
                    location = locations.get(node)
                    count = location.number_of_instances if location is not None else None
                    yield record.reference, node, count
            after = page[-1].reference
