"""Verdicts of cohort rows, from the studies that each row has found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, and_, case, func, or_, select

from prefect_dicom.core.model import Evidence, RowVerdict, StudyReference, StudyState, Verdict
from prefect_dicom.core.verdicts import StudyOutcome, row_verdict, weakest_evidence
from prefect_dicom.ledger.database import slices
from prefect_dicom.ledger.queries import ARCHIVED_COLUMNS, listable_with, selection_of
from prefect_dicom.ledger.records import StudyLocation
from prefect_dicom.ledger.schema import IS_UNFINISHED, cohort_rows, row_studies, studies
from prefect_dicom.ledger.study_counts import counts_of
from prefect_dicom.ledger.study_locations import LocationsByNode, read_study_locations


def judge_rows(
    connection: Connection, cohort: int, page: Sequence[Row[Any]], lines: ColumnElement[bool]
) -> list[RowVerdict]:
    """Return the verdicts of rows of a cohort (with line, reason, gaps and faults), in their order.

    Parameters
    ----------
    lines : ColumnElement
        Condition on ``row_studies`` that selects the links of these rows.
    """
    links = connection.execute(
        select(
            row_studies.c.line,
            studies.c.reference,
            studies.c.state,
            studies.c.reason,
            row_studies.c.reason.label("not_taken"),
            listable_with(selection_of(cohort)).label("selected"),
            studies.c.evidence,
            studies.c.counted_instances,
            studies.c.node,
            *ARCHIVED_COLUMNS,
        )
        .join(studies, studies.c.reference == row_studies.c.study)
        .where(row_studies.c.cohort == cohort, lines)
        .order_by(row_studies.c.line, row_studies.c.study)
    ).all()
    figures = counts_of(connection, links)
    known: dict[StudyReference, dict[str, StudyLocation]] = {}
    for piece in slices(dict.fromkeys(link.reference for link in links)):
        known.update(read_study_locations(connection, piece))
    nodes: dict[int, dict[str, None]] = {}
    outcomes: dict[int, list[StudyOutcome]] = {}
    not_taken: dict[int, str] = {}
    for link in links:
        if link.not_taken is not None:
            not_taken[link.line] = link.not_taken
            continue
        its_nodes = nodes.setdefault(link.line, {})
        its_nodes.update(dict.fromkeys(_nodes_to_ask(link, known.get(link.reference, {}))))
        if not link.selected:
            other = StudyOutcome(link.reference, StudyState.FAILED, "selected-otherwise")
            outcomes.setdefault(link.line, []).append(other)
            continue
        counted = figures[link.reference]
        outcomes.setdefault(link.line, []).append(
            StudyOutcome(
                reference=link.reference,
                state=StudyState(link.state),
                reason=link.reason,
                expected_instances=counted.expected,
                stored_instances=counted.stored,
                withheld_instances=counted.withheld,
                size_bytes=counted.size_bytes,
                evidence=Evidence(link.evidence) if link.evidence else None,
                missing_instances=counted.missing,
            )
        )
    return [
        _verdict(
            row.line,
            row.reason,
            row.gaps,
            row.faults,
            outcomes.get(row.line, []),
            not_taken.get(row.line),
            tuple(nodes.get(row.line, ())),
        )
        for row in page
    ]


def _verdict(
    line: int,
    reason: str | None,
    gaps: list[str] | None,
    faults: list[str] | None,
    outcomes: list[StudyOutcome],
    not_taken: str | None,
    nodes: tuple[str, ...],
) -> RowVerdict:
    verdict, code = row_verdict(reason, outcomes, unproved=bool(gaps), not_taken=not_taken)
    return RowVerdict(
        line=line,
        verdict=verdict,
        reason=code,
        studies=tuple(outcome.reference for outcome in outcomes),
        expected_instances=sum(outcome.expected_instances for outcome in outcomes),
        archived_instances=sum(outcome.stored_instances for outcome in outcomes),
        withheld_instances=sum(outcome.withheld_instances for outcome in outcomes),
        size_bytes=sum(outcome.size_bytes for outcome in outcomes),
        gaps=tuple(gaps or ()),
        evidence=weakest_evidence(outcomes),
        nodes=nodes,
        faults=tuple(faults or ()),
        missing_instances=sum(outcome.missing_instances for outcome in outcomes),
    )


def _nodes_to_ask(study: Row[Any], locations: LocationsByNode) -> list[str]:
    """Return the nodes that a study was asked of, with the reasons of those that failed."""
    failed = [f"{at.node}: {at.reason}" for at in locations.values() if at.reason is not None]
    last = locations.get(study.node)
    return failed if last is not None and last.reason is not None else [*failed, study.node]


def count_plain_rows(connection: Connection, cohort: int) -> tuple[Counter[Verdict], Sequence[int]]:
    """Count the verdicts that the database can derive from found and archived studies.

    Returns
    -------
    tuple of Counter and sequence of int
        The counts, and the lines of all other rows: those with gaps, or with studies that failed
        or are not taken.
    """
    taken = and_(row_studies.c.reason.is_(None), listable_with(selection_of(cohort)))
    is_archived = and_(taken, studies.c.state == StudyState.ARCHIVED)

    def any_of(condition: ColumnElement[bool]) -> ColumnElement[int]:
        return func.max(case((condition, 1), else_=0))

    found = (
        select(
            row_studies.c.line,
            any_of(and_(taken, IS_UNFINISHED)).label("unfinished"),
            any_of(and_(is_archived, studies.c.withheld_instances > 0)).label("withheld"),
            any_of(and_(is_archived, studies.c.missing_instances > 0)).label("missing"),
            any_of(or_(~taken, studies.c.state == StudyState.FAILED)).label("other"),
        )
        .join(studies, studies.c.reference == row_studies.c.study)
        .where(row_studies.c.cohort == cohort)
        .group_by(row_studies.c.line)
        .subquery()
    )
    joined = cohort_rows.outerjoin(found, found.c.line == cohort_rows.c.line)
    of_cohort = cohort_rows.c.cohort == cohort
    no_gaps = cohort_rows.c.gaps.is_(None)
    plain = and_(
        no_gaps,
        or_(found.c.line.is_(None), found.c.unfinished == 1, found.c.other == 0),
    )
    signature = (
        cohort_rows.c.reason,
        found.c.unfinished,
        found.c.withheld,
        found.c.missing,
    )
    rows: Counter[Verdict] = Counter()
    for reason, unfinished, withheld, missing, count in connection.execute(
        select(*signature, func.count())
        .select_from(joined)
        .where(of_cohort, plain)
        .group_by(*signature)
    ):
        outcomes = []
        if unfinished is not None:
            state = StudyState.PENDING if unfinished else StudyState.ARCHIVED
            outcomes.append(
                StudyOutcome(0, state, withheld_instances=withheld, missing_instances=missing)
            )
        rows[row_verdict(reason, outcomes)[0]] += count
    others = connection.execute(
        select(cohort_rows.c.line).select_from(joined).where(of_cohort, ~plain)
    ).scalars()
    return rows, others.all()
