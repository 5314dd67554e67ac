"""A ledger of each kind, and a run on it."""

from __future__ import annotations

import pytest

from prefect_dicom.core.model import Evidence
from prefect_dicom.ledger import Ledger
from tests.support.ledgers import DIGEST, rows, study
from tests.support.postgres import ledger_url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    return ledger_url(request.param, tmp_path)


@pytest.fixture
def ledger(url):
    with Ledger.open(url) as opened:
        yield opened


@pytest.fixture
def run(ledger):
    with ledger.runs.begin("pull") as living:
        yield living


@pytest.fixture
def mixed(ledger, run) -> int:
    """Lines 2-4 failed (transient, operator, permanent), 5 archived, 6-8 ended without a study."""
    cohort = ledger.cohorts.add(DIGEST, "main", rows(7)).number
    ledger.rows.record_discoveries(
        cohort,
        [(line, [study(line)], None, ()) for line in (2, 3, 4, 5)]
        + [(6, (), "pacs-refused", ()), (7, (), "no-match", ())]
        + [(8, (), "several-patients", ())],
    )
    claims = ledger.claims.acquire(
        run, [found.reference for found in ledger.studies.to_pull(cohort)]
    )
    for claim, code in zip(
        claims, ("pacs-busy", "not-permitted", "instance-list-empty"), strict=False
    ):
        ledger.studies.record_failed(claim, code)
    ledger.instances.record_list(claims[3], [], Evidence.INSTANCE_LIST)
    ledger.studies.record_archived(claims[3], b"{}", instances=0, withheld=0, size_bytes=0)
    return cohort
