"""Private elements that are known to be safe (PS3.15 E.3.10)."""

from __future__ import annotations

from collections.abc import Mapping

from prefect_dicom.deidentify.elements import Element, PartTen
from prefect_dicom.deidentify.table import safe_private
from prefect_dicom.deidentify.values import is_legal, is_of_vr

CREATOR = "creator"


def kept_private(elements: list[Element], file: PartTen) -> Mapping[int, str]:
    """Tags of a data set's private elements that are safe, with their VR, and their creators.

    An element passes if its creator and number are on the list, its VR is the one listed (or UN),
    and its value is legal for it. Sequences and bytes, which may hold anything, do not pass.
    """
    creators = {
        e.tag: file.value(e).decode("latin-1").strip(" \0")
        for e in elements
        if e.tag >> 16 & 1 and 0x10 <= e.tag & 0xFFFF <= 0xFF
    }
    kept: dict[int, str] = {}
    for element in elements:
        group, number = element.tag >> 16, element.tag & 0xFFFF
        if not group & 1 or number < 0x1000:
            continue
        creator_tag = group << 16 | number >> 8
        creator = creators.get(creator_tag)
        vr = safe_private().get((group, creator, number & 0xFF)) if creator else None
        if vr is None or vr in ("", "SQ", "OB", "OW", "OW/OB"):
            continue
        listed = vr.encode()
        if element.vr != b"UN" and not is_of_vr(element.vr, (listed,)):
            continue
        if is_legal(listed, file.value(element)):
            kept[element.tag] = vr
            kept[creator_tag] = CREATOR
    return kept
