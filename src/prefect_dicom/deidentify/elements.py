"""Data elements of a Part 10 file as places in its bytes (PS3.5 chapter 7), read whole or not.

Nothing is decoded: an element knows where its header, value and end are, so that what is kept is
copied as it lies, pixel data among it. Sequences are read to any depth. What cannot be read with
certainty raises :class:`Unreadable`: a de-identifier must not guess where a value begins.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap
from struct import Struct
from struct import error as StructError

from pydicom.datadict import get_entry

from prefect_dicom.core.errors import InstanceRejected
from prefect_dicom.dicom.encoding import LONG_VRS, SHORT_VRS, UNDEFINED

Source = bytes | mmap
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
PIXEL_DATA = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
DEFLATED = "1.2.840.10008.1.2.1.99"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
_WHOLLY_COMPRESSED = frozenset({"1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205"})

_DEEPEST = 32
_LARGEST_INFLATED_BYTES = 1 << 30
_STANDARD_SYNTAXES = "1.2.840.10008.1.2"


class Unreadable(InstanceRejected):
    """The bytes are no data set that can be read from its beginning to its end."""

    def __init__(self, detail: str) -> None:
        super().__init__("deidentify-unreadable", detail)


class Encoding:
    """How the elements of a data set are encoded."""

    def __init__(self, *, implicit: bool, big_endian: bool = False) -> None:
        sign = ">" if big_endian else "<"
        self.implicit = implicit
        self.big_endian = big_endian
        self._tag = Struct(sign + "HH")
        self._short = Struct(sign + "HH2sH")
        self._long = Struct(sign + "HH2sxxL")
        self._plain = Struct(sign + "HHL")
        self.read_tag = self._tag.unpack_from
        self.read_plain = self._plain.unpack_from
        self.read_short = self._short.unpack_from
        self.read_long = Struct(sign + "L").unpack_from

    def header(self, tag: int, vr: bytes, length: int) -> bytes:
        """Header of an element. ``vr`` is not written where the encoding is implicit."""
        if self.implicit:
            return self._plain.pack(tag >> 16, tag & 0xFFFF, length)
        if vr in SHORT_VRS:
            return self._short.pack(tag >> 16, tag & 0xFFFF, vr, length)
        return self._long.pack(tag >> 16, tag & 0xFFFF, vr, length)

    def delimiter(self, tag: int, length: int = 0) -> bytes:
        """Header of an item, or a delimitation item."""
        return self._plain.pack(tag >> 16, tag & 0xFFFF, length)


IMPLICIT = Encoding(implicit=True)
EXPLICIT = Encoding(implicit=False)
BIG_ENDIAN = Encoding(implicit=False, big_endian=True)


@dataclass(slots=True)
class Item:
    """One item of a sequence."""

    elements: list[Element]
    undefined: bool


@dataclass(slots=True)
class Element:
    """One element, as offsets into the bytes it was read from."""

    tag: int
    vr: bytes
    """As encoded; from the dictionary where the encoding is implicit, ``UN`` if that lacks it."""
    start: int
    value_start: int
    value_end: int
    end: int
    items: list[Item] | None = None
    undefined: bool = False
    inner: Encoding | None = None
    """Encoding of its items, where they are not encoded as the element is."""

    @property
    def length(self) -> int:
        """Length of the value in bytes."""
        return self.value_end - self.value_start


@functools.lru_cache(maxsize=8192)
def dictionary_vrs(tag: int) -> tuple[bytes, ...]:
    """VRs of an attribute by the dictionary (PS3.6); empty where it is unknown."""
    try:
        entry = get_entry(tag)
    except KeyError:
        return ()
    return tuple(vr.encode() for vr in entry[0].split(" or "))


def effective_vr(element: Element) -> bytes:
    """VR of an element; the dictionary's where a sender has made it UN (PS3.5 6.2.2)."""
    known = dictionary_vrs(element.tag)
    return known[0] if element.vr == b"UN" and known else element.vr


@dataclass(frozen=True, slots=True)
class PartTen:
    """A Part 10 file, read."""

    data: Source
    """What the elements lie in; another object than the file where that was deflated."""
    transfer_syntax_uid: str
    """Of the file."""
    encoding: Encoding
    elements: list[Element]

    def value(self, element: Element) -> bytes:
        """Value of an element, as it lies there."""
        return self.data[element.value_start : element.value_end]

    def text(self, tag: int) -> str:
        """Value of a top-level element as text without padding; empty where it is absent."""
        for element in self.elements:
            if element.tag == tag:
                return self.value(element).decode("latin-1").strip(" \0")
        return ""


def read_part_ten(data: Source) -> PartTen:
    """Read a Part 10 file from its first byte to its last.

    Raises
    ------
    Unreadable
        Some of it cannot be read, or bytes follow its data set.
    """
    at, syntax = _file_meta(data)
    if syntax in _WHOLLY_COMPRESSED or not syntax.startswith(_STANDARD_SYNTAXES):
        raise Unreadable("its transfer syntax is not one whose elements can be read")
    if syntax == DEFLATED:
        data, at = _inflate(data, at), 0
    encoding = {IMPLICIT_LITTLE: IMPLICIT, EXPLICIT_BIG: BIG_ENDIAN}.get(syntax, EXPLICIT)
    try:
        elements = _Reader(data, encoding).data_set(at, len(data))
    except (StructError, IndexError):
        raise Unreadable("it ends within an element") from None
    return PartTen(data, syntax, encoding, elements)


def _file_meta(data: Source) -> tuple[int, str]:
    """Where the data set begins, and its transfer syntax."""
    if data[128:132] != b"DICM":
        raise Unreadable("no DICM prefix")
    at, syntax = 132, ""
    while data[at : at + 2] == b"\x02\0":
        vr = data[at + 4 : at + 6]
        if vr in SHORT_VRS:
            start, length = at + 8, int.from_bytes(data[at + 6 : at + 8], "little")
        elif vr in LONG_VRS:
            start, length = at + 12, int.from_bytes(data[at + 8 : at + 12], "little")
        else:
            raise Unreadable("the file meta is not in Explicit VR Little Endian")
        if data[at + 2 : at + 4] == b"\x10\0":
            syntax = data[start : start + length].decode("latin-1").strip(" \0")
        at = start + length
    if not syntax:
        raise Unreadable("the file meta names no transfer syntax")
    return at, syntax


def _inflate(data: Source, at: int) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(data[at:], _LARGEST_INFLATED_BYTES)
    except zlib.error:
        raise Unreadable("its deflated data set is damaged") from None
    if inflater.unconsumed_tail or not inflater.eof:
        raise Unreadable("its deflated data set is too large, or cut")
    return inflated


class _Reader:
    """Reads data sets of one encoding out of one source."""

    def __init__(self, data: Source, encoding: Encoding) -> None:
        self._data = data
        self._encoding = encoding

    def data_set(self, at: int, end: int) -> list[Element]:
        """Elements from ``at`` to ``end``, at the top level."""
        elements: list[Element] = []
        while at < end:
            if end - at < 8 or self._data[at : at + 8] == bytes(8):
                if self._data[at:end].strip(b" \0"):
                    raise Unreadable("bytes follow the data set")
                break
            element = self.element(at, end, self._encoding, 0)
            if element.tag >> 16 == 0xFFFE:
                raise Unreadable("a delimiter stands outside of a sequence")
            elements.append(element)
            at = element.end
        return elements

    def element(self, at: int, end: int, encoding: Encoding, depth: int) -> Element:
        """The element at ``at``, with the items of its sequence."""
        group, number = encoding.read_tag(self._data, at)
        tag = group << 16 | number
        if group == 0xFFFE:
            length = encoding.read_plain(self._data, at)[2]
            return Element(
                tag, b"", at, at + 8, at + 8 + (0 if length == UNDEFINED else length), at + 8
            )
        if encoding.implicit:
            length = encoding.read_plain(self._data, at)[2]
            vr, start = _implicit_vr(tag), at + 8
        else:
            _, _, vr, length = encoding.read_short(self._data, at)
            start = at + 8
            if vr in LONG_VRS:
                (length,) = encoding.read_long(self._data, at + 8)
                start = at + 12
            elif vr not in SHORT_VRS:
                raise Unreadable("an element has no known VR")
        if length == UNDEFINED:
            return self._undefined(
                Element(tag, vr, at, start, 0, 0, undefined=True), end, encoding, depth
            )
        if start + length > end:
            raise Unreadable("an element is longer than what is left")
        element = Element(tag, vr, at, start, start + length, start + length)
        if vr == b"SQ" and not group & 1:
            element.items = self._items(start, start + length, encoding, depth)
        elif vr == b"UN" and b"SQ" in dictionary_vrs(tag):
            # PS3.5 6.2.2: what a sender has made UN is in Implicit VR Little Endian.
            element.inner = IMPLICIT
            element.items = self._items(start, start + length, IMPLICIT, depth)
        return element

    def _undefined(self, element: Element, end: int, encoding: Encoding, depth: int) -> Element:
        """An element of undefined length: a sequence, or encapsulated pixel data."""
        if element.vr in (b"OB", b"OW") or element.tag in PIXEL_DATA:
            element.value_end = self._behind_fragments(element.value_start, end, encoding)
            element.end = element.value_end
            return element
        if element.vr not in (b"SQ", b"UN"):
            raise Unreadable("an element that is no sequence has an undefined length")
        if element.vr == b"UN" and not encoding.implicit:
            element.inner = IMPLICIT
        inner = element.inner or encoding
        element.items = []
        at = element.value_start
        for item, behind in self._items_from(at, end, inner, depth):
            if item is None:
                element.value_end, element.end = behind - 8, behind
                return element
            element.items.append(item)
        raise Unreadable("a sequence does not end")

    def _items(self, at: int, end: int, encoding: Encoding, depth: int) -> list[Item]:
        items = []
        for item, behind in self._items_from(at, end, encoding, depth):
            if item is None:
                if behind != end:
                    raise Unreadable("a sequence ends before its length")
                break
            items.append(item)
        return items

    def _items_from(
        self, at: int, end: int, encoding: Encoding, depth: int
    ) -> Iterator[tuple[Item | None, int]]:
        """Items and where each ends; None for the delimiter of the sequence."""
        if depth >= _DEEPEST:
            raise Unreadable("its sequences are too deep")
        while at < end:
            group, number, length = encoding.read_plain(self._data, at)
            tag = group << 16 | number
            at += 8
            if tag == SEQUENCE_END:
                yield None, at
                return
            if tag != ITEM:
                raise Unreadable("a sequence has something beside items")
            undefined = length == UNDEFINED
            item_end = end if undefined else at + length
            if item_end > end:
                raise Unreadable("an item is longer than its sequence")
            elements: list[Element] = []
            while at < item_end:
                element = self.element(at, item_end, encoding, depth + 1)
                at = element.end
                if element.tag == ITEM_END:
                    if not undefined:
                        raise Unreadable("an item ends before its length")
                    break
                if element.tag >> 16 == 0xFFFE:
                    raise Unreadable("a delimiter is out of place")
                elements.append(element)
            else:
                if undefined:
                    raise Unreadable("an item does not end")
            yield Item(elements, undefined), at

    def _behind_fragments(self, at: int, end: int, encoding: Encoding) -> int:
        while at < end:
            group, number, length = encoding.read_plain(self._data, at)
            tag = group << 16 | number
            at += 8
            if tag == SEQUENCE_END:
                return at
            if tag != ITEM or length == UNDEFINED or at + length > end:
                break
            at += length
        raise Unreadable("encapsulated pixel data does not end")


def _implicit_vr(tag: int) -> bytes:
    vrs = dictionary_vrs(tag)
    if vrs:
        return vrs[-1] if b"OW" in vrs else vrs[0]
    if tag >> 16 & 1 and 0x10 <= tag & 0xFFFF <= 0xFF:
        return b"LO"
    return b"UN"
