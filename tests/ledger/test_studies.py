"""Each study is kept once, with its answer, its list and its end."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC

import pytest

from prefect_dicom.core.errors import LedgerError
from prefect_dicom.core.model import (
    Disposition,
    Evidence,
    InstanceState,
    Study,
    StudyState,
    Verdict,
)
from tests.support.ledgers import (
    CT_ONLY,
    DIGEST,
    claimed,
    discovered,
    keys,
    listed,
    received,
    rows,
    states,
    stored,
    study,
)


def test_studies_come_back_as_the_peer_sent_them(ledger):
    sent = Study(
        "1.2.3\0", "P\udcff", "\x1a0000", "2020010X", ("CT", "S\0R", "\udc80"), "ä\0", None, 0
    )
    near = replace(
        sent,
        patient_name="M\xfcller",
        patient_birth_date="1931",
        attributes=(("PatientSex", "O"),),
        original=(("PatientName", "4dfc6c6c6572"),),
        guessed=("PatientName",),
    )
    cohort = ledger.cohorts.add(DIGEST, "main", rows(1)).number
    ledger.rows.record_discoveries(cohort, [(2, [sent], None, [near])])
    (record,) = ledger.studies.of_cohort(cohort)
    assert record.study == sent
    assert ledger.studies.find("1.2.3\0") == record
    assert ledger.studies.find("1.2.3") is None
    assert ledger.rows.near_misses(cohort, 2) == (near,)
    assert "1.2.3" not in repr(record)


def test_a_study_is_one_study_in_all_cohorts(ledger, run):
    first = discovered(ledger, 1, "main")
    second = ledger.cohorts.add("e" * 64, "other", rows(2)).number
    ledger.rows.record_discoveries(second, [(line, [study(2)], None, ()) for line in (2, 3)])
    (record,) = ledger.studies.of_cohort(first)
    assert list(ledger.studies.of_cohort(second)) == [record]
    assert record.node == "other"
    (claim,) = ledger.claims.acquire(run, [record.reference])
    ledger.instances.record_list(claim, [], Evidence.INSTANCE_LIST)
    ledger.studies.record_archived(claim, b"{}", instances=0, withheld=0, size_bytes=0)
    verdicts = [*ledger.rows.verdicts(first), *ledger.rows.verdicts(second)]
    assert {verdict.verdict for verdict in verdicts} == {Verdict.ARCHIVED}


def test_a_study_is_refreshed_unless_it_is_claimed_or_archived(ledger, run):
    claim = claimed(ledger, run)
    changed = Study("1.2.3.2", patient_id="P2", study_description="new", number_of_instances=9)

    def found_again() -> Study:
        other = ledger.cohorts.add("e" * 64, "other", rows(1)).number
        ledger.rows.record_discoveries(other, [(2, [changed], None, ())])
        return ledger.studies.get(claim.reference).study

    assert found_again() == study(2)
    ledger.claims.release([claim])
    assert found_again() == changed
    (claim,) = ledger.claims.acquire(run, [claim.reference])
    ledger.instances.record_list(claim, [], Evidence.INSTANCE_LIST)
    ledger.studies.record_archived(claim, b"{}", instances=0, withheld=0, size_bytes=0)
    changed = study(2)
    assert found_again() != changed


def test_a_study_is_archived_only_as_the_ledger_knows_it(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(3), Evidence.INSTANCE_LIST)
    one, two, three = keys(3)
    ledger.instances.record_received(
        {claim.reference: claim}, [received(claim.reference, key) for key in (one, two)]
    )
    ledger.instances.record_stored(claim, [stored(one)])
    ledger.instances.record_rejected(claim, [(three, "pixel-data-length")])
    for instances, withheld in ((2, 1), (1, 1), (3, 0)):
        with pytest.raises(LedgerError) as error:
            ledger.studies.record_archived(
                claim, b"{}", instances=instances, withheld=withheld, size_bytes=0
            )
        assert error.value.code == "instances-missing"
    assert ledger.studies.get(claim.reference).state is StudyState.LISTED
    ledger.instances.record_stored(claim, [stored(two)])
    ledger.studies.record_archived(claim, b"{}", instances=2, withheld=1, size_bytes=2000)
    record = ledger.studies.get(claim.reference)
    assert record.state is StudyState.ARCHIVED
    assert (record.expected, record.stored, record.withheld) == (3, 2, 1)
    assert (record.size_bytes, record.claimed) == (2000, False)
    assert record.archived_at.tzinfo is UTC


def test_a_manifest_from_before_the_ledger_is_accepted_for_exactly_the_list(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(3), Evidence.INSTANCE_LIST)
    with pytest.raises(LedgerError):
        ledger.studies.record_archived(
            claim, b"{}", instances=2, withheld=0, size_bytes=9, rebuilt=True
        )
    ledger.studies.record_archived(
        claim, b"{}", instances=2, withheld=1, size_bytes=9, rebuilt=True
    )
    record = ledger.studies.get(claim.reference)
    assert (record.stored, record.withheld, record.size_bytes) == (2, 1, 9)
    assert ledger.instances.of_study(claim.reference) == []


def test_an_archived_study_keeps_its_manifest_and_the_objects_only_the_ledger_knows(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(2), Evidence.INSTANCE_LIST)
    one, two = keys(2)
    ledger.instances.record_received(
        {claim.reference: claim}, [received(claim.reference, key) for key in (one, two)]
    )
    ledger.instances.record_stored(claim, [stored(one), stored(two)])
    ledger.instances.record_list(claim, listed(1), Evidence.INSTANCE_LIST)
    manifest = b'{"instances": 1}' * 1000
    ledger.studies.record_archived(claim, manifest, instances=1, withheld=0, size_bytes=1000)
    assert list(ledger.manifests.of_cohort(ledger.cohorts.all()[0].number)) == [
        (claim.reference, manifest)
    ]
    (kept,) = ledger.instances.of_study(claim.reference)
    assert (kept.key, kept.reason) == (two, "no-longer-listed")
    assert kept.object_key is not None
    assert ledger.progress.totals(ledger.cohorts.all()[0].number).expected == 1


def test_a_failed_study_says_why_and_counts_what_is_stored(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(3), Evidence.INSTANCE_LIST)
    one, two, _ = keys(3)
    ledger.instances.record_received(
        {claim.reference: claim}, [received(claim.reference, key) for key in (one, two)]
    )
    ledger.instances.record_stored(claim, [stored(one)])
    ledger.studies.record_failed(claim, "instances-missing", "asked twice")
    record = ledger.studies.get(claim.reference)
    assert (record.state, record.reason) == (StudyState.FAILED, "instances-missing")
    assert (record.disposition, record.detail) == (Disposition.TRANSIENT, "asked twice")
    assert (record.expected, record.received, record.stored) == (3, 1, 1)
    assert (record.size_bytes, record.claimed) == (1000, False)
    (verdict,) = ledger.rows.verdicts(ledger.cohorts.all()[0].number)
    assert (verdict.verdict, verdict.reason) == (Verdict.PARTIAL, "instances-missing")
    assert (verdict.archived_instances, verdict.size_bytes) == (1, 1000)


def test_a_study_is_listed_with_one_selection_and_other_cohorts_leave_it_alone(ledger, run):
    ct = ledger.cohorts.add(DIGEST, "main", rows(2), filters=CT_ONLY)
    whole = ledger.cohorts.add("e" * 64, "main", rows(2))
    for cohort in (ct, whole):
        ledger.rows.record_discoveries(cohort.number, [(2, [study(2)], None, ())])
    # While nothing is listed it is open to both.
    (record,) = ledger.studies.to_pull(whole.number)
    assert record.selection is None
    (claim,) = ledger.claims.acquire(run, [record.reference], ct.selection)
    ledger.instances.record_list(claim, [], Evidence.INSTANCE_LIST, selection=ct.selection)
    assert ledger.studies.get(record.reference).selection is None
    ledger.instances.record_list(claim, listed(2), Evidence.INSTANCE_LIST, selection=ct.selection)
    assert ledger.studies.get(record.reference).selection == ct.selection
    ledger.claims.release([claim])
    assert ledger.studies.to_pull(whole.number) == []
    assert ledger.claims.acquire(run, [record.reference], "") == []
    assert [found.reference for found in ledger.studies.to_pull(ct.number)] == [record.reference]

    def reported(cohort) -> tuple[str, str]:
        first, _ = ledger.rows.verdicts(cohort.number)
        return str(first.verdict), first.reason

    assert reported(ct) == ("pending", "interrupted")
    assert reported(whole) == ("failed", "selected-otherwise")
    (claim,) = ledger.claims.acquire(run, [record.reference], ct.selection)
    ledger.studies.record_failed(claim, "pacs-busy")
    # Not even a rerun of the other cohort touches it.
    assert ledger.cohorts.reopen(whole.number).studies == 0
    assert ledger.cohorts.reopen(ct.number).studies == 1
    totals = [ledger.progress.totals(cohort.number) for cohort in (ct, whole)]
    assert [each.studies for each in totals] == [{"pending": 1}, {"failed": 1}]
    assert [each.expected for each in totals] == [2, 0]


def test_a_reason_that_does_not_exist_is_refused(ledger, run):
    claim = claimed(ledger, run)
    cohort = ledger.cohorts.all()[0].number
    ledger.instances.record_list(claim, listed(1), Evidence.INSTANCE_LIST)
    with pytest.raises(KeyError):
        ledger.studies.record_failed(claim, "bad-luck")
    with pytest.raises(KeyError):
        ledger.instances.record_rejected(claim, [(keys(1)[0], "bad-luck")])
    with pytest.raises(KeyError):
        ledger.rows.record_discoveries(cohort, [(2, (), "bad-luck", ())])
    assert states(ledger, claim.reference) == {keys(1)[0]: InstanceState.EXPECTED}
