"""The schema is made once, migrated in transactions, and other versions are not changed."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC
from pathlib import Path

import pytest
from sqlalchemy import Column, MetaData, Text, create_engine, inspect, text

from prefect_dicom.core.errors import LedgerError
from prefect_dicom.ledger import Ledger, schema
from tests.support.postgres import ledger_url


def _execute(url: str, statement: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


@pytest.mark.campaign("ledger")
def test_a_newer_ledger_is_left_alone(url):
    Ledger.open(url).close()
    _execute(url, "INSERT INTO schema_versions VALUES (99, '2026-01-01')")
    with pytest.raises(LedgerError) as error:
        Ledger.open(url)
    assert error.value.code == "ledger-too-new"


@pytest.mark.campaign("ledger")
def test_a_migration_and_its_record_are_one_transaction(url):
    with Ledger.open(url) as ledger:

        def second(connection):
            connection.execute(text("CREATE TABLE added (number INTEGER)"))

        def third(connection):
            connection.execute(text("CREATE TABLE half_done (number INTEGER)"))
            raise LookupError("no further")

        engine = ledger._database._writing_engine
        with pytest.raises(LookupError), engine.begin() as connection:
            schema.migrate(connection, (*schema.MIGRATIONS, second, third))
        with engine.begin() as connection:
            schema.migrate(connection, (*schema.MIGRATIONS, second))
        with engine.begin() as connection:
            versions = connection.execute(schema.schema_versions.select()).all()
        first = schema.FIRST_VERSION
        assert [row.version for row in versions] == [first, first + 1]
        assert all(row.applied_at.tzinfo is UTC for row in versions)
    with pytest.raises(LedgerError) as error:
        Ledger.open(url)
    assert error.value.code == "ledger-too-new"


def _shape(engine):
    """By table, its columns with type and nullability, and its keys and indexes."""
    looked = inspect(engine)
    return {
        table: (
            {(c["name"], str(c["type"]), c["nullable"]) for c in looked.get_columns(table)},
            looked.get_pk_constraint(table)["constrained_columns"],
            sorted(index["name"] for index in looked.get_indexes(table)),
        )
        for table in looked.get_table_names()
    }


@pytest.mark.campaign("ledger")
def test_a_new_ledger_equals_a_migrated_one(url, tmp_path, monkeypatch):
    Ledger.open(url).close()

    def add_column(connection):
        connection.execute(text("ALTER TABLE cohorts ADD COLUMN added TEXT"))

    # The next version: the column is in the tables, and a migration adds it to existing ledgers.
    tables = MetaData(naming_convention=schema.metadata.naming_convention)
    for table in schema.metadata.sorted_tables:
        table.to_metadata(tables)
    tables.tables["cohorts"].append_column(Column("added", Text))
    monkeypatch.setattr(schema, "metadata", tables)
    migrations = (*schema.MIGRATIONS, add_column)
    migrated = create_engine(url)
    (tmp_path / "new").mkdir()
    kind = "sqlite" if url.startswith("sqlite") else "postgresql"
    new = create_engine(ledger_url(kind, tmp_path / "new"))
    shapes, versions = [], []
    for engine in (migrated, new):
        with engine.begin() as connection:
            schema.migrate(connection, migrations)
        with engine.begin() as connection:
            schema.migrate(connection, migrations)
            versions.append(connection.scalar(text("SELECT max(version) FROM schema_versions")))
        shapes.append(_shape(engine))
        engine.dispose()
    assert shapes[0] == shapes[1]
    assert versions == [schema.FIRST_VERSION + len(migrations)] * 2
    assert any(name == "added" for name, _, _ in shapes[1]["cohorts"][0])


# What the code before the first release made: its table of versions, and a table since renamed.
UNRELEASED = (
    "CREATE TABLE schema_versions (version INTEGER PRIMARY KEY, applied_at TIMESTAMP NOT NULL)",
    "CREATE TABLE copies (study BIGINT NOT NULL, node TEXT NOT NULL, PRIMARY KEY (study, node))",
    "INSERT INTO copies VALUES (1, 'main')",
)


@pytest.mark.campaign("ledger")
@pytest.mark.parametrize("version", [1, schema.FIRST_VERSION - 1])
def test_a_ledger_from_before_the_first_release_is_left_alone(url, version):
    for statement in UNRELEASED:
        _execute(url, statement)
    _execute(url, f"INSERT INTO schema_versions VALUES ({version}, '2026-01-01')")
    if url.startswith("sqlite"):
        Path(url.removeprefix("sqlite:///")).chmod(0o600)
    with pytest.raises(LedgerError) as error:
        Ledger.open(url)
    assert error.value.code == "ledger-too-old"
    assert "rebuild-ledger" in error.value.reason.advice
    engine = create_engine(url)
    assert set(inspect(engine).get_table_names()) == {"schema_versions", "copies"}
    with engine.connect() as connection:
        assert connection.execute(text("SELECT node FROM copies")).scalars().all() == ["main"]
        assert connection.scalar(text("SELECT max(version) FROM schema_versions")) == version
    engine.dispose()


@pytest.mark.campaign("ledger")
def test_processes_that_create_one_ledger_at_once_all_work(url):
    program = (
        "import sys; from prefect_dicom.ledger import Ledger\n"
        "sys.stdin.readline()\n"
        "with Ledger.open(sys.argv[1]) as ledger:\n"
        "    ledger.cohorts.add('d' * 64, 'main', [])\n"
        "    print(len(ledger.cohorts.all()))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert (out, process.returncode) == ("1\n", 0), err
