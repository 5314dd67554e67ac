"""Multipart bodies: what is whole, what is not, and how they are taken apart as they arrive."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from prefect_dicom.web.content_type import parse_content_type
from prefect_dicom.web.multipart import (
    BUFFER_BYTES,
    MOST_HEADER_BYTES,
    MultipartFault,
    MultipartReader,
)

BOUNDARY = b"b0undary"


class Kept:
    """Where the parts of a test go: those that were whole, and how many were not."""

    def __init__(self) -> None:
        self.whole: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.abandoned = 0
        self._data = bytearray()

    def begin(self, headers: dict[str, str]) -> Kept:
        self.headers.append(headers)
        self._data = bytearray()
        return self

    def write(self, data: memoryview) -> None:
        self._data += data

    def complete(self) -> None:
        self.whole.append(bytes(self._data))

    def abandon(self) -> None:
        self.abandoned += 1


def body_of(*parts: bytes, headers: bytes = b"", closing: bytes = b"--\r\n") -> bytes:
    pieces = [b"--" + BOUNDARY + b"\r\n" + headers + b"\r\n" + part + b"\r\n" for part in parts]
    return b"".join(pieces) + b"--" + BOUNDARY + closing


def read(body: bytes, step: int = BUFFER_BYTES) -> tuple[bool, Kept]:
    """Read a body in steps of so many bytes; whether its closing delimiter came, and the parts."""
    kept, at = Kept(), 0

    def read_into(buffer: memoryview) -> int:
        nonlocal at
        some = body[at : at + min(step, len(buffer))]
        buffer[: len(some)] = some
        at += len(some)
        return len(some)

    reader = MultipartReader(BOUNDARY, read_into, kept.begin)
    whole = reader.read()
    assert reader.parts == len(kept.whole)
    return whole and not reader.unequal, kept


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, BUFFER_BYTES])
def test_parts_come_as_they_are_however_the_bytes_arrive(step):
    parts = [b"", b"one", b"\r\n", b"--" + BOUNDARY, b"\r\n--b0undar", bytes(range(256))]
    whole, kept = read(body_of(*parts), step)
    assert whole
    assert kept.whole == parts


def test_a_part_larger_than_the_buffer_is_written_in_pieces():
    part = random.Random(4).randbytes(3 * BUFFER_BYTES + 5)
    whole, kept = read(body_of(part, b"more"))
    assert (whole, kept.whole) == (True, [part, b"more"])


def test_nothing_is_whole_that_is_cut_at_any_byte():
    parts = [b"first part", b"second part"]
    body = body_of(*parts, headers=b"Content-Type: application/dicom\r\n")
    closed_from = body.rindex(b"--") + 2
    for cut in range(len(body)):
        whole, kept = read(body[:cut])
        assert whole == (cut >= closed_from), cut
        assert kept.whole == parts[: len(kept.whole)], "what was kept is whole"


def test_what_only_begins_like_the_delimiter_is_data():
    part = b"a\r\n--" + BOUNDARY + b"X\r\nb"
    assert read(body_of(part))[1].whole == [part]


def test_a_delimiter_may_be_followed_by_blanks():
    whole, kept = read(body_of(b"data", closing=b"  \t\r\n\r\nlast\r\n--" + BOUNDARY + b"--"))
    assert (whole, kept.whole) == (True, [b"data", b"last"])


def test_preamble_and_epilogue_are_left_out():
    body = b"preamble\r\n" + body_of(b"data") + b"epilogue --" + BOUNDARY
    assert read(body)[1].whole == [b"data"]


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"x" * 100_000 + body_of(b"data"), id="preamble without end"),
        pytest.param(
            b"--" + BOUNDARY + b"\r\nA: " + b"x" * (MOST_HEADER_BYTES + 10), id="header without end"
        ),
        pytest.param(body_of(b"data", headers=b"no header\r\n"), id="header that is none"),
        pytest.param(body_of(b"data", headers=b"Content-Length: -4\r\n"), id="length that is none"),
        pytest.param(body_of(b"data", headers=b"A: 1\r\nA: 2\r\n"), id="two values"),
    ],
)
def test_what_is_no_multipart_body_is_refused(body):
    with pytest.raises(MultipartFault):
        read(body)


@pytest.mark.parametrize("said", [3, 5, 10**17])
def test_a_part_of_another_length_than_it_says_is_not_kept(said):
    headers = f"Content-Length: {said}\r\n".encode()
    whole, kept = read(body_of(b"data", headers=headers))
    assert (whole, kept.whole, kept.abandoned) == (False, [], 1)


def test_a_length_that_is_right_is_no_fault():
    assert read(body_of(b"data", headers=b"content-length:4\r\n"))[1].whole == [b"data"]


@pytest.mark.parametrize(
    ("value", "boundary"),
    [
        ('multipart/related; type="application/dicom"; boundary="a b"', b"a b"),
        ("multipart/related; type=application/dicom; boundary=a=b", b"a=b"),
        ("Multipart/Related;BOUNDARY=x;", b"x"),
        ("multipart/related; boundary=" + 70 * "x", 70 * b"x"),
        ("multipart/related; boundary=" + 71 * "x", None),
        ('multipart/related; boundary="x "', None),
        ("multipart/related; boundary=x; boundary=y", None),
        ("multipart/related", None),
    ],
)
def test_boundaries_are_read_as_servers_write_them(value, boundary):
    found = parse_content_type(value)
    assert (found and found.boundary) == boundary


@pytest.mark.campaign("mutated multipart answers")
def test_mutated_bodies_are_never_accepted_as_what_they_are_not(scale, seed):
    """Whatever is done to a body: a part that is kept came between two delimiters of it."""
    lots, count = random.Random(seed), scale(2_000, 100_000)
    part_of = [lots.randbytes(lots.randrange(200)) for _ in range(20)]
    delimiter = b"\r\n--" + BOUNDARY
    tracemalloc.start()
    peaks = []
    for number in range(count):
        parts = lots.sample(part_of, lots.randrange(1, 4))
        declares = lots.random() < 0.5
        body = bytearray(b"")
        for part in parts:
            length = f"Content-Length: {len(part)}\r\n".encode() if declares else b""
            body += delimiter[0 if body else 2 :] + b"\r\n" + length + b"\r\n" + part
        body += delimiter + b"--\r\n"
        for _ in range(lots.randrange(1, 4)):
            _mutate(body, lots)
        try:
            whole, kept = read(bytes(body), lots.choice([1, 3, 17, BUFFER_BYTES]))
        except MultipartFault:
            continue
        framed = b"\r\n" + bytes(body)
        assert not whole or delimiter + b"--" in framed
        for data in kept.whole:
            assert b"\r\n\r\n" + data + delimiter in framed, "it stood between two delimiters"
            assert data == b"" or not _holds_delimiter(data, delimiter)
        if number in (count // 10, count - 1):
            peaks.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    if len(peaks) == 2:
        assert peaks[1] - peaks[0] < 100_000, "memory is flat"


def _holds_delimiter(data: bytes, delimiter: bytes) -> bool:
    return delimiter + b"\r\n" in data or delimiter + b"--" in data


def _mutate(body: bytearray, lots: random.Random) -> None:
    at = lots.randrange(len(body) + 1)
    match lots.randrange(6):
        case 0:
            del body[at:]
        case 1:
            del body[at : at + lots.randrange(1, 20)]
        case 2:
            body[at:at] = lots.randbytes(lots.randrange(1, 8))
        case 3:
            piece = lots.choice([b"\r\n", b"--", b"\r\n--" + BOUNDARY, b"\r\n\r\n", b"\r", b"-"])
            body[at:at] = piece
        case 4 if body:
            body[at % len(body)] = lots.randrange(256)
        case _:
            start = lots.randrange(len(body) + 1)
            body[at:at] = body[start : start + lots.randrange(1, 60)]
