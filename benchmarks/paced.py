"""A wire of a given speed in front of a PACS or of a receiver, which notes when it was idle.

PACS deliver 4 to 15 MB/s in real life. Every connection of a relay shares that rate, in one
direction; what goes the other way passes at once. Between two pieces that could have followed each
other without a pause, the PACS had nothing to send: it waited for a request, or for an answer.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import fmean

_PIECE_BYTES = 32 * 1024
_BUFFER_BYTES = 128 * 1024
"""Of the socket that the PACS sends into: a long one would hide what it waits for."""
_OBJECTS_BYTES = 100_000
"""A connection that carries more than this carries instances; queries carry less."""


@dataclass
class Wire:
    """What passes over a wire of so many bytes per second. Thread-safe."""

    bytes_per_second: float
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _free_at: float = 0.0
    _pieces: list[tuple[int, float, float, int]] = field(default_factory=list)
    _sent_at: dict[int, float] = field(default_factory=dict)
    _answered_at: dict[int, float] = field(default_factory=dict)
    _answers: list[float] = field(default_factory=list)
    _nexts: list[float] = field(default_factory=list)

    def carry(self, connection: int, size_bytes: int, ready_at: float) -> float:
        """Wait as long as a piece needs, behind those of other connections; returns its end.

        Parameters
        ----------
        ready_at : float
            When it was there to be sent. A relay that comes late for it, on a busy machine, is no
            PACS that has nothing to send.
        """
        with self._lock:
            begin = max(ready_at, self._free_at)
            until = self._free_at = begin + size_bytes / self.bytes_per_second
            self._pieces.append((connection, begin, until, size_bytes))
        if (left := until - time.perf_counter()) > 0:
            time.sleep(left)
        return until

    def gaps(self) -> tuple[float, list[tuple[float, float]]]:
        """Seconds from the first byte of an instance to the last, and the gaps between them.

        Each gap as its begin, in seconds from the first byte, and its length. What carries no
        instances is left out.
        """
        with self._lock:
            pieces = list(self._pieces)
        size: dict[int, int] = {}
        for connection, _, _, count in pieces:
            size[connection] = size.get(connection, 0) + count
        times = [(b, e) for c, b, e, _ in pieces if size[c] >= _OBJECTS_BYTES]
        if not times:
            return 0.0, []
        zero = times[0][0]
        found = [
            (end - zero, begin - end)
            for (_, end), (begin, _) in zip(times, times[1:], strict=False)
            if begin > end
        ]
        return times[-1][1] - zero, found

    def waits(self) -> tuple[float, float]:
        """Mean seconds from an instance's last byte to its answer, and from there to the next."""
        return fmean(self._answers or [0.0]), fmean(self._nexts or [0.0])

    def _answered(self, connection: int) -> None:
        """Something came back that is not paced."""
        if (sent := self._sent_at.pop(connection, None)) is not None:
            now = self._answered_at[connection] = time.perf_counter()
            self._answers.append(now - sent)

    def _ready(self, connection: int) -> float:
        """A piece has come that was waited for; returns when."""
        now = time.perf_counter()
        if (answered := self._answered_at.pop(connection, None)) is not None:
            self._nexts.append(now - answered)
        return now

    @contextlib.contextmanager
    def to(self, port: int, *, answers: bool) -> Iterator[int]:
        """A port on loopback that leads to ``port`` over this wire.

        Parameters
        ----------
        answers : bool
            Whether what comes back from ``port`` goes over the wire, and not what goes to it.
        """
        with socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            server.bind(("127.0.0.1", 0))
            server.listen(64)
            args = (server, port, answers)
            threading.Thread(target=self._serve, args=args, daemon=True).start()
            yield server.getsockname()[1]
            # Wakes the thread: closing a listening socket does not.
            server.shutdown(socket.SHUT_RDWR)

    def _serve(self, server: socket.socket, port: int, answers: bool) -> None:
        number = 0
        while True:
            try:
                near, _ = server.accept()
            except OSError:
                return
            far = socket.socket()
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            try:
                far.connect(("127.0.0.1", port))
            except OSError:
                near.close()
                continue
            number += 1
            for source, target, paced in ((near, far, not answers), (far, near, answers)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                args = (source, target, number, paced)
                threading.Thread(target=self._relay, args=args, daemon=True).start()

    def _relay(
        self, source: socket.socket, target: socket.socket, connection: int, paced: bool
    ) -> None:
        buffer = bytearray(_PIECE_BYTES)
        view = memoryview(buffer)
        ended_at = time.perf_counter()
        with contextlib.suppress(OSError):
            while True:
                try:
                    count = source.recv_into(buffer, 0, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    count = source.recv_into(buffer)
                    if paced:
                        ended_at = self._ready(connection)
                if not count:
                    break
                if not paced:
                    self._answered(connection)
                    target.sendall(view[:count])
                    continue
                ended_at = self.carry(connection, count, ended_at)
                target.sendall(view[:count])
                self._sent_at[connection] = time.perf_counter()
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
