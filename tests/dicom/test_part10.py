"""Promise: whatever bytes a peer sends, looking at them is cheap, bounded and safe.

A scan reads element headers only. It says the same as a general reader about files that are
whole, rejects those that are not, and lets nothing but its own rejection out.
"""

from __future__ import annotations

import os
import random
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from io import BytesIO

import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from prefect_dicom.core.errors import InstanceRejected
from prefect_dicom.core.model import StoreRequest
from prefect_dicom.dicom.part10 import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    file_meta,
    scan,
    study_of,
    survey,
)
from tests.support.corpus import corpus_lines
from tests.support.part10_objects import (
    BIG_ENDIAN,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    INSTANCE,
    JPEG,
    PATIENT,
    PRIVATE,
    RLE,
    SEQUENCE_END,
    SERIES,
    STUDY,
    ct,
    element,
    encapsulated,
    encoded,
    item,
    received,
    sequence_of,
)

_SYNTAXES = [IMPLICIT, EXPLICIT, BIG_ENDIAN]
# What a general reader opens and a part of the corpus is made to be.
_NOT_PART_10 = {
    "pydicom+pydicom/ExplVR_BigEndNoMeta.dcm",
    "pydicom+pydicom/ExplVR_LitEndNoMeta.dcm",
    "pydicom+pydicom/meta_missing_tsyntax.dcm",
    "pydicom+pydicom/nested_priv_SQ.dcm",  # elements in group 0001, which PS3.5 7.1 forbids
    "pydicom+pydicom/rtstruct.dcm",
    "synthetic/bad/html_error_page.dcm",
    "synthetic/bad/no_preamble_no_meta_explicit.dcm",
    "synthetic/bad/no_preamble_with_meta.dcm",
    "synthetic/bad/not_dicom_text.dcm",
    "synthetic/bad/preamble_only.dcm",
    "synthetic/bad/trailing_garbage.dcm",
    "synthetic/bad/zero_bytes.dcm",
}
_CUT = {
    "pydicom+pydicom-data/emri_small_jpeg_2k_lossless_too_short.dcm",
    "pydicom+pydicom/MR_truncated.dcm",
    "pydicom+pydicom/rtplan_truncated.dcm",
    "synthetic/bad/rle_no_sequence_delimiter.dcm",
    "synthetic/bad/truncated_in_header.dcm",
    "synthetic/bad/truncated_in_pixels.dcm",
}
_OTHER_SYNTAX = {
    "pydicom+pydicom/SC_rgb_jpeg.dcm",  # JPEG in the file meta, an implicit data set behind it
    "synthetic/bad/meta_says_implicit_body_explicit.dcm",
}


@pytest.fixture
def file(tmp_path):
    """Write bytes to a file of the test's own; each call replaces the content."""

    def write(content: bytes):
        path = tmp_path / "object.dcm"
        path.write_bytes(content)
        return path

    return write


# --- what we write in front of what arrives


def test_the_file_meta_is_the_one_of_the_standard():
    meta = file_meta(StoreRequest(7, "1.2.840.10008.5.1.4.1.1.2", INSTANCE, JPEG))
    read = pydicom.dcmread(BytesIO(meta)).file_meta
    assert read.FileMetaInformationGroupLength == len(meta) - 144
    assert read.FileMetaInformationVersion == b"\0\1"
    assert read.MediaStorageSOPClassUID == "1.2.840.10008.5.1.4.1.1.2"
    assert read.MediaStorageSOPInstanceUID == INSTANCE
    assert read.TransferSyntaxUID == JPEG
    assert read.ImplementationClassUID == IMPLEMENTATION_CLASS_UID
    assert read.ImplementationVersionName == IMPLEMENTATION_VERSION_NAME
    assert meta[:132] == bytes(128) + b"DICM"
    assert len(meta) % 2 == 0


def test_the_same_instance_gets_the_same_file_meta_however_it_arrives():
    one = StoreRequest(1, "1.2", "1.2.3", EXPLICIT)
    other = StoreRequest(9, "1.2", "1.2.3", EXPLICIT, "PACS", "US", "192.0.2.1", "US", 3)
    assert file_meta(one) == file_meta(other)
    assert file_meta(one) != file_meta(StoreRequest(1, "1.2", "1.2.3", IMPLICIT))


@pytest.mark.parametrize("uid", ["", "..", "../../etc/x", "1.2\n", "é\udce9", "漢", "\ud800"])
def test_hostile_uids_are_written_unchanged(uid, file):
    meta = file_meta(StoreRequest(1, uid, uid, EXPLICIT))
    assert scan(file(meta + encoded(ct()))).identity.sop_instance_uid == INSTANCE


def test_a_uid_too_long_for_its_vr_is_written_as_un(file):
    meta = file_meta(StoreRequest(1, "1.2", "9" * 70_001, EXPLICIT))
    assert b"\x02\x00\x03\x00UN" in meta
    assert scan(file(meta + encoded(ct()))).structure.requested_sop_class_uid == "1.2"


@given(st.text(), st.text(), st.text())
def test_no_request_makes_the_file_meta_raise(sop_class, instance, syntax):
    assert file_meta(StoreRequest(1, sop_class, instance, syntax))[128:132] == b"DICM"


# --- what a scan says of whole files


def test_a_scan_and_a_general_reader_agree_on_every_whole_file_of_the_corpus():
    compared = 0
    for number, (path, line) in enumerate(corpus_lines()):
        name = line["path"]
        if name in _NOT_PART_10 | _CUT:
            continue
        found = scan(path)
        said, shape = found.identity, found.structure
        assert said.transfer_syntax_uid == line["transfer_syntax_uid"], name
        assert shape.other_syntax == (name in _OTHER_SYNTAX), name
        if not said.inspected:
            assert line["transfer_syntax_uid"] == DEFLATED, name
            continue
        assert (said.sop_class_uid or "") == line["sop_class_uid"], name
        assert (said.sop_instance_uid or "") == line["sop_instance_uid"], name
        assert (said.study_instance_uid or "") == line["study_instance_uid"], name
        assert (said.series_instance_uid or "") == line["series_instance_uid"], name
        assert (said.modality or "") == line["modality"], name
        # The manifest knows every file; the general reader, being slow, is asked of a part.
        if name in _OTHER_SYNTAX or (number % 4 and "pydicom" not in name):
            continue
        oracle = pydicom.dcmread(path)
        raw = oracle.get_item("PatientID")
        assert said.patient_id == (raw and (raw.value or b"").rstrip(b" \0")), name
        assert shape.rows == oracle.get("Rows"), name
        assert shape.columns == oracle.get("Columns"), name
        assert shape.samples_per_pixel == oracle.get("SamplesPerPixel"), name
        assert shape.bits_allocated == oracle.get("BitsAllocated"), name
        if shape.pixel_data is not None and shape.pixel_data.length_bytes is not None:
            pixels = oracle.get_item(shape.pixel_data.tag)
            assert shape.pixel_data.length_bytes == len(pixels.value or b""), name
        compared += 1
    assert compared > 500


def test_every_faulty_file_of_the_corpus_is_rejected_for_what_it_is():
    seen = set()
    for path, line in corpus_lines():
        if line["path"] in _NOT_PART_10 | _CUT:
            seen.add(line["path"])
            with pytest.raises(InstanceRejected) as rejection:
                scan(path)
            cut = line["path"] in _CUT
            assert rejection.value.code == "instance-truncated" if cut else "instance-unreadable"
    assert seen == _NOT_PART_10 | _CUT


@pytest.mark.parametrize("syntax", _SYNTAXES)
def test_the_same_is_read_in_every_encoding(syntax, file):
    found = scan(file(received(encoded(ct(NumberOfFrames="1"), syntax), syntax)))
    said, shape = found.identity, found.structure
    assert said.study_instance_uid == STUDY
    assert said.series_instance_uid == SERIES
    assert said.sop_instance_uid == INSTANCE
    assert said.patient_id == PATIENT.encode()
    assert said.specific_character_set == "ISO_IR 100"
    assert said.inspected
    assert (shape.rows, shape.columns, shape.samples_per_pixel) == (12, 16, 1)
    assert (shape.bits_allocated, shape.number_of_frames) == (16, 1)
    assert shape.pixel_data.length_bytes == 384
    assert not shape.other_syntax


@pytest.mark.parametrize("declared", _SYNTAXES)
@pytest.mark.parametrize("written", _SYNTAXES)
def test_a_body_in_another_encoding_than_declared_is_read_and_noted(declared, written, file):
    found = scan(file(received(encoded(ct(), written), declared)))
    assert found.identity.study_instance_uid == STUDY
    assert found.structure.rows == 12
    assert found.structure.other_syntax == (declared != written)


def test_a_length_that_looks_like_a_vr_does_not_change_the_encoding(file):
    assert struct.pack("<L", 21_316)[:2] == b"DS"
    first = struct.pack("<HHL", 0x0008, 0x0001, 21_316) + bytes(21_316)
    found = scan(file(received(first + encoded(ct(), IMPLICIT), IMPLICIT)))
    assert found.identity.study_instance_uid == STUDY
    assert not found.structure.other_syntax


def test_fragments_are_counted_without_the_offset_table(file):
    body = encoded(ct(PixelData=None)) + encapsulated(b"ab", b"", b"\xfe\xff\xdd\xe0\0\0\0\0")
    pixels = scan(file(received(body, RLE))).structure.pixel_data
    assert (pixels.length_bytes, pixels.fragments, pixels.fragment_bytes) == (None, 3, 10)


@pytest.mark.parametrize("syntax", _SYNTAXES)
@pytest.mark.parametrize("undefined", [True, False])
def test_nothing_inside_a_sequence_is_taken_for_the_instances_own(syntax, undefined, file):
    inner = ct(StudyInstanceUID="1.9.9", PatientID="OTHER", Rows=99)
    inner.add_new(0x00081115, "SQ", sequence_of(ct(SOPInstanceUID="1.8"), undefined=undefined))
    image = ct(Rows=None)
    image.add_new(0x00081140, "SQ", sequence_of(inner, Dataset(), undefined=undefined))
    found = scan(file(received(encoded(image, syntax), syntax)))
    assert found.identity.study_instance_uid == STUDY
    assert found.identity.patient_id == PATIENT.encode()
    assert found.structure.rows is None
    assert found.structure.pixel_data.length_bytes == 384


@pytest.mark.parametrize("inside", [IMPLICIT, EXPLICIT])
def test_un_of_undefined_length_is_walked_as_it_is_written(inside, file):
    inner = ct(PatientID="OTHER")
    inner.add_new(0x00081115, "SQ", sequence_of(ct()))
    content = item(encoded(inner, inside), -1) + item(encoded(ct(), inside)) + SEQUENCE_END
    unknown = element(0x00091001, b"UN", content, 0xFFFFFFFF)
    assert scan(file(received(unknown + encoded(ct())))).identity.patient_id == PATIENT.encode()


def test_odd_but_harmless_elements_are_let_pass(file):
    body = encoded(ct())
    identity_group, image_groups = body[: body.index(b"\x28\0")], body[body.index(b"\x28\0") :]
    oddities = (
        element(0x00080000, b"UL", b"\xff\xff\xff\x7f"),  # a wrong group length
        element(0x00090010, b"LO", b"CREATOR "),
        element(0x00091001, b"UN", b"private!"),
        element(0x00091002, b"ZZ", b"\0\0\4\0\0\0data"[2:], 0),  # a VR not yet defined
        b"\x09\0\x03\x10" + struct.pack("<L", 4) + b"impl",  # implicit among explicit
        SEQUENCE_END,  # of a sequence of defined length
        element(0x00091004, b"LO", b"odd"),
    )
    padding = element(0xFFFCFFFC, b"OB", bytes(126))
    found = scan(file(received(image_groups + b"".join(oddities) + identity_group + padding)))
    assert found.identity.study_instance_uid == STUDY
    assert found.structure.pixel_data.length_bytes == 384
    assert found.structure.trailing_bytes == 0


@pytest.mark.parametrize("syntax", _SYNTAXES)
@pytest.mark.parametrize("zeros", [1, 8, 11, 5000])
def test_zeros_behind_the_last_element_are_padding(syntax, zeros, file):
    found = scan(file(received(encoded(ct(), syntax), syntax) + bytes(zeros)))
    assert found.structure.trailing_bytes == zeros


def test_of_two_elements_with_one_tag_the_first_counts_and_the_contradiction_is_noted(file):
    first = element(0x00080018, b"UI", b"1.2.3\0") + element(0x00100020, b"LO", b"A ")
    found = scan(file(received(first + first + encoded(ct()))))
    assert found.identity.sop_instance_uid == "1.2.3"
    assert found.identity.patient_id == b"A"
    assert found.structure.twice == {"sop_instance_uid", "patient_id"}


def test_a_private_syntax_with_elements_of_its_own_is_not_inspected(file):
    said = scan(file(received(b"\xff\x4f\xff\x51" * 64, PRIVATE))).identity
    assert (said.inspected, said.transfer_syntax_uid) == (False, PRIVATE)


# --- what a scan rejects


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"DICM",
        b"<html>" * 40,
        bytes(128) + b"DICM",
        received(b""),
        received(b"", ""),
        received(encoded(ct()), "")[:300],
        received(encoded(ct()) + b"\xde\xad\xbe\xef" * 8),
        received(item(b"1234")),
        received(element(0x00081140, b"SQ", encoded(ct()) + SEQUENCE_END, 0xFFFFFFFF)),
    ],
)
def test_what_is_no_data_set_is_unreadable(content, file):
    with pytest.raises(InstanceRejected) as rejection:
        scan(file(content))
    assert rejection.value.code == "instance-unreadable"


@pytest.mark.parametrize("syntax", _SYNTAXES)
def test_a_file_cut_anywhere_in_an_element_is_truncated(syntax, file):
    image = ct()
    image.add_new(0x00081140, "SQ", sequence_of(ct(PixelData=None)))
    whole = received(encoded(image, syntax), syntax)
    boundaries, at = set(), len(whole) - len(encoded(image, syntax))
    for part in image:
        single = Dataset()
        single.add(part)
        boundaries.add(at)
        at += len(encoded(single, syntax))
    for length in range(132, min(boundaries)):
        assert survey(file(whole[:length])).fault is not None, length
    for length in range(min(boundaries), len(whole)):
        found = survey(file(whole[:length]))
        fault = found.fault
        if length in boundaries:
            assert fault is None or fault.code == "instance-unreadable"
        elif fault is None:
            # Half a group number in big endian is one zero.
            assert found.structure.trailing_bytes == 1, length
        else:
            assert fault.code == "instance-truncated", length


@pytest.mark.parametrize(
    "body",
    [
        encapsulated(b"abcd")[:-8],
        encapsulated(b"abcd")[:-4],
        encapsulated(b"abcd")[:-10],
        element(0x00081140, b"SQ", item(b"", -1), 0xFFFFFFFF),
        element(0x00081140, b"SQ", item(b"", -1)[:-8] + SEQUENCE_END, 0xFFFFFFFF),
        element(0x00081140, b"SQ", item(b"", -1)[:-8], 0xFFFFFFFF),
    ],
)
def test_a_missing_delimiter_is_a_truncation(body, file):
    with pytest.raises(InstanceRejected) as rejection:
        scan(file(received(body, RLE)))
    assert rejection.value.code == "instance-truncated"


def test_what_was_read_before_the_fault_is_kept(file):
    found = survey(file(received(encoded(ct()))[:-1]))
    assert found.fault.code == "instance-truncated"
    assert found.identity.patient_id == PATIENT.encode()
    assert found.identity == scan(file(received(encoded(ct())))).identity


def test_half_a_value_is_no_value(file):
    whole = received(encoded(ct()))
    cut = file(whole[: whole.index(PATIENT.encode()) + 4])
    assert survey(cut).identity.patient_id is None


def test_a_file_that_is_not_there_is_an_error_of_the_disk(tmp_path):
    with pytest.raises(OSError):
        scan(tmp_path / "absent.dcm")


# --- what hostile files cost


def _cost(action: Callable[[], object]) -> tuple[float, int]:
    """Seconds of this thread's processor time, and peak of memory in bytes.

    The least of three: other threads of the process, of libraries and of earlier tests, may
    allocate at any time, and all that is allocated is traced.
    """
    measured = [_cost_once(action) for _ in range(3)]
    return min(seconds for seconds, _ in measured), min(peak for _, peak in measured)


def _cost_once(action: Callable[[], object]) -> tuple[float, int]:
    tracemalloc.start()
    before = time.thread_time()
    try:
        action()
        return time.thread_time() - before, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("depth", [1_000, 10_000])
@pytest.mark.needs("time")
def test_depth_of_nesting_costs_a_byte_a_level(depth, file):
    opening = element(0x00081140, b"SQ", b"", 0xFFFFFFFF) + item(b"", -1)[:8]
    closing = item(b"", -1)[8:] + SEQUENCE_END
    path = file(received(opening * depth + closing * depth + encoded(ct())))
    assert scan(path).identity.study_instance_uid == STUDY
    seconds, peak = _cost(lambda: scan(path))
    assert seconds < 2
    assert peak < 256 * 1024


def test_a_deflated_data_set_is_never_inflated(file):
    packer = zlib.compressobj(9, wbits=-15)
    bomb = packer.compress(bytes(64 * 1024**2)) + packer.flush()
    path = file(received(bomb, DEFLATED))
    seconds, peak = _cost(lambda: scan(path))
    assert seconds < 0.1
    assert peak < 128 * 1024
    said = scan(path).identity
    assert not said.inspected
    assert (said.study_instance_uid, said.sop_instance_uid) == (None, None)
    assert said.requested_sop_instance_uid == INSTANCE


def test_two_gigabytes_cost_a_few_pages(tmp_path):
    path = tmp_path / "large.dcm"
    body = encoded(ct(PixelData=None, NumberOfFrames="5242880"))
    pixels = element(0x7FE00010, b"OW", b"", 2 * 1024**3)
    path.write_bytes(received(body + pixels))
    os.truncate(path, path.stat().st_size + 2 * 1024**3)
    seconds, peak = _cost(lambda: scan(path))
    assert seconds < 0.1
    assert peak < 128 * 1024
    assert scan(path).structure.pixel_data.length_bytes == 2 * 1024**3
    os.truncate(path, path.stat().st_size - 1)
    assert survey(path).fault.code == "instance-truncated"


@pytest.mark.needs("time")
def test_headers_beyond_two_million_are_not_looked_at(file):
    fragments = item(b"") * 2_100_000
    path = file(received(encoded(ct(PixelData=None)) + encapsulated()[:-8] + fragments, RLE))
    before = time.process_time()
    found = scan(path)
    assert time.process_time() - before < 10
    assert not found.structure.complete
    assert found.identity.study_instance_uid == STUDY


def test_more_elements_than_anybody_writes_are_unreadable(file):
    many = element(0x00091001, b"LO", b"") * 100_001
    assert survey(file(received(many))).fault.code == "instance-unreadable"


def _attributed(path, syntax: str = EXPLICIT) -> str | None:
    """The study a receiver attributes a file to, whose file meta it has written itself."""
    with path.open("rb") as written:
        return study_of(written.fileno(), len(received(b"", syntax)), syntax)


def test_attribution_does_not_read_what_lies_behind_the_uids(file, monkeypatch):
    frames = item(element(0x00189074, b"DT", b"20240229" * 4), -1) * 20_000
    groups = element(0x52009230, b"SQ", frames + SEQUENCE_END, 0xFFFFFFFF)
    path = file(received(encoded(ct(PixelData=None)) + groups))
    reads = []
    read = os.pread
    monkeypatch.setattr(os, "pread", lambda *asked: reads.append(asked) or read(*asked))
    assert _attributed(path) == STUDY
    assert len(reads) == 1


def _seeds() -> list[bytes]:
    image = ct()
    image.add_new(0x00081140, "SQ", sequence_of(ct(PixelData=None)))
    image.add_new(0x00091001, "UN", b"private!")
    seeds = [received(encoded(image, syntax), syntax) for syntax in _SYNTAXES]
    seeds.append(received(encoded(ct(PixelData=None)) + encapsulated(b"abcd", b"ef"), RLE))
    return seeds


def test_two_thousand_mutated_files_let_nothing_but_a_rejection_out(file):
    chance = random.Random(20240229)
    interesting = [b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f", b"\xfe\xff\x00\xe0", b"UN\0\0"]
    seeds = _seeds()
    slowest = 0.0
    rejected = 0
    for _ in range(2_000):
        content = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 8)):
            at = chance.randrange(132, len(content))
            kind = chance.randrange(4)
            if kind == 0:
                content[at] = chance.randrange(256)
            elif kind == 1:
                content[at : at + 4] = chance.choice(interesting)
            elif kind == 2:
                del content[at : at + chance.randint(1, 16)]
            else:
                content[at:at] = content[132 : 132 + chance.randint(1, 64)]
        path = file(bytes(content))
        before = time.process_time()
        try:
            scan(path)
        except InstanceRejected as rejection:
            rejected += 1
            assert rejection.code in ("instance-unreadable", "instance-truncated")
            assert "SECRET" not in str(rejection) and "1.2.826" not in str(rejection)
        slowest = max(slowest, time.process_time() - before)
        _attributed(path)
    assert slowest < 0.5
    assert rejected > 500


@given(st.binary(max_size=400), st.sampled_from([*_SYNTAXES, RLE, PRIVATE]))
def test_arbitrary_bytes_behind_a_file_meta_let_nothing_but_a_rejection_out(
    tmp_path_factory, body, syntax
):
    path = tmp_path_factory.getbasetemp() / "arbitrary.dcm"
    path.write_bytes(received(body, syntax))
    survey(path)
    _attributed(path, syntax)
