"""What is asked names one thing, what is answered is compared, and the list is the archive's."""

from __future__ import annotations

import threading
from collections import defaultdict
from datetime import date

import pytest
from pynetdicom.dsutils import encode

from prefect_dicom.config.node import PacsNode, Timeouts
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import InformationModel
from prefect_dicom.core.uids import is_safe_key
from prefect_dicom.network.find.answers import study_of
from prefect_dicom.network.find.list_instances import list_instances
from prefect_dicom.network.find.list_series import list_series
from prefect_dicom.network.find.list_studies import STUDY_KEYS, find_some_studies, find_studies
from prefect_dicom.network.query_keys import query_identifier, retrieve_identifier
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.testing import Behaviour, ScriptedPacs
from prefect_dicom.testing.generate import generate_cohort
from tests.support import peers
from tests.support.wire import raw_answer

STUDY_ROOT, PATIENT_ROOT = InformationModel.STUDY_ROOT, InformationModel.PATIENT_ROOT
UNSAFE = ["", " ", "\0", "*", "***", "1.2.*", "1.?", "A\\B", "1.2\n"]


# --- what is asked --------------------------------------------------------------------------


@pytest.mark.parametrize("value", UNSAFE)
def test_no_query_leaves_with_a_key_that_selects_several(value):
    with pytest.raises(ValueError):
        query_identifier({"PatientID": value}, [])


@pytest.mark.parametrize("value", UNSAFE)
def test_no_retrieve_leaves_with_a_key_that_selects_several(value):
    for level, uids in (
        ("STUDY", ([value],)),
        ("STUDY", (["1.2", value],)),
        ("SERIES", (["1.2"], [value])),
        ("SERIES", ([value], ["1.3"])),
        ("IMAGE", (["1.2"], ["1.3"], ["1.4", value])),
        ("IMAGE", (["1.2"], [value], ["1.4"])),
    ):
        with pytest.raises(ValueError):
            retrieve_identifier(STUDY_ROOT, level, None, *uids)
    with pytest.raises(ValueError):
        retrieve_identifier(PATIENT_ROOT, "STUDY", value, ["1.2"])


def test_a_uid_with_odd_bytes_is_asked_for_as_the_peer_has_it():
    # As read from an answer: UIDs are in no character set, and not one byte of them is lost.
    asked = query_identifier({"StudyInstanceUID": "1.2\xa2", "PatientID": "M\xfcller"}, [])
    assert encode(asked, True, True).count(b"1.2\xa2") == 1
    assert asked.SpecificCharacterSet == "ISO_IR 100"
    alone = query_identifier({"StudyInstanceUID": "1.2\xa2"}, [])
    assert "SpecificCharacterSet" not in alone


@pytest.mark.parametrize(
    ("level", "uids"),
    [
        ("STUDY", ([],)),
        ("STUDY", (["1.2"], ["1.3"])),
        ("SERIES", (["1.2"],)),
        ("SERIES", (["1.2", "1.3"], ["1.4"])),
        ("SERIES", (["1.2"], ["1.3"], ["1.4"])),
        ("IMAGE", (["1.2"], [], ["1.4"])),
        ("IMAGE", (["1.2"], ["1.3", "1.4"], ["1.5"])),
        ("PATIENT", (["1.2"],)),
        ("", (["1.2"],)),
    ],
)
def test_a_retrieve_has_one_key_for_each_level_above_and_none_below(level, uids):
    with pytest.raises(ValueError):
        retrieve_identifier(STUDY_ROOT, level, None, *uids)


def test_a_retrieve_may_list_uids_at_its_own_level():
    identifier = retrieve_identifier(STUDY_ROOT, "IMAGE", "1", ["1.2"], ["1.3"], ["1.4", "1.5"])
    assert identifier.QueryRetrieveLevel == "IMAGE"
    assert identifier.StudyInstanceUID == "1.2"
    assert identifier.SeriesInstanceUID == "1.3"
    assert list(identifier.SOPInstanceUID) == ["1.4", "1.5"]
    assert "PatientID" not in identifier
    patient = retrieve_identifier(PATIENT_ROOT, "STUDY", "000123", ["1.2"])
    assert patient.PatientID == "000123"


def test_a_character_set_is_declared_only_where_it_is_needed():
    assert "SpecificCharacterSet" not in query_identifier({"PatientID": "000123"}, [])
    assert query_identifier({"PatientID": "Ünal7"}, []).SpecificCharacterSet == "ISO_IR 100"
    named = retrieve_identifier(PATIENT_ROOT, "STUDY", "Ünal7", ["1.2"])
    assert named.SpecificCharacterSet == "ISO_IR 100"


def test_a_query_without_any_key_is_not_sent():
    with Requestor(_nobody()) as requestor, pytest.raises(ValueError):
        find_studies(requestor, {})


def test_the_patient_root_cannot_name_a_study_of_a_wildcard_patient():
    with Requestor(_nobody(PATIENT_ROOT)) as requestor, pytest.raises(PacsError) as error:
        list_instances(requestor, "1.2.3", "***")
    assert error.value.code == "unsafe-patient-id"


def _nobody(model=STUDY_ROOT) -> PacsNode:
    """A node where nothing listens: whatever were sent would fail otherwise than expected."""
    return PacsNode(
        host="127.0.0.1", port=peers.free_port(), called_ae_title="X", information_model=model
    )


# --- real archives --------------------------------------------------------------------------


def _held(archive: peers.Orthanc) -> dict[str, set[tuple[str, str]]]:
    held = defaultdict(set)
    for one in archive.instances():
        held[one.study].add((one.series, one.sop))
    return held


def test_every_list_equals_what_orthanc_holds(orthanc):
    _check_every_list(orthanc)


@pytest.mark.full
def test_every_list_equals_what_orthanc_holds_of_the_whole_corpus(orthanc_full):
    _check_every_list(orthanc_full)


def _check_every_list(archive: peers.Orthanc):
    held = _held(archive)
    assert held
    with Requestor(archive.node()) as requestor:
        for study, expected in held.items():
            if not is_safe_key(study):
                continue
            listed = list_instances(requestor, study)
            assert listed.unlistable == 0
            assert {tuple(instance.key) for instance in listed.instances} == expected
            assert all(instance.sop_class_uid for instance in listed.instances)


def test_dcmqrscp_lists_the_same_instances_as_orthanc(orthanc, dcmqrscp):
    """But for those it does not hold: compressed ones, and the first of two of one UID."""
    held = _held(orthanc)
    compared = 0
    with Requestor(dcmqrscp.node()) as requestor:
        for study in sorted(held):
            if not is_safe_key(study):
                continue
            keys = {tuple(i.key) for i in list_instances(requestor, study).instances}
            assert keys <= held[study]
            compared += len(keys)
    assert compared > 100


@pytest.mark.parametrize("archive", ["orthanc", "dcmqrscp"])
def test_both_information_models_list_a_study_alike(archive, request):
    archive = request.getfixturevalue(archive)
    with Requestor(archive.node()) as requestor:
        studies = find_some_studies(requestor, date(1990, 1, 1), date(2029, 12, 31))
        study = next(s for s in studies if is_safe_key(s.patient_id))
        by_study = list_instances(requestor, study.study_instance_uid)
    with Requestor(archive.node(information_model=PATIENT_ROOT)) as requestor:
        by_patient = list_instances(requestor, study.study_instance_uid, study.patient_id)
    assert by_patient == by_study
    assert by_study.instances


def test_the_studies_of_a_patient_come_with_their_keys(orthanc):
    with Requestor(orthanc.node()) as requestor:
        one = find_some_studies(requestor, date(2000, 1, 1), date(2029, 12, 31))[0]
        by_uid = find_studies(requestor, {"StudyInstanceUID": one.study_instance_uid})
        by_patient = find_studies(requestor, {"PatientID": one.patient_id})
        series = list_series(requestor, one.study_instance_uid)
        instances = list_instances(requestor, one.study_instance_uid)
    assert one in by_uid
    assert one in by_patient
    assert one.study_date.isdigit() and one.modalities
    assert one.number_of_series == len(series.series)
    assert one.number_of_instances == len(instances.instances)
    counts = sum(each.number_of_instances for each in series.series)
    assert counts == len(instances.instances)


def test_a_patient_nobody_has_gives_an_empty_list(orthanc, dcmqrscp):
    for archive in (orthanc, dcmqrscp):
        with Requestor(archive.node()) as requestor:
            assert find_studies(requestor, {"PatientID": "NOBODY-HAS-THIS"}) == []
            assert list_instances(requestor, "1.2.3.4.5").instances == ()


def test_a_cut_list_of_answers_is_an_error_and_not_a_short_list(new_archive, corpus_small):
    archive = new_archive(peers.Orthanc, LimitFindResults=3, LimitFindInstances=3)
    archive.load(corpus_small[::4])
    with Requestor(archive.node()) as requestor:
        with pytest.raises(PacsError) as error:
            find_studies(requestor, {"StudyDate": "19000101-20991231"})
        some = find_some_studies(requestor, date(1900, 1, 1), date(2029, 12, 31))
    assert error.value.code == "answers-capped"
    assert len(some) == 3


def test_a_hundred_queries_use_one_association(orthanc):
    before = orthanc.log.read_text(errors="replace").count("Association Received from AET")
    with Requestor(orthanc.node()) as requestor:
        for number in range(100):
            assert find_studies(requestor, {"AccessionNumber": f"NONE{number}"}) == []
    after = orthanc.log.read_text(errors="replace").count("Association Received from AET")
    assert after - before == 1


def test_a_query_left_early_is_cancelled_and_the_association_goes_on(orthanc):
    before = orthanc.log.read_text(errors="replace").count("Association Received from AET")
    with Requestor(orthanc.node()) as requestor:
        assert len(find_some_studies(requestor, date(1900, 1, 1), date(2029, 12, 31))) == 20
        assert find_studies(requestor, {"PatientID": "NOBODY-HAS-THIS"}) == []
    after = orthanc.log.read_text(errors="replace").count("Association Received from AET")
    assert after - before == 1


# --- archives that misbehave ----------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return generate_cohort(tmp_path_factory.mktemp("files"), studies=3, seed=7)


def _node(pacs: ScriptedPacs, **changes) -> PacsNode:
    settings = {"host": "127.0.0.1", "port": pacs.port, "called_ae_title": pacs.ae_title}
    return PacsNode(**{**settings, **changes})


def _error_of_all_studies(node: PacsNode) -> PacsError:
    with Requestor(node) as requestor, pytest.raises(PacsError) as error:
        find_studies(requestor, {"StudyDate": "19000101-20991231"})
    return error.value


def _some_study(pacs: ScriptedPacs) -> str:
    with Requestor(_node(pacs)) as requestor:
        studies = find_some_studies(requestor, date(1900, 1, 1), date(2099, 1, 1))
    return studies[0].study_instance_uid


@pytest.mark.needs("time")
def test_answers_about_other_studies_and_series_are_dropped(files):
    with ScriptedPacs(files) as pacs:
        study = _some_study(pacs)
        with Requestor(_node(pacs)) as requestor:
            honest = list_instances(requestor, study)
            keys = ["StudyInstanceUID", "SeriesInstanceUID"]
            pacs.script.append(Behaviour("find.ignore_keys", keys=keys))
            assert set(list_instances(requestor, study).instances) == set(honest.instances)


def test_answers_without_a_uid_are_counted_and_not_guessed(files):
    with ScriptedPacs(files) as pacs:
        study = _some_study(pacs)
        with Requestor(_node(pacs)) as requestor:
            count = len(list_instances(requestor, study).instances)
            pacs.script.append(Behaviour("find.omit_keys", keys=["SOPInstanceUID"]))
            listed = list_instances(requestor, study)
    assert listed.instances == ()
    assert listed.unlistable == count > 0


def test_absent_upper_keys_and_counts_do_no_harm(files):
    with ScriptedPacs(files) as pacs:
        study = _some_study(pacs)
        with Requestor(_node(pacs)) as requestor:
            honest = list_instances(requestor, study)
            pacs.script.append(Behaviour("find.counts", how="none"))
            assert list_instances(requestor, study) == honest
            assert list_series(requestor, study).series[0].number_of_instances is None


@pytest.mark.parametrize("status", [0xFE00, 0xA700, 0xB001])
def test_every_word_for_a_result_limit_is_understood(files, status):
    script = [Behaviour("find.cap", answers=1, status=status)]
    with ScriptedPacs(files, script=script) as pacs:
        error = _error_of_all_studies(_node(pacs))
    assert error.code == "answers-capped"


@pytest.mark.parametrize("status", [0xA900, 0xC000])
def test_a_pacs_without_an_image_level_is_known_by_its_status(files, status):
    with ScriptedPacs(files) as pacs:
        study = _some_study(pacs)
        pacs.script.append(Behaviour("find.no_image_level", status=status))
        with Requestor(_node(pacs)) as requestor:
            assert list_series(requestor, study).series
            with pytest.raises(PacsError) as error:
                list_instances(requestor, study)
    assert error.value.code == "request-refused"
    assert f"{status:04X}" in error.value.detail and "IMAGE" in error.value.detail


@pytest.mark.parametrize("how", ["abort", "close"])
def test_a_list_that_was_cut_by_a_lost_association_is_no_list(files, how):
    script = [Behaviour("net.drop_after", answers=2, how=how)]
    with ScriptedPacs(files, script=script) as pacs:
        error = _error_of_all_studies(_node(pacs))
    assert error.code == "association-lost"


def test_an_association_lost_while_idle_is_opened_anew(files):
    with ScriptedPacs(files) as pacs:
        study = _some_study(pacs)
        with Requestor(_node(pacs)) as requestor:
            first = list_instances(requestor, study)
            pacs.close()
            pacs.start()
            assert list_instances(requestor, study) == first


def test_an_archive_that_falls_silent_is_left_after_the_time_it_was_given(files):
    hold = threading.Event()
    quick = Timeouts(find_seconds=0.3)
    script = [Behaviour("net.stall_after", answers=1, hold=hold, times=1)]
    with ScriptedPacs(files, script=script) as pacs:
        try:
            error = _error_of_all_studies(_node(pacs, timeouts=quick))
        finally:
            hold.set()
    assert error.code == "association-stalled"


# --- texts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("declared", "raw", "text"),
    [
        ("", b"M\xfcller", "Müller"),
        ("ISO_IR 100", b"M\xfcller ", "Müller"),
        ("ISO_IR 192", "Ünal".encode(), "Ünal"),
        ("ISO_IR 192", b"M\xfcller", "Müller"),
        ("ISO 2022 IR 6\\ISO 2022 IR 87", b"\x1b$B;3ED\x1b(B", "山田"),
        ("NO SUCH SET", b"M\xfcller", "Müller"),
        ("GB18030", "王小东".encode("gb18030"), "王小东"),
        ("ISO_IR 192", b" 000123\0", "000123"),
    ],
)
def test_texts_are_decoded_as_declared_and_never_lost(declared, raw, text):
    answer = raw_answer(SpecificCharacterSet=declared.encode(), StudyDescription=raw)
    assert study_of(answer).study_description == text


@pytest.mark.parametrize(
    ("raw", "count"),
    [(b"12", 12), (b" 7 ", 7), (b"", None), (b"-1", None), (b"many", None), (b"9" * 40, None)],
)
def test_a_count_is_a_number_or_unknown(raw, count):
    assert study_of(raw_answer(NumberOfStudyRelatedInstances=raw)).number_of_instances == count


def test_garbage_in_every_key_still_gives_a_study():
    garbage = bytes(range(128, 256)) + b"\\\x1b$B\xff\x00*"
    study = study_of(raw_answer(**dict.fromkeys(STUDY_KEYS, garbage)))
    assert study.study_instance_uid and not is_safe_key(study.study_instance_uid)
