"""Where a cohort stood is written down while runs work on it, and is there when they are gone."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from prefect_dicom.core.errors import LedgerError
from prefect_dicom.core.model import CohortRow, StudyState
from prefect_dicom.ledger import Ledger, progress
from prefect_dicom.testing import Behaviour
from tests.support.postgres import ledger_url
from tests.support.sites import study

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request, tmp_path):
    with Ledger.open(ledger_url(request.param, tmp_path)) as opened:
        yield opened


def cohort_in(ledger: Ledger, rows: int = 3) -> int:
    found = [CohortRow(line, accession_number=f"A{line}") for line in range(2, 2 + rows)]
    return ledger.cohorts.add("d" * 64, "main", found).number


def test_a_sample_says_what_the_totals_say(ledger):
    cohort = cohort_in(ledger)
    with ledger.runs.begin("pull") as run:
        assert ledger.progress.record_sample(cohort, run, schedule_open=True, at=NOON)
    [sample] = ledger.progress.samples(cohort)
    assert (sample.at, sample.run, sample.schedule_open) == (NOON, run.number, True)
    totals = ledger.progress.totals(cohort)
    assert (sample.unasked, sample.studies, sample.stored) == (3, totals.studies, 0)


def test_several_runs_of_a_cohort_take_no_more_samples_than_one(ledger):
    cohort, other = cohort_in(ledger), ledger.cohorts.add("e" * 64, "main", []).number
    with ledger.runs.begin("pull") as one, ledger.runs.begin("pull") as another:
        for seconds in range(0, 120, 5):
            for run in (one, another):
                ledger.progress.record_sample(
                    cohort, run, least_seconds=30, at=NOON + timedelta(seconds=seconds)
                )
        # Another cohort is another matter.
        assert ledger.progress.record_sample(
            other, one, least_seconds=30, at=NOON + timedelta(seconds=116)
        )
    taken = [(sample.at - NOON).total_seconds() for sample in ledger.progress.samples(cohort)]
    assert taken == [0, 30, 60, 90]


@pytest.mark.needs("time")
def test_months_of_samples_take_no_more_room_than_days(ledger, monkeypatch):
    monkeypatch.setattr(progress, "MOST_SAMPLES", 12)
    cohort = cohort_in(ledger)
    end = NOON
    for number in range(150):
        end = NOON + timedelta(seconds=30 * number)
        ledger.progress.record_sample(cohort, at=end)
    kept = [sample.at for sample in ledger.progress.samples(cohort)]
    assert len(kept) <= 12
    assert (kept[0], kept[-1]) == (NOON, end)
    # The beginning is sampled as closely as the end.
    steps = [after - before for before, after in zip(kept, kept[1:], strict=False)]
    assert max(steps) <= 3 * (end - NOON) / 6


def test_a_pull_leaves_where_it_began_and_where_it_ended(around):
    with around(study(1) + study(2)) as place:
        place.pull()
        with place.ledger() as ledger:
            first, last = ledger.progress.samples(1)
            assert (first.unasked, first.studies.total()) == (2, 0)
            assert last.studies == Counter({StudyState.ARCHIVED: 2})
            totals = ledger.progress.totals(1)
            assert (last.stored, last.size_bytes) == (totals.stored, totals.size_bytes)
        place.pull()
        with place.ledger() as ledger:
            assert [sample.run for sample in ledger.progress.samples(1)] == [1, 1, 2, 2]


def test_a_pull_goes_on_where_no_sample_can_be_written(around, monkeypatch):
    def unwritable(*_: object, **__: object) -> bool:
        raise LedgerError("ledger-busy")

    with around(study(1)) as place:
        monkeypatch.setattr(progress.Progress, "record_sample", unwritable)
        place.pull()
        place.is_whole()


def test_the_ledger_knows_when_a_study_was_begun_and_when_it_failed(around):
    whole, torn = study(1), study(2)
    uid = torn[0].study_instance_uid
    lacks = Behaviour("move.drop_instances", instances=1, study=uid)
    before = datetime.now(UTC)
    with around(whole + torn, script=[lacks]) as place:
        place.pull()
        studies = place.studies()
        archived, failed = studies[whole[0].study_instance_uid], studies[uid]
        assert before < archived.claimed_at < archived.archived_at
        assert archived.failed_at is None
        assert before < failed.claimed_at < failed.failed_at < datetime.now(UTC)
        del place.pacs.script[:]
        place.rerun()
        again = place.studies()[uid]
        assert failed.failed_at < again.claimed_at < again.archived_at
