"""Counts of the instances of studies, by state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row

from prefect_dicom.core.model import InstanceState, StudyReference, StudyState
from prefect_dicom.ledger import statements
from prefect_dicom.ledger.database import slices


@dataclass(slots=True)
class StudyCounts:
    """Counts of the instances of one study; ``size_bytes`` is of the stored ones."""

    expected: int = 0
    received: int = 0
    stored: int = 0
    withheld: int = 0
    missing: int = 0
    """Of an archived study: those that never came, as a person has accepted."""
    size_bytes: int = 0


def count_instances(
    connection: Connection, references: Iterable[StudyReference]
) -> dict[StudyReference, StudyCounts]:
    """Count the listed instances of each study by their rows."""
    figures: dict[StudyReference, StudyCounts] = {}
    for piece in slices(references):
        figures.update((reference, StudyCounts()) for reference in piece)
        for reference, state, count, size_bytes in connection.execute(
            statements.COUNTS, {"b_studies": piece}
        ):
            add_instances(figures[reference], state, count, int(size_bytes))
    return figures


def counts_of(
    connection: Connection, rows: Sequence[Row[Any]]
) -> dict[StudyReference, StudyCounts]:
    """Return the counts of studies: recorded ones of archived studies, counted ones of others."""
    figures: dict[StudyReference, StudyCounts] = {}
    unfinished: dict[StudyReference, None] = {}
    for row in rows:
        if row.state == StudyState.ARCHIVED:
            figures[row.reference] = StudyCounts(
                expected=row.archived_instances + row.withheld_instances + row.missing_instances,
                stored=row.archived_instances,
                withheld=row.withheld_instances,
                missing=row.missing_instances,
                size_bytes=row.archived_bytes,
            )
        else:
            unfinished[row.reference] = None
    figures.update(count_instances(connection, unfinished))
    for row in rows:
        if row.reference in unfinished and row.counted_instances is not None:
            counts = figures[row.reference]
            counts.expected = max(counts.expected, row.counted_instances)
    return figures


def add_instances(figures: StudyCounts, state: str, count: int, size_bytes: int) -> None:
    """Add instances in one state to the counts."""
    figures.expected += count
    if state == InstanceState.RECEIVED:
        figures.received += count
    elif state == InstanceState.STORED:
        figures.stored += count
        figures.size_bytes += size_bytes
    elif state == InstanceState.REJECTED:
        figures.withheld += count
