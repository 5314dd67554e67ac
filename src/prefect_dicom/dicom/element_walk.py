"""Walk over the elements of a Part 10 file by their headers alone (PS3.5 chapter 7).

It reads a few pages of a file of any size, decodes no pixels, inflates nothing and never recurses.
"""

from __future__ import annotations

from struct import Struct

from prefect_dicom.core.errors import InstanceRejected
from prefect_dicom.core.model import Identity
from prefect_dicom.dicom.encoding import (
    BIG_ENDIAN,
    BLANK_GROUP,
    IDENTITY_TAGS,
    IMPLICIT_MODE,
    INSIDE_ITEM,
    ITEM,
    ITEM_END,
    ITEM_GROUP,
    LITTLE_ENDIAN,
    LONG_VRS,
    PIXEL_DATA_PROVIDER_URL,
    PIXEL_TAGS,
    SEQUENCE_END,
    SHORT_VRS,
    SPECIAL_GROUPS,
    SPECTROSCOPY_DATA,
    STUDY_INSTANCE_UID,
    UNDEFINED,
    Encoding,
    mode_in_item,
)
from prefect_dicom.dicom.lenient_file import LenientFile
from prefect_dicom.dicom.structure import PixelData, Structure

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
_META_UIDS = {0x0002: "sop_class", 0x0003: "sop_instance", 0x0010: "transfer_syntax"}

_MOST_ELEMENTS = 100_000
_MOST_NESTED_HEADERS = 2_000_000


_EXPLICIT_HEADER = Struct("<HH2sH")
_SWAPPED_ITEM_GROUP = 0xFEFF


class WalkEnded(Exception):
    """Ends the walk before the end of the file."""


class ElementWalk(LenientFile):
    """One pass over one file. ``at`` is an offset in the file, ``index`` one in the window."""

    def __init__(self, descriptor: int, *, study_only: bool = False) -> None:
        self.fault: InstanceRejected | None = None
        super().__init__(descriptor)
        self._study_only = study_only
        self._meta: dict[str, str] = {}
        self._inspected = True
        self._other_syntax = False
        self._headers_left = _MOST_NESTED_HEADERS
        self._start()

    def _start(self) -> None:
        self.encoding = LITTLE_ENDIAN
        self._values: dict[int, bytes] = {}
        self._twice: set[str] = set()
        self._pixels: PixelData | None = None
        self._trailing_bytes = 0
        self._complete = True
        self.malformed = False

    # --- the whole file

    def run(self) -> None:
        """Walk the whole file."""
        at = self._file_meta()
        self.run_data_set(at, self._meta.get("transfer_syntax"))

    def run_data_set(self, at: int, syntax: str | None) -> None:
        """Walk the data set from offset ``at``, in the encoding of a transfer syntax or another."""
        if not syntax:
            raise _unreadable("the file meta names no transfer syntax")
        if syntax in _DEFLATED:
            self._inspected = False
            return
        at = self.behind_inner_meta(at)
        big_endian = syntax == EXPLICIT_VR_BIG_ENDIAN
        declared = (syntax in _IMPLICIT, BIG_ENDIAN if big_endian else LITTLE_ENDIAN)
        standard = syntax.startswith(_STANDARD_SYNTAXES)
        seen = self._look_at_first_element(at, *declared)
        try:
            self._data_set(at, *seen)
        except InstanceRejected:
            if seen != declared and self._fits(at, *declared):
                return
            if not standard and 0x00080018 not in self._values:
                # Of a private syntax; these are not its elements.
                self._start()
                self._inspected = False
                return
            self._other_syntax = standard and seen != declared
            raise
        self._other_syntax = standard and seen != declared

    def _fits(self, at: int, implicit: bool, encoding: Encoding) -> bool:
        """Try another encoding; if the file is not whole in it, the state is restored."""
        before = self.__dict__.copy()
        # The limit on headers is shared: two attempts cost as much as one.
        del before["_headers_left"], before["searches_left"]
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
        if self.data[128:132] != b"DICM":
            raise _unreadable("no DICM prefix")
        header = _EXPLICIT_HEADER.unpack_from
        at, last = 132, -1
        while at < self.size:
            index = self.index(at, 8)
            if self.data[index : index + 2] != b"\x02\x00":
                break
            _, element, vr, length = header(self.data, index)
            known = vr in SHORT_VRS or vr in LONG_VRS
            if "transfer_syntax" in self._meta and (element <= last or not known):
                # The sender has put some into its data set as well.
                break
            last = element
            if vr in SHORT_VRS:
                at += 8
            elif vr in LONG_VRS:
                index = self.index(at, 12)
                length = int.from_bytes(self.data[index + 8 : index + 12], "little")
                at += 12
            else:
                raise _unreadable("the file meta is not in Explicit VR Little Endian")
            if at + length > self.size:
                raise _truncated("in the file meta")
            name = _META_UIDS.get(element)
            if name is not None and name not in self._meta:
                self._meta[name] = _uid(self.value(at, length)) or ""
            at += length
        return at

    def _look_at_first_element(
        self, at: int, implicit: bool, encoding: Encoding
    ) -> tuple[bool, Encoding]:
        """Return the encoding of the data set by its first element's group and VR."""
        if at >= self.size:
            raise _unreadable("no data set follows the file meta")
        index = self.index(at, 8)
        first = self.data[index : index + 8]
        group = encoding.integer(first[:2])
        if group >= 0x0100 and group & 0xFF == 0:
            # A data set begins in group 8, which reads 0800 in the other byte order.
            encoding = LITTLE_ENDIAN if encoding is BIG_ENDIAN else BIG_ENDIAN
        vr = first[4:6]
        if vr in SHORT_VRS or vr in LONG_VRS:
            implicit = False
        elif not (vr.isalpha() and vr.isupper()):
            implicit = True
        return implicit, encoding

    # --- elements

    def _data_set(self, at: int, implicit: bool, encoding: Encoding) -> None:
        self.encoding = encoding
        try:
            self._top_level(at, implicit)
        except WalkEnded:
            self._complete = False

    def _top_level(self, at: int, implicit: bool) -> None:
        # This loop is what a scan costs: names are local, and what can be judged when the
        # window moves, or of an element that stands out, is not checked per element.
        encoding = self.encoding
        header, long = encoding.header, encoding.long
        wanted = encoding.study if self._study_only else encoding.wanted
        short_vrs, long_vrs = encoding.short_vrs, encoding.long_vrs
        implicit_header, group_shift = encoding.implicit_header, encoding.group_shift
        special_groups, vr, tag = SPECIAL_GROUPS, 0, 0
        data, base = self.data, self.base
        index, last_header = at - base, len(data) - 12
        for _ in range(_MOST_ELEMENTS):
            if index > last_header:
                at = base + index
                if at == self.size:
                    return
                if at > self.size:
                    raise _truncated("an element is longer than what is left of the file")
                data, base, index = self.read(at), at, 0
                if len(data) < 8:
                    self._tail(at, tag >> group_shift & 0xFFFF)
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
                    if length != UNDEFINED and group != ITEM_GROUP:
                        start, length = self.lenient(base + index, length)
                        start -= base
            if length == UNDEFINED:
                mode = IMPLICIT_MODE if implicit else encoding.mode_under(vr)
                group = tag >> group_shift & 0xFFFF
                at, items, item_bytes = self._sequence(base + start, mode, group)
                if tag in wanted:
                    # The first item of encapsulated pixel data is the Basic Offset Table.
                    pixels = PixelData(wanted[tag], None, max(items - 1, 0), item_bytes)
                    self._keep_pixels(pixels)
                data, base = self.data, self.base
                index, last_header = at - base, len(data) - 12
                continue
            if tag in wanted:
                self._keep(wanted[tag], base + start, length)
            index = start + length
        raise _unreadable(f"more than {_MOST_ELEMENTS} elements")

    def _sequence(self, at: int, mode: int, group: int) -> tuple[int, int, int]:
        """Walk a sequence of undefined length; a private one that cannot be is passed over.

        Returns what :meth:`_items` does.
        """
        try:
            return self._items(at, mode)
        except InstanceRejected:
            end = self.end_of_private_sequence(at) if group % 2 else None
            if end is None:
                raise
            self.malformed = True
            self.read(end)
            return end, 0, 0

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
        encoding = self.encoding_of_items(at)
        header, long = encoding.item_header, encoding.long
        short_vrs, long_vrs = encoding.short_vrs, encoding.long_vrs
        data, base = self.data, self.base
        index, last_header = at - base, len(data) - 14
        items = item_bytes = 0
        open_levels = bytearray((mode,))
        while open_levels:
            self._headers_left -= 1
            if self._headers_left < 0:
                raise WalkEnded
            if index > last_header:
                at = base + index
                if at > self.size:
                    raise _truncated("a sequence is longer than what is left of the file")
                data, base, index = self.read(at), at, 0
                if len(data) < 8:
                    raise _truncated("a sequence without its end")
                last_header = max(len(data) - 14, 0)
            level = open_levels[-1]
            group, element, vr, length = header(data, index)
            if group == _SWAPPED_ITEM_GROUP and encoding is not self.encoding:
                # The items are swapped, and what ends them is not.
                group, element = ITEM_GROUP, element >> 8 | (element & 0xFF) << 8
            if group == ITEM_GROUP:
                (length,) = long(data, index + 4)
                index += 8
                inside_item = level & INSIDE_ITEM
                if element == ITEM and not inside_item:
                    first_level = len(open_levels) == 1
                    if length == UNDEFINED:
                        vr_of_first = data[index + 4 : index + 6]
                        open_levels.append(INSIDE_ITEM | mode_in_item(level, vr_of_first))
                    else:
                        index += length
                        if first_level and items:
                            item_bytes += length
                    items += first_level
                elif element == (ITEM_END if inside_item else SEQUENCE_END):
                    open_levels.pop()
                elif element == SEQUENCE_END:
                    raise _truncated("an item without its end")
                elif element != ITEM_END or length:
                    # (An item of defined length may have a delimiter all the same.)
                    raise _unreadable("items out of place")
                continue
            if not level & INSIDE_ITEM:
                raise _unreadable("a sequence holds something that is no item")
            implicit = level & IMPLICIT_MODE
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
                start = base + index + 8
                if not implicit and length != UNDEFINED:
                    start, length = self.lenient(base + index, length)
                index = start - base
            if length != UNDEFINED:
                index += length
            else:
                open_levels.append(IMPLICIT_MODE if implicit else encoding.mode_under(vr))
        if base + index > self.size:
            raise _truncated("a sequence is longer than what is left of the file")
        return base + index, items, item_bytes

    def _is_tail(self, at: int, group: int, length: int) -> bool:
        """Whether the data set ends here, before a group that no element has."""
        if group == ITEM_GROUP:
            # Some writers end a sequence of defined length with a delimiter too.
            if length:
                raise _unreadable("an item outside of a sequence")
            return False
        if group != BLANK_GROUP:
            self._tail(at, group)
            return True
        is_padding = self.is_padded(at, b" \0")
        if is_padding:
            self._trailing_bytes = self.size - at
        return is_padding

    def _tail(self, at: int, last_group: int) -> None:
        """Check bytes that cannot be an element: zeros and blanks are padding, others a fault.

        Blanks may also be the head of an element of group 0020, which has been cut.
        """
        padding = b" \0" if last_group > 0x0020 else b"\0"
        if self.is_padded(at, padding):
            self._trailing_bytes = self.size - at
            return
        if self.size - at < 8:
            raise _truncated("in an element's header")
        raise _unreadable("an element in a group that cannot be")

    # --- values

    def _keep(self, tag: int, at: int, length: int) -> None:
        if at + length > self.size:
            raise _truncated("an element is longer than what is left of the file")
        if tag in PIXEL_TAGS:
            self._keep_pixels(PixelData(tag, length))
            return
        value = self.value(at, length)
        first = self._values.setdefault(tag, value)
        if self._study_only:
            raise WalkEnded
        name = IDENTITY_TAGS.get(tag)
        if name is not None and first.strip(b" \0") != value.strip(b" \0"):
            self._twice.add(name)

    def _keep_pixels(self, pixels: PixelData) -> None:
        if pixels.tag in PIXEL_TAGS and self._pixels is None:
            self._pixels = pixels

    # --- the result

    def identity(self) -> Identity:
        """Return the identifying attributes read so far."""
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
        """Return the StudyInstanceUID, if it was read."""
        return _uid(self._values.get(STUDY_INSTANCE_UID))

    def structure(self) -> Structure:
        """Return the attributes of the shape read so far."""
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
            PIXEL_DATA_PROVIDER_URL in values,
            SPECTROSCOPY_DATA in values,
            self._other_syntax,
            frozenset(self._twice),
            self._trailing_bytes,
            self._complete,
            frozenset(
                code
                for code, is_so in (
                    ("file-meta-inside", self.has_inner_meta),
                    ("element-malformed", self.malformed),
                )
                if is_so
            ),
        )

    def _unsigned(self, tag: int) -> int | None:
        value = self._values.get(tag)
        return self.encoding.integer(value) if value is not None and len(value) == 2 else None


def _uid(value: bytes | None) -> str | None:
    return None if value is None else value.strip(b" \0").decode("ascii", "surrogateescape")


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.rstrip(b" \0").decode("latin-1")


def _trimmed(value: bytes | None) -> bytes | None:
    return None if value is None else value.rstrip(b" \0")


def _integer_string(value: bytes) -> int | None:
    """Return an IS of at most 12 characters (PS3.5 6.2); None if it is none."""
    digits = value.strip(b" \0")
    return int(digits) if digits.isdigit() and len(digits) <= 12 else None


def _unreadable(detail: str) -> InstanceRejected:
    return InstanceRejected("instance-unreadable", detail)


def _truncated(detail: str) -> InstanceRejected:
    return InstanceRejected("instance-truncated", detail)
