"""The tables, their constraints, and the migrations of released versions.

The constraints ensure that a failed study has a reason, an archived one was listed, a finished one
has no claim, and an instance in the spool has its SHA-256. A claim is two columns of its study
(``run``, ``attempt``), so that no study can have two claims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from enum import StrEnum

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    func,
    insert,
    inspect,
    or_,
    select,
    text,
)

from prefect_dicom.core.deliveries import (
    DeliveredState,
    DeliveryEvidence,
    DeliveryMethod,
    DeliveryState,
)
from prefect_dicom.core.errors import LedgerError
from prefect_dicom.core.model import Evidence, InstanceState, StudyState
from prefect_dicom.ledger.column_types import DicomDate, DicomDateRange, Json, PeerText, UtcTime

# SQLite generates numbers only in a column that is spelled INTEGER.
_Number = BigInteger().with_variant(Integer(), "sqlite")


def _one_of(column: str, words: Iterable[StrEnum]) -> str:
    return f"{column} IN ({', '.join(repr(str(word)) for word in words)})"


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

runs = Table(
    "runs",
    metadata,
    Column("number", _Number, primary_key=True),
    # Number of the lock that is held while the run is alive. Random: in a ledger that was restored
    # from a backup, the run's own number could come again while its first run is alive.
    Column("lock", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("started_at", UtcTime, nullable=False),
    Column("ended_at", UtcTime),
    # The cohort it works on, where there is one.
    Column("cohort", _Number),
    # Its requested state is cancelled.
    Column("cancelled", Boolean, nullable=False, server_default=text("FALSE")),
    # Since when it is paused, because its cohort is.
    Column("paused_at", UtcTime),
    # What it waits for, or is slowed down by, in words for people.
    Column("waits", Text),
    # Reason code, where it ended early.
    Column("reason", Text),
    UniqueConstraint("lock"),
    sqlite_autoincrement=True,
)

cohorts = Table(
    "cohorts",
    metadata,
    Column("number", _Number, primary_key=True),
    Column("name", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("node", Text, nullable=False),
    Column("rows", BigInteger, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    # The series it selects, in words; empty for whole studies.
    Column("selection", Text, nullable=False, server_default=""),
    # The requested state of its runs is paused.
    Column("paused", Boolean, nullable=False, server_default=text("FALSE")),
    # Runs of cohorts with higher numbers get the slots of a node first.
    Column("priority", Integer, nullable=False, server_default="0"),
    # That all rows are excluded is no fault.
    Column("may_be_empty", Boolean, nullable=False, server_default=text("FALSE")),
    UniqueConstraint("name"),
    UniqueConstraint("digest", "node"),
    sqlite_autoincrement=True,
)

selections = Table(
    "selections",
    metadata,
    Column("cohort", _Number, ForeignKey(cohorts.c.number), primary_key=True),
    Column("body", Json, nullable=False),
)

cohort_rows = Table(
    "cohort_rows",
    metadata,
    Column("cohort", _Number, ForeignKey(cohorts.c.number), primary_key=True),
    Column("line", BigInteger, primary_key=True),
    Column("patient_id", PeerText),
    Column("accession_number", PeerText),
    Column("study_instance_uid", PeerText),
    Column("study_date", DicomDateRange),
    Column("modality", PeerText),
    Column("study_description", PeerText),
    Column("patient_name", PeerText),
    Column("patient_birth_date", DicomDate),
    Column("issuer_of_patient_id", PeerText),
    Column("other_patient_id", PeerText),
    # The run that discovers it, until its discovery has ended.
    Column("run", _Number),
    # Discovery has ended: the row has found studies, or never will.
    Column("discovered", Boolean, nullable=False, server_default=text("FALSE")),
    Column("reason", Text),
    Column("near_misses", Json),
    Column("gaps", Json),
    # What is wrong with its line, in words; such a row is never discovered.
    Column("faults", Json),
    sqlite_with_rowid=False,
)
row_queries = Table(
    "row_queries",
    metadata,
    Column("cohort", _Number, ForeignKey(cohorts.c.number), primary_key=True),
    Column("line", BigInteger, primary_key=True),
    # What was asked for the row and what came, for people; bounded.
    Column("queries", Json, nullable=False),
    sqlite_with_rowid=False,
)
Index(
    "ix_cohort_rows_to_discover",
    cohort_rows.c.cohort,
    cohort_rows.c.line,
    sqlite_where=~cohort_rows.c.discovered,
    postgresql_where=~cohort_rows.c.discovered,
)

studies = Table(
    "studies",
    metadata,
    Column("reference", _Number, primary_key=True),
    Column("study_instance_uid", PeerText, nullable=False),
    Column("node", Text, nullable=False),
    Column("patient_id", PeerText, nullable=False),
    Column("accession_number", PeerText, nullable=False),
    Column("study_date", PeerText, nullable=False),
    Column("modalities", Json, nullable=False),
    Column("study_description", PeerText, nullable=False),
    Column("number_of_series", BigInteger),
    Column("number_of_instances", BigInteger),
    Column("state", Text, nullable=False, server_default=StudyState.PENDING),
    Column("reason", Text),
    Column("detail", PeerText, nullable=False, server_default=""),
    # The PatientID that its instances name, where they name the same other one than the PACS lists.
    Column("patient_id_of_instances", PeerText),
    Column("run", _Number, ForeignKey(runs.c.number)),
    Column("attempt", BigInteger, nullable=False, server_default="0"),
    Column("evidence", Text),
    # Instances that the PACS counts, where it lists none.
    Column("counted_instances", BigInteger),
    Column("listed_at", UtcTime),
    Column("archived_at", UtcTime),
    # Counts of an archived study, whose instances are in its manifest and no longer rows here.
    Column("archived_instances", BigInteger),
    Column("withheld_instances", BigInteger),
    # Those that never came, as a person has accepted.
    Column("missing_instances", BigInteger),
    Column("archived_bytes", BigInteger),
    # The series it was listed with, in words; empty for all. NULL while nothing is listed.
    Column("selection", PeerText),
    # Time of the last claim, and of the last failure.
    Column("claimed_at", UtcTime),
    Column("failed_at", UtcTime),
    # The node whose list the instances are. NULL where no list has to be retrieved.
    Column("listed_by", Text),
    UniqueConstraint("study_instance_uid"),
    CheckConstraint(_one_of("state", StudyState), "state"),
    CheckConstraint(_one_of("evidence", Evidence), "evidence"),
    CheckConstraint("(state = 'failed') = (reason IS NOT NULL)", "failed_with_a_reason"),
    CheckConstraint("run IS NULL OR state IN ('pending', 'listed')", "claimed_while_unfinished"),
    CheckConstraint(
        "state NOT IN ('listed', 'archived') OR (evidence IS NOT NULL AND listed_at IS NOT NULL)",
        "listed_with_evidence",
    ),
    CheckConstraint(
        "(state = 'archived') = (archived_at IS NOT NULL AND archived_instances IS NOT NULL"
        " AND withheld_instances IS NOT NULL AND missing_instances IS NOT NULL"
        " AND archived_bytes IS NOT NULL)",
        "archived_with_figures",
    ),
    sqlite_autoincrement=True,
)
Index(
    "ix_studies_claims",
    studies.c.run,
    sqlite_where=studies.c.run.is_not(None),
    postgresql_where=studies.c.run.is_not(None),
)

IS_UNFINISHED = text(f"studies.state IN ('{StudyState.PENDING}', '{StudyState.LISTED}')")
"""Condition on ``studies``, without parameters: else a database does not use a partial index."""
Index(
    "ix_studies_unfinished",
    studies.c.reference,
    sqlite_where=text(IS_UNFINISHED.text.removeprefix("studies.")),
    postgresql_where=text(IS_UNFINISHED.text.removeprefix("studies.")),
)

row_studies = Table(
    "row_studies",
    metadata,
    Column("cohort", _Number, primary_key=True),
    Column("line", BigInteger, primary_key=True),
    Column("study", _Number, ForeignKey(studies.c.reference), primary_key=True),
    # Reason code, where the cohort does not take a study that the row has found.
    Column("reason", Text),
    ForeignKeyConstraint(["cohort", "line"], [cohort_rows.c.cohort, cohort_rows.c.line]),
    Index("ix_row_studies_cohort_study", "cohort", "study"),
    sqlite_with_rowid=False,
)

# For cohorts with several nodes: the nodes that a study was found on or looked for.
study_locations = Table(
    "study_locations",
    metadata,
    Column("study", _Number, ForeignKey(studies.c.reference), primary_key=True),
    Column("node", Text, primary_key=True),
    # The node's answer; NULL where the study was not found there.
    Column("patient_id", PeerText),
    Column("number_of_series", BigInteger),
    Column("number_of_instances", BigInteger),
    # Reason code of the failure there; NULL where the study may be retrieved from there.
    Column("reason", Text),
    sqlite_with_rowid=False,
)

instances = Table(
    "instances",
    metadata,
    Column("study", _Number, ForeignKey(studies.c.reference), primary_key=True),
    Column("series_instance_uid", PeerText, primary_key=True),
    Column("sop_instance_uid", PeerText, primary_key=True),
    Column("sop_class_uid", PeerText, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text),
    Column("sha256", Text),
    Column("size_bytes", BigInteger),
    Column("transfer_syntax_uid", PeerText),
    Column("spool_name", Text),
    Column("object_key", Text),
    Column("version_id", Text),
    Column("warnings", Json),
    Column("rejections", BigInteger, nullable=False, server_default="0"),
    # The node that has sent it.
    Column("node", Text),
    CheckConstraint(_one_of("state", InstanceState), "state"),
    CheckConstraint("(state = 'rejected') = (reason IS NOT NULL)", "rejected_with_a_reason"),
    CheckConstraint(
        "state NOT IN ('received', 'stored') OR (sha256 IS NOT NULL AND size_bytes IS NOT NULL"
        " AND transfer_syntax_uid IS NOT NULL)",
        "received_with_its_digest",
    ),
    CheckConstraint("state <> 'received' OR spool_name IS NOT NULL", "received_in_the_spool"),
    CheckConstraint("state <> 'stored' OR object_key IS NOT NULL", "stored_under_a_key"),
    sqlite_with_rowid=False,
)

manifests = Table(
    "manifests",
    metadata,
    Column("study", _Number, ForeignKey(studies.c.reference), primary_key=True),
    Column("body", LargeBinary, nullable=False),
)

NO_LONGER_LISTED = "no-longer-listed"
IS_LISTED = or_(instances.c.reason.is_(None), instances.c.reason != NO_LONGER_LISTED)
"""Condition on ``instances``: the PACS still lists it."""

cohort_notes = Table(
    "cohort_notes",
    metadata,
    Column("number", _Number, primary_key=True),
    Column("cohort", _Number, ForeignKey(cohorts.c.number), nullable=False),
    Column("node", Text, nullable=False),
    Column("words", Text, nullable=False),
    Column("noted_at", UtcTime, nullable=False),
    UniqueConstraint("cohort", "node", "words"),
    sqlite_autoincrement=True,
)

samples = Table(
    "samples",
    metadata,
    Column("cohort", _Number, ForeignKey(cohorts.c.number), primary_key=True),
    Column("at", UtcTime, primary_key=True),
    # The run that took the sample; NULL where none was under way.
    Column("run", _Number, ForeignKey(runs.c.number)),
    Column("unasked", BigInteger, nullable=False),
    *(Column(str(state), BigInteger, nullable=False) for state in StudyState),
    Column("expected", BigInteger, nullable=False),
    Column("received", BigInteger, nullable=False),
    Column("stored", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    # Whether the node's access schedule was open; NULL where it has none.
    Column("schedule_open", Boolean),
    sqlite_with_rowid=False,
)

slots = Table(
    "slots",
    metadata,
    Column("number", _Number, primary_key=True),
    Column("node", Text, nullable=False),
    Column("run", _Number, ForeignKey(runs.c.number), nullable=False),
    # The right to have an association open; without it, a place in the queue.
    Column("taken", Boolean, nullable=False),
    # A rate-limited request is under way over it.
    Column("busy", Boolean, nullable=False),
    Index("ix_slots_node", "node"),
    sqlite_autoincrement=True,
)

leaky_buckets = Table(
    "leaky_buckets",
    metadata,
    Column("node", Text, primary_key=True),
    # Seconds since 1970 by the clock that all runs share, and the levels at that time.
    Column("at", Double, nullable=False),
    *(
        Column(bucket, Double, nullable=False, server_default="0")
        for bucket in ("retrieves", "instances", "size_bytes", "busy_seconds")
    ),
    sqlite_with_rowid=False,
)

# What people have decided: that a study is taken though its instances name another PatientID, or
# though some of them never come.
acceptances = Table(
    "acceptances",
    metadata,
    Column("number", _Number, primary_key=True),
    Column("cohort", _Number, ForeignKey(cohorts.c.number), nullable=False),
    # NULL: every study of the cohort.
    Column("study", _Number, ForeignKey(studies.c.reference)),
    # Reason code of what is accepted.
    Column("reason", Text, nullable=False),
    # The PatientID that instances may name; NULL: any, if all name the same.
    Column("patient_id", PeerText),
    # The instances that may be missing, as pairs of SeriesInstanceUID and SOPInstanceUID.
    Column("missing", Json),
    # Who has decided, when, and what for.
    Column("accepted_by", PeerText, nullable=False),
    Column("accepted_at", UtcTime, nullable=False),
    Column("note", PeerText, nullable=False, server_default=""),
    # Who has taken the decision back, and when.
    Column("withdrawn_by", PeerText),
    Column("withdrawn_at", UtcTime),
    Index("ix_acceptances_cohort_study", "cohort", "study"),
    sqlite_autoincrement=True,
)

# Studies that are delivered to other nodes, one row for each target.
deliveries = Table(
    "deliveries",
    metadata,
    Column("study", _Number, ForeignKey(studies.c.reference), primary_key=True),
    Column("target", Text, primary_key=True),
    Column("method", Text, nullable=False),
    Column("state", Text, nullable=False, server_default=DeliveryState.DUE),
    # The strongest that was found so far.
    Column("evidence", Text),
    Column("reason", Text),
    Column("detail", PeerText, nullable=False, server_default=""),
    Column("run", _Number, ForeignKey(runs.c.number)),
    Column("attempt", BigInteger, nullable=False, server_default="0"),
    # Of the whole study, and of what the target accepted.
    Column("instances", BigInteger, nullable=False, server_default="0"),
    Column("sent_instances", BigInteger, nullable=False, server_default="0"),
    Column("sent_bytes", BigInteger, nullable=False, server_default="0"),
    Column("sent_at", UtcTime),
    Column("verified_at", UtcTime),
    Column("failed_at", UtcTime),
    # What a verified delivery consists of, compressed; the last thing that is written of it.
    Column("manifest", LargeBinary),
    CheckConstraint(_one_of("method", DeliveryMethod), "method"),
    CheckConstraint(_one_of("state", DeliveryState), "state"),
    CheckConstraint(_one_of("evidence", DeliveryEvidence), "evidence"),
    CheckConstraint("(state = 'failed') = (reason IS NOT NULL)", "failed_with_a_reason"),
    CheckConstraint(
        "(state = 'verified') = (verified_at IS NOT NULL AND manifest IS NOT NULL)"
        " AND (state <> 'verified' OR evidence IS NOT NULL)",
        "verified_with_evidence",
    ),
    CheckConstraint("run IS NULL OR state IN ('due', 'sent')", "claimed_while_unfinished"),
    Index("ix_deliveries_target_state", "target", "state"),
    sqlite_with_rowid=False,
)

# The instances of unfinished deliveries that were sent.
delivered_instances = Table(
    "delivered_instances",
    metadata,
    Column("study", _Number, primary_key=True),
    Column("target", Text, primary_key=True),
    Column("series_instance_uid", PeerText, primary_key=True),
    Column("sop_instance_uid", PeerText, primary_key=True),
    Column("state", Text, nullable=False),
    Column("status", BigInteger),
    Column("reason", Text),
    ForeignKeyConstraint(["study", "target"], [deliveries.c.study, deliveries.c.target]),
    CheckConstraint(_one_of("state", DeliveredState), "state"),
    CheckConstraint("(state = 'failed') = (reason IS NOT NULL)", "failed_with_a_reason"),
    sqlite_with_rowid=False,
)

# Storage commitment that we have requested, PS3.4 J. Recorded before it is requested: the report
# may come before the response.
commitments = Table(
    "commitments",
    metadata,
    Column("number", _Number, primary_key=True),
    Column("transaction_uid", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("requested_at", UtcTime, nullable=False),
    # After that it is not waited for any more, and requested anew.
    Column("expires_at", UtcTime, nullable=False),
    Column("reported_at", UtcTime),
    UniqueConstraint("transaction_uid"),
    sqlite_autoincrement=True,
)

commitment_references = Table(
    "commitment_references",
    metadata,
    Column("commitment", _Number, ForeignKey(commitments.c.number), primary_key=True),
    Column("sop_instance_uid", PeerText, primary_key=True),
    Column("sop_class_uid", PeerText, nullable=False),
    Column("study", _Number, ForeignKey(studies.c.reference), nullable=False),
    # 0: committed; else the failure reason, PS3.3 C.14; NULL: not reported.
    Column("result", BigInteger),
    Index("ix_commitment_references_study", "study"),
    sqlite_with_rowid=False,
)

_versions_metadata = MetaData()
schema_versions = Table(
    "schema_versions",
    _versions_metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("applied_at", UtcTime, nullable=False),
)


FIRST_VERSION = 20
"""The oldest schema that can be migrated. Lower numbers are those of unreleased code."""

MIGRATIONS: tuple[Callable[[Connection], None], ...] = ()
"""What makes each version, from FIRST_VERSION + 1 on, out of the version before.

They run on ledgers that exist already; a new one is created with the tables above. So an entry
goes with the same change of the tables. Entries are added, never changed.
"""


def migrate(
    connection: Connection, migrations: tuple[Callable[[Connection], None], ...] = MIGRATIONS
) -> None:
    """Bring the ledger to the newest version, inside the caller's transaction.

    An empty database gets the current tables and the newest version, and no migration runs. A
    migration and the record that it ran are one transaction: there is no half of it. The
    caller sees to it that nobody else migrates meanwhile.

    Raises
    ------
    LedgerError
        ``ledger-too-new`` or ``ledger-too-old``, and nothing was changed.
    """
    newest = FIRST_VERSION + len(migrations)
    if not inspect(connection).has_table(schema_versions.name):
        schema_versions.create(connection, checkfirst=False)
        metadata.create_all(connection, checkfirst=False)
        _record_version(connection, newest)
        return
    current = connection.scalar(select(func.max(schema_versions.c.version))) or 0
    if current < FIRST_VERSION:
        raise LedgerError(
            "ledger-too-old", f"it has version {current}, this software begins with {FIRST_VERSION}"
        )
    if current > newest:
        raise LedgerError(
            "ledger-too-new", f"it has version {current}, this software knows {newest}"
        )
    for version in range(current + 1, newest + 1):
        migrations[version - FIRST_VERSION - 1](connection)
        _record_version(connection, version)


def _record_version(connection: Connection, version: int) -> None:
    connection.execute(
        insert(schema_versions).values(version=version, applied_at=datetime.now(UTC))
    )
