"""The ledger keeps what became of every cohort row, study and instance, and nothing else."""

from __future__ import annotations

import os
import random
import sqlite3
import stat
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from datetime import UTC, date
from pathlib import Path

import pytest
from sqlalchemy import create_engine, event, inspect, text

from prefect_dicom.core.errors import LedgerError
from prefect_dicom.core.model import (
    WHOLE,
    ArchivedInstance,
    CohortRow,
    DateRange,
    Disposition,
    Evidence,
    Excluded,
    Filter,
    Instance,
    InstanceKey,
    InstanceState,
    Pattern,
    PerPatient,
    ReceivedInstance,
    Selection,
    Study,
    StudyState,
    Verdict,
)
from prefect_dicom.core.transitions import INSTANCE_TRANSITIONS, STUDY_TRANSITIONS
from prefect_dicom.ledger import Claim, Ledger, schema, studies
from prefect_dicom.ledger.errors import translate_database_errors
from tests.support.postgres import cluster, ledger_url

DIGEST = "d" * 64
SHA256 = "ab" * 32
CT = "1.2.840.10008.5.1.4.1.1.2"
EXPLICIT = "1.2.840.10008.1.2.1"


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


def rows(count: int) -> list[CohortRow]:
    return [CohortRow(line=line, accession_number=f"A{line}") for line in range(2, 2 + count)]


def study(line: int) -> Study:
    return Study(f"1.2.3.{line}", patient_id=f"P{line}", number_of_instances=2)


def keys(count: int) -> list[InstanceKey]:
    return [InstanceKey("1.2.3.4", f"1.2.3.4.{number}") for number in range(1, count + 1)]


def listed(count: int) -> list[Instance]:
    return [Instance(key, CT) for key in keys(count)]


def arrival(reference: int, key: InstanceKey, sha256: str = SHA256) -> ReceivedInstance:
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


# ---------------------------------------------------------------------- every cell of the tables


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
        ledger.instances.record_received({claim.reference: claim}, [arrival(claim.reference, key)])
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
            {claim.reference: claim}, [arrival(claim.reference, key)]
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


# ---------------------------------------------------------------------- cohorts and discovery


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


def test_rows_come_back_as_they_were_written(ledger):
    written = [
        CohortRow(2, "  0012", "A\0\x1a9", None, DateRange(date(2020, 1, 2), None), "CT\\MR", "é*"),
        CohortRow(3, "\udce4\udcf6", study_date=DateRange(None, None)),
        CohortRow(9, study_instance_uid="1.2.3", study_date=DateRange(None, date(999, 12, 31))),
        CohortRow(11, "1", patient_name="Müller^J\udcf6rg", patient_birth_date=date(1931, 2, 28)),
    ]
    cohort = ledger.cohorts.add(DIGEST, "main", written).number
    assert ledger.rows.to_discover(cohort) == written
    assert [row for row, _ in ledger.rows.with_verdicts(cohort)] == written


def test_studies_come_back_as_the_peer_sent_them(ledger):
    sent = Study(
        "1.2.3\0", "P\udcff", "\x1a0000", "2020010X", ("CT", "S\0R", "\udc80"), "ä\0", None, 0
    )
    near = replace(
        sent,
        patient_name="M\xfcller",
        patient_birth_date="1931",
        told=(("PatientSex", "O"),),
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


def test_a_row_is_discovered_until_its_discovery_has_ended(ledger):
    cohort = ledger.cohorts.add(DIGEST, "main", rows(5)).number
    ledger.rows.record_discoveries(
        cohort,
        [
            (2, [study(2)], None, ()),
            (3, (), "no-match", ()),
            (4, (), "several-patients", [study(4), study(5)]),
            (5, (), "pacs-refused", ()),
        ],
    )
    assert [row.line for row in ledger.rows.to_discover(cohort)] == [5, 6]
    assert [row.line for row in ledger.rows.to_discover(cohort, after_line=5)] == [6]
    assert [row.line for row in ledger.rows.to_discover(cohort, limit=1)] == [5]
    assert [(v.line, v.verdict, v.reason) for v in ledger.rows.verdicts(cohort)] == [
        (2, Verdict.PENDING, "interrupted"),
        (3, Verdict.NOT_FOUND, "no-match"),
        (4, Verdict.AMBIGUOUS, "several-patients"),
        (5, Verdict.FAILED, "pacs-refused"),
        (6, Verdict.PENDING, "interrupted"),
    ]


def test_recording_a_discovery_twice_changes_nothing(ledger):
    cohort = ledger.cohorts.add(DIGEST, "main", rows(1)).number
    for _ in range(2):
        ledger.rows.record_discoveries(cohort, [(2, [study(1), study(2), study(1)], None, ())])
    (verdict,) = ledger.rows.verdicts(cohort)
    assert len(verdict.studies) == len(list(ledger.studies.of_cohort(cohort))) == 2


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


# ---------------------------------------------------------------------- lists and instances


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
    ledger.instances.record_received({claim.reference: claim}, [arrival(claim.reference, twins[0])])
    assert states(ledger, claim.reference) == {
        twins[0]: InstanceState.RECEIVED,
        twins[1]: InstanceState.EXPECTED,
    }


def test_a_changed_list_changes_the_expected_set_and_loses_nothing_stored(ledger, run):
    claim = claimed(ledger, run)
    one, two, three, four = keys(4)
    ledger.instances.record_list(claim, listed(3), Evidence.INSTANCE_LIST)
    ledger.instances.record_received(
        {claim.reference: claim}, [arrival(claim.reference, key) for key in (one, two)]
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
    ledger.instances.record_received({claim.reference: claim}, [arrival(claim.reference, key)])
    ledger.instances.record_lost(claim, [key])
    ledger.instances.record_rejected(claim, [(key, "pixel-data-length")])
    again = ledger.instances.record_list(claim, listed(1), Evidence.INSTANCE_LIST)
    assert (again.added, again.removed) == (0, 0)
    assert states(ledger, claim.reference) == {key: InstanceState.REJECTED}
    ledger.instances.record_list(claim, listed(1), Evidence.INSTANCE_LIST, fresh=True)
    (record,) = ledger.instances.of_study(claim.reference)
    assert (record.state, record.reason, record.rejections) == (InstanceState.EXPECTED, None, 0)


def test_an_arrival_is_recorded_with_its_digest(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(2), Evidence.INSTANCE_LIST)
    one, _ = keys(2)
    assert (
        ledger.instances.record_received({claim.reference: claim}, [arrival(claim.reference, one)])
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


def test_arrivals_that_nobody_expects_are_handed_back(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(3), Evidence.INSTANCE_LIST)
    ledger.instances.record_received(
        {claim.reference: claim}, [arrival(claim.reference, keys(3)[2])]
    )
    ledger.instances.record_list(claim, listed(2), Evidence.INSTANCE_LIST)
    known, unlisted, withdrawn = keys(1)[0], InstanceKey("1.2.3.4", "1.999"), keys(3)[2]
    batch = [
        arrival(claim.reference, known),
        arrival(claim.reference, known, "cd" * 32),
        arrival(claim.reference, unlisted),
        arrival(claim.reference, withdrawn),
        arrival(claim.reference + 1, known),
    ]
    strangers = ledger.instances.record_received({claim.reference: claim}, batch)
    assert strangers == batch[2:]
    first = ledger.instances.of_study(claim.reference)[0]
    assert (first.state, first.sha256) == (InstanceState.RECEIVED, SHA256)


def test_an_instance_that_is_here_already_stays_as_it_is(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(2), Evidence.INSTANCE_LIST)
    mine = {claim.reference: claim}
    ledger.instances.record_received(mine, [arrival(claim.reference, key) for key in keys(2)])
    ledger.instances.record_stored(claim, [stored(keys(1)[0])])
    before = ledger.instances.of_study(claim.reference)
    again = [arrival(claim.reference, key, "cd" * 32) for key in keys(2)]
    assert ledger.instances.record_received(mine, again) == []
    assert ledger.instances.of_study(claim.reference) == before


def test_bytes_that_were_not_received_are_not_recorded_as_stored(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(1), Evidence.INSTANCE_LIST)
    (key,) = keys(1)
    ledger.instances.record_received({claim.reference: claim}, [arrival(claim.reference, key)])
    ledger.instances.record_stored(claim, [stored(key, sha256="cd" * 32)])
    assert states(ledger, claim.reference) == {key: InstanceState.RECEIVED}


def test_a_lost_instance_is_expected_again_and_remembers_its_last_arrival(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(2), Evidence.INSTANCE_LIST)
    key, other = keys(2)
    ledger.instances.record_received({claim.reference: claim}, [arrival(claim.reference, key)])
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


def test_a_study_is_archived_only_as_the_ledger_knows_it(ledger, run):
    claim = claimed(ledger, run)
    ledger.instances.record_list(claim, listed(3), Evidence.INSTANCE_LIST)
    one, two, three = keys(3)
    ledger.instances.record_received(
        {claim.reference: claim}, [arrival(claim.reference, key) for key in (one, two)]
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


def test_a_manifest_from_before_the_ledger_is_adopted_for_exactly_the_list(ledger, run):
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
        {claim.reference: claim}, [arrival(claim.reference, key) for key in (one, two)]
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
        {claim.reference: claim}, [arrival(claim.reference, key) for key in (one, two)]
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


def test_a_row_with_gaps_is_partial_when_what_was_found_is_archived(ledger, run):
    cohort = ledger.cohorts.add(DIGEST, "main", rows(3)).number
    gaps = ["20240305-20240306", "studies without a date"]
    ledger.rows.record_discoveries(
        cohort,
        [
            (2, [study(2)], "list-unproved", (), gaps),
            (3, [study(3)], "list-unproved", (), gaps),
            (4, (), "list-unproved", (), gaps),
        ],
    )

    def told() -> list[tuple[str, str]]:
        assert {v.gaps for v in ledger.rows.verdicts(cohort)} <= {tuple(gaps), ()}
        return [(str(v.verdict), v.reason) for v in ledger.rows.verdicts(cohort)]

    pending = ("pending", "interrupted")
    assert told() == [pending, pending, ("failed", "list-unproved")]
    first, second = ledger.claims.acquire(
        run, [s.reference for s in ledger.studies.to_pull(cohort)]
    )
    ledger.instances.record_list(first, [], Evidence.INSTANCE_LIST)
    ledger.studies.record_archived(first, b"{}", instances=0, withheld=0, size_bytes=0)
    ledger.studies.record_failed(second, "pacs-busy")
    partial, failed = ("partial", "list-unproved"), ("failed", "list-unproved")
    assert told() == [partial, failed, failed]
    assert ledger.progress.totals(cohort).unproved == Counter({gap: 3 for gap in gaps})
    # A rerun asks again. Until the PACS has answered, nothing is whole, and nothing is forgotten.
    assert ledger.cohorts.reopen(cohort).rows == 3
    assert told()[0] == partial
    ledger.rows.record_discoveries(cohort, [(2, (), "association-lost", ())])
    (row, *_) = ledger.rows.verdicts(cohort)
    assert (str(row.verdict), row.studies) == ("failed", (first.reference,))
    ledger.rows.record_discoveries(cohort, [(2, [study(2)], None, ())])
    assert told()[0] == ("archived", "all-archived")


CT_ONLY = Selection(
    studies=(Filter("StudyDate", dates=DateRange(date(2024, 1, 1), None)),),
    series=(Filter("Modality", any_of=(Pattern("CT"), Pattern("P\u0142", regex=True))),),
    excluded=frozenset({Excluded("P1", None, "1.2"), Excluded(accession_number="A")}),
    per_patient=PerPatient(2, latest=False),
)


def test_a_cohort_keeps_what_it_wants_of_what_its_rows_find(ledger):
    cohort = ledger.cohorts.add(DIGEST, "main", rows(1), selection=CT_ONLY)
    assert cohort.selection == 'Modality is "CT" or regex "P\u0142"'
    assert ledger.cohorts.get(cohort.name) == cohort
    assert ledger.cohorts.selection(cohort.number) == CT_ONLY
    plain = ledger.cohorts.add("e" * 64, "main", rows(1))
    assert (plain.selection, ledger.cohorts.selection(plain.number)) == ("", WHOLE)


def test_a_study_is_listed_with_one_selection_and_other_cohorts_leave_it_alone(ledger, run):
    ct = ledger.cohorts.add(DIGEST, "main", rows(2), selection=CT_ONLY)
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

    def told(cohort) -> tuple[str, str]:
        first, _ = ledger.rows.verdicts(cohort.number)
        return str(first.verdict), first.reason

    assert told(ct) == ("pending", "interrupted")
    assert told(whole) == ("failed", "selected-otherwise")
    (claim,) = ledger.claims.acquire(run, [record.reference], ct.selection)
    ledger.studies.record_failed(claim, "pacs-busy")
    # Not even a rerun of the other cohort touches it.
    assert ledger.cohorts.reopen(whole.number).studies == 0
    assert ledger.cohorts.reopen(ct.number).studies == 1
    totals = [ledger.progress.totals(cohort.number) for cohort in (ct, whole)]
    assert [each.studies for each in totals] == [{"pending": 1}, {"failed": 1}]
    assert [each.expected for each in totals] == [2, 0]


def test_no_more_of_a_patient_is_taken_than_a_cohort_wants(ledger, run):
    cohort = ledger.cohorts.add(DIGEST, "main", rows(4)).number
    found = [
        replace(study(line), patient_id=patient, study_date=day)
        for line, patient, day in (
            (2, "P1", "20240101"),
            (3, "P1", "20240301"),
            (4, "P1", "20240201"),
            (5, "P2", "20240101"),
        )
    ]
    ledger.rows.record_discoveries(
        cohort, [(line, [each], None, ()) for line, each in enumerate(found, 2)]
    )

    def taken() -> list[str]:
        return [record.study.study_instance_uid for record in ledger.studies.to_pull(cohort)]

    def uids(*lines: int) -> list[str]:
        return [f"1.2.3.{line}" for line in lines]

    assert ledger.rows.limit_per_patient(cohort, PerPatient(1)) == 2
    assert taken() == uids(3, 5)
    assert [v.reason for v in ledger.rows.verdicts(cohort)][::2] == ["beyond-the-maximum"] * 2
    assert [len(v.studies) for v in ledger.rows.verdicts(cohort)] == [0, 1, 0, 1]
    assert ledger.progress.totals(cohort).studies == {"pending": 2}
    assert ledger.progress.totals(cohort).rows == {"excluded": 2, "pending": 2}
    # Decided anew, by all that is known then.
    assert ledger.rows.limit_per_patient(cohort, PerPatient(2)) == 1
    assert taken() == uids(3, 4, 5)
    assert ledger.rows.limit_per_patient(cohort, PerPatient(1, latest=False)) == 2
    assert taken() == uids(2, 5)
    # A row with one study that is taken is judged by that.
    ledger.rows.record_discoveries(cohort, [(2, found[:2], None, ())])
    ledger.rows.limit_per_patient(cohort, PerPatient(1))
    first = next(iter(ledger.rows.verdicts(cohort)))
    assert (str(first.verdict), len(first.studies)) == ("pending", 1)


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


# ---------------------------------------------------------------------- reruns


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
        {claim.reference: claim}, [arrival(claim.reference, keys(1)[0])]
    )
    ledger.instances.record_stored(claim, [stored(keys(1)[0])])
    ledger.studies.record_failed(claim, "instances-missing", "detail")
    before = ledger.instances.of_study(claim.reference)
    cohort = ledger.cohorts.all()[0].number
    assert ledger.cohorts.reopen(cohort).studies == 1
    record = ledger.studies.get(claim.reference)
    assert (record.state, record.reason, record.detail) == (StudyState.PENDING, None, "")
    assert ledger.instances.of_study(claim.reference) == before


# ---------------------------------------------------------------------- reading


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
            {claim.reference: claim}, [arrival(claim.reference, key) for key in (one, two)]
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


def test_the_threads_of_a_run_share_one_ledger(ledger, run):
    claims = claims_of(ledger, run, 8)
    failures = []

    def work(claim: Claim) -> None:
        try:
            ledger.instances.record_list(claim, listed(50), Evidence.INSTANCE_LIST)
            for key in keys(50):
                ledger.instances.record_received(
                    {claim.reference: claim}, [arrival(claim.reference, key)]
                )
            ledger.instances.record_stored(claim, [stored(key) for key in keys(50)])
            ledger.studies.record_archived(
                claim, b"{}", instances=50, withheld=0, size_bytes=50_000
            )
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(claim,)) for claim in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    totals = ledger.progress.totals(ledger.cohorts.all()[0].number)
    assert totals.stored == 400
    assert totals.studies == Counter({StudyState.ARCHIVED: 8})


def test_what_was_written_is_there_when_the_ledger_is_opened_again(url):
    with Ledger.open(url) as ledger, ledger.runs.begin("pull") as run:
        claim = claimed(ledger, run)
        ledger.instances.record_list(claim, listed(2), Evidence.INSTANCE_LIST)
        before = ledger.instances.of_study(claim.reference)
    with Ledger.open(url) as ledger:
        assert ledger.instances.of_study(claim.reference) == before
        assert ledger.studies.get(claim.reference).claimed is False


# ---------------------------------------------------------------------- schema and trouble


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
            _execute_in(ledger, impossible)
        assert error.value.code == "ledger-unavailable"


@translate_database_errors
def _execute_in(ledger: Ledger, statement: str) -> None:
    with ledger._database.write() as connection:
        connection.execute(text(statement))


def test_an_error_of_the_database_says_nothing_of_patients(ledger):
    twice = [CohortRow(line=2, patient_id="SECRET-MRN"), CohortRow(line=2, patient_id="SECRET-MRN")]
    with pytest.raises(LedgerError) as error:
        ledger.cohorts.add(DIGEST, "main", twice)
    assert error.value.code == "ledger-unavailable"
    assert error.value.__context__ is None
    assert "SECRET" not in str(error.value)
    assert error.value.detail in {
        "the database answered SQLITE_CONSTRAINT_PRIMARYKEY",
        "the database answered 23505",
    }


@pytest.mark.parametrize(
    "bad",
    [
        "postgresql+psycopg://me:S3CRET@127.0.0.1:1/ledger",
        "mysql://me:S3CRET@127.0.0.1/ledger",
        "not a url S3CRET",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:////dev/null/S3CRET/ledger.db",
    ],
)
def test_a_ledger_that_cannot_be_opened_is_an_error_without_its_url(bad):
    with pytest.raises(LedgerError) as error:
        Ledger.open(bad)
    assert error.value.code == "ledger-unavailable"
    assert "S3CRET" not in str(error.value)
    assert error.value.__context__ is None


def test_the_file_of_a_ledger_is_its_owners_alone(tmp_path):
    path = tmp_path / "new" / "ledger.db"
    before = os.umask(0)
    try:
        with Ledger.open(f"sqlite:///{path}") as ledger, ledger.runs.begin("pull"):
            ledger.cohorts.add(DIGEST, "main", rows(1))
            for entry in [path.parent, *path.parent.rglob("*")]:
                assert stat.S_IMODE(entry.stat().st_mode) & 0o077 == 0, entry
    finally:
        os.umask(before)


def test_a_file_that_is_open_to_others_is_refused(tmp_path):
    path = tmp_path / "ledger.db"
    Ledger.open(f"sqlite:///{path}").close()
    path.chmod(0o640)
    with pytest.raises(LedgerError) as error:
        Ledger.open(f"sqlite:///{path}")
    assert error.value.code == "ledger-unsafe"


@pytest.mark.campaign("ledger")
def test_a_file_that_is_no_ledger_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "ledger.db"
    path.write_bytes(b"patients, patients, patients" * 100)
    path.chmod(0o600)
    with pytest.raises(LedgerError) as error:
        Ledger.open(f"sqlite:///{path}")
    assert error.value.detail == "the database answered SQLITE_NOTADB"
    assert path.read_bytes() == b"patients, patients, patients" * 100


@pytest.mark.campaign("ledger")
def test_a_committed_write_survives_the_loss_of_power(tmp_path):
    path = tmp_path / "ledger.db"
    with Ledger.open(f"sqlite:///{path}") as ledger, ledger._database.read() as connection:
        settings = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    full = 2
    assert settings == {
        "journal_mode": "wal",
        "synchronous": full,
        "foreign_keys": 1,
        "busy_timeout": 90_000,
    }


@pytest.mark.campaign("ledger")
def test_a_writer_waits_for_another_program_that_has_the_file(tmp_path):
    path = tmp_path / "ledger.db"
    with Ledger.open(f"sqlite:///{path}") as ledger:
        other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        other.execute("BEGIN IMMEDIATE")
        added = []
        thread = threading.Thread(
            target=lambda: added.append(ledger.cohorts.add(DIGEST, "main", rows(1)))
        )
        thread.start()
        assert ledger.cohorts.all() == []
        other.execute("COMMIT")
        thread.join()
        other.close()
        assert ledger.cohorts.all() == added


@pytest.mark.campaign("ledger")
def test_a_server_that_ended_the_connections_is_asked_again(tmp_path):
    with Ledger.open(ledger_url("postgresql", tmp_path)) as ledger:
        ledger.cohorts.add(DIGEST, "main", rows(1))
        with cluster().connect() as administrator:
            administrator.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'prefect-dicom'"
            )
        assert len(ledger.cohorts.all()) == 1


def test_a_reader_does_not_wait_for_a_writer(ledger):
    ledger.cohorts.add(DIGEST, "main", rows(1))

    def slow():
        assert len(ledger.cohorts.all()) == 1
        yield from rows(1)

    ledger.cohorts.add("e" * 64, "main", slow())
    assert len(ledger.cohorts.all()) == 2


def test_the_ledger_is_found_by_every_name_of_its_file(tmp_path):
    real = tmp_path / "real.db"
    link = tmp_path / "link.db"
    with Ledger.open(f"sqlite:///{real}") as one:
        link.symlink_to(real)
        with Ledger.open(f"sqlite:///{link}") as two, one.runs.begin("pull") as run:
            claim = claimed(one, run)
            assert two.claims.live() == [claim]
    assert not Path(f"{link}.runs").exists()


# ------------------------------------------------------------------------------- large ledgers


@pytest.mark.needs("time")
def test_totals_count_the_verdicts_that_the_rows_have(ledger, run):
    """They are counted by the database, most of them without a look at the row."""
    lot = random.Random(7)
    lines = range(2, 202)
    kinds = ["pending", "listed", "archived", "withheld", "failed", "half", "archived"]
    # Of each patient some studies, of which the cohort takes two.
    found = [replace(study(n), patient_id=f"P{n % 9}") for n in range(40)]
    cohort = ledger.cohorts.add(DIGEST, "main", [CohortRow(line) for line in lines]).number
    other = ledger.cohorts.add("e" * 64, "main", [CohortRow(2)], selection=CT_ONLY)
    for line in lines:
        of_row = lot.sample(found, lot.choice([0, 1, 1, 1, 2, 3]))
        reason = lot.choice([None, None, None, "filter-undecided", "list-unproved"])
        gaps = ("2024",) if reason == "list-unproved" else ()
        if not of_row:
            reason = lot.choice([None, "no-match", "several-patients", "pacs-failure"])
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
        if kind in ("archived", "withheld", "half"):
            ledger.instances.record_received(
                {record.reference: claim}, [arrival(record.reference, key)]
            )
            ledger.instances.record_stored(claim, [stored(key)])
            ledger.instances.record_rejected(claim, [(faulty, "pixel-data-length")])
        if kind in ("failed", "half"):
            ledger.studies.record_failed(claim, "instances-missing")
        elif kind != "listed":
            withheld = int(kind == "withheld")
            if not withheld:
                ledger.instances.record_list(
                    claim, listed(1), Evidence.INSTANCE_LIST, selection=with_series
                )
            ledger.studies.record_archived(
                claim, b"{}", instances=1, withheld=withheld, size_bytes=1000
            )
    for number in (cohort, other.number):
        verdicts = list(ledger.rows.verdicts(number))
        totals = ledger.progress.totals(number)
        assert totals.rows == Counter(verdict.verdict for verdict in verdicts)
        assert totals.unproved == Counter(gap for verdict in verdicts for gap in verdict.gaps)
    assert len({verdict.verdict for verdict in ledger.rows.verdicts(cohort)}) == len(Verdict)


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
