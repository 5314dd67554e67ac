"""Instances of listed studies, from the PACS's instance list through the spool to the archive."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, select, tuple_

from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.model import (
    ArchivedInstance,
    Evidence,
    Instance,
    InstanceKey,
    InstanceState,
    ReceivedInstance,
    StudyReference,
)
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.ledger import statements
from prefect_dicom.ledger.database import Database, slices, utc_now
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.records import Claim, InstanceRecord, ListChange
from prefect_dicom.ledger.schema import IS_LISTED, NO_LONGER_LISTED
from prefect_dicom.ledger.schema import instances as instance_rows

# Rows sent at a time by what writes.
_BATCH_SIZE = 5000


class Instances:
    """The instances of studies that are not archived yet."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def of_study(self, reference: StudyReference) -> list[InstanceRecord]:
        """Return the instances of a study, by key; those of an archived one are in its manifest.

        Instances that are no longer listed are among them, rejected for that reason.
        """
        with self._database.read() as connection:
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
                node=row.node,
            )
            for row in rows
        ]

    @translate_database_errors
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
        """Record the list of one study; see :meth:`record_lists`."""
        lists = [(claim, instances, evidence)]
        return self.record_lists(lists, fresh=fresh, selection=selection, counted=counted)[0]

    @translate_database_errors
    def record_lists(
        self,
        lists: Sequence[tuple[Claim, Sequence[Instance], Evidence]],
        *,
        fresh: bool = False,
        selection: str = "",
        counted: int | None = None,
    ) -> list[ListChange]:
        """Record the PACS's instance lists as the expected instances of studies.

        The studies become listed. A new instance is expected. One that has left the list is
        deleted where it was only expected; a received or stored one is rejected as
        ``no-longer-listed``, and keeps the name of its object. All or nothing: with a ClaimLost
        nothing is recorded.

        Parameters
        ----------
        lists : sequence of (claim, instances, evidence)
        fresh : bool
            The first list of a rerun: listed instances that were rejected are expected again,
            and their rejections no longer count.
        selection : str
            The series that are on the lists, in words; empty for whole studies.
        counted : int, optional
            How many instances the PACS counts in a study of which it lists none.

        Returns
        -------
        list of ListChange
            The changes from the lists before, in the order of ``lists``.
        """
        if not lists:
            return []
        with self._database.write() as connection:
            self._database.require_claims(connection, [claim for claim, _, _ in lists])
            _list_studies(connection, lists, selection, counted)
            failpoint("list-half-written")
            known = _known_instances(connection, [claim.reference for claim, _, _ in lists])
            changes: list[ListChange] = []
            new: list[dict[str, Any]] = []
            for claim, instances, _ in lists:
                before = known[claim.reference]
                listed = {instance.key: instance for instance in instances}
                added = [key for key in listed if key not in before]
                new += [_expected(claim.reference, listed[key]) for key in added]
                returned, left = _change_list(connection, claim.reference, before, listed, fresh)
                changes.append(ListChange(len(added) + returned, left, len(listed)))
            for batch in slices(new, _BATCH_SIZE):
                connection.execute(statements.EXPECT, batch)
        return changes

    @translate_database_errors
    def extend_lists(self, lists: Sequence[tuple[Claim, Sequence[Instance]]]) -> None:
        """Expect received instances of studies whose PACS does not list instances.

        An instance on the list stays as it is; one that had left it is expected again. All or
        nothing.
        """
        with self._database.write() as connection:
            self._database.require_claims(connection, [claim for claim, _ in lists])
            for claim, instances in lists:
                keys = [instance.key for instance in instances]
                _change(connection, statements.RETURN, claim.reference, keys)
                connection.execute(
                    self._database.insert(instance_rows).on_conflict_do_nothing(),
                    [_expected(claim.reference, instance) for instance in instances],
                )

    @translate_database_errors
    def record_received(
        self, claims: Mapping[StudyReference, Claim], received: Sequence[ReceivedInstance]
    ) -> list[ReceivedInstance]:
        """Record instances in the spool: those that were expected are then received.

        An instance that is received, stored or rejected already stays as it is. All or nothing:
        with a ClaimLost nothing is recorded, and the call can be repeated with the claims that
        ``ledger.claims.still_held`` returns.

        Parameters
        ----------
        claims : mapping of study reference to Claim
            Those of the studies concerned have to stand.
        received : sequence of ReceivedInstance

        Returns
        -------
        list of ReceivedInstance
            Those that are not on the list of their study, or whose study is not claimed.
        """
        concerned = {one.study: claims[one.study] for one in received if one.study in claims}
        # A PACS may send one instance twice; the first one counts.
        first: dict[tuple[StudyReference, str, str], ReceivedInstance] = {}
        for one in received:
            if one.study in concerned:
                first.setdefault((one.study, *one.key), one)
        if not first:
            return list(received)
        with self._database.write() as connection:
            self._database.require_claims(connection, list(concerned.values()))
            recorded = connection.execute(
                statements.RECEIVED,
                [
                    {
                        "b_study": study,
                        "b_series": series_uid,
                        "b_instance": instance_uid,
                        "b_sop_class_uid": one.sop_class_uid,
                        "b_transfer_syntax_uid": one.transfer_syntax_uid,
                        "b_sha256": one.sha256,
                        "b_size_bytes": one.size_bytes,
                        "b_spool_name": one.name,
                        "b_node": concerned[study].node,
                    }
                    for (study, series_uid, instance_uid), one in first.items()
                ],
            ).rowcount
            # Nearly always all of them were expected, and no further query is needed.
            listed = set(first) if recorded == len(first) else self._listed(connection, first)
        return [one for one in received if (one.study, *one.key) not in listed]

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

    @translate_database_errors
    def record_lost(self, claim: Claim, keys: Iterable[InstanceKey]) -> None:
        """Expect received or stored instances again that the spool or the archive has lost.

        Each has one more rejection. Others stay as they are.
        """
        with self._database.write() as connection:
            self._database.require_claims(connection, [claim])
            _change(connection, statements.LOST, claim.reference, list(keys))

    @translate_database_errors
    def record_confirmed(self, claim: Claim, keys: Sequence[InstanceKey]) -> None:
        """Record that the claim's node has sent what another node had sent, byte for byte."""
        with self._database.write() as connection:
            self._database.require_claims(connection, [claim])
            node = [{"b_node": claim.node}] * len(keys)
            _change(connection, statements.CONFIRMED, claim.reference, keys, node)

    @translate_database_errors
    def record_rejected(self, claim: Claim, rejections: Sequence[tuple[InstanceKey, str]]) -> None:
        """Reject expected or received instances, each for the reason given with it."""
        for _, reason in rejections:
            reason_for(reason)
        with self._database.write() as connection:
            self._database.require_claims(connection, [claim])
            _change(
                connection,
                statements.REJECTED,
                claim.reference,
                [key for key, _ in rejections],
                [{"b_reason": reason} for _, reason in rejections],
            )

    @translate_database_errors
    def record_stored(
        self,
        claim: Claim,
        stored: Sequence[tuple[InstanceKey, ArchivedInstance, tuple[str, ...]]],
    ) -> None:
        """Record that received instances are in the archive, with the bytes that were received.

        An instance that is not received, or was received with another SHA-256 meanwhile, stays
        as it is.

        Parameters
        ----------
        stored : sequence of (InstanceKey, ArchivedInstance, warnings)
        """
        with self._database.write() as connection:
            self._database.require_claims(connection, [claim])
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


def _list_studies(
    connection: Connection,
    lists: Sequence[tuple[Claim, Sequence[Instance], Evidence]],
    selection: str,
    counted: int | None,
) -> None:
    """Make the claimed studies listed."""
    now = utc_now()
    changed = connection.execute(
        statements.STUDY_LISTED,
        [
            {
                "b_study": claim.reference,
                "b_evidence": evidence,
                "b_listed_at": now,
                # An empty list is the same with every selection.
                "b_selection": None
                if evidence is Evidence.INSTANCE_LIST and not listed
                else selection,
                "b_counted": counted,
                "b_node": claim.node,
            }
            for claim, listed, evidence in lists
        ],
    ).rowcount
    if changed != len(lists):
        raise RuntimeError("a claimed study is in a state that cannot become listed")


def _known_instances(
    connection: Connection, references: Sequence[StudyReference]
) -> dict[StudyReference, dict[InstanceKey, Row[Any]]]:
    """Return the instances of studies with their states and reasons, by study and key."""
    known: dict[StudyReference, dict[InstanceKey, Row[Any]]] = defaultdict(dict)
    for piece in slices(references):
        for row in connection.execute(statements.LISTS, {"b_studies": piece}):
            known[row.study][InstanceKey(row.series_instance_uid, row.sop_instance_uid)] = row
    return known


def _expected(reference: StudyReference, instance: Instance) -> dict[str, Any]:
    """Return the row of an instance that is expected."""
    return {
        "study": reference,
        "series_instance_uid": instance.key.series_instance_uid,
        "sop_instance_uid": instance.key.sop_instance_uid,
        "sop_class_uid": instance.sop_class_uid,
        "state": InstanceState.EXPECTED,
    }


def _change_list(
    connection: Connection,
    reference: StudyReference,
    before: Mapping[InstanceKey, Row[Any]],
    listed: Container[InstanceKey],
    fresh: bool,
) -> tuple[int, int]:
    """Change known instances to agree with the list; return how many came back and left."""
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
    """Execute a statement for each of the keys, in one batch."""
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
