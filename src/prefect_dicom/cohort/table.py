"""A cohort file as its reader hands it over: header and records, with their lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal

BLANKS = " \t\r\n\N{NO-BREAK SPACE}\N{ZERO WIDTH NO-BREAK SPACE}"
INVISIBLE = (
    "holds a control character, line break or invisible character; delete the cell and type the "
    "value anew"
)
_LARGEST_FILE = 256 * 1024**2
_EXACT_DIGITS = 15
"""What Excel and floating point keep of a number."""


class UnfitCell(Exception):
    """A cell that cannot be used: what is wrong and what to do; never the content itself."""


class UnreadableFile(Exception):
    """A file, or the rest of it, that cannot be read."""


@dataclass(frozen=True, slots=True)
class DateWindow:
    """Days around a date in a column of a list, in which the date of a study has to be.

    ``around`` is the column's name, whatever its case, blanks and underscores.
    """

    around: str
    days_before: int
    days_after: int


@dataclass(frozen=True, slots=True)
class Table:
    """Header and records of a file, with cells still raw."""

    line: int
    """Line of the header."""
    header: Sequence[object]
    records: Iterator[tuple[int, Sequence[object]]]
    """Line and cells of each record."""
    content: Callable[[object], str | date | None]
    """Turns a raw cell into text or a day; raises UnfitCell. Called for known columns only."""
    every_field_written: bool
    """A record with fewer fields than the header is torn (CSV), not merely empty at its end."""
    hidden_lines: frozenset[int] = frozenset()
    """Lines that a person who opens the file does not see."""
    all_hidden: bool = False
    """The same of all of them."""
    ignored_sheets: tuple[int, ...] = ()
    """Other sheets of the workbook that hold something, counted from 1."""

    def is_hidden(self, line: int) -> bool:
        """Whether a person who opens the file does not see a line."""
        return self.all_hidden or line in self.hidden_lines


def refuse_larger(size: int) -> None:
    """Pass if a file of so many bytes is small enough to be read.

    Raises
    ------
    UnreadableFile
        It is larger than any list of identifiers.
    """
    if size > _LARGEST_FILE:
        raise UnreadableFile(
            f"is larger than {_LARGEST_FILE // 1024**2} MiB (without compression); a cohort holds "
            "identifiers only: remove other columns or split the file"
        )


def exact_digits(number: int | float | Decimal, *, exact: bool) -> str:
    """Digits of a whole number of a spreadsheet or data frame.

    Parameters
    ----------
    exact : bool
        False for a floating-point number, of which 15 digits are exact.

    Raises
    ------
    UnfitCell
        It has a fraction, or digits that are lost.
    """
    if number in (float("inf"), float("-inf")) or number != int(number):
        raise UnfitCell(
            "is a number with a fraction; format the column as text and write the value"
        )
    digits = str(int(number))
    if not exact and len(digits.lstrip("-")) > _EXACT_DIGITS:
        raise UnfitCell(
            f"is a number of more than {_EXACT_DIGITS} digits, of which the last are lost; format "
            "the column as text and write the value"
        )
    return digits
