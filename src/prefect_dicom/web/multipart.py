"""A multipart body taken apart while its bytes arrive, RFC 2046 5.1.1.

A part is whole when the delimiter behind it has been read, and a body when its closing delimiter
has: without it the server, or something on the way, has stopped in the middle, whatever the status
said. Bytes are handed on as they lie in one buffer. What a header says of lengths is compared with
what came, and nothing is allocated by it.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

BUFFER_BYTES = 256 * 1024
MOST_HEADER_BYTES = 16 * 1024
"""Of one part."""
_MOST_PREAMBLE_BYTES = 64 * 1024
_MOST_PADDING_BYTES = 256
"""Blanks between a delimiter and the end of its line."""


class MultipartFault(Exception):
    """The bytes are no multipart body of RFC 2046; the text says why, without any of them."""


class Part(Protocol):
    """A part on its way to where it is kept."""

    def write(self, data: memoryview, /) -> object:
        """Take the next bytes; they are only valid during the call."""

    def complete(self) -> object:
        """The part is whole."""

    def abandon(self) -> object:
        """The part is not whole, and never will be."""


class _Delimiter(Enum):
    NEXT = auto()
    CLOSING = auto()
    NONE = auto()
    """What looked like a delimiter is data."""


class MultipartReader:
    """Reads one multipart body.

    Parameters
    ----------
    boundary : bytes
        From the Content-Type.
    read_into : callable
        Reads some of the body into a buffer; returns how many bytes, 0 at its end.
    begin : callable
        Begins a part, given its headers by their names in small letters.
    """

    def __init__(
        self,
        boundary: bytes,
        read_into: Callable[[memoryview], int],
        begin: Callable[[dict[str, str]], Part],
    ) -> None:
        self.parts = 0
        """Parts that were whole."""
        self.unequal = 0
        """Parts that had another length than their header said, and were abandoned."""
        self._delimiter = b"\r\n--" + boundary
        self._read_into = read_into
        self._begin = begin
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        # The first delimiter may stand at the very beginning, without the end of a line before it.
        self._buffer[:2] = b"\r\n"
        self._start, self._end = 0, 2

    def read(self) -> bool:
        """Read the body to its end.

        Returns
        -------
        bool
            Whether the closing delimiter came. What follows it is left unread.

        Raises
        ------
        MultipartFault
            It is no multipart body. Parts before the fault were complete.
        """
        skipped = 0

        def skip(data: memoryview) -> None:
            nonlocal skipped
            skipped += len(data)
            if skipped > _MOST_PREAMBLE_BYTES:
                raise MultipartFault("a preamble without end")

        delimiter = self._until_delimiter(skip)
        while delimiter is _Delimiter.NEXT:
            delimiter = self._part()
        return delimiter is _Delimiter.CLOSING

    def _part(self) -> _Delimiter | None:
        headers = self._headers()
        if headers is None:
            return None
        declared = _declared_length(headers)
        part = self._begin(headers)
        size = 0

        def write(data: memoryview) -> None:
            nonlocal size
            size += len(data)
            part.write(data)

        try:
            delimiter = self._until_delimiter(write)
        except BaseException:
            part.abandon()
            raise
        if delimiter is None:
            part.abandon()
        elif declared not in (None, size):
            self.unequal += 1
            part.abandon()
        else:
            part.complete()
            self.parts += 1
        return delimiter

    # --- delimiters

    def _until_delimiter(self, take: Callable[[memoryview], object]) -> _Delimiter | None:
        """Hand on what stands before the next delimiter; None where the body ends before it."""
        delimiter = self._delimiter
        while True:
            at = self._buffer.find(delimiter, self._start, self._end)
            if at < 0:
                # The first bytes of a delimiter may stand at the end.
                at = max(self._start, self._end - len(delimiter) + 1)
                self._hand_on(at, take)
                if not self._fill():
                    return None
                continue
            self._hand_on(at, take)
            kind = self._kind_of_delimiter()
            if kind is not _Delimiter.NONE:
                return kind
            self._hand_on(self._start + 1, take)

    def _hand_on(self, until: int, take: Callable[[memoryview], object]) -> None:
        if until > self._start:
            take(self._view[self._start : until])
            self._start = until

    def _kind_of_delimiter(self) -> _Delimiter | None:
        """Judge the delimiter at the start by what follows it, and step behind it."""
        at = len(self._delimiter)
        while True:
            if not self._has(at + 2):
                return None
            following = bytes(self._view[self._start + at : self._start + at + 2])
            if following == b"--" and at == len(self._delimiter):
                self._start += at + 2
                return _Delimiter.CLOSING
            if following == b"\r\n":
                # The end of the line is the beginning of the headers, which may be none.
                self._start += at
                return _Delimiter.NEXT
            if following[:1] not in (b" ", b"\t"):
                return _Delimiter.NONE
            at += 1
            if at > len(self._delimiter) + _MOST_PADDING_BYTES:
                return _Delimiter.NONE

    # --- headers

    def _headers(self) -> dict[str, str] | None:
        """The headers of a part; None where the body ends before they do."""
        while True:
            end = self._buffer.find(b"\r\n\r\n", self._start, self._end)
            size = (self._end if end < 0 else end) - self._start
            if size > MOST_HEADER_BYTES:
                raise MultipartFault("headers of a part without end")
            if end >= 0:
                break
            if not self._fill():
                return None
        lines = bytes(self._view[self._start : end]).decode("latin-1")
        self._start = end + 4
        headers: dict[str, str] = {}
        for line in lines.split("\r\n"):
            if not line:
                continue
            name, colon, value = line.partition(":")
            if not colon or name != name.strip() or not name:
                raise MultipartFault("a header of a part that is none")
            name = name.lower()
            if headers.setdefault(name, value.strip()) != value.strip():
                raise MultipartFault("a header of a part with two values")
        return headers

    # --- the buffer

    def _has(self, size: int) -> bool:
        """Read until so many bytes are there; False where the body ends before."""
        while self._end - self._start < size:
            if not self._fill():
                return False
        return True

    def _fill(self) -> bool:
        """Read some more; False at the end of the body."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == BUFFER_BYTES:
            kept = self._end - self._start
            self._view[:kept] = bytes(self._view[self._start : self._end])
            self._start, self._end = 0, kept
        size = self._read_into(self._view[self._end :])
        self._end += size
        return size > 0


def _declared_length(headers: dict[str, str]) -> int | None:
    text = headers.get("content-length")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise MultipartFault("a part with a length that is none")
    return int(text)
