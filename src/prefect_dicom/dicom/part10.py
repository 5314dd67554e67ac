"""Part 10 files: the file meta we put before what we receive, and a walk that trusts nothing.

:func:`file_meta` writes the preamble and group 2 (PS3.10 7.1) for a C-STORE request.
:func:`scan` walks the top-level elements of a file (PS3.5 chapter 7) by their headers alone and
compares every declared length with the bytes that are there, which general readers do not: a
file cut in its pixel data reads as a shorter image. It reads a few pages of a file of any
size, decodes no pixels, inflates nothing, and does not recurse.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Literal
from uuid import UUID

from prefect_dicom.core.errors import InstanceRejected
from prefect_dicom.core.model import Identity, StoreRequest
from prefect_dicom.core.uids import is_uid

IMPLEMENTATION_CLASS_UID = f"2.25.{UUID('6f1c7a52-3b0e-4d8a-9a57-0d1c0f8b2e64').int}"
"""Names this software in file meta and associations (PS3.7 D.3.3.2); never changes."""
IMPLEMENTATION_VERSION_NAME = "PREFECT_DICOM"

IMPLICIT_VR_LITTLE_ENDIAN = "1.2.840.10008.1.2"
EXPLICIT_VR_BIG_ENDIAN = "1.2.840.10008.1.2.2"
_IMPLICIT = {IMPLICIT_VR_LITTLE_ENDIAN, "1.2.840.10008.1.20"}
# The whole data set is deflated (PS3.5 A.5, A.7, A.11), not only its frames.
_DEFLATED = {
    "1.2.840.10008.1.2.1.99",
    "1.2.840.10008.1.2.4.95",
    "1.2.840.10008.1.2.4.205",
}
_STANDARD_SYNTAXES = "1.2.840.10008.1.2"

# PS3.5 7.1.2: these have a length of 16 bits; all others, future ones too, one of 32.
_SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_UNDEFINED = 0xFFFFFFFF
_ITEM_GROUP, _ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFE, 0xE000, 0xE00D, 0xE0DD
# PS3.5 7.1 has no elements in these; groups 0 and 2 are the command set and the file meta.
_SPECIAL_GROUPS = frozenset({0x0000, 0x0001, 0x0002, 0x0003, 0x0005, 0x0007, _ITEM_GROUP, 0xFFFF})

_FIRST_READ = 16 * 1024
_NEXT_READ = 4 * 1024
_LONGEST_VALUE = 64 * 1024
_LONGEST_ZERO_TAIL = 64 * 1024
_MOST_ELEMENTS = 100_000
_MOST_NESTED_HEADERS = 2_000_000

# How the elements of a nested data set are written; of those under UN, nobody can be sure.
_EXPLICIT_MODE, _IMPLICIT_MODE, _UNSURE_MODE = 0, 1, 2
_INSIDE_ITEM = 4


# --- writing

_UNSIGNED_LONG = Struct("<L")
_BEFORE_GROUP_LENGTH = bytes(128) + b"DICM" + b"\2\0\0\0UL\4\0"


def file_meta(request: StoreRequest) -> bytes:
    """Preamble, prefix and file meta information for a received object, PS3.10 7.1.

    A function of the request's SOP class, SOP instance and transfer syntax alone: the same
    object makes the same file whenever, by whomever and over whichever association it comes.

    Parameters
    ----------
    request : StoreRequest
        UIDs are written as they came, whatever they hold.

    Returns
    -------
    bytes
        Everything up to the first byte of the data set.
    """
    kind = request.sop_class_uid, request.transfer_syntax_uid
    # What a peer makes up is not worth remembering, and may be long.
    around = _around_instance if all(map(is_uid, kind)) else _around_instance.__wrapped__
    before, after = around(*kind)
    instance = _meta_element(0x0003, b"UI", _raw(request.sop_instance_uid))
    length = _UNSIGNED_LONG.pack(len(before) + len(instance) + len(after))
    return _BEFORE_GROUP_LENGTH + length + before + instance + after


@functools.lru_cache(maxsize=256)
def _around_instance(sop_class_uid: str, transfer_syntax_uid: str) -> tuple[bytes, bytes]:
    """The elements before and behind (0002,0003): the same for all objects of a kind."""
    before = _meta_element(0x0001, b"OB", b"\x00\x01")
    before += _meta_element(0x0002, b"UI", _raw(sop_class_uid))
    after = _meta_element(0x0010, b"UI", _raw(transfer_syntax_uid))
    after += _meta_element(0x0012, b"UI", _raw(IMPLEMENTATION_CLASS_UID))
    after += _meta_element(0x0013, b"SH", _raw(IMPLEMENTATION_VERSION_NAME))
    return before, after


def _meta_element(element: int, vr: bytes, value: bytes) -> bytes:
    if len(value) % 2:
        value += b" " if vr == b"SH" else b"\0"
    if vr in _SHORT_VRS and len(value) <= 0xFFFE:
        return Struct("<HH2sH").pack(0x0002, element, vr, len(value)) + value
    # PS3.5 6.2.2: a value too long for its own VR is written as UN.
    vr = vr if vr in _LONG_VRS else b"UN"
    return Struct("<HH2sxxL").pack(0x0002, element, vr, len(value)) + value


def _raw(text: str) -> bytes:
    try:
        return text.encode("latin-1", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


# --- reading


@dataclass(frozen=True, slots=True)
class PixelData:
    """The first pixel data element: (7FE0,0008), (7FE0,0009) or (7FE0,0010).

    ``length_bytes`` is None where it is encapsulated (PS3.5 A.4); ``fragments`` and
    ``fragment_bytes`` then count what follows the Basic Offset Table.
    """

    tag: int
    length_bytes: int | None
    fragments: int = 0
    fragment_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Structure:
    """What the headers of a data set say about its shape; None where an element is absent.

    ``requested_sop_class_uid`` comes from the file meta, which we wrote from the request.
    ``number_of_frames`` is 1 where it is absent, None where it holds no number.
    ``other_syntax`` is True where the elements are not written in the transfer syntax that the
    file meta declares; ``twice`` names fields of :class:`Identity` that occur again with another
    value; ``trailing_bytes`` are zeros behind the last element; ``complete`` is False where
    the walk was ended because there are more elements than anybody looks at.
    """

    requested_sop_class_uid: str | None = None
    rows: int | None = None
    columns: int | None = None
    samples_per_pixel: int | None = None
    bits_allocated: int | None = None
    number_of_frames: int | None = 1
    photometric_interpretation: str | None = None
    pixel_data: PixelData | None = None
    has_pixel_data_provider: bool = False
    has_spectroscopy_data: bool = False
    other_syntax: bool = False
    twice: frozenset[str] = frozenset()
    trailing_bytes: int = 0
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Scan:
    """What a file holds. With a ``fault``, what was read before it."""

    identity: Identity
    structure: Structure
    fault: InstanceRejected | None = None


def scan(path: Path) -> Scan:
    """Walk a Part 10 file from its first byte to its last.

    Raises
    ------
    InstanceRejected
        ``instance-unreadable`` or ``instance-truncated``; nothing else, whatever the bytes.
    OSError
        The file cannot be opened or read.
    """
    found = survey(path)
    if found.fault is not None:
        raise found.fault
    return found


def survey(path: Path) -> Scan:
    """As :func:`scan`, but a fault is part of the answer, beside what was read before it.

    A cut object still names the patient it belongs to, and has to be held to it.

    Raises
    ------
    OSError
        The file cannot be opened or read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        walk = _Walk(descriptor)
        _run(walk)
    finally:
        os.close(descriptor)
    return Scan(walk.identity(), walk.structure(), walk.fault)


def study_of(descriptor: int, data_set_at: int, transfer_syntax_uid: str) -> str | None:
    """The StudyInstanceUID of an open file that we have just written; None where none is read.

    The walk ends as soon as it is known, so that the cost of attribution does not grow with the
    number of frames.

    Parameters
    ----------
    descriptor : int
        Open for reading.
    data_set_at : int
        Where the data set begins, behind the file meta.
    transfer_syntax_uid : str
        What the file meta says.
    """
    walk = _Walk(descriptor, study_only=True)
    _run(walk, data_set_at, transfer_syntax_uid)
    return walk.study_instance_uid()


def _run(walk: _Walk, data_set_at: int | None = None, transfer_syntax_uid: str = "") -> None:
    try:
        if data_set_at is None:
            walk.run()
        else:
            walk.run_data_set(data_set_at, transfer_syntax_uid)
    except InstanceRejected as error:
        walk.fault = error
    except OSError:
        raise
    except Exception as error:
        # The walk is meant to have no way here; whoever sends the bytes may find one.
        walk.fault = InstanceRejected("instance-unreadable", type(error).__name__)


class _EnoughSeen(Exception):
    """The walk may end here."""


_IDENTITY_TAGS = {
    0x00080005: "specific_character_set",
    0x00080016: "sop_class_uid",
    0x00080018: "sop_instance_uid",
    0x00080060: "modality",
    0x00100020: "patient_id",
    0x0020000D: "study_instance_uid",
    0x0020000E: "series_instance_uid",
}
_SHAPE_TAGS = {
    0x00280002: "samples_per_pixel",
    0x00280004: "photometric_interpretation",
    0x00280008: "number_of_frames",
    0x00280010: "rows",
    0x00280011: "columns",
    0x00280100: "bits_allocated",
}
_PIXEL_TAGS = {0x7FE00008, 0x7FE00009, 0x7FE00010}
_PIXEL_DATA_PROVIDER_URL = 0x00287FE0
_SPECTROSCOPY_DATA = 0x56000020
_PRESENCE_TAGS = {_PIXEL_DATA_PROVIDER_URL, _SPECTROSCOPY_DATA}
_WANTED = frozenset({*_IDENTITY_TAGS, *_SHAPE_TAGS, *_PIXEL_TAGS, *_PRESENCE_TAGS})
_STUDY = 0x0020000D
_META_UIDS = {0x0002: "sop_class", 0x0003: "sop_instance", 0x0010: "transfer_syntax"}


class _Encoding:
    """The byte order of a data set, and what is looked up in it once per element.

    A header is read as three integers: the tag (in this order's own arrangement, the keys of
    ``wanted``), the two letters of the VR, and the two bytes behind them.
    """

    def __init__(self, byte_order: Literal["little", "big"]) -> None:
        sign = "<" if byte_order == "little" else ">"
        self.byte_order = byte_order
        self.header = Struct(sign + "LHH").unpack_from
        self.implicit_header = Struct(sign + "LL").unpack_from
        self.item_header = Struct(sign + "HHHH").unpack_from
        self.long = Struct(sign + "L").unpack_from
        self.group_shift = 0 if byte_order == "little" else 16
        self.short_vrs = frozenset(self.integer(vr) for vr in _SHORT_VRS)
        self.long_vrs = frozenset(self.integer(vr) for vr in _LONG_VRS)
        self._unknown_vr = self.integer(b"UN")
        self.wanted = {self._arranged(tag): tag for tag in _WANTED}
        self.study = {self._arranged(_STUDY): _STUDY}

    def integer(self, data: bytes) -> int:
        return int.from_bytes(data, self.byte_order)

    def is_vr(self, vr: int) -> bool:
        """Whether these may be the letters of a VR, of one not yet defined too."""
        letters = vr.to_bytes(2, self.byte_order)
        return letters.isalpha() and letters.isupper()

    def mode_under(self, vr: int) -> int:
        """How nested elements are written: implicit under UN, by PS3.5 6.2.2, but not by all."""
        return _UNSURE_MODE if vr == self._unknown_vr else _EXPLICIT_MODE

    def _arranged(self, tag: int) -> int:
        if self.byte_order == "big":
            return tag
        return (tag & 0xFFFF) << 16 | tag >> 16


_LITTLE_ENDIAN, _BIG_ENDIAN = _Encoding("little"), _Encoding("big")


class _Walk:
    """One pass over one file. ``at`` is always an offset in the file, an index in ``data``."""

    def __init__(self, descriptor: int, *, study_only: bool = False) -> None:
        self.fault: InstanceRejected | None = None
        self._descriptor = descriptor
        self._study_only = study_only
        self._size = os.fstat(descriptor).st_size
        self._data = os.pread(descriptor, _FIRST_READ, 0)
        self._base = 0
        self._meta: dict[str, str] = {}
        self._inspected = True
        self._other_syntax = False
        self._headers_left = _MOST_NESTED_HEADERS
        self._start()

    def _start(self) -> None:
        self._encoding = _LITTLE_ENDIAN
        self._values: dict[int, bytes] = {}
        self._twice: set[str] = set()
        self._pixels: PixelData | None = None
        self._trailing_bytes = 0
        self._complete = True

    # --- the whole file

    def run(self) -> None:
        at = self._file_meta()
        self.run_data_set(at, self._meta.get("transfer_syntax"))

    def run_data_set(self, at: int, syntax: str | None) -> None:
        if not syntax:
            raise _unreadable("the file meta names no transfer syntax")
        if syntax in _DEFLATED:
            self._inspected = False
            return
        big_endian = syntax == EXPLICIT_VR_BIG_ENDIAN
        declared = (syntax in _IMPLICIT, _BIG_ENDIAN if big_endian else _LITTLE_ENDIAN)
        standard = syntax.startswith(_STANDARD_SYNTAXES)
        seen = self._look_at_first_element(at, *declared)
        try:
            self._data_set(at, *seen)
        except InstanceRejected:
            if seen != declared and self._fits(at, *declared):
                return
            if not standard and 0x00080018 not in self._values:
                # Whatever a private syntax is, these are not its elements.
                self._start()
                self._inspected = False
                return
            self._other_syntax = standard and seen != declared
            raise
        self._other_syntax = standard and seen != declared

    def _fits(self, at: int, implicit: bool, encoding: _Encoding) -> bool:
        """Whether the file is whole in this encoding; if not, nothing has changed."""
        before = self.__dict__.copy()
        # What was spent on the first attempt stays spent: two attempts cost as much as one.
        del before["_headers_left"]
        self._start()
        try:
            self._data_set(at, implicit, encoding)
        except InstanceRejected:
            self.__dict__.update(before)
            return False
        return True

    def _file_meta(self) -> int:
        """Read group 2 and return where the data set begins.

        The group's own length is not used: it is missing or wrong more often than an element
        of group 2 follows the file meta.
        """
        if self._data[128:132] != b"DICM":
            raise _unreadable("no DICM prefix")
        header = Struct("<HH2sH").unpack_from
        at = 132
        while at < self._size:
            index = self._index(at, 8)
            if self._data[index : index + 2] != b"\x02\x00":
                break
            _, element, vr, length = header(self._data, index)
            if vr in _SHORT_VRS:
                at += 8
            elif vr in _LONG_VRS:
                index = self._index(at, 12)
                length = int.from_bytes(self._data[index + 8 : index + 12], "little")
                at += 12
            else:
                raise _unreadable("the file meta is not in Explicit VR Little Endian")
            if at + length > self._size:
                raise _truncated("in the file meta")
            name = _META_UIDS.get(element)
            if name is not None and name not in self._meta:
                self._meta[name] = _uid(self._value(at, length))
            at += length
        return at

    def _look_at_first_element(
        self, at: int, implicit: bool, encoding: _Encoding
    ) -> tuple[bool, _Encoding]:
        """Which encoding the data set is in, by its first element's group and VR."""
        if at >= self._size:
            raise _unreadable("no data set follows the file meta")
        index = self._index(at, 8)
        first = self._data[index : index + 8]
        group = encoding.integer(first[:2])
        if group >= 0x0100 and group & 0xFF == 0:
            # A data set begins in group 8, which reads 0800 in the other byte order.
            encoding = _LITTLE_ENDIAN if encoding is _BIG_ENDIAN else _BIG_ENDIAN
        vr = first[4:6]
        if vr in _SHORT_VRS or vr in _LONG_VRS:
            implicit = False
        elif not (vr.isalpha() and vr.isupper()):
            implicit = True
        return implicit, encoding

    # --- elements

    def _data_set(self, at: int, implicit: bool, encoding: _Encoding) -> None:
        self._encoding = encoding
        try:
            self._top_level(at, implicit)
        except _EnoughSeen:
            self._complete = False

    def _top_level(self, at: int, implicit: bool) -> None:
        # This loop is what a scan costs: names are local, and what can be judged when the
        # window moves, or of an element that stands out, is not asked of every element.
        encoding = self._encoding
        header, long = encoding.header, encoding.long
        wanted = encoding.study if self._study_only else encoding.wanted
        short_vrs, long_vrs = encoding.short_vrs, encoding.long_vrs
        implicit_header, group_shift = encoding.implicit_header, encoding.group_shift
        special_groups, vr = _SPECIAL_GROUPS, 0
        data, base = self._data, self._base
        index, last_header = at - base, len(data) - 12
        for _ in range(_MOST_ELEMENTS):
            if index > last_header:
                at = base + index
                if at == self._size:
                    return
                if at > self._size:
                    raise _truncated("an element is longer than what is left of the file")
                data, base, index = self._read(at), at, 0
                if len(data) < 8:
                    self._tail(at)
                    return
                # The last element of a file may be shorter than the longest header.
                last_header = max(len(data) - 12, 0)
            if implicit:
                tag, length = implicit_header(data, index)
                start = index + 8
                group = tag >> group_shift & 0xFFFF
                if group in special_groups and self._is_tail(base + index, group, length):
                    return
            else:
                tag, vr, length = header(data, index)
                if vr in short_vrs:
                    start = index + 8
                elif vr in long_vrs or encoding.is_vr(vr):
                    if len(data) - index < 12:
                        raise _truncated("in an element's header")
                    (length,) = long(data, index + 8)
                    start = index + 12
                else:
                    # A delimiter, what is no element, or an implicit one among explicit ones.
                    tag, length = implicit_header(data, index)
                    start = index + 8
                    group = tag >> group_shift & 0xFFFF
                    if group in special_groups and self._is_tail(base + index, group, length):
                        return
                    if length != _UNDEFINED and base + start + length > self._size:
                        raise _unreadable("an element without a VR")
            if length == _UNDEFINED:
                mode = _IMPLICIT_MODE if implicit else encoding.mode_under(vr)
                at, items, item_bytes = self._items(base + start, mode)
                if tag in wanted:
                    # The first item of encapsulated pixel data is the Basic Offset Table.
                    pixels = PixelData(wanted[tag], None, max(items - 1, 0), item_bytes)
                    self._keep_pixels(pixels)
                data, base = self._data, self._base
                index, last_header = at - base, len(data) - 12
                continue
            if tag in wanted:
                self._keep(wanted[tag], base + start, length)
            index = start + length
        raise _unreadable(f"more than {_MOST_ELEMENTS} elements")

    def _items(self, at: int, mode: int) -> tuple[int, int, int]:
        """Walk the items of a sequence of undefined length, or fragments, to their delimiter.

        Items of defined length are passed over as a whole. What is open is kept in a byte
        each: a file can nest as deep as it likes.

        Returns
        -------
        tuple of int
            Where the element behind begins; the number of items; bytes in all but the first
            of them, as far as they have a defined length.
        """
        encoding = self._encoding
        header, long = encoding.item_header, encoding.long
        short_vrs, long_vrs = encoding.short_vrs, encoding.long_vrs
        data, base = self._data, self._base
        index, last_header = at - base, len(data) - 14
        items = item_bytes = 0
        open_levels = bytearray((mode,))
        while open_levels:
            self._headers_left -= 1
            if self._headers_left < 0:
                raise _EnoughSeen
            if index > last_header:
                at = base + index
                if at > self._size:
                    raise _truncated("a sequence is longer than what is left of the file")
                data, base, index = self._read(at), at, 0
                if len(data) < 8:
                    raise _truncated("a sequence without its end")
                last_header = max(len(data) - 14, 0)
            level = open_levels[-1]
            group, element, vr, length = header(data, index)
            if group == _ITEM_GROUP:
                (length,) = long(data, index + 4)
                index += 8
                inside_item = level & _INSIDE_ITEM
                if element == _ITEM and not inside_item:
                    first_level = len(open_levels) == 1
                    if length == _UNDEFINED:
                        vr_of_first = data[index + 4 : index + 6]
                        open_levels.append(_INSIDE_ITEM | _mode_in_item(level, vr_of_first))
                    else:
                        index += length
                        if first_level and items:
                            item_bytes += length
                    items += first_level
                elif element == (_ITEM_END if inside_item else _SEQUENCE_END):
                    open_levels.pop()
                elif element == _SEQUENCE_END:
                    raise _truncated("an item without its end")
                elif element != _ITEM_END or length:
                    # (An item of defined length with a delimiter none the less is let pass.)
                    raise _unreadable("items out of place")
                continue
            if not level & _INSIDE_ITEM:
                raise _unreadable("a sequence holds something that is no item")
            implicit = level & _IMPLICIT_MODE
            if not implicit and vr in short_vrs:
                index += 8 + length
                continue
            if not implicit and (vr in long_vrs or encoding.is_vr(vr)):
                if len(data) - index < 12:
                    raise _truncated("in an element's header")
                (length,) = long(data, index + 8)
                index += 12
            else:
                (length,) = long(data, index + 4)
                index += 8
            if length != _UNDEFINED:
                index += length
            else:
                open_levels.append(_IMPLICIT_MODE if implicit else encoding.mode_under(vr))
        if base + index > self._size:
            raise _truncated("a sequence is longer than what is left of the file")
        return base + index, items, item_bytes

    def _is_tail(self, at: int, group: int, length: int) -> bool:
        """Whether the data set ends here, before something in a group that no element has."""
        if group == _ITEM_GROUP:
            # Some writers end a sequence of defined length with a delimiter too.
            if length:
                raise _unreadable("an item outside of a sequence")
            return False
        self._tail(at)
        return True

    def _tail(self, at: int) -> None:
        """Judge what cannot be an element: zeros are padding, anything else is a fault."""
        left = self._size - at
        if left <= _LONGEST_ZERO_TAIL and not any(os.pread(self._descriptor, left, at)):
            self._trailing_bytes = left
            return
        if left < 8:
            raise _truncated("in an element's header")
        raise _unreadable("an element in a group that cannot be")

    # --- values

    def _keep(self, tag: int, at: int, length: int) -> None:
        if at + length > self._size:
            raise _truncated("an element is longer than what is left of the file")
        if tag in _PIXEL_TAGS:
            self._keep_pixels(PixelData(tag, length))
            return
        value = self._value(at, length)
        first = self._values.setdefault(tag, value)
        if self._study_only:
            raise _EnoughSeen
        name = _IDENTITY_TAGS.get(tag)
        if name is not None and first.strip(b" \0") != value.strip(b" \0"):
            self._twice.add(name)

    def _keep_pixels(self, pixels: PixelData) -> None:
        if pixels.tag in _PIXEL_TAGS and self._pixels is None:
            self._pixels = pixels

    # --- bytes

    def _read(self, at: int) -> bytes:
        """Move the window to ``at``; fewer bytes than a header's only at the end of the file."""
        data = os.pread(self._descriptor, _NEXT_READ, at)
        self._data, self._base = data, at
        return data

    def _index(self, at: int, length: int) -> int:
        """Where ``at`` is in the window, moved so that ``length`` bytes follow."""
        index = at - self._base
        if index + length > len(self._data):
            if len(self._read(at)) < length:
                raise _truncated("in an element's header")
            index = 0
        return index

    def _value(self, at: int, length: int) -> bytes:
        length = min(length, _LONGEST_VALUE)
        index = at - self._base
        if index >= 0 and index + length <= len(self._data):
            return self._data[index : index + length]
        return os.pread(self._descriptor, length, at)

    # --- the answer

    def identity(self) -> Identity:
        values = self._values
        return Identity(
            self._meta.get("transfer_syntax", ""),
            _uid(values.get(0x00080016)),
            _uid(values.get(0x00080018)),
            _uid(values.get(0x0020000D)),
            _uid(values.get(0x0020000E)),
            _trimmed(values.get(0x00100020)),
            _text(values.get(0x00080005)),
            _text(values.get(0x00080060)),
            self._inspected,
            self._meta.get("sop_instance"),
        )

    def study_instance_uid(self) -> str | None:
        return _uid(self._values.get(_STUDY))

    def structure(self) -> Structure:
        values = self._values
        return Structure(
            self._meta.get("sop_class"),
            self._unsigned(0x00280010),
            self._unsigned(0x00280011),
            self._unsigned(0x00280002),
            self._unsigned(0x00280100),
            _integer_string(values.get(0x00280008, b"1")),
            _text(values.get(0x00280004)),
            self._pixels,
            _PIXEL_DATA_PROVIDER_URL in values,
            _SPECTROSCOPY_DATA in values,
            self._other_syntax,
            frozenset(self._twice),
            self._trailing_bytes,
            self._complete,
        )

    def _unsigned(self, tag: int) -> int | None:
        value = self._values.get(tag)
        return self._encoding.integer(value) if value is not None and len(value) == 2 else None


def _mode_in_item(level: int, vr: bytes) -> int:
    """How an item's elements are written, by the VR of its first one.

    PS3.5 6.2.2 has them implicit under UN; writers have done both, there and elsewhere.
    """
    if level == _IMPLICIT_MODE:
        return _IMPLICIT_MODE
    if vr in _SHORT_VRS or vr in _LONG_VRS:
        return _EXPLICIT_MODE
    return _EXPLICIT_MODE if level == _EXPLICIT_MODE and vr.isalpha() else _IMPLICIT_MODE


def _uid(value: bytes | None) -> str | None:
    return None if value is None else value.strip(b" \0").decode("ascii", "surrogateescape")


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.rstrip(b" \0").decode("latin-1")


def _trimmed(value: bytes | None) -> bytes | None:
    return None if value is None else value.rstrip(b" \0")


def _integer_string(value: bytes) -> int | None:
    """An IS of at most 12 characters (PS3.5 6.2); None for what is none."""
    digits = value.strip(b" \0")
    return int(digits) if digits.isdigit() and len(digits) <= 12 else None


def _unreadable(detail: str) -> InstanceRejected:
    return InstanceRejected("instance-unreadable", detail)


def _truncated(detail: str) -> InstanceRejected:
    return InstanceRejected("instance-truncated", detail)
