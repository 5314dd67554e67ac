"""A modality that is none of DICOM's terms finds nothing: the likely term is named instead."""

from __future__ import annotations

import pytest

from prefect_dicom.cohort.definition import read_cohort_file
from prefect_dicom.cohort.modalities import is_defined, likely_term, stated_terms
from prefect_dicom.cohort.rows import read_list
from prefect_dicom.core.errors import CohortError
from tests.support.lists import FORMATS, read_as

LIKELY = {
    "MR": ["MRI", "mri", "MRT", "IRM", "NMR", "MRA", "fMRI", "MR scan"],
    "CT": ["CAT", "TAC", "TDM", "CTA", "CT scan", "CT_Thorax", "HRCT"],
    "PT": ["PET", "PETCT", "PET CT", "TEP"],
    "US": ["ULTRASOUND", "Sono", "Echo", "USG"],
    "CR or DX": ["XRAY", "X RAY", "XR", "CXR", "Rontgen"],
    "MG": ["MAMMO", "Mammography"],
    "NM": ["SPECT", "NUC"],
    "XA": ["ANGIO", "DSA"],
    "RF": ["FLUORO"],
}
PAIRS = [(word, term) for term, words in LIKELY.items() for word in words]
TERMS = ["CT", "ct", "MR", "PT", "OT", "DX", "CR", "MG", "RTSTRUCT", "SR", "KO", "PX", "OPT", "DS"]
PRIVATE = ["ACME", "DR", "CTPET2"]


@pytest.mark.parametrize(("word", "term"), PAIRS)
@pytest.mark.parametrize("kind", ["csv", "frame"])
def test_a_list_is_told_the_likely_term(tmp_path, word, term, kind):
    columns = ("AccessionNumber", "Modality")
    with pytest.raises(CohortError) as caught:
        read_as(kind, tmp_path, columns, ("A1", word))
    [fault] = caught.value.faults
    assert fault.startswith('line 2, column "Modality": ') and fault.endswith(f"write {term}")


@pytest.mark.parametrize("kind", FORMATS)
def test_terms_are_taken_as_they_are(tmp_path, kind):
    given = read_as(kind, tmp_path, ("MRN", "Modality"), *((f"P{t}", t) for t in TERMS))
    assert [row.modality for row in given.rows] == TERMS
    assert given.notes == ()


@pytest.mark.parametrize("code", PRIVATE)
def test_a_private_term_is_asked_for_and_named_by_its_lines(tmp_path, code):
    given = read_as("csv", tmp_path, ("MRN", "Modality"), ("1", "CT"), ("2", code))
    assert [row.modality for row in given.rows] == ["CT", code]
    [note] = given.notes
    assert note.startswith("a modality that DICOM does not define, in line 3:")
    assert code not in note


def test_of_many_lines_the_first_are_named(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("MRN,Modality\n" + "".join(f"{n},ACME\n" for n in range(9)))
    [note] = read_list(path).notes
    assert "in line 2, 3, 4, 5, 6 and 4 more:" in note


@pytest.mark.parametrize("value", ["MG/US", "CT/MR", "CT*", "CT\\MR"])
def test_several_in_one_cell_stay_a_fault(tmp_path, value):
    with pytest.raises(CohortError, match="is not one modality code"):
        read_as("csv", tmp_path, ("MRN", "Modality"), ("1", value))


@pytest.mark.parametrize(
    "text", ["MRI", "[CT, MRI]", "{not: MRI}", "{is: [CT], not: [MRI]}", "MRI*"]
)
@pytest.mark.parametrize(
    "place", ["studies.ModalitiesInStudy", "studies.Modality", "series.Modality"]
)
def test_a_definition_is_told_the_likely_term(tmp_path, place, text):
    part, key = place.split(".")
    path = tmp_path / "cohort.yaml"
    days = "StudyDate: 20240101-20240131"
    studies = f"studies:\n  {days}\n"
    path.write_text(
        studies + f"  {key}: {text}\n"
        if part == "studies"
        else f"{studies}series: {{{key}: {text}}}"
    )
    with pytest.raises(CohortError) as caught:
        read_cohort_file(path)
    [fault] = caught.value.faults
    assert fault.startswith(place) and "for a modality: here MR" in fault


def test_a_private_term_in_a_definition_is_named(tmp_path):
    path = tmp_path / "cohort.yaml"
    path.write_text("studies: {StudyDate: 20240101-20240131, Modality: [CT, ACME, 'C*']}")
    [note] = read_cohort_file(path).notes
    assert note.startswith("ModalitiesInStudy: a modality that DICOM does not define")
    path.write_text("studies: {StudyDate: 20240101-20240131, Modality: [CT, {regex: 'MRI'}]}")
    assert read_cohort_file(path).notes == ()


def test_no_term_is_taken_for_another():
    assert [likely_term(term) for term in TERMS] == [None] * len(TERMS)
    assert all(map(is_defined, TERMS))
    assert [likely_term(code) for code in PRIVATE] == [None] * len(PRIVATE)


@pytest.mark.parametrize(
    ("answered", "stated"),
    [
        (["CT"], {"CT"}),
        (["ct ", "", "SR\0"], {"CT", "SR"}),
        (["OT"], {"OT"}),
        (["CT/PT"], {"CT", "PT"}),
        (["CT,SR", "KO"], {"CT", "SR", "KO"}),
        (["MRI"], {"MR"}),
        (["XRAY"], {"CR", "DX"}),
        (["ACME"], {"ACME"}),
        (["CT", "ACME_2"], {"CT", "ACME_2"}),
    ],
)
def test_what_a_pacs_states_is_read_in_dicoms_terms(answered, stated):
    assert stated_terms(answered) == stated


@pytest.mark.parametrize(
    "value", ["*", "?", "CT*", "-", "--", "N/A", "NULL", "unknown", "ALL", "MULTI", "0", "99", "\\"]
)
def test_a_value_that_states_nothing_is_as_if_there_were_none(value):
    assert stated_terms([value]) is None
    assert stated_terms(["MR", value]) is None


def test_no_value_states_nothing():
    assert stated_terms([]) is None and stated_terms(["", " "]) is None
