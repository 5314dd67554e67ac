"""A de-identified copy: its bytes in pieces, and what was done to each element."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pydicom.datadict import keyword_for_tag

ENGINE_VERSION = 1
"""Raised whenever the same input may give other bytes."""

Piece = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Treated:
    """What was done to one element, for people."""

    path: str
    """Tags of the sequences it lies in, with numbers of items, and its own."""
    vr: str
    action: str
    why: str


@dataclass(slots=True)
class Copy:
    """A de-identified instance: its bytes in pieces, and what they are."""

    pieces: list[Piece]
    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    sop_class_uid: str
    transfer_syntax_uid: str
    pseudonym: str
    beyond_table: Counter[str] = field(default_factory=Counter)
    """How many elements the allow-list behind the table has removed or emptied, by attribute."""


def format_tag(tag: int) -> str:
    """A tag as people write it.

    Examples
    --------
    >>> format_tag(0x00100010)
    '(0010,0010)'
    """
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def keyword(tag: int) -> str:
    """Keyword of an attribute (PS3.6); its tag where there is none."""
    return keyword_for_tag(tag) or format_tag(tag)
