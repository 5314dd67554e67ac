"""Names are compared as people write them, identifiers to the character, and neither by luck."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_dicom.cohort.row_matching import assess, explain_near_miss
from prefect_dicom.core.model import CohortRow, DateRange, Study
from prefect_dicom.dicom.value_matching import (
    blurred,
    like,
    names_agree,
    overlooked,
    study_day,
    written_otherwise,
)

# --- person names, PS3.5 6.2.1 ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "reported"),
    [
        ("Müller^Jörg", "Müller^Jörg"),
        ("Müller^Jörg", "MÜLLER^JÖRG"),
        ("Müller^Jörg", "Muller^Jorg"),
        ("Müller^Jörg", "Mu\u0308ller^Jo\u0308rg"),
        ("Müller^Jörg", " Müller ^Jörg "),
        ("Müller^Jörg", "Müller^Jörg^^^"),
        ("Müller^Jörg^^^", "Müller^Jörg"),
        ("Müller^Jörg", "Müller^Jörg^Karl^Dr.^MD"),
        ("Müller^Jörg^^Dr.", "Müller^Jörg^Karl^DR."),
        ("Müller", "Müller^Jörg"),
        ("^Jörg", "Müller^Jörg"),
        ("van der Berg^Jan", "Van  Der Berg^Jan"),
        ("Straße^Eva", "STRASSE^EVA"),
        ("Işık^Øyvind^Łukasz", "ISIK^OYVIND^LUKASZ"),
        ("Şahin^İbrahim", "sahin^ibrahim"),
        ("Müller^Jörg", "Müller^Jörg=山田^太郎"),
        ("Yamada^Tarou", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("山田^太郎", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("やまだ^たろう", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("Yamada^Tarou=山田^太郎", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("=山田^太郎", "Yamada^Tarou=山田^太郎"),
        # What an archive that answers in Latin-1 leaves of it.
        ("Yamada^Tarou=山田^太郎=やまだ^たろう", "Yamada^Tarou=^=^"),
        ("ﾔﾏﾀﾞ^ﾀﾛｳ", "ヤマダ^タロウ"),
        ("M?ller^*", "Müller^Jörg"),
        ("Yamada*", "YAMADA^Tarou=山田^太郎"),
        ("山*", "Yamada^Tarou=山田^太郎"),
        ("*^太郎", "Yamada^Tarou=山田^太郎"),
    ],
)
def test_a_name_agrees_with_what_is_the_same_name(asked, reported):
    assert names_agree(asked, reported) is True


@pytest.mark.parametrize(
    ("asked", "reported"),
    [
        ("Müller^Jörg", "Müller^Karl"),
        ("Müller^Jörg", "Meier^Jörg"),
        ("Müller^Jörg", "Müller"),
        ("Müller^Jörg^Karl", "Müller^Jörg"),
        ("Müller^Jörg", "Jörg^Müller"),
        ("Müller^Jörg", "Müller, Jörg"),
        ("Müller^Jörg", "Mueller^Joerg"),
        ("Müller^Jörg", "Müllers^Jörg"),
        ("Й^А", "И^А"),
        ("タナカ", "ダナカ"),
        ("山田^太郎", "Yamada^Tarou=山田^次郎"),
        ("Yamada^Tarou=山田^太郎", "Yamada^Jirou=山田^太郎"),
        ("M?ller", "Mueller^Jörg"),
        ("Müller*", "Meier"),
        ("*^太郎", "Yamada^Tarou=山田^次郎"),
    ],
)
def test_a_name_does_not_agree_with_another(asked, reported):
    assert names_agree(asked, reported) is False


@pytest.mark.parametrize(
    ("asked", "reported"),
    [
        ("Müller^Jörg", ""),
        ("Müller^Jörg", "^^^^"),
        ("Müller^Jörg", "=山田^太郎"),
        ("王^小东", "^"),
        ("王^小东", "Wang^XiaoDong="),
        ("Yamada^Tarou=山田^太郎", "==やまだ^たろう"),
        ("^^", "Müller"),
    ],
)
def test_where_nothing_can_be_compared_nothing_is_said(asked, reported):
    assert names_agree(asked, reported) is None


@pytest.mark.parametrize(
    ("asked", "reported", "otherwise"),
    [
        ("Müller, Jörg", "Müller^Jörg", True),
        ("Müller^Jörg", "Mueller^Joerg", True),
        ("Müller^Jörg", "Jörg^Müller", True),
        ("van der Berg^Jan", "Berg^Jan van der", True),
        ("O'Neil^Pat", "O Neil^Pat", True),
        ("Müller^Jörg", "Müller^Karl", False),
        ("Müller^Jörg", "", False),
    ],
)
def test_another_way_of_writing_is_distinguished_from_another_name(asked, reported, otherwise):
    assert written_otherwise(asked, reported) is otherwise


NAMES = st.text(st.sampled_from("aAäÄeoO山Й^=, *?\0"), max_size=8)


@given(NAMES, NAMES)
def test_no_name_breaks_the_comparison_and_case_never_matters(asked, reported):
    assert names_agree(asked.upper(), reported) == names_agree(asked, reported.upper())
    written_otherwise(asked, reported)


# --- identifiers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "reported", "words"),
    [
        ("000123", "123", ("leading zeros",)),
        ("123", "0123", ("leading zeros",)),
        ("A007", "A7", ("leading zeros",)),
        ("abc", "ABC", ("case",)),
        ("12 3", "123", ("blanks",)),
        ("123", "123\N{NO-BREAK SPACE}", ("blanks",)),
        ("123", "1\N{ZERO WIDTH SPACE}23", ("blanks",)),
        ("ü1", "u\u03081", ("Unicode form",)),
        ("12", "１２", ("Unicode form",)),
        ("ab c", "ABC", ("blanks", "case")),
        ("0abc", "abc", ()),
        ("007a", "7A", ("case", "leading zeros")),
        ("A7", "A7\\B8", ("number of values",)),
        ("123", "1234", ()),
        ("123", "123", ()),
        ("123", "", ()),
        ("100", "1", ()),
    ],
)
def test_what_a_person_overlooks_in_an_identifier_is_named(asked, reported, words):
    assert overlooked(asked, reported) == words


@given(st.text(max_size=6), st.text(max_size=6))
def test_what_is_overlooked_is_the_same_when_it_is_overlooked(one, other):
    if overlooked(one, other) and "\\" not in one + other:
        assert one != other and blurred(one) == blurred(other)


# --- dates and texts --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("20240229", date(2024, 2, 29)),
        ("2024.02.29", date(2024, 2, 29)),
        ("20240229 ", date(2024, 2, 29)),
        ("20240229\0", date(2024, 2, 29)),
        ("20230229", None),
        ("2024-02-29", None),
        ("202402", None),
        ("20240229\\20240301", None),
        ("２０２４０２２９", None),
        ("", None),
    ],
)
def test_a_day_is_eight_digits_or_the_older_form_with_dots(text, day):
    assert study_day(text) == day


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [
        ("CT*", "ct thorax", True),
        ("*lung*", "CT LUNG ", True),
        ("M?", "MR", True),
        ("M?", "M", False),
        ("CT", "CT thorax", False),
    ],
)
def test_wildcards_are_evaluated_on_our_side(pattern, text, fits):
    assert like(pattern, text) is fits


# --- the checks of a row ----------------------------------------------------------------------

STUDY = Study(
    "1.2.3",
    patient_id="P1",
    accession_number="A7",
    study_date="20240115",
    patient_name="Müller^Jörg",
    patient_birth_date="19700131",
)
ROW = CohortRow(2, accession_number="A7")


def test_a_name_and_a_birth_date_that_agree_let_the_study_be_taken():
    row = replace(ROW, patient_name="MULLER^JORG", patient_birth_date=date(1970, 1, 31))
    assert assess(row, [STUDY]).studies == (STUDY,)


@pytest.mark.parametrize(
    ("given", "reported", "why"),
    [
        ({"patient_name": "Meier^Eva"}, {}, "PatientName is another"),
        ({"patient_name": "Müller, Jörg"}, {}, "PatientName is written otherwise"),
        ({"patient_name": "王^小东"}, {}, "PatientName is in other letters, not compared"),
        ({"patient_name": "Müller"}, {"patient_name": ""}, "PatientName is missing"),
        ({"patient_birth_date": date(1970, 1, 30)}, {}, "PatientBirthDate is another"),
        (
            {"patient_birth_date": date(1970, 1, 31)},
            {"patient_birth_date": "***"},
            "PatientBirthDate is missing",
        ),
    ],
)
def test_a_study_that_may_be_a_strangers_is_shown_and_not_taken(given, reported, why):
    row, study = replace(ROW, **given), replace(STUDY, **reported)
    found = assess(row, [study])
    assert (found.studies, found.reason, found.near_misses) == ((), "name-disagrees", (study,))
    assert explain_near_miss(row, study) == (why,)


def test_one_study_that_disagrees_keeps_the_whole_row_from_being_taken():
    """A part would be taken for all there is."""
    other = replace(STUDY, study_instance_uid="1.2.4", patient_name="Meier^Eva")
    row = CohortRow(2, "P1", patient_name="Müller^Jörg")
    found = assess(row, [STUDY, other])
    assert (found.studies, found.reason) == ((), "name-disagrees")
    assert [explain_near_miss(row, study) for study in found.near_misses] == [
        (),
        ("PatientName is another",),
    ]


def test_a_name_identifies_nobody():
    other = replace(STUDY, study_instance_uid="1.2.4", patient_id="P2", patient_name="Meier^Eva")
    row = replace(ROW, patient_name="Müller^Jörg")
    assert assess(row, [STUDY, other]).reason == "several-patients"
    assert assess(CohortRow(2, "P9", patient_name="Müller^Jörg"), [STUDY]).reason == "no-match"


def test_studies_that_a_filter_leaves_out_are_not_checked():
    other = replace(
        STUDY, study_instance_uid="1.2.4", study_date="20200101", patient_name="Meier^Eva"
    )
    january = DateRange(date(2024, 1, 1), date(2024, 1, 31))
    row = CohortRow(2, "P1", study_date=january, patient_name="Müller^Jörg")
    assert assess(row, [STUDY, other]).studies == (STUDY,)


@pytest.mark.parametrize(
    ("day", "near"),
    [("20231231", True), ("20240201", True), ("20231230", False), ("20240202", False), ("", False)],
)
def test_a_study_one_day_out_of_the_range_is_a_near_miss(day, near):
    row = replace(ROW, study_date=DateRange(date(2024, 1, 1), date(2024, 1, 31)))
    study = replace(STUDY, study_date=day)
    found = assess(row, [study])
    assert (found.studies, found.reason) == ((), "excluded-by-filter")
    assert found.near_misses == ((study,) if near else ())
    assert ("StudyDate is one day off" in explain_near_miss(row, study)) is near


# --- bytes ------------------------------------------------------------------------------------


def test_patient_ids_of_other_bytes_are_other_patients_where_their_characters_are_a_guess():
    latin = replace(
        STUDY, patient_id="Mü", original=(("PatientID", "4dfc"),), guessed=("PatientID",)
    )
    utf8 = replace(latin, study_instance_uid="1.2.4", original=(("PatientID", "4dc3bc"),))
    for row in (ROW, CohortRow(2, "Mü")):
        assert assess(row, [latin]).studies == (latin,)
        found = assess(row, [latin, utf8])
        assert (found.studies, found.reason) == ((), "several-patients")
        assert found.near_misses == (latin, utf8)


def test_one_patient_in_two_declared_character_sets_is_one():
    latin = replace(STUDY, patient_id="Mü", original=(("PatientID", "4dfc"),))
    utf8 = replace(latin, study_instance_uid="1.2.4", original=(("PatientID", "4dc3bc"),))
    assert assess(CohortRow(2, "Mü"), [latin, utf8]).studies == (latin, utf8)


def test_no_unicode_form_is_taken_for_another():
    study = replace(STUDY, patient_id="Mu\u0308")
    found = assess(CohortRow(2, "Mü"), [study])
    assert (found.studies, found.near_misses) == ((), (study,))
