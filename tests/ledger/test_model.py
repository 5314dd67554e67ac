"""Whatever runs do, in whatever order, the ledger says what a dictionary would."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from prefect_dicom.core.errors import ClaimLost, LedgerError
from prefect_dicom.core.model import (
    ArchivedInstance,
    CohortRow,
    Disposition,
    Evidence,
    Instance,
    InstanceKey,
    InstanceState,
    ReceivedInstance,
    Study,
    StudyState,
)
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.core.transitions import INSTANCE_TRANSITIONS, STUDY_TRANSITIONS
from prefect_dicom.ledger import Claim, Ledger
from tests.support.postgres import cluster, ledger_url

EXPECTED, RECEIVED, STORED, REJECTED = InstanceState
LINES = (2, 3, 4)
KEYS = [InstanceKey(f"1.2.{series}", f"1.3.{number}") for series in "12" for number in "12"]
SHA256 = "ab" * 32

numbers = st.integers(0, 10**6)
chosen_keys = st.sets(st.sampled_from(KEYS), min_size=1) | st.just(set())


@dataclass
class ModelStudy:
    """What the model knows of one study."""

    state: StudyState = StudyState.PENDING
    reason: str | None = None
    holder: int | None = None
    attempt: int = 0
    instances: dict[InstanceKey, InstanceState] = field(default_factory=dict)
    withdrawn: set[InstanceKey] = field(default_factory=set)
    archived: int = 0

    def move(self, state: StudyState) -> None:
        assert state in STUDY_TRANSITIONS[self.state]
        self.state = state

    def move_instance(self, key: InstanceKey, state: InstanceState) -> None:
        assert state in INSTANCE_TRANSITIONS[self.instances[key]]
        self.instances[key] = state
        self.withdrawn.discard(key)


class LedgerMachine(RuleBasedStateMachine):
    """Up to three runs of two ledger objects, claims old and new, three studies."""

    kind = "sqlite"

    def __init__(self) -> None:
        super().__init__()
        self.resources = ExitStack()
        directory = self.resources.enter_context(tempfile.TemporaryDirectory())
        self.url = ledger_url(self.kind, Path(directory))
        self.ledgers = [self.resources.enter_context(Ledger.open(self.url)) for _ in range(2)]
        ledger = self.ledgers[0]
        self.cohort = ledger.cohorts.add("d" * 64, "main", map(CohortRow, LINES)).number
        ledger.rows.record_discoveries(
            self.cohort, [(line, [Study(f"1.2.{line}")], None, ()) for line in LINES]
        )
        self.model = {
            record.reference: ModelStudy() for record in ledger.studies.of_cohort(self.cohort)
        }
        self.runs: list[tuple[Ledger, object, ExitStack]] = []
        self.claims: list[Claim] = []
        # In the middle of the work, where the most can happen.
        self.begin_a_run(0)
        self.claim(0, {1, 2, 3})
        for number in range(2):
            self.list_instances(number, set(KEYS), False)
        self.receive(0, set(KEYS))
        self.store(0, set(KEYS[:2]))

    def teardown(self) -> None:
        for _, _, stack in self.runs:
            stack.close()
        self.resources.close()
        if self.kind == "postgresql":
            database = self.url.split("@/")[1].split("?")[0]
            with cluster().connect() as administrator:
                administrator.execute(f"DROP DATABASE {database} WITH (FORCE)")

    # --- what is true of the model

    def stands(self, claim: Claim) -> bool:
        study = self.model[claim.reference]
        return (study.holder, study.attempt) == (claim.run, claim.attempt)

    def write(self, number: int, verb) -> ModelStudy | None:
        """Let the verb write for one of the claims; the study, where the claim stands.

        Three times out of four it is one that stands, if there is any.
        """
        standing = [claim for claim in self.claims if self.stands(claim)]
        candidates = standing if standing and number % 4 else self.claims
        claim = candidates[number % len(candidates)]
        ledger = self.ledgers[number % 2]
        if self.stands(claim):
            verb(ledger, claim)
            return self.model[claim.reference]
        with pytest.raises(ClaimLost):
            verb(ledger, claim)
        return None

    # --- runs and claims

    @precondition(lambda self: len(self.runs) < 3)
    @rule(which=st.sampled_from([0, 1]))
    def begin_a_run(self, which: int) -> None:
        stack = ExitStack()
        ledger = self.ledgers[which]
        self.runs.append((ledger, stack.enter_context(ledger.runs.begin("pull")), stack))

    @precondition(lambda self: self.claims)
    @rule(number=numbers)
    def end_a_run(self, number: int) -> None:
        if not self.runs:
            return
        _, run, stack = self.runs.pop(number % len(self.runs))
        stack.close()
        for study in self.model.values():
            if study.holder == run.number:
                study.holder = None

    @precondition(lambda self: self.runs)
    @rule(number=numbers, some=st.sets(st.sampled_from([1, 2, 3]), min_size=1))
    def claim(self, number: int, some: set[int]) -> None:
        ledger, run, _ = self.runs[number % len(self.runs)]
        free = [
            reference
            for reference in sorted(some)
            if self.model[reference].holder is None
            and self.model[reference].state in (StudyState.PENDING, StudyState.LISTED)
        ]
        claims = ledger.claims.acquire(run, list(some))
        assert [claim.reference for claim in claims] == free
        for claim in claims:
            study = self.model[claim.reference]
            study.holder, study.attempt = run.number, study.attempt + 1
            assert (claim.attempt, claim.state) == (study.attempt, study.state)
        self.claims = (self.claims + claims)[-4:]

    @precondition(lambda self: self.claims)
    @rule(number=numbers)
    def release(self, number: int) -> None:
        claim = self.claims[number % len(self.claims)]
        if self.stands(claim):
            self.model[claim.reference].holder = None
        self.ledgers[number % 2].claims.release([claim])

    # --- writing

    @precondition(lambda self: self.claims)
    @rule(number=numbers, listed=chosen_keys, fresh=st.booleans())
    def list_instances(self, number: int, listed: set[InstanceKey], fresh: bool) -> None:
        changes = []
        study = self.write(
            number,
            lambda ledger, claim: changes.append(
                ledger.instances.record_list(
                    claim, [Instance(key) for key in listed], Evidence.INSTANCE_LIST, fresh=fresh
                )
            ),
        )
        if study is None:
            return
        study.move(StudyState.LISTED)
        added = {k for k in listed if k not in study.instances or k in study.withdrawn}
        removed = set(study.instances) - listed - study.withdrawn
        for key in removed:
            if study.instances[key] is EXPECTED:
                del study.instances[key]
            else:
                study.instances[key] = REJECTED
                study.withdrawn.add(key)
        for key in listed:
            if key not in study.instances:
                study.instances[key] = EXPECTED
            elif key in study.withdrawn or (fresh and study.instances[key] is REJECTED):
                study.move_instance(key, EXPECTED)
        (change,) = changes
        assert (change.added, change.removed, change.total) == (
            len(added),
            len(removed),
            len(listed),
        )

    @precondition(lambda self: self.claims)
    @rule(number=numbers, keys=chosen_keys)
    def receive(self, number: int, keys: set[InstanceKey]) -> None:
        if not keys:
            return
        strangers = []

        def verb(ledger: Ledger, claim: Claim) -> None:
            batch = [
                ReceivedInstance(
                    claim.reference, key, "1.2", "1.2.840.10008.1.2.1", SHA256, 7, SHA256
                )
                for key in sorted(keys)
            ]
            strangers.extend(ledger.instances.record_received({claim.reference: claim}, batch))

        study = self.write(number, verb)
        if study is None:
            return
        unlisted = {k for k in keys if k not in study.instances or k in study.withdrawn}
        assert {arrival.key for arrival in strangers} == unlisted
        for key in keys - unlisted:
            if study.instances[key] is EXPECTED:
                study.move_instance(key, RECEIVED)

    @precondition(lambda self: self.claims)
    @rule(number=numbers, keys=chosen_keys)
    def lose(self, number: int, keys: set[InstanceKey]) -> None:
        study = self.write(number, lambda ledger, claim: ledger.instances.record_lost(claim, keys))
        for key in keys if study else ():
            if study.instances.get(key) in (RECEIVED, STORED):
                study.move_instance(key, EXPECTED)

    @precondition(lambda self: self.claims)
    @rule(number=numbers, keys=chosen_keys)
    def reject(self, number: int, keys: set[InstanceKey]) -> None:
        study = self.write(
            number,
            lambda ledger, claim: ledger.instances.record_rejected(
                claim, [(key, "pixel-data-length") for key in keys]
            ),
        )
        for key in keys if study else ():
            if study.instances.get(key) in (EXPECTED, RECEIVED):
                study.move_instance(key, REJECTED)

    @precondition(lambda self: self.claims)
    @rule(number=numbers, keys=chosen_keys)
    def store(self, number: int, keys: set[InstanceKey]) -> None:
        study = self.write(
            number,
            lambda ledger, claim: ledger.instances.record_stored(
                claim, [(key, ArchivedInstance("key", SHA256, 7), ()) for key in keys]
            ),
        )
        for key in keys if study else ():
            if study.instances.get(key) is RECEIVED:
                study.move_instance(key, STORED)

    @precondition(lambda self: self.claims)
    @rule(number=numbers, complete=st.booleans())
    def archive(self, number: int, complete: bool) -> None:
        if complete:
            self.receive(number, set(KEYS))
            self.store(number, set(KEYS))
        refusals = []

        def verb(ledger: Ledger, claim: Claim) -> None:
            counts = list(self.listed_states(self.model[claim.reference]))
            try:
                ledger.studies.record_archived(
                    claim,
                    b"{}",
                    instances=counts.count(STORED),
                    withheld=counts.count(REJECTED),
                    size_bytes=7 * counts.count(STORED),
                )
            except LedgerError as error:
                refusals.append(error.code)

        study = self.write(number, verb)
        if study is None:
            return
        states = list(self.listed_states(study))
        if study.state is not StudyState.LISTED or EXPECTED in states or RECEIVED in states:
            assert refusals == ["instances-missing"]
            return
        assert refusals == []
        study.move(StudyState.ARCHIVED)
        study.archived, study.holder = states.count(STORED), None

    @precondition(lambda self: self.claims)
    @rule(number=numbers, code=st.sampled_from(["pacs-busy", "instance-list-empty"]))
    def fail(self, number: int, code: str) -> None:
        study = self.write(number, lambda ledger, claim: ledger.studies.record_failed(claim, code))
        if study is not None:
            study.move(StudyState.FAILED)
            study.reason, study.holder = code, None

    @rule(
        number=numbers,
        codes=st.sets(st.sampled_from(["pacs-busy", "instance-list-empty"])),
        lines=st.sets(st.sampled_from(LINES)),
    )
    def reopen(self, number: int, codes: set[str], lines: set[int]) -> None:
        reopened = self.ledgers[number % 2].cohorts.reopen(self.cohort, reasons=codes, lines=lines)
        count = 0
        for line, study in zip(LINES, self.model.values(), strict=True):
            named = study.reason in codes if codes else self.can_help(study.reason)
            if study.state is StudyState.FAILED and named and (not lines or line in lines):
                study.move(StudyState.PENDING)
                study.reason = None
                count += 1
        assert (reopened.studies, reopened.rows) == (count, 0)

    @staticmethod
    def can_help(code: str | None) -> bool:
        return code is not None and reason_for(code).disposition is not Disposition.PERMANENT

    @staticmethod
    def listed_states(study: ModelStudy):
        return (state for key, state in study.instances.items() if key not in study.withdrawn)

    # --- what must always be so

    @invariant()
    def the_ledger_says_what_the_model_says(self) -> None:
        ledger = self.ledgers[0]
        for record in ledger.studies.of_cohort(self.cohort):
            study = self.model[record.reference]
            assert (record.state, record.reason, record.attempt, record.claimed) == (
                study.state,
                study.reason,
                study.attempt,
                study.holder is not None,
            )
            if study.state is StudyState.ARCHIVED:
                assert record.stored == study.archived
                continue
            states = list(self.listed_states(study))
            assert (record.expected, record.received, record.stored, record.withheld) == (
                len(states),
                states.count(RECEIVED),
                states.count(STORED),
                states.count(REJECTED),
            )
            assert study.instances == {
                i.key: i.state for i in ledger.instances.of_study(record.reference)
            }

    @invariant()
    def no_study_has_two_claims(self) -> None:
        live = self.ledgers[1].claims.live()
        assert {claim.reference: claim.run for claim in live} == {
            reference: study.holder
            for reference, study in self.model.items()
            if study.holder is not None
        }
        assert len({claim.reference for claim in live}) == len(live)


class PostgresqlMachine(LedgerMachine):
    """The same, on PostgreSQL."""

    kind = "postgresql"


_bounded = settings(
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def _some_examples(request: pytest.FixtureRequest, scale) -> None:
    """All of them in the campaign, fewer otherwise."""
    number = scale(3, 6) if request.cls is TestOnPostgresql else scale(8, 20)
    request.cls.settings = settings(_bounded, max_examples=number)


TestOnSqlite = LedgerMachine.TestCase
TestOnSqlite.pytestmark = [pytest.mark.needs("time"), pytest.mark.campaign("ledger model")]


@pytest.mark.campaign("ledger model")
class TestOnPostgresql(PostgresqlMachine.TestCase):
    """Skipped without a server, before hypothesis begins."""

    def setUp(self) -> None:
        cluster()
