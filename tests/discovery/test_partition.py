"""A PACS that stops in the middle of a list hides no study: all are found, or the gap is named.

:data:`MATRIX` is every limit of answers, announced or not, with whatever else goes wrong beside
it, for a patient with many studies and for all studies of a month. The truth is computed from
what the PACS holds by a rule of its own.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import pytest

from prefect_dicom.cohort.row_matching import Discovery
from prefect_dicom.config.node import PacsNode
from prefect_dicom.core.model import CohortRow, DateRange
from prefect_dicom.discovery.row_query import StudyQueryCapabilities, discover
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.testing import Behaviour, ScriptedPacs, StoredInstance, tiny_instances
from tests.support.campaign import subset

pytestmark = pytest.mark.campaign("PACS: discovery")

PATIENT = "000123"
FEBRUARY = DateRange(date(2024, 2, 1), date(2024, 2, 29))

# ------------------------------------------------------------------------------ what the PACS holds


def study(number: int, **attributes: str) -> StoredInstance:
    """A study of one object, of which only what a query can ask for matters."""
    made = next(tiny_instances(1, seed=number))
    its = {**made.attributes, "PatientID": f"P{number}", **attributes}
    return StoredInstance(its, made.transfer_syntax_uid, made.encoded)


def archive(
    many: int, *, seed: int, undated: int = 0, days: int = 2000, patients: Sequence[str] = ()
) -> list[StoredInstance]:
    """So many studies of one patient and in one February, between others and in any order."""
    lots = random.Random(seed)
    made = []
    for number in range(2 * many + many // 3):
        day = date(2019, 1, 1) + timedelta(days=lots.randrange(days))
        patient = PATIENT
        if number >= many:
            patient = f"{lots.choice('019AKZ')}{lots.choice(['', '000123', 'x'])}{number}"
            if number < 2 * many:
                day = date(2024, 2, 1) + timedelta(days=lots.randrange(29))
        made.append(
            study(
                seed * 10_000 + number,
                PatientID=patient,
                StudyDate="" if number < undated else f"{day:%Y%m%d}",
                Modality=lots.choice(["CT", "CT", "MR", "CR", "US", "OT"]),
                AccessionNumber=f"{lots.choice('ABZ7')}{number:05d}",
            )
        )
    lots.shuffle(made)
    return made


ROWS = {
    "patient": CohortRow(2, patient_id=PATIENT),
    "month": CohortRow(1, study_date=FEBRUARY),
}


def truth(held: Sequence[StoredInstance], row: CohortRow) -> dict[str, str]:
    """The row's studies: UID to StudyDate."""
    studies = {o.study_instance_uid: o.attributes for o in held}
    if row.patient_id is not None:
        wanted = {uid: a for uid, a in studies.items() if a["PatientID"] == row.patient_id}
    else:
        wanted = studies
    if row.study_date is not None:
        first, last = (f"{d:%Y%m%d}" for d in (row.study_date.first, row.study_date.last))
        wanted = {uid: a for uid, a in wanted.items() if first <= a["StudyDate"] <= last}
    return {uid: a["StudyDate"] for uid, a in wanted.items()}


def is_in_a_gap(day: str, gaps: Sequence[str]) -> bool:
    for gap in gaps:
        window = gap.split()[0]
        if gap == "studies of any date" or (not day and gap == "studies without a date"):
            return True
        if day and window[0].isdigit():
            first, _, last = window.partition("-")
            if first <= day <= (last or first):
                return True
    return False


# -------------------------------------------------------------------------------------- the matrix


@dataclass(frozen=True)
class Case:
    cap: int
    status: int
    fault: str
    row: str

    def __str__(self) -> str:
        reported = f"{self.status:04X}" if self.status else "unannounced"
        return f"{self.row}, {self.cap} {reported}, {self.fault}"


FAULTS: dict[str, list[Behaviour]] = {
    "clean": [],
    "PatientID ignored": [("find.ignore_keys", {"keys": ["PatientID"]})],
    "StudyDate ignored": [("find.ignore_keys", {"keys": ["StudyDate"]})],
    "ModalitiesInStudy ignored": [("find.ignore_keys", {"keys": ["ModalitiesInStudy"]})],
    "all ignored": [
        (
            "find.ignore_keys",
            {"keys": ["StudyDate", "ModalitiesInStudy", "PatientID", "AccessionNumber"]},
        )
    ],
    "substrings": [("find.substring", {"keys": ["PatientID"]})],
    "a day later": [("find.date_shift", {"days": 1, "answered": False})],
    "a day earlier": [("find.date_shift", {"days": -1, "answered": False})],
    "ranges without their ends": [("find.date_ends", {})],
    "undated": [],
    "duplicates": [("find.duplicate", {})],
    "duplicates of the cut list": [("find.duplicate", {})],
    "the latest hidden": [],
    "nothing by StudyDate": [("find.unsupported_key", {"keys": ["StudyDate"]})],
}
STUDIES = {10: 47, 100: 250, 500: 1100}
MATRIX = [
    Case(cap, status, fault, row)
    for cap, status, fault, row in itertools.product(
        STUDIES, (0xFE00, 0xA700, 0xB001, 0), FAULTS, ROWS
    )
    if (fault, row) != ("nothing by StudyDate", "month")
]
BY_DEFAULT = [
    Case(10, 0, "undated", "patient"),
    Case(10, 0xFE00, "clean", "month"),
    Case(10, 0, "StudyDate ignored", "patient"),
    Case(10, 0, "duplicates", "month"),
    Case(10, 0xA700, "ranges without their ends", "month"),
    Case(10, 0, "a day later", "month"),
    Case(10, 0xB001, "substrings", "month"),
    Case(10, 0, "all ignored", "patient"),
]
WITHOUT_GAPS = {
    "clean",
    "ModalitiesInStudy ignored",
    "substrings",
    "a day later",
    "a day earlier",
    "ranges without their ends",
    "undated",
    "duplicates",
    "duplicates of the cut list",
    "the latest hidden",
}
"""Faults beside which every list can still be had in parts."""
_told: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="module", autouse=True)
def matrix(request) -> Iterator[None]:
    """Prints what was found, missed and unproved beside each fault."""
    yield
    faults = sorted({fault for fault, _ in _told})
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{'':28}{'studies':>9}{'found':>9}{'missed':>9}{'unproved':>9}{'queries':>9}")
        for fault in faults:
            figures = "".join(
                f"{_told[fault, name]:>9,}"
                for name in ("studies", "found", "missed", "unproved", "queries")
            )
            print(f"{fault:28}{figures}")


def script_of(case: Case) -> list[Behaviour]:
    order = "StudyDate" if case.fault == "the latest hidden" else ""
    cap = Behaviour("find.cap", answers=case.cap, status=case.status, order=order)
    others = [Behaviour(knob, **arguments) for knob, arguments in FAULTS[case.fault]]
    return [cap, *others] if case.fault.endswith("cut list") else [*others, cap]


def ask(
    held: Sequence[StoredInstance],
    script: Sequence[Behaviour],
    rows: Sequence[CohortRow],
    capabilities: StudyQueryCapabilities | None = None,
) -> tuple[list[Discovery], list[dict[str, str]]]:
    """What rows find, and the keys of all queries that it took."""
    capabilities = capabilities or StudyQueryCapabilities()
    with ScriptedPacs(instances=held, script=script) as pacs:
        node = PacsNode(host="127.0.0.1", port=pacs.port, called_ae_title=pacs.ae_title)
        with Requestor(node) as requestor:
            found = [discover(requestor, row, capabilities) for row in rows]
        return found, [
            {k: v for k, v in request.keys.items() if v} for request in pacs.requests("C-FIND")
        ]


@pytest.mark.parametrize("case", subset(MATRIX, BY_DEFAULT), ids=str)
@pytest.mark.needs("time")
def test_every_study_is_found_or_its_days_are_named(case, seed):
    undated = 7 if case.fault == "undated" else 0
    held = archive(STUDIES[case.cap], seed=seed % 1000, undated=undated)
    row = ROWS[case.row]
    (found,), queries = ask(held, script_of(case), [row])
    wanted = truth(held, row)
    there = {s.study_instance_uid for s in found.studies}
    absent = {uid: day for uid, day in wanted.items() if uid not in there}
    unproved = {uid for uid, day in absent.items() if is_in_a_gap(day, found.gaps)}
    figures = {
        "studies": len(wanted),
        "found": len(there),
        "missed": len(absent) - len(unproved),
        "unproved": len(unproved),
        "queries": len(queries),
    }
    for name, number in figures.items():
        _told[case.fault, name] += number
    assert there <= wanted.keys()
    assert absent.keys() == unproved, (figures, found.gaps)
    assert found.reason == ("list-unproved" if found.gaps else None)
    if case.fault in WITHOUT_GAPS:
        assert not absent and not found.gaps, (figures, found.gaps)


# -------------------------------------------------------------------------------- and what it costs


@pytest.mark.needs("time")
def test_ordinary_rows_cost_next_to_nothing_more(scale):
    patients = scale(60, 1000)
    lots = random.Random(5)
    numbers = itertools.count()
    held = [
        study(
            next(numbers),
            PatientID=f"P{patient}",
            StudyDate=f"{date(2019, 1, 1) + timedelta(days=lots.randrange(2000)):%Y%m%d}",
        )
        for patient in range(patients)
        for _ in range(1 + int(lots.expovariate(1 / 3)))
    ]
    rows = [CohortRow(2 + number, patient_id=f"P{number}") for number in range(patients)]
    found, queries = ask(held, [], rows)
    assert sum(len(one.studies) for one in found) == len(held)
    assert not any(one.gaps for one in found)
    # Some patients have ten studies and more, and the longest list so far is proved each time.
    assert max(len(one.studies) for one in found) > 10
    assert len(queries) - len(rows) <= 12


def test_patients_with_as_many_studies_as_each_other_are_proved_once():
    held = [
        study(n, PatientID=f"P{n // 12}", StudyDate=f"2020{n % 12 + 1:02}01", AccessionNumber="")
        for n in range(120)
    ]
    rows = [CohortRow(2 + number, patient_id=f"P{number}") for number in range(10)]
    found, queries = ask(held, [], rows)
    assert [(len(one.studies), one.gaps) for one in found] == [(12, ())] * 10
    assert len(queries) - len(rows) <= 4


@pytest.mark.needs("time")
def test_a_cap_that_was_shown_is_known_for_the_next_row():
    held = archive(60, seed=3)
    script = [Behaviour("find.cap", answers=10, status=0)]
    capabilities = StudyQueryCapabilities()
    (first,), queries = ask(held, script, [ROWS["patient"]], capabilities)
    assert (len(first.studies), first.gaps) == (60, ())
    assert len(queries) <= 130
    assert capabilities.limits.caps == {10}
    # A list of ten may be whole, and it is partitioned at once.
    ten = [changed_day(o, 100 + n) for n, o in enumerate(held[:10])]
    (second,), queries = ask(ten, script, [CohortRow(3, patient_id="TEN")], capabilities)
    assert (len(second.studies), second.gaps) == (10, ())
    assert any("AccessionNumber" in query for query in queries)


def changed_day(stored: StoredInstance, days: int) -> StoredInstance:
    day = date(2020, 1, 1) + timedelta(days=days)
    attributes = {**stored.attributes, "PatientID": "TEN", "StudyDate": f"{day:%Y%m%d}"}
    return StoredInstance(attributes, stored.transfer_syntax_uid, stored.encoded)


@pytest.mark.needs("time")
def test_a_row_that_takes_its_whole_query_budget_leaves_fewer_to_the_next():
    held = archive(47, seed=3)
    script = [
        Behaviour("find.cap", answers=10),
        Behaviour("find.ignore_keys", keys=["PatientID", "StudyDate"]),
    ]
    rows = [CohortRow(2 + n, patient_id=f"{PATIENT}{n or ''}") for n in range(4)]
    capabilities = StudyQueryCapabilities()
    capabilities.limits.query_budget = 100
    found, queries = ask(held, script, rows, capabilities)
    assert all(one.gaps for one in found)
    assert capabilities.limits.query_budget == 30
    assert len(queries) <= 100 + 50 + 30 + 30 + 3 * len(rows)


# ----------------------------------------------------------------------------- what cannot be known


@pytest.mark.parametrize("status", subset((0xFE00, 0), [0]))
@pytest.mark.needs("time")
def test_a_day_that_stays_cut_is_had_by_modality_and_identifiers(status):
    held = [
        study(
            number,
            PatientID=f"{number // 3:06d}",
            StudyDate="20240214",
            Modality=("CT", "MR", "US")[number % 3],
        )
        for number in range(60)
    ]
    (found,), _ = ask(held, [Behaviour("find.cap", answers=12, status=status)], [ROWS["month"]])
    assert (len(found.studies), found.gaps) == (60, ())


@pytest.mark.parametrize("patient", subset(("000{}", "00000000"), ["00000000"]))
def test_a_day_that_cannot_be_divided_is_named_and_its_studies_are_kept(patient):
    days = ["20240214"] * 30 + ["20240215"] * 30 + ["20240220"] * 3
    held = [
        study(number, PatientID=patient.format(number), StudyDate=day)
        for number, day in enumerate(days)
    ]
    script = [
        Behaviour("find.ignore_keys", keys=["ModalitiesInStudy", "PatientID", "AccessionNumber"]),
        Behaviour("find.cap", answers=12, status=0xB001),
    ]
    (found,), _ = ask(held, script, [ROWS["month"]])
    assert found.gaps == ("20240214-20240215",)
    assert found.reason == "list-unproved"
    assert len(found.studies) == 12 + 12 + 3


@pytest.mark.needs("time")
def test_a_modality_that_stays_cut_is_named_with_its_days():
    held = [
        study(number, StudyDate="20240214", Modality="CT" if number < 30 else "MR")
        for number in range(34)
    ]
    script = [
        Behaviour("find.ignore_keys", keys=["PatientID", "AccessionNumber"]),
        Behaviour("find.cap", answers=12, status=0),
    ]
    (found,), _ = ask(held, script, [ROWS["month"]])
    assert found.gaps == ("20240214 CT",)
    assert len(found.studies) == 12 + 4


@pytest.mark.parametrize(
    "fault", subset(("StudyDate ignored", "all ignored", "nothing by StudyDate"), ["all ignored"])
)
def test_no_gap_says_whose_studies_it_is_about(fault):
    held = archive(47, seed=4, undated=5)
    script = script_of(Case(10, 0xFE00, fault, "patient"))
    script.append(Behaviour("find.unsupported_key", keys=["AccessionNumber"]))
    (found,), _ = ask(held, script, [ROWS["patient"]])
    assert found.gaps == ("studies of any date",)


def test_a_patients_range_of_days_is_asked_for_alone_when_the_list_is_cut():
    held = archive(47, seed=5, undated=5)
    row = CohortRow(2, patient_id=PATIENT, study_date=DateRange(date(2021, 1, 1), None))
    (found,), queries = ask(held, [Behaviour("find.cap", answers=10, status=0)], [row])
    assert {s.study_instance_uid for s in found.studies} == truth_since(held, "20210101")
    assert not found.gaps
    # Undated studies are not in it: nothing but days is asked for.
    assert queries[0] == {"PatientID": PATIENT}
    assert all(query.keys() == {"PatientID", "StudyDate"} for query in queries[1:])


def truth_since(held: Sequence[StoredInstance], day: str) -> set[str]:
    return {
        o.study_instance_uid
        for o in held
        if o.patient_id == PATIENT and o.attributes["StudyDate"] >= day
    }


def test_a_date_window_in_which_nothing_is_found_counts_only_if_days_are_matched():
    held = archive(47, seed=6)
    january = DateRange(date(2018, 1, 1), date(2018, 1, 31))
    row = CohortRow(2, patient_id=PATIENT, study_date=january)
    cap = Behaviour("find.cap", answers=10, status=0xFE00)
    (found,), _ = ask(held, [cap], [row])
    assert (found.reason, found.gaps) == ("excluded-by-filter", ())
    script = [
        cap,
        Behaviour("find.unsupported_key", keys=["StudyDate", "AccessionNumber"]),
        Behaviour("find.ignore_keys", keys=["ModalitiesInStudy"]),
    ]
    (found,), _ = ask(held, script, [row])
    assert (found.reason, found.gaps) == ("list-unproved", ("20180101-20180131",))


def test_a_study_uid_of_two_patients_leaves_a_gap_in_a_date_window():
    held = [study(n, PatientID=f"P{n}", StudyDate="20240214") for n in range(3)]
    shared = {"StudyInstanceUID": held[0].study_instance_uid, "PatientID": "P9"}
    twin = study(7, StudyDate="20240214", **shared)
    (found,), _ = ask([*held, twin], [], [ROWS["month"]])
    assert len(found.studies) == 2
    assert found.gaps == ("studies without a UID of their own",)
    assert found.reason == "list-unproved"
