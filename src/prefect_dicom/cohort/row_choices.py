"""Columns by which people mark rows as wanted or not: ``Include``, ``Consent``, ``Excluded``.

A list does not choose by them. But a row that such a column leaves out, of a patient without
consent perhaps, is not pulled without a word: its line has a fault.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from prefect_dicom.cohort.altered_values import is_for_nothing
from prefect_dicom.cohort.column_names import IGNORE, words_of
from prefect_dicom.cohort.table import BLANKS


def _set(text: str) -> frozenset[str]:
    return frozenset(word for each in text.split() for word in words_of(each))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TAKES = _set(
    "include included inclusion eligible consent consents consented agreed use used keep wanted "
    "select selected selection pull download retrieve take einwilligung einverstanden einschluss "
    "eingeschlossen ausgewahlt gewunscht consentement inclus inclure consentimiento incluir "
    "incluido consenso incluso consentimento toestemming samtykke samtycke zgoda suostumus "
    "согласие 同意"
)
_LEAVES = _set(
    "exclude excluded exclusion exclusions withdrawn withdrawal withdrew revoked revocation optout "
    "optedout declined refused skip omit delete deleted remove removed dropout ausschluss "
    "ausgeschlossen widerruf widerrufen widersprochen loschen geloscht exclu exclus exclure "
    "excluir excluido escluso uitgesloten отзыв"
)
_NOT = _set("not no kein keine ohne without sans sin senza nicht non")
_BESIDE = _set(
    "yes no ja nein oui non si y n j given obtained signed status flag patient patients study row "
    "is was has be do not to for the of in from this data imaging research analysis cohort "
    "erteilt vorliegend liegt vor kein keine ohne without sans sin senza nicht informed "
    "opt opted out"
)
_YES = _words(
    "yes y ja j oui o si sí sì sim s true t wahr vrai 1 1.0 x ok + ✓ ✔ ☑ tak да ano evet "
    "kyllä given obtained signed erteilt はい 是 有"
)
_NO = _words(
    "no n nein non não nao false f falsch faux falso 0 0.0 - – ✗ ☐ nie нет ne ei hayır "
    "none not missing fehlt refused declined withdrawn verweigert abgelehnt widerrufen "
    "いいえ 否 无 無"
)
_LONGEST = 40


def marks_rows(header: object) -> bool | None:
    """Whether a column of this name marks rows as wanted (True) or as not wanted (False).

    Returns
    -------
    bool or None
        None where it marks none.

    Examples
    --------
    >>> marks_rows("Consent (y/n)"), marks_rows("Consent withdrawn"), marks_rows("Consent date")
    (True, False, None)
    """
    if not isinstance(header, str) or len(header) > _LONGEST:
        return None
    words = words_of(header)
    if not words or words[0] == IGNORE or not (_TAKES | _LEAVES | _BESIDE).issuperset(words):
        return None
    if not _LEAVES.isdisjoint(words) or ("out" in words and not {"opt", "opted"}.isdisjoint(words)):
        return False
    if _TAKES.isdisjoint(words):
        return None
    return "not" not in words and "nicht" not in words and words[0] not in _NOT


@dataclass(slots=True)
class RowChoices:
    """The columns of one list that mark rows, and the lines that they leave out."""

    header: Sequence[object]
    _columns: dict[int, bool] = field(init=False)
    _left_out: dict[int, list[int]] = field(init=False)
    _blank: dict[int, list[int]] = field(init=False)
    """By column, the lines that it says nothing of."""
    _takes: set[int] = field(default_factory=set)
    """Columns that mark at least one row as wanted."""

    def __post_init__(self) -> None:
        marks = {n: marks_rows(name) for n, name in enumerate(self.header)}
        self._columns = {n: mark for n, mark in marks.items() if mark is not None}
        self._left_out = {n: [] for n in self._columns}
        self._blank = {n: [] for n in self._columns}

    def look(self, line: int, cells: Sequence[object]) -> None:
        """Take note of what is written in a record."""
        for index, takes in self._columns.items():
            word = _word(cells[index]) if index < len(cells) else ""
            if not word and takes:
                self._blank[index].append(line)
            elif takes and word in _YES:
                self._takes.add(index)
            elif (takes and word in _NO) or (word and not takes and word not in _NO):
                self._left_out[index].append(line)

    def faults(self) -> Iterator[tuple[int, str, str]]:
        """Line, name of the column and fault of each row that is marked as not wanted."""
        for index in self._columns:
            lines = self._left_out[index] + (self._blank[index] if index in self._takes else [])
            name = " ".join(str(self.header[index]).split())
            for line in sorted(lines):
                # A number may be a patient's.
                yield line, "" if any(map(str.isdigit, name)) else name, _FAULT


_FAULT = (
    "marks the row as one that is not wanted, and a list does not choose by such a column; delete "
    f"the row, or write `{IGNORE}` before the column's name"
)


def _word(cell: object) -> str:
    """What is written in a cell, folded; empty for nothing, and for a word for it."""
    value = getattr(cell, "value", cell)
    word = "" if value is None else str(value).strip(BLANKS).casefold()
    return "" if is_for_nothing(word, is_code=True) else word
