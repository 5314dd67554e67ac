"""The verbs of the ledger that change something. Each is one short transaction.

States change only as :data:`prefect_dicom.core.transitions.STUDY_TRANSITIONS` and
:data:`~prefect_dicom.core.transitions.INSTANCE_TRANSITIONS` say, and only here; what a lost
ledger takes over from the archive (``rebuild.py``) goes through them at one stroke. A verb that
writes about a study takes the study's claim and first makes sure that it still stands; where it
does not, nothing is written and :class:`~prefect_dicom.core.errors.ClaimLost` is raised.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import (
    Connection,
    Row,
    and_,
    bindparam,
    delete,
    insert,
    or_,
    select,
    tuple_,
    update,
)

from prefect_dicom.cohort.filters import beyond_the_maximum, encode_selection, series_text
from prefect_dicom.core.errors import LedgerError
from prefect_dicom.core.failpoints import reached
from prefect_dicom.core.model import (
    WHOLE,
    ArchivedInstance,
    CohortRow,
    Disposition,
    Evidence,
    Instance,
    InstanceKey,
    InstanceState,
    NodeOrder,
    PerPatient,
    ReceivedInstance,
    Selection,
    Study,
    StudyReference,
    StudyState,
)
from prefect_dicom.core.node_choice import helps_elsewhere, node_to_ask, reason_of_all
from prefect_dicom.core.reasons import BEYOND_THE_MAXIMUM, REASONS, STUDY_GONE, reason_for
from prefect_dicom.ledger import statements
from prefect_dicom.ledger.claims import utc_now
from prefect_dicom.ledger.errors import without_database_errors
from prefect_dicom.ledger.progress import History
from prefect_dicom.ledger.rate_limits import Sharing
from prefect_dicom.ledger.reading import (
    STUDY_COLUMNS,
    cohort_of,
    count_instances,
    listable_with,
    selection_of,
    slices,
    study_of,
)
from prefect_dicom.ledger.rebuild import adopt_studies
from prefect_dicom.ledger.records import (
    Adopted,
    Claim,
    Cohort,
    Copy,
    FoundStudy,
    ListChange,
    Reopened,
    RowFindings,
)
from prefect_dicom.ledger.run_control import Wishing
from prefect_dicom.ledger.schema import (
    IS_LISTED,
    NO_LONGER_LISTED,
    cohort_notes,
    cohort_rows,
    cohorts,
    copies,
    manifests,
    row_studies,
    selections,
    studies,
)
from prefect_dicom.ledger.schema import instances as instance_rows
from prefect_dicom.ledger.study_locations import keep_failed, keep_found, read_copies

# Rows sent at a time by what writes.
_BATCH = 5000


class Ledger(Wishing, History, Sharing):
    """The state of every cohort row, study and instance, in SQLite or PostgreSQL.

    One object may be used by all threads of a process; it must not cross a fork. Every method
    raises :class:`~prefect_dicom.core.errors.LedgerError` (``ledger-unavailable``) where the
    database fails, without any text of its statements.

    Examples
    --------
    >>> with Ledger.open("sqlite:////var/lib/site/ledger.db") as ledger:  # doctest: +SKIP
    ...     with ledger.run("pull") as run:
    ...         claims = ledger.claim(run, [1, 2, 3])
    """

    # ------------------------------------------------------------------ cohorts and discovery

    @without_database_errors
    def add_cohort(
        self,
        digest: str,
        node: str,
        rows: Iterable[CohortRow],
        name: str | None = None,
        selection: Selection = WHOLE,
    ) -> Cohort:
        """Add a cohort with its rows, all or nothing; one that is there already is returned.

        Parameters
        ----------
        digest : str
            Of the cohort file's content. With the nodes it is the cohort's identity.
        node : str
            Name of the PACS node that will be asked, or the text of a
            :class:`~prefect_dicom.core.model.NodeOrder`.
        rows : iterable of CohortRow
            Not touched where the cohort is there already.
        name : str, optional
            Its name for people; the first 12 characters of the digest where none is given, with
            the node's name behind them where another node has that one.
        selection : Selection
            What it wants of what its rows find.

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
                    .values(
                        name=attempted,
                        digest=digest,
                        node=node,
                        rows=0,
                        created_at=utc_now(),
                        selection=series_text(selection),
                    )
                    .on_conflict_do_nothing()
                    .returning(cohorts.c.number)
                ).scalar()
                if added is not None:
                    break
                known = connection.execute(
                    select(cohorts).where(cohorts.c.digest == digest, cohorts.c.node == node)
                ).first()
                if known is not None:
                    return cohort_of(known)
            else:
                raise LedgerError("cohort-name-taken")
            if selection != WHOLE:
                body = encode_selection(selection)
                connection.execute(insert(selections), {"cohort": added, "body": body})
            count = 0
            for piece in slices(rows, _BATCH):
                connection.execute(
                    insert(cohort_rows), [_values_of_row(added, row) for row in piece]
                )
                count += len(piece)
            connection.execute(update(cohorts).where(cohorts.c.number == added).values(rows=count))
            row = connection.execute(select(cohorts).where(cohorts.c.number == added)).one()
            return cohort_of(row)

    @without_database_errors
    def note(self, cohort: int, node: str, words: str) -> None:
        """Keep with a cohort what a run has found out about a node; the same again is once.

        Parameters
        ----------
        words : str
            For people, without any identifier.
        """
        with self._write() as connection:
            connection.execute(
                self._insert(cohort_notes)
                .values(cohort=cohort, node=node, words=words, noted_at=utc_now())
                .on_conflict_do_nothing()
            )

    @without_database_errors
    def record_discoveries(self, cohort: int, found: Iterable[RowFindings | tuple]) -> None:
        """Record what became of rows at discovery, and the studies they found.

        A study is one row of the ledger however many cohort rows and cohorts find it. Its node
        and attributes are refreshed unless it is archived or claimed; its state stays.

        Parameters
        ----------
        found : iterable of RowFindings
            Or of their fields. ``several-patients`` and reasons that are permanent end the row;
            others leave it to be discovered again. The near misses are kept for
            :meth:`near_misses`.
        """
        entries = sorted((RowFindings(*entry) for entry in found), key=lambda entry: entry.line)
        for entry in entries:
            if entry.reason is not None:
                reason_for(entry.reason)
        by_line = {entry.line: entry for entry in entries}
        if not by_line:
            return
        with self._write() as connection:
            text = connection.execute(
                select(cohorts.c.node).where(cohorts.c.number == cohort)
            ).scalar()
            if text is None:
                return Reopened(0, 0)
            order = NodeOrder.of(text).names
            found = _found_at(by_line.values(), order)
            references = self._upsert_studies(connection, order, found)
            if len(order) > 1:
                by_node = [
                    (references[uid], node, study)
                    for uid, at in found.items()
                    for node, study in at.items()
                ]
                keep_found(connection, self._insert, by_node)
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
                    gaps=bindparam("gaps"),
                    run=None,
                ),
                [
                    {
                        "b_line": entry.line,
                        "discovered": _ends_a_row(entry.reason),
                        "reason": entry.reason,
                        "near_misses": [asdict(study) for study in entry.near_misses] or None,
                        "gaps": list(entry.gaps) or None,
                    }
                    for entry in by_line.values()
                ],
            )
            # What could not be asked again has not lost what it found before.
            asked = [e.line for e in by_line.values() if e.studies or _ends_a_row(e.reason)]
            for piece in slices(asked):
                connection.execute(
                    delete(row_studies).where(
                        row_studies.c.cohort == cohort, row_studies.c.line.in_(piece)
                    )
                )
            links = sorted(
                {
                    (line, references[study.study_instance_uid])
                    for line, entry in by_line.items()
                    for study in entry.studies
                }
            )
            if links:
                connection.execute(
                    insert(row_studies),
                    [{"cohort": cohort, "line": line, "study": study} for line, study in links],
                )

    @without_database_errors
    def limit_per_patient(self, cohort: int, per_patient: PerPatient) -> int:
        """Take of each patient no more studies than a cohort wants, of all its rows have found.

        Decided anew each time, by what is known of the studies and not by how far they are:
        whatever the order in which rows were asked, the same studies are taken in the end.

        Returns
        -------
        int
            How many are not taken.
        """
        its_studies = select(row_studies.c.study).where(row_studies.c.cohort == cohort)
        with self._write() as connection:
            found = connection.execute(
                select(studies.c.reference, *STUDY_COLUMNS)
                .where(studies.c.reference.in_(its_studies))
                .order_by(studies.c.reference)
            )
            beyond = beyond_the_maximum(
                per_patient, ((row.reference, study_of(row)) for row in found)
            )
            its_links = row_studies.c.cohort == cohort
            connection.execute(update(row_studies).where(its_links).values(reason=None))
            for piece in slices(sorted(beyond)):
                connection.execute(
                    update(row_studies)
                    .where(its_links, row_studies.c.study.in_(piece))
                    .values(reason=BEYOND_THE_MAXIMUM)
                )
        return len(beyond)

    def _upsert_studies(
        self,
        connection: Connection,
        nodes: Sequence[str],
        answers: Mapping[str, Mapping[str, Study]],
    ) -> dict[str, StudyReference]:
        """Add or refresh studies, each as the node has it that is to be asked for it."""
        if not answers:
            return {}
        # In the order of references first (see claims.py), then the new ones by UID.
        for piece in slices(answers):
            self._lock_studies(connection, studies.c.study_instance_uid.in_(piece))
        statement = self._insert(studies)
        refreshed = [column.name for column in (studies.c.node, *STUDY_COLUMNS[1:])]
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=[studies.c.study_instance_uid],
                set_={name: statement.excluded[name] for name in refreshed},
                where=and_(studies.c.state != StudyState.ARCHIVED, studies.c.run.is_(None)),
            ),
            [
                {
                    "study_instance_uid": uid,
                    "node": (node := _best_of(nodes, at)),
                    "patient_id": (study := at[node]).patient_id,
                    "accession_number": study.accession_number,
                    "study_date": study.study_date,
                    "modalities": list(study.modalities),
                    "study_description": study.study_description,
                    "number_of_series": study.number_of_series,
                    "number_of_instances": study.number_of_instances,
                }
                for uid, at in sorted(answers.items())
            ],
        )
        references: dict[str, StudyReference] = {}
        for piece in slices(answers):
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

    # ------------------------------------------------------------------ instances

    @without_database_errors
    def record_list(
        self,
        claim: Claim,
        instances: Sequence[Instance],
        evidence: Evidence,
        *,
        fresh: bool = False,
        selection: str = "",
        counted: int | None = None,
    ) -> ListChange:
        """:meth:`record_lists` of one study."""
        lists = [(claim, instances, evidence)]
        return self.record_lists(lists, fresh=fresh, selection=selection, counted=counted)[0]

    @without_database_errors
    def record_lists(
        self,
        lists: Sequence[tuple[Claim, Sequence[Instance], Evidence]],
        *,
        fresh: bool = False,
        selection: str = "",
        counted: int | None = None,
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
        selection : str
            The series that are on the lists, in words; empty for all of the studies.
        counted : int, optional
            How many instances the PACS counts in a study of which it lists none.

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
            now = utc_now()
            connection.execute(
                statements.STUDY_LISTED,
                [
                    {
                        "b_study": reference,
                        "b_evidence": evidence,
                        "b_listed_at": now,
                        # Of an empty list nothing is wanted, by whatever selection.
                        "b_selection": None
                        if evidence is Evidence.INSTANCE_LIST and not listed
                        else selection,
                        "b_counted": counted,
                        "b_node": claim.node,
                    }
                    for reference, (claim, listed, evidence) in zip(references, lists, strict=True)
                ],
            )
            reached("list-half-written")
            known: dict[StudyReference, dict[InstanceKey, Row[Any]]] = defaultdict(dict)
            for piece in slices(references):
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
            for piece in slices(new, _BATCH):
                connection.execute(statements.EXPECT, piece)
        return changes

    @without_database_errors
    def extend_lists(self, lists: Sequence[tuple[Claim, Sequence[Instance]]]) -> None:
        """Expect further instances of studies whose PACS does not list them: what has arrived.

        One that is on the list already stays as it is; one that had left it is expected again.
        All or nothing.
        """
        with self._write() as connection:
            self._hold(connection, [claim for claim, _ in lists])
            for claim, instances in lists:
                keys = [instance.key for instance in instances]
                _change(connection, statements.RETURN, claim.reference, keys)
                connection.execute(
                    self._insert(instance_rows).on_conflict_do_nothing(),
                    [
                        {
                            "study": claim.reference,
                            "series_instance_uid": instance.key.series_instance_uid,
                            "sop_instance_uid": instance.key.sop_instance_uid,
                            "sop_class_uid": instance.sop_class_uid,
                            "state": InstanceState.EXPECTED,
                        }
                        for instance in instances
                    ],
                )

    @without_database_errors
    def record_received(
        self, claims: Mapping[StudyReference, Claim], arrivals: Sequence[ReceivedInstance]
    ) -> list[ReceivedInstance]:
        """Record objects that lie in the spool. Of expected instances they are then received.

        One that is received, stored or rejected already stays as it is. All or nothing: with a
        ClaimLost nothing is recorded, and the call can be repeated with what :meth:`held` says.

        Parameters
        ----------
        claims : mapping of study reference to Claim
            Those of the studies that the arrivals are for are made sure of.

        Returns
        -------
        list of ReceivedInstance
            Those that are not on the list of their study, or for a study that is not claimed.
        """
        concerned = {a.study: claims[a.study] for a in arrivals if a.study in claims}
        # A PACS may send one instance twice; the first arrival is the one that counts.
        first: dict[tuple[StudyReference, str, str], ReceivedInstance] = {}
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
                        "b_node": concerned[study].node,
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
        for piece in slices(identities):
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
    def record_confirmed(self, claim: Claim, keys: Sequence[InstanceKey]) -> None:
        """What another node had sent has come from the claim's node too, byte for byte."""
        with self._write() as connection:
            self._hold(connection, [claim])
            node = [{"b_node": claim.node}] * len(keys)
            _change(connection, statements.CONFIRMED, claim.reference, keys, node)

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
        stored: Sequence[tuple[InstanceKey, ArchivedInstance, tuple[str, ...]]],
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

    # ------------------------------------------------------------------ ends of studies

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
        evidence: Evidence | None = None,
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
        evidence : Evidence, optional
            What the manifest says its completeness was judged by, where that is not what the
            study was listed with.

        Raises
        ------
        LedgerError
            ``instances-missing`` where the ledger does not know exactly as many as stored and
            as rejected; nothing is written then.
        """
        reference = claim.reference
        with self._write() as connection:
            self._hold(connection, [claim])
            figures = count_instances(connection, [reference])[reference]
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
                    "b_archived_at": utc_now(),
                    "b_instances": instances,
                    "b_withheld": withheld,
                    "b_size_bytes": size_bytes,
                    "b_evidence": evidence,
                },
            ).rowcount
            if not changed:
                raise LedgerError("instances-missing", "the study has not been listed")
            connection.execute(
                insert(manifests), {"study": reference, "body": zlib.compress(manifest)}
            )
            connection.execute(statements.FORGET_ARCHIVED, {"b_study": reference})

    @without_database_errors
    def record_failed(
        self, claim: Claim, code: str, detail: str = "", nodes: Sequence[str] = ()
    ) -> bool:
        """The study has failed, and the claim is given up; its instances stay as they are.

        Where its cohort has several nodes and one of them is left that may have it, it has failed
        at the claim's node only, and is pending again.

        Parameters
        ----------
        code : str
            A code of :mod:`prefect_dicom.core.reasons`; it carries the disposition.
        detail : str
            What the peer said, perhaps; it stays in the ledger.
        nodes : sequence of str
            Those of the cohort, in its order.

        Returns
        -------
        bool
            Whether it has failed; False where it is pending.
        """
        reason_for(code)
        reference = claim.reference
        with self._write() as connection:
            self._hold(connection, [claim])
            values: dict[str, Any] = {
                "state": StudyState.FAILED,
                "reason": code,
                "detail": detail,
                "failed_at": utc_now(),
            }
            if len(nodes) > 1 and helps_elsewhere(code):
                keep_failed(connection, self._insert, reference, claim.node, code)
                its_copies = read_copies(connection, [reference])[reference]
                if node_to_ask(nodes, its_copies) is not None:
                    values = {"state": StudyState.PENDING}
                else:
                    values["reason"] = reason_of_all(nodes, its_copies)
                if code == STUDY_GONE:
                    # What it listed once nobody has to have any more.
                    connection.execute(
                        update(studies)
                        .where(studies.c.reference == reference, studies.c.listed_by == claim.node)
                        .values(listed_by=None, counted_instances=None)
                    )
            connection.execute(
                update(studies).where(studies.c.reference == reference).values(run=None, **values)
            )
        return values["state"] is StudyState.FAILED

    @without_database_errors
    def record_found(self, claim: Claim, study: Study) -> Claim:
        """The claim's node has the study too, of which that was not known; the claim with it."""
        with self._write() as connection:
            self._hold(connection, [claim])
            keep_found(connection, self._insert, [(claim.reference, claim.node, study)])
            told = {
                name: getattr(study, name)
                for name in ("patient_id", "number_of_series", "number_of_instances")
            }
            connection.execute(
                update(studies)
                .where(studies.c.reference == claim.reference)
                .values(node=claim.node, **told)
            )
        return replace(claim, study=replace(claim.study, **told), is_found=True)

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
        of_lines = [piece for piece in slices(sorted(lines))] or [None]
        count_studies = count_rows = 0
        with self._write() as connection:
            text = connection.execute(
                select(cohorts.c.node).where(cohorts.c.number == cohort)
            ).scalar()
            if text is None:
                return Reopened(0, 0)
            order = NodeOrder.of(text).names
            for piece in of_lines:
                linked = select(row_studies.c.study).where(
                    row_studies.c.cohort == cohort, row_studies.c.reason.is_(None)
                )
                if piece is not None:
                    linked = linked.where(row_studies.c.line.in_(piece))
                chosen = and_(
                    studies.c.reference.in_(linked),
                    studies.c.state == StudyState.FAILED,
                    studies.c.reason.in_(codes),
                    listable_with(selection_of(cohort)),
                )
                failed_at = and_(copies.c.study.in_(linked), copies.c.reason.in_(codes))
                if nodes:
                    failed_at = and_(failed_at, copies.c.node.in_(sorted(nodes)))
                    at_these = select(copies.c.study).where(failed_at)
                    chosen = and_(
                        chosen,
                        or_(studies.c.node.in_(sorted(nodes)), studies.c.reference.in_(at_these)),
                    )
                self._lock_studies(connection, chosen)
                count_studies += connection.execute(
                    update(studies)
                    .where(chosen)
                    .values(state=StudyState.PENDING, reason=None, detail="")
                ).rowcount
                if len(order) > 1:
                    # Also of studies that are pending, because another node is still to be asked.
                    connection.execute(update(copies).where(failed_at).values(reason=None))
                if nodes and not set(order) & set(nodes):
                    continue
                again = and_(cohort_rows.c.cohort == cohort, cohort_rows.c.reason.in_(codes))
                if piece is not None:
                    again = and_(again, cohort_rows.c.line.in_(piece))
                count_rows += connection.execute(
                    update(cohort_rows).where(again).values(discovered=False, reason=None)
                ).rowcount
        return Reopened(count_studies, count_rows)


def _found_at(entries: Iterable[RowFindings], nodes: Sequence[str]) -> dict[str, dict[str, Study]]:
    """What the entries have found: by StudyInstanceUID and node."""
    found: dict[str, dict[str, Study]] = {}
    for entry in entries:
        for number, study in enumerate(entry.studies):
            node = entry.nodes[number] if entry.nodes else nodes[0]
            found.setdefault(study.study_instance_uid, {})[node] = study
    return found


def _best_of(nodes: Sequence[str], at: Mapping[str, Study]) -> str:
    """The node whose answer a study is known by."""
    known = {n: Copy(n, number_of_instances=s.number_of_instances) for n, s in at.items()}
    return node_to_ask([node for node in nodes if node in at], known) or nodes[0]


def _ends_a_row(reason: str | None) -> bool:
    """Whether discovery is over for a row that ended with this reason (None: it found studies).

    Of the reasons a person has to act on, two concern the row itself and not the PACS.
    """
    return (
        reason is None
        or reason in ("several-patients", "filter-undecided")
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
        "patient_name": row.patient_name,
        "patient_birth_date": row.patient_birth_date,
    }


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
