"""Values compared in DICOM's terms: what differs in meaning, and what only looks different.

Value representations are those of PS3.5 6.2, matching is that of PS3.4 C.2.2.2. Identifiers are
compared to the character. Person names never identify anybody here; they are compared as people
write them, because the same name is typed with and without accents, in capitals, in Latin letters
or in others.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from datetime import date
from functools import lru_cache

# PS3.5 6.2, VR DA; with dots it is the form of ACR-NEMA, which readers are to accept.
_DAY = re.compile(r"([0-9]{4})([0-9]{2})([0-9]{2})|([0-9]{4})\.([0-9]{2})\.([0-9]{2})")
_LEADING_ZEROS = re.compile(r"(?<![0-9])0+(?=[0-9])")
_BLANKS = re.compile(r"[\s\0\u200b\u200e\u200f\u2060\ufeff]+")
_ACCENTED = re.compile(r"(?<=[a-z])[\u0300-\u036f]+")
# Latin letters whose accent is no character of its own in Unicode.
_STROKES = str.maketrans({"ı": "i", "ø": "o", "ł": "l", "đ": "d", "æ": "ae", "œ": "oe"})
_LATIN = re.compile("[a-z]")
_UMLAUTS = re.compile("(?<=[aou])e")
_MOST_GROUPS = 3

_Group = tuple[str, ...]


def unpadded(text: str) -> str:
    """The text without what DICOM calls insignificant at its ends, PS3.5 6.2."""
    return text.rstrip(" \0").lstrip(" ")


def study_day(study_date: str) -> date | None:
    """The day of a StudyDate as it was answered, PS3.5 6.2; None where it is not readable."""
    match = _DAY.fullmatch(unpadded(study_date))
    if match is None:
        return None
    try:
        return date(*(int(part) for part in match.groups() if part is not None))
    except ValueError:
        return None


# --- patterns


def like(pattern: str, text: str) -> bool:
    """Whether a text is what a pattern with ``*`` and ``?`` says, in whatever case."""
    return _glob(unpadded(pattern)).fullmatch(unpadded(text)) is not None


@lru_cache(maxsize=256)
def _glob(pattern: str) -> re.Pattern[str]:
    """A description pattern as a regular expression that cannot take long.

    Each piece between two stars is found at its first place for good (an atomic group): any
    later place leaves less text for the pieces after it.
    """
    first, *pieces = pattern.split("*")
    text = _literal(first)
    if pieces:
        *middle, last = pieces
        text += "".join(f"(?>.*?{_literal(piece)})" for piece in middle if piece)
        text += f".*{_literal(last)}"
    return re.compile(text, re.IGNORECASE | re.DOTALL)


def _literal(piece: str) -> str:
    return ".".join(re.escape(part) for part in piece.split("?"))


# --- identifiers


def _without_blanks(text: str) -> str:
    return _BLANKS.sub("", text)


def _without_leading_zeros(text: str) -> str:
    return _LEADING_ZEROS.sub("", text)


def _in_one_form(text: str) -> str:
    # Ü as one character or as U and an accent; digits of full width.
    return unicodedata.normalize("NFKC", text)


_BLURS: dict[str, Callable[[str], str]] = {
    "Unicode form": _in_one_form,
    "blanks": _without_blanks,
    "case": str.casefold,
    "leading zeros": _without_leading_zeros,
}
"""What a person overlooks in an identifier, and how to overlook it."""


def blurred(identifier: str, but: str = "") -> str:
    """The same text for identifiers that a person might take for each other.

    Parameters
    ----------
    but : str
        One of the things that are overlooked otherwise: "Unicode form", "blanks", "case" or
        "leading zeros".
    """
    for name, blur in _BLURS.items():
        if name != but:
            identifier = blur(identifier)
    return identifier


def overlooked(given: str, found: str) -> tuple[str, ...]:
    """In what two identifiers differ that a person might take for each other.

    Returns
    -------
    tuple of str
        In words; empty where they are the same, or differ in more than that.

    Examples
    --------
    >>> overlooked("000123", "123 "), overlooked("A7", "a7"), overlooked("A7", "A8")
    (('blanks', 'leading zeros'), ('case',), ())
    """
    if given == found:
        return ()
    if blurred(given) != blurred(found):
        values = found.split("\\")
        return ("number of values",) if len(values) > 1 and given in map(unpadded, values) else ()
    return tuple(but for but in _BLURS if blurred(given, but) != blurred(found, but)) or ("form",)


# --- person names


def names_agree(asked: str, told: str) -> bool | None:
    """Whether an answered PatientName may be the one that was asked for, PS3.5 6.2.1.

    Component groups (alphabetic, ideographic, phonetic) are compared with their counterparts; a
    name of one group with any group, PS3.4 C.2.2.2.1. Within a group, components that were not
    asked for are not compared, so that a title or a second name does no harm. Case, accents of
    Latin letters, the width of letters and blanks are of no account. ``*`` and ``?`` are
    wildcards.

    Parameters
    ----------
    asked : str
        As a person wrote it into the cohort.
    told : str
        As the PACS answered it.

    Returns
    -------
    bool or None
        None where the answer has nothing to compare: no name, or one in other letters.

    Examples
    --------
    >>> names_agree("Muller^Jorg", "MÜLLER^Jörg^^Dr."), names_agree("Muller^Jorg", "Müller^Karl")
    (True, False)
    """
    wanted, found = _groups(asked), _groups(told)
    if len(wanted) > 1:
        pairs = [(a, b) for a, b in zip(wanted, found, strict=False) if a and b]
        judged = [_group_agrees(a, b) for a, b in pairs]
        return all(judged) if judged else None
    if not wanted:
        return None
    comparable = [group for group in found if group and _script(group) == _script(wanted[0])]
    return any(_group_agrees(wanted[0], group) for group in comparable) if comparable else None


def written_otherwise(asked: str, told: str) -> bool:
    """Whether two names that do not agree may still be one person's.

    The comma form, family and given name exchanged, umlauts as two letters, names divided
    otherwise.

    Examples
    --------
    >>> written_otherwise("Müller, Jörg", "Mueller^Joerg")
    True
    """
    wanted = _letters(asked)
    return any(wanted == _letters(group) for group in told.split("=")) if wanted else False


def _groups(name: str) -> list[_Group]:
    """The component groups of a name, each without empty components at its end."""
    groups = []
    for group in unpadded(name).split("=")[:_MOST_GROUPS]:
        components = [_folded(component) for component in group.split("^")]
        while components and not components[-1]:
            components.pop()
        groups.append(tuple(components) if any(components) else ())
    while groups and not groups[-1]:
        groups.pop()
    return groups


def _folded(text: str) -> str:
    """A component of a name without what is written now so, now otherwise."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(_STROKES)
    text = _ACCENTED.sub("", unicodedata.normalize("NFD", text))
    return " ".join(unicodedata.normalize("NFC", text).split())


def _group_agrees(wanted: _Group, found: _Group) -> bool:
    pattern = "^".join(wanted)
    if "*" in pattern or "?" in pattern:
        return like(pattern, "^".join(found))
    return all(
        not component or place < len(found) and component == found[place]
        for place, component in enumerate(wanted)
    )


def _script(group: _Group) -> bool:
    return any(map(_LATIN.search, group))


def _letters(name: str) -> tuple[str, ...]:
    # Müller, Mueller and Muller become one only here, where nothing is decided.
    words = re.split(r"[\s,^'’.-]+", _folded(name.partition("=")[0]))
    return tuple(sorted(_UMLAUTS.sub("", word) for word in words if word))
