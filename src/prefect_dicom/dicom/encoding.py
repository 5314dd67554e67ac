"""Encoding of data elements: VRs, byte orders, and the tags that a walk reads (PS3.5 chapter 7)."""

from __future__ import annotations

from struct import Struct
from typing import Literal

# PS3.5 7.1.2: these have a length of 16 bits; all others, future ones too, one of 32.
SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
UNDEFINED = 0xFFFFFFFF
ITEM_GROUP, ITEM, ITEM_END, SEQUENCE_END = 0xFFFE, 0xE000, 0xE00D, 0xE0DD
# PS3.5 7.1 has no elements in these; groups 0 and 2 are the command set and the file meta.
BLANK_GROUP = 0x2020
"""Two blanks: padding, or a group of the print classes."""
SPECIAL_GROUPS = frozenset(
    {0x0000, 0x0001, 0x0002, 0x0003, 0x0005, 0x0007, BLANK_GROUP, ITEM_GROUP, 0xFFFF}
)

# How the elements of a nested data set are written; under UN writers differ.
EXPLICIT_MODE, IMPLICIT_MODE, UNSURE_MODE = 0, 1, 2
INSIDE_ITEM = 4

IDENTITY_TAGS = {
    0x00080005: "specific_character_set",
    0x00080016: "sop_class_uid",
    0x00080018: "sop_instance_uid",
    0x00080060: "modality",
    0x00100020: "patient_id",
    0x0020000D: "study_instance_uid",
    0x0020000E: "series_instance_uid",
}
SHAPE_TAGS = {
    0x00280002: "samples_per_pixel",
    0x00280004: "photometric_interpretation",
    0x00280008: "number_of_frames",
    0x00280010: "rows",
    0x00280011: "columns",
    0x00280100: "bits_allocated",
}
PIXEL_TAGS = {0x7FE00008, 0x7FE00009, 0x7FE00010}
PIXEL_DATA_PROVIDER_URL = 0x00287FE0
SPECTROSCOPY_DATA = 0x56000020
PRESENCE_TAGS = {PIXEL_DATA_PROVIDER_URL, SPECTROSCOPY_DATA}
WANTED = frozenset({*IDENTITY_TAGS, *SHAPE_TAGS, *PIXEL_TAGS, *PRESENCE_TAGS})
STUDY_INSTANCE_UID = 0x0020000D


class Encoding:
    """Byte order of a data set, and the lookups that a walk makes per element.

    A header is read as three integers: the tag (in this order's own arrangement, the keys of
    ``wanted``), the two letters of the VR, and the two bytes behind them.
    """

    def __init__(self, byte_order: Literal["little", "big"]) -> None:
        sign = "<" if byte_order == "little" else ">"
        self.byte_order = byte_order
        self.header = Struct(sign + "LHH").unpack_from
        self.implicit_header = Struct(sign + "LL").unpack_from
        self.item_header = Struct(sign + "HHHH").unpack_from
        self.long = Struct(sign + "L").unpack_from
        self.group_shift = 0 if byte_order == "little" else 16
        self.short_vrs = frozenset(self.integer(vr) for vr in SHORT_VRS)
        self.long_vrs = frozenset(self.integer(vr) for vr in LONG_VRS)
        self._unknown_vr = self.integer(b"UN")
        self.wanted = {self._arranged(tag): tag for tag in WANTED}
        self.study = {self._arranged(STUDY_INSTANCE_UID): STUDY_INSTANCE_UID}

    def integer(self, data: bytes) -> int:
        """Return bytes as an unsigned integer in this byte order."""
        return int.from_bytes(data, self.byte_order)

    def is_vr(self, vr: int) -> bool:
        """Whether these may be the letters of a VR, including one not yet defined."""
        letters = vr.to_bytes(2, self.byte_order)
        return letters.isalpha() and letters.isupper()

    def mode_under(self, vr: int) -> int:
        """Return how nested elements are written; under UN (PS3.5 6.2.2) writers differ."""
        return UNSURE_MODE if vr == self._unknown_vr else EXPLICIT_MODE

    def _arranged(self, tag: int) -> int:
        if self.byte_order == "big":
            return tag
        return (tag & 0xFFFF) << 16 | tag >> 16


LITTLE_ENDIAN, BIG_ENDIAN = Encoding("little"), Encoding("big")


def mode_in_item(level: int, vr: bytes) -> int:
    """Return how an item's elements are written, by the VR of its first one.

    PS3.5 6.2.2 has them implicit under UN; writers have done both, there and elsewhere.
    """
    if level == IMPLICIT_MODE:
        return IMPLICIT_MODE
    if vr in SHORT_VRS or vr in LONG_VRS:
        return EXPLICIT_MODE
    return EXPLICIT_MODE if level == EXPLICIT_MODE and vr.isalpha() else IMPLICIT_MODE
