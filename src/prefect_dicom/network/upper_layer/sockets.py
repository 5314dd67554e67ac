"""TCP options of every socket this package opens or accepts.

Peers built on DCMTK leave Nagle's algorithm on and write a message in several small segments;
the last one then waits for our acknowledgement, which the kernel delays by 40 ms: some twenty
instances a second, whatever the network. We acknowledge at once, and never make the peer wait in
the same way for what we send.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

_KEEPALIVE_IDLE_SECONDS = 60
_KEEPALIVE_INTERVAL_SECONDS = 15
_KEEPALIVE_PROBES = 4

_LISTENING = "0A"  # in /proc/net/tcp

# Linux only; elsewhere the kernel's own delay stays.
_QUICKACK = getattr(socket, "TCP_QUICKACK", None)


def prepare(connection: socket.socket) -> None:
    """Set the options of a connected socket: no delay, quick ACK, keepalive.

    Keepalive (after 60 s of silence, then 4 probes 15 s apart) finds connections a firewall has
    forgotten while a PACS thinks. Sockets that are not TCP are left as they are.
    """
    _set(connection, socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _set(connection, socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _KEEPALIVE_IDLE_SECONDS),
        ("TCP_KEEPINTVL", _KEEPALIVE_INTERVAL_SECONDS),
        ("TCP_KEEPCNT", _KEEPALIVE_PROBES),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            _set(connection, socket.IPPROTO_TCP, option, value)
    acknowledge(connection)


def acknowledge(connection: socket.socket) -> None:
    """Acknowledge what was received now. The kernel forgets the option: set it after reads."""
    if _QUICKACK is not None:
        _set(connection, socket.IPPROTO_TCP, _QUICKACK, 1)


def listening_process(port: int) -> str:
    """The process that listens on a port of this host, as "process 123 (name)"; else empty.

    Linux only, and only for processes that we may look at.
    """
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*") if sockets else ():
        with contextlib.suppress(OSError):
            if any(os.readlink(entry) in sockets for entry in (process / "fd").iterdir()):
                return f"process {process.name} ({(process / 'comm').read_text().strip()})"
    return ""


def _set(connection: socket.socket, level: int, option: int, value: int) -> None:
    # A peer may be gone already, a socket need not be TCP: the next read or write shows it.
    with contextlib.suppress(OSError):
        connection.setsockopt(level, option, value)
