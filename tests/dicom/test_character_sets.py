"""Texts beyond ASCII are asked for so that the archive understands, and read as they were meant.

What cannot be read as declared is a guess and says so; its bytes are kept.
"""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom import config, dcmread
from pydicom.dataelem import DataElement
from pynetdicom.dsutils import encode

from prefect_dicom.config.node import PacsNode
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import CohortRow, InformationModel
from prefect_dicom.dicom.character_sets import USUAL, Text, character_sets_for, decoded, encoded
from prefect_dicom.discovery.row_query import StudyQueryCapabilities, discover
from prefect_dicom.network.find.answers import study_of
from prefect_dicom.network.find.list_instances import list_instances
from prefect_dicom.network.find.list_studies import find_studies
from prefect_dicom.network.query_keys import query_identifier, retrieve_identifier
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.testing import Behaviour, ScriptedPacs
from prefect_dicom.testing.generate import generate_cohort
from tests.support import peers
from tests.support.sites import study
from tests.support.wire import raw_answer

# --- reading ----------------------------------------------------------------------------------

YAMADA = "Yamada^Tarou=山田^太郎=やまだ^たろう"
HONG = "Hong^Gildong=洪^吉洞=홍^길동"


@pytest.mark.parametrize(
    ("declared", "raw", "text"),
    [
        ("ISO_IR 6", b"Mueller", "Mueller"),
        ("ISO_IR 100", b"Buc^J\xe9r\xf4me", "Buc^Jérôme"),
        ("ISO_IR 101", b"Dvo\xf8\xe1k", "Dvořák"),
        ("ISO_IR 126", b"\xc4\xe9\xef", "Διο"),
        ("ISO_IR 127", b"\xe2\xc8\xc7", "قبا"),
        ("ISO_IR 138", b"\xf9\xf8\xe5\xef", "שרון"),
        ("ISO_IR 144", b"\xbb\xee\xda", "Люк"),
        ("ISO_IR 148", b"\xdeahin", "Şahin"),
        ("ISO_IR 166", b"\xca\xc1\xaa\xd2\xc2", "สมชาย"),
        ("ISO_IR 203", b"\xa4", "€"),
        ("ISO_IR 13", b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3", "ﾔﾏﾀﾞ^ﾀﾛｳ"),
        ("ISO_IR 192", "王^小東".encode(), "王^小東"),
        ("GB18030", b"\xcd\xf5^\xd0\xa1\xb6\xab", "王^小东"),
        ("GBK", b"\xd5\xc5^\xc8\xfd\xb7\xe1", "张^三丰"),
        # PS3.5 H.3.1, H.3.2 and I.2.
        (
            "\\ISO 2022 IR 87",
            b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B",
            YAMADA,
        ),
        (
            "ISO 2022 IR 13\\ISO 2022 IR 87",
            b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J",
            "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎",
        ),
        (
            "\\ISO 2022 IR 149",
            b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf",
            HONG,
        ),
        ("\\ISO 2022 IR 58", b"Zhang=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1", "Zhang=张^小"),
        ("\\ISO 2022 IR 159", b"\x1b$(D0!\x1b(B", "丂"),
        # Characters whose bytes are a caret, an equals sign, a backslash.
        ("\\ISO 2022 IR 87", b"\x1b$B%^=U@\\\x1b(B^A", "マ春接^A"),
        # Greek, then Cyrillic, then what was there at first again.
        ("ISO 2022 IR 126\\ISO 2022 IR 144", b"\xc4\x1b-L\xbb^\xc4", "ΔЛ^Δ"),
        ("ISO 2022 IR 6\\ISO 2022 IR 100", b"\x1b-A\xe9", "é"),
    ],
)
def test_a_text_is_read_as_it_is_declared(declared, raw, text):
    assert decoded(raw, declared) == Text(text, guessed=False)


@pytest.mark.parametrize(
    ("declared", "raw", "text"),
    [
        ("", b"M\xfcller", "Müller"),
        ("", "Müller".encode(), "Müller"),
        ("ISO_IR 6", b"M\xfcller", "Müller"),
        ("ISO_IR 192", b"M\xfcller", "Müller"),
        ("ISO_IR 100", "Müller".encode(), "Müller"),
        ("NONE", b"M\xfcller", "Müller"),
        # Windows writes Shift-JIS, Korean and Chinese without escape sequences, and declares what
        # is nearest.
        ("\\ISO 2022 IR 87", b"\x8eR\x93c", "山田"),
        ("ISO_IR 13", b"\x8eR\x93c^\x91\xbe\x98Y", "山田^太郎"),
        ("ISO-IR 13", b"\xd4\xcf=\x8eR", "ﾔﾏ=山"),
        ("ISO 2022 IR 13\\ISO 2022 IR 87", b"\xd4\xcf=\x8eR", "ﾔﾏ=山"),
        ("ISO_IR 13", "山田".encode(), "山田"),
        ("ISO_IR 100", b"\x8eR\x93c^\x91\xbe\x98Y", "山田^太郎"),
        ("", b"Yamada^Tarou=\x8eR\x93c^\x91\xbe\x98Y", "Yamada^Tarou=山田^太郎"),
        ("ISO_IR 144", b"\x8eR\x93c", "山田"),
        # Of Latin-1 as Windows has it.
        ("ISO_IR 100", b"O\x92Brien", "O\u2019Brien"),
        ("ISO_IR 100", b"\x93Sch\xe4del\x94 \x96 nativ", "“Schädel” – nativ"),
        ("", b"5 \x80", "5 €"),
        ("ISO_IR 101", b"Vr\x9aka", "Vrška"),
        ("ISO_IR 144", b"\x8a\xe5\xf0", "Љер"),
        ("ISO_IR 100", b"\x81\xff", "\x81ÿ"),
        ("\\ISO 2022 IR 149", b"\x8c\xbb^\xb1\xe6", "뙸^길"),
        ("\\ISO 2022 IR 58", b"\xd5\xc5^\x81\x40", "张^丂"),
        ("", b"\x1b$B;3ED\x1b(B", "山田"),
        ("\\ISO 2022 IR 149", b"\x1b$B;3ED\x1b(B", "山田"),
        ("ISO_IR 13", b"\xff", "ÿ"),
        ("\\ISO 2022 IR 149", b"\x1b$)C\xb1", "\x1b$)C±"),
        ("ISO_IR 166", b"\xff", "ÿ"),
        ("GB18030", b"\xff\xff", "ÿÿ"),
    ],
)
def test_what_is_not_as_it_is_declared_is_a_guess_and_says_so(declared, raw, text):
    assert decoded(raw, declared) == Text(text, guessed=True)


CYRILLIC = "Люк^Иван"


@pytest.mark.parametrize(
    "declared",
    [
        "ISO-IR 144",
        "ISO IR 144",
        "ISO_IR144",
        "ISO_IR_144",
        "iso_ir 144",
        "ISO_IR  144",
        "ISO_IR-144",
        "IR 144",
        "ISO2022 IR 144",
        "ISO-2022-IR-144",
        "ISO 2022_IR 144",
        "ISO 2022-IR 6\\ISO 2022-IR 144",
        "ISO-8859-5",
        "ISO 8859-5",
        "ISO_8859-5:1988",
        "iso8859_5",
    ],
)
def test_a_misspelt_declaration_is_read_as_what_it_means(declared):
    raw = CYRILLIC.encode("iso8859_5")
    if "\\" in declared:
        raw = b"^".join(b"\x1b-L" + part for part in raw.split(b"^"))
    assert decoded(raw, declared) == Text(CYRILLIC, guessed=False)


@pytest.mark.parametrize(
    ("declared", "raw", "text"),
    [
        ("ISO_IR_100", b"M\xfcller", "Müller"),
        ("Latin1", b"M\xfcller", "Müller"),
        ("UTF-8", "山田".encode(), "山田"),
        ("utf8", "山田".encode(), "山田"),
        ("ISO 2022 IR 192", "山田".encode(), "山田"),
        ("ISO-IR 192", "山田".encode(), "山田"),
        ("GB 18030", "王^小东".encode("gb18030"), "王^小东"),
        ("gbk", "王^小东".encode("gbk"), "王^小东"),
        ("Windows-1251", CYRILLIC.encode("cp1251"), CYRILLIC),
        ("cp1251", CYRILLIC.encode("cp1251"), CYRILLIC),
        ("Shift_JIS", "山田".encode("cp932"), "山田"),
        ("ISO 2022-IR 13\\ISO 2022-IR 87", b"\xd4\xcf=\x1b$B;3ED\x1b(J", "ﾔﾏ=山田"),
        ("ISO-2022-IR-6\\ISO-2022-IR-149", b"Hong=\x1b$)C\xc8\xab", "Hong=홍"),
    ],
)
def test_misspelt_sets_of_other_kinds_are_read_as_well(declared, raw, text):
    assert decoded(raw, declared) == Text(text, guessed=False)


@given(
    st.binary(max_size=12)
    | st.lists(
        st.sampled_from([b"\x1b$B", b"\x1b(B", b"\x1b$)C", b"\x1b", b"^", b"\\", b"%^", b"\xb1"])
    ).map(b"".join),
    st.sampled_from([*USUAL, "", "\\", "\\\\", "ISO 2022 IR 13\\ISO 2022 IR 87", "NONE", "\0"]),
)
def test_no_bytes_break_the_reading(raw, declared):
    text, guessed = decoded(raw, declared)
    assert isinstance(text, str)
    if guessed and b"\x1b" not in raw:
        # Nothing was dropped or replaced: the guess can be taken back.
        windows = (f"cp{number}" for number in (874, *range(1250, 1258)))
        sets = ("utf-8", "latin-1", "cp932", "cp949", "gb18030", *windows)
        encodings = [text.encode(name, "replace") for name in sets]
        assert raw in encodings or any(
            len(again) == len(raw) and again.decode(name, "replace") == text
            for name, again in zip(sets, encodings, strict=True)
        )


def test_an_answer_keeps_the_bytes_of_what_is_beyond_ascii_and_tells_its_guesses():
    answer = study_of(
        raw_answer(
            SpecificCharacterSet=b"ISO_IR 192",
            PatientID=b"P1",
            PatientName="Müller^Jörg".encode(),
            StudyDescription=b"Sch\xe4del",
        )
    )
    assert answer.patient_name == "Müller^Jörg" and answer.study_description == "Schädel"
    assert answer.guessed == ("StudyDescription",)
    originals = {keyword: bytes.fromhex(octets) for keyword, octets in answer.original}
    assert originals.keys() == {"PatientName", "StudyDescription"}
    assert originals["StudyDescription"].rstrip() == b"Sch\xe4del"


# --- asking -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sets"),
    [
        ("000123", [""]),
        ("Ünal", ["ISO_IR 100", "ISO_IR 192"]),
        ("Dvořák", ["ISO_IR 192", "ISO_IR 101"]),
        (
            "山田",
            [
                *("ISO_IR 192", "\\ISO 2022 IR 87", "ISO_IR 13", "\\ISO 2022 IR 149", "GB18030"),
                "\\ISO 2022 IR 58",
            ],
        ),
        ("김", ["ISO_IR 192", "\\ISO 2022 IR 149"]),
        ("小东", ["ISO_IR 192", "GB18030", "\\ISO 2022 IR 58"]),
        ("สมชาย", ["ISO_IR 192", "ISO_IR 166"]),
        # The second byte of 深 would be a question mark.
        (
            "深",
            ["ISO_IR 192", "ISO_IR 13", "\\ISO 2022 IR 149", "GB18030", "\\ISO 2022 IR 58"],
        ),
    ],
)
def test_a_text_is_asked_for_in_the_usual_sets_that_have_its_characters(text, sets):
    assert list(character_sets_for([text])) == sets


def test_what_a_peer_has_understood_is_tried_first():
    assert next(character_sets_for(["山"], "GB18030")) == "GB18030"
    assert next(character_sets_for(["Ü"], "\\ISO 2022 IR 149")) == "ISO_IR 100"
    assert next(character_sets_for(["Ü"], "SOMETHING")) == "ISO_IR 100"


TEXTS = st.text(
    st.characters(min_codepoint=32, max_codepoint=0xD7A3, exclude_categories=("Cs",)), max_size=8
)


@given(TEXTS)
def test_what_is_asked_in_a_set_reads_as_the_same_text(text):
    if set(text) & set("*?\\") or text.isascii():
        return
    if any("\x80" <= character <= "\x9f" for character in text):
        # Control characters, which no text has.
        return
    for declared in character_sets_for([text]):
        raw = encoded(text, declared)
        # Nothing in it is a wildcard to whoever compares byte by byte.
        assert not set(raw) & set(b"*?\\")
        read = decoded(raw, declared)
        if declared == "ISO_IR 13" and read == Text(text, guessed=True):
            # Kanji, which the set does not have, are written so all the same.
            continue
        if declared == "ISO_IR 100" and read.guessed and not re.search("[A-Za-z]", text):
            # Without a letter of ASCII it may be in another script.
            continue
        # Latin-1 that is UTF-8 as well, like "Ã¼", is taken for that, and the reading says so.
        assert read == Text(text) or (read.guessed and raw.decode("utf-8") == read.text)


def test_no_question_mark_leaves_for_a_character_that_a_set_lacks():
    for identifier in (
        query_identifier({"PatientID": "山田ü"}, [], "ISO_IR 100"),
        retrieve_identifier(
            InformationModel.PATIENT_ROOT, "STUDY", "山田ü", ["1.2"], characters="ISO_IR 100"
        ),
    ):
        assert "山田ü".encode() in encode(identifier, True, True)
        assert identifier.SpecificCharacterSet == "ISO_IR 192"
    with pytest.raises(ValueError, match="no character set"):
        query_identifier({"PatientID": "\udcff"}, [])


# --- the scripted PACS ------------------------------------------------------------------------


def _node(pacs: ScriptedPacs, **changes) -> PacsNode:
    settings = {"host": "127.0.0.1", "port": pacs.port, "called_ae_title": pacs.ae_title}
    return PacsNode(**{**settings, **changes})


def _held(patient: str):
    return study(7, SpecificCharacterSet="ISO_IR 192", PatientID=patient)


@pytest.mark.parametrize(
    ("patient", "sets", "queries"),
    [
        ("Ü-1", ["ISO_IR 100"], 1),
        ("Ü-1", ["ISO_IR 192"], 2),
        ("山-1", ["\\ISO 2022 IR 87"], 2),
        ("山-1", ["ISO_IR 13"], 3),
        ("山-1", ["GB18030"], 5),
    ],
)
def test_a_pacs_is_asked_in_one_set_after_the_other_and_then_in_the_one_it_knows(
    patient, sets, queries
):
    with ScriptedPacs(script=[Behaviour("find.query_charset", sets=sets)]) as pacs:
        for stored in _held(patient):
            pacs.holdings.add(stored)
        with Requestor(_node(pacs)) as requestor:
            for asked in (queries, 1):
                before = len(pacs.requests("C-FIND"))
                # Nothing is remembered but by the association.
                found = discover(requestor, CohortRow(2, patient), StudyQueryCapabilities())
                assert [study.patient_id for study in found.studies] == [patient]
                assert len(pacs.requests("C-FIND")) - before == asked
            assert requestor.characters == sets[0]


def test_in_the_patient_root_a_list_is_asked_for_in_the_set_that_found_the_study():
    script = [Behaviour("find.query_charset", sets=["ISO_IR 192"])]
    with ScriptedPacs(script=script) as pacs:
        for stored in _held("Ü-1"):
            pacs.holdings.add(stored)
        node = _node(pacs, information_model=InformationModel.PATIENT_ROOT)
        with Requestor(node) as requestor:
            [found] = find_studies(requestor, {"PatientID": "Ü-1"})
            assert list_instances(requestor, found.study_instance_uid, "Ü-1").instances


def test_a_set_that_a_pacs_refuses_does_not_keep_it_from_the_next():
    script = [Behaviour("find.unsupported_key", keys=["PatientID"], status=0xC000, times=1)]
    with ScriptedPacs(script=script) as pacs:
        for stored in _held("Ü-1"):
            pacs.holdings.add(stored)
        with Requestor(_node(pacs)) as requestor:
            assert len(find_studies(requestor, {"PatientID": "Ü-1"})) == 1
            pacs.script[:] = [Behaviour("find.unsupported_key", keys=["PatientID"], status=0xC000)]
            with pytest.raises(PacsError) as error:
                find_studies(requestor, {"PatientID": "Ü-1"})
    assert error.value.code == "request-refused"


# --- real archives ----------------------------------------------------------------------------

_PATIENTS = {
    "ISO_IR 100": "MÜLLER-1",
    "ISO_IR 192": "ÇELİK-王-2",
    "ISO_IR 144": "ЖУК-3",
    "\\ISO 2022 IR 87": "山田-4",
    "\\ISO 2022 IR 149": "홍길동-5",
    "GB18030": "张三丰-6",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One object of a patient in each character set, PatientID and name in it."""
    folder = tmp_path_factory.mktemp("characters")
    paths = generate_cohort(folder, studies=3 * len(_PATIENTS), instances_per_series=1, seed=3)
    firsts = {}
    for path in paths:
        dataset = dcmread(path)
        if not dataset.file_meta.TransferSyntaxUID.is_compressed and len(firsts) < len(_PATIENTS):
            firsts.setdefault(dataset.StudyInstanceUID, path)
    for path, (declared, patient) in zip(firsts.values(), _PATIENTS.items(), strict=True):
        dataset = dcmread(path)
        dataset.SpecificCharacterSet = declared.split("\\")
        for keyword, vr in (("PatientID", "LO"), ("PatientName", "PN")):
            raw = encoded(patient, declared)
            raw += b" " * (len(raw) % 2)
            dataset[keyword] = DataElement(keyword, vr, raw, validation_mode=config.IGNORE)
        dataset.save_as(path)
    return list(firsts.values())


@pytest.mark.parametrize("kind", [peers.Orthanc, peers.Dcmqrscp])
def test_real_archives_are_asked_for_patients_in_every_character_set(new_archive, files, kind):
    archive = new_archive(kind)
    archive.load(files)
    patients = list(_PATIENTS.values())
    random.Random(1).shuffle(patients)
    with Requestor(archive.node()) as requestor:
        capabilities = StudyQueryCapabilities()
        found = {
            patient: discover(requestor, CohortRow(2, patient), capabilities)
            for patient in patients
        }
    reported = {
        patient: [study.patient_id for study in one.studies] for patient, one in found.items()
    }
    if kind is peers.Dcmqrscp:
        assert reported == {patient: [patient] for patient in patients}
        return
    # Orthanc answers in Latin-1 and drops the other letters: such a patient cannot be checked,
    # and is nothing to be sure of.
    assert reported == {patient: [patient] * (patient == "MÜLLER-1") for patient in patients}
    reasons = {one.reason for patient, one in found.items() if patient != "MÜLLER-1"}
    assert reasons <= {"key-ignored", "known-otherwise", "no-match"}


@pytest.mark.parametrize("declared", ["ISO_IR 100", ""])
@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("cp1251", "Люк^Иван"),
        ("cp1251", "ИВАНОВ^ПЁТР"),
        ("iso8859_5", "Сидорова^Анна"),
        ("koi8_r", "Иванов^Сергей"),
        ("iso8859_7", "Παπαδοπουλος^Γιωργος"),
        ("gb2312", "王^小明"),
        ("gb2312", "张三"),
    ],
)
def test_another_script_under_the_name_of_latin_1_is_read_as_what_it_is(declared, encoding, name):
    assert decoded(name.encode(encoding), declared) == Text(name, guessed=True)


@pytest.mark.parametrize(
    "name", ["Müller^Jörg", "Ñandú^Éa", "ÉLÈVE", "Þór^Æsa", "ÆØÅ^Ole", "ÅÄÖ", "Ö^Ä", "Øÿ"]
)
def test_what_is_latin_1_stays_so(name):
    assert decoded(name.encode("latin-1"), "ISO_IR 100") == Text(name)
