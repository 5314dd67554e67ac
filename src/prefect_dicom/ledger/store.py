"""The verbs of the ledger. Each is one short transaction, or a stream of pages.

States change only as :data:`prefect_dicom.policy.STUDY_TRANSITIONS` and
:data:`~prefect_dicom.policy.INSTANCE_TRANSITIONS` say, and only here. A verb that writes about a
study takes the study's claim and first makes sure that it still stands; where it does not,
nothing is written and :class:`~prefect_dicom.errors.ClaimLost` is raised.

Rows are locked in ascending order of study references throughout, so that no two transactions
wait for each other.
"""

from __future__ import annotations

import threading
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Row,
    Select,
    and_,
    bindparam,
    delete,
    func,
    insert,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from prefect_dicom.errors import ClaimLost, LedgerError
from prefect_dicom.faultpoints import reached
from prefect_dicom.ledger import statements
from prefect_dicom.ledger.adoption import adopt_studies
from prefect_dicom.ledger.database import for_writing, open_database
from prefect_dicom.ledger.edge import without_database_errors
from prefect_dicom.ledger.ownership import Locks
from prefect_dicom.ledger.records import (
    Adopted,
    Claim,
    Cohort,
    FoundStudy,
    InstanceRecord,
    ListChange,
    Reopened,
    Run,
    StudyRecord,
    Totals,
)
from prefect_dicom.ledger.schema import (
    IS_LISTED,
    NO_LONGER_LISTED,
    cohort_rows,
    cohorts,
    manifests,
    row_studies,
    runs,
    studies,
)
from prefect_dicom.ledger.schema import instances as instance_rows
from prefect_dicom.model import (
    ArchivedObject,
    Arrival,
    CohortRow,
    Disposition,
    Evidence,
    Instance,
    InstanceKey,
    InstanceState,
    RowVerdict,
    Study,
    StudyReference,
    StudyState,
)
from prefect_dicom.policy import StudyOutcome, row_verdict
from prefect_dicom.reasons import REASONS, reason_for

T = TypeVar("T")

_UNFINISHED = (StudyState.PENDING, StudyState.LISTED)
# Rows read at a time by what streams, rows sent at a time by what writes, and values in one list
# of a statement (three parameters each at most; SQLite takes 32,766).
_PAGE = 1000
_BATCH = 5000
_LIST = 500
# A manifest can have megabytes.
_MANIFEST_PAGE = 8

_ROW_COLUMNS = (
    cohort_rows.c.line,
    cohort_rows.c.patient_id,
    cohort_rows.c.accession_number,
    cohort_rows.c.study_instance_uid,
    cohort_rows.c.study_date,
    cohort_rows.c.modality,
    cohort_rows.c.study_description,
)
_STUDY_COLUMNS = (
    studies.c.study_instance_uid,
    studies.c.patient_id,
    studies.c.accession_number,
    studies.c.study_date,
    studies.c.modalities,
    studies.c.study_description,
    studies.c.number_of_series,
    studies.c.number_of_instances,
)


def _now() -> datetime:
    return datetime.now(UTC)


def _slices(values: Iterable[T], size: int = _LIST) -> Iterator[list[T]]:
    remaining = iter(values)
    while piece := list(islice(remaining, size)):
        yield piece


def _study_of(row: Row[Any]) -> Study:
    return Study(
        study_instance_uid=row.study_instance_uid,
        patient_id=row.patient_id,
        accession_number=row.accession_number,
        study_date=row.study_date,
        modalities=tuple(row.modalities),
        study_description=row.study_description,
        number_of_series=row.number_of_series,
        number_of_instances=row.number_of_instances,
    )


@dataclass(slots=True)
class _Figures:
    """Instances of one study, counted."""

    expected: int = 0
    received: int = 0
    stored: int = 0
    withheld: int = 0
    size_bytes: int = 0


class Ledger:
    """The state of every cohort row, study and instance, in SQLite or PostgreSQL.

    One object may be used by all threads of a process; it must not cross a fork. Every method
    raises :class:`~prefect_dicom.errors.LedgerError` (``ledger-unavailable``) where the database
    fails, without any text of its statements.

    Examples
    --------
    >>> with Ledger.open("sqlite:////var/lib/site/ledger.db") as ledger:  # doctest: +SKIP
    ...     with ledger.run("pull") as run:
    ...         claims = ledger.claim(run, [1, 2, 3])
    """

    def __init__(self, engine: Engine, locks: Locks) -> None:
        self._engine = engine
        self._writing_engine = for_writing(engine)
        self._locks = locks
        self._insert = (sqlite if engine.dialect.name == "sqlite" else postgresql).insert
        # SQLite has one writer: threads queue here, where waiting costs nothing, rather than in
        # its busy loop. PostgreSQL needs no such thing.
        self._writer = threading.Lock() if engine.dialect.name == "sqlite" else nullcontext()

    # ------------------------------------------------------------------ opening and closing

    @classmethod
    def open(cls, url: str) -> Ledger:
        """Open the ledger at a URL; make it where there is none, migrate an older one.

        Parameters
        ----------
        url : str
            ``sqlite:///relative`` or ``sqlite:////absolute`` for a file (made with mode 0600),
            ``postgresql+psycopg://…`` for PostgreSQL.

        Raises
        ------
        LedgerError
            ``ledger-unavailable``, ``ledger-too-new`` or ``ledger-unsafe``; no part of the URL
            is in its message.
        """
        return cls(*open_database(url))

    def close(self) -> None:
        """Close all connections; runs that are still open end with them on PostgreSQL."""
        self._engine.dispose()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with self._writer, self._writing_engine.begin() as connection:
            yield connection

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with self._engine.begin() as connection:
            yield connection

    # ------------------------------------------------------------------ runs and claims

    @contextmanager
    def run(self, kind: str) -> Iterator[Run]:
        """A run that lives until the block or the process ends, however it ends.

        On the way out its claims are released. A run that was killed leaves its claims behind;
        :meth:`claim` gives them to the next one.

        Parameters
        ----------
        kind : str
            What it does ("pull", "rerun", …), for people.
        """
        with self._locks.hold() as lock:
            run = Run(self._begin_run(kind, lock), kind)
            try:
                yield run
            except BaseException:
                # What went wrong in the block is worth more than a database that is gone too.
                with suppress(LedgerError):
                    self._end_run(run)
                raise
            self._end_run(run)

    @without_database_errors
    def _begin_run(self, kind: str, lock: int) -> int:
        with self._write() as connection:
            return connection.execute(
                insert(runs)
                .values(lock=lock, kind=kind, started_at=_now())
                .returning(runs.c.number)
            ).scalar_one()

    @without_database_errors
    def _end_run(self, run: Run) -> None:
        with self._write() as connection:
            self._lock_studies(connection, studies.c.run == run.number)
            connection.execute(update(studies).where(studies.c.run == run.number).values(run=None))
            connection.execute(
                update(runs).where(runs.c.number == run.number).values(ended_at=_now())
            )

    def _living(self, connection: Connection, numbers: Collection[int]) -> set[int]:
        """Those of the runs whose locks are held."""
        held = set()
        for piece in _slices(numbers):
            for number, lock, ended_at in connection.execute(
                select(runs.c.number, runs.c.lock, runs.c.ended_at).where(runs.c.number.in_(piece))
            ).all():
                if ended_at is None and self._locks.is_held(connection, lock):
                    held.add(number)
        return held

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
    def claim(self, run: Run, references: Sequence[StudyReference]) -> list[Claim]:
        """Claim those of the studies that are unfinished and that no living run holds.

        A claim of a run that has died is taken over: ``attempt`` grows, and whatever still
        writes for the dead run is refused from then on.

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
            for piece in _slices(sorted(set(references))):
                claims.extend(self._claim_some(connection, run, piece))
        return claims

    def _claim_some(
        self, connection: Connection, run: Run, references: list[StudyReference]
    ) -> list[Claim]:
        found = self._lock_studies(
            connection,
            and_(studies.c.reference.in_(references), studies.c.state.in_(_UNFINISHED)),
            studies.c.node,
            studies.c.state,
            studies.c.run,
            studies.c.attempt,
            *_STUDY_COLUMNS,
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
                study=_study_of(row),
            )
            for row in found
            if row.run not in living
        ]
        if claims:
            connection.execute(
                update(studies)
                .where(studies.c.reference == bindparam("b_reference"))
                .values(run=run.number, attempt=bindparam("b_attempt")),
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
                study=_study_of(row),
            )
            for row in rows
            if row.run in living
        ]

    # ------------------------------------------------------------------ cohorts

    @without_database_errors
    def add_cohort(
        self, digest: str, node: str, rows: Iterable[CohortRow], name: str | None = None
    ) -> Cohort:
        """Add a cohort with its rows, all or nothing; one that is there already is returned.

        Parameters
        ----------
        digest : str
            Of the cohort file's content. With the node it is the cohort's identity.
        node : str
            Name of the PACS node that will be asked.
        rows : iterable of CohortRow
            Not touched where the cohort is there already.
        name : str, optional
            Its name for people; the first 12 characters of the digest where none is given, with
            the node's name behind them where another node has that one.

        Raises
        ------
        LedgerError
            ``cohort-name-taken``.
        """
        short = digest[:12]
        with self._write() as connection:
            for attempted in (name,) if name is not None else (short, f"{short}-{node}"):
                added = connection.execute(
                    self._insert(cohorts)
                    .values(name=attempted, digest=digest, node=node, rows=0, created_at=_now())
                    .on_conflict_do_nothing()
                    .returning(cohorts.c.number)
                ).scalar()
                if added is not None:
                    break
                known = connection.execute(
                    select(cohorts).where(cohorts.c.digest == digest, cohorts.c.node == node)
                ).first()
                if known is not None:
                    return Cohort(**known._mapping)
            else:
                raise LedgerError("cohort-name-taken")
            count = 0
            for piece in _slices(rows, _BATCH):
                connection.execute(
                    insert(cohort_rows), [_values_of_row(added, row) for row in piece]
                )
                count += len(piece)
            connection.execute(update(cohorts).where(cohorts.c.number == added).values(rows=count))
            row = connection.execute(select(cohorts).where(cohorts.c.number == added)).one()
            return Cohort(**row._mapping)

    @without_database_errors
    def cohort(self, name: str) -> Cohort:
        """The cohort of this name, or of this number.

        Raises
        ------
        LedgerError
            ``cohort-unknown``.
        """
        with self._read() as connection:
            row = connection.execute(select(cohorts).where(cohorts.c.name == name)).first()
            if row is None and name.isascii() and name.isdigit() and len(name) < 18:
                row = connection.execute(
                    select(cohorts).where(cohorts.c.number == int(name))
                ).first()
        if row is None:
            raise LedgerError("cohort-unknown")
        return Cohort(**row._mapping)

    @without_database_errors
    def cohort_of(self, digest: str, node: str) -> Cohort | None:
        """The cohort of this file and node, or None where it has not been added."""
        with self._read() as connection:
            row = connection.execute(
                select(cohorts).where(cohorts.c.digest == digest, cohorts.c.node == node)
            ).first()
        return None if row is None else Cohort(**row._mapping)

    @without_database_errors
    def cohorts(self) -> list[Cohort]:
        """All cohorts, the latest first."""
        with self._read() as connection:
            rows = connection.execute(select(cohorts).order_by(cohorts.c.number.desc())).all()
        return [Cohort(**row._mapping) for row in rows]

    # ------------------------------------------------------------------ discovery

    @without_database_errors
    def rows_to_discover(
        self, cohort: int, after_line: int = 0, limit: int = 500
    ) -> list[CohortRow]:
        """The next rows whose discovery has not ended, by line.

        Among them are rows whose last discovery failed for a reason that need not last; going
        on behind the last line of each answer meets every row once.
        """
        with self._read() as connection:
            rows = connection.execute(
                select(*_ROW_COLUMNS)
                .where(
                    cohort_rows.c.cohort == cohort,
                    cohort_rows.c.line > after_line,
                    ~cohort_rows.c.discovered,
                )
                .order_by(cohort_rows.c.line)
                .limit(limit)
            ).all()
        return [CohortRow(**row._mapping) for row in rows]

    @without_database_errors
    def record_discoveries(
        self,
        cohort: int,
        found: Sequence[tuple[int, Sequence[Study], str | None, Sequence[Study]]],
    ) -> None:
        """Record what became of rows at discovery, and the studies they found.

        A study is one row of the ledger however many cohort rows and cohorts find it. Its node
        and attributes are refreshed unless it is archived or claimed; its state stays.

        Parameters
        ----------
        found : sequence of (line, studies, reason, near misses)
            ``reason`` is None where the row found its studies. ``several-patients`` and reasons
            that are permanent end the row; others leave it to be discovered again. The near
            misses (candidates that were not taken) are kept for :meth:`near_misses`.
        """
        for _, _, reason, _ in found:
            if reason is not None:
                reason_for(reason)
        by_line = {entry[0]: entry for entry in sorted(found, key=lambda entry: entry[0])}
        if not by_line:
            return
        answers = {
            study.study_instance_uid: study
            for _, its_studies, _, _ in by_line.values()
            for study in its_studies
        }
        with self._write() as connection:
            node = connection.execute(
                select(cohorts.c.node).where(cohorts.c.number == cohort)
            ).scalar_one()
            references = self._upsert_studies(connection, node, answers)
            connection.execute(
                update(cohort_rows)
                .where(
                    cohort_rows.c.cohort == cohort,
                    cohort_rows.c.line == bindparam("b_line"),
                )
                .values(
                    discovered=bindparam("discovered"),
                    reason=bindparam("reason"),
                    near_misses=bindparam("near_misses"),
                ),
                [
                    {
                        "b_line": line,
                        "discovered": _ends_a_row(reason),
                        "reason": reason,
                        "near_misses": [asdict(study) for study in near] or None,
                    }
                    for line, _, reason, near in by_line.values()
                ],
            )
            for piece in _slices(by_line):
                connection.execute(
                    delete(row_studies).where(
                        row_studies.c.cohort == cohort, row_studies.c.line.in_(piece)
                    )
                )
            links = sorted(
                {
                    (line, references[study.study_instance_uid])
                    for line, its_studies, _, _ in by_line.values()
                    for study in its_studies
                }
            )
            if links:
                connection.execute(
                    insert(row_studies),
                    [{"cohort": cohort, "line": line, "study": study} for line, study in links],
                )

    def _upsert_studies(
        self, connection: Connection, node: str, answers: Mapping[str, Study]
    ) -> dict[str, StudyReference]:
        if not answers:
            return {}
        # In the order of references first (see the module's note), then the new ones by UID.
        for piece in _slices(answers):
            self._lock_studies(connection, studies.c.study_instance_uid.in_(piece))
        statement = self._insert(studies)
        refreshed = [column.name for column in (studies.c.node, *_STUDY_COLUMNS[1:])]
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=[studies.c.study_instance_uid],
                set_={name: statement.excluded[name] for name in refreshed},
                where=and_(studies.c.state != StudyState.ARCHIVED, studies.c.run.is_(None)),
            ),
            [
                {
                    "study_instance_uid": uid,
                    "node": node,
                    "patient_id": study.patient_id,
                    "accession_number": study.accession_number,
                    "study_date": study.study_date,
                    "modalities": list(study.modalities),
                    "study_description": study.study_description,
                    "number_of_series": study.number_of_series,
                    "number_of_instances": study.number_of_instances,
                }
                for uid, study in sorted(answers.items())
            ],
        )
        references: dict[str, StudyReference] = {}
        for piece in _slices(answers):
            references.update(
                connection.execute(
                    select(studies.c.study_instance_uid, studies.c.reference).where(
                        studies.c.study_instance_uid.in_(piece)
                    )
                )
                .tuples()
                .all()
            )
        return references

    @without_database_errors
    def near_misses(self, cohort: int, line: int) -> tuple[Study, ...]:
        """The candidates that the row's discovery did not take."""
        with self._read() as connection:
            kept = connection.execute(
                select(cohort_rows.c.near_misses).where(
                    cohort_rows.c.cohort == cohort, cohort_rows.c.line == line
                )
            ).scalar()
        return tuple(
            Study(**{**study, "modalities": tuple(study["modalities"])}) for study in kept or ()
        )

    # ------------------------------------------------------------------ studies

    @without_database_errors
    def studies_to_pull(
        self, cohort: int, after: StudyReference = 0, limit: int = 1000
    ) -> list[StudyRecord]:
        """The next unfinished studies of a cohort, by reference; claimed ones are among them."""
        return self._study_page(cohort, after, limit, studies.c.state.in_(_UNFINISHED))

    @without_database_errors
    def instances(self, reference: StudyReference) -> list[InstanceRecord]:
        """The instances of a study, by key; of an archived one the manifest has them instead.

        Those that are no longer listed are among them, rejected for that reason.
        """
        with self._read() as connection:
            rows = connection.execute(statements.INSTANCES, {"b_study": reference}).all()
        return [
            InstanceRecord(
                key=InstanceKey(row.series_instance_uid, row.sop_instance_uid),
                sop_class_uid=row.sop_class_uid,
                state=InstanceState(row.state),
                reason=row.reason,
                sha256=row.sha256,
                size_bytes=row.size_bytes,
                transfer_syntax_uid=row.transfer_syntax_uid,
                spool_name=row.spool_name,
                object_key=row.object_key,
                version_id=row.version_id,
                warnings=tuple(row.warnings or ()),
                rejections=row.rejections,
            )
            for row in rows
        ]

    @without_database_errors
    def record_list(
        self,
        claim: Claim,
        instances: Sequence[Instance],
        evidence: Evidence,
        *,
        fresh: bool = False,
    ) -> ListChange:
        """:meth:`record_lists` of one study."""
        return self.record_lists([(claim, instances, evidence)], fresh=fresh)[0]

    @without_database_errors
    def record_lists(
        self, lists: Sequence[tuple[Claim, Sequence[Instance], Evidence]], *, fresh: bool = False
    ) -> list[ListChange]:
        """Make the PACS's instance lists the expected sets of studies, which are then listed.

        What is new on a list is expected. What is no longer on it is forgotten while it was
        only expected; once received or stored it is rejected as ``no-longer-listed``, and keeps
        the name of its object. All or nothing: with a ClaimLost nothing is recorded.

        Parameters
        ----------
        lists : sequence of (claim, instances, evidence)
        fresh : bool
            The first list of a rerun: listed instances that were rejected are expected again,
            with no arrivals counted against them.

        Returns
        -------
        list of ListChange
            Compared with the lists before, in their order.
        """
        if not lists:
            return []
        references = [claim.reference for claim, _, _ in lists]
        with self._write() as connection:
            self._hold(connection, [claim for claim, _, _ in lists])
            now = _now()
            connection.execute(
                statements.STUDY_LISTED,
                [
                    {"b_study": reference, "b_evidence": evidence, "b_listed_at": now}
                    for reference, (_, _, evidence) in zip(references, lists, strict=True)
                ],
            )
            reached("list-half-written")
            known: dict[StudyReference, dict[InstanceKey, Row[Any]]] = defaultdict(dict)
            for piece in _slices(references):
                for row in connection.execute(statements.LISTS, {"b_studies": piece}):
                    key = InstanceKey(row.series_instance_uid, row.sop_instance_uid)
                    known[row.study][key] = row
            changes, new = [], []
            for reference, (_, instances, _) in zip(references, lists, strict=True):
                listed = {instance.key: instance for instance in instances}
                added = [key for key in listed if key not in known[reference]]
                new += [
                    {
                        "study": reference,
                        "series_instance_uid": key.series_instance_uid,
                        "sop_instance_uid": key.sop_instance_uid,
                        "sop_class_uid": listed[key].sop_class_uid,
                        "state": InstanceState.EXPECTED,
                    }
                    for key in added
                ]
                returned, left = _change_list(
                    connection, reference, known[reference], listed, fresh
                )
                changes.append(ListChange(len(added) + returned, left, len(listed)))
            for piece in _slices(new, _BATCH):
                connection.execute(statements.EXPECT, piece)
        return changes

    @without_database_errors
    def record_received(
        self, claims: Mapping[StudyReference, Claim], arrivals: Sequence[Arrival]
    ) -> list[Arrival]:
        """Record objects that lie in the spool. Of expected instances they are then received.

        One that is received, stored or rejected already stays as it is. All or nothing: with a
        ClaimLost nothing is recorded, and the call can be repeated with what :meth:`held` says.

        Parameters
        ----------
        claims : mapping of study reference to Claim
            Those of the studies that the arrivals are for are made sure of.

        Returns
        -------
        list of Arrival
            Those that are not on the list of their study, or for a study that is not claimed.
        """
        concerned = {a.study: claims[a.study] for a in arrivals if a.study in claims}
        # A PACS may send one instance twice; the first arrival is the one that counts.
        first: dict[tuple[StudyReference, str, str], Arrival] = {}
        for arrival in arrivals:
            if arrival.study in concerned:
                first.setdefault((arrival.study, *arrival.key), arrival)
        if not first:
            return list(arrivals)
        with self._write() as connection:
            self._hold(connection, list(concerned.values()))
            received = connection.execute(
                statements.RECEIVED,
                [
                    {
                        "b_study": study,
                        "b_series": series,
                        "b_instance": instance,
                        "b_sop_class_uid": arrival.sop_class_uid,
                        "b_transfer_syntax_uid": arrival.transfer_syntax_uid,
                        "b_sha256": arrival.sha256,
                        "b_size_bytes": arrival.size_bytes,
                        "b_spool_name": arrival.name,
                    }
                    for (study, series, instance), arrival in first.items()
                ],
            ).rowcount
            # Nearly always all of them were expected, and nothing is left to be asked.
            listed = set(first) if received == len(first) else self._listed(connection, first)
        return [a for a in arrivals if (a.study, *a.key) not in listed]

    def _listed(
        self, connection: Connection, identities: Iterable[tuple[StudyReference, str, str]]
    ) -> set[tuple[StudyReference, str, str]]:
        columns = (
            instance_rows.c.study,
            instance_rows.c.series_instance_uid,
            instance_rows.c.sop_instance_uid,
        )
        listed: set[tuple[StudyReference, str, str]] = set()
        for piece in _slices(identities):
            listed.update(
                connection.execute(select(*columns).where(tuple_(*columns).in_(piece), IS_LISTED))
                .tuples()
                .all()
            )
        return listed

    @without_database_errors
    def record_lost(self, claim: Claim, keys: Iterable[InstanceKey]) -> None:
        """Received or stored instances are expected again: the spool or the archive lost them.

        Each counts one more rejection. Others stay as they are.
        """
        with self._write() as connection:
            self._hold(connection, [claim])
            _change(connection, statements.LOST, claim.reference, list(keys))

    @without_database_errors
    def record_rejected(self, claim: Claim, rejections: Sequence[tuple[InstanceKey, str]]) -> None:
        """Leave expected or received instances out, each for the reason given with it."""
        for _, reason in rejections:
            reason_for(reason)
        with self._write() as connection:
            self._hold(connection, [claim])
            _change(
                connection,
                statements.REJECTED,
                claim.reference,
                [key for key, _ in rejections],
                [{"b_reason": reason} for _, reason in rejections],
            )

    @without_database_errors
    def record_stored(
        self,
        claim: Claim,
        stored: Sequence[tuple[InstanceKey, ArchivedObject, tuple[str, ...]]],
    ) -> None:
        """Received instances are in the archive, with the bytes that were received.

        One that is not received, or was received with another SHA-256 meanwhile, stays as it
        is.

        Parameters
        ----------
        stored : sequence of (key, what the archive answered, warnings)
        """
        with self._write() as connection:
            self._hold(connection, [claim])
            _change(
                connection,
                statements.STORED,
                claim.reference,
                [key for key, _, _ in stored],
                [
                    {
                        "b_sha256": answer.sha256,
                        "b_object_key": answer.key,
                        "b_version_id": answer.version_id,
                        "b_warnings": list(warnings) or None,
                    }
                    for _, answer, warnings in stored
                ],
            )

    @without_database_errors
    def record_archived(
        self,
        claim: Claim,
        manifest: bytes,
        *,
        instances: int,
        withheld: int,
        size_bytes: int,
        adopted: bool = False,
    ) -> None:
        """The manifest is in the archive: the study is archived and the claim given up.

        The ledger keeps the manifest and forgets the instances, but for those that were stored
        and left the PACS's list afterwards: only it still knows their objects.

        Parameters
        ----------
        manifest : bytes
            As it is in the archive.
        instances, withheld : int
            How many it names and how many it says are left out.
        size_bytes : int
            Of the instances it names.
        adopted : bool
            It is from the time of another ledger: that it speaks of as many instances as are
            listed is enough, they need not have been stored by this one.

        Raises
        ------
        LedgerError
            ``instances-missing`` where the ledger does not know exactly as many as stored and
            as rejected; nothing is written then.
        """
        reference = claim.reference
        with self._write() as connection:
            self._hold(connection, [claim])
            figures = _count(connection, [reference])[reference]
            known = (figures.stored, figures.withheld)
            if figures.expected != instances + withheld or not (
                adopted or known == (instances, withheld)
            ):
                raise LedgerError(
                    "instances-missing",
                    f"the manifest names {instances} and leaves out {withheld}; of "
                    f"{figures.expected} listed {figures.stored} are stored and "
                    f"{figures.withheld} rejected",
                )
            changed = connection.execute(
                statements.STUDY_ARCHIVED,
                {
                    "b_study": reference,
                    "b_archived_at": _now(),
                    "b_instances": instances,
                    "b_withheld": withheld,
                    "b_size_bytes": size_bytes,
                },
            ).rowcount
            if not changed:
                raise LedgerError("instances-missing", "the study has not been listed")
            connection.execute(
                insert(manifests), {"study": reference, "body": zlib.compress(manifest)}
            )
            connection.execute(statements.FORGET_ARCHIVED, {"b_study": reference})

    @without_database_errors
    def record_failed(self, claim: Claim, code: str, detail: str = "") -> None:
        """The study has failed, and the claim is given up; its instances stay as they are.

        Parameters
        ----------
        code : str
            A code of :mod:`prefect_dicom.reasons`; it carries the disposition.
        detail : str
            What the peer said, perhaps; it stays in the ledger.
        """
        reason_for(code)
        with self._write() as connection:
            self._hold(connection, [claim])
            connection.execute(
                update(studies)
                .where(studies.c.reference == claim.reference)
                .values(state=StudyState.FAILED, reason=code, detail=detail, run=None)
            )

    @without_database_errors
    def adopt(self, found: Sequence[FoundStudy]) -> list[Adopted]:
        """Take over what the archive holds of studies, after the ledger was lost or fell behind.

        One transaction. A study the ledger does not know is added: archived, or failed where
        ``reason`` says what is wrong with it. One it knows as pending, listed or failed becomes
        archived: the manifest is its list, and the proof that all of it was stored. Left as it
        is: what is archived already, what a living run has claimed, what was listed otherwise
        since, and everything where the manifest cannot be believed.

        Parameters
        ----------
        found : sequence of FoundStudy
            Each study once; some dozens at a time.

        Returns
        -------
        list of Adopted
            In the order of ``found``.
        """
        with self._write() as connection:
            return adopt_studies(
                connection, self._insert, found, lambda runs: self._living(connection, runs)
            )

    @without_database_errors
    def reopen(
        self,
        cohort: int,
        *,
        reasons: Collection[str] = (),
        nodes: Collection[str] = (),
        lines: Collection[int] = (),
    ) -> Reopened:
        """Let a rerun try failed studies and rows again.

        Failed studies are pending again, with their instances as they are; rows that ended
        without a study are to be discovered again.

        Parameters
        ----------
        reasons : collection of str
            Exactly these, also permanent ones. Without any: all that are not permanent.
        nodes, lines : collection
            Only studies and rows of these nodes, and only these lines. Empty: all.

        Returns
        -------
        Reopened
            How many of each.
        """
        codes = sorted(reasons) or [
            code
            for code, reason in REASONS.items()
            if reason.disposition is not Disposition.PERMANENT
        ]
        of_lines = [piece for piece in _slices(sorted(lines))] or [None]
        count_studies = count_rows = 0
        with self._write() as connection:
            its_node = connection.execute(
                select(cohorts.c.node).where(cohorts.c.number == cohort)
            ).scalar()
            for piece in of_lines:
                linked = select(row_studies.c.study).where(row_studies.c.cohort == cohort)
                if piece is not None:
                    linked = linked.where(row_studies.c.line.in_(piece))
                chosen = and_(
                    studies.c.reference.in_(linked),
                    studies.c.state == StudyState.FAILED,
                    studies.c.reason.in_(codes),
                )
                if nodes:
                    chosen = and_(chosen, studies.c.node.in_(sorted(nodes)))
                self._lock_studies(connection, chosen)
                count_studies += connection.execute(
                    update(studies)
                    .where(chosen)
                    .values(state=StudyState.PENDING, reason=None, detail="")
                ).rowcount
                if nodes and its_node not in nodes:
                    continue
                again = and_(cohort_rows.c.cohort == cohort, cohort_rows.c.reason.in_(codes))
                if piece is not None:
                    again = and_(again, cohort_rows.c.line.in_(piece))
                count_rows += connection.execute(
                    update(cohort_rows).where(again).values(discovered=False, reason=None)
                ).rowcount
        return Reopened(count_studies, count_rows)

    # ------------------------------------------------------------------ reading

    def verdicts(self, cohort: int) -> Iterator[RowVerdict]:
        """The verdict of every row of a cohort, by line, in pages."""
        return (verdict for _, verdict in self.rows(cohort))

    def rows(self, cohort: int) -> Iterator[tuple[CohortRow, RowVerdict]]:
        """Every row of a cohort with its own keys and its verdict, by line, in pages."""
        line = 0
        while page := self._row_page(cohort, line):
            yield from page
            line = page[-1][0].line

    @without_database_errors
    def _row_page(self, cohort: int, after_line: int) -> list[tuple[CohortRow, RowVerdict]]:
        with self._read() as connection:
            page = connection.execute(
                select(*_ROW_COLUMNS, cohort_rows.c.reason)
                .where(cohort_rows.c.cohort == cohort, cohort_rows.c.line > after_line)
                .order_by(cohort_rows.c.line)
                .limit(_PAGE)
            ).all()
            if not page:
                return []
            links = connection.execute(
                select(
                    row_studies.c.line,
                    studies.c.reference,
                    studies.c.state,
                    studies.c.reason,
                    *_ARCHIVED_COLUMNS,
                )
                .join(studies, studies.c.reference == row_studies.c.study)
                .where(
                    row_studies.c.cohort == cohort,
                    row_studies.c.line.between(page[0].line, page[-1].line),
                )
                .order_by(row_studies.c.line, row_studies.c.study)
            ).all()
            figures = _figures(connection, links)
        outcomes: dict[int, list[StudyOutcome]] = {}
        for link in links:
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
                )
            )
        return [
            (
                CohortRow(*row[: len(_ROW_COLUMNS)]),
                _verdict(row.line, row.reason, outcomes.get(row.line, [])),
            )
            for row in page
        ]

    def studies(self, cohort: int) -> Iterator[StudyRecord]:
        """Every study of a cohort, by reference, in pages."""
        reference = 0
        while page := self._study_page(cohort, reference, _PAGE):
            yield from page
            reference = page[-1].reference

    @without_database_errors
    def _study_page(
        self,
        cohort: int,
        after: StudyReference,
        limit: int,
        condition: ColumnElement[bool] | None = None,
    ) -> list[StudyRecord]:
        chosen: list[Row[Any]] = []
        with self._read() as connection:
            while len(chosen) < limit:
                # By the index of the links alone, whatever else the ledger holds.
                references = (
                    connection.execute(
                        select(row_studies.c.study)
                        .distinct()
                        .where(row_studies.c.cohort == cohort, row_studies.c.study > after)
                        .order_by(row_studies.c.study)
                        .limit(_LIST)
                    )
                    .scalars()
                    .all()
                )
                if not references:
                    break
                after = references[-1]
                query = select(studies).where(studies.c.reference.in_(references))
                if condition is not None:
                    query = query.where(condition)
                chosen.extend(connection.execute(query.order_by(studies.c.reference)))
            return self._study_records(connection, chosen[:limit])

    def _study_records(self, connection: Connection, rows: Sequence[Row[Any]]) -> list[StudyRecord]:
        figures = _figures(connection, rows)
        living = self._living(connection, {row.run for row in rows if row.run is not None})
        return [
            StudyRecord(
                reference=row.reference,
                node=row.node,
                state=StudyState(row.state),
                study=_study_of(row),
                reason=row.reason,
                disposition=reason_for(row.reason).disposition if row.reason else None,
                detail=row.detail,
                attempt=row.attempt,
                claimed=row.run in living,
                evidence=Evidence(row.evidence) if row.evidence else None,
                listed_at=row.listed_at,
                archived_at=row.archived_at,
                expected=figures[row.reference].expected,
                received=figures[row.reference].received,
                stored=figures[row.reference].stored,
                withheld=figures[row.reference].withheld,
                size_bytes=figures[row.reference].size_bytes,
            )
            for row in rows
        ]

    @without_database_errors
    def study(self, reference: StudyReference) -> StudyRecord | None:
        """The study with this reference, or None."""
        return self._one_study(studies.c.reference == reference)

    @without_database_errors
    def study_by_uid(self, study_instance_uid: str) -> StudyRecord | None:
        """The study with this StudyInstanceUID, or None."""
        return self._one_study(studies.c.study_instance_uid == study_instance_uid)

    def _one_study(self, condition: ColumnElement[bool]) -> StudyRecord | None:
        with self._read() as connection:
            rows = connection.execute(select(studies).where(condition)).all()
            return next(iter(self._study_records(connection, rows)), None)

    @without_database_errors
    def totals(self, cohort: int) -> Totals:
        """The cohort in figures."""
        its_studies = select(row_studies.c.study).where(row_studies.c.cohort == cohort)
        with self._read() as connection:
            by_state = connection.execute(
                select(
                    studies.c.state,
                    func.count(),
                    *(func.coalesce(func.sum(column), 0) for column in _ARCHIVED_COLUMNS),
                )
                .where(studies.c.reference.in_(its_studies))
                .group_by(studies.c.state)
            ).all()
            by_instance = connection.execute(
                select(
                    instance_rows.c.state,
                    func.count(),
                    func.coalesce(func.sum(instance_rows.c.size_bytes), 0),
                )
                # Of archived studies no listed instance is a row any more.
                .where(instance_rows.c.study.in_(its_studies), IS_LISTED)
                .group_by(instance_rows.c.state)
            ).all()
        counts: Counter[StudyState] = Counter()
        figures = _Figures()
        for state, count, archived, withheld, size_bytes in by_state:
            counts[StudyState(state)] = count
            figures.expected += int(archived) + int(withheld)
            figures.stored += int(archived)
            figures.withheld += int(withheld)
            figures.size_bytes += int(size_bytes)
        for state, count, size_bytes in by_instance:
            _add(figures, state, count, int(size_bytes))
        return Totals(
            rows=Counter(verdict.verdict for verdict in self.verdicts(cohort)),
            studies=counts,
            expected=figures.expected,
            received=figures.received,
            stored=figures.stored,
            rejected=figures.withheld,
            size_bytes=figures.size_bytes,
        )

    def manifests(self, cohort: int | None) -> Iterator[tuple[StudyReference, bytes]]:
        """The manifests of the cohort's archived studies (None: all), by reference, in pages."""
        reference = 0
        while page := self._manifest_page(cohort, reference):
            yield from page
            reference = page[-1][0]

    @without_database_errors
    def manifest(self, reference: StudyReference) -> bytes | None:
        """The manifest of an archived study."""
        with self._read() as connection:
            body = connection.execute(
                select(manifests.c.body).where(manifests.c.study == reference)
            ).scalar()
        return None if body is None else zlib.decompress(body)

    @without_database_errors
    def _manifest_page(
        self, cohort: int | None, after: StudyReference
    ) -> list[tuple[StudyReference, bytes]]:
        query = select(manifests.c.study, manifests.c.body).where(manifests.c.study > after)
        if cohort is not None:
            query = query.where(
                select(row_studies.c.study)
                .where(row_studies.c.cohort == cohort, row_studies.c.study == manifests.c.study)
                .exists()
            )
        with self._read() as connection:
            rows = connection.execute(query.order_by(manifests.c.study).limit(_MANIFEST_PAGE)).all()
        return [(row.study, zlib.decompress(row.body)) for row in rows]


_ARCHIVED_COLUMNS = (
    studies.c.archived_instances,
    studies.c.withheld_instances,
    studies.c.archived_bytes,
)


def _standing(connection: Connection, read: Select[Any], claims: Iterable[Claim]) -> list[Claim]:
    """The claims whose run and attempt are those of their studies, by reference."""
    ordered = sorted(claims, key=lambda claim: claim.reference)
    tokens: dict[StudyReference, tuple[int | None, int]] = {}
    for piece in _slices(claim.reference for claim in ordered):
        for row in connection.execute(read, {"b_studies": piece}):
            tokens[row.reference] = (row.run, row.attempt)
    return [c for c in ordered if tokens.get(c.reference) == (c.run, c.attempt)]


def _ends_a_row(reason: str | None) -> bool:
    """Whether discovery is over for a row that ended with this reason (None: it found studies).

    Of the reasons a person has to act on, one concerns the row itself and not the PACS.
    """
    return (
        reason is None
        or reason == "several-patients"
        or reason_for(reason).disposition is Disposition.PERMANENT
    )


def _values_of_row(cohort: int, row: CohortRow) -> dict[str, Any]:
    return {
        "cohort": cohort,
        "line": row.line,
        "patient_id": row.patient_id,
        "accession_number": row.accession_number,
        "study_instance_uid": row.study_instance_uid,
        "study_date": row.study_date,
        "modality": row.modality,
        "study_description": row.study_description,
    }


def _verdict(line: int, reason: str | None, outcomes: list[StudyOutcome]) -> RowVerdict:
    verdict, code = row_verdict(reason, outcomes)
    return RowVerdict(
        line=line,
        verdict=verdict,
        reason=code,
        studies=tuple(outcome.reference for outcome in outcomes),
        expected_instances=sum(outcome.expected_instances for outcome in outcomes),
        archived_instances=sum(outcome.stored_instances for outcome in outcomes),
        withheld_instances=sum(outcome.withheld_instances for outcome in outcomes),
        size_bytes=sum(outcome.size_bytes for outcome in outcomes),
    )


def _change_list(
    connection: Connection,
    reference: StudyReference,
    before: Mapping[InstanceKey, Row[Any]],
    listed: Container[InstanceKey],
    fresh: bool,
) -> tuple[int, int]:
    """Bring what is known to what is listed; how many returned to the list, how many left it."""
    returned, retried, forgotten, withdrawn = [], [], [], []
    for key, row in before.items():
        if key in listed:
            if row.reason == NO_LONGER_LISTED:
                returned.append(key)
            elif fresh and row.state == InstanceState.REJECTED:
                retried.append(key)
        elif row.state == InstanceState.EXPECTED:
            forgotten.append(key)
        elif row.reason != NO_LONGER_LISTED:
            withdrawn.append(key)
    _change(connection, statements.EXPECT_AGAIN, reference, returned + retried)
    _change(connection, statements.FORGET, reference, forgotten)
    _change(connection, statements.WITHDRAW, reference, withdrawn)
    return len(returned), len(forgotten) + len(withdrawn)


def _change(
    connection: Connection,
    statement: Any,
    reference: StudyReference,
    keys: Sequence[InstanceKey],
    values: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Run a statement for each of the keys, in one batch."""
    if not keys:
        return
    parameters = [
        {
            "b_study": reference,
            "b_series": key.series_instance_uid,
            "b_instance": key.sop_instance_uid,
        }
        for key in keys
    ]
    for parameter, more in zip(parameters, values or (), strict=bool(values)):
        parameter.update(more)
    connection.execute(statement, parameters)


def _add(figures: _Figures, state: str, count: int, size_bytes: int) -> None:
    figures.expected += count
    if state == InstanceState.RECEIVED:
        figures.received += count
    elif state == InstanceState.STORED:
        figures.stored += count
        figures.size_bytes += size_bytes
    elif state == InstanceState.REJECTED:
        figures.withheld += count


def _count(
    connection: Connection, references: Iterable[StudyReference]
) -> dict[StudyReference, _Figures]:
    """Count the listed instances of each study by their rows."""
    figures: dict[StudyReference, _Figures] = {}
    for piece in _slices(references):
        figures.update((reference, _Figures()) for reference in piece)
        for reference, state, count, size_bytes in connection.execute(
            statements.COUNTS, {"b_studies": piece}
        ):
            _add(figures[reference], state, count, int(size_bytes))
    return figures


def _figures(connection: Connection, rows: Sequence[Row[Any]]) -> dict[StudyReference, _Figures]:
    """The figures of studies: those written down of archived ones, counted of the others."""
    figures: dict[StudyReference, _Figures] = {}
    unfinished: dict[StudyReference, None] = {}
    for row in rows:
        if row.state == StudyState.ARCHIVED:
            figures[row.reference] = _Figures(
                expected=row.archived_instances + row.withheld_instances,
                stored=row.archived_instances,
                withheld=row.withheld_instances,
                size_bytes=row.archived_bytes,
            )
        else:
            unfinished[row.reference] = None
    figures.update(_count(connection, unfinished))
    return figures
