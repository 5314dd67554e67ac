"""Persons behind the answers of a PACS: is everything under one PatientID one person's?

A PatientID is unique within its issuer only (PS3.3 C.7.1.1), and PACS of several hospitals hold
the same one twice. Issuer, birth date and name of the answers are compared. One birth date is one
person, however the name is spelled, and under another family name too; what an answer does not
have is not held against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations

from prefect_dicom.core.model import Study
from prefect_dicom.dicom.value_matching import (
    blurred,
    given_names_agree,
    names_agree,
    study_day,
    unpadded,
    written_otherwise,
)

_MOST_COMPARED = 50
"""Different descriptions of persons that are compared with each other."""


def issuers_agree(wanted: str, answered: str) -> bool | None:
    """Whether two values of IssuerOfPatientID name one issuer.

    Case, blanks and what HL7 appends to a name (``NORTH&1.2.3&ISO``) are ignored.

    Returns
    -------
    bool or None
        None where one of them is empty.

    Examples
    --------
    >>> issuers_agree("North", "NORTH&1.2.3&ISO"), issuers_agree("NORTH", "SOUTH")
    (True, False)
    """
    first, second = (
        blurred(unpadded(text).partition("&")[0], but="leading zeros")
        for text in (wanted, answered)
    )
    return first == second if first and second else None


def same_person(first: Study, second: Study) -> bool | None:
    """Whether two studies under one PatientID are one person's, by issuer, birth date and name.

    Returns
    -------
    bool or None
        None where the answers do not have enough to tell.
    """
    born = _agree(study_day(first.patient_birth_date), study_day(second.patient_birth_date))
    named = _names_agree(first, second)
    other_issuer = issuers_agree(first.issuer_of_patient_id, second.issuer_of_patient_id) is False
    if born:
        return not (other_issuer and named is False)
    if other_issuer or born is False:
        return False
    if named is False and not given_names_agree(first.patient_name, second.patient_name):
        return False
    return None


def several_patients(studies: Iterable[Study], one: Iterable[str] = ()) -> bool:
    """Whether the studies are of more than one patient, by PatientID or as persons.

    Parameters
    ----------
    one : iterable of str
        PatientIDs that are known to be one patient's.
    """
    studies = list(studies)
    known = {unpadded(number) for number in one}
    patients = {_patient(study, known) for study in studies}
    if len(patients) > 1:
        return True
    described = {
        (s.issuer_of_patient_id, s.patient_name, s.patient_birth_date, s.guessed): s
        for s in studies
    }
    some = list(described.values())[:_MOST_COMPARED]
    return any(same_person(*pair) is False for pair in combinations(some, 2))


def studies_of_issuer(issuer: str, studies: Sequence[Study]) -> tuple[list[Study], list[Study]]:
    """The studies of a patient of this issuer, and those of which that cannot be told.

    A study without an issuer is the patient's if it is the same person's as one that has it.
    """
    agree = {id(s): issuers_agree(issuer, s.issuer_of_patient_id) for s in studies}
    its = [s for s in studies if agree[id(s)]]
    taken: list[Study] = []
    untold: list[Study] = []
    for study in studies:
        if agree[id(study)]:
            taken.append(study)
        elif agree[id(study)] is None:
            same = [same_person(each, study) for each in its]
            if True in same:
                taken.append(study)
            elif False not in same:
                untold.append(study)
    return taken, untold


def patient_key(study: Study) -> tuple[str, str]:
    """The PatientID, with its bytes where its characters are a guess: those differ then."""
    guessed = dict(study.original).get("PatientID", "") if "PatientID" in study.guessed else ""
    return unpadded(study.patient_id), guessed


def _patient(study: Study, one: set[str]) -> tuple[str, str]:
    key = patient_key(study)
    return ("", "") if key[0] in one else key


def _agree(first: object | None, second: object | None) -> bool | None:
    return None if first is None or second is None else first == second


def _names_agree(first: Study, second: Study) -> bool | None:
    if "PatientName" in (*first.guessed, *second.guessed):
        return None
    names = first.patient_name, second.patient_name
    agree = names_agree(*names)
    if agree is None or agree:
        return agree
    return bool(
        names_agree(*reversed(names))
        or written_otherwise(*names)
        or written_otherwise(*reversed(names))
    )
