"""Decoding and encoding of texts by Specific Character Set.

PS3.3 C.12.1.1.2 has the defined terms and escape sequences, PS3.5 6.1 the code extensions of
ISO/IEC 2022. A declaration that is misspelt, and can mean one set only, is read as that one. Bytes
that do not decode as declared are read as UTF-8, or as what software of those countries writes
under the name of the standard's sets, or else as Latin-1, which has a character for every byte:
such a text is *guessed*, and comparisons use its bytes too. No character is replaced or dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

_ESCAPE = 0x1B
_SINGLE = {
    "6": "ascii",
    "100": "latin_1",
    "101": "iso8859_2",
    "109": "iso8859_3",
    "110": "iso8859_4",
    "126": "iso8859_7",
    "127": "iso8859_6",
    "138": "iso8859_8",
    "144": "iso8859_5",
    "148": "iso8859_9",
    "166": "tis_620",
    "203": "iso8859_15",
}
"""Python codec by registration number, of sets with one byte per character."""
_WHOLE = {"ISO_IR 192": "utf_8", "GB18030": "gb18030", "GBK": "gbk"}
"""Sets that have no code extensions."""
_FOREIGN = {
    **{f"WINDOWS-{number}": f"cp{number}" for number in range(1250, 1259)},
    **dict.fromkeys(("SHIFT-JIS", "SHIFTJIS", "SJIS", "WINDOWS-31J", "WINDOWS-932"), "cp932"),
    "EUC-JP": "euc_jp",
    **dict.fromkeys(("EUC-KR", "WINDOWS-949"), "cp949"),
    **dict.fromkeys(("BIG5", "WINDOWS-950"), "cp950"),
    **dict.fromkeys(("EUC-CN", "GB2312", "WINDOWS-936"), "gbk"),
    "KOI8-R": "koi8_r",
    "WINDOWS-874": "cp874",
}
"""Sets that are none of DICOM's, by names that some write all the same."""
_ISO_8859 = dict(
    zip(
        (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 15),
        ("100", "101", "109", "110", "144", "127", "126", "138", "148", "166", "203"),
        strict=True,
    )
)
"""Registration number by part of ISO/IEC 8859."""
_LATIN = dict(zip("12345", ("100", "101", "109", "110", "148"), strict=True))
_KATAKANA, _JIS, _JIS_SUPPLEMENT, _KOREAN, _CHINESE = "13", "87", "159", "149", "58"
_LOWER = {b"(B": "6", b"(J": "6", b"$B": _JIS, b"$(D": _JIS_SUPPLEMENT}
_UPPER = {
    b")I": _KATAKANA,
    b"$)C": _KOREAN,
    b"$)A": _CHINESE,
    **{b"-" + final: number for final, number in (
        (b"A", "100"),
        (b"B", "101"),
        (b"C", "109"),
        (b"D", "110"),
        (b"F", "126"),
        (b"G", "127"),
        (b"H", "138"),
        (b"L", "144"),
        (b"M", "148"),
        (b"T", "166"),
        (b"b", "203"),
    )},
}  # fmt: skip
"""What comes after ESC, and the set it puts into the lower (G0) or upper (G1) half of a byte."""
_DELIMITERS = frozenset(b"\\^=\r\n\f\t")
_TERM = re.compile(r"ISO(?:_IR| 2022 IR) ([0-9]{1,3})")
# Misspelt terms, in capitals and with hyphens for what is between letters and digits.
_MEANS_NUMBER = re.compile(r"(?:ISO-?)?(?:2022-?)?IR-?0*([1-9][0-9]{0,2})")
_MEANS_PART = re.compile(r"(?:ISO-?)?8859-?([0-9]{1,2})(?:-(?:19|20)[0-9]{2})?")
_MEANS_LATIN = re.compile(r"LATIN-?([1-5])")
_MEANS_WINDOWS = re.compile(r"(?:WINDOWS|CP|MS)-?([0-9]{3,4})")
_MEANS_UNICODE = re.compile(r"UTF-?8|(?:ISO-?)?10646(?:-?1)?|UNICODE")

_WINDOWS = {
    "101": "cp1250",
    "144": "cp1251",
    "126": "cp1253",
    "148": "cp1254",
    "138": "cp1255",
    "127": "cp1256",
    "110": "cp1257",
    "166": "cp874",
}
"""What Windows calls by the name of a set, with characters where that has none."""
_C1_CONTROL = re.compile("[\x80-\x9f]")
_WORD = re.compile(rb"[A-Za-z\xa1-\xff]+")
_SCRIPTS = (
    *((encoding, "оеаинтсрвл") for encoding in ("cp1251", "iso8859_5", "koi8_r")),
    ("iso8859_7", "αοιετσνηυρς"),
)
"""Python codecs of scripts with case, and their most frequent letters."""
_KANJI_OR_KANA = "\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\uff61-\uff9f"
_JAPANESE = re.compile(f"[\x00-\x7f\u3000-\u3003{_KANJI_OR_KANA}]*")
# Quotation marks of Windows make kanji of the letters behind them, in the middle of a Latin word.
_BESIDE_LATIN = re.compile(f"[A-Za-z][{_KANJI_OR_KANA}]|[{_KANJI_OR_KANA}][A-Za-z]")

USUAL = (
    "ISO_IR 100",
    "ISO_IR 192",
    *(f"ISO_IR {number}" for number in ("101", "144", "126", "127", "138", "148", "166", "110")),
    *("\\ISO 2022 IR 87", "ISO_IR 13", "\\ISO 2022 IR 149", "GB18030", "\\ISO 2022 IR 58"),
)
"""Values of Specific Character Set in use by PACS, most likely first."""


class Text(NamedTuple):
    """A decoded text; ``guessed`` if not by the declared character set."""

    text: str
    guessed: bool = False


# What is written under the name of a set without its escape sequences, by registration number.
_WITHOUT_ESCAPES = {
    _KATAKANA: "cp932",
    _JIS: "cp932",
    _JIS_SUPPLEMENT: "cp932",
    _KOREAN: "cp949",
    _CHINESE: "gb18030",
}


class _Undecodable(ValueError):
    """The bytes are not in the declared character set."""


def decoded(raw: bytes, declared: str = "") -> Text:
    """Decode a value, PS3.5 6.1; several values keep their backslashes.

    Parameters
    ----------
    raw : bytes
        The value as received, with its padding.
    declared : str
        Specific Character Set of the same data set, its values joined by backslashes.

    Examples
    --------
    >>> decoded(b"M\\xfcller", "ISO_IR 100"), decoded(b"M\\xfcller", "ISO_IR 192")
    (Text(text='Müller', guessed=False), Text(text='Müller', guessed=True))
    """
    if raw.isascii() and _ESCAPE not in raw:
        return Text(raw.decode("ascii"))
    terms = defined_terms(declared)
    utf8 = _as("utf_8", raw)
    try:
        if terms[0] in _FOREIGN:
            return Text(raw.decode(_FOREIGN[terms[0]]))
        if terms[0] in _WHOLE:
            return Text(raw.decode(_WHOLE[terms[0]]))
        # Text that is valid UTF-8 and meant as Latin-1 hardly exists; the other way round it does.
        if not (terms == ["ISO_IR 100"] and utf8 is not None):
            text = _extended(raw, terms)
            # No text has control characters of this kind (PS3.5 6.1.3): it is in another set.
            if not _C1_CONTROL.search(text):
                other = _of_another_script(raw) if terms == ["ISO_IR 100"] else None
                return Text(text) if other is None else Text(other, guessed=True)
    except ValueError:
        pass
    return Text(_guessed(raw, terms, utf8), guessed=True)


@lru_cache(maxsize=256)
def defined_terms(declared: str) -> Sequence[str]:
    """The defined terms of a Specific Character Set, or what they mean where they are misspelt."""
    return [_defined_term(term) for term in re.split(r"[\\/,;]", declared)]


def _defined_term(term: str) -> str:
    term = term.strip(" \0\t\"'")
    if not term or term in _WHOLE or _TERM.fullmatch(term):
        # 192 is no set with code extensions, whatever it is called.
        return "ISO_IR 192" if term.endswith(" 192") else term
    plain = re.sub(r"[\s_.:-]+", "-", term.upper())
    if match := _MEANS_NUMBER.fullmatch(plain):
        return f"ISO_IR {match[1]}"
    if match := _MEANS_PART.fullmatch(plain):
        number = _ISO_8859.get(int(match[1]))
        return term if number is None else f"ISO_IR {number}"
    if match := _MEANS_LATIN.fullmatch(plain):
        return f"ISO_IR {_LATIN[match[1]]}"
    if _MEANS_UNICODE.fullmatch(plain):
        return "ISO_IR 192"
    if match := _MEANS_WINDOWS.fullmatch(plain):
        plain = f"WINDOWS-{match[1]}"
    joined = plain.replace("-", "")
    return next((name for name in (*_FOREIGN, *_WHOLE) if name.replace("-", "") == joined), term)


def _guessed(raw: bytes, terms: Sequence[str], utf8: str | None) -> str:
    """A text that is not in its declared sets, as it was most likely meant."""
    if _ESCAPE in raw:
        try:
            return _extended(raw, ["ISO_IR 6", *_any_extension()])
        except ValueError:
            pass
    if utf8 is not None:
        return utf8
    for match in filter(None, map(_TERM.fullmatch, terms)):
        encoding = _WITHOUT_ESCAPES.get(match[1])
        text = None if encoding is None or _ESCAPE in raw else _as(encoding, raw)
        # Python has characters for private use where these encodings have none.
        if text is not None and not any("\ue000" <= character <= "\uf8ff" for character in text):
            return text
    latin = raw.decode("latin_1")
    if _C1_CONTROL.search(latin):
        return _as_of_windows(raw, terms) or latin
    return _of_another_script(raw) or latin


def _of_another_script(raw: bytes) -> str | None:
    """A Cyrillic, Greek or Chinese text that is declared as Latin-1; None where it may be that.

    A name in Latin-1 has letters of ASCII in each of its longer words.
    """
    words = [word for word in _WORD.findall(raw) if not word.isascii()]
    if any(byte < 0x80 for word in words for byte in word):
        return None
    found: list[tuple[int, str]] = []
    for encoding, frequent in _SCRIPTS:
        texts = [_as(encoding, word) for word in words]
        if all(text is not None and text.isalpha() and _has_one_case(text) for text in texts):
            score = sum(letter in frequent for text in texts for letter in (text or "").lower())
            found.append((score, encoding))
    score, encoding = max(found, default=(0, ""), key=lambda each: each[0])
    length = sum(map(len, words))
    if max(map(len, words), default=0) > 2 and 2 * score >= length:
        return _as(encoding, raw)
    chinese = _as("gb2312", raw)
    if length > 3 and chinese is not None and all(c.isascii() or _is_han(c) for c in chinese):
        return chinese
    return None


def _has_one_case(word: str) -> bool:
    return word.istitle() or word.isupper() or word.islower()


def _is_japanese(text: str) -> bool:
    return _JAPANESE.fullmatch(text) is not None and _BESIDE_LATIN.search(text) is None


def _as_of_windows(raw: bytes, terms: Sequence[str]) -> str | None:
    """A text with bytes that only Windows has characters for: Shift-JIS, or a set with more."""
    japanese = _as("cp932", raw)
    if japanese is not None and _is_japanese(japanese):
        return japanese
    match = _TERM.fullmatch(terms[0])
    return _as(_WINDOWS.get(match[1] if match else "", "cp1252"), raw)


def encoded(text: str, declared: str) -> bytes | None:
    """Encode a text in a character set; None if the set lacks a character or is not supported.

    Examples
    --------
    >>> encoded("Ünal", "ISO_IR 100"), encoded("山田", "ISO_IR 100")
    (b'\\xdcnal', None)
    """
    try:
        if declared in _WHOLE:
            return text.encode(_WHOLE[declared])
        extension = declared.removeprefix("\\ISO 2022 IR ")
        if extension == _JIS:
            return text.encode("iso2022_jp")
        if extension == _KOREAN:
            return _designated(text, b"$)C", "euc_kr")
        if extension == _CHINESE:
            return _designated(text, b"$)A", "gb2312")
        number = declared.removeprefix("ISO_IR ")
        if number == _KATAKANA:
            # Kanji: what software of Japan writes under this name has them.
            return text.encode("cp932" if _is_japanese(text) else "ascii")
        return text.encode(_SINGLE[number]) if number in _SINGLE else None
    except UnicodeEncodeError:
        return None


def character_sets_for(texts: Sequence[str], first: str = "") -> Iterator[str]:
    """Yield character sets for a query with these values, most likely first.

    Parameters
    ----------
    texts : sequence of str
        The values, none with a wildcard. If all are ASCII, one empty text is yielded: no set needs
        to be declared.
    first : str
        Set that the peer is known to understand.

    Yields
    ------
    str
        Sets of :data:`USUAL` with all characters, which differ in their bytes and have none that
        could be read as a wildcard.

    Examples
    --------
    >>> list(character_sets_for(["000123"])), list(character_sets_for(["Ünal"]))
    ([''], ['ISO_IR 100', 'ISO_IR 192'])
    """
    if all(text.isascii() for text in texts):
        yield ""
        return
    tried: set[tuple[bytes, ...]] = set()
    for declared in dict.fromkeys((first, *USUAL) if first else USUAL):
        bytes_of_all = [encoded(text, declared) for text in texts]
        whole = tuple(raw for raw in bytes_of_all if raw is not None and _is_single(raw))
        if len(whole) == len(texts) and whole not in tried:
            # In GB18030 every text has bytes; PACS that use it hold Chinese.
            if declared == "GB18030" and not any(map(_is_han, "".join(texts))):
                continue
            tried.add(whole)
            yield declared


def _is_single(raw: bytes) -> bool:
    # Half of a character may be the byte of a wildcard: some PACS match byte by byte.
    return not any(byte in b"*?\\" for byte in raw)


def _is_han(character: str) -> bool:
    return "\u3400" <= character <= "\u9fff"


def _as(encoding: str, raw: bytes) -> str | None:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        return None


def _any_extension() -> list[str]:
    return [f"ISO 2022 IR {number}" for number in (*_LOWER.values(), *_UPPER.values())]


def _extended(raw: bytes, terms: Sequence[str]) -> str:
    """Decode by one single-byte set, or by several with code extensions.

    Raises
    ------
    ValueError
        A term is unknown, or the bytes are not in these sets.
    """
    numbers = []
    for place, term in enumerate(terms):
        match = _TERM.fullmatch(term or "ISO_IR 6") if term or place == 0 else None
        if match is None:
            raise _Undecodable("a term is not known")
        numbers.append(match[1])
    first = numbers[0]
    upper_first = None if first == "6" else first
    lower, upper = "6", upper_first
    text: list[str] = []
    at = 0
    while at < len(raw):
        byte = raw[at]
        if byte == _ESCAPE:
            length, half, number = _designation(raw, at)
            if number not in numbers and number != "6":
                raise _Undecodable("an escape sequence names a set that is not declared")
            if half is _LOWER:
                lower = number
            else:
                upper = number
            at += length
        elif lower == "6" and byte < 0x80 or byte < 0x21:
            if byte in _DELIMITERS:
                # PS3.5 6.1.2.5.3: from a delimiter on it is the first value's set again.
                lower, upper = "6", upper_first or upper
            text.append(chr(byte))
            at += 1
        else:
            character, length = _character(raw[at : at + 2], lower if byte < 0x80 else upper)
            text.append(character)
            at += length
    return "".join(text)


def _designation(raw: bytes, at: int) -> tuple[int, dict[bytes, str], str]:
    for length in (2, 3):
        for half in (_LOWER, _UPPER):
            number = half.get(raw[at + 1 : at + 1 + length])
            if number is not None:
                return length + 1, half, number
    raise _Undecodable("an escape sequence is not one of DICOM's")


def _character(pair: bytes, number: str | None) -> tuple[str, int]:
    """Decode the character at the beginning of two bytes; returns it and its length in bytes."""
    if number in _SINGLE:
        return pair[:1].decode(_SINGLE[number]), 1
    if number == _KATAKANA:
        if not 0xA1 <= pair[0] <= 0xDF:
            raise _Undecodable("not in JIS X 0201")
        return chr(0xFF61 + pair[0] - 0xA1), 1
    # Python has the sets of two bytes in the upper half.
    high = bytes(byte | 0x80 for byte in pair)
    if number == _JIS:
        return high.decode("euc_jp"), 2
    if number == _JIS_SUPPLEMENT:
        return (b"\x8f" + high).decode("euc_jp"), 2
    if len(pair) < 2 or pair[1] < 0x80:
        raise _Undecodable("half of a character")
    if number == _KOREAN:
        return pair.decode("euc_kr"), 2
    if number == _CHINESE:
        return pair.decode("gb2312"), 2
    raise _Undecodable("no set for the upper half of a byte")


def _designated(text: str, escape: bytes, encoding: str) -> bytes:
    """Encode a text, designating the set after each delimiter where it is needed."""
    parts = []
    for part in re.split(r"([\\^=])", text):
        raw = part.encode(encoding)
        # Python has sequences of eight bytes for Korean syllables that the set lacks.
        if len(raw) != sum(1 if character.isascii() else 2 for character in part):
            raise UnicodeEncodeError(encoding, part, 0, len(part), "more than two bytes")
        parts.append(raw if part.isascii() else b"\x1b" + escape + raw)
    return b"".join(parts)
