"""Values that a spreadsheet or a program has put in the place of what a person meant.

``4711.0`` is an accession number behind a column with gaps in it, ``nan`` and ``NULL`` are empty
cells, ``6.0E+10`` has lost its digits. A PACS answers each with no study, or with others.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from prefect_dicom.cohort.columns import IDENTIFIERS
from prefect_dicom.cohort.table import UnfitCell

_FLOAT = re.compile(r"[+-]?[0-9]+[.,]0+")
_EXPONENT = re.compile(r"[+-]?[0-9]+(?:[.,][0-9]+E[+-]?|E\+)[0-9]+", re.IGNORECASE)
# An accession number may look like these: the others of its column decide.
_LIKE_AN_EXPONENT = re.compile(r"[0-9]+E-?[0-9]+", re.IGNORECASE)
_DIGITS = re.compile(r"[0-9]+")
_ERROR = re.compile(
    r"Err:[0-9]{3}|#(?:N/?[ADV]|N/ [AD]|NAME\?|NOM\?|[^\W_][^\s!]{0,20}[!?])", re.IGNORECASE
)

_NOTHING = frozenset(
    [
        *("nan", "-nan", "1.#qnan", "nat", "null", "nul", "none", "nil", "nothing", "undefined"),
        *("na", "n/a", "n.a.", "n.a", "#n/a", "<na>", "<null>", "(null)", "[null]", "{null}"),
    ]
)
"""How programs write an empty cell."""
_NOT_KNOWN = frozenset(
    [
        *("unknown", "unkn", "unk", "missing", "empty", "blank", "not available"),
        *("not applicable", "not known", "no data", "tbd", "n.d.", "n/d", "unbekannt", "leer"),
        *("fehlt", "keine", "keine angabe", "k.a.", "k. a.", "k.a", "nicht vorhanden"),
        *("inconnu", "inconnue", "vide", "aucun", "aucune", "non disponible", "desconocido"),
        *("vacio", "vacío", "ninguno", "sin dato", "sin datos", "sconosciuto", "nessuno"),
        *("vuoto", "desconhecido", "vazio", "onbekend", "geen", "leeg", "ukjent", "okänd"),
        *("ukendt", "нет", "нет данных", "неизвестно", "不明", "未知", "なし", "无"),
    ]
)
"""How people do; a description or a name may be such a word, an identifier and a modality not."""
_NUMBERS = IDENTIFIERS | {"OtherPatientID"}
_CODES = _NUMBERS | {"Modality"}


def refuse_altered(meaning: str, text: str) -> None:
    """Pass if a text is what a person may have meant in a column of this meaning.

    Raises
    ------
    UnfitCell
        It stands for nothing, or for a number that was changed on the way.
    """
    if is_for_nothing(text, is_code=meaning in _CODES):
        raise UnfitCell(
            "is a word for nothing, as programs write an empty cell; leave the cell empty"
        )
    if meaning not in _NUMBERS:
        return
    if _FLOAT.fullmatch(text):
        raise UnfitCell(
            "is a number with a fraction of zero, as programs write a column that has gaps; write "
            "its digits alone, with their leading zeros, and keep the column as text"
        )
    if _EXPONENT.fullmatch(text):
        raise UnfitCell(_ROUNDED)


_ROUNDED = (
    "is a number a spreadsheet has rounded (its digits are lost); format the column as text before "
    "the values are entered, and export again"
)


def is_for_nothing(text: str, *, is_code: bool) -> bool:
    """Whether a text is a word for nothing, as programs write it; of a code, as people do too."""
    word = text.casefold()
    if word in _NOTHING or _ERROR.fullmatch(text):
        return True
    return is_code and (word in _NOT_KNOWN or _is_punctuation(word))


def _is_punctuation(word: str) -> bool:
    return not any(character.isalnum() for character in word) and not set(word) & set("*?\\/")


@dataclass(slots=True)
class Exponents:
    """Identifiers like ``3e3``, which are numbers in a column of digits and a name elsewhere."""

    _lines: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    _digits: set[str] = field(default_factory=set)
    _others: set[str] = field(default_factory=set)

    def add(self, meaning: str, line: int, text: str) -> None:
        """Take note of a value."""
        if _LIKE_AN_EXPONENT.fullmatch(text):
            self._lines[meaning].append(line)
        elif _DIGITS.fullmatch(text):
            self._digits.add(meaning)
        else:
            self._others.add(meaning)

    def faults(self) -> Iterator[tuple[str, int, str]]:
        """Meaning, line and fault of each value that is a number with an exponent."""
        for meaning in self._digits - self._others:
            for line in self._lines.get(meaning, ()):
                yield meaning, line, _ROUNDED
