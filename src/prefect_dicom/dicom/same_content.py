"""Comparison of two copies of one instance that were sent with different bytes.

Some PACS write a moment into what they send: when a value was coerced, when the object was made
from what they keep. Two such copies differ in dates and times, and in nothing else.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.filereader import dcmread
from pydicom.tag import BaseTag

_TIMES = frozenset({"DA", "DT", "TM"})
_PATIENT_GROUP = 0x0010
_LONGEST_HEADER_BYTES = 16 * 1024**2
_BLOCK_BYTES = 1024**2


def differ_in_times_only(first: Path, second: Path) -> bool:
    """Whether two Part 10 files differ in dates and times of the instance, and in nothing else.

    Those of the patient count as content. Pixel data and what follows it is compared byte by byte.

    Parameters
    ----------
    first, second : Path
        The files; where one cannot be read as DICOM, they are taken to differ in more.

    Raises
    ------
    OSError
        A file cannot be read.
    """
    with first.open("rb") as one, second.open("rb") as other:
        try:
            headers = _header(one), _header(other)
            alike = _are_alike(*headers)
        except OSError:
            raise
        except Exception:
            # pydicom raises in many ways about bytes; all mean that nothing is known.
            return False
        return alike and _rest_is_the_same(one, other)


def _header(file: BinaryIO) -> Dataset:
    """The elements before the pixel data; the file is left where they end."""
    dataset = dcmread(file, stop_before_pixels=True)
    if file.tell() > _LONGEST_HEADER_BYTES:
        raise ValueError("a header of many megabytes")
    return dataset


def _are_alike(one: Dataset, other: Dataset) -> bool:
    return all(_is_alike(one, other, tag) for tag in {*one.keys(), *other.keys()})


def _is_alike(one: Dataset, other: Dataset, tag: BaseTag) -> bool:
    here, there = one.get_item(tag), other.get_item(tag)
    known = here or there
    vr = (known.VR if known is not None else None) or dictionary_VR(tag)
    if vr in _TIMES and tag.group != _PATIENT_GROUP:
        return True
    if here is None or there is None or here.VR != there.VR:
        return False
    if vr == "SQ":
        items, others = one[tag].value, other[tag].value
        return len(items) == len(others) and all(map(_are_alike, items, others))
    return bool(here.value == there.value)


def _rest_is_the_same(one: BinaryIO, other: BinaryIO) -> bool:
    while True:
        block = one.read(_BLOCK_BYTES)
        if block != other.read(_BLOCK_BYTES):
            return False
        if not block:
            return True
