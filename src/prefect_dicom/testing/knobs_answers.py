"""Knobs for the bytes of what a C-FIND is answered with: character sets and odd values."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from prefect_dicom.testing.instances import tag_of
from prefect_dicom.testing.knobs_find import answers_of, put
from prefect_dicom.testing.plans import End, FindPlan, Knob, Stage

if TYPE_CHECKING:
    from prefect_dicom.testing.script import Behaviour


def _declare(plan: FindPlan, by: Behaviour, *, declared: str, encoding: str) -> bool:
    found = answers_of(plan, by)
    for number, answer in found.items():
        for element in list(answer):
            if element.VR in ("LO", "LT", "PN", "SH", "ST") and element.value:
                # Latin-1 is written byte by byte.
                put(answer, element.keyword, str(element.value).encode(encoding).decode("latin-1"))
        answer.SpecificCharacterSet = "ISO_IR 100"
        plan.rewritten[number] = partial(_redeclared, declared=declared.encode("latin-1"))
    return bool(found)


def _redeclared(data: bytes, declared: bytes) -> bytes:
    """Put another value into Specific Character Set, which comes first."""
    explicit = data[4:6] == b"CS"
    (length,) = struct.unpack_from("<H", data, 6) if explicit else struct.unpack_from("<I", data, 4)
    declared += b" " * (len(declared) % 2)
    written = struct.pack("<H", len(declared)) if explicit else struct.pack("<I", len(declared))
    return data[: 6 if explicit else 4] + written + declared + data[8 + length :]


def _answer(
    plan: FindPlan, by: Behaviour, *, values: Mapping[str, str | bytes | None], level: str = ""
) -> bool:
    found = answers_of(plan, by).values() if level in ("", plan.level) else ()
    for answer in found:
        for keyword, value in values.items():
            tag = tag_of(keyword)
            answer.pop(tag, None)
            if value is not None:
                raw = value if isinstance(value, bytes) else value.encode("latin-1")
                raw += b" " * (len(raw) % 2)
                # As it is: pydicom would refuse, or correct, what no VR has.
                answer[tag] = RawDataElement(
                    Tag(tag), dictionary_VR(tag), len(raw), raw, 0, False, True
                )
    return bool(found)


def _hang_up(
    plan: FindPlan,
    by: Behaviour,
    *,
    keys: Sequence[str],
    how: str = "close",
    source: int = 0,
    reason: int = 0,
) -> bool:
    if not any(plan.keys.get(key) for key in keys):
        return False
    plan.connection.drop_after = 0
    plan.connection.drop_by = End(how, source, reason)
    return True


ANSWER_KNOBS = (
    Knob(
        "find.hang_up",
        (Stage.FIND_QUERY,),
        "Ends the association at a query in which one of these `keys` has a value; `how`: abort "
        "(with `source` and `reason`), close, reset.",
        _hang_up,
    ),
    Knob(
        "find.declare",
        (Stage.FIND_ANSWER,),
        "Answers texts in Python's `encoding`, and declares any text as their character set.",
        _declare,
    ),
    Knob(
        "find.answer",
        (Stage.FIND_ANSWER,),
        "Answers these `values`, by keyword (None: leaves it out), at one `level` or at all, "
        "whatever it holds.",
        _answer,
    ),
)
"""All knobs for the bytes of answers."""
