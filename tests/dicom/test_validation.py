"""Promise: nothing enters the archive unless it is what the PACS listed; nothing cut unnoticed.

Findings have one of three consequences. What is not what was asked for is quarantined, what is
faulty is asked for again, what is merely odd is archived with a warning.
"""

from __future__ import annotations

import os
import struct
from dataclasses import replace

import pytest
from pydicom.dataset import Dataset

from prefect_dicom.core.model import InstanceKey, StoreRequest
from prefect_dicom.core.reasons import Consequence
from prefect_dicom.dicom.part10 import file_meta, survey
from prefect_dicom.dicom.validation import Expected, validate
from tests.support.corpus import corpus_lines
from tests.support.part10_objects import (
    BIG_ENDIAN,
    CT_IMAGE,
    DEFLATED,
    EXPECTED,
    EXPLICIT,
    IMPLICIT,
    INSTANCE,
    JPEG,
    MPEG2,
    PATIENT,
    PRIVATE,
    RLE,
    SERIES,
    ct,
    element,
    encapsulated,
    encoded,
    received,
    sequence_of,
)

SPECTROSCOPY = "1.2.840.10008.5.1.4.1.1.4.2"
RT_DOSE = "1.2.840.10008.5.1.4.1.1.481.2"
PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"


@pytest.fixture
def findings(tmp_path):
    """Validate bytes against an expectation; each call replaces the file."""

    def validated(content: bytes, expected: Expected = EXPECTED) -> tuple[str, ...]:
        path = tmp_path / "object.dcm"
        path.write_bytes(content)
        return validate(survey(path), expected).findings

    return validated


def _image(syntax: str = EXPLICIT, **changes: object) -> bytes:
    return received(encoded(ct(**changes), syntax), syntax)


# --- the table of findings


def test_the_gravest_finding_decides(tmp_path):
    path = tmp_path / "object.dcm"
    path.write_bytes(_image(PatientID="OTHER") + bytes(8))
    found = validate(survey(path), EXPECTED)
    assert found.findings == ("wrong-patient", "trailing-bytes")
    assert found.consequence is Consequence.QUARANTINE
    assert found.remarks == ("trailing-bytes",)


# Of the corpus's files that are faulty or odd enough for a finding, each with its own. The UIDs
# a file does not hold come on top (its manifest line has none).
_OF_THE_CORPUS = {
    "dcmjs-org+dcmjs/no-meta-length-test.dcm": ("pixel-data-length",),  # an image without pixels
    "pydicom+pydicom-data/emri_small_jpeg_2k_lossless_too_short.dcm": ("instance-truncated",),
    "pydicom+pydicom/ExplVR_BigEndNoMeta.dcm": ("instance-unreadable",),
    "pydicom+pydicom/ExplVR_LitEndNoMeta.dcm": ("instance-unreadable",),
    "pydicom+pydicom/MR_small_padded.dcm": ("pixel-data-longer",),
    "pydicom+pydicom/MR_truncated.dcm": ("instance-truncated",),
    "pydicom+pydicom/SC_rgb_jpeg.dcm": ("wrong-transfer-syntax",),
    "pydicom+pydicom/charset_files/chrJapMulti.dcm": ("pixel-data-length",),
    "pydicom+pydicom/charset_files/chrJapMultiExplicitIR6.dcm": ("pixel-data-length",),
    "pydicom+pydicom/charset_files/chrKoreanMulti.dcm": ("pixel-data-length",),
    "pydicom+pydicom/image_dfl.dcm": ("not-inspected",),
    "pydicom+pydicom/meta_missing_tsyntax.dcm": ("instance-unreadable",),
    "pydicom+pydicom/nested_priv_SQ.dcm": ("instance-unreadable",),
    "pydicom+pydicom/rtplan_truncated.dcm": ("instance-truncated",),
    "pydicom+pydicom/rtstruct.dcm": ("instance-unreadable",),
    "synthetic/bad/html_error_page.dcm": ("instance-unreadable",),
    "synthetic/bad/meta_says_implicit_body_explicit.dcm": ("wrong-transfer-syntax",),
    "synthetic/bad/no_preamble_no_meta_explicit.dcm": ("instance-unreadable",),
    "synthetic/bad/no_preamble_with_meta.dcm": ("instance-unreadable",),
    "synthetic/bad/not_dicom_text.dcm": ("instance-unreadable",),
    "synthetic/bad/preamble_only.dcm": ("instance-unreadable",),
    "synthetic/bad/rle_no_sequence_delimiter.dcm": ("instance-truncated",),
    "synthetic/bad/trailing_garbage.dcm": ("instance-unreadable",),
    "synthetic/bad/truncated_in_header.dcm": ("instance-truncated",),
    "synthetic/bad/truncated_in_pixels.dcm": ("instance-truncated",),
    "synthetic/bad/zero_bytes.dcm": ("instance-unreadable",),
    "synthetic/odd/ge_private_syntax.dcm": ("transfer-syntax-unknown",),
    "synthetic/valid/deflated_ct.dcm": ("not-inspected",),
}
# Cut, but after the UIDs that their manifest lines do not have.
_NOT_LISTED = {
    "pydicom+pydicom-data/emri_small_jpeg_2k_lossless_too_short.dcm",
    "synthetic/bad/rle_no_sequence_delimiter.dcm",
}


def test_of_the_whole_corpus_only_what_deserves_it_gets_a_finding(tmp_path):
    seen = {}
    for path, line in corpus_lines():
        name, content = line["path"], path.read_bytes()
        uids = (
            line["sop_class_uid"],
            line["sop_instance_uid"],
            line["study_instance_uid"],
            line["series_instance_uid"],
        )
        if "instance-unreadable" not in _OF_THE_CORPUS.get(name, ()):
            # As a receiver would have written it: group 2 by the request, not the publisher's.
            start = 132
            while content[start : start + 2] == b"\x02\0":
                long = content[start + 4 : start + 6] == b"OB"
                form, at = ("<L", start + 8) if long else ("<H", start + 6)
                (length,) = struct.unpack_from(form, content, at)
                start += (12 if long else 8) + length
            request = StoreRequest(1, uids[0], uids[1], line["transfer_syntax_uid"])
            content = file_meta(request) + content[start:]
        copy = tmp_path / "object.dcm"
        copy.write_bytes(content)
        expected = Expected(
            line["study_instance_uid"],
            InstanceKey(line["series_instance_uid"], line["sop_instance_uid"]),
            line["sop_class_uid"],
            line["patient_id"] or None,
        )
        found = validate(survey(copy), expected).findings
        wanted = _OF_THE_CORPUS.get(name, ())
        lacks_a_uid = not all(uids) and not name.startswith("synthetic/bad/empty_")
        if (lacks_a_uid and not {"instance-unreadable", "instance-truncated"} & {*wanted}) or (
            name in _NOT_LISTED
        ):
            wanted = ("uid-mismatch", *wanted)
        assert found == wanted, name
        seen[name] = found
    assert set(_OF_THE_CORPUS) <= set(seen)


# --- is it what was asked for


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN])
def test_what_was_expected_has_no_findings(syntax, findings):
    assert findings(_image(syntax)) == ()


@pytest.mark.parametrize(
    "attribute", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID"]
)
@pytest.mark.parametrize("value", ["1.2.826.0.1.8", "", None])
def test_an_instance_with_another_uid_or_none_is_foreign(attribute, value, findings):
    found = findings(_image(**{attribute: value}))
    # The class that is listed matters less than that command and data set agree, as here not.
    differs = (
        ("sop-class-differs",) if (attribute, value) == ("SOPClassUID", "1.2.826.0.1.8") else ()
    )
    assert found == ("uid-mismatch", *differs)


def test_an_instance_sent_under_another_uid_than_its_own_is_foreign(findings):
    assert findings(received(encoded(ct()), instance="1.2.3")) == ("uid-mismatch",)


def test_an_instance_with_two_studies_is_foreign(findings):
    twice = element(0x0020000D, b"UI", b"1.9\0")
    assert findings(received(encoded(ct()) + twice)) == ("uid-mismatch",)


def test_padding_of_uids_does_not_count(findings):
    body = encoded(ct()).replace(SERIES.encode() + b"\0", SERIES.encode() + b" ")
    expected = replace(EXPECTED, key=InstanceKey(SERIES + "\0", INSTANCE + " "))
    assert findings(received(body), expected) == ()


def test_an_unknown_class_or_patient_is_not_compared(findings):
    unknown = replace(EXPECTED, sop_class_uid="", patient_id=None)
    assert findings(_image(PatientID="ANYBODY"), unknown) == ()


@pytest.mark.parametrize("value", ["secret-0042", "SECRET-42", "SECRET", "X"])
def test_another_patient_id_is_another_patient(value, findings):
    assert findings(_image(PatientID=value)) == ("wrong-patient",)


@pytest.mark.parametrize("value", [PATIENT + "  ", " " + PATIENT])
def test_blanks_around_a_patient_id_do_not_count(value, findings):
    assert findings(_image(PatientID=value)) == ()


@pytest.mark.parametrize("value", ["", None])
def test_a_missing_patient_id_is_a_remark(value, findings):
    assert findings(_image(PatientID=value)) == ("patient-id-missing",)


@pytest.mark.parametrize(
    ("raw", "character_set", "listed", "finding"),
    [
        (b"M\xfcller-1", "ISO_IR 100", "Müller-1", None),
        (b"M\xfcller-1", "", "Müller-1", None),
        (b"M\xfcller-1", "ISO_IR_100", "Müller-1", None),
        ("Müller-1".encode(), "ISO_IR 192", "Müller-1", None),
        ("病-1".encode("gb18030"), "GB18030", "病-1", None),
        (b"\x1b$B;3\x1b(B-1", "\\ISO 2022 IR 87", "山-1", None),
        (b"\xb8\xdb-1", "ISO_IR 144", "Ил-1", None),
        (b"A\\B/1", "ISO_IR 100", "A\\B/1", None),
        # What archives make of letters they have no place for.
        ("Müller-1".encode(), "ISO_IR 192", "Mller-1", "patient-id-reencoded"),
        ("Müller-1".encode(), "ISO_IR 192", "M?ller-1", "patient-id-reencoded"),
        ("Müller-1".encode(), "ISO_IR 100", "Müller-1", "patient-id-reencoded"),
        ("山".encode(), "UTF-8", "山", None),
        (b"\xb8\xdb-1", "ISO-IR 144", "Ил-1", None),
        ("山-1".encode("cp932"), "ISO_IR 13", "山-1", None),
        ("山-1".encode("cp932"), "\\ISO 2022 IR 87", "山-1", "patient-id-reencoded"),
        # Nothing is left by which to know the patient.
        ("山".encode(), "ISO_IR 192", "川", "wrong-patient"),
        ("山-".encode(), "ISO_IR 192", "川-", "wrong-patient"),
        ("Müller-1".encode(), "ISO_IR 192", "Müller-2", "wrong-patient"),
    ],
)
def test_letters_lost_on_the_way_are_distinguished_from_another_patient(
    raw, character_set, listed, finding, findings
):
    declared = element(0x00080005, b"CS", character_set.encode())
    body = declared + encoded(ct(SpecificCharacterSet=None, PatientID=None))
    body += element(0x00100020, b"LO", raw)
    expected = replace(EXPECTED, patient_id=listed)
    assert findings(received(body), expected) == ((finding,) if finding else ())


def test_a_truncated_instance_of_another_patient_is_another_patients(findings):
    assert findings(_image(PatientID="OTHER")[:-1]) == ("wrong-patient", "instance-truncated")


# --- is it whole


def test_a_cut_at_any_byte_is_noticed(findings):
    body = encoded(ct())
    whole = received(body)
    behind = element(0xFFFCFFFC, b"OB", bytes(64))
    cuts = {*range(0, len(whole), 7), *range(len(whole) - len(body), len(whole))}
    for length in cuts:
        assert findings(whole[:length]), length
    for length in range(len(whole) + 1, len(whole + behind)):
        assert findings((whole + behind)[:length]), length
    # Between whole elements behind the pixels nothing can be told, and no image is lost.
    assert findings(whole) == findings(whole + behind) == ()


def test_a_cut_at_every_97th_byte_of_a_ct_is_noticed(tmp_path):
    path = tmp_path / "object.dcm"
    whole = received(encoded(ct(Rows=512, Columns=512, PixelData=bytes(2 * 512 * 512))))
    path.write_bytes(whole)
    assert validate(survey(path), EXPECTED).findings == ()
    for length in reversed(range(0, len(whole), 97)):
        os.truncate(path, length)
        assert validate(survey(path), EXPECTED).findings, length


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({}, 384),
        ({"NumberOfFrames": "3"}, 3 * 384),
        ({"SamplesPerPixel": 3, "BitsAllocated": 8}, 3 * 192),
        ({"SamplesPerPixel": 3, "BitsAllocated": 8, "PhotometricInterpretation": "YBR_FULL_422"},
         2 * 192),
        ({"Rows": 5, "Columns": 5, "BitsAllocated": 8}, 25),
        ({"Rows": 5, "Columns": 5, "BitsAllocated": 1, "NumberOfFrames": "3"}, 10),
        ({"BitsAllocated": 32}, 768),
    ],
)  # fmt: skip
@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG_ENDIAN])
def test_pixel_data_is_as_long_as_the_header_says(changes, length, syntax, findings):
    def found(size: int) -> tuple[str, ...]:
        body = encoded(ct(**changes, PixelData=None), syntax)
        head = b"\x7f\xe0\0\x10OW\0\0" if syntax == BIG_ENDIAN else b"\xe0\x7f\x10\0"
        head += b"OW\0\0" if syntax == EXPLICIT else b""
        head += struct.pack(">L" if syntax == BIG_ENDIAN else "<L", size)
        return findings(received(body + head + bytes(size), syntax))

    assert found(length) == found(length + length % 2) == ()
    assert found(length - 1) == found(0) == ("pixel-data-length",)
    assert found(length + length % 2 + 2) == ("pixel-data-longer",)


@pytest.mark.parametrize(("tag", "bits"), [(0x7FE00008, 32), (0x7FE00009, 64)])
def test_floating_point_pixels_count_like_others(tag, bits, findings):
    image = ct(SOPClassUID=PARAMETRIC_MAP, BitsAllocated=bits, PixelData=None)
    expected = replace(EXPECTED, sop_class_uid="")
    length = 12 * 16 * bits // 8

    def found(size: int) -> tuple[str, ...]:
        meta = file_meta(StoreRequest(1, PARAMETRIC_MAP, INSTANCE, EXPLICIT))
        return findings(meta + encoded(image) + element(tag, b"OW", bytes(size)), expected)

    assert found(length) == ()
    assert found(length - 2) == ("pixel-data-length",)


@pytest.mark.parametrize(
    ("syntax", "frames", "fragments", "found"),
    [
        (JPEG, "1", [b"a" * 8], ()),
        (JPEG, "1", [b"a" * 8, b"b" * 8], ()),
        (RLE, "2", [b"a" * 8, b"b" * 8], ()),
        (RLE, "3", [b"a" * 8, b"b" * 8], ("pixel-data-length",)),
        (RLE, "nonsense", [b"a" * 8], ()),
        (JPEG, "1", [b""], ("pixel-data-length",)),
        (JPEG, "1", [], ("pixel-data-length",)),
        (MPEG2, "250", [b"a" * 8], ()),
        (MPEG2, "250", [], ("pixel-data-length",)),
        (EXPLICIT, "1", [b"a" * 8], ("wrong-transfer-syntax",)),
    ],
)
def test_encapsulated_pixel_data_has_fragments_for_its_frames(
    syntax, frames, fragments, found, findings
):
    body = element(0x00280008, b"IS", frames.encode()) + encoded(ct(PixelData=None))
    assert findings(received(body + encapsulated(*fragments), syntax)) == found


def test_plain_pixels_under_a_compressing_syntax_are_in_the_wrong_syntax(findings):
    assert findings(received(encoded(ct()), JPEG)) == ("wrong-transfer-syntax",)


def test_a_figure_that_is_no_number_judges_nothing(findings):
    body = element(0x00280008, b"IS", b"1A") + encoded(ct())
    assert findings(received(body)) == ()


def test_an_image_without_pixel_data_is_not_whole(findings):
    assert findings(_image(PixelData=None)) == ("pixel-data-length",)
    assert findings(_image(PixelData=None, Rows=None)) == ("pixel-data-length",)


@pytest.mark.parametrize(
    ("sop_class", "addition", "found"),
    [
        (CT_IMAGE, element(0x00287FE0, b"UT", b"https://pacs.example/"), ()),
        (SPECTROSCOPY, element(0x56000020, b"OB", bytes(64)), ()),
        (RT_DOSE, b"", ("pixel-data-length",)),
    ],
)
def test_pixel_data_is_missed_only_where_it_belongs(sop_class, addition, found, findings):
    body = encoded(ct(SOPClassUID=sop_class, PixelData=None)) + addition
    meta = file_meta(StoreRequest(1, sop_class, INSTANCE, EXPLICIT))
    assert findings(meta + body, replace(EXPECTED, sop_class_uid=sop_class)) == found


def test_a_dose_without_a_grid_needs_no_pixels(findings):
    image = ct(SOPClassUID=RT_DOSE, PixelData=None)
    for keyword in ("Rows", "Columns", "BitsAllocated"):
        delattr(image, keyword)
    meta = file_meta(StoreRequest(1, RT_DOSE, INSTANCE, EXPLICIT))
    assert findings(meta + encoded(image), replace(EXPECTED, sop_class_uid=RT_DOSE)) == ()


# --- what is not looked into


def test_a_private_syntax_is_a_remark(findings):
    assert findings(_image(PRIVATE)) == ("transfer-syntax-unknown",)
    unknown_body = received(b"\xff\x4f\xff\x51" * 64, PRIVATE)
    assert findings(unknown_body) == ("transfer-syntax-unknown", "not-inspected")


def test_a_cut_in_a_private_syntax_that_can_be_read_is_still_a_cut(findings):
    assert "instance-truncated" in findings(_image(PRIVATE)[:-1])


def test_a_deflated_instance_is_known_by_its_request_alone(findings):
    assert findings(received(b"deflated", DEFLATED)) == ("not-inspected",)
    other = received(b"deflated", DEFLATED, instance="1.2.3")
    assert findings(other) == ("uid-mismatch", "not-inspected")


def test_a_syntax_newer_than_the_dictionary_is_known(findings):
    body = encoded(ct(PixelData=None)) + encapsulated(b"a" * 8)
    assert findings(received(body, "1.2.840.10008.1.2.4.110")) == ()


def test_a_wrong_syntax_is_found_beside_the_rest(findings):
    other = received(encoded(ct(), IMPLICIT), EXPLICIT)
    assert findings(other) == ("wrong-transfer-syntax",)


def test_sequences_do_not_disturb_what_is_compared(findings):
    image = ct()
    inner = Dataset()
    inner.PatientID = "OTHER"
    image.add_new(0x00101002, "SQ", sequence_of(inner))
    assert findings(received(encoded(image))) == ()


def test_nothing_is_changed_by_looking(tmp_path):
    path = tmp_path / "object.dcm"
    path.write_bytes(_image())
    path.chmod(0o400)
    validate(survey(path), EXPECTED)
    assert path.read_bytes() == _image()
    assert survey(path).fault is None
