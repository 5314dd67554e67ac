"""Cohorts are registered once, found by name, and reopened for reruns."""

from __future__ import annotations

from datetime import UTC

import pytest

from prefect_dicom.core.errors import LedgerError
from prefect_dicom.core.model import NO_FILTERS, Evidence, StudyState, Verdict
from tests.support.ledgers import CT_ONLY, DIGEST, claimed, keys, listed, received, rows, stored


def test_a_cohort_is_added_once_however_often_it_is_added(ledger):
    first = ledger.cohorts.add(DIGEST, "main", rows(3))
    again = ledger.cohorts.add(DIGEST, "main", rows(7), name="another")
    assert again == first
    assert (first.name, first.digest, first.node, first.rows) == (DIGEST[:12], DIGEST, "main", 3)
    assert first.created_at.tzinfo is UTC
    assert len(list(ledger.rows.verdicts(first.number))) == 3


def test_the_same_file_for_another_node_is_another_cohort(ledger):
    first = ledger.cohorts.add(DIGEST, "main", rows(1))
    second = ledger.cohorts.add(DIGEST, "other", rows(1))
    assert second.name == f"{first.name}-other"
    assert ledger.cohorts.all() == [second, first]


def test_a_name_belongs_to_one_cohort(ledger):
    ledger.cohorts.add(DIGEST, "main", rows(1), name="heart")
    with pytest.raises(LedgerError) as error:
        ledger.cohorts.add("e" * 64, "main", rows(1), name="heart")
    assert error.value.code == "cohort-name-taken"
    assert len(ledger.cohorts.all()) == 1


def test_a_cohort_is_found_by_name_or_number(ledger):
    cohort = ledger.cohorts.add(DIGEST, "main", rows(1), name="heart")
    assert ledger.cohorts.get("heart") == ledger.cohorts.get(str(cohort.number)) == cohort
    for unknown in ("lung", "9999", "9" * 40):
        with pytest.raises(LedgerError) as error:
            ledger.cohorts.get(unknown)
        assert error.value.code == "cohort-unknown"


def test_a_cohort_whose_rows_cannot_be_read_to_the_end_is_not_added(ledger):
    def broken():
        yield from rows(3)
        raise OSError("the file went away")

    with pytest.raises(OSError, match="went away"):
        ledger.cohorts.add(DIGEST, "main", broken())
    assert ledger.cohorts.all() == []


def test_a_cohort_keeps_what_it_wants_of_what_its_rows_find(ledger):
    cohort = ledger.cohorts.add(DIGEST, "main", rows(1), filters=CT_ONLY)
    assert cohort.selection == 'Modality is "CT" or regex "P\u0142"'
    assert ledger.cohorts.get(cohort.name) == cohort
    assert ledger.cohorts.filters(cohort.number) == CT_ONLY
    plain = ledger.cohorts.add("e" * 64, "main", rows(1))
    assert (plain.selection, ledger.cohorts.filters(plain.number)) == ("", NO_FILTERS)


@pytest.mark.parametrize(
    ("filters", "reopened_studies", "reopened_rows"),
    [
        ({}, [2, 3], [6, 8]),
        ({"reasons": ["instance-list-empty"]}, [4], []),
        ({"reasons": ["no-match", "pacs-busy"]}, [2], [7]),
        ({"lines": [3, 4, 6, 7]}, [3], [6]),
        ({"nodes": ["main"]}, [2, 3], [6, 8]),
        ({"nodes": ["other"]}, [], []),
        ({"reasons": ["pacs-busy"], "nodes": ["main"], "lines": [3]}, [], []),
        ({"lines": range(2, 2000)}, [2, 3], [6, 8]),
    ],
)
def test_a_rerun_reopens_what_its_filters_say(
    ledger, mixed, filters, reopened_studies, reopened_rows
):
    reopened = ledger.cohorts.reopen(mixed, **filters)
    assert (reopened.studies, reopened.rows) == (len(reopened_studies), len(reopened_rows))
    pending = {record.study.study_instance_uid for record in ledger.studies.to_pull(mixed)}
    assert pending == {f"1.2.3.{line}" for line in reopened_studies}
    # A row that failed for what need not last is asked again without being reopened, too.
    lines = [row.line for row in ledger.rows.to_discover(mixed)]
    assert lines == sorted({*reopened_rows, 6})
    verdicts = {verdict.line: verdict.verdict for verdict in ledger.rows.verdicts(mixed)}
    assert {line for line, verdict in verdicts.items() if verdict is Verdict.PENDING} == {
        *reopened_studies,
        *reopened_rows,
    }
    assert ledger.cohorts.reopen(mixed, **filters).studies == 0


def test_a_reopened_study_keeps_its_instances(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(2), Evidence.INSTANCE_LIST)
    ledger.instances.record_received(
        {claim.reference: claim}, [received(claim.reference, keys(1)[0])]
    )
    ledger.instances.record_stored(claim, [stored(keys(1)[0])])
    ledger.studies.record_failed(claim, "instances-missing", "detail")
    before = ledger.instances.of_study(claim.reference)
    cohort = ledger.cohorts.all()[0].number
    assert ledger.cohorts.reopen(cohort).studies == 1
    record = ledger.studies.get(claim.reference)
    assert (record.state, record.reason, record.detail) == (StudyState.PENDING, None, "")
    assert ledger.instances.of_study(claim.reference) == before
