"""The cells of an XLSX workbook, row by row, as the file has them.

SpreadsheetML (ECMA-376 part 1, 18) read with the standard library's expat in one pass over a
sheet: true row numbers, every row that is in the file wherever it stands, formulas left as such,
and fast enough for a hundred thousand rows. What number formats mean is asked of openpyxl.

Damaged files make the functions of this module raise whatever zip, XML or numbers come to.
"""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

from openpyxl.styles.numbers import BUILTIN_FORMATS, is_date_format
from openpyxl.utils.datetime import CALENDAR_MAC_1904, CALENDAR_WINDOWS_1900, from_excel

_CHUNK = 256 * 1024
_MOST_COLUMNS = 16_384
# ECMA-376 part 1, 22.9.2.19: a character XML cannot hold, as its four hexadecimal digits.
_ESCAPE = re.compile(r"_x([0-9A-Fa-f]{4})_")


class Cell(NamedTuple):
    """One cell that has content.

    ``kind`` is ``text``, ``number``, ``day`` (written as ISO 8601), ``formula``, ``error`` or
    ``boolean``; ``text`` is what the file holds, ``style`` the number of the cell's format.
    """

    kind: str
    text: str
    style: int = 0


_KINDS = {"s": "text", "str": "text", "inlineStr": "text", "n": "number", "d": "day"}
_KINDS |= {"b": "boolean", "e": "error"}


@dataclass(frozen=True, slots=True)
class Workbook:
    """An open workbook; ``sheets`` are the names of its worksheets' parts, in their order."""

    archive: zipfile.ZipFile
    sheets: tuple[str, ...]
    strings: tuple[str, ...]
    formats: tuple[str, ...]
    epoch: datetime

    @classmethod
    def open(cls, data: bytes, most_bytes: int) -> Workbook:
        """Open a workbook that inflates to no more than ``most_bytes``.

        Raises
        ------
        ValueError
            If it would; and other errors where it is damaged.
        """
        archive = zipfile.ZipFile(io.BytesIO(data))
        if sum(part.file_size for part in archive.infolist()) > most_bytes:
            raise ValueError("the workbook inflates to too much")
        main = next(
            target
            for kind, target in _relationships(archive, "").values()
            if kind == "officeDocument"
        )
        related = _relationships(archive, main)
        root = ElementTree.fromstring(archive.read(main))
        sheets = []
        for sheet in _all(root, "sheet"):
            name = next(value for key, value in sheet.attrib.items() if key.endswith("}id"))
            kind, target = related[name]
            if kind == "worksheet":
                sheets.append(target)
        by_kind = dict(related.values())
        mac = any(p.get("date1904") in ("1", "true") for p in _all(root, "workbookPr"))
        return cls(
            archive=archive,
            sheets=tuple(sheets),
            strings=tuple(_strings(archive, by_kind["sharedStrings"]))
            if "sharedStrings" in by_kind
            else (),
            formats=tuple(_formats(archive, by_kind["styles"])) if "styles" in by_kind else (),
            epoch=CALENDAR_MAC_1904 if mac else CALENDAR_WINDOWS_1900,
        )

    def rows(self, sheet: str) -> Iterator[tuple[int, list[Cell | None]]]:
        """The rows of a sheet that have a cell with content, with their row numbers."""
        reader = _SheetReader(self.strings)
        with self.archive.open(sheet) as part:
            while chunk := part.read(_CHUNK):
                reader.parser.Parse(chunk, False)
                yield from reader.rows
                reader.rows.clear()
            reader.parser.Parse(b"", True)
        yield from reader.rows

    def number_format(self, cell: Cell) -> str:
        """The cell's number format code; ``General`` where it has none."""
        return self.formats[cell.style] if cell.style < len(self.formats) else "General"

    def day(self, cell: Cell) -> date | None:
        """The day a cell shows, or None where it shows something else."""
        if cell.kind == "day":
            return datetime.fromisoformat(cell.text.removesuffix("Z")).date()
        if cell.kind == "number" and is_date_format(self.number_format(cell)):
            moment = from_excel(float(cell.text), self.epoch)
            return moment.date() if isinstance(moment, datetime) else None
        return None


class _SheetReader:
    """Collects finished rows in ``rows`` while the sheet's XML is fed to ``parser``."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self.rows: list[tuple[int, list[Cell | None]]] = []
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start_document
        self._strings = strings
        self._line = 0
        self._cells: list[Cell | None] = []
        self._column = 0
        self._kind = "n"
        self._style = 0
        self._formula = False
        self._phonetic = False
        self._text: list[str] = []

    def _start_document(self, name: str, attributes: dict[str, str]) -> None:
        # Whatever prefix the root element has, the others have it too.
        prefix = name.removesuffix("worksheet")
        starts = {
            prefix + "row": self._start_row,
            prefix + "c": self._start_cell,
            prefix + "v": self._start_text,
            prefix + "t": self._start_text,
            prefix + "f": self._start_formula,
            prefix + "rPh": self._start_phonetic,
        }
        ends = {
            prefix + "v": self._end_text,
            prefix + "t": self._end_text,
            prefix + "c": self._end_cell,
            prefix + "row": self._end_row,
            prefix + "rPh": self._end_phonetic,
        }

        def start(name: str, attributes: dict[str, str]) -> None:
            if name in starts:
                starts[name](attributes)

        def end(name: str) -> None:
            if name in ends:
                ends[name]()

        self.parser.StartElementHandler = start
        self.parser.EndElementHandler = end

    def _start_row(self, attributes: dict[str, str]) -> None:
        self._line = int(attributes.get("r", self._line + 1))
        self._cells = []
        self._column = 0

    def _start_cell(self, attributes: dict[str, str]) -> None:
        place = attributes.get("r")
        self._column = _column(place.rstrip("0123456789")) if place else self._column + 1
        self._kind = attributes.get("t", "n")
        self._style = int(attributes.get("s", 0))
        self._formula = False
        self._text.clear()

    def _start_formula(self, attributes: dict[str, str]) -> None:
        self._formula = True

    def _start_phonetic(self, attributes: dict[str, str]) -> None:
        self._phonetic = True

    def _end_phonetic(self) -> None:
        self._phonetic = False

    def _start_text(self, attributes: dict[str, str]) -> None:
        if not self._phonetic:
            self.parser.CharacterDataHandler = self._text.append

    def _end_text(self) -> None:
        self.parser.CharacterDataHandler = None

    def _end_row(self) -> None:
        if self._cells:
            self.rows.append((self._line, self._cells))

    def _end_cell(self) -> None:
        text = "".join(self._text)
        if not text and not self._formula:
            return
        kind = "formula" if self._formula else _KINDS[self._kind]
        if self._kind == "s" and not self._formula:
            text = self._strings[int(text)]
        elif kind == "text":
            text = _unescaped(text)
        gap = self._column - 1 - len(self._cells)
        if gap < 0 or self._column > _MOST_COLUMNS:
            raise ValueError("a cell is where none can be")
        if gap:
            self._cells.extend([None] * gap)
        self._cells.append(Cell(kind, text, self._style))


@lru_cache(maxsize=1024)
def _column(letters: str) -> int:
    """The number of a column, from 1, by its letters."""
    number = 0
    for letter in letters:
        number = number * 26 + ord(letter.upper()) - ord("A") + 1
    return number


def _unescaped(text: str) -> str:
    if "_x" not in text:
        return text
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)


def _all(root: ElementTree.Element, name: str) -> Iterator[ElementTree.Element]:
    # The namespace differs between the transitional and the strict form of the standard.
    return root.iterfind(f".//{{*}}{name}")


def _relationships(archive: zipfile.ZipFile, part: str) -> dict[str, tuple[str, str]]:
    """Relationship id to its kind and the part it leads to."""
    folder, name = posixpath.split(part)
    root = ElementTree.fromstring(archive.read(posixpath.join(folder, "_rels", f"{name}.rels")))
    return {
        relation.get("Id", ""): (
            relation.get("Type", "").rpartition("/")[2],
            posixpath.normpath(posixpath.join("/", folder, relation.get("Target", ""))).lstrip("/"),
        )
        for relation in _all(root, "Relationship")
    }


def _strings(archive: zipfile.ZipFile, part: str) -> Iterator[str]:
    """The shared strings, without their formatting and phonetic readings."""
    with archive.open(part) as stream:
        for _, element in ElementTree.iterparse(stream):
            name = element.tag.rpartition("}")[2]
            if name == "si":
                yield _unescaped("".join(text.text or "" for text in element.iterfind(".//{*}t")))
                element.clear()
            elif name == "rPh":
                element.clear()


def _formats(archive: zipfile.ZipFile, part: str) -> Iterator[str]:
    """The number format code of each cell format, ECMA-376 part 1, 18.8.10 and 18.8.30."""
    root = ElementTree.fromstring(archive.read(part))
    codes = dict(BUILTIN_FORMATS)
    for entry in _all(root, "numFmt"):
        codes[int(entry.get("numFmtId", ""))] = entry.get("formatCode", "General")
    for entry in root.iterfind("{*}cellXfs/{*}xf"):
        yield codes.get(int(entry.get("numFmtId", 0)), "General")
