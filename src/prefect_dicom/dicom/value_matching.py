"""Comparison of values as DICOM means it: identifiers, dates, descriptions, person names.

Value representations are those of PS3.5 6.2, matching is that of PS3.4 C.2.2.2. Identifiers are
compared character by character. Person names never identify a patient; they are compared
tolerantly, because the same name is typed with and without accents, in capitals, in Latin letters
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
# PS3.5 6.2, VR IS; some PACS answer numbers as their database formats them.
_WHOLE_NUMBER = re.compile(r"[+]?([0-9]{1,12})(?:[.,]0*)?")
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
    """Remove insignificant padding at both ends, PS3.5 6.2."""
    return text.rstrip(" \0").lstrip(" ")


def study_day(study_date: str) -> date | None:
    """Parse a StudyDate, PS3.5 6.2; None if it is not a date."""
    match = _DAY.fullmatch(unpadded(study_date))
    if match is None:
        return None
    try:
        return date(*(int(part) for part in match.groups() if part is not None))
    except ValueError:
        return None


def whole_number(text: str) -> int | None:
    """Parse a count or a number (VR IS) of up to 12 digits; None if it is not a whole one.

    A fraction of zero is none.

    Examples
    --------
    >>> whole_number(" 4 "), whole_number("4.0"), whole_number("4.5"), whole_number("")
    (4, 4, None, None)
    """
    match = _WHOLE_NUMBER.fullmatch(unpadded(text))
    return None if match is None else int(match[1])


# --- patterns


def like(pattern: str, text: str) -> bool:
    """Whether a text matches a pattern with ``*`` and ``?``, ignoring case."""
    return _glob(unpadded(pattern)).fullmatch(unpadded(text)) is not None


@lru_cache(maxsize=256)
def _glob(pattern: str) -> re.Pattern[str]:
    """Compile a pattern to a regular expression without backtracking.

    Each piece between two stars is matched at its first place (an atomic group): any later place
    leaves less text for the pieces after it.
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
"""Differences in identifiers that people overlook, and functions that remove them."""


def blurred(identifier: str, but: str = "") -> str:
    """Normalize an identifier, so that easily confused ones become equal.

    Parameters
    ----------
    identifier : str
        The identifier.
    but : str
        Difference to keep: "Unicode form", "blanks", "case" or "leading zeros".
    """
    for name, blur in _BLURS.items():
        if name != but:
            identifier = blur(identifier)
    return identifier


def overlooked(given: str, found: str) -> tuple[str, ...]:
    """Name the differences between two easily confused identifiers.

    Returns
    -------
    tuple of str
        Differences in words; empty if the identifiers are equal or differ in more.

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


def text_around(given: str, found: str) -> str:
    """Name the text by which one of two identifiers is longer than the other, at its ends.

    Prefixes of a hospital or a device, and suffixes of an issuer, come and go on the way through
    archives and brokers.

    Returns
    -------
    str
        What can be said of the found identifier; empty where neither holds the other.

    Examples
    --------
    >>> text_around("14673792", "JMS14673792"), text_around("P1^^^NORTH", "P1")
    ('has text before it', 'lacks text behind it')
    >>> text_around("A7", "A8")
    ''
    """
    short, long = sorted((blurred(given), blurred(found)), key=len)
    if not short or short == long or short not in long:
        return ""
    before, _, behind = long.partition(short)
    places = " and ".join(word for word, text in (("before", before), ("behind", behind)) if text)
    verb = "has" if len(blurred(found)) == len(long) else "lacks"
    return f"{verb} text {places} it"


def how_patient_ids_differ(listed: str, named: str) -> str:
    """Say how the PatientID that instances name differs from the listed one.

    Returns
    -------
    str
        In words without either of them, to follow "which".

    Examples
    --------
    >>> how_patient_ids_differ("1", "0001"), how_patient_ids_differ("P1", "P1^^^NORTH")
    ('differs in leading zeros', 'has text behind it')
    """
    if differing := overlooked(unpadded(listed), unpadded(named)):
        return f"differs in {' and '.join(differing)}"
    return text_around(listed, named) or "is another number"


# --- person names


def names_agree(wanted: str, answered: str) -> bool | None:
    """Whether an answered PatientName may be the requested one, PS3.5 6.2.1.

    Component groups (alphabetic, ideographic, phonetic) are compared with their counterparts; a
    name of one group with any group, PS3.4 C.2.2.2.1. Within a group, components that were not
    requested are not compared, so that a title or a second name does no harm. Case, accents of
    Latin letters, the width of letters and blanks are ignored. ``*`` and ``?`` are
    wildcards.

    Parameters
    ----------
    wanted : str
        Name in the cohort.
    answered : str
        Name in the answer of the PACS.

    Returns
    -------
    bool or None
        None if the answer has nothing to compare: no name, or one in another script.

    Examples
    --------
    >>> names_agree("Muller^Jorg", "MÜLLER^Jörg^^Dr."), names_agree("Muller^Jorg", "Müller^Karl")
    (True, False)
    """
    groups, found = _groups(wanted), _groups(answered)
    if len(groups) > 1:
        pairs = [(a, b) for a, b in zip(groups, found, strict=False) if a and b]
        judged = [_group_agrees(a, b) for a, b in pairs]
        return all(judged) if judged else None
    if not groups:
        return None
    comparable = [group for group in found if group and _script(group) == _script(groups[0])]
    return any(_group_agrees(groups[0], group) for group in comparable) if comparable else None


def given_names_agree(first: str, second: str) -> bool:
    """Whether two names have the same given name, as before and after a marriage.

    Examples
    --------
    >>> given_names_agree("Alpha^Anna", "Beta^ANNA"), given_names_agree("Alpha^Anna", "Beta^Bert")
    (True, False)
    """
    its, other = (
        {group[1] for group in _groups(name) if len(group) > 1 and group[1]}
        for name in (first, second)
    )
    return not its.isdisjoint(other)


def written_otherwise(wanted: str, answered: str) -> bool:
    """Whether two names that do not agree may be spellings of one name.

    The comma form, family and given name exchanged, umlauts as two letters, names split
    differently.

    Examples
    --------
    >>> written_otherwise("Müller, Jörg", "Mueller^Joerg")
    True
    """
    letters = _letters(wanted)
    return any(letters == _letters(group) for group in answered.split("=")) if letters else False


def _groups(name: str) -> list[_Group]:
    """Split a name into component groups, without empty components at their ends."""
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
    """Normalize a component of a name: case, width, accents and blanks."""
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
