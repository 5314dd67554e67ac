"""A receiver in its process, a legitimate sender to it, and the means of a hostile peer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from prefect_dicom.config.site import Site
from prefect_dicom.config.tls import Tls
from prefect_dicom.config.tls_context import client_context
from prefect_dicom.core.model import StoreRequest
from prefect_dicom.dicom.part10 import file_meta
from prefect_dicom.network.dimse import Element, write_command
from prefect_dicom.network.storage_scp import ReceiverLease, running_receiver
from prefect_dicom.network.storage_scp.client import assignment_of
from prefect_dicom.network.storage_scp.process import LEDGER_VARIABLE
from tests.support import program
from tests.support.part10_objects import DEFLATED, element
from tests.support.peers import free_port
from tests.support.sites import until
from tests.support.wire import (
    CT,
    EXPLICIT,
    IMPLICIT,
    RELEASE_RQ,
    VERIFICATION,
    echo_message,
    message_pdus,
    read_command,
    unsigned_short,
)

OUR_ADDRESS, FOE_ADDRESS, STRANGE_ADDRESS = "127.0.0.1", "127.0.0.2", "127.0.0.9"
REQUESTED, REFERENCE, OURSELVES = "1.2.826.0.1.7", 1, "PREFECTDICOM"
PRIVATE_CLASS = "1.3.46.670589.11.0.0.12.1"
GROWTH_BYTES = 64 * 1024**2
ECHO_SECONDS = 1.0
ABORT, REJECT = b"\x07", b"\x03"
TURNED_AWAY = re.compile(
    r"WARNING:prefect_dicom\.network\.storage_scp\.turned_away:"
    r"an? (?:connection|association) from 127\.0\.0\.\d+(?: \([^\n]{1,16}\))? was "
    r"(?:refused, which is not in `allowed_senders`"
    r'|rejected, which called (?:"[^\n]{1,16}"|by no AE title)'
    r"|turned away: [ -~]{1,80})"
)
QUICK = {
    "negotiation_seconds": 1,
    "pdu_seconds": 1,
    "idle_seconds": 2,
    "message_seconds": 2,
}


# --- saying things byte by byte


def association_item(kind: int, data: bytes) -> bytes:
    return struct.pack(">BxH", kind, len(data)) + data


def proposed(context_id: int, abstract: bytes, *syntaxes: bytes) -> bytes:
    items = association_item(0x30, abstract)
    items += b"".join(association_item(0x40, syntax) for syntax in syntaxes)
    return association_item(0x20, bytes((context_id, 0, 0, 0)) + items)


USER_INFORMATION = association_item(
    0x50, association_item(0x51, bytes(4)) + association_item(0x52, b"1.2.3.4")
)
CONTEXTS = (
    proposed(1, VERIFICATION.encode(), IMPLICIT.encode())
    + proposed(3, CT.encode(), EXPLICIT.encode())
    + proposed(5, CT.encode(), DEFLATED.encode())
    + proposed(7, PRIVATE_CLASS.encode(), EXPLICIT.encode())
)


def request_of(
    called: bytes,
    calling: bytes = b"FOE",
    items: bytes = CONTEXTS,
    user: bytes = USER_INFORMATION,
    application: bytes = b"1.2.840.10008.3.1.1.1",
) -> bytes:
    """An A-ASSOCIATE-RQ of whatever bytes, PS3.8 9.3.2."""
    body = b"\0\1\0\0" + called[:16].ljust(16) + calling[:16].ljust(16) + bytes(32)
    body += association_item(0x10, application) + items + user
    return struct.pack(">BxI", 1, len(body)) + body


def data_set(sop: bytes, study: bytes = REQUESTED.encode(), patient: bytes = b"P", size: int = 256):
    def uid(value: bytes) -> bytes:
        return value + b"\0" * (len(value) % 2)

    return b"".join(
        (
            element(0x00080016, b"UI", uid(CT.encode())),
            element(0x00080018, b"UI", uid(sop)),
            element(0x00100020, b"LO", patient + b" " * (len(patient) % 2)),
            element(0x0020000D, b"UI", uid(study)),
            element(0x0020000E, b"UI", uid(study)),
            element(0x7FE00010, b"OW", bytes(size)),
        )
    )


def store(
    sop: bytes, data: bytes, *, context_id: int = 3, sop_class: bytes = CT.encode(), **more
) -> bytes:
    elements = {
        Element.AFFECTED_SOP_CLASS_UID: sop_class,
        Element.COMMAND_FIELD: 1,
        Element.MESSAGE_ID: 1,
        Element.PRIORITY: 0,
        Element.COMMAND_DATA_SET_TYPE: 1,
        Element.AFFECTED_SOP_INSTANCE_UID: sop,
        **more.get("elements", {}),
    }
    return message_pdus(context_id, write_command(elements), data, 16384)


def file_name(sop: str, data: bytes, sop_class: str = CT, syntax: str = EXPLICIT) -> str:
    """What the spool calls an instance."""
    meta = file_meta(StoreRequest(1, sop_class, sop, syntax))
    return hashlib.sha256(meta + data).hexdigest() + ".dcm"


def take(connection: socket.socket, count: int) -> bytes:
    taken = bytearray()
    while len(taken) < count:
        piece = connection.recv(count - len(taken))
        if not piece:
            raise ConnectionAbortedError(f"closed after {len(taken)} bytes of {count}")
        taken += piece
    return bytes(taken)


def take_pdu(connection: socket.socket) -> tuple[int, bytes]:
    kind, length = struct.unpack(">BxI", take(connection, 6))
    return kind, take(connection, length)


def take_status(connection: socket.socket) -> int | None:
    kind, body = take_pdu(connection)
    if kind != 4:
        raise ConnectionAbortedError(f"a PDU of type {kind}")
    return unsigned_short(read_command(body[6:]), Element.STATUS)


def push(connection: socket.socket, data: bytes, times: int = 1) -> bool:
    """Send as long as the receiver takes it; whether it took all."""
    try:
        for _ in range(times):
            connection.sendall(data)
    except OSError:
        return False
    return True


def until_closed(connection: socket.socket) -> bytes:
    said = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            said += piece
    connection.close()
    return bytes(said)


# --- the receiver, its legitimate sender and its foe


class Receiver:
    """The process under attack."""

    def __init__(self, folder: Path, tls: Tls | None = None, **deadlines: object) -> None:
        self.port = free_port()
        self.client_tls = tls and client_context(tls)
        """How its senders connect; None for plain DICOM."""
        self.title = f"TEST{self.port}"
        self.folder = folder
        self.spool = folder / "spool"
        self.spool.mkdir(mode=0o700)
        self.site = Site(
            nodes={"pacs": {"host": OUR_ADDRESS, "port": self.port, "called_ae_title": "ANY"}},
            receiver={
                "ae_title": self.title,
                "port": self.port,
                "allowed_senders": [OUR_ADDRESS, FOE_ADDRESS],
                "tls": tls or False,
            },
            archive={"directory": folder / "archive"},
            spool={"path": self.spool, "reserve_bytes": 0},
        )
        self._log = folder / "log"
        assignment = assignment_of(self.site)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*program("receiver_process"), json.dumps(deadlines)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, LEDGER_VARIABLE: assignment.ledger_url},
            )
        self._process.stdin.write(assignment.to_json().encode())
        self._process.stdin.close()
        until(lambda: self._process.poll() is not None or self._answers(), "the receiver is there")
        assert self._process.poll() is None, self._log.read_text()
        self.lease = ReceiverLease(self.site)
        self._stack = contextlib.ExitStack()
        studies = {REQUESTED: REFERENCE}
        self.message_id = self._stack.enter_context(
            self.lease.expecting(studies, OURSELVES)
        ).message_id
        self.wanted: set[str] = set()
        """The files that may lie in ready, by name."""

    def _answers(self) -> bool:
        found = running_receiver(self.site)
        if found is not None:
            found.close()
        return found is not None

    def remember(self) -> None:
        """What memory, threads and files are to return to."""
        self._proc("clear_refs").write_text("5")
        self._rss = self._status("VmRSS") * 1024
        self._threads = self._status("Threads")
        self._files = self.files()

    def stop(self) -> None:
        self._stack.close()
        self.lease.stop()
        self.lease.close()
        assert self._process.wait(30) == 0
        # What was promised for its lifetime holds for its end.
        assert list(self.spool.glob("incoming/*")) == []

    def _proc(self, name: str) -> Path:
        return Path(f"/proc/{self._process.pid}/{name}")

    def _status(self, name: str) -> int:
        return int(re.search(rf"^{name}:\s+(\d+)", self._proc("status").read_text(), re.M)[1])

    def files(self) -> int:
        return len(os.listdir(self._proc("fd")))

    def growth(self) -> int:
        """Bytes of memory at the highest, above the start."""
        return self._status("VmHWM") * 1024 - self._rss

    def quarantined(self) -> set[str]:
        return {path.name for path in self.spool.glob("quarantine/*.dcm")}

    def until_quarantined(self, name: str) -> None:
        """Wait for an instance: a large one gets its name when it is hashed, after the answer."""
        until(lambda: name in self.quarantined(), "the instance is in quarantine", 5)

    def check(self) -> None:
        """All that holds of the process and its spool when nobody is connected any more."""
        assert self._process.poll() is None, "the receiver has ended"
        until(lambda: self._status("Threads") <= self._threads, "threads are back", 5)
        until(lambda: self.files() <= self._files, "files are back", 5)
        until(lambda: not list(self.spool.glob("incoming/*")), "what was begun is gone", 5)
        assert self.growth() < GROWTH_BYTES
        # No write outside the spool, no traceback, no line without end or for every connection,
        # and nothing that a peer has said but its titles.
        lines = self._log.read_text().splitlines()
        assert len(lines) <= 60
        assert [line for line in lines if not TURNED_AWAY.fullmatch(line)] == []
        ours = {"receiver.sock", "receiver.lock", "receiver.starting"}
        ours |= {"incoming", "ready", "suspect", "quarantine"}
        assert {path.name for path in self.spool.iterdir()} <= ours
        assert {path.name for path in self.folder.iterdir()} <= {"spool", "log"}
        assert list(self.spool.glob("suspect/*")) == []
        assert [path.name for path in self.spool.glob("ready/*")] == [str(REFERENCE)]
        lies = {path.name for path in self.spool.glob(f"ready/{REFERENCE}/*")}
        assert lies == self.wanted
        apart = self.spool / "quarantine"
        assert all(re.fullmatch(r"[0-9a-f]{64}\.(dcm|json)", n) for n in os.listdir(apart))


class Legitimate(threading.Thread):
    """Stores requested instances, and asks for an echo on a new association, again and again."""

    def __init__(self, receiver: Receiver) -> None:
        super().__init__(daemon=True)
        self._receiver = receiver
        self._over = threading.Event()
        self._changed = threading.Condition()
        self.rounds = 0
        self.slowest = 0.0
        self.stalled = 0.0
        """How long this process waited for its turn, which no receiver can help."""
        self.failure: str | None = None

    def run(self) -> None:
        try:
            with self._associate() as sender:
                while not self._paused():
                    self._store(sender)
                    self._echo()
                    with self._changed:
                        self.rounds += 1
                        self._changed.notify_all()
                sender.sendall(RELEASE_RQ)
                assert take_pdu(sender)[0] == 6
        except (OSError, AssertionError) as error:
            with self._changed:
                self.failure = f"in round {self.rounds}: {error!r}"
                self._changed.notify_all()

    def _paused(self) -> bool:
        """Rest a little; True when it is over."""
        began = time.monotonic()
        over = self._over.wait(0.02)
        self.stalled = max(self.stalled, time.monotonic() - began - 0.02)
        return over

    def served(self, rounds: int) -> None:
        """Wait until it has been served so many times more."""
        with self._changed:
            last = self.rounds + rounds
            self._changed.wait_for(lambda: self.failure or self.rounds >= last, 30)
            assert self.failure is None, self.failure
            assert self.rounds >= last

    def end(self) -> None:
        self._over.set()
        self.join(30)
        assert not self.is_alive()

    def _associate(self) -> socket.socket:
        address = (OUR_ADDRESS, self._receiver.port)
        connection = socket.create_connection(address, 10, (OUR_ADDRESS, 0))
        if (tls := self._receiver.client_tls) is not None:
            connection = tls.wrap_socket(connection, server_hostname="localhost")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(request_of(self._receiver.title.encode(), b"LEGITIMATE"))
        kind, _ = take_pdu(connection)
        assert kind == 2, f"no association, but a PDU of type {kind}"
        return connection

    def _store(self, sender: socket.socket) -> None:
        wanted = self._receiver.wanted
        sop = f"1.2.826.0.1.7.1.{len(wanted)}"
        data = data_set(sop.encode())
        wanted.add(file_name(sop, data))
        sender.sendall(store(sop.encode(), data))
        assert take_status(sender) == 0x0000

    def _echo(self) -> None:
        began = time.monotonic()
        with self._associate() as connection:
            connection.sendall(echo_message())
            assert take_status(connection) == 0x0000
            self.slowest = max(self.slowest, time.monotonic() - began)
            connection.sendall(RELEASE_RQ)
            assert take_pdu(connection)[0] == 6


class Foe:
    """Connects, and forgets nothing until the end of the attack."""

    def __init__(
        self, receiver: Receiver, legitimate: Legitimate, many: Callable[[int, int], int]
    ) -> None:
        self.receiver = receiver
        self.legitimate = legitimate
        self.many = many
        """How many: by default, in the whole campaign."""
        self.stack = contextlib.ExitStack()

    def connect(self, source: str = FOE_ADDRESS) -> socket.socket:
        """A connection, with TLS where the receiver has it."""
        connection = self.connect_plain(source)
        if (tls := self.receiver.client_tls) is None:
            return connection
        return self.stack.enter_context(tls.wrap_socket(connection, server_hostname="localhost"))

    def connect_plain(self, source: str = FOE_ADDRESS) -> socket.socket:
        address = (OUR_ADDRESS, self.receiver.port)
        connection = self.stack.enter_context(
            socket.create_connection(address, 10, source_address=(source, 0))
        )
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def request(self, **parts: bytes) -> bytes:
        return request_of(self.receiver.title.encode(), **parts)

    def associate(self, **parts: bytes) -> socket.socket:
        connection = self.connect()
        connection.sendall(self.request(**parts))
        kind, _ = take_pdu(connection)
        assert kind == 2
        return connection


@contextlib.contextmanager
def attacked(receiver: Receiver, many) -> Iterator[Foe]:
    """The legitimate sender at work; at the end, what has to hold of it and of the receiver."""
    legitimate = Legitimate(receiver)
    legitimate.start()
    foe = Foe(receiver, legitimate, many)
    try:
        legitimate.served(1)
        with foe.stack:
            yield foe
            legitimate.served(2)
        legitimate.served(1)
    finally:
        legitimate.end()
    assert legitimate.failure is None, legitimate.failure
    assert legitimate.slowest < ECHO_SECONDS + legitimate.stalled
    receiver.check()


@contextlib.contextmanager
def running(folder: Path, tls: Tls | None = None, **deadlines: object) -> Iterator[Receiver]:
    receiver = Receiver(folder, tls, **deadlines)
    try:
        # What is loaded and allocated once belongs to the start.
        legitimate = Legitimate(receiver)
        legitimate.start()
        legitimate.served(20)
        legitimate.end()
        until(lambda: not list(receiver.spool.glob("incoming/*")), "it is quiet")
        receiver.remember()
        yield receiver
    finally:
        receiver.stop()


def client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="pacs")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()
