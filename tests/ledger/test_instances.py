"""Instances are listed, received, stored, lost and rejected."""

from __future__ import annotations

from datetime import UTC

import pytest

from prefect_dicom.core.model import Evidence, Instance, InstanceKey, InstanceState, StudyState
from tests.support.ledgers import (
    CT,
    EXPLICIT,
    SHA256,
    claimed,
    keys,
    listed,
    received,
    states,
    stored,
)


def test_a_list_is_the_expected_set(ledger, run):
    claim = claimed(ledger, run)
    change = ledger.instances.record_list(claim, [*listed(3), *listed(1)], Evidence.INSTANCE_LIST)
    assert (change.added, change.removed, change.total) == (3, 0, 3)
    assert states(ledger, claim.reference) == dict.fromkeys(keys(3), InstanceState.EXPECTED)
    record = ledger.studies.get(claim.reference)
    assert record.state is StudyState.LISTED
    assert (record.expected, record.stored, record.claimed) == (3, 0, True)
    assert record.evidence is Evidence.INSTANCE_LIST
    assert record.listed_at.tzinfo is UTC


@pytest.mark.needs("time")
def test_one_sop_instance_uid_in_two_series_is_two_instances(ledger, run):
    claim = claimed(ledger, run)
    twins = [InstanceKey("1.5", "1.9"), InstanceKey("1.6", "1.9")]
    ledger.instances.record_list(claim, [Instance(key) for key in twins], Evidence.INSTANCE_LIST)
    ledger.instances.record_received(
        {claim.reference: claim}, [received(claim.reference, twins[0])]
    )
    assert states(ledger, claim.reference) == {
        twins[0]: InstanceState.RECEIVED,
        twins[1]: InstanceState.EXPECTED,
    }


def test_a_changed_list_changes_the_expected_set_and_loses_nothing_stored(ledger, run):
    claim = claimed(ledger, run)
    one, two, three, four = keys(4)
    ledger.instances.record_list(claim, listed(3), Evidence.INSTANCE_LIST)
    ledger.instances.record_received(
        {claim.reference: claim}, [received(claim.reference, key) for key in (one, two)]
    )
    ledger.instances.record_stored(claim, [stored(one)])
    change = ledger.instances.record_list(claim, [Instance(four, CT)], Evidence.INSTANCE_LIST)
    assert (change.added, change.removed, change.total) == (1, 3, 1)
    records = {record.key: record for record in ledger.instances.of_study(claim.reference)}
    assert set(records) == {one, two, four}
    for key in (one, two):
        assert records[key].state is InstanceState.REJECTED
        assert records[key].reason == "no-longer-listed"
    assert records[one].object_key is not None
    assert ledger.studies.get(claim.reference).expected == 1
    back = ledger.instances.record_list(
        claim, [Instance(one, CT), Instance(four, CT)], Evidence.INSTANCE_LIST
    )
    assert (back.added, back.removed, back.total) == (1, 0, 2)
    assert states(ledger, claim.reference)[one] is InstanceState.EXPECTED


def test_what_was_rejected_is_expected_again_only_by_a_fresh_list(ledger, run):
    claim = claimed(ledger, run)
    (key,) = keys(1)
    ledger.instances.record_list(claim, listed(1), Evidence.INSTANCE_LIST)
    ledger.instances.record_received({claim.reference: claim}, [received(claim.reference, key)])
    ledger.instances.record_lost(claim, [key])
    ledger.instances.record_rejected(claim, [(key, "pixel-data-length")])
    again = ledger.instances.record_list(claim, listed(1), Evidence.INSTANCE_LIST)
    assert (again.added, again.removed) == (0, 0)
    assert states(ledger, claim.reference) == {key: InstanceState.REJECTED}
    ledger.instances.record_list(claim, listed(1), Evidence.INSTANCE_LIST, fresh=True)
    (record,) = ledger.instances.of_study(claim.reference)
    assert (record.state, record.reason, record.rejections) == (InstanceState.EXPECTED, None, 0)


def test_a_received_instance_is_recorded_with_its_digest(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(2), Evidence.INSTANCE_LIST)
    one, _ = keys(2)
    assert (
        ledger.instances.record_received({claim.reference: claim}, [received(claim.reference, one)])
        == []
    )
    record = ledger.instances.of_study(claim.reference)[0]
    assert record.state is InstanceState.RECEIVED
    assert (record.sha256, record.size_bytes, record.spool_name) == (SHA256, 1000, SHA256)
    assert record.transfer_syntax_uid == EXPLICIT
    ledger.instances.record_stored(claim, [stored(one, "transfer-syntax-unknown")])
    record = ledger.instances.of_study(claim.reference)[0]
    assert (record.object_key, record.version_id) == (f"studies/{one.sop_instance_uid}.dcm", "v1")
    assert record.warnings == ("transfer-syntax-unknown",)
    figures = ledger.studies.get(claim.reference)
    assert (figures.stored, figures.received, figures.size_bytes) == (1, 0, 1000)


def test_received_instances_that_are_not_expected_are_returned(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(3), Evidence.INSTANCE_LIST)
    ledger.instances.record_received(
        {claim.reference: claim}, [received(claim.reference, keys(3)[2])]
    )
    ledger.instances.record_list(claim, listed(2), Evidence.INSTANCE_LIST)
    known, unlisted, withdrawn = keys(1)[0], InstanceKey("1.2.3.4", "1.999"), keys(3)[2]
    batch = [
        received(claim.reference, known),
        received(claim.reference, known, "cd" * 32),
        received(claim.reference, unlisted),
        received(claim.reference, withdrawn),
        received(claim.reference + 1, known),
    ]
    strangers = ledger.instances.record_received({claim.reference: claim}, batch)
    assert strangers == batch[2:]
    first = ledger.instances.of_study(claim.reference)[0]
    assert (first.state, first.sha256) == (InstanceState.RECEIVED, SHA256)


def test_an_instance_that_is_here_already_stays_as_it_is(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(2), Evidence.INSTANCE_LIST)
    mine = {claim.reference: claim}
    ledger.instances.record_received(mine, [received(claim.reference, key) for key in keys(2)])
    ledger.instances.record_stored(claim, [stored(keys(1)[0])])
    before = ledger.instances.of_study(claim.reference)
    again = [received(claim.reference, key, "cd" * 32) for key in keys(2)]
    assert ledger.instances.record_received(mine, again) == []
    assert ledger.instances.of_study(claim.reference) == before


def test_bytes_that_were_not_received_are_not_recorded_as_stored(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(1), Evidence.INSTANCE_LIST)
    (key,) = keys(1)
    ledger.instances.record_received({claim.reference: claim}, [received(claim.reference, key)])
    ledger.instances.record_stored(claim, [stored(key, sha256="cd" * 32)])
    assert states(ledger, claim.reference) == {key: InstanceState.RECEIVED}


def test_a_lost_instance_is_expected_again_and_keeps_its_last_digest(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(2), Evidence.INSTANCE_LIST)
    key, other = keys(2)
    ledger.instances.record_received({claim.reference: claim}, [received(claim.reference, key)])
    ledger.instances.record_lost(claim, [key, other])
    lost, untouched = ledger.instances.of_study(claim.reference)
    assert (lost.state, lost.rejections, lost.spool_name) == (InstanceState.EXPECTED, 1, None)
    assert lost.sha256 == SHA256
    assert untouched.rejections == 0


def test_instances_are_rejected_in_a_batch_each_for_its_reason(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(3), Evidence.INSTANCE_LIST)
    one, two, three = keys(3)
    ledger.instances.record_rejected(claim, [(one, "wrong-patient"), (three, "pixel-data-length")])
    reasons = {record.key: record.reason for record in ledger.instances.of_study(claim.reference)}
    assert reasons == {one: "wrong-patient", two: None, three: "pixel-data-length"}
