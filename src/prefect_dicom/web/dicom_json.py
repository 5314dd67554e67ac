"""Answers of a search in the DICOM JSON Model, PS3.18 Annex F, as data sets.

Values stay bytes, as in an answer to a C-FIND: what they mean is read, doubted and compared by the
same code. Nothing is known of a text but that it should be UTF-8; bytes that are not are kept.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from prefect_dicom.core.errors import PacsError

_TAG = re.compile(r"[0-9A-Fa-f]{8}")
_UTF_8 = b"ISO_IR 192"
_CHARACTER_SET = 0x00080005
_MOST_VALUES = 1000


def decode_answers(body: bytes) -> list[Dataset]:
    """The answers of one page.

    Raises
    ------
    PacsError
        ``answer-unusable`` where it is not JSON, or not a list of data sets.
    """
    try:
        found = json.loads(body.decode("utf-8-sig", "surrogateescape"))
    except (ValueError, RecursionError):
        raise PacsError("answer-unusable", "the answer is not JSON") from None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise PacsError("answer-unusable", "the answer is no list of data sets")
    return [_data_set(one) for one in found]


def _data_set(found: dict[str, Any]) -> Dataset:
    answer = Dataset()
    _put(answer, _CHARACTER_SET, "CS", _UTF_8)
    for name, element in found.items():
        if not _TAG.fullmatch(name) or not isinstance(element, dict):
            continue
        tag, vr, values = int(name, 16), str(element.get("vr", "UN")), element.get("Value")
        if vr == "SQ" or tag == _CHARACTER_SET:
            continue
        # An element without a value is there, and empty.
        some = values[:_MOST_VALUES] if isinstance(values, list) else []
        _put(answer, tag, vr[:2], _bytes("\\".join(map(_text, some))))
    return answer


def _put(answer: Dataset, tag: int, vr: str, value: bytes) -> None:
    answer[Tag(tag)] = RawDataElement(Tag(tag), vr, len(value), value, 0, False, True, True)


def _text(value: object) -> str:
    if isinstance(value, dict):
        # A person's name: its component groups, PS3.5 6.2.1.2.
        groups = [value.get(name) for name in ("Alphabetic", "Ideographic", "Phonetic")]
        return "=".join(str(group or "") for group in groups).rstrip("=")
    if value is None or isinstance(value, (list, bool)):
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # Half of a pair of surrogates, written as an escape: no text at all.
        return text.encode("utf-8", "replace")
