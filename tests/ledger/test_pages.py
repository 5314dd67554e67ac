"""Long answers are read in pages, without a gap."""

from __future__ import annotations

import pytest
from sqlalchemy import event

from prefect_dicom.core.model import Evidence
from prefect_dicom.ledger import studies
from tests.support.ledgers import DIGEST, claims_of, rows, study


@pytest.mark.needs("time")
def test_long_cohorts_are_read_in_pages_without_a_gap(ledger):
    count = 2500
    cohort = ledger.cohorts.add(DIGEST, "main", rows(count)).number
    line = 0
    while page := ledger.rows.to_discover(cohort, line):
        ledger.rows.record_discoveries(cohort, [(r.line, [study(r.line)], None, ()) for r in page])
        line = page[-1].line
    assert [verdict.line for verdict in ledger.rows.verdicts(cohort)] == list(range(2, 2 + count))
    references = [record.reference for record in ledger.studies.of_cohort(cohort)]
    assert references == sorted(set(references))
    assert len(references) == count
    pulled, after = [], 0
    while records := ledger.studies.to_pull(cohort, after, limit=700):
        pulled += [record.reference for record in records]
        after = pulled[-1]
    assert pulled == references
    with ledger.runs.begin("pull") as run:
        assert len(ledger.claims.acquire(run, references)) == count
        assert len(ledger.claims.live()) == count
    assert ledger.claims.live() == []


def test_manifests_are_read_in_pages(ledger, run):
    claims = claims_of(ledger, run, 20)
    for claim in claims:
        ledger.instances.record_list(claim, [], Evidence.SERIES_COUNTS)
        ledger.studies.record_archived(
            claim, str(claim.reference).encode(), instances=0, withheld=0, size_bytes=0
        )
    assert list(ledger.manifests.of_cohort(ledger.cohorts.all()[0].number)) == [
        (claim.reference, str(claim.reference).encode()) for claim in claims
    ]


def test_a_page_of_what_is_to_be_pulled_is_found_behind_any_number_of_archived_studies(
    ledger, run, monkeypatch
):
    claims = claims_of(ledger, run, 60)
    for claim in claims[:50]:
        ledger.instances.record_list(claim, [], Evidence.INSTANCE_LIST)
        ledger.studies.record_archived(claim, b"{}", instances=0, withheld=0, size_bytes=0)
    monkeypatch.setattr(studies, "LIST_SIZE", 5)
    statements = []
    event.listen(
        ledger._database.engine, "before_cursor_execute", lambda *a: statements.append(a[2])
    )
    page = ledger.studies.to_pull(1, 0, 4)
    assert [record.reference for record in page] == [c.reference for c in claims[50:54]]
    assert sum("row_studies" in statement for statement in statements) == 1
