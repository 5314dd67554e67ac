"""Whatever a PACS does to a query, a row is complete, not found, or says why it is neither.

:data:`CASES` is the table: a fault, the knobs of the scripted PACS that produce it, a row that
asks, and what must become of it. :data:`STATUSES` has every final status of a C-FIND.
"""

from __future__ import annotations

import csv
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from pydicom.datadict import dictionary_VR

from prefect_dicom.core.errors import CohortError, PacsError
from prefect_dicom.core.model import Verdict
from prefect_dicom.core.uids import is_safe_key
from prefect_dicom.report import RESULTS, format_totals, write_reports
from prefect_dicom.testing import Behaviour, StoredInstance, tiny_instances
from prefect_dicom.testing.instances import changed
from prefect_dicom.testing.script import KNOBS
from tests.support.campaign import subset
from tests.support.sites import Place, site_around

pytestmark = pytest.mark.campaign("PACS: discovery")

# ------------------------------------------------------------------------------ what the PACS holds


def study(
    seed: int, *, instances: int = 2, series: int = 1, **elements: str
) -> list[StoredInstance]:
    """A study whose objects say this of themselves."""
    made = []
    for number, stored in enumerate(tiny_instances(1, instances=instances * series, seed=seed)):
        its_series = {
            "SeriesInstanceUID": f"{stored.series_instance_uid}{number % series}",
            "SeriesNumber": str(number % series + 1),
        }
        made.append(changed(stored, **{**its_series, **elements}))
    return made


def uid_of(objects: list[StoredInstance]) -> str:
    return objects[0].study_instance_uid


MINE = study(1, PatientID="000123", AccessionNumber="ACC-1", StudyDate="20240305")
LATER = study(2, PatientID="000123", AccessionNumber="ACC-2", StudyDate="20240601")
STRANGER = study(3, PatientID="KLM-9", AccessionNumber="XYZ-9", StudyDate="20240305")
LONGER = study(4, PatientID="9000123", AccessionNumber="ACC-11", StudyDate="20240305")
HELD = [*MINE, *LATER, *STRANGER, *LONGER]

BY_PATIENT = {"PatientID": "000123"}
BY_ACCESSION = {"AccessionNumber": "ACC-1"}
BY_BOTH = {**BY_PATIENT, **BY_ACCESSION}
BY_UID = {"StudyInstanceUID": uid_of(MINE)}
OF_NOBODY = {"PatientID": "NOBODY-7"}


def of_one_patient(studies: int, patient: str, seed: int) -> list[StoredInstance]:
    return [changed(stored, PatientID=patient) for stored in tiny_instances(studies, seed=seed)]


def two_series(seed: int = 20) -> list[StoredInstance]:
    return study(seed, instances=3, series=2, PatientID="000123")


def one_of_two_patients() -> list[StoredInstance]:
    """Two patients' objects under one study UID."""
    others = [
        changed(o, StudyInstanceUID=uid_of(MINE)) for o in study(30, PatientID="KLM-9", instances=1)
    ]
    return [*MINE, *others]


# -------------------------------------------------------------------------------------- the table

ARCHIVED = ("archived", "all-archived")
NOT_FOUND = ("not-found", "no-match")
CAPPED = ("failed", "answers-capped")
UNPROVED = ("partial", "list-unproved")
EXCLUDED = ("excluded", "excluded-by-filter")
AMBIGUOUS = ("ambiguous", "several-patients")
KNOWN_OTHERWISE = ("ambiguous", "known-otherwise")
UNSAFE = ("failed", "unsafe-uid")
UNUSABLE = ("failed", "answer-unusable")

Check = Callable[[Place], None]


@dataclass(frozen=True)
class Case:
    """A fault, how it is produced, the row that meets it, and the reaction that must be seen."""

    fault: str
    story: str
    knobs: tuple[tuple[str, Mapping[str, Any]], ...]
    row: Mapping[str, str]
    reaction: tuple[str, str]
    check: Check | None = None
    held: Callable[[], list[StoredInstance]] = field(default=lambda: HELD)
    others: tuple[Mapping[str, str], ...] = ()
    """Further rows of the cohort, in front of the row."""
    node: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.fault}: {self.story}"


def knobs(*named: str, **arguments: Any) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return tuple((name, arguments) for name in named)


# --- what must be seen besides verdict and reason


def studies_queries(place: Place) -> list[dict[str, str]]:
    """The keys with a value of all STUDY level queries."""
    queries = [r for r in place.pacs.requests("C-FIND") if r.level == "STUDY"]
    return [{k: v for k, v in query.keys.items() if v} for query in queries]


def asked(*queries: Mapping[str, str]) -> Check:
    """These STUDY level queries were sent, and no other."""

    def check(place: Place) -> None:
        assert studies_queries(place) == list(queries)

    return check


def never_asked_by(*keywords: str) -> Check:
    def check(place: Place) -> None:
        for request in place.pacs.requests("C-FIND"):
            assert not [k for k in keywords if request.keys.get(k)]

    return check


def nothing_retrieved(place: Place) -> None:
    assert place.asked_for("C-MOVE", "C-GET") == 0
    assert place.archived() == {}


def only(*studies: list[StoredInstance]) -> Check:
    """Nothing but these studies is in the archive, whole."""

    def check(place: Place) -> None:
        uids = {uid_of(objects) for objects in studies}
        assert {u for u, s in place.studies().items() if s.state == "archived"} == uids
        for objects in studies:
            said = {i.sop_instance_uid for i in place.manifest(uid_of(objects)).instances}
            assert said == {o.sop_instance_uid for o in objects}

    return check


def near_misses(count: int) -> Check:
    def check(place: Place) -> None:
        with place.ledger() as ledger:
            line = place.verdicts()[-1].line
            assert len(ledger.rows.near_misses(1, line)) == count

    return check


def studies_found(count: int) -> Check:
    def check(place: Place) -> None:
        assert len(place.studies()) == count

    return check


def gaps(*expected: str) -> Check:
    def check(place: Place) -> None:
        assert place.verdicts()[-1].gaps == expected
        with place.ledger() as ledger:
            folder = write_reports(ledger, ledger.cohorts.get("1"), place.folder / "reports")
            words = format_totals(ledger.progress.totals(1))
        *_, reported = csv.DictReader((folder / RESULTS).open(newline=""))
        assert reported["gaps"] == "; ".join(expected)
        assert words.endswith(f"lists not proved whole: {expected[0]} (1 row)")

    return check


def warned_once(word: str) -> Check:
    def check(place: Place) -> None:
        reported = [r.getMessage() for r in place.records if word in r.getMessage()]
        assert len(reported) == 1, reported

    return check


def associations(count: int) -> Check:
    def check(place: Place) -> None:
        assert place.pacs.connections == count

    return check


def kept_date(text: str) -> Check:
    def check(place: Place) -> None:
        assert [s.study.study_date for s in place.studies().values()] == [text]

    return check


def every(*checks: Check) -> Check:
    def check(place: Place) -> None:
        for one in checks:
            one(place)

    return check


def queries_name_one_value_each(place: Place) -> None:
    for request in place.pacs.requests("C-FIND"):
        for keyword, value in request.keys.items():
            vr = dictionary_VR(keyword)
            values = value.split("\\") if vr == "UI" else [value]
            assert not value or all(map(is_safe_key, values)), keyword
            assert not value or vr not in ("DA", "TM", "PN"), keyword


def all_rows_say(*reaction: str) -> Check:
    def check(place: Place) -> None:
        reported = {(str(v.verdict), v.reason) for v in place.verdicts()}
        assert reported == {reaction}

    return check


def levels(*expected: str) -> Check:
    def check(place: Place) -> None:
        seen = [r.level for r in place.pacs.requests("C-FIND")]
        assert seen[: len(expected)] == list(expected)

    return check


def quarantined(count: int) -> Check:
    def check(place: Place) -> None:
        assert len(place.quarantined()) == count

    return check


def add_an_instance(pacs) -> None:
    (series,) = {o.series_instance_uid for o in MINE}
    new = changed(
        next(tiny_instances(1, seed=77)),
        StudyInstanceUID=uid_of(MINE),
        SeriesInstanceUID=series,
        PatientID="000123",
    )
    pacs.holdings.add(new)


def add_one_more_each_time() -> Callable:
    numbers = iter(range(100, 1000))

    def change(pacs) -> None:
        (series,) = {o.series_instance_uid for o in MINE}
        pacs.holdings.add(
            changed(
                next(tiny_instances(1, seed=next(numbers))),
                StudyInstanceUID=uid_of(MINE),
                SeriesInstanceUID=series,
                PatientID="000123",
            )
        )

    return change


def remove_one(pacs) -> None:
    pacs.holdings.remove(MINE[1].sop_instance_uid)


def counted(place: Place, instances: int) -> None:
    assert len(place.manifest(uid_of(MINE)).instances) == instances


CASES = [
    # --- F01: a key is ignored
    Case(
        "F01",
        "everything is returned, and only the row's studies are taken",
        knobs("find.ignore_keys", keys=["PatientID"]),
        BY_PATIENT,
        ARCHIVED,
        every(only(MINE, LATER), warned_once("do not match the keys")),
        others=(BY_PATIENT,),
    ),
    Case(
        "F01",
        "an ignored key proves no absence",
        knobs("find.ignore_keys", keys=["PatientID"]),
        OF_NOBODY,
        ("failed", "key-ignored"),
        nothing_retrieved,
    ),
    Case(
        "F01",
        "answers of other studies and series are in no list",
        knobs("find.ignore_keys", keys=["StudyInstanceUID", "SeriesInstanceUID"]),
        BY_ACCESSION,
        ARCHIVED,
        only(MINE),
    ),
    # --- F02: a key empties the answer
    Case(
        "F02",
        "an accession number is not supported beside a patient",
        knobs("find.unsupported_key", keys=["AccessionNumber"]),
        BY_BOTH,
        ARCHIVED,
        every(only(MINE), asked(BY_BOTH, BY_PATIENT)),
    ),
    Case(
        "F02",
        "what one row has taught the next one knows",
        knobs("find.unsupported_key", keys=["AccessionNumber"]),
        {"PatientID": "000123", "AccessionNumber": "ACC-2"},
        ARCHIVED,
        # The patient's studies are known by then.
        every(only(MINE, LATER), asked(BY_BOTH, BY_PATIENT)),
        others=(BY_BOTH,),
    ),
    Case(
        "F02",
        "a key that is merely to be returned",
        knobs("find.unsupported_key", keys=["NumberOfStudyRelatedInstances"], returned=True),
        BY_ACCESSION,
        ARCHIVED,
        asked(BY_ACCESSION, BY_ACCESSION),
    ),
    Case(
        "F02",
        "a key that is merely to be returned is refused",
        knobs("find.unsupported_key", keys=["ModalitiesInStudy"], returned=True, status=0xC000),
        {**BY_ACCESSION, "StudyDate": "20240305"},
        ARCHIVED,
        asked(BY_ACCESSION, BY_ACCESSION),
    ),
    Case(
        "F02",
        "a modality is never sent",
        knobs("find.unsupported_key", keys=["Modality", "ModalitiesInStudy", "StudyDescription"]),
        {**BY_ACCESSION, "Modality": "OT", "StudyDescription": "Tiny"},
        ARCHIVED,
        asked(BY_ACCESSION),
    ),
    Case(
        "F02",
        "a study that is not there is asked for twice, once",
        (),
        {"PatientID": "000123", "AccessionNumber": "NONE-3"},
        NOT_FOUND,
        asked(
            {"PatientID": "000123", "AccessionNumber": "NONE-1"},
            BY_PATIENT,
            BY_BOTH,
            {"PatientID": "000123", "AccessionNumber": "NONE-3"},
        ),
        others=({"PatientID": "000123", "AccessionNumber": "NONE-1"}, BY_BOTH),
    ),
    Case(
        "F02",
        "an accession number that is no study of the patient has these as candidates",
        (),
        {"PatientID": "000123", "AccessionNumber": "9999"},
        NOT_FOUND,
        every(near_misses(2), nothing_retrieved),
    ),
    # --- F03: a key is missing in the answers
    *(
        Case("F03", f"{words}, {how}", knobs("find.omit_keys", keys=keys, empty=empty), row, end)
        for how, empty in (("left out", False), ("empty", True))
        for words, keys, row, end in (
            ("modalities", ["ModalitiesInStudy"], {**BY_ACCESSION, "Modality": "OT"}, ARCHIVED),
            ("what is asked by", ["PatientID"], BY_PATIENT, ("failed", "identifier-missing")),
            ("what is not asked by", ["AccessionNumber", "StudyDate"], BY_PATIENT, ARCHIVED),
            ("study UIDs", ["StudyInstanceUID"], BY_ACCESSION, UNSAFE),
            ("series UIDs", ["SeriesInstanceUID"], BY_ACCESSION, UNSAFE),
            ("instance UIDs", ["SOPInstanceUID"], BY_ACCESSION, UNSAFE),
            ("classes", ["SOPClassUID"], BY_ACCESSION, ARCHIVED),
        )
    ),
    # --- F04
    Case(
        "F04",
        "FF01 with every match, for every row",
        knobs("find.ff01"),
        BY_PATIENT,
        ARCHIVED,
        every(only(MINE, LATER, STRANGER), warned_once("FF01")),
        others=({"PatientID": "KLM-9"},),
    ),
    # --- F05: a cap that is announced
    *(
        Case(
            "F05",
            f"{status:04X} with too many studies",
            knobs("find.cap", answers=1, status=status, level="STUDY"),
            BY_PATIENT,
            ARCHIVED,
            only(MINE, LATER),
        )
        for status in (0xFE00, 0xA700, 0xB001)
    ),
    *(
        Case(
            "F05",
            f"{status:04X} with too many instances",
            knobs("find.cap", answers=2, status=status),
            BY_PATIENT,
            CAPPED,
            nothing_retrieved,
            held=two_series,
        )
        for status in (0xFE00, 0xA700, 0xB001)
    ),
    Case(
        "F05",
        "too many series",
        knobs("find.cap", answers=1),
        BY_PATIENT,
        CAPPED,
        nothing_retrieved,
        held=lambda: study(21, instances=1, series=2, PatientID="000123"),
    ),
    Case(
        "F05",
        "a cap above what a row asks for",
        knobs("find.cap", answers=2),
        BY_UID,
        ARCHIVED,
        only(MINE),
    ),
    Case(
        "F05",
        "too many studies, and no part is smaller",
        (
            *knobs("find.cap", answers=1, level="STUDY"),
            *knobs("find.ignore_keys", keys=["StudyDate", "ModalitiesInStudy"]),
            *knobs("find.unsupported_key", keys=["AccessionNumber"]),
        ),
        BY_PATIENT,
        UNPROVED,
        gaps("studies of any date"),
    ),
    # --- F06: a cap that is not announced
    Case(
        "F06",
        "a round number of studies of one patient",
        knobs("find.cap", answers=20, status=0),
        {"PatientID": "MANY"},
        ARCHIVED,
        studies_found(26),
        held=lambda: of_one_patient(26, "MANY", 40),
    ),
    Case(
        "F06",
        "the same number of studies for two patients",
        knobs("find.cap", answers=12, status=0),
        {"PatientID": "MANY-2"},
        ARCHIVED,
        every(all_rows_say(*ARCHIVED), studies_found(29)),
        held=lambda: [*of_one_patient(15, "MANY-1", 41), *of_one_patient(14, "MANY-2", 42)],
        others=({"PatientID": "MANY-1"},),
    ),
    Case(
        "F06",
        "a round number of studies that is all there are",
        (),
        {"PatientID": "MANY"},
        ARCHIVED,
        asked(
            {"PatientID": "MANY"},
            {"PatientID": "MANY", "StudyDate": "19000101-20200111"},
            {"PatientID": "MANY", "StudyDate": "20200111-29991231"},
            # Undated studies are in no half. Does the PACS ever answer more than twenty?
            {"StudyDate": "20191227-20200126"},
            {"StudyDate": "19000101-29991231"},
            {"PatientID": "MANY", "ModalitiesInStudy": "OT"},
        ),
        held=lambda: of_one_patient(20, "MANY", 40),
    ),
    Case(
        "F06",
        "a long list that cannot be had in parts",
        knobs("find.ignore_keys", keys=["StudyDate", "ModalitiesInStudy", "AccessionNumber"]),
        {"PatientID": "MANY"},
        UNPROVED,
        every(gaps("studies of any date"), studies_found(20)),
        held=lambda: of_one_patient(20, "MANY", 40),
    ),
    Case(
        "F06",
        "a long list, and the PACS gives longer ones",
        (),
        {"PatientID": "MANY-2"},
        ARCHIVED,
        asked(
            {"PatientID": "MANY"},
            {"PatientID": "MANY", "StudyDate": "19000101-20200107"},
            {"PatientID": "MANY", "StudyDate": "20200107-29991231"},
            {"StudyDate": "20191223-20200122"},
            # A longer one shows it for all shorter ones.
            {"PatientID": "MANY-2"},
        ),
        others=({"PatientID": "MANY"},),
        held=lambda: [*of_one_patient(12, "MANY", 40), *of_one_patient(12, "MANY-2", 41)],
    ),
    Case(
        "F06",
        "a study named by its UID, and not all of its series are listed",
        knobs("find.cap", answers=1, status=0),
        BY_UID,
        ("failed", "answers-capped"),
        nothing_retrieved,
        held=lambda: study(22, instances=1, series=2, StudyInstanceUID=uid_of(MINE)),
    ),
    Case(
        "F06",
        "a study that is hidden behind a cap and an ignored key",
        (
            *knobs("find.ignore_keys", keys=["StudyInstanceUID"], service="C-FIND", on_request=1),
            *knobs("find.cap", answers=2, status=0),
        ),
        {"StudyInstanceUID": uid_of(LONGER)},
        CAPPED,
        every(nothing_retrieved, levels("STUDY", "SERIES")),
    ),
    Case(
        "F06",
        "a study that does not exist, and the key is ignored",
        (
            *knobs("find.ignore_keys", keys=["StudyInstanceUID"], on_request=1),
            *knobs("find.cap", answers=2, status=0),
        ),
        {"StudyInstanceUID": "1.2.3.4"},
        NOT_FOUND,
        every(nothing_retrieved, levels("STUDY", "SERIES")),
    ),
    Case(
        "F06",
        "an accession number behind a cap and an ignored key",
        (
            *knobs("find.ignore_keys", keys=["AccessionNumber"]),
            *knobs("find.cap", answers=2, status=0),
        ),
        {"AccessionNumber": "ACC-11"},
        ("failed", "key-ignored"),
        nothing_retrieved,
    ),
    Case(
        "F06",
        "two series of the same length, and shorter than their counts",
        knobs("find.cap", answers=2, status=0),
        BY_PATIENT,
        CAPPED,
        nothing_retrieved,
        held=two_series,
    ),
    Case(
        "F06",
        "a series of round length, and shorter than its count",
        knobs("find.cap", answers=100, status=0),
        BY_PATIENT,
        CAPPED,
        nothing_retrieved,
        held=lambda: study(23, instances=120, PatientID="000123"),
    ),
    Case(
        "F06",
        "a series that is shorter than its count",
        knobs("find.cap", answers=2, status=0),
        BY_PATIENT,
        CAPPED,
        nothing_retrieved,
        held=lambda: study(24, instances=3, PatientID="000123"),
    ),
    Case(
        "F06",
        "fewer series than the study is said to have",
        knobs("find.cap", answers=1, status=0),
        BY_PATIENT,
        CAPPED,
        held=lambda: study(25, instances=1, series=2, PatientID="000123"),
    ),
    Case(
        "F06",
        "without counts what is not listed is kept apart",
        (*knobs("find.cap", answers=2, status=0), *knobs("find.counts", how="none")),
        BY_PATIENT,
        ARCHIVED,
        quarantined(1),
        held=lambda: study(24, instances=3, PatientID="000123"),
    ),
    # --- F07
    Case(
        "F07",
        "every answer three times",
        knobs("find.duplicate", copies=2),
        BY_PATIENT,
        ARCHIVED,
        only(MINE, LATER),
    ),
    Case(
        "F07",
        "a study twice, under two patients",
        knobs("find.duplicate", patient_id="KLM-9"),
        BY_UID,
        AMBIGUOUS,
        every(near_misses(2), nothing_retrieved),
    ),
    Case(
        "F07",
        "a study twice, and the row names the patient",
        knobs("find.duplicate", patient_id="KLM-9"),
        {**BY_UID, **BY_PATIENT},
        ARCHIVED,
        only(MINE),
    ),
    # --- F08
    Case(
        "F08",
        "a patient whose ID holds the asked one",
        knobs("find.substring"),
        BY_PATIENT,
        ARCHIVED,
        only(MINE, LATER),
    ),
    Case(
        "F08",
        "only others' IDs hold the asked one",
        knobs("find.substring"),
        {"PatientID": "00012"},
        NOT_FOUND,
        nothing_retrieved,
    ),
    Case(
        "F08",
        "a merged patient is known by another number",
        knobs("find.alias", asked="OLD-5", held=["000123"]),
        {"PatientID": "OLD-5"},
        KNOWN_OTHERWISE,
        every(near_misses(2), nothing_retrieved),
    ),
    # --- F09
    Case(
        "F09",
        "another case is another patient, and told of",
        knobs("find.case"),
        {"PatientID": "klm-9"},
        NOT_FOUND,
        every(near_misses(1), nothing_retrieved),
    ),
    Case(
        "F09", "the same case", knobs("find.case"), {"PatientID": "KLM-9"}, ARCHIVED, only(STRANGER)
    ),
    # --- F10
    *(
        Case(
            "F10",
            f"padding {words}",
            knobs("find.pad_ids", **padding),
            BY_PATIENT,
            ARCHIVED,
            only(MINE, LATER),
        )
        for words, padding in (
            ("behind", {"after": "  "}),
            ("in front", {"before": "  "}),
            ("of NULs", {"after": "\0"}),
        )
    ),
    Case(
        "F10",
        "zeros lost: never merged, but told of",
        knobs("find.pad_ids", strip_zeros=True),
        BY_PATIENT,
        NOT_FOUND,
        every(near_misses(2), nothing_retrieved),
    ),
    Case(
        "F10",
        "zeros added: never merged, but told of",
        knobs("find.pad_ids", before="00"),
        BY_PATIENT,
        NOT_FOUND,
        every(near_misses(2), nothing_retrieved),
    ),
    # --- F11 to F18: what is never asked by
    Case(
        "F11",
        "names matched to the letter",
        knobs("find.pn_literal"),
        BY_PATIENT,
        ARCHIVED,
        every(only(MINE, LATER), never_asked_by("PatientName"), queries_name_one_value_each),
    ),
    Case(
        "F12",
        "no wildcard is ever sent",
        (),
        BY_PATIENT,
        ARCHIVED,
        queries_name_one_value_each,
    ),
    Case(
        "F13",
        "no list of values is ever sent",
        knobs("find.no_list", uids=True),
        BY_ACCESSION,
        ARCHIVED,
        every(queries_name_one_value_each, only(MINE, LATER, STRANGER)),
        others=({"AccessionNumber": "ACC-2"}, {"StudyInstanceUID": uid_of(STRANGER)}),
    ),
    *(
        Case("F14", f"{words}, {days:+} days", knobs("find.date_shift", days=days), row, end, more)
        for days in (-1, 1)
        for words, row, end, more in (
            ("no date in the row", BY_ACCESSION, ARCHIVED, never_asked_by("StudyDate")),
            ("a day", {**BY_ACCESSION, "StudyDate": "20240305"}, EXCLUDED, nothing_retrieved),
            (
                "a wider range",
                {**BY_PATIENT, "StudyDate": "20240304-20240306"},
                ARCHIVED,
                only(MINE),
            ),
        )
    ),
    *(
        Case(
            "F14",
            f"a range without its {ends} day, and a list that was cut",
            (
                *knobs("find.date_ends", ends=ends),
                *knobs("find.cap", answers=10, status=0, level="STUDY"),
            ),
            {"PatientID": "MANY"},
            ARCHIVED,
            studies_found(24),
            held=lambda: of_one_patient(24, "MANY", 40),
        )
        for ends in ("first", "last", "both")
    ),
    *(
        Case(
            "F15",
            words,
            (),
            row,
            end,
            never_asked_by("StudyDate"),
            held=lambda: study(50, PatientID="000123", StudyDate=""),
        )
        for words, row, end in (
            ("an undated study of a patient", BY_PATIENT, ARCHIVED),
            (
                "an undated study, and a range",
                {**BY_PATIENT, "StudyDate": "19000101-20991231"},
                EXCLUDED,
            ),
        )
    ),
    Case(
        "F16",
        "date and time are never sent",
        knobs("find.time_hang", hold="hold"),
        {**BY_PATIENT, "StudyDate": "20240305"},
        ARCHIVED,
        every(only(MINE), never_asked_by("StudyDate", "StudyTime")),
    ),
    *(
        Case(
            "F17",
            f"{words}: {end[0]}",
            (),
            {**BY_PATIENT, **range_},
            end,
            kept_date(text) if end is ARCHIVED else nothing_retrieved,
            held=lambda text=text: study(51, PatientID="000123", StudyDate=text),
        )
        for words, text, range_, end in (
            ("ACR-NEMA form", "2024.03.05", {"StudyDate": "20240301-20240331"}, ARCHIVED),
            ("30 February", "20240230", {}, ARCHIVED),
            ("30 February, and a range", "20240230", {"StudyDate": "20240101-20241231"}, EXCLUDED),
            ("in the future", "29990101", {}, ARCHIVED),
            (
                "in the future, and a range",
                "29990101",
                {"StudyDate": "20240101-20241231"},
                EXCLUDED,
            ),
        )
    ),
    Case(
        "F18",
        "a time zone is no key of ours",
        knobs("find.unsupported_key", keys=["TimezoneOffsetFromUTC"], returned=True),
        BY_PATIENT,
        ARCHIVED,
        only(MINE, LATER),
        held=lambda: [
            changed(o, TimezoneOffsetFromUTC="+0930", StudyTime="235959") for o in (*MINE, *LATER)
        ],
    ),
    # --- F19: texts
    *(
        Case(
            "F19",
            f"texts {how}: {words}",
            knobs("find.charset", how=how),
            row,
            ARCHIVED,
            held=lambda patient=patient: study(
                52,
                SpecificCharacterSet="ISO_IR 192",
                PatientID=patient,
                AccessionNumber="ACC-1",
                StudyDescription="Schädel 王",
            ),
        )
        for how in ("lie", "none", "strip")
        for words, patient, row in (
            ("an ASCII patient", "000123", BY_PATIENT),
            ("a Latin-1 patient", "Öz-1", {"PatientID": "Öz-1"}),
            ("letters the PACS does not know, and a UID", "王-1", BY_ACCESSION),
        )
    ),
    *(
        Case(
            "F19",
            f"queries understood in {words} only",
            knobs("find.query_charset", sets=[declared]),
            {"PatientID": patient},
            ARCHIVED,
            held=lambda patient=patient: study(
                52, SpecificCharacterSet="ISO_IR 192", PatientID=patient
            ),
        )
        for words, declared, patient in (
            ("Latin-1", "ISO_IR 100", "Öz-1"),
            ("UTF-8", "ISO_IR 192", "Öz-1"),
            ("Japanese", "\\ISO 2022 IR 87", "山-1"),
        )
    ),
    Case(
        "F19",
        "a PACS that understands queries in UTF-8 only",
        knobs("find.query_charset", sets=["ISO_IR 192"]),
        {"PatientID": "Öz-1"},
        ARCHIVED,
        held=lambda: study(52, SpecificCharacterSet="ISO_IR 192", PatientID="Öz-1"),
    ),
    Case(
        "F19",
        "an identifier whose letters the PACS has lost",
        knobs("find.charset", how="strip"),
        {"PatientID": "王-1"},
        KNOWN_OTHERWISE,
        nothing_retrieved,
        held=lambda: study(52, SpecificCharacterSet="ISO_IR 192", PatientID="王-1"),
    ),
    # --- F1A
    *(
        Case(
            "F1A",
            f"counts: {words}",
            knobs("find.counts", **arguments),
            BY_PATIENT,
            ARCHIVED,
            only(MINE, LATER),
        )
        for words, arguments in (
            ("one too many", {"how": "off_by"}),
            ("one too few", {"how": "off_by", "by_number": -1}),
            ("far too many", {"how": "off_by", "by_number": 5000}),
            ("zero", {"how": "zero"}),
            ("none", {"how": "none"}),
        )
    ),
    # --- F1B
    *(
        Case(
            "F1B",
            f"relational queries are refused with {status:04X}",
            knobs("find.strict", status=status),
            BY_ACCESSION,
            ARCHIVED,
            levels("STUDY", "SERIES", "IMAGE"),
        )
        for status in (0xA900, 0xC000)
    ),
    *(
        Case(
            "F1B",
            f"queries below the study want the PatientID too, or {status:04X}",
            knobs("find.demand_keys", status=status),
            BY_ACCESSION,
            ARCHIVED,
            only(MINE),
        )
        for status in (0xA900, 0xC000, 0x0000)
    ),
    # --- F1C
    *(
        Case(
            "F1C",
            f"no IMAGE level: {status:04X}",
            knobs("find.no_image_level", status=status),
            BY_ACCESSION,
            ARCHIVED,
            only(MINE),
        )
        for status in (0xC000, 0xA900, 0x0000)
    ),
    Case(
        "F1C",
        "no IMAGE level and no counts",
        (*knobs("find.no_image_level"), *knobs("find.counts", how="none")),
        BY_ACCESSION,
        ("failed", "evidence-too-weak"),
        nothing_retrieved,
    ),
    *(
        Case(
            "F1C",
            f"no SERIES level either: {status:04X}",
            knobs("find.no_series_level", status=status),
            BY_ACCESSION,
            ("failed", "evidence-too-weak"),
            nothing_retrieved,
        )
        for status in (0xC000, 0x0000)
    ),
    Case(
        "F1C",
        "one series is listed without its instances",
        (
            # The lists that are asked for together are doubted, and asked for one by one.
            *knobs("find.no_image_level", status=0, on_request=3),
            *knobs("find.no_image_level", status=0, on_request=6),
        ),
        BY_PATIENT,
        CAPPED,
        nothing_retrieved,
        held=two_series,
    ),
    # --- F1D
    Case(
        "F1D",
        "other nodes are named to retrieve from",
        knobs("find.retrieve_aet", titles=["ELSEWHERE", "TAPE"]),
        BY_PATIENT,
        ARCHIVED,
        only(MINE, LATER),
    ),
    # --- F1E
    *(
        Case("F1E", value or "nothing", knobs("find.availability", value=value), BY_ACCESSION, *end)
        for value, end in (
            ("ONLINE", (ARCHIVED,)),
            ("NEARLINE", (ARCHIVED,)),
            ("", (ARCHIVED,)),
            ("OFFLINE", (("failed", "study-offline"), nothing_retrieved)),
            ("UNAVAILABLE", (("failed", "study-offline"), nothing_retrieved)),
        )
    ),
    # --- F1F
    Case(
        "F1F",
        "an instance more after the list was read",
        knobs("pacs.mutate", change=add_an_instance, times=1),
        BY_ACCESSION,
        ARCHIVED,
        partial(counted, instances=3),
    ),
    Case(
        "F1F",
        "an instance less after the list was read",
        knobs("pacs.mutate", change=remove_one, times=1),
        BY_ACCESSION,
        ARCHIVED,
        partial(counted, instances=1),
    ),
    Case(
        "F1F",
        "a study that changes for ever",
        knobs("pacs.mutate", change="change"),
        BY_ACCESSION,
        ("partial", "study-changed"),
    ),
    # --- F1G
    Case(
        "F1G",
        "a study UID of two patients",
        (),
        BY_UID,
        AMBIGUOUS,
        every(near_misses(2), nothing_retrieved),
        held=one_of_two_patients,
    ),
    Case(
        "F1G",
        "a study UID of two patients, and the row names one",
        (),
        {**BY_UID, **BY_PATIENT},
        ("partial", "wrong-patient"),
        quarantined(1),
        held=one_of_two_patients,
    ),
    # --- F1H
    *(
        Case(
            "F1H",
            f"{words}, {how}",
            knobs("find.garble", how=how, **limits),
            BY_ACCESSION,
            end,
            more,
        )
        for how in ("cut", "absent")
        for words, limits, end, more in (
            ("once", {"times": 1}, ARCHIVED, only(MINE)),
            ("always", {}, UNUSABLE, nothing_retrieved),
            ("the list of series", {"on_request": 2}, ARCHIVED, only(MINE)),
            ("an instance of the list", {"on_request": 3}, ARCHIVED, only(MINE)),
        )
    ),
    # --- F1I
    Case(
        "F1I",
        "an answer of an earlier query",
        knobs("find.cross_talk", times=1),
        BY_ACCESSION,
        ARCHIVED,
        # The third one is of the C-GET, which has the place of the second; then it lists again.
        every(only(MINE), associations(4)),
    ),
    Case(
        "F1I",
        "answers of earlier queries, always",
        knobs("find.cross_talk"),
        BY_ACCESSION,
        UNUSABLE,
        nothing_retrieved,
    ),
]

FAULTS = [f"F0{n}" for n in range(1, 10)] + [f"F{n}" for n in range(10, 20)]
FAULTS += [f"F1{letter}" for letter in "ABCDEFGHI"]
PREPARED = {"F12", "F15", "F17", "F1G"}
"""Faults of the data, or ours: what makes them is an object or a row, not a knob."""


def test_every_fault_of_discovery_is_in_the_table():
    assert {case.fault for case in CASES} == set(FAULTS)
    by_knob = {case.fault for case in CASES if case.knobs}
    assert by_knob == set(FAULTS) - PREPARED


def test_every_knob_of_queries_is_in_the_table():
    used = {name for case in CASES for name, _ in case.knobs}
    # In test_odd_answers.py, in a table of statuses, and of instances in test_odd_objects.py.
    used |= {"find.refuse", "find.declare", "find.answer", "find.hang_up", "find.empty_series"}
    assert {name for name in KNOBS if name.startswith("find.")} <= used


# ------------------------------------------------------------------------------------- the reaction


def scripted(case: Case, hold: threading.Event) -> list[Behaviour]:
    """The case's behaviours, with an event and a change of their own."""
    fresh = {"hold": hold, "change": add_one_more_each_time()}
    return [
        Behaviour(name, **{k: fresh[k] if v == k in fresh else v for k, v in arguments.items()})
        for name, arguments in case.knobs
    ]


@pytest.fixture
def around(tmp_path: Path):
    """Builds a site that asks by C-GET, which needs no receiver."""
    return partial(site_around, tmp_path, retrieve="c-get")


@pytest.mark.parametrize("case", subset(CASES, 10), ids=str)
def test_a_fault_of_discovery_gets_its_reaction(case, around, caplog):
    caplog.set_level(logging.WARNING, "prefect_dicom")
    hold = threading.Event()
    with around(case.held(), script=scripted(case, hold), node=dict(case.node)) as place:
        try:
            place.pull(place.cohort([*case.others, case.row]))
        finally:
            hold.set()
        last = place.verdicts()[-1]
        assert (str(last.verdict), last.reason) == case.reaction
        if case.reaction not in (ARCHIVED, UNPROVED) and not case.others:
            # Nothing that is left behind says that it is whole.
            assert not [s for s in place.studies().values() if s.state == "archived"]
        if case.check is not None:
            place.records = caplog.records
            case.check(place)
        if case.reaction != ARCHIVED:
            return
        if case.fault != "F06":
            place.audit()


@pytest.mark.parametrize(
    "value",
    ["*", "000*", "?00123", "A\\B", "000123\\000124"],
    ids=["all", "star", "?", "list", "2"],
)
def test_a_row_with_a_wildcard_or_a_list_is_refused_and_nothing_is_asked(around, value):
    with around(HELD) as place:
        for keyword in ("PatientID", "AccessionNumber", "StudyInstanceUID"):
            with pytest.raises(CohortError):
                place.pull(place.cohort([{keyword: value}]))
        assert place.asked_for() == 0


def test_a_fault_of_one_study_leaves_the_others_as_they_are(around):
    script = [Behaviour("find.omit_keys", keys=["PatientID"], study=uid_of(LATER))]
    with around(HELD, script=script) as place:
        # One of the row's studies cannot be compared: the row is not whole without it.
        place.pull(place.cohort([BY_PATIENT, BY_UID]))
        reported = [(str(v.verdict), v.reason) for v in place.verdicts()]
        assert reported == [("failed", "identifier-missing"), ARCHIVED]
        only(MINE)(place)


def test_a_row_that_was_cut_short_is_asked_again_when_the_limit_is_lifted(around):
    script = [Behaviour("find.cap", answers=1, status=0xFE00)]
    with around(HELD, script=script) as place:
        assert place.pull(place.cohort([BY_PATIENT])).rows == {Verdict.FAILED: 1}
        assert place.verdicts()[0].reason == "answers-capped"  # the lists of their instances
        place.pacs.script.clear()
        assert place.rerun().rows == {Verdict.ARCHIVED: 1}
        place.audit()


def test_faults_by_lot_and_together_lose_nothing(around, scale, seed):
    """Each row ends archived or says why; what is archived is whole."""
    for number in range(scale(1, 60)):
        lots = {"probability": 0.2, "seed": seed + number}
        script = [
            Behaviour("find.duplicate", **lots),
            Behaviour("find.ff01", **lots),
            Behaviour("find.cap", answers=1, status=0xFE00, **lots),
            Behaviour("find.counts", how="off_by", **lots),
            Behaviour("find.garble", **lots),
            Behaviour("find.cross_talk", **lots),
            Behaviour("find.refuse", status=0x0110, **lots),
            Behaviour("find.pad_ids", after=" ", **lots),
        ]
        rows = [BY_PATIENT, BY_UID, {"AccessionNumber": "XYZ-9"}, OF_NOBODY]
        with around(HELD, script=script) as place:
            place.pull(place.cohort(rows))
            reported = place.verdicts()
            assert {v.verdict for v in reported[:3]} <= {
                Verdict.ARCHIVED,
                Verdict.FAILED,
                Verdict.PARTIAL,
            }
            place.audit()
            place.pacs.script.clear()
            place.rerun()
            assert [str(v.verdict) for v in place.verdicts()] == [*["archived"] * 3, "not-found"]
            place.audit()
        start_again(place.folder)


def start_again(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# ----------------------------------------------------------------------------------- every status

ROW, NODE, DONE = "row", "node", "done"
STATUSES = {
    0x0000: (DONE, None),
    0x0001: (DONE, None),
    0x0107: (DONE, None),
    0x0116: (DONE, None),
    0xB000: (DONE, None),
    **dict.fromkeys((0x0105, 0x0106, 0x0111, 0x0112, 0x0113, 0x0114), (ROW, "request-refused")),
    **dict.fromkeys((0x0115, 0x0117, 0x0119, 0x0120, 0x0121, 0x0123), (ROW, "request-refused")),
    0x0212: (ROW, "request-refused"),
    0xA710: (ROW, "request-refused"),
    0xA900: (ROW, "request-refused"),
    0xC000: (ROW, "request-refused"),
    0xC001: (ROW, "request-refused"),
    0xCFFF: (ROW, "request-refused"),
    0x0110: (ROW, "pacs-failure"),
    0x4242: (ROW, "pacs-failure"),
    0xA700: (ROW, "list-unproved"),
    0xB001: (ROW, "list-unproved"),
    0xFE00: (ROW, "list-unproved"),
    0x0118: (NODE, "service-not-offered"),
    0x0122: (NODE, "service-not-offered"),
    0x0211: (NODE, "service-not-offered"),
    0x0124: (NODE, "not-permitted"),
    0x0210: (NODE, "unexpected"),
    0x0213: (NODE, "pacs-busy"),
}
"""Final status of a C-FIND: whom it concerns, and the reason."""


@pytest.mark.parametrize("status", subset(STATUSES, 4), ids=lambda status: f"{status:04X}")
def test_a_final_status_of_a_query_ends_the_row_or_stops_asking_the_node(status, around):
    whom, reason = STATUSES[status]
    always = {} if whom != DONE else {"on_request": 1}
    script = [Behaviour("find.refuse", status=status, **always)]
    with around(HELD, script=script) as place:
        cohort = place.cohort([OF_NOBODY, BY_ACCESSION])
        if whom == NODE:
            with pytest.raises(PacsError) as error:
                place.pull(cohort)
            assert error.value.code == reason
            # No row pays for it: they are asked when the node can be used again.
            assert [(str(v.verdict), v.reason) for v in place.verdicts()] == [
                ("pending", "interrupted")
            ] * 2
            assert place.asked_for("C-FIND") == 1
            return
        place.pull(cohort)
        ends = [(str(v.verdict), v.reason) for v in place.verdicts()]
        if whom == ROW:
            # One row that fails is its own affair: the next is asked.
            assert ends == [("failed", reason)] * 2
            # What is refused is asked once more with nothing that is not needed.
            if reason == "list-unproved":
                # Twice, and in parts that are smaller and smaller.
                assert place.asked_for("C-FIND") <= 2 * 30
            else:
                assert place.asked_for("C-FIND") == (4 if reason == "request-refused" else 2)
        else:
            assert ends == [NOT_FOUND, ARCHIVED]
