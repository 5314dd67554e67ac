"""Claims on studies, with fencing.

A claim is the run and the attempt written with its study; every write about the study is
conditional on both. Rows are locked in ascending order of study references throughout, so that
no two transactions wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from sqlalchemy import Connection, and_, bindparam, select, update

from prefect_dicom.core.errors import ClaimLost, LedgerError
from prefect_dicom.core.model import StudyReference, StudyState
from prefect_dicom.ledger import statements
from prefect_dicom.ledger.database import Database, slices, standing_claims, utc_now
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.queries import STUDY_COLUMNS, UNFINISHED, listable_with, study_of
from prefect_dicom.ledger.records import Claim, Run
from prefect_dicom.ledger.schema import studies
from prefect_dicom.ledger.study_locations import LocationsByNode, read_study_locations, study_at

T = TypeVar("T")


class Claims:
    """The claims of runs on studies."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def acquire(
        self,
        run: Run,
        references: Sequence[StudyReference],
        selection: str | None = None,
        node: str | None = None,
    ) -> list[Claim]:
        """Claim the studies that are unfinished and that no living run has claimed.

        A claim of a dead run is taken over: ``attempt`` is incremented, and every later write for
        the dead run is refused.

        Parameters
        ----------
        selection : str, optional
            Only studies that are not listed yet, or were listed with these series.
        node : str, optional
            The node to retrieve from, of a cohort that has several: the claims describe the
            studies as it does. By default the node that a study was found on last.

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
        with self._database.write() as connection:
            for piece in slices(sorted(set(references))):
                claims.extend(self._acquire_some(connection, run, piece, selection, node))
        return claims

    def _acquire_some(
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
        found = self._database.lock_studies(
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
        living = self._database.living_runs(
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
            known = read_study_locations(connection, references)
            claims = [
                _at_node(connection, claim, node, known[claim.reference], counted[claim.reference])
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

    @translate_database_errors
    def release(self, claims: Iterable[Claim]) -> None:
        """Release claims; the studies keep their states. Claims that are lost are passed over."""
        ordered = sorted(claims, key=lambda claim: claim.reference)
        if not ordered:
            return
        with self._database.write() as connection:
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

    @translate_database_errors
    def still_held(self, claims: Iterable[Claim]) -> list[Claim]:
        """Return the claims that are not lost, to continue with after a ClaimLost about several."""
        with self._database.read() as connection:
            return standing_claims(connection, statements.CLAIMS, claims)

    @translate_database_errors
    def while_unclaimed(self, reference: StudyReference, act: Callable[[], T]) -> T:
        """Call ``act`` while no run works on a study and none can claim it; keep it short.

        Raises
        ------
        ClaimLost
            A living run has the study; nothing was done.
        """
        with self._database.write() as connection:
            for row in self._database.lock_studies(
                connection, studies.c.reference == reference, studies.c.run
            ):
                if row.run is not None and self._database.living_runs(connection, {row.run}):
                    raise ClaimLost(detail="a run works on the study")
            return act()

    @translate_database_errors
    def live(self) -> list[Claim]:
        """Return the claims of living runs, in order of reference."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(studies).where(studies.c.run.is_not(None)).order_by(studies.c.reference)
            ).all()
            living = self._database.living_runs(connection, {row.run for row in rows})
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


def _at_node(
    connection: Connection, claim: Claim, node: str, locations: LocationsByNode, counted: int
) -> Claim:
    """Return the claim with the study as the node describes it that is asked for it now."""
    found = study_at(connection, claim.reference, node)
    others = [
        location.number_of_instances or 0
        for location in locations.values()
        if location.node not in (node, claim.listed_by) and location.reason != "study-gone"
    ]
    if claim.listed_by not in (None, node):
        others.append(counted)
    study = claim.study
    if found is not None and node != claim.node:
        study = replace(study, **found)
        values = {"node": node, **found}
        connection.execute(
            update(studies).where(studies.c.reference == claim.reference).values(**values)
        )
    return replace(
        claim,
        node=node,
        study=study,
        counted_elsewhere=max(others, default=0),
        is_found=found is not None,
    )
