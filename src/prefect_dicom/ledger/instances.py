"""Instances of listed studies: from the PACS's list through the spool into the archive."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    Connection,
    Row,
    select,
    tuple_,
)

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
from prefect_dicom.core.reasons import (
    reason_for,
)
from prefect_dicom.ledger import statements
from prefect_dicom.ledger.database import Database, slices, utc_now
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.records import (
    Claim,
    InstanceRecord,
    ListChange,
)
from prefect_dicom.ledger.schema import (
    IS_LISTED,
    NO_LONGER_LISTED,
)
from prefect_dicom.ledger.schema import instances as instance_rows

# Rows sent at a time by what writes.
_BATCH_SIZE = 5000


class Instances:
    """Instances of studies that are listed and not archived yet."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def of_study(self, reference: StudyReference) -> list[InstanceRecord]:
        """The instances of a study, by key; of an archived one the manifest has them instead.

        Those that are no longer listed are among them, rejected for that reason.
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
        """:meth:`record_lists` of one study."""
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
        with self._database.write() as connection:
            self._database.require_claims(connection, [claim for claim, _, _ in lists])
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
            failpoint("list-half-written")
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
            for piece in slices(new, _BATCH_SIZE):
                connection.execute(statements.EXPECT, piece)
        return changes

    @translate_database_errors
    def extend_lists(self, lists: Sequence[tuple[Claim, Sequence[Instance]]]) -> None:
        """Expect further instances of studies whose PACS does not list them: what has arrived.

        One that is on the list already stays as it is; one that had left it is expected again.
        All or nothing.
        """
        with self._database.write() as connection:
            self._database.require_claims(connection, [claim for claim, _ in lists])
            for claim, instances in lists:
                keys = [instance.key for instance in instances]
                _change(connection, statements.RETURN, claim.reference, keys)
                connection.execute(
                    self._database.insert(instance_rows).on_conflict_do_nothing(),
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

    @translate_database_errors
    def record_received(
        self, claims: Mapping[StudyReference, Claim], arrivals: Sequence[ReceivedInstance]
    ) -> list[ReceivedInstance]:
        """Record objects that lie in the spool. Of expected instances they are then received.

        One that is received, stored or rejected already stays as it is. All or nothing: with a
        ClaimLost nothing is recorded, and the call can be repeated with the claims that
        ``ledger.claims.still_held`` returns.

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
        with self._database.write() as connection:
            self._database.require_claims(connection, list(concerned.values()))
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

    @translate_database_errors
    def record_lost(self, claim: Claim, keys: Iterable[InstanceKey]) -> None:
        """Received or stored instances are expected again: the spool or the archive lost them.

        Each counts one more rejection. Others stay as they are.
        """
        with self._database.write() as connection:
            self._database.require_claims(connection, [claim])
            _change(connection, statements.LOST, claim.reference, list(keys))

    @translate_database_errors
    def record_confirmed(self, claim: Claim, keys: Sequence[InstanceKey]) -> None:
        """What another node had sent has come from the claim's node too, byte for byte."""
        with self._database.write() as connection:
            self._database.require_claims(connection, [claim])
            node = [{"b_node": claim.node}] * len(keys)
            _change(connection, statements.CONFIRMED, claim.reference, keys, node)

    @translate_database_errors
    def record_rejected(self, claim: Claim, rejections: Sequence[tuple[InstanceKey, str]]) -> None:
        """Leave expected or received instances out, each for the reason given with it."""
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
        """Received instances are in the archive, with the bytes that were received.

        One that is not received, or was received with another SHA-256 meanwhile, stays as it
        is.

        Parameters
        ----------
        stored : sequence of (key, what the archive answered, warnings)
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
