"""Cohorts, studies and instances in a ledger, for tests of its parts."""

from __future__ import annotations

from datetime import date

from sqlalchemy import text

from prefect_dicom.core.model import (
    ArchivedInstance,
    CohortFilters,
    CohortRow,
    DateRange,
    Excluded,
    Filter,
    Instance,
    InstanceKey,
    InstanceState,
    Pattern,
    PerPatient,
    ReceivedInstance,
    Study,
)
from prefect_dicom.ledger import Claim, Ledger
from prefect_dicom.ledger.errors import translate_database_errors

DIGEST = "d" * 64


SHA256 = "ab" * 32


CT = "1.2.840.10008.5.1.4.1.1.2"


EXPLICIT = "1.2.840.10008.1.2.1"


CT_ONLY = CohortFilters(
    studies=(Filter("StudyDate", dates=DateRange(date(2024, 1, 1), None)),),
    series=(Filter("Modality", any_of=(Pattern("CT"), Pattern("P\u0142", regex=True))),),
    excluded=frozenset({Excluded("P1", None, "1.2"), Excluded(accession_number="A")}),
    per_patient=PerPatient(2, latest=False),
)


def rows(count: int) -> list[CohortRow]:
    return [CohortRow(line=line, accession_number=f"A{line}") for line in range(2, 2 + count)]


def study(line: int) -> Study:
    return Study(f"1.2.3.{line}", patient_id=f"P{line}", number_of_instances=2)


def keys(count: int) -> list[InstanceKey]:
    return [InstanceKey("1.2.3.4", f"1.2.3.4.{number}") for number in range(1, count + 1)]


def listed(count: int) -> list[Instance]:
    return [Instance(key, CT) for key in keys(count)]


def received(reference: int, key: InstanceKey, sha256: str = SHA256) -> ReceivedInstance:
    return ReceivedInstance(reference, key, CT, EXPLICIT, sha256, 1000, sha256)


def stored(key: InstanceKey, *warnings: str, sha256: str = SHA256):
    return (
        key,
        ArchivedInstance(f"studies/{key.sop_instance_uid}.dcm", sha256, 1000, "v1"),
        warnings,
    )


def discovered(ledger: Ledger, count: int = 1, node: str = "main") -> int:
    """A cohort of rows that each found one study; its number."""
    cohort = ledger.cohorts.add(DIGEST, node, rows(count)).number
    ledger.rows.record_discoveries(
        cohort, [(row.line, [study(row.line)], None, ()) for row in rows(count)]
    )
    return cohort


def claims_of(ledger: Ledger, run, count: int) -> list[Claim]:
    """Claims of all studies of a new cohort."""
    cohort = discovered(ledger, count)
    return ledger.claims.acquire(run, [found.reference for found in ledger.studies.to_pull(cohort)])


def claimed(ledger: Ledger, run) -> Claim:
    """A claim of the only study of a new cohort."""
    (claim,) = claims_of(ledger, run, 1)
    return claim


def states(ledger: Ledger, reference: int) -> dict[InstanceKey, InstanceState]:
    return {record.key: record.state for record in ledger.instances.of_study(reference)}


@translate_database_errors
def execute_in(ledger: Ledger, statement: str) -> None:
    with ledger._database.write() as connection:
        connection.execute(text(statement))
