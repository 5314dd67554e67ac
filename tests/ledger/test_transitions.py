"""States of studies and instances change only as the tables of transitions say."""

from __future__ import annotations

import pytest

from prefect_dicom.core.errors import LedgerError
from prefect_dicom.core.model import Evidence, InstanceKey, InstanceState, StudyState
from prefect_dicom.core.transitions import INSTANCE_TRANSITIONS, STUDY_TRANSITIONS, predecessors
from prefect_dicom.ledger import Claim, Ledger
from tests.support.ledgers import (
    claimed,
    claims_of,
    execute_in,
    keys,
    listed,
    received,
    states,
    stored,
)


def _bring_study_to(ledger: Ledger, run, state: StudyState) -> Claim:
    claim = claimed(ledger, run)
    if state in (StudyState.LISTED, StudyState.ARCHIVED):
        ledger.instances.record_list(claim, [], Evidence.INSTANCE_LIST)
    if state is StudyState.ARCHIVED:
        ledger.studies.record_archived(claim, b"{}", instances=0, withheld=0, size_bytes=0)
    if state is StudyState.FAILED:
        ledger.studies.record_failed(claim, "pacs-refused")
    return claim


def _try_study(ledger: Ledger, run, claim: Claim, target: StudyState) -> None:
    cohort = ledger.cohorts.all()[0].number
    # A new claim where one can be had: what is refused is refused for the state alone.
    ledger.claims.release([claim])
    (claim,) = ledger.claims.acquire(run, [claim.reference]) or [claim]
    if (
        target is StudyState.PENDING
        and not ledger.cohorts.reopen(cohort, reasons=["pacs-refused"]).studies
    ):
        # By one of several nodes.
        ledger.studies.record_failed(claim, "pacs-refused", nodes=("main", "other"))
    if target is StudyState.LISTED:
        ledger.instances.record_list(claim, [], Evidence.INSTANCE_LIST)
    if target is StudyState.ARCHIVED:
        ledger.studies.record_archived(claim, b"{}", instances=0, withheld=0, size_bytes=0)
    if target is StudyState.FAILED:
        ledger.studies.record_failed(claim, "study-changed")


@pytest.mark.parametrize("source", StudyState)
@pytest.mark.parametrize("target", StudyState)
def test_a_study_changes_only_as_the_table_says(ledger, run, source, target):
    claim = _bring_study_to(ledger, run, source)
    before = ledger.studies.get(claim.reference)
    assert before.state is source
    refused = False
    try:
        _try_study(ledger, run, claim, target)
    except Exception as error:
        assert error.code in {"claim-lost", "instances-missing"}
        refused = True
    after = ledger.studies.get(claim.reference)
    if target in STUDY_TRANSITIONS[source]:
        assert not refused
        assert after.state is target
    else:
        assert (after.state, after.reason, after.archived_at) == (
            source,
            before.reason,
            before.archived_at,
        )


def _bring_instance_to(ledger: Ledger, claim: Claim, state: InstanceState) -> InstanceKey:
    (key,) = keys(1)
    ledger.instances.record_list(claim, listed(1), Evidence.INSTANCE_LIST)
    if state in (InstanceState.RECEIVED, InstanceState.STORED):
        ledger.instances.record_received({claim.reference: claim}, [received(claim.reference, key)])
    if state is InstanceState.STORED:
        ledger.instances.record_stored(claim, [stored(key)])
    if state is InstanceState.REJECTED:
        ledger.instances.record_rejected(claim, [(key, "pixel-data-length")])
    return key


_TOWARDS = {
    InstanceState.EXPECTED: (
        lambda ledger, claim, key: ledger.instances.record_lost(claim, [key]),
        lambda ledger, claim, key: ledger.instances.record_list(
            claim, listed(1), Evidence.INSTANCE_LIST, fresh=True
        ),
    ),
    InstanceState.RECEIVED: (
        lambda ledger, claim, key: ledger.instances.record_received(
            {claim.reference: claim}, [received(claim.reference, key)]
        ),
    ),
    InstanceState.STORED: (
        lambda ledger, claim, key: ledger.instances.record_stored(claim, [stored(key)]),
    ),
    InstanceState.REJECTED: (
        lambda ledger, claim, key: ledger.instances.record_rejected(
            claim, [(key, "wrong-patient")]
        ),
        lambda ledger, claim, key: ledger.instances.record_list(claim, [], Evidence.INSTANCE_LIST),
    ),
}


@pytest.mark.parametrize("source", InstanceState)
@pytest.mark.parametrize("target", InstanceState)
def test_an_instance_changes_only_as_the_table_says(ledger, run, source, target):
    verbs = _TOWARDS[target]
    reached = set()
    for verb, claim in zip(verbs, claims_of(ledger, run, len(verbs)), strict=True):
        key = _bring_instance_to(ledger, claim, source)
        assert states(ledger, claim.reference) == {key: source}
        verb(ledger, claim, key)
        reached.update(states(ledger, claim.reference).values())
    allowed = INSTANCE_TRANSITIONS[source] | {source}
    assert reached <= allowed
    assert (target in reached) == (target in allowed)


def test_a_change_that_the_table_does_not_allow_is_not_built():
    assert predecessors(STUDY_TRANSITIONS, StudyState.ARCHIVED) == (StudyState.LISTED,)
    failed = predecessors(STUDY_TRANSITIONS, StudyState.PENDING, StudyState.FAILED)
    assert failed == (StudyState.FAILED,)
    with pytest.raises(ValueError, match="archived cannot become pending"):
        predecessors(STUDY_TRANSITIONS, StudyState.PENDING, StudyState.ARCHIVED)


def test_the_database_refuses_what_no_study_can_be(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(1), Evidence.INSTANCE_LIST)
    for impossible in (
        "UPDATE studies SET state = 'failed'",
        "UPDATE studies SET state = 'archived', run = NULL",
        "UPDATE studies SET state = 'done'",
        "UPDATE studies SET reason = 'pacs-busy'",
        "UPDATE studies SET evidence = NULL",
        "UPDATE studies SET run = 4711",
        "UPDATE instances SET state = 'received'",
        "UPDATE instances SET state = 'rejected'",
        "UPDATE instances SET study = 4711",
        "DELETE FROM studies",
    ):
        with pytest.raises(LedgerError) as error:
            execute_in(ledger, impossible)
        assert error.value.code == "ledger-unavailable"
