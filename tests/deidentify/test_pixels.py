"""Which instances pass by what their pixels may show, and which wait for a person."""

from __future__ import annotations

import pytest

from prefect_dicom.core.reasons import REASONS
from prefect_dicom.deidentify.elements import read_part_ten
from prefect_dicom.deidentify.pixels import judge
from tests.deidentify.test_engine import file_of
from tests.support.part10_objects import ct

ULTRASOUND, RADIOGRAPH = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.1.1"
REPORT, SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.88.11", "1.2.840.10008.5.1.4.1.1.7"
SEGMENTATION, DOCUMENT = "1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.104.1"
ORIGINAL = ["ORIGINAL", "PRIMARY", "AXIAL"]


def judged(trusted: frozenset[str] = frozenset(), **changes: object):
    image = ct(**{"ImageType": ORIGINAL, **changes})
    return judge(read_part_ten(file_of(image)), trusted)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"BurnedInAnnotation": "NO"},
        {"ImageType": ["DERIVED", "PRIMARY", "AXIAL"]},
        {"SOPClassUID": SEGMENTATION, "Modality": "SEG", "ImageType": ["DERIVED", "PRIMARY"]},
        {"SOPClassUID": ULTRASOUND, "Modality": "US", "PixelData": None},
    ],
)
def test_what_is_clean_by_the_way_it_was_made_passes(changes):
    assert judged(**changes).reason == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"BurnedInAnnotation": "YES"},
        {"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED"]},
        {"ImageType": ["ORIGINAL", "PRIMARY", "SCREEN SAVE"]},
        {"ImageType": ""},
        {"SOPClassUID": ULTRASOUND, "Modality": "US"},
        {"SOPClassUID": SECONDARY_CAPTURE},
        {"SOPClassUID": RADIOGRAPH, "Modality": "DX"},
        {"PhotometricInterpretation": "RGB"},
        {"SOPClassUID": "1.2.3.4.5"},
    ],
)
def test_risky_pixels_are_withheld_with_what_was_seen(changes):
    judgement = judged(**changes)
    assert judgement.reason == "pixels-may-identify"
    assert judgement.because


@pytest.mark.parametrize(("sop_class", "modality"), [(REPORT, "SR"), (DOCUMENT, "DOC")])
def test_reports_and_documents_cannot_be_cleaned(sop_class, modality):
    assert judged(SOPClassUID=sop_class, Modality=modality).reason == "object-cannot-be-cleaned"


def test_a_site_may_know_its_radiographs_to_be_clean_but_not_what_says_otherwise():
    trusted = frozenset({"DX"})
    assert not judged(trusted, SOPClassUID=RADIOGRAPH, Modality="DX").reason
    assert judged(trusted, SOPClassUID=RADIOGRAPH, Modality="DX", BurnedInAnnotation="YES").reason


def test_thin_slices_of_a_head_pass_with_a_warning():
    thin = judged(BodyPartExamined="HEAD", SliceThickness="1.0")
    assert (thin.reason, thin.warnings) == ("", ("faces-not-removed",))
    assert not judged(BodyPartExamined="HEAD", SliceThickness="5.0").warnings
    assert "faces-not-removed" in REASONS
