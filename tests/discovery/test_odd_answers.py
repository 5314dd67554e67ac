"""Answers in misspelt character sets, and with numbers as a database formats them."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import pytest

from prefect_dicom.core.model import Verdict
from prefect_dicom.report.tables import write_reports
from prefect_dicom.testing import Behaviour
from tests.support.sites import Place, site_around, study

CYRILLIC, OTHER_CYRILLIC = "Люк^Иван", "Лев^Иван"
KANJI, OTHER_KANJI = "山田^太郎", "山本^太郎"
UTF8 = "ISO_IR 192"


@pytest.fixture
def around(tmp_path: Path):
    """Builds a site that asks by C-GET, which needs no receiver."""
    return partial(site_around, tmp_path, retrieve="c-get")


def held(seed: int, **elements: str):
    return study(seed, SpecificCharacterSet=UTF8, **elements)


def candidates(place: Place) -> list[dict[str, str]]:
    with place.ledger() as ledger:
        folder = write_reports(ledger, ledger.cohorts.get("1"), place.folder / "reports")
    path = folder / "candidates.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


SETS = [
    ("ISO-IR 144", "iso8859_5", CYRILLIC, OTHER_CYRILLIC),
    ("ISO_IR144", "iso8859_5", CYRILLIC, OTHER_CYRILLIC),
    ("iso-8859-5", "iso8859_5", CYRILLIC, OTHER_CYRILLIC),
    ("WINDOWS-1251", "cp1251", CYRILLIC, OTHER_CYRILLIC),
    ("UTF-8", "utf_8", CYRILLIC, OTHER_CYRILLIC),
    ("ISO_IR 13", "cp932", KANJI, OTHER_KANJI),
    ("ISO 2022 IR 13\\ISO 2022 IR 87", "cp932", KANJI, OTHER_KANJI),
    ("Shift_JIS", "cp932", KANJI, OTHER_KANJI),
    ("ISO_IR 100", "cp932", KANJI, OTHER_KANJI),
    ("", "cp932", KANJI, OTHER_KANJI),
    ("ISO_IR 100", "cp1251", CYRILLIC, OTHER_CYRILLIC),
    ("ISO_IR 100", "gb2312", "王^小明", "李^小明"),
]


@pytest.mark.parametrize(("declared", "encoding", "name", "other"), SETS)
def test_a_name_in_a_misspelt_set_is_compared(declared, encoding, name, other, around):
    script = [Behaviour("find.declare", declared=declared, encoding=encoding)]
    objects = held(1, PatientID="P1", PatientName=name) + held(2, PatientID="P2", PatientName=name)
    with around(objects, script=script) as place:
        place.pull(
            place.cohort(
                [
                    {"PatientID": "P1", "PatientName": name},
                    {"PatientID": "P2", "PatientName": other},
                ]
            )
        )
        assert [(str(v.verdict), v.reason) for v in place.verdicts()] == [
            ("archived", "all-archived"),
            ("ambiguous", "name-disagrees"),
        ]
        (candidate,) = candidates(place)
        assert candidate["PatientName"] == name
        assert "PatientName is another" in candidate["Why"]


@pytest.mark.parametrize("retrieve", ["c-get", "c-move"])
@pytest.mark.parametrize("declared", ["ISO-IR 144", "ISO_IR144", "ISO_IR 144"])
def test_a_patient_id_in_a_misspelt_set_is_found(declared, retrieve, around):
    script = [Behaviour("find.declare", declared=declared, encoding="iso8859_5")]
    objects = held(1, PatientID="Ил-1") + held(2, PatientID="Ил-2")
    with around(objects, script=script, retrieve=retrieve) as place:
        place.pull(place.cohort([{"PatientID": "Ил-1"}]))
        assert [str(v.verdict) for v in place.verdicts()] == ["archived"]
        assert len(place.studies()) == 1
        place.audit()


def test_a_name_in_other_letters_is_said_to_be_not_compared(around):
    script = [Behaviour("find.declare", declared="ISO_IR 13", encoding="cp932")]
    with around(held(1, PatientID="P1", PatientName=KANJI), script=script) as place:
        place.pull(place.cohort([{"PatientID": "P1", "PatientName": "Yamada^Taro"}]))
        (candidate,) = candidates(place)
        assert "PatientName is in other letters, not compared" in candidate["Why"]
        assert candidate["PatientName"] == KANJI


def test_bytes_of_no_known_set_are_shown_as_a_guess(around):
    script = [Behaviour("find.declare", declared="NO SUCH SET", encoding="iso8859_5")]
    with around(held(1, PatientID="P1", PatientName=CYRILLIC), script=script) as place:
        place.pull(place.cohort([{"PatientID": "P1", "PatientName": OTHER_CYRILLIC}]))
        (candidate,) = candidates(place)
        assert "PatientName" in candidate["Guessed"]
        assert CYRILLIC.encode("iso8859_5").hex() in candidate["Bytes"]


# --- numbers

COUNTS = ("NumberOfStudyRelatedInstances", "NumberOfStudyRelatedSeries")


@pytest.mark.parametrize("written", ["4.0", "4.", "4.000", "+4", " 4 ", "4,0"])
def test_counts_with_a_fraction_of_zero_are_counts(written, around):
    objects = study(1, instances=4, PatientID="P1")
    script = [
        Behaviour("find.no_image_level"),
        Behaviour(
            "find.answer", values={"NumberOfSeriesRelatedInstances": written}, level="SERIES"
        ),
    ]
    with around(objects, script=script) as place:
        assert place.pull(place.cohort([{"PatientID": "P1"}])).rows == {Verdict.ARCHIVED: 1}
        (record,) = place.studies().values()
        assert str(record.evidence) == "series-counts"
        place.audit()


@pytest.mark.parametrize("written", ["4.5", "four", "-4", "4.0.0", "9" * 13])
def test_what_is_no_whole_number_counts_nothing(written, around):
    script = [
        Behaviour("find.no_image_level"),
        Behaviour(
            "find.answer", values={"NumberOfSeriesRelatedInstances": written}, level="SERIES"
        ),
    ]
    with around(study(1, instances=4, PatientID="P1"), script=script) as place:
        place.pull(place.cohort([{"PatientID": "P1"}]))
        assert [v.reason for v in place.verdicts()] == ["evidence-too-weak"]


def with_definition(place: Place, text: str) -> Path:
    path = place.folder / "cohort.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("written", "verdict"),
    [("2.0", "archived"), ("2", "archived"), ("2.5", "ambiguous"), ("3.0", "excluded")],
)
def test_a_series_is_chosen_by_a_number_with_a_fraction_of_zero(written, verdict, around):
    objects = study(1, instances=2, PatientID="P1", StudyDate="20240105")
    script = [Behaviour("find.answer", values={"SeriesNumber": written}, level="SERIES")]
    with around(objects, script=script) as place:
        definition = with_definition(
            place,
            "studies: {StudyDate: 20240101-20240131}\nseries: {SeriesNumber: 2}\n",
        )
        place.pull(definition)
        assert [str(v.verdict) for v in place.verdicts()] == [verdict]


# --- modalities


@pytest.mark.parametrize(
    ("answered", "wanted"),
    [("*", "CT"), ("UNKNOWN", "CT"), ("CT*", "CT"), ("CT/SR", "CT"), ("MRI", "MR"), ("0", "CT")],
)
def test_modalities_that_state_nothing_exclude_no_study(answered, wanted, around):
    script = [Behaviour("find.answer", values={"ModalitiesInStudy": answered}, level="STUDY")]
    with around(study(1, AccessionNumber="A1"), script=script) as place:
        place.pull(place.cohort([{"AccessionNumber": "A1", "Modality": wanted}]))
        assert [str(v.verdict) for v in place.verdicts()] == ["archived"]


@pytest.mark.parametrize("answered", ["OT", "MR\\SR", "MRI", "ACME"])
def test_other_modalities_exclude_it(answered, around):
    script = [Behaviour("find.answer", values={"ModalitiesInStudy": answered}, level="STUDY")]
    with around(study(1, AccessionNumber="A1"), script=script) as place:
        place.pull(place.cohort([{"AccessionNumber": "A1", "Modality": "CT"}]))
        assert [str(v.verdict) for v in place.verdicts()] == ["excluded"]


@pytest.mark.parametrize(
    ("level", "keyword", "filters"),
    [
        ("STUDY", "ModalitiesInStudy", "studies: {StudyDate: 20240101-20240131, Modality: CT}"),
        (
            "STUDY",
            "ModalitiesInStudy",
            "studies: {StudyDate: 20240101-20240131, Modality: {not: MR}}",
        ),
        ("SERIES", "Modality", "studies: {StudyDate: 20240101-20240131}\nseries: {Modality: CT}"),
    ],
)
def test_a_definition_leaves_to_a_person_what_states_nothing(level, keyword, filters, around):
    script = [Behaviour("find.answer", values={keyword: "*"}, level=level)]
    with around(study(1, PatientID="P1", StudyDate="20240105"), script=script) as place:
        place.pull(with_definition(place, filters))
        assert [v.reason for v in place.verdicts()] == ["filter-undecided"]
        (row,) = candidates(place)
        assert f"{keyword}" in row["Why"] or "series" in row["Why"]
