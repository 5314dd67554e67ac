"""Two copies of an instance are one where they differ in dates and times, and in nothing else."""

from __future__ import annotations

import pytest
from pydicom.dataset import Dataset

from prefect_dicom.dicom.same_content import differ_in_times_only
from tests.support.part10_objects import (
    BIG_ENDIAN,
    EXPLICIT,
    IMPLICIT,
    ct,
    encoded,
    received,
    sequence_of,
)

ORIGINAL_ATTRIBUTES = 0x04000561


def coerced(moment: str, **elements: str) -> Dataset:
    """An image with a sequence that says when it was coerced."""
    item = Dataset()
    item.AttributeModificationDateTime = moment
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    image = ct()
    image.add_new(ORIGINAL_ATTRIBUTES, "SQ", sequence_of(item))
    return image


def without_items() -> Dataset:
    image = ct()
    image.add_new(ORIGINAL_ATTRIBUTES, "SQ", sequence_of())
    return image


A, B = "20240101120000", "20240101120000.123456"

ALIKE = {
    "a time": (ct(InstanceCreationTime="120000"), ct(InstanceCreationTime="120001.5")),
    "a date": (ct(InstanceCreationDate="20240101"), ct(InstanceCreationDate="20240102")),
    "a moment": (ct(InstanceCoercionDateTime=A), ct(InstanceCoercionDateTime=B)),
    "a moment that only one has": (ct(), ct(InstanceCoercionDateTime=B)),
    "a moment in a sequence": (coerced(A), coerced(B)),
    "nothing": (ct(), ct()),
}
OTHER = {
    "a pixel": (ct(), ct(PixelData=bytes(384))),
    "the birth date": (ct(PatientBirthDate="19500101"), ct(PatientBirthDate="19500102")),
    "a comment": (ct(), ct(ImageComments="second")),
    "a UID": (ct(), ct(SeriesInstanceUID="1.2.3")),
    "the patient": (ct(), ct(PatientID="OTHER")),
    "an item": (coerced(A), without_items()),
    "a word in a sequence": (coerced(A), coerced(A, ModifyingSystem="other")),
}


@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT, BIG_ENDIAN])
@pytest.mark.parametrize(
    ("pair", "alike"),
    [
        *(pytest.param(pair, True, id=what) for what, pair in ALIKE.items()),
        *(pytest.param(pair, False, id=what) for what, pair in OTHER.items()),
    ],
)
def test_only_dates_and_times_of_the_instance_may_differ(tmp_path, syntax, pair, alike):
    paths = [tmp_path / "first.dcm", tmp_path / "second.dcm"]
    for path, image in zip(paths, pair, strict=True):
        path.write_bytes(received(encoded(image, syntax), syntax))
    assert differ_in_times_only(*paths) == alike


@pytest.mark.parametrize("content", [b"", b"DICM", received(encoded(ct()))[:400]])
def test_what_cannot_be_read_is_another_content(tmp_path, content):
    first, second = tmp_path / "first.dcm", tmp_path / "second.dcm"
    first.write_bytes(received(encoded(ct())))
    second.write_bytes(content)
    assert not differ_in_times_only(first, second)
