"""A file read through a window, and what is read of encodings that are not as the standard has it.

What is odd and can be read all the same is read, and noted: it is no reason to be without the
object.
"""

from __future__ import annotations

import os
from struct import Struct

from prefect_dicom.core.errors import InstanceRejected
from prefect_dicom.dicom.encoding import (
    BIG_ENDIAN,
    ITEM,
    ITEM_GROUP,
    LITTLE_ENDIAN,
    LONG_VRS,
    SEQUENCE_END,
    SHORT_VRS,
    Encoding,
)

_FIRST_READ = 16 * 1024
_NEXT_READ = 4 * 1024
_LONGEST_VALUE = 64 * 1024
_LONGEST_TAIL = 64 * 1024
_LONGEST_SEARCH = 1024**2
_MOST_SEARCHES = 8
"""For the ends of private sequences that cannot be walked."""
_EXPLICIT_HEADER = Struct("<HH2sH")
_SEQUENCE_ENDS = (b"\xfe\xff\xdd\xe0\0\0\0\0", b"\xff\xfe\xe0\xdd\0\0\0\0")


class LenientFile:
    """An open file. ``at`` is an offset in the file, ``index`` one in the window."""

    def __init__(self, descriptor: int) -> None:
        self.size = os.fstat(descriptor).st_size
        self.data = os.pread(descriptor, _FIRST_READ, 0)
        self.base = 0
        self.encoding = LITTLE_ENDIAN
        self.searches_left = _MOST_SEARCHES
        self.has_inner_meta = False
        """Whether there is file meta at the head of the data set."""
        self.malformed = False
        """Whether an element was read that is not encoded as the standard has it."""
        self._descriptor = descriptor

    # --- bytes

    def read(self, at: int) -> bytes:
        """Move the window to ``at``; it is shorter than a header only at the end of the file."""
        self.data, self.base = os.pread(self._descriptor, _NEXT_READ, at), at
        return self.data

    def index(self, at: int, length: int) -> int:
        """Return the index of ``at`` in the window, moved so that ``length`` bytes follow."""
        index = at - self.base
        if index + length > len(self.data):
            if len(self.read(at)) < length:
                raise InstanceRejected("instance-truncated", "in an element's header")
            index = 0
        return index

    def value(self, at: int, length: int) -> bytes:
        """Return bytes of the file, without moving the window."""
        length = min(length, _LONGEST_VALUE)
        index = at - self.base
        if index >= 0 and index + length <= len(self.data):
            return self.data[index : index + length]
        return os.pread(self._descriptor, length, at)

    def is_padded(self, at: int, padding: bytes) -> bool:
        """Whether nothing follows but these bytes."""
        left = self.size - at
        return left <= _LONGEST_TAIL and not os.pread(self._descriptor, left, at).strip(padding)

    # --- what is not as the standard has it

    def behind_inner_meta(self, at: int) -> int:
        """Skip file meta at the head of a data set, which has none (PS3.10 7.1); explicit or not.

        Some senders send the file as it lies on their disk, or a part of its head.
        """
        if self.value(at + 128, 4) == b"DICM":
            at += 132
            self.has_inner_meta = True
        while at + 8 <= self.size and self.value(at, 2) == b"\x02\x00":
            _, _, vr, length = _EXPLICIT_HEADER.unpack(self.value(at, 8))
            start = at + (12 if vr in LONG_VRS else 8)
            if vr not in SHORT_VRS:
                length = int.from_bytes(self.value(start - 4, 4), "little")
            if start + length > self.size:
                raise InstanceRejected("instance-truncated", "in the file meta")
            at = start + length
            self.has_inner_meta = True
        return at

    def encoding_of_items(self, at: int) -> Encoding:
        """The byte order of a sequence's items: some writers swap those of private sequences."""
        other = LITTLE_ENDIAN if self.encoding is BIG_ENDIAN else BIG_ENDIAN
        head = self.value(at, 4)
        if len(head) < 4 or _tag(head, other) not in (
            ITEM_GROUP << 16 | ITEM,
            ITEM_GROUP << 16 | SEQUENCE_END,
        ):
            return self.encoding
        self.malformed = True
        return other

    def lenient(self, at: int, length: int) -> tuple[int, int]:
        """Where the value of an element without a VR begins, and how long it is.

        It is an implicit one among explicit ones; or its writer has put something else where it
        did not know the VR, with a length of 16 bits or of 32 behind it. What follows decides.

        Parameters
        ----------
        length : int
            Its length, if it is an implicit one.

        Raises
        ------
        InstanceRejected
            It is none of these.
        """
        head = self.value(at, 12)
        short, long = self.encoding.integer(head[6:8]), self.encoding.integer(head[8:12])
        if self._is_plausible_behind(at, at + 8 + length):
            return at + 8, length
        for start, odd_length in ((at + 8, short), (at + 12, long)):
            if self._is_plausible_behind(at, start + odd_length):
                self.malformed = True
                return start, odd_length
        if at + 8 + length > self.size:
            raise InstanceRejected("instance-unreadable", "an element without a VR")
        return at + 8, length

    def _is_plausible_behind(self, at: int, behind: int) -> bool:
        """Whether an element or the end can be at ``behind``, if there is one at ``at``."""
        if behind >= self.size:
            return behind == self.size
        head = self.value(behind, 8)
        if len(head) < 8:
            return not head.strip(b" \0")
        there = _tag(head, self.encoding)
        if there >> 16 == ITEM_GROUP:
            return True
        is_known = head[4:6] in SHORT_VRS or head[4:6] in LONG_VRS
        is_none = not head[4:6].isalpha()
        return there > _tag(self.value(at, 4), self.encoding) and (is_known or is_none)

    def end_of_private_sequence(self, at: int) -> int | None:
        """Where a private sequence ends whose items cannot be walked; None if that is not found."""
        self.searches_left -= 1
        if self.searches_left < 0:
            return None
        data = os.pread(self._descriptor, _LONGEST_SEARCH, at)
        for end in _SEQUENCE_ENDS:
            found = data.find(end)
            while found >= 0:
                behind = at + found + len(end)
                if self._is_plausible_behind(at - 12, behind):
                    return behind
                found = data.find(end, found + 1)
        return None


def _tag(head: bytes, encoding: Encoding) -> int:
    return encoding.integer(head[:2]) << 16 | encoding.integer(head[2:4])
