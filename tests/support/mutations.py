"""Damage by lot: what goes wrong with bytes, and how a case of it is found again.

A case is a function of the seed, its section and its number alone.
"""

from __future__ import annotations

import contextlib
import gc
import random
import re
import struct
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from prefect_dicom.network.logging import configure_logging

_LENGTHS = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x100, 0xFFFE, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFE)
_LENGTHS += (0xFFFFFFFF,)
_LONGEST = 512 * 1024
GROWTH_BYTES = 64 * 1024**2


def damaged(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds, with one to five things done to it."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        rng.choice(_WAYS)(rng, data, seeds)
    return bytes(data[:_LONGEST])


def _place(rng: random.Random, data: bytearray) -> int:
    # Headers are where the decisions are made.
    return rng.randrange(min(len(data), rng.choice((64, 512, len(data)))) + 1) if data else 0


def _flip(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    for _ in range(rng.choice((1, 1, 4, 32))):
        if data:
            data[min(_place(rng, data), len(data) - 1)] ^= 1 << rng.randrange(8)


def _overwrite(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    at, size = _place(rng, data), rng.choice((1, 1, 2, 4, 16))
    filling = rng.choice((rng.randbytes(size), bytes(size), b"\xff" * size, b"\\" * size))
    data[at : at + size] = filling


def _lie(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    """About a length."""
    at = _place(rng, data)
    value = rng.choice((rng.choice(_LENGTHS), rng.randrange(2 * len(data) + 2)))
    size = rng.choice(("<H", ">H", "<I", ">I"))
    lie = struct.pack(size, value & (0xFFFF if size[1] == "H" else 0xFFFFFFFF))
    data[at : at + len(lie)] = lie


def _cut(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _remove(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    at = _place(rng, data)
    del data[at : at + rng.choice((1, 2, 4, 8, 100))]


def _insert(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    at = _place(rng, data)
    data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8, 100)))


def _repeat(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    at = _place(rng, data)
    piece = data[at : at + rng.choice((2, 8, 64, 512))]
    data[at:at] = piece * rng.choice((1, 2, 10, 200))


def _splice(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    other = rng.choice(seeds)
    start = rng.randrange(len(other) + 1)
    at = rng.randrange(len(data) + 1)
    data[at : at + rng.choice((0, len(data)))] = other[start : start + rng.choice((16, 1024, 9999))]


_WAYS = (_flip, _overwrite, _lie, _lie, _cut, _remove, _insert, _repeat, _splice)


class Fuzz:
    """Many cases, of which each may do only what is allowed, in time, in silence.

    Parameters
    ----------
    seed : int
        Of the run.
    section : str
        Part of every case's own seed.
    log : LogCaptureFixture
        In which nothing may appear.
    folder : Path
        Where the bytes of a case that failed are left.
    """

    def __init__(
        self, seed: int, section: str, log: pytest.LogCaptureFixture, folder: Path
    ) -> None:
        self.seed, self.section = seed, section
        self._log = log
        self._folder = folder

    def lots(self, count: int) -> Iterator[tuple[int, random.Random]]:
        """The number and the lot of each case, with the process's memory watched from the first."""
        print(f"{self.section}: seed {self.seed}, {count} cases")
        with _garbage_of_others_kept():
            yield -1, self._lot(-1)
            Path("/proc/self/clear_refs").write_text("5")
            before = _memory("VmRSS")
            for number in range(count):
                yield number, self._lot(number)
            growth = _memory("VmHWM") - before
        assert growth < GROWTH_BYTES, f"{growth} bytes of memory more"

    @contextlib.contextmanager
    def case(self, number: int, data: bytes, seconds: float = 2.0) -> Iterator[None]:
        """Fails with what is needed to find the case again."""
        self._log.clear()
        # Not by the clock on the wall: others use this machine too.
        began, waited = time.thread_time(), time.monotonic()
        try:
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                # As in a process that speaks DICOM.
                configure_logging()
                yield
            took = time.thread_time() - began
            assert took < seconds, f"took {took:.1f} s"
            assert time.monotonic() - waited < seconds + 30, "stood still"
            assert [str(w.message) for w in warned] == []
            assert [record.getMessage() for record in self._log.records] == []
        except Exception as error:
            left = self._folder / f"{self.section.replace(' ', '-')}-{self.seed}-{number}.bin"
            left.write_bytes(data)
            raise AssertionError(
                f"{self.section}: case {number} of --seed {self.seed}: "
                f"{type(error).__name__}: {error}; its bytes are in {left}"
            ) from error

    def _lot(self, number: int) -> random.Random:
        return random.Random(f"{self.seed}/{self.section}/{number}")


@contextlib.contextmanager
def _garbage_of_others_kept() -> Iterator[None]:
    """Keep the garbage collector from what was there before: its warnings are not a case's.

    A case with a thousand nested values is enough for a collection, and a socket that an earlier
    test left in a reference cycle then warns in the middle of that case.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _memory(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)[1]) * 1024
