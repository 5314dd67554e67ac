"""The identifiers that an instance itself names: looked for in the text that is kept."""

from __future__ import annotations

import re

from prefect_dicom.deidentify.elements import PartTen

_NAMING_TAGS = frozenset(
    {
        0x00080050,  # Accession Number
        0x00080080,  # Institution Name
        0x00080090,  # Referring Physician's Name
        0x0008009C,  # Consulting Physician's Name
        0x00081010,  # Station Name
        0x00081048,  # Physician(s) of Record
        0x00081050,  # Performing Physician's Name
        0x00081060,  # Name of Physician(s) Reading Study
        0x00081070,  # Operators' Name
        0x00100010,  # Patient's Name
        0x00100020,  # Patient ID
        0x00100030,  # Patient's Birth Date
        0x00101000,  # Other Patient IDs
        0x00101001,  # Other Patient Names
        0x00101005,  # Patient's Birth Name
        0x00101060,  # Patient's Mother's Birth Name
    }
)
_WORDS = re.compile(rb"[^\\^= ,;\0]+")
_PLACEHOLDERS = frozenset(
    {b"anonymous", b"name", b"none", b"other", b"patient", b"phantom", b"test", b"unknown"}
)
"""Words that stand in names where none is known, and in values of every kind."""
_SHORTEST_WORD = 3
_SHORTEST_PART = 6
"""Identifiers of this length are found within longer words as well."""


def own_identifiers(file: PartTen) -> re.Pattern[bytes] | None:
    """Expression that finds the instance's own names and numbers in a value; None without any."""
    words = {
        word.lower()
        for element in file.elements
        if element.tag in _NAMING_TAGS
        for word in _WORDS.findall(file.value(element))
        if len(word) >= _SHORTEST_WORD
    } - _PLACEHOLDERS
    if not words:
        return None
    ordered = sorted(words)
    whole = b"|".join(re.escape(word) for word in ordered)
    parts = b"|".join(re.escape(word) for word in ordered if len(word) >= _SHORTEST_PART)
    bounded = rb"(?<![A-Za-z0-9])(?:" + whole + rb")(?![A-Za-z0-9])"
    return re.compile(bounded + (b"|" + parts if parts else b""), re.IGNORECASE)
