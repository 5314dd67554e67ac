"""Whose a study is: runs that live, and the claims they hold.

A claim is the run and the attempt written with its study; every write about the study is
conditional on both. Rows are locked in ascending order of study references throughout, so that
no two transactions wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Row,
    Select,
    and_,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)

from prefect_dicom.core.errors import ClaimLost, LedgerError
from prefect_dicom.core.model import CohortRow, StudyReference, StudyState
from prefect_dicom.core.reasons import STUDY_GONE
from prefect_dicom.ledger import statements
from prefect_dicom.ledger.errors import without_database_errors
from prefect_dicom.ledger.reading import (
    STUDY_COLUMNS,
    UNFINISHED,
    Reading,
    first_rows,
    listable_with,
    slices,
    study_of,
    to_discover,
)
from prefect_dicom.ledger.records import Claim, Run
from prefect_dicom.ledger.schema import cohort_rows, cohorts, places, runs, studies
from prefect_dicom.ledger.study_locations import Copies, read_copies, study_at

T = TypeVar("T")


class Claiming(Reading):
    """The verbs by which runs begin, claim studies and give them up."""

    @contextmanager
    def run(self, kind: str, cohort: int | None = None) -> Iterator[Run]:
        """A run that lives until the block or the process ends, however it ends.

        On the way out its claims are released. A run that was killed leaves its claims behind;
        :meth:`claim` gives them to the next one.

        Parameters
        ----------
        kind : str
            What it does ("pull", "rerun", …), for people.
        cohort : int, optional
            The cohort it works on; what people want of that one's runs reaches it.
        """
        with self._locks.hold() as lock:
            run = Run(self._begin_run(kind, lock, cohort), kind)
            try:
                yield run
            except BaseException:
                # What went wrong in the block is worth more than a database that is gone too.
                with suppress(LedgerError):
                    self._end_run(run)
                raise
            self._end_run(run)

    @without_database_errors
    def _begin_run(self, kind: str, lock: int, cohort: int | None) -> int:
        with self._write() as connection:
            return connection.execute(
                insert(runs)
                .values(lock=lock, kind=kind, started_at=utc_now(), cohort=cohort)
                .returning(runs.c.number)
            ).scalar_one()

    @without_database_errors
    def _end_run(self, run: Run) -> None:
        with self._write() as connection:
            self._lock_studies(connection, studies.c.run == run.number)
            connection.execute(update(studies).where(studies.c.run == run.number).values(run=None))
            connection.execute(delete(places).where(places.c.run == run.number))
            connection.execute(
                update(runs).where(runs.c.number == run.number).values(ended_at=utc_now())
            )

    @without_database_errors
    def take_rows(
        self, run: Run, cohort: int, after_line: int = 0, limit: int = 500
    ) -> list[CohortRow]:
        """Take the next rows whose discovery has not ended, so that no other run asks for them.

        They are the run's until what became of them is recorded, or the run ends. Rows that
        another living run of the cohort has taken are passed over.
        """
        with self._write() as connection:
            # One at a time: whoever takes sees what the others have taken.
            connection.execute(
                select(cohorts.c.number)
                .where(cohorts.c.number == cohort)
                .with_for_update(key_share=True)
            )
            others = self._others(connection, run, cohort)
            free = or_(cohort_rows.c.run.is_(None), cohort_rows.c.run.not_in(others))
            rows = first_rows(connection, and_(to_discover(cohort, after_line), free), limit)
            for piece in slices(row.line for row in rows):
                connection.execute(
                    update(cohort_rows)
                    .where(cohort_rows.c.cohort == cohort, cohort_rows.c.line.in_(piece))
                    .values(run=run.number)
                )
        return rows

    @without_database_errors
    def rows_of_others(self, run: Run, cohort: int) -> tuple[int, int]:
        """How many rows other runs have taken and not asked for: living ones, and ended ones."""
        with self._read() as connection:
            others = self._others(connection, run, cohort)
            its_run = cohort_rows.c.run
            taken = connection.execute(
                select(its_run, func.count())
                .where(to_discover(cohort), its_run.is_not(None), its_run != run.number)
                .group_by(its_run)
            ).all()
        held = sum(count for number, count in taken if number in others)
        return held, sum(count for _, count in taken) - held

    def _others(self, connection: Connection, run: Run, cohort: int) -> set[int]:
        """The living runs of a cohort but this one."""
        unended = and_(runs.c.cohort == cohort, runs.c.ended_at.is_(None))
        numbers = connection.execute(
            select(runs.c.number).where(unended, runs.c.number != run.number)
        ).scalars()
        return self._living(connection, list(numbers))

    @without_database_errors
    def claim(
        self,
        run: Run,
        references: Sequence[StudyReference],
        selection: str | None = None,
        node: str | None = None,
    ) -> list[Claim]:
        """Claim those of the studies that are unfinished and that no living run holds.

        A claim of a run that has died is taken over: ``attempt`` grows, and whatever still
        writes for the dead run is refused from then on.

        Parameters
        ----------
        selection : str, optional
            Only studies of which nothing is listed yet, or that were listed with these series.
        node : str, optional
            The node to ask for them, of a cohort that has several: the claims have the studies as
            that one has them. Without it the node that they were found on last.

        Returns
        -------
        list of Claim
            In order of reference. Studies that are archived, failed, or held by a living run
            (this one too) are left out.

        Raises
        ------
        LedgerError
            The run itself has lost its lock: others may take its claims at any time.
        """
        claims: list[Claim] = []
        with self._write() as connection:
            for piece in slices(sorted(set(references))):
                claims.extend(self._claim_some(connection, run, piece, selection, node))
        return claims

    def _claim_some(
        self,
        connection: Connection,
        run: Run,
        references: list[StudyReference],
        selection: str | None,
        node: str | None,
    ) -> list[Claim]:
        chosen = and_(studies.c.reference.in_(references), studies.c.state.in_(UNFINISHED))
        if selection is not None:
            chosen = and_(chosen, listable_with(selection))
        found = self._lock_studies(
            connection,
            chosen,
            studies.c.node,
            studies.c.state,
            studies.c.run,
            studies.c.attempt,
            studies.c.listed_by,
            studies.c.counted_instances,
            *STUDY_COLUMNS,
        )
        living = self._living(
            connection, {run.number, *(row.run for row in found if row.run is not None)}
        )
        if run.number not in living:
            raise LedgerError("ledger-unavailable", "the run has ended or lost its lock")
        claims = [
            Claim(
                reference=row.reference,
                run=run.number,
                attempt=row.attempt + 1,
                node=row.node,
                state=StudyState(row.state),
                study=study_of(row),
                listed_by=row.listed_by,
            )
            for row in found
            if row.run not in living
        ]
        if node is not None:
            counted = {row.reference: row.counted_instances or 0 for row in found}
            known = read_copies(connection, references)
            claims = [
                _turned(connection, claim, node, known[claim.reference], counted[claim.reference])
                for claim in claims
            ]
        if claims:
            connection.execute(
                update(studies)
                .where(studies.c.reference == bindparam("b_reference"))
                .values(run=run.number, attempt=bindparam("b_attempt"), claimed_at=utc_now()),
                [{"b_reference": c.reference, "b_attempt": c.attempt} for c in claims],
            )
        return claims

    @without_database_errors
    def release(self, claims: Iterable[Claim]) -> None:
        """Give the claims up; the studies stay as they are. One that is lost is passed over."""
        ordered = sorted(claims, key=lambda claim: claim.reference)
        if not ordered:
            return
        with self._write() as connection:
            connection.execute(
                update(studies)
                .where(
                    studies.c.reference == bindparam("b_reference"),
                    studies.c.run == bindparam("b_run"),
                    studies.c.attempt == bindparam("b_attempt"),
                )
                .values(run=None),
                [
                    {"b_reference": c.reference, "b_run": c.run, "b_attempt": c.attempt}
                    for c in ordered
                ],
            )

    @without_database_errors
    def held(self, claims: Iterable[Claim]) -> list[Claim]:
        """Those of the claims that still stand, for going on after a ClaimLost about several."""
        with self._read() as connection:
            return _standing(connection, statements.CLAIMS, claims)

    def _hold(self, connection: Connection, claims: Collection[Claim]) -> None:
        """Make sure that the claims stand, and that they do until the transaction ends."""
        lost = len(claims) - len(_standing(connection, statements.HOLD_CLAIMS, claims))
        if lost:
            raise ClaimLost(detail=f"{lost} of {len(claims)} claims" if len(claims) > 1 else "")

    def _lock_studies(
        self, connection: Connection, condition: ColumnElement[bool], *columns: Any
    ) -> Sequence[Row[Any]]:
        """Read studies and keep others from changing them until the transaction ends.

        On SQLite the transaction has the whole database to itself already.
        """
        return connection.execute(
            select(studies.c.reference, *columns)
            .where(condition)
            .order_by(studies.c.reference)
            .with_for_update(key_share=True)
        ).all()

    @without_database_errors
    def while_unclaimed(self, reference: StudyReference, act: Callable[[], T]) -> T:
        """Do something short about a study that no run works on, and that none can claim then.

        Raises
        ------
        ClaimLost
            A living run has the study; nothing was done.
        """
        with self._write() as connection:
            for row in self._lock_studies(
                connection, studies.c.reference == reference, studies.c.run
            ):
                if row.run is not None and self._living(connection, {row.run}):
                    raise ClaimLost(detail="a run works on the study")
            return act()

    @without_database_errors
    def live_claims(self) -> list[Claim]:
        """The claims of living runs, in order of reference."""
        with self._read() as connection:
            rows = connection.execute(
                select(studies).where(studies.c.run.is_not(None)).order_by(studies.c.reference)
            ).all()
            living = self._living(connection, {row.run for row in rows})
        return [
            Claim(
                reference=row.reference,
                run=row.run,
                attempt=row.attempt,
                node=row.node,
                state=StudyState(row.state),
                study=study_of(row),
            )
            for row in rows
            if row.run in living
        ]


def _turned(
    connection: Connection, claim: Claim, node: str, its_copies: Copies, counted: int
) -> Claim:
    """The claim, with the study as a node has it that is asked for it now."""
    told = study_at(connection, claim.reference, node)
    others = [
        copy.number_of_instances or 0
        for copy in its_copies.values()
        if copy.node not in (node, claim.listed_by) and copy.reason != STUDY_GONE
    ]
    if claim.listed_by not in (None, node):
        others.append(counted)
    study = claim.study
    if told is not None and node != claim.node:
        study = replace(study, **told)
        values = {"node": node, **told}
        connection.execute(
            update(studies).where(studies.c.reference == claim.reference).values(**values)
        )
    return replace(
        claim,
        node=node,
        study=study,
        told_elsewhere=max(others, default=0),
        is_found=told is not None,
    )


def _standing(connection: Connection, read: Select[Any], claims: Iterable[Claim]) -> list[Claim]:
    """The claims whose run and attempt are those of their studies, by reference."""
    ordered = sorted(claims, key=lambda claim: claim.reference)
    tokens: dict[StudyReference, tuple[int | None, int]] = {}
    for piece in slices(claim.reference for claim in ordered):
        for row in connection.execute(read, {"b_studies": piece}):
            tokens[row.reference] = (row.run, row.attempt)
    return [c for c in ordered if tokens.get(c.reference) == (c.run, c.attempt)]


def utc_now() -> datetime:
    """The moment, as it is written down."""
    return datetime.now(UTC)
