"""Totals agree with the verdicts of the rows and count every instance once."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from prefect_dicom.core.model import CohortRow, Evidence, PerPatient, StudyState, Verdict
from tests.support.ledgers import CT_ONLY, DIGEST, discovered, keys, listed, received, stored, study


def test_the_totals_add_up(ledger, mixed):
    totals = ledger.progress.totals(mixed)
    assert totals.rows.total() == ledger.cohorts.get(str(mixed)).rows
    assert totals.rows == Counter(
        {
            Verdict.FAILED: 4,
            Verdict.ARCHIVED: 1,
            Verdict.NOT_FOUND: 1,
            Verdict.AMBIGUOUS: 1,
        }
    )
    assert totals.studies == Counter({StudyState.FAILED: 3, StudyState.ARCHIVED: 1})


def test_the_totals_count_every_listed_instance_once(ledger, run):
    cohort = discovered(ledger, 3)
    first, second, third = ledger.claims.acquire(
        run, [s.reference for s in ledger.studies.of_cohort(cohort)]
    )
    for claim in (first, second):
        ledger.instances.record_list(claim, listed(3), Evidence.INSTANCE_LIST)
        one, two, three = keys(3)
        ledger.instances.record_received(
            {claim.reference: claim}, [received(claim.reference, key) for key in (one, two)]
        )
        ledger.instances.record_stored(claim, [stored(one)])
        ledger.instances.record_rejected(claim, [(three, "wrong-patient")])
    ledger.instances.record_stored(first, [stored(two)])
    ledger.studies.record_archived(first, b"{}", instances=2, withheld=1, size_bytes=2000)
    totals = ledger.progress.totals(cohort)
    assert (totals.expected, totals.received, totals.stored, totals.rejected) == (6, 1, 3, 2)
    assert totals.size_bytes == 3000
    assert third.reference in [record.reference for record in ledger.studies.of_cohort(cohort)]


@pytest.mark.needs("time")
def test_totals_count_the_verdicts_that_the_rows_have(ledger, run):
    """They are counted by the database, most of them without a look at the row."""
    lot = random.Random(7)
    lines = range(2, 202)
    kinds = ["pending", "listed", "archived", "withheld", "failed", "half", "archived"]
    kinds += ["missing"]
    # Of each patient some studies, of which the cohort takes two.
    found = [replace(study(n), patient_id=f"P{n % 9}") for n in range(40)]
    cohort = ledger.cohorts.add(DIGEST, "main", [CohortRow(line) for line in lines]).number
    other = ledger.cohorts.add("e" * 64, "main", [CohortRow(2)], filters=CT_ONLY)
    for line in lines:
        of_row = lot.sample(found, lot.choice([0, 1, 1, 1, 2, 3]))
        reason = lot.choice([None, None, None, "filter-undecided", "list-unproved"])
        gaps = ("2024",) if reason == "list-unproved" else ()
        if not of_row:
            nothing = [None, "no-match", "several-patients", "pacs-failure", "line-faulty"]
            reason = lot.choice(nothing)
        if reason is not None or of_row:
            ledger.rows.record_discoveries(cohort, [(line, of_row, reason, (), gaps)])
    ledger.rows.record_discoveries(other.number, [(2, found[:6], None, ())])
    ledger.rows.limit_per_patient(cohort, PerPatient(2))
    key, faulty = keys(2)
    for record in list(ledger.studies.of_cohort(cohort)):
        kind = lot.choice(kinds)
        if kind == "pending":
            continue
        (claim,) = ledger.claims.acquire(run, [record.reference])
        with_series = other.selection if record.study in found[:6] else ""
        ledger.instances.record_list(
            claim, listed(2), Evidence.INSTANCE_LIST, selection=with_series
        )
        if kind in ("archived", "withheld", "missing", "half"):
            ledger.instances.record_received(
                {record.reference: claim}, [received(record.reference, key)]
            )
            ledger.instances.record_stored(claim, [stored(key)])
            ledger.instances.record_rejected(claim, [(faulty, "pixel-data-length")])
        if kind in ("failed", "half"):
            ledger.studies.record_failed(claim, "instances-missing")
        elif kind != "listed":
            withheld, missing = int(kind == "withheld"), int(kind == "missing")
            if not withheld and not missing:
                ledger.instances.record_list(
                    claim, listed(1), Evidence.INSTANCE_LIST, selection=with_series
                )
            ledger.studies.record_archived(
                claim, b"{}", instances=1, withheld=withheld, missing=missing, size_bytes=1000
            )
    for number in (cohort, other.number):
        verdicts = list(ledger.rows.verdicts(number))
        totals = ledger.progress.totals(number)
        assert totals.rows == Counter(verdict.verdict for verdict in verdicts)
        assert totals.unproved == Counter(gap for verdict in verdicts for gap in verdict.gaps)
    assert len({verdict.verdict for verdict in ledger.rows.verdicts(cohort)}) == len(Verdict)
