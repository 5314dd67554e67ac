"""Every answer of a C-FIND is compared with the row again, and a row asks by identifiers only."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefect_dicom.cohort.row_matching import (
    MOST_NEAR_MISSES,
    assess,
    explain_near_miss,
    identifies,
    is_date_window,
    passes_filters,
    study_query,
)
from prefect_dicom.core.model import CohortRow, DateRange, Study
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.core.uids import is_safe_key

JANUARY = DateRange(date(2024, 1, 1), date(2024, 1, 31))
STUDY = Study(
    "1.2.3",
    patient_id="000123",
    accession_number="A7",
    study_date="20240115",
    modalities=("CT", "SR"),
    study_description="Thorax nativ",
)


# --- what is asked --------------------------------------------------------------------------


def test_a_row_asks_by_its_identifiers_and_never_by_its_filters():
    row = CohortRow(
        2, "000123", "A7", study_date=JANUARY, modality="CT", study_description="*Thorax*"
    )
    assert study_query(row) == {"PatientID": "000123", "AccessionNumber": "A7"}
    assert study_query(CohortRow(2, accession_number="A7")) == {"AccessionNumber": "A7"}


def test_a_row_without_identifiers_asks_by_its_days_with_one_more_at_each_end():
    row = CohortRow(1, study_date=JANUARY, modality="CT")
    assert study_query(row) == {"StudyDate": "20231231-20240201"}
    until = CohortRow(1, study_date=DateRange(None, date(2024, 1, 31)))
    assert study_query(until) == {"StudyDate": "19000101-20240201"}


def test_a_study_uid_is_asked_for_alone():
    assert study_query(CohortRow(2, "000123", "A7", "1.2.3")) == {"StudyInstanceUID": "1.2.3"}


@pytest.mark.parametrize(
    "row",
    [
        CohortRow(2),
        CohortRow(2, modality="CT"),
        CohortRow(2, "***", study_date=JANUARY),
        CohortRow(2, "1", "A\\B"),
        CohortRow(2, "1", study_instance_uid=""),
        CohortRow(2, "1", study_instance_uid="1.2.*"),
    ],
)
def test_a_key_that_selects_others_is_never_sent(row):
    with pytest.raises(ValueError, match="line 2 has no key"):
        study_query(row)


@given(st.builds(CohortRow, st.just(2), *(st.none() | st.text(max_size=5) for _ in range(3))))
def test_whatever_is_sent_is_safe_to_send(row):
    try:
        keys = study_query(row)
    except ValueError:
        return
    assert keys and all(is_safe_key(value) for value in keys.values())


# --- identity -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "answered", "same"),
    [
        ("000123", "000123", True),
        ("000123", "000123 ", True),
        ("000123", " 000123\0", True),
        ("000123", "123", False),
        ("123", "000123", False),
        ("123", "1234", False),
        ("abc", "ABC", False),
        ("A B", "AB", False),
        ("123", "", False),
        ("123", "123\\456", False),
    ],
)
def test_identifiers_are_compared_exactly_but_for_padding(asked, answered, same):
    by_patient = identifies(CohortRow(2, asked), replace(STUDY, patient_id=answered))
    by_accession = identifies(
        CohortRow(2, accession_number=asked), replace(STUDY, accession_number=answered)
    )
    assert by_patient is same and by_accession is same


def test_uids_are_compared_without_their_padding():
    row = CohortRow(2, study_instance_uid="1.2.3")
    assert identifies(row, replace(STUDY, study_instance_uid="1.2.3\0"))
    assert not identifies(row, replace(STUDY, study_instance_uid="1.2.30"))


def test_every_identifier_the_row_gives_has_to_be_the_studys():
    assert identifies(CohortRow(2, "000123", "A7", "1.2.3"), STUDY)
    assert not identifies(CohortRow(2, "000123", "A8", "1.2.3"), STUDY)
    assert not identifies(CohortRow(2, "000124", "A7", "1.2.3"), STUDY)
    assert not identifies(CohortRow(2, "000123", "A7", "1.2.4"), STUDY)


def test_a_row_without_identifiers_identifies_nothing():
    assert not identifies(CohortRow(2, modality="CT"), STUDY)


def test_a_row_of_days_takes_every_patients_studies_but_no_uid_that_patients_share():
    row = CohortRow(1, study_date=JANUARY)
    other = replace(STUDY, study_instance_uid="1.2.4", patient_id="P9")
    late = replace(STUDY, study_instance_uid="1.2.5", study_date="20240201")
    found = assess(row, [STUDY, other, late])
    assert (found.studies, found.reason, found.near_misses) == ((STUDY, other), None, ())
    shared = replace(STUDY, patient_id="P8")
    found = assess(row, [STUDY, other, shared])
    assert (found.studies, found.reason) == ((other,), None)
    assert found.near_misses == (STUDY, shared)
    assert assess(row, [STUDY, shared]).reason == "several-patients"


# --- filters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answered", "inside"),
    [
        ("20240101", True),
        ("20240131 ", True),
        ("2024.01.15", True),
        ("20231231", False),
        ("20240201", False),
        ("", False),
        ("00000000", False),
        ("20240230", False),
        ("***", False),
        ("20240101-20240131", False),
    ],
)
def test_a_date_range_takes_readable_dates_within_it(answered, inside):
    study = replace(STUDY, study_date=answered)
    assert passes_filters(CohortRow(2, "1", study_date=JANUARY), study) is inside
    assert passes_filters(CohortRow(2, "1"), study)


def test_an_open_range_does_not_take_undated_studies():
    until = DateRange(None, date(2024, 1, 31))
    assert passes_filters(CohortRow(2, "1", study_date=until), STUDY)
    assert not passes_filters(CohortRow(2, "1", study_date=until), replace(STUDY, study_date=""))


@pytest.mark.parametrize(
    ("modalities", "passes"),
    [
        (("CT", "SR"), True),
        (("ct ",), True),
        (("MR",), False),
        (("ACME",), False),
        (("CTA",), True),
        ((), True),
        (("",), True),
    ],
)
def test_the_modality_has_to_be_among_the_studys_where_these_are_known(modalities, passes):
    study = replace(STUDY, modalities=modalities)
    assert passes_filters(CohortRow(2, "1", modality="Ct"), study) is passes


@pytest.mark.parametrize(
    ("pattern", "description", "passes"),
    [
        ("Thorax", "thorax", True),
        ("Thorax", "Thorax nativ", False),
        ("*thorax*", "CT Thorax nativ", True),
        ("CT*nativ", "CT Thorax nativ ", True),
        ("CT*tho*nat", "CT Thorax nativ", False),
        ("a*ab", "aab", True),
        ("a*a", "a", False),
        ("T?orax", "Thorax", True),
        ("T?orax", "Torax", False),
        ("*", "", True),
        ("**", "x\ny", True),
        ("?", "", False),
        ("CT (1+1)", "ct (1+1)", True),
        ("[a-z]", "b", False),
        ("*übersicht*", "ÜBERSICHT", True),
    ],
)
def test_a_description_is_compared_with_its_wildcards_and_without_case(
    pattern, description, passes
):
    study = replace(STUDY, study_description=description)
    assert passes_filters(CohortRow(2, "1", study_description=pattern), study) is passes


@given(
    pattern=st.text(st.sampled_from("ab*?"), max_size=8).filter(bool),
    description=st.text(st.sampled_from("ab"), max_size=8),
)
def test_wildcards_mean_what_they_mean_one_character_at_a_time(pattern, description):
    def matches(p: str, d: str) -> bool:
        if not p:
            return not d
        if p[0] == "*":
            return matches(p[1:], d) or (bool(d) and matches(p, d[1:]))
        return bool(d) and p[0] in ("?", d[0]) and matches(p[1:], d[1:])

    study = replace(STUDY, study_description=description)
    row = CohortRow(2, "1", study_description=pattern)
    assert passes_filters(row, study) is matches(pattern, description)


def test_no_pattern_takes_long():
    study = replace(STUDY, study_description="a" * 10_000)
    begin = time.perf_counter()
    assert not passes_filters(CohortRow(2, "1", study_description="*a" * 30 + "*b"), study)
    assert time.perf_counter() - begin < 5


# --- the decision ---------------------------------------------------------------------------


def test_a_peer_that_ignores_the_key_is_filtered():
    others = [Study(f"1.2.{n}", patient_id=f"P{n}") for n in range(149)]
    found = assess(CohortRow(2, "000123"), [*others, STUDY])
    assert found.studies == (STUDY,) and found.reason is None and found.near_misses == ()


def test_no_answer_and_no_fitting_answer_are_no_match():
    assert assess(CohortRow(2, "000123"), []).reason == "no-match"
    assert assess(CohortRow(2, "P9"), [STUDY]).reason == "no-match"


def test_studies_of_the_row_that_pass_no_filter_are_excluded():
    found = assess(CohortRow(2, "000123", modality="MR"), [STUDY])
    assert (found.studies, found.reason) == ((), "excluded-by-filter")


def test_all_studies_of_a_patient_are_found():
    second = replace(STUDY, study_instance_uid="1.2.4", study_date="20240302")
    assert assess(CohortRow(2, "000123"), [STUDY, second]).studies == (STUDY, second)
    row = CohortRow(2, "000123", study_date=JANUARY)
    assert assess(row, [STUDY, second]).studies == (STUDY,)


def test_an_accession_number_of_two_patients_is_ambiguous():
    other = Study("1.2.9", patient_id="P9", accession_number="A7", study_date="20230101")
    found = assess(CohortRow(2, accession_number="A7"), [STUDY, other])
    assert (found.studies, found.reason) == ((), "several-patients")
    assert found.near_misses == (STUDY, other)
    # With the patient, or with a filter only one patient's studies pass, it is not.
    assert assess(CohortRow(2, "P9", "A7"), [STUDY, other]).studies == (other,)
    row = CohortRow(2, accession_number="A7", study_date=JANUARY)
    assert assess(row, [STUDY, other]).studies == (STUDY,)


def test_a_study_uid_under_two_patients_is_ambiguous_whatever_the_filters():
    other = replace(STUDY, patient_id="P9", study_date="20230101")
    row = CohortRow(2, study_instance_uid="1.2.3", study_date=JANUARY)
    found = assess(row, [STUDY, other])
    assert (found.studies, found.reason) == ((), "several-patients")
    assert found.near_misses == (STUDY, other)


def test_with_the_patient_given_a_study_uid_under_two_patients_is_that_patients():
    other = replace(STUDY, patient_id="P9")
    found = assess(CohortRow(2, "P9", study_instance_uid="1.2.3"), [STUDY, other])
    assert (found.studies, found.reason) == ((other,), None)


def test_patients_that_differ_in_padding_only_are_one():
    second = replace(STUDY, study_instance_uid="1.2.4", patient_id="000123 ")
    assert len(assess(CohortRow(2, accession_number="A7"), [STUDY, second]).studies) == 2


def test_repeated_answers_for_a_study_are_one_study():
    by_modality = [
        replace(STUDY, modalities=("SR",), number_of_instances=1, study_description=""),
        replace(STUDY, modalities=("CT",), number_of_instances=40, study_instance_uid="1.2.3\0"),
    ]
    (study,) = assess(CohortRow(2, "000123", modality="CT"), by_modality).studies
    assert study == replace(STUDY, modalities=("SR", "CT"), number_of_instances=40)


@pytest.mark.parametrize("uid", ["", " ", "*", "1.2.*", "1.2\\1.3", "1.2\n"])
def test_a_study_whose_uid_would_select_others_is_not_asked_for(uid):
    unsafe = replace(STUDY, study_instance_uid=uid)
    found = assess(CohortRow(2, "000123"), [unsafe])
    assert (found.studies, found.reason) == ((), "unsafe-uid")
    assert found.near_misses == (unsafe,)
    found = assess(CohortRow(2, "000123"), [unsafe, STUDY])
    assert (found.studies, found.reason, found.near_misses) == ((STUDY,), None, (unsafe,))


@pytest.mark.parametrize("answered", ["123", "0000123", "000123\u00a0", "000 123"])
def test_answers_that_a_person_might_have_meant_are_kept_to_read_only(answered):
    near = replace(STUDY, study_instance_uid="1.2.9", patient_id=answered)
    found = assess(CohortRow(2, "000123"), [near])
    assert (found.studies, found.reason, found.near_misses) == ((), "no-match", (near,))
    found = assess(CohortRow(2, "000123"), [near, STUDY])
    assert (found.studies, found.reason, found.near_misses) == ((STUDY,), None, (near,))


def test_case_makes_a_near_miss_and_another_accession_number_does_not():
    near = replace(STUDY, accession_number="a07")
    assert assess(CohortRow(2, "000123", "A7"), [near]).near_misses == (near,)
    other = replace(STUDY, accession_number="A8")
    assert assess(CohortRow(2, "000123", "A7"), [other]).near_misses == ()


def test_near_misses_are_bounded():
    answers = [replace(STUDY, study_instance_uid=f"1.{n}", patient_id="123") for n in range(99)]
    assert len(assess(CohortRow(2, "000123"), answers).near_misses) == MOST_NEAR_MISSES
    answers = [Study(f"1.{n}", patient_id=f"P{n}", accession_number="A7") for n in range(99)]
    found = assess(CohortRow(2, accession_number="A7"), iter(answers))
    assert found.near_misses == tuple(answers[:MOST_NEAR_MISSES])


TEXTS = st.sampled_from(["", "1", "01", "1 ", "a", "A", "*", "1\\2", "1.2"])
ROWS = st.builds(
    CohortRow,
    st.just(2),
    *(st.none() | TEXTS for _ in range(3)),
    study_date=st.sampled_from([None, JANUARY]),
    modality=st.sampled_from([None, "CT"]),
)
STUDIES = st.builds(
    Study,
    TEXTS,
    TEXTS,
    TEXTS,
    st.sampled_from(["", "20240115", "20230101"]),
    st.sampled_from([(), ("CT",), ("MR",)]),
)


@given(row=ROWS, answers=st.lists(STUDIES, max_size=6))
def test_whatever_is_answered_only_safe_studies_of_the_row_and_one_patient_are_found(row, answers):
    found = assess(row, answers)
    assert (found.reason is None) == bool(found.studies)
    assert found.reason is None or reason_for(found.reason)
    assert len(found.near_misses) <= MOST_NEAR_MISSES
    for study in found.studies:
        assert is_safe_key(study.study_instance_uid)
        assert identifies(row, study) and passes_filters(row, study)
    # A window of days is for studies of all patients.
    assert is_date_window(row) or len({study.patient_id.strip() for study in found.studies}) <= 1
    keys = [(study.study_instance_uid, study.patient_id.strip()) for study in found.studies]
    assert len(keys) == len(set(keys))


def test_a_study_found_by_its_uid_under_another_number_is_a_near_miss():
    row = CohortRow(2, accession_number="A8", study_instance_uid="1.2.3")
    found = assess(row, [STUDY])
    assert (found.studies, found.reason, found.near_misses) == ((), "no-match", (STUDY,))
    assert explain_near_miss(row, STUDY) == ("AccessionNumber is another",)


def test_two_answers_of_one_study_are_one_with_what_each_tells():
    first = replace(STUDY, modalities=("CT",), patient_name="Alpha^Anna")
    second = replace(STUDY, modalities=("SR",), issuer_of_patient_id="NORTH")
    for answers in ([first, second], [second, first]):
        (study,) = assess(CohortRow(2, accession_number="A7"), answers).studies
        assert set(study.modalities) == {"CT", "SR"}
        assert (study.patient_name, study.issuer_of_patient_id) == ("Alpha^Anna", "NORTH")
