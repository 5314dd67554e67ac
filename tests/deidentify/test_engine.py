"""What a copy holds: the categories of the MIDI-B benchmark, over-removal included."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import UID

from prefect_dicom.core.errors import InstanceRejected
from prefect_dicom.core.model import StoreRequest
from prefect_dicom.deidentify.elements import read_part_ten
from prefect_dicom.deidentify.engine import Deidentifier
from prefect_dicom.deidentify.keys import ProjectKey
from prefect_dicom.deidentify.options import Dates, Options, Retain
from prefect_dicom.dicom.part10 import file_meta
from tests.support.part10_objects import CT_IMAGE, EXPLICIT, SERIES, STUDY, ct, encoded, sequence_of

SECRET = bytes(range(32))


def engine(project: str = "lung", secret: bytes = SECRET, **options: object) -> Deidentifier:
    return Deidentifier(ProjectKey(project, secret), Options(**options))


def file_of(image: Dataset, syntax: str = EXPLICIT) -> bytes:
    request = StoreRequest(1, str(image.SOPClassUID), str(image.SOPInstanceUID), syntax)
    return file_meta(request) + encoded(image, syntax)


def raw_copy(image: Dataset, by: Deidentifier | None = None, **more: object) -> bytes:
    copy = (by or engine()).copy(read_part_ten(file_of(image)), **more)
    return b"".join(copy.pieces)


def copied(image: Dataset, by: Deidentifier | None = None, **more: object) -> Dataset:
    return pydicom.dcmread(BytesIO(raw_copy(image, by, **more)))


def item(**values: object) -> Dataset:
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


# ------------------------------------------------------------------ what says what was done


def test_a_copy_says_that_and_how_it_was_made():
    copy = copied(ct())

    assert copy.PatientIdentityRemoved == "YES"
    assert copy.DeidentificationMethod[0] == "PS3.15 2026c Basic Profile"
    assert [code.CodeValue for code in copy.DeidentificationMethodCodeSequence] == ["113100"]
    assert copy.LongitudinalTemporalInformationModified == "REMOVED"


@pytest.mark.parametrize(
    ("options", "codes", "temporal"),
    [
        ({"dates": Dates.FULL}, {"113106"}, "UNMODIFIED"),
        ({"dates": Dates.MODIFIED}, {"113107"}, "MODIFIED"),
        (
            {"retain": frozenset(Retain)},
            {"113108", "113109", "113110", "113111", "113112"},
            "REMOVED",
        ),
        ({"descriptors": {"chest": "CHEST"}}, {"113105"}, "REMOVED"),
    ],
)
def test_each_option_has_its_code(options, codes, temporal):
    copy = copied(ct(), engine(**options))

    assert {code.CodeValue for code in copy.DeidentificationMethodCodeSequence} == codes | {
        "113100"
    }
    assert copy.LongitudinalTemporalInformationModified == temporal


def test_file_meta_is_written_anew():
    data = bytearray(file_of(ct()))
    data[:128] = b"PREAMBLE" * 16

    copy = b"".join(engine().copy(read_part_ten(bytes(data))).pieces)

    assert copy[:128] == bytes(128)
    assert pydicom.dcmread(BytesIO(copy)).file_meta.ImplementationVersionName == "PREFECT_DICOM"


# ------------------------------------------------------------------ pixels and tags retained


def test_pixels_and_what_describes_them_are_retained():
    image = ct(
        **{"Manufacturer": "GE MEDICAL SYSTEMS", "SliceThickness": "1.25", "KVP": "120"},
        **{"ConvolutionKernel": "B30f", "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]},
        **{"PixelSpacing": ["0.7", "0.7"], "BodyPartExamined": "CHEST", "SeriesNumber": "4"},
    )
    copy = copied(image)

    for keyword in (
        *("PixelData", "Rows", "Columns", "BitsAllocated", "Modality", "SOPClassUID"),
        *("Manufacturer", "SliceThickness", "KVP", "ConvolutionKernel", "ImageType"),
        *("PixelSpacing", "BodyPartExamined", "SeriesNumber", "SpecificCharacterSet"),
    ):
        assert copy[keyword].value == image[keyword].value, keyword


def test_pixels_of_any_size_are_the_same_bytes_of_the_source():
    data = file_of(ct())
    file = read_part_ten(data)
    pixels = engine().copy(file).pieces[-1]

    assert isinstance(pixels, memoryview)
    assert pixels.obj is data


def test_codes_keep_their_meaning():
    code = item(CodeValue="T-D3000", CodingSchemeDesignator="SRT", CodeMeaning="Chest")
    copy = copied(ct(AnatomicRegionSequence=sequence_of(code)))

    assert copy.AnatomicRegionSequence[0].CodeMeaning == "Chest"


# ------------------------------------------------------------------ text removed, at every depth


def test_names_in_sequences_beside_the_table_are_removed():
    inner = item(PatientName="Secret^Name", OperatorsName="Op^Erator", StudyDate="20240229")
    image = ct(
        ReferencedRawDataSequence=sequence_of(item(ReferencedSeriesSequence=sequence_of(inner)))
    )

    data = raw_copy(image)

    assert b"Secret" not in data
    assert b"Erator" not in data
    assert b"20240229" not in data


def test_descriptors_go_unless_their_value_is_allowed():
    image = ct(StudyDescription="CT Chest", SeriesDescription="for Dr Smith")
    copy = copied(image, engine(descriptors={"ct chest": "CT CHEST"}))

    assert copy.StudyDescription == "CT CHEST"
    assert "SeriesDescription" not in copy


def test_text_that_no_list_knows_is_replaced_and_counted():
    copy = engine().copy(read_part_ten(file_of(ct(SegmentDescription="of Mr Secret"))))

    assert copy.beyond_table == {"SegmentDescription": 1}
    assert b"Mr Secret" not in b"".join(copy.pieces)


@pytest.mark.parametrize(
    "planted",
    [{"SequenceName": "ep2d SECRET"}, {"ImageType": ["ORIGINAL", "Secret"]}],
    ids=["text", "code"],
)
def test_the_patients_own_name_is_found_in_what_would_be_kept(planted):
    assert b"secret" not in raw_copy(ct(**planted)).lower()


def test_numbers_and_codes_that_are_none_are_emptied():
    image = ct()
    image.add_new(0x00180050, "DS", "1.0")
    data = file_of(image).replace(b"1.0 ", b"Mr X")

    copy = b"".join(engine().copy(read_part_ten(data)).pieces)

    assert b"Mr X" not in copy


def test_strict_keeps_no_text_without_a_row():
    copy = copied(ct(Manufacturer="GE", SequenceName="ep2d"), engine(strict=True))

    assert copy.Manufacturer == copy.SequenceName == "REMOVED"
    assert copy.Modality == "CT"


def test_private_elements_go_and_safe_ones_stay_by_option():
    image = ct()
    block = image.private_block(0x7053, "Philips PET Private Group", create=True)
    block.add_new(0x00, "DS", "1.5")
    block.add_new(0x10, "LO", "unsafe")

    assert not [e for e in copied(image) if e.tag.is_private]
    kept = copied(image, engine(retain=frozenset({Retain.SAFE_PRIVATE})))
    assert {e.tag & 0xFFFF for e in kept if e.tag.is_private} == {0x10, 0x1000}


def test_curves_overlays_and_group_4_are_removed():
    image = ct()
    image.add_new(0x60003000, "OW", b"overlay!")
    image.add_new(0x60000022, "LO", "overlay of")
    image.add_new(0x50003000, "OW", b"curve!!!")
    image.add_new(0x00041130, "CS", "FILESET")

    assert {each.tag.group for each in copied(image)}.isdisjoint({0x5000, 0x6000, 0x0004})


# ------------------------------------------------------------------ text not null


def test_identifiers_have_values_that_are_consistent_and_not_empty():
    image = ct(AccessionNumber="A-1", StudyID="1", ReferringPhysicianName="Ref^Erring")
    one, two = copied(image), copied(ct(AccessionNumber="A-1", SOPInstanceUID=f"{SERIES}.2"))

    assert one.PatientID == one.PatientName == two.PatientID
    assert one.AccessionNumber == two.AccessionNumber not in ("", "A-1")
    assert one.StudyID == two.StudyID != ""
    assert one.ReferringPhysicianName == ""


def test_a_given_pseudonym_takes_the_place_of_the_keyed_one():
    image = ct(ReferencedRawDataSequence=sequence_of(item(PatientID="SECRET-0042")))
    copy = copied(image, pseudonym="LUNG-007")

    assert copy.PatientID == copy.PatientName == "LUNG-007"
    assert copy.ReferencedRawDataSequence[0].PatientID == "LUNG-007"


def test_patients_without_an_id_are_not_merged():
    other = ct(PatientID="", StudyInstanceUID="1.2.3")
    assert copied(ct(PatientID="")).PatientID != copied(other).PatientID


def test_the_same_number_of_two_issuers_is_two_patients():
    a, b = (copied(ct(IssuerOfPatientID=issuer)) for issuer in ("A", "B"))
    assert a.PatientID != b.PatientID


def test_codes_of_institutions_become_dummies_that_an_iod_allows():
    code = item(CodeValue="JFK", CodingSchemeDesignator="99X", CodeMeaning="Kennedy Hospital")
    copy = copied(ct(InstitutionCodeSequence=sequence_of(code), InstitutionName="Kennedy"))

    assert copy.InstitutionName == "REMOVED"
    assert copy.InstitutionCodeSequence[0].CodeMeaning == "Removed"


# ------------------------------------------------------------------ UIDs


def test_uids_are_replaced_and_consistent_within_and_across_studies_of_a_project():
    frame = "1.2.826.0.1.42"
    reference = item(ReferencedSOPClassUID=CT_IMAGE, ReferencedSOPInstanceUID=f"{SERIES}.2")
    one = copied(ct(FrameOfReferenceUID=frame, ReferencedImageSequence=sequence_of(reference)))
    two = copied(
        ct(SOPInstanceUID=f"{SERIES}.2", StudyInstanceUID="1.9", FrameOfReferenceUID=frame)
    )

    assert one.FrameOfReferenceUID == two.FrameOfReferenceUID != frame
    assert one.ReferencedImageSequence[0].ReferencedSOPInstanceUID == two.SOPInstanceUID
    assert one.ReferencedImageSequence[0].ReferencedSOPClassUID == CT_IMAGE
    assert one.StudyInstanceUID not in (STUDY, two.StudyInstanceUID)
    assert all(UID(each).is_valid for each in (one.StudyInstanceUID, one.SOPInstanceUID))
    assert one.file_meta.MediaStorageSOPInstanceUID == one.SOPInstanceUID


@pytest.mark.parametrize("other", [engine("brain"), engine(secret=bytes(32))], ids=["name", "key"])
def test_two_projects_have_no_identifier_in_common(other):
    one, two = copied(ct(AccessionNumber="A-1")), copied(ct(AccessionNumber="A-1"), other)

    for keyword in (
        "StudyInstanceUID",
        "SOPInstanceUID",
        "PatientID",
        "AccessionNumber",
        "StudyID",
    ):
        assert one[keyword].value != two[keyword].value, keyword


def test_well_known_uids_stay():
    talairach = "1.2.840.10008.1.4.1.1"
    assert copied(ct(FrameOfReferenceUID=talairach)).FrameOfReferenceUID == talairach


def test_uids_without_a_row_are_replaced_too():
    copy = copied(ct(VolumeFrameOfReferenceUID="1.2.826.5", FrameOfReferenceUID="1.2.826.5"))
    assert copy.VolumeFrameOfReferenceUID == copy.FrameOfReferenceUID != "1.2.826.5"


def test_the_option_keeps_uids():
    copy = copied(ct(), engine(retain=frozenset({Retain.UIDS})))
    assert (copy.StudyInstanceUID, copy.PatientID == "SECRET-0042") == (STUDY, False)


# ------------------------------------------------------------------ dates


def test_dates_of_a_patient_are_shifted_by_the_same_days_and_times_stay():
    image = ct(
        **{"SeriesDate": "20240301", "StudyTime": "101500", "PatientBirthDate": "19700101"},
        AcquisitionDateTime="20240229101500.5+0100",
    )
    copy = copied(image, engine(dates=Dates.MODIFIED))

    shifted = pydicom.valuerep.DA(copy.StudyDate)
    assert (pydicom.valuerep.DA(copy.SeriesDate) - shifted).days == 1
    assert copy.StudyDate < "20240229"
    assert copy.AcquisitionDateTime == f"{copy.StudyDate}101500.5+0100"
    assert (copy.StudyTime, copy.PatientBirthDate) == ("101500", "")


def test_a_date_that_is_none_is_not_guessed():
    image = ct()
    data = file_of(image).replace(b"20240229", b"02/29/24")
    copy = b"".join(engine(dates=Dates.MODIFIED).copy(read_part_ten(data)).pieces)
    assert b"02/29/24" not in copy


@pytest.mark.parametrize(("age", "kept"), [("042Y", "042Y"), ("093Y", "090Y"), ("old", "")])
def test_ages_are_kept_by_option_up_to_89_years(age, kept):
    image = ct()
    image.add_new(0x00101010, "AS", age)
    copy = copied(image, engine(retain=frozenset({Retain.PATIENT_CHARACTERISTICS})))
    assert copy.get("PatientAge", "") == kept


# ------------------------------------------------------------------ the same bytes


def test_the_same_input_gives_the_same_bytes_in_two_orders_and_two_processes():
    images = [ct(SOPInstanceUID=f"{SERIES}.{n}", AccessionNumber=f"A{n}") for n in range(5)]
    here = [raw_copy(image) for image in images]
    backwards = [raw_copy(image) for image in reversed(images)]
    script = (
        "import sys; from tests.deidentify.test_engine import *;"
        "sys.stdout.buffer.write(b''.join(raw_copy(ct(SOPInstanceUID=f'{SERIES}.{n}',"
        "AccessionNumber=f'A{n}')) for n in range(5)))"
    )
    there = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout

    assert here == backwards[::-1]
    assert b"".join(here) == there


# ------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-3], "longer than what is left"),
        (lambda data: data + b"trailer!", "known VR|follow"),
        (lambda data: b"no DICOM at all" * 20, "DICM"),
    ],
    ids=["cut", "bytes behind", "other"],
)
def test_what_cannot_be_read_whole_is_refused(damage, words):
    with pytest.raises(InstanceRejected, match=words) as caught:
        read_part_ten(damage(file_of(ct())))
    assert caught.value.code == "deidentify-unreadable"


def test_padding_behind_the_data_set_is_dropped():
    padded_file = file_of(ct()) + bytes(512)
    assert b"".join(engine().copy(read_part_ten(padded_file)).pieces) == raw_copy(ct())


def test_an_instance_without_uids_is_refused():
    with pytest.raises(InstanceRejected, match="UIDs"):
        raw_copy(ct(SeriesInstanceUID=None))


def test_what_was_done_is_explained_per_element_without_values():
    told = []
    engine().copy(
        read_part_ten(
            file_of(ct(ReferencedSeriesSequence=sequence_of(item(SeriesInstanceUID="1.2"))))
        ),
        explain=told.append,
    )
    lines = {each.path: (each.action, each.why) for each in told}

    assert lines["(0010,0010) PatientName"] == (
        "pseudonym",
        "(0010,0010) Patient's Name: basic profile",
    )
    assert lines["(0008,1115)[1] > (0020,000E) SeriesInstanceUID"][0] == "uid-replaced"
    assert not [each for each in told if "Secret" in str(each)]
