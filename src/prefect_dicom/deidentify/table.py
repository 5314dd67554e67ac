"""Table E.1-1 of PS3.15 and the sample list of safe private elements (Table E.3.10-1), as data.

``table_e1_1.csv`` has the 656 rows of the edition :data:`EDITION` with all option columns,
``safe_private.csv`` the 479 pairs of private creator and element. Both were generated once from
the standard's own DocBook source. An older table lets elements of newer editions pass, so the
edition is named in every de-identified instance.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

EDITION = "2026c"
"""Edition of PS3.15 whose tables these are."""

_FOLDER = files("prefect_dicom.deidentify")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of Table E.1-1: the action of the Basic Profile, and those of the options.

    An option that says nothing about the attribute is empty. Codes are those of Table E.1-1a.
    """

    tag: str
    """``GGGG,EEEE``, with ``x`` for any digit, or ``private``."""
    name: str
    retired: str
    in_standard_iod: str
    basic: str
    safe_private: str
    uids: str
    device: str
    institution: str
    patient_characteristics: str
    full_dates: str
    modified_dates: str
    descriptors: str
    structured_content: str
    graphics: str

    def __str__(self) -> str:
        return f"({self.tag}) {self.name}"


@functools.cache
def rows() -> tuple[Row, ...]:
    """All rows, in order of tags."""
    text = _FOLDER.joinpath("table_e1_1.csv").read_text("utf-8")
    return tuple(Row(*line) for line in list(csv.reader(text.splitlines()))[1:])


@functools.cache
def rows_by_tag() -> Mapping[int, Row]:
    """Rows of one attribute each, by tag. See :func:`row_of` for the others."""
    return {int(row.tag.replace(",", ""), 16): row for row in rows() if _is_single(row)}


@functools.cache
def _families() -> Mapping[str, Row]:
    return {row.tag: row for row in rows() if not _is_single(row)}


def _is_single(row: Row) -> bool:
    return row.tag != "private" and "x" not in row.tag


def row_of(tag: int) -> Row | None:
    """Row of an attribute, also where the row names a family (curves, overlays, private)."""
    row = rows_by_tag().get(tag)
    if row is not None:
        return row
    group = tag >> 16
    if group & 1:
        return _families()["private"]
    if group & 0xFF00 == 0x5000:
        return _families()["50xx,xxxx"]
    if group & 0xFF00 == 0x6000:
        return _families().get(f"60xx,{tag & 0xFFFF:04X}")
    return None


@functools.cache
def safe_private() -> Mapping[tuple[int, str, int], str]:
    """VRs of safe private elements, by group, creator and low byte of the element."""
    text = _FOLDER.joinpath("safe_private.csv").read_text("utf-8")
    return {
        (int(group, 16), creator, int(element, 16)): vr
        for group, creator, element, vr in list(csv.reader(text.splitlines()))[1:]
    }
