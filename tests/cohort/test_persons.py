"""Two people under one PatientID are two people, and one person stays one."""

from __future__ import annotations

from dataclasses import replace
from datetime import date

import pytest

from prefect_dicom.cohort.persons import (
    issuers_agree,
    same_person,
    several_patients,
    studies_of_issuer,
)
from prefect_dicom.cohort.row_matching import assess, explain_near_miss
from prefect_dicom.core.model import CohortRow, DateRange, Study

ANNA = Study(
    "1.1",
    patient_id="12345",
    accession_number="A1",
    study_date="20240105",
    patient_name="Alpha^Anna",
    patient_birth_date="19500101",
    issuer_of_patient_id="NORTH",
)
BERT = Study(
    "1.2",
    patient_id="12345",
    accession_number="A1",
    study_date="20240305",
    patient_name="Beta^Bert",
    patient_birth_date="19800202",
    issuer_of_patient_id="SOUTH",
)
BY_PATIENT = CohortRow(2, "12345")


def without_issuer(*studies: Study) -> list[Study]:
    return [replace(study, issuer_of_patient_id="") for study in studies]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        # One birth date: one person.
        (("Müller^Jörg", "19500101", ""), ("MUELLER^JOERG", "19500101", ""), True),
        (("Alpha^Anna", "19500101", ""), ("Gamma^Anna", "19500101", ""), True),
        (("Alpha^Anna", "19500101", ""), ("Anna Alpha", "1950.01.01", ""), True),
        (("Alpha^Anna", "19500101", "NORTH"), ("Alpha^Anna^^Dr.", "19500101", "SOUTH"), True),
        (("Alpha^Anna", "19500101", "NORTH"), ("", "19500101", "SOUTH"), True),
        # Two people.
        (("Alpha^Anna", "19500101", ""), ("Beta^Bert", "19800202", ""), False),
        (("Alpha^Anna", "19500101", ""), ("Alpha^Anna", "19800202", ""), False),
        (("", "19500101", ""), ("", "19800202", ""), False),
        (("Alpha^Anna", "19500101", "NORTH"), ("Beta^Bert", "19500101", "SOUTH"), False),
        (("Alpha^Anna", "", "NORTH"), ("Alpha^Anna", "", "SOUTH"), False),
        (("", "", "NORTH"), ("", "", "SOUTH"), False),
        (("Alpha^Anna", "", ""), ("Beta^Bert", "19800202", ""), False),
        # Not enough to tell.
        (("Alpha^Anna", "", ""), ("Gamma^Anna", "19800202", ""), None),
        (("Alpha^Anna", "19500101", ""), ("", "", ""), None),
        (("Alpha^Anna", "", ""), ("ALPHA^ANNA", "", ""), None),
        (("Alpha^Anna", "", ""), ("王^小东", "", ""), None),
        (("Alpha^Anna", "", "NORTH"), ("Alpha^Anna", "", ""), None),
    ],
)
def test_birth_dates_issuers_and_names_say_whether_two_are_one(first, second, same):
    one, other = (
        Study("1", patient_name=name, patient_birth_date=born, issuer_of_patient_id=issuer)
        for name, born, issuer in (first, second)
    )
    assert same_person(one, other) is same
    assert same_person(other, one) is same
    assert several_patients([one, other]) is (same is False)


def test_a_name_that_could_not_be_decoded_is_nobodys():
    garbled = Study("1", patient_name="Ãœ^??", guessed=("PatientName",))
    assert same_person(Study("2", patient_name="Beta^Bert"), garbled) is None


@pytest.mark.parametrize(
    ("first", "second", "agree"),
    [
        ("NORTH", "north ", True),
        ("NORTH", "NORTH&1.2.3&ISO", True),
        ("NORTH", "SOUTH", False),
        ("Site 1", "SITE1", True),
        ("NORTH", "", None),
        ("", "", None),
    ],
)
def test_an_issuer_is_named_in_several_ways(first, second, agree):
    assert issuers_agree(first, second) is agree
    assert issuers_agree(second, first) is agree


@pytest.mark.parametrize("studies", [[ANNA, BERT], without_issuer(ANNA, BERT)])
@pytest.mark.parametrize("row", [BY_PATIENT, CohortRow(2, accession_number="A1")])
def test_two_people_under_one_number_are_asked_about(row, studies):
    found = assess(row, studies)
    assert (found.studies, found.reason) == ((), "several-patients")
    assert found.near_misses == tuple(studies)
    assert assess(row, studies[::-1]).reason == "several-patients"


@pytest.mark.parametrize(
    "row",
    [
        CohortRow(2, "12345", issuer_of_patient_id="north"),
        CohortRow(2, "12345", patient_birth_date=date(1950, 1, 1)),
        CohortRow(2, "12345", patient_name="ALPHA^ANNA"),
        CohortRow(2, "12345", study_date=DateRange(date(2024, 1, 1), date(2024, 1, 31))),
        CohortRow(2, accession_number="A1", issuer_of_patient_id="NORTH"),
        CohortRow(2, "12345", study_instance_uid="1.1"),
    ],
)
def test_a_row_that_says_who_is_meant_has_that_persons_studies(row):
    found = assess(row, [ANNA, BERT])
    assert (found.studies, found.reason, found.near_misses) == ((ANNA,), None, ())


def test_an_issuer_that_nobody_has_matches_nothing_and_says_what_differs():
    row = CohortRow(2, "12345", issuer_of_patient_id="EAST")
    found = assess(row, [ANNA, BERT])
    assert (found.studies, found.reason, found.near_misses) == ((), "no-match", (ANNA, BERT))
    assert explain_near_miss(row, ANNA) == ("IssuerOfPatientID is another",)


def test_an_issuer_that_no_answer_has_cannot_be_compared():
    row = CohortRow(2, "12345", issuer_of_patient_id="NORTH")
    (untold,) = without_issuer(ANNA)
    found = assess(row, [untold])
    assert (found.studies, found.reason) == ((), "identifier-missing")
    assert explain_near_miss(row, untold) == ("IssuerOfPatientID is missing",)


def test_of_studies_without_an_issuer_those_of_the_issuers_patient_are_taken():
    row = CohortRow(2, "12345", issuer_of_patient_id="NORTH")
    annas, berts = (
        replace(study, study_instance_uid=f"{study.study_instance_uid}.9")
        for study in without_issuer(ANNA, BERT)
    )
    assert studies_of_issuer("NORTH", [ANNA, annas, BERT, berts]) == ([ANNA, annas], [])
    assert assess(row, [ANNA, annas, BERT, berts]).studies == (ANNA, annas)
    nobodys = Study("1.9", patient_id="12345")
    assert assess(row, [ANNA, nobodys]).reason == "several-patients"


def test_one_study_under_two_people_is_nobodys_whatever_its_number():
    other = replace(BERT, study_instance_uid=ANNA.study_instance_uid)
    found = assess(CohortRow(2, study_instance_uid="1.1"), [ANNA, other])
    assert (found.reason, found.near_misses) == ("several-patients", (ANNA, other))
    days = CohortRow(1, study_date=DateRange(date(2024, 1, 1), date(2024, 12, 31)))
    third = replace(ANNA, study_instance_uid="1.3")
    found = assess(days, [ANNA, other, third, replace(BERT, study_instance_uid="1.4")])
    assert [study.study_instance_uid for study in found.studies] == ["1.3", "1.4"]


def test_the_other_number_of_a_row_is_the_same_patients():
    row = CohortRow(2, "OLD-1", accession_number="A1", other_patient_id="12345")
    assert assess(row, [ANNA]).studies == (ANNA,)
    old = replace(ANNA, study_instance_uid="1.3", patient_id="OLD-1")
    assert assess(row, [ANNA, old]).studies == (ANNA, old)
    assert assess(row, [ANNA, BERT]).reason == "several-patients"
