"""The tables, their constraints, and the migrations of released versions.

What a constraint can keep, a constraint keeps: a failed study has a reason, an archived one was
listed, a finished one has no claim, an instance in the spool has its SHA-256. A claim is two
columns of its study (``run``, ``attempt``), so that no study can have two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Connection,
    DateTime,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    func,
    insert,
    inspect,
    or_,
    select,
    text,
)

from prefect_dicom.core.errors import LedgerError
from prefect_dicom.core.model import DateRange, Evidence, InstanceState, StudyState

_UNSTORABLE = re.compile("[\x00\x1a\ud800-\udfff]")
_ESCAPED = re.compile("\x1a([0-9a-f]{4})")


class PeerText(TypeDecorator[str]):
    """Text of a peer, byte for byte the same when read again.

    PostgreSQL takes no NUL and neither database takes a lone surrogate (what is left of bytes
    in an undeclared character set). Both are escaped with SUBSTITUTE, which escapes itself.
    """

    impl = Text
    cache_ok = True

    # The processors themselves, not process_bind_param and its twin: these texts come by the
    # hundred thousand, and each layer of calls shows.
    def bind_processor(self, dialect: Any) -> Callable[[str | None], str | None]:
        unstorable = _UNSTORABLE.search

        def escape(value: str | None) -> str | None:
            if value is None or unstorable(value) is None:
                return value
            return _UNSTORABLE.sub(lambda match: f"\x1a{ord(match[0]):04x}", value)

        return escape

    def result_processor(self, dialect: Any, coltype: Any) -> Callable[[str | None], str | None]:
        def restore(value: str | None) -> str | None:
            if value is None or "\x1a" not in value:
                return value
            return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), value)

        return restore


class Json(TypeDecorator[Any]):
    """A list or dictionary as JSON in ASCII; None stays NULL."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Any) -> str | None:
        return None if value is None else json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Any) -> Any:
        return None if value is None else json.loads(value)


class DicomDateRange(TypeDecorator[DateRange]):
    """A range of dates as range matching writes it (PS3.4 C.2.2.2.5), with "-" for any date."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: DateRange | None, dialect: Any) -> str | None:
        if value is None:
            return None
        return "-".join(f"{day:%Y%m%d}" if day else "" for day in (value.first, value.last))

    def process_result_value(self, value: str | None, dialect: Any) -> DateRange | None:
        if value is None:
            return None
        first, last = (
            date(int(day[:-4]), int(day[-4:-2]), int(day[-2:])) if day else None
            for day in value.split("-")
        )
        return DateRange(first, last)


class DicomDate(TypeDecorator[date]):
    """A day as DICOM writes it, PS3.5 6.2."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: date | None, dialect: Any) -> str | None:
        return None if value is None else f"{value:%Y%m%d}"

    def process_result_value(self, value: str | None, dialect: Any) -> date | None:
        if value is None:
            return None
        return date(int(value[:-4]), int(value[-4:-2]), int(value[-2:]))


class UtcTime(TypeDecorator[datetime]):
    """A moment: aware UTC in Python, whatever the database makes of it."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Any) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# SQLite gives out numbers by itself only in a column that is spelled INTEGER.
_Number = BigInteger().with_variant(Integer(), "sqlite")


def _one_of(column: str, words: type[StudyState | InstanceState | Evidence]) -> str:
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
    # Names the lock that lives and dies with the run. Drawn at random: the number alone could
    # come again, in a ledger that was put back from an older copy, while its first run lives.
    Column("lock", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("started_at", UtcTime, nullable=False),
    Column("ended_at", UtcTime),
    # The cohort it works on, where it is about one.
    Column("cohort", _Number),
    # A person wants it to end.
    Column("cancelled", Boolean, nullable=False, server_default=text("FALSE")),
    # Since when it waits in place, because its cohort is paused.
    Column("paused_at", UtcTime),
    # What it waits for, or goes slowly for, in words for people.
    Column("waits", Text),
    # What kept it from its end.
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
    # The series it wants, in words; empty for whole studies.
    Column("selection", Text, nullable=False, server_default=""),
    # No run asks for anything until a person has resumed it.
    Column("paused", Boolean, nullable=False, server_default=text("FALSE")),
    # Where runs share a node, those of higher numbers come first.
    Column("priority", Integer, nullable=False, server_default="0"),
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
    # Who asks for it, while its discovery has not ended.
    Column("run", _Number),
    # Discovery has ended for this row: it found studies, or never will.
    Column("discovered", Boolean, nullable=False, server_default=text("FALSE")),
    Column("reason", Text),
    Column("near_misses", Json),
    Column("gaps", Json),
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
    Column("run", _Number, ForeignKey(runs.c.number)),
    Column("attempt", BigInteger, nullable=False, server_default="0"),
    Column("evidence", Text),
    # Where the PACS lists no instances: how many it counts.
    Column("counted_instances", BigInteger),
    Column("listed_at", UtcTime),
    Column("archived_at", UtcTime),
    # Of an archived study, whose instances are in its manifest and no longer rows here.
    Column("archived_instances", BigInteger),
    Column("withheld_instances", BigInteger),
    Column("archived_bytes", BigInteger),
    # The series it was listed with, in words; empty for all. NULL while nothing is listed.
    Column("selection", PeerText),
    # When the last run began to work on it, and when it failed last.
    Column("claimed_at", UtcTime),
    Column("failed_at", UtcTime),
    # The node whose list the instances are. NULL where there is none that has to be met.
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
        " AND withheld_instances IS NOT NULL AND archived_bytes IS NOT NULL)",
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
"""Of a row of ``studies``. In words: a database uses an index of some rows for no parameters."""
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
    # Why the cohort does not take the study, though the row found it.
    Column("reason", Text),
    ForeignKeyConstraint(["cohort", "line"], [cohort_rows.c.cohort, cohort_rows.c.line]),
    Index("ix_row_studies_cohort_study", "cohort", "study"),
    sqlite_with_rowid=False,
)

# Of cohorts with several nodes: where a study is, or was looked for.
study_locations = Table(
    "study_locations",
    metadata,
    Column("study", _Number, ForeignKey(studies.c.reference), primary_key=True),
    Column("node", Text, primary_key=True),
    # As the node has it; NULL where the study was not found there.
    Column("patient_id", PeerText),
    Column("number_of_series", BigInteger),
    Column("number_of_instances", BigInteger),
    # Why it could not be had from there; NULL where it may be asked for.
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
    # The node that has sent it. NULL where that was written before there could be several.
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
"""Of a row of ``instances``: the PACS still lists it."""

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
    # The run that looked; NULL where nobody was at work.
    Column("run", _Number, ForeignKey(runs.c.number)),
    Column("unasked", BigInteger, nullable=False),
    *(Column(str(state), BigInteger, nullable=False) for state in StudyState),
    Column("expected", BigInteger, nullable=False),
    Column("received", BigInteger, nullable=False),
    Column("stored", BigInteger, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    # Whether the node might be asked then; NULL where it has no windows.
    Column("window_open", Boolean),
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
    # Seconds since 1970 by the clock that all runs share; how high the levels were then.
    Column("at", Double, nullable=False),
    *(
        Column(bucket, Double, nullable=False, server_default="0")
        for bucket in ("retrieves", "instances", "size_bytes", "busy_seconds")
    ),
    sqlite_with_rowid=False,
)

_versions_metadata = MetaData()
schema_versions = Table(
    "schema_versions",
    _versions_metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("applied_at", UtcTime, nullable=False),
)


def _create_tables(connection: Connection) -> None:
    metadata.create_all(connection, checkfirst=False)


FIRST_VERSION = 15
"""The schema that :data:`MIGRATIONS` begins with. Lower numbers are those of unreleased code."""

MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_create_tables,)
"""What makes each version, from FIRST_VERSION on, out of the version before.

Entries are added, never changed.
"""


def migrate(
    connection: Connection, migrations: tuple[Callable[[Connection], None], ...] = MIGRATIONS
) -> None:
    """Bring the ledger to the newest version, inside the caller's transaction.

    A migration and the record that it ran are one transaction: there is no half of it. The
    caller sees to it that nobody else migrates meanwhile.

    Raises
    ------
    LedgerError
        ``ledger-too-new`` or ``ledger-too-old``, and nothing was changed.
    """
    if not inspect(connection).has_table(schema_versions.name):
        schema_versions.create(connection, checkfirst=False)
    newest = FIRST_VERSION + len(migrations) - 1
    current = connection.scalar(select(func.max(schema_versions.c.version)))
    if current is None:
        current = FIRST_VERSION - 1
    elif current < FIRST_VERSION:
        raise LedgerError(
            "ledger-too-old", f"it has version {current}, this software begins with {FIRST_VERSION}"
        )
    if current > newest:
        raise LedgerError(
            "ledger-too-new", f"it has version {current}, this software knows {newest}"
        )
    for version in range(current + 1, newest + 1):
        migrations[version - FIRST_VERSION](connection)
        connection.execute(
            insert(schema_versions).values(version=version, applied_at=datetime.now(UTC))
        )
