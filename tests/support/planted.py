"""Objects with planted identifiers: a marker, a UID or a date in every element that can hold one.

Encoded here, byte by byte, so that the reader under test shares no code with its input.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from pydicom.datadict import get_entry, keyword_dict

from prefect_dicom.deidentify import retained
from tests.support.part10_objects import BIG_ENDIAN, CT_IMAGE, EXPLICIT, IMPLICIT

MARKER = b"Zqx^Marker"
PLANTED_UID = b"1.2.826.0.1.3680043.9.999."
PLANTED_DATE = b"19770513"
NAME, PATIENT_ID = b"Quatermain^Allan", b"ZQX-PATIENT-7781"

SYNTAXES = (EXPLICIT, IMPLICIT, BIG_ENDIAN)
_LONG = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR"}) | {
    b"UT",
    b"UV",
}
_TEXT = frozenset({b"LO", b"LT", b"PN", b"SH", b"ST", b"UC", b"UT", b"AE", b"AS", b"UR"})
_SKIPPED = {0x7FE00008, 0x7FE00009, 0x7FE00010, 0x00080005}
_KEPT = {
    keyword_dict[each]
    for each in retained.TEXTS | retained.BULK | retained.STRUCTURAL_UIDS
    if each in keyword_dict
}

KNOWN_TAGS = sorted(
    tag
    for tag in keyword_dict.values()
    if tag >> 16 not in (0x0000, 0x0002, 0x0004, 0xFFFE) and tag not in _SKIPPED
)
"""Attributes of the dictionary in which something may be planted."""
OTHER_TAGS = (
    *((0x00091001 + n, b"LO") for n in range(3)),
    *((group << 16 | 0x3001, b"ST") for group in (0x0006, 0x0030, 0x6124, 0x7000, 0x0082)),
    (0x60000022, b"LO"),
    (0x60003000, b"OB"),
    (0x50003000, b"OB"),
    (0x00291010, b"UN"),
    (0x00100011, b"SQ"),
    (0x00100012, b"LT"),
)
"""Attributes beside the dictionary: private, retired, of unknown groups and of newer editions."""


@dataclass(frozen=True, slots=True)
class Plant:
    """One element: its tag and VR, and for a sequence the elements of its item."""

    tag: int
    vr: bytes
    inner: tuple[Plant, ...] = ()


def plant(tag: int, inner: Sequence[Plant] = ()) -> Plant:
    """An element of the dictionary."""
    vr = get_entry(tag)[0].split(" or ")[0].encode()
    return Plant(tag, vr if vr != b"NONE" else b"UN", tuple(inner))


def planted_file(
    plants: Sequence[Plant], syntax: str = EXPLICIT, *, undefined: bool = True
) -> bytes:
    """A CT in a Part 10 file, with an identifying preamble and file meta, and what is planted."""
    encoder = _Encoder(syntax, undefined)
    fixed = {
        0x00080008: (b"CS", b"ORIGINAL\\PRIMARY\\AXIAL"),
        0x00080016: (b"UI", CT_IMAGE.encode()),
        0x00080018: (b"UI", PLANTED_UID + b"3"),
        0x00080060: (b"CS", b"CT"),
        0x00100010: (b"PN", NAME),
        0x00100020: (b"LO", PATIENT_ID),
        0x0020000D: (b"UI", PLANTED_UID + b"1"),
        0x0020000E: (b"UI", PLANTED_UID + b"2"),
        0x00280004: (b"CS", b"MONOCHROME2"),
        0x7FE00010: (b"OW", bytes(range(256))),
    }
    elements = {tag: encoder.element(tag, vr, value) for tag, (vr, value) in fixed.items()}
    for each in plants:
        elements.setdefault(each.tag, encoder.planted(each))
    return _file_meta(syntax) + b"".join(elements[tag] for tag in sorted(elements))


def _file_meta(syntax: str) -> bytes:
    meta = _Encoder(EXPLICIT, undefined=True)
    elements = b"".join(
        meta.element(tag, vr, value)
        for tag, vr, value in (
            (0x00020002, b"UI", CT_IMAGE.encode()),
            (0x00020003, b"UI", PLANTED_UID + b"3"),
            (0x00020010, b"UI", syntax.encode()),
            (0x00020016, b"AE", MARKER),
            (0x00020102, b"OB", MARKER),
        )
    )
    length = meta.element(0x00020000, b"UL", struct.pack("<L", len(elements)))
    return (MARKER * 13)[:128] + b"DICM" + length + elements


class _Encoder:
    def __init__(self, syntax: str, undefined: bool) -> None:
        self._sign = ">" if syntax == BIG_ENDIAN else "<"
        self._implicit = syntax == IMPLICIT
        self._undefined = undefined

    def element(self, tag: int, vr: bytes, value: bytes, *, undefined: bool = False) -> bytes:
        if len(value) % 2:
            value += b"\0" if vr in (b"UI", b"OB", b"UN") else b" "
        length = 0xFFFFFFFF if undefined else len(value)
        head = struct.pack(self._sign + "HH", tag >> 16, tag & 0xFFFF)
        if self._implicit:
            return head + struct.pack(self._sign + "L", length) + value
        if vr in _LONG:
            return head + vr + b"\0\0" + struct.pack(self._sign + "L", length) + value
        return head + vr + struct.pack(self._sign + "H", length) + value

    def planted(self, each: Plant) -> bytes:
        if each.vr != b"SQ":
            return self.element(each.tag, each.vr, _value(each))
        inner = {one.tag: self.planted(one) for one in each.inner}
        content = b"".join(inner[tag] for tag in sorted(inner))
        group, sign = 0xFFFE, self._sign
        if self._undefined:
            item = struct.pack(sign + "HHL", group, 0xE000, 0xFFFFFFFF) + content
            item += struct.pack(sign + "HHL", group, 0xE00D, 0)
            item += struct.pack(sign + "HHL", group, 0xE0DD, 0)
            return self.element(each.tag, b"SQ", item, undefined=True)
        item = struct.pack(sign + "HHL", group, 0xE000, len(content)) + content
        return self.element(each.tag, b"SQ", item)


def _value(each: Plant) -> bytes:
    """What is planted: a marker, unless the attribute is one that must be kept."""
    vr, number = each.vr, each.tag & 0xFFFF
    if each.tag in _KEPT:
        return CT_IMAGE.encode() if vr == b"UI" else b"A" if vr in _TEXT else bytes(8)
    if vr == b"UI":
        return PLANTED_UID + str(number).encode()
    if vr in (b"DA", b"DT"):
        return PLANTED_DATE + (b"101112" if vr == b"DT" else b"")
    if vr == b"TM":
        return b"101112"
    if vr in _TEXT or vr in (b"CS", b"DS", b"IS", b"OB", b"OW", b"UN"):
        return MARKER
    return bytes(8)


def identifiers_in(data: bytes) -> list[bytes]:
    """The planted identifiers that are still there."""
    planted = (MARKER, PLANTED_UID, PLANTED_DATE, NAME, PATIENT_ID, b"Quatermain")
    return [each for each in planted if each in data]
