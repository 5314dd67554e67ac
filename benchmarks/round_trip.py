"""A peer that is far away: a relay that delays what passes, half of a round trip each way.

Bytes in flight do not wait for each other: a long line, not a thin one. It runs in a process of its
own, so that neither sender nor receiver waits for its interpreter.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from queue import SimpleQueue

_PIECE_BYTES = 256 * 1024
_processes = multiprocessing.get_context("spawn")


@contextlib.contextmanager
def at_a_round_trip(port: int, seconds: float) -> Iterator[int]:
    """A port on loopback that leads to ``port``, so many seconds away; the port itself for 0."""
    if not seconds:
        yield port
        return
    ours, theirs = _processes.Pipe()
    process = _processes.Process(target=_serve, args=(theirs, port, seconds / 2), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _serve(said: Connection, port: int, seconds: float) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        said.send(server.getsockname()[1])
        while True:
            near, _ = server.accept()
            far = socket.create_connection(("127.0.0.1", port))
            for one, other in ((near, far), (far, near)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                under_way: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
                for work in (_depart, _arrive):
                    thread = threading.Thread(
                        target=work, args=(one, other, under_way, seconds), daemon=True
                    )
                    thread.start()


def _depart(
    source: socket.socket,
    target: socket.socket,
    under_way: SimpleQueue[tuple[float, bytes]],
    seconds: float,
) -> None:
    piece = b""
    with contextlib.suppress(OSError):
        while piece := source.recv(_PIECE_BYTES):
            under_way.put((time.monotonic() + seconds, piece))
    under_way.put((time.monotonic() + seconds, b""))


def _arrive(
    source: socket.socket,
    target: socket.socket,
    under_way: SimpleQueue[tuple[float, bytes]],
    seconds: float,
) -> None:
    with contextlib.suppress(OSError):
        while True:
            due, piece = under_way.get()
            if (left := due - time.monotonic()) > 0:
                time.sleep(left)
            if not piece:
                break
            target.sendall(piece)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
