"""The copying of one instance, element by element at every depth."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain

from pydicom._uid_dict import UID_dictionary

from prefect_dicom.core.model import StoreRequest
from prefect_dicom.core.uids import is_uid
from prefect_dicom.deidentify import retained
from prefect_dicom.deidentify.additions import WRITTEN_HERE, additions
from prefect_dicom.deidentify.copy import Copy, Piece, Treated, format_tag, keyword
from prefect_dicom.deidentify.elements import (
    DEFLATED,
    EXPLICIT_LITTLE,
    ITEM,
    ITEM_END,
    SEQUENCE_END,
    Element,
    Encoding,
    PartTen,
    Unreadable,
    dictionary_vrs,
    effective_vr,
)
from prefect_dicom.deidentify.identifiers import own_identifiers
from prefect_dicom.deidentify.keys import ProjectKey
from prefect_dicom.deidentify.options import BASIC, Action, Dates, Options, Retain, Rule
from prefect_dicom.deidentify.private import kept_private
from prefect_dicom.deidentify.table import row_of
from prefect_dicom.deidentify.values import (
    BULK_VRS,
    DATE_VRS,
    TEXT_VRS,
    capped_age,
    dummy,
    is_legal,
    is_of_vr,
    padded,
    shifted_dates,
)
from prefect_dicom.dicom.encoding import UNDEFINED
from prefect_dicom.dicom.part10 import file_meta

_PATIENT_NAME, _PATIENT_ID, _PATIENT_AGE = 0x00100010, 0x00100020, 0x00101010
_ISSUER_OF_PATIENT_ID = 0x00100021
_ACCESSION_NUMBER, _STUDY_ID = 0x00080050, 0x00200010
_SOP_CLASS, _SOP_INSTANCE = 0x00080016, 0x00080018
_STUDY, _SERIES = 0x0020000D, 0x0020000E
_PSEUDONYMS = frozenset({_PATIENT_NAME, _PATIENT_ID, _ACCESSION_NUMBER, _STUDY_ID})
_CHARACTER_SET = 0x00080005

_REMOVED_BEYOND_TABLE = {
    0x00080300: "describes private elements",
    0x04000500: "encrypted originals",
    0x4FFE0001: "of signatures, which are removed",
}
# What is not an attribute of a data set, or describes its former encoding (PS3.15 E.1.1: group 4).
_REMOVED_GROUPS = frozenset({0x0000, 0x0002, 0x0004})

_CODE_SEQUENCES = frozenset({0x00080082, 0x00401101})
_REFERENCES = frozenset({0x00081110, 0x00081111})
"""Sequences of references: their items stay with other UIDs, for not all IODs allow them empty."""
_NOT_CHECKED_FOR_NAMES = frozenset(
    {0x00080070, 0x00081090, 0x00080100, 0x00080102, 0x00080103, 0x00181020}
)
_DUMMY_CODE = (
    (0x00080100, b"SH", b"REMOVED "),
    (0x00080102, b"SH", b"99REMOVED "),
    (0x00080104, b"LO", b"Removed "),
)
LONGEST_ID = 12

_Treated = list[tuple[int, list[Piece]]]
_SAME: list[Piece] = []
"""Stands for an element that is copied as it lies."""


@dataclass(slots=True)
class _Subject:
    """Whose instance it is: what replacements of one instance have in common."""

    patient: bytes
    study: bytes
    pseudonym: bytes
    patient_id: bytes
    days: int
    names: re.Pattern[bytes] | None


def patient_bytes(patient_id: str, issuer: str, study_instance_uid: str) -> bytes:
    """What a patient's replacement values are made of; of the study alone without a PatientID."""
    if not patient_id:
        return b"study\0" + study_instance_uid.encode("latin-1")
    return b"patient\0" + issuer.encode("latin-1") + b"\0" + patient_id.encode("latin-1")


class Copying:
    """The copying of one instance."""

    def __init__(
        self,
        key: ProjectKey,
        options: Options,
        file: PartTen,
        pseudonym: str,
        explain: Callable[[Treated], None] | None,
    ) -> None:
        self._key = key
        self._options = options
        self._rules = options.rules()
        self._file = file
        self._view = memoryview(file.data)
        self._encoding = file.encoding
        self._explain = explain
        self._path = ""
        self._allowed = {
            _normal(value.encode("latin-1", "replace")): new.encode("ascii", "replace")
            for value, new in options.descriptors.items()
        }
        self._beyond_table: Counter[str] = Counter()
        self._texts = retained.tags_of(retained.TEXTS)
        self._bulk = retained.tags_of(retained.BULK)
        self._structural = retained.tags_of(retained.STRUCTURAL_UIDS)
        self._subject = self._subject_of(pseudonym)

    def _subject_of(self, pseudonym: str) -> _Subject:
        text = self._file.text
        patient_id, study = text(_PATIENT_ID), text(_STUDY)
        issuer = text(_ISSUER_OF_PATIENT_ID)
        patient = patient_bytes(patient_id, issuer, study)
        return _Subject(
            patient,
            study.encode("latin-1"),
            (pseudonym or self._key.code("patient", patient, LONGEST_ID)).encode("ascii"),
            patient_id.encode("latin-1"),
            self._key.days(patient),
            own_identifiers(self._file),
        )

    def run(self) -> Copy:
        """Treat all elements, and put a new file meta before them."""
        file = self._file
        identity = [file.text(tag) for tag in (_STUDY, _SERIES, _SOP_INSTANCE, _SOP_CLASS)]
        if not all(identity):
            raise Unreadable("it lacks one of its UIDs, or its SOP class")
        keep = Retain.UIDS in self._options.retain
        study, series, instance = (
            each if keep else self._key.uid(each.encode("latin-1")).decode()
            for each in identity[:3]
        )
        if not all(map(is_uid, (study, series, instance))):
            raise Unreadable("a UID of its own that is to be kept is none")
        treated, _ = self._data_set(file.elements, self._encoding)
        elements = sorted([*treated, *self._additions()], key=lambda each: each[0])
        syntax = file.transfer_syntax_uid
        # Deflate is not the same bytes in all versions of its library.
        syntax = EXPLICIT_LITTLE if syntax == DEFLATED else syntax
        meta = file_meta(StoreRequest(0, identity[3], instance, syntax))
        pieces = [meta, *chain.from_iterable(parts for _, parts in elements)]
        return Copy(
            pieces,
            study,
            series,
            instance,
            identity[3],
            syntax,
            self._subject.pseudonym.decode(),
            self._beyond_table,
        )

    # --- data sets

    def _data_set(self, elements: list[Element], encoding: Encoding) -> tuple[_Treated, bool]:
        """Treat the elements of a data set; whether any of them is not as it was."""
        kept: _Treated = []
        private: Mapping[int, str] | None = None
        changed = False
        for element in elements:
            if element.tag >> 16 & 1:
                if private is None:
                    private = self._private_of(elements)
                pieces = self._private(element, private, encoding)
            else:
                pieces = self._element(element, encoding)
            changed = changed or pieces is not _SAME
            if pieces is not None:
                kept.append((element.tag, [self._lying(element)] if pieces is _SAME else pieces))
        return kept, changed

    def _lying(self, element: Element) -> memoryview:
        return self._view[element.start : element.end]

    def _element(self, element: Element, encoding: Encoding) -> list[Piece] | None:
        """What stands in the copy for an element of an even group; None: nothing."""
        tag = element.tag
        group = tag >> 16
        if group in _REMOVED_GROUPS or not tag & 0xFFFF:
            return self._done(element, Action.REMOVE, "of no data set, or a group length")
        if group & 0xFF00 in (0x5000, 0x6000):
            return self._done(element, Action.REMOVE, row_of(tag) or "curves and overlays")
        if tag in WRITTEN_HERE:
            return self._done(element, Action.REMOVE, "written anew")
        if tag in _REMOVED_BEYOND_TABLE:
            return self._beyond(element, Action.REMOVE, _REMOVED_BEYOND_TABLE[tag], encoding)
        rule = self._rules.get(tag)
        if rule is not None:
            return self._by_rule(element, rule, encoding)
        return self._without_row(element, encoding)

    def _by_rule(self, element: Element, rule: Rule, encoding: Encoding) -> list[Piece] | None:
        action = rule.action
        if action is Action.REMOVE:
            return self._done(element, action, rule)
        if element.tag in _PSEUDONYMS:
            return self._pseudonym(element, rule, encoding)
        if element.items is not None:
            return self._ruled_sequence(element, rule, encoding)
        vr = effective_vr(element)
        if vr == b"SQ" and element.length:
            return self._done(element, Action.REMOVE, "a sequence that cannot be read")
        if not element.length or vr == b"SQ":
            return self._done(element, Action.KEEP, rule)
        if action is Action.UID:
            return self._uids(element, encoding, rule)
        if action in (Action.KEEP, Action.SHIFT, Action.ALLOW_LISTED):
            return self._retained(element, vr, rule, encoding)
        if action is Action.DUMMY and vr == b"UI":
            return self._uids(element, encoding, rule)
        return self._plainly(element, vr, action, rule, encoding)

    def _plainly(
        self, element: Element, vr: bytes, action: Action, why: object, encoding: Encoding
    ) -> list[Piece] | None:
        """Remove, empty or replace an element by a dummy."""
        if action is Action.REMOVE:
            return self._done(element, action, why)
        value = dummy(vr) if action is Action.DUMMY else b""
        return self._new(element, value, encoding, action, why)

    def _retained(
        self, element: Element, vr: bytes, rule: Rule, encoding: Encoding
    ) -> list[Piece] | None:
        """What an option keeps: as it lies, shifted, or from the list of allowed values."""
        value = self._file.value(element)
        if rule.action is Action.ALLOW_LISTED:
            allowed = self._allowed.get(_normal(value))
            if allowed is not None:
                return self._new(element, allowed, encoding, rule.action, rule)
        elif rule.action is Action.SHIFT and vr in (b"DA", b"DT"):
            shifted = shifted_dates(value, self._subject.days)
            if shifted is not None:
                return self._new(element, shifted, encoding, rule.action, rule)
        elif element.tag == _PATIENT_AGE:
            age = capped_age(value)
            if age is not None:
                return self._new(element, age, encoding, Action.KEEP, rule)
        elif _may_be_kept(element, vr, value):
            return self._done(element, Action.KEEP, rule)
        basic = BASIC[rule.row.basic]
        why = f"{rule.row}: basic profile, for the option cannot keep this value"
        self._beyond_table[keyword(element.tag)] += 1
        return self._plainly(element, vr, basic, why, encoding)

    def _ruled_sequence(
        self, element: Element, rule: Rule, encoding: Encoding
    ) -> list[Piece] | None:
        tag, action = element.tag, rule.action
        if action in (Action.KEEP, Action.SHIFT) or tag in _REFERENCES:
            return self._sequence(element, encoding, rule)
        if action is Action.ALLOW_LISTED:
            # Its codes carry their meaning in text: the Basic Profile's action stands.
            action = BASIC[rule.row.basic]
        if not element.items and action is not Action.REMOVE:
            return self._done(element, Action.KEEP, rule)
        if action is Action.REMOVE or (action is Action.DUMMY and rule.row.basic == "X/D"):
            return self._done(element, Action.REMOVE, rule)
        self._say(element, action, rule)
        inner = element.inner or encoding
        content = b""
        if action is Action.DUMMY and tag in _CODE_SEQUENCES:
            code = b"".join(inner.header(t, v, len(x)) + x for t, v, x in _DUMMY_CODE)
            content = inner.delimiter(ITEM, len(code)) + code
        return [encoding.header(tag, element.vr, len(content)), content]

    # --- what the table has no row for

    def _without_row(self, element: Element, encoding: Encoding) -> list[Piece] | None:
        tag = element.tag
        known = dictionary_vrs(tag)
        if not known:
            return self._beyond(element, Action.REMOVE, "unknown to the dictionary", encoding)
        if element.items is not None:
            return self._sequence(element, encoding, "no row; items are treated")
        vr = effective_vr(element)
        if not is_of_vr(vr, known) or vr == b"SQ" and element.length:
            return self._beyond(element, Action.REMOVE, "not of the dictionary's VR", encoding)
        if not element.length:
            return _SAME
        if vr == b"UI":
            return self._uid_without_row(element, encoding)
        if vr in DATE_VRS:
            return self._date_without_row(element, vr, encoding)
        if vr in TEXT_VRS:
            return self._text_without_row(element, encoding)
        if vr in BULK_VRS and tag not in self._bulk:
            return self._beyond(element, Action.REMOVE, "bytes that may hold anything", encoding)
        if tag == _CHARACTER_SET:
            return self._done(element, Action.KEEP, "no row; the character set of what is kept")
        if not is_legal(vr, self._short_value(element, vr)):
            return self._beyond(element, Action.EMPTY, "holds what its VR cannot", encoding)
        if vr == b"CS" and self._names_someone_whole(self._file.value(element)):
            return self._beyond(element, Action.EMPTY, "names the patient", encoding)
        return self._done(element, Action.KEEP, "no row; numbers, codes or bulk data")

    def _short_value(self, element: Element, vr: bytes) -> bytes:
        # Pixel data is not copied for a check that it has not.
        return self._file.value(element) if vr in (b"DS", b"IS", b"CS") else b""

    def _uid_without_row(self, element: Element, encoding: Encoding) -> list[Piece] | None:
        value = self._file.value(element).decode("latin-1")
        is_well_formed = all(is_uid(each.strip(" \0")) for each in value.split("\\"))
        if element.tag in self._structural and is_well_formed:
            return self._done(element, Action.KEEP, "no row; of a class, syntax or code")
        if Retain.UIDS in self._options.retain and is_well_formed:
            return self._done(element, Action.KEEP, "no row; UIDs are retained")
        return self._uids(element, encoding, "no row; all UIDs of instances are replaced")

    def _date_without_row(
        self, element: Element, vr: bytes, encoding: Encoding
    ) -> list[Piece] | None:
        value = self._file.value(element)
        dates = self._options.dates
        shifted = shifted_dates(value, self._subject.days) if vr != b"TM" else value
        if dates is Dates.REMOVE or shifted is None or not is_legal(vr, value):
            return self._beyond(element, Action.EMPTY, "a date without a row", encoding)
        if dates is Dates.FULL or vr == b"TM":
            return self._done(element, Action.KEEP, "no row; dates are retained")
        return self._new(element, shifted, encoding, Action.SHIFT, "no row; dates are modified")

    def _text_without_row(self, element: Element, encoding: Encoding) -> list[Piece] | None:
        if self._options.strict:
            return self._beyond(element, Action.DUMMY, "text without a row", encoding)
        if element.tag not in self._texts:
            return self._beyond(element, Action.DUMMY, "not among known-safe text", encoding)
        if element.tag not in _NOT_CHECKED_FOR_NAMES and self._names_someone(element):
            return self._beyond(element, Action.DUMMY, "names the patient or a person", encoding)
        return self._done(element, Action.KEEP, "no row; known-safe text")

    def _names_someone(self, element: Element) -> bool:
        names = self._subject.names
        return (
            names is not None
            and names.search(self._view[element.value_start : element.value_end]) is not None
        )

    def _names_someone_whole(self, value: bytes) -> bool:
        names = self._subject.names
        return names is not None and any(
            names.fullmatch(each.strip(b" \0")) for each in value.split(b"\\")
        )

    # --- private elements

    def _private_of(self, elements: list[Element]) -> Mapping[int, str]:
        if Retain.SAFE_PRIVATE not in self._options.retain:
            return {}
        return kept_private(elements, self._file)

    def _private(
        self, element: Element, safe: Mapping[int, str], encoding: Encoding
    ) -> list[Piece] | None:
        vr = safe.get(element.tag, "")
        row = row_of(element.tag)
        if not vr:
            return self._done(element, Action.REMOVE, row)
        why = f"{row}: safe private"
        if vr == "UI":
            return self._uids(element, encoding, why)
        if vr != "creator" and self._names_someone(element):
            return self._done(element, Action.REMOVE, f"{row}: it names the patient or a person")
        return self._done(element, Action.KEEP, why)

    # --- values

    def _uids(self, element: Element, encoding: Encoding, why: object) -> list[Piece] | None:
        values = self._file.value(element).split(b"\\")
        new = b"\\".join(self._uid(each.strip(b" \0")) for each in values)
        return self._new(element, padded(new, b"\0"), encoding, Action.UID, why)

    def _uid(self, value: bytes) -> bytes:
        if not value or value.decode("latin-1") in UID_dictionary:
            # PS3.6 Annex A: well-known frames of reference, coding schemes and instances.
            return value
        return self._key.uid(value)

    def _pseudonym(self, element: Element, rule: Rule, encoding: Encoding) -> list[Piece] | None:
        value = self._file.value(element).strip(b" \0")
        tag, subject = element.tag, self._subject
        if tag in (_PATIENT_ID, _PATIENT_NAME):
            if not self._path:
                # Written with the other additions, whether it was there or not.
                return self._done(element, Action.PSEUDONYM, rule)
            if tag == _PATIENT_NAME:
                return self._new(element, b"", encoding, Action.EMPTY, rule)
            if value and value == subject.patient_id:
                return self._new(element, subject.pseudonym, encoding, Action.PSEUDONYM, rule)
        elif tag == _STUDY_ID and not self._path:
            return self._done(element, Action.PSEUDONYM, rule)
        if not value:
            return _SAME
        purpose = "accession" if tag == _ACCESSION_NUMBER else "identifier"
        code = self._key.code(purpose, value, LONGEST_ID).encode()
        return self._new(element, code, encoding, Action.PSEUDONYM, rule)

    def _sequence(self, element: Element, encoding: Encoding, why: object) -> list[Piece] | None:
        """Treat the items of a sequence that stays."""
        inner = element.inner or encoding
        pieces: list[Piece] = []
        changed = False
        path, self._path = self._path, f"{self._path}{format_tag(element.tag)}"
        for number, item in enumerate(element.items or (), 1):
            self._path = f"{path}{format_tag(element.tag)}[{number}] > "
            kept, item_changed = self._data_set(item.elements, inner)
            changed = changed or item_changed
            content = [piece for _, each in kept for piece in each]
            if item.undefined:
                pieces += [inner.delimiter(ITEM, UNDEFINED), *content, inner.delimiter(ITEM_END)]
            else:
                length = sum(len(piece) for piece in content)
                pieces += [inner.delimiter(ITEM, length), *content]
        self._path = path
        self._say(element, Action.KEEP, why)
        if not changed:
            return _SAME
        if element.undefined:
            head = encoding.header(element.tag, element.vr, UNDEFINED)
            return [head, *pieces, inner.delimiter(SEQUENCE_END)]
        length = sum(len(piece) for piece in pieces)
        return [encoding.header(element.tag, element.vr, length), *pieces]

    def _additions(self) -> _Treated:
        subject = self._subject
        pseudonym = subject.pseudonym.decode()
        identity = {
            _PATIENT_NAME: (b"PN", pseudonym),
            _PATIENT_ID: (b"LO", pseudonym),
            _STUDY_ID: (b"SH", self._key.code("study", subject.study, LONGEST_ID)),
        }
        return additions(self._options, self._encoding, identity)

    # --- what was done

    def _new(
        self, element: Element, value: bytes, encoding: Encoding, action: Action, why: object
    ) -> list[Piece]:
        self._say(element, action, why)
        value = padded(value)
        return [encoding.header(element.tag, element.vr, len(value)), value]

    def _done(self, element: Element, action: Action, why: object) -> list[Piece] | None:
        self._say(element, action, why)
        return _SAME if action is Action.KEEP else None

    def _beyond(
        self, element: Element, action: Action, why: str, encoding: Encoding
    ) -> list[Piece] | None:
        self._beyond_table[keyword(element.tag)] += 1
        vr = effective_vr(element)
        return self._plainly(element, vr, action, f"no row; {why}", encoding)

    def _say(self, element: Element, action: Action, why: object) -> None:
        if self._explain is not None:
            path = f"{self._path}{format_tag(element.tag)} {keyword(element.tag)}".rstrip()
            self._explain(Treated(path, element.vr.decode("latin-1"), action.value, str(why)))


def _may_be_kept(element: Element, vr: bytes, value: bytes) -> bool:
    """Whether a value is what its VR promises, so that an option may keep it."""
    if vr in (b"DA", b"DT"):
        return shifted_dates(value, 0) is not None
    return element.vr in (vr, b"UN") and is_legal(vr, value)


def _normal(value: bytes) -> str:
    return value.decode("latin-1").strip(" \0").casefold()
