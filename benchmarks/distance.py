"""A store that is far away: a relay in front of it that keeps every answer for a while.

It delays, and hardly works: a far store costs a site waiting and no processor, so that stages
can overlap on a machine whose processors are busy with a PACS and a store of its own.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

_PIECE_BYTES = 256 * 1024


@contextlib.contextmanager
def at_a_distance(port: int, seconds: float) -> Iterator[int]:
    """A port on loopback that leads to ``port``; answers take so many seconds longer."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        threading.Thread(target=_serve, args=(server, port, seconds), daemon=True).start()
        yield server.getsockname()[1]
        # Wakes the thread: closing a listening socket does not.
        server.shutdown(socket.SHUT_RDWR)


def _serve(server: socket.socket, port: int, seconds: float) -> None:
    while True:
        try:
            near, _ = server.accept()
        except OSError:
            return
        far = socket.create_connection(("127.0.0.1", port))
        for one, other, delay in ((near, far, 0.0), (far, near, seconds)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_relay, args=(one, other, delay), daemon=True).start()


def _relay(source: socket.socket, target: socket.socket, seconds: float) -> None:
    buffer = bytearray(_PIECE_BYTES)
    view = memoryview(buffer)
    with contextlib.suppress(OSError):
        while count := source.recv_into(buffer):
            if seconds:
                time.sleep(seconds)
            target.sendall(view[:count])
    for one in (source, target):
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
