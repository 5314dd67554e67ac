"""Whatever hostile peers do to the receiver, a legitimate sender is served all the while.

The receiver runs in its process, as at a site. While each attack goes on a legitimate sender
stores requested objects on one association and asks C-ECHO on new ones, each answered within a
second. Afterwards the process is as it was: memory, threads, open files; it has written nothing
outside its spool, and of what nobody asked for nothing has got past quarantine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import select
import socket
import ssl
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefect_dicom.config.site import Site
from prefect_dicom.core.model import StoreRequest, Verdict
from prefect_dicom.dicom.part10 import file_meta
from prefect_dicom.network.dimse import Element, write_command
from prefect_dicom.network.storage_scp import ReceiverLease, running_receiver
from prefect_dicom.network.storage_scp.client import assignment_of
from prefect_dicom.testing import Behaviour, tiny_instances
from prefect_dicom.testing.instances import StoredInstance, decoded, encoded
from prefect_dicom.testing.sending import StoreAssociation, context_key
from tests.support import program
from tests.support.campaign import subset
from tests.support.part10_objects import DEFLATED, element
from tests.support.peers import free_port
from tests.support.sites import site_around, until
from tests.support.wire import (
    CT,
    EXPLICIT,
    IMPLICIT,
    RELEASE_RQ,
    VERIFICATION,
    echo_message,
    message_pdus,
    pdu,
    pdv,
    read_command,
    tool,
    unsigned_short,
)

pytestmark = [pytest.mark.campaign("hostile peers"), pytest.mark.timeout(900)]

OUR_ADDRESS, FOE_ADDRESS, STRANGE_ADDRESS = "127.0.0.1", "127.0.0.2", "127.0.0.9"
REQUESTED, REFERENCE, OURSELVES = "1.2.826.0.1.7", 1, "PREFECTDICOM"
PRIVATE_CLASS = "1.3.46.670589.11.0.0.12.1"
GROWTH_BYTES = 64 * 1024**2
ECHO_SECONDS = 1.0
ABORT, REJECT = b"\x07", b"\x03"
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
    """What the spool calls an object."""
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

    def __init__(self, folder: Path, **deadlines: object) -> None:
        self.port = free_port()
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
            },
            archive={"directory": folder / "archive"},
            spool={"path": self.spool, "reserve_bytes": 0},
        )
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*program("receiver_process"), json.dumps(deadlines)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        self._process.stdin.write(assignment_of(self.site).to_json().encode())
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

    def check(self) -> None:
        """All that holds of the process and its spool when nobody is connected any more."""
        assert self._process.poll() is None, "the receiver has ended"
        until(lambda: self._status("Threads") <= self._threads, "threads are back", 5)
        until(lambda: self.files() <= self._files, "files are back", 5)
        until(lambda: not list(self.spool.glob("incoming/*")), "what was begun is gone", 5)
        assert self.growth() < GROWTH_BYTES
        # No write outside the spool, no traceback, nothing a peer has said.
        assert self._log.read_text() == ""
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
    """Stores requested objects, and asks for an echo on a new association, again and again."""

    def __init__(self, receiver: Receiver, client_tls: ssl.SSLContext | None = None) -> None:
        super().__init__(daemon=True)
        self._receiver = receiver
        self._tls = client_tls
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
        if self._tls is not None:
            connection = self._tls.wrap_socket(connection, server_hostname="localhost")
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
def attacked(receiver: Receiver, many, client_tls=None) -> Iterator[Foe]:
    """The legitimate sender at work; at the end, what has to hold of it and of the receiver."""
    legitimate = Legitimate(receiver, client_tls)
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
def running(folder: Path, client_tls=None, **deadlines: object) -> Iterator[Receiver]:
    receiver = Receiver(folder, **deadlines)
    try:
        # What is loaded and allocated once belongs to the start.
        legitimate = Legitimate(receiver, client_tls)
        legitimate.start()
        legitimate.served(20)
        legitimate.end()
        until(lambda: not list(receiver.spool.glob("incoming/*")), "it is quiet")
        receiver.remember()
        yield receiver
    finally:
        receiver.stop()


@pytest.fixture(scope="module")
def patient_receiver(tmp_path_factory) -> Iterator[Receiver]:
    """With the deadlines of a site: minutes."""
    with running(tmp_path_factory.mktemp("patient")) as receiver:
        yield receiver


@pytest.fixture(scope="module")
def quick_receiver(tmp_path_factory) -> Iterator[Receiver]:
    """With deadlines of seconds."""
    with running(tmp_path_factory.mktemp("quick"), **QUICK) as receiver:
        yield receiver


# --- before an association


def an_association_request_of_four_gigabytes(foe: Foe) -> None:
    connection = foe.connect()
    connection.sendall(b"\x01\0\xff\xff\xff\xff")
    assert not push(connection, bytes(1024**2), foe.many(16, 256))
    assert until_closed(connection)[:1] in (ABORT, b"")


def silent_connections(foe: Foe) -> None:
    for _ in range(foe.many(200, 1000)):
        foe.connect()
    foe.legitimate.served(10)


def connections_that_say_one_byte(foe: Foe) -> None:
    for _ in range(foe.many(200, 1000)):
        push(foe.connect(), b"\x01")
    foe.legitimate.served(10)


def client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="pacs")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def other_protocols_on_the_port(foe: Foe) -> None:
    for said in (
        client_hello(),
        b"GET / HTTP/1.1\r\nHost: pacs\r\n\r\n",
        b"POST /dicom-web/studies HTTP/1.1\r\nContent-Length: 4294967295\r\n\r\n" + bytes(65536),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x00\x00\x00\x2f\xffSMB",
        b"\x80\x9e\x01\x03\x01",
        bytes(65536),
    ):
        for _ in range(foe.many(2, 200)):
            connection = foe.connect()
            push(connection, said)
            assert until_closed(connection) == b""


def stuffed_items() -> dict[str, bytes]:
    """The variable items of requests as long as one may be."""
    room = 65_000

    def fill(piece: bytes, space: int = room) -> bytes:
        return piece * (space // len(piece))

    uid = CT.encode()
    roles = association_item(0x54, struct.pack(">H", 3) + b"1.2" + b"\1\1")
    user = USER_INFORMATION[4:]
    return {
        "as much as is allowed": b"".join(
            proposed(2 * n + 1, uid, *[uid[:18]] * 20) for n in range(128)
        )
        + USER_INFORMATION,
        "contexts without content": fill(association_item(0x20, b"")) + USER_INFORMATION,
        "contexts without syntaxes": fill(association_item(0x20, bytes(4))) + USER_INFORMATION,
        "contexts with one identifier": fill(proposed(1, b"1.2", b"1.2")) + USER_INFORMATION,
        "empty syntaxes": association_item(0x20, bytes(4) + fill(association_item(0x40, b"")))
        + USER_INFORMATION,
        "short syntaxes": proposed(1, b"1.2", *[b"1.2"] * (room // 7)) + USER_INFORMATION,
        "one long abstract syntax": proposed(1, b"1." * (room // 2), b"1.2") + USER_INFORMATION,
        "one long transfer syntax": proposed(1, b"1.2", b"1." * (room // 2)) + USER_INFORMATION,
        "one long class": CONTEXTS
        + association_item(0x50, user + association_item(0x52, b"1." * (room // 2 - 500))),
        "one long role": CONTEXTS
        + association_item(0x50, user + association_item(0x54, b"\xf0\0" + b"1." * 31_000)),
        "one long negotiation": CONTEXTS
        + association_item(0x50, user + association_item(0x56, b"\xf0\0" + b"1." * 31_000)),
        "roles": CONTEXTS + association_item(0x50, user + fill(roles, room - 1000)),
        "empty roles": association_item(0x50, user + fill(association_item(0x54, b""))),
        "lengths": association_item(0x50, fill(association_item(0x51, bytes(4)))),
        "versions": association_item(0x50, user + fill(association_item(0x55, b"V"))),
        "identities": association_item(0x50, user + fill(association_item(0x58, bytes(6)))),
        "extended negotiations": association_item(
            0x50, user + fill(association_item(0x56, b"\0\1" + b"11"))
        ),
        "user information again and again": fill(USER_INFORMATION),
        "items of unknown kinds": fill(association_item(0x99, b"")) + USER_INFORMATION,
        "applications": fill(association_item(0x10, b"1.2")) + USER_INFORMATION,
    }


def stuffed_association_requests(foe: Foe) -> None:
    for name, items in stuffed_items().items():
        connections = [foe.connect() for _ in range(foe.many(2, 40))]
        for connection in connections:
            push(connection, foe.request(items=items, user=b""))
        for connection in connections:
            # An answer of any kind will do, but one it has to be.
            kind = connection.recv(1)
            assert kind in (b"\x02", REJECT, ABORT, b""), name
            connection.close()


def wrong_ae_titles(foe: Foe) -> None:
    for called in (
        b"",
        b"ANY-SCP",
        b"..",
        b"../../x",
        b"%s%n",
        foe.receiver.title.lower().encode(),
    ):
        for _ in range(foe.many(3, 300)):
            connection = foe.connect()
            connection.sendall(request_of(called))
            said = until_closed(connection)
            # A title of blanks is none.
            assert (
                said[:1] == ABORT if not called else said == bytes((3, 0, 0, 0, 0, 4, 0, 1, 1, 7))
            )


def strange_addresses(foe: Foe) -> None:
    for number in range(foe.many(300, 10_000)):
        connection = foe.connect(STRANGE_ADDRESS)
        if number % 2:
            push(connection, foe.request())
        assert until_closed(connection) == b""


def connections_that_come_and_go(foe: Foe) -> None:
    for number in range(foe.many(1000, 10_000)):
        connection = foe.connect()
        if number % 3 == 1:
            push(connection, b"\x01\0\0\0\1\0")
        if number % 3 == 2:
            reset(connection)
        connection.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# --- within an association


def a_pdu_of_four_gigabytes(foe: Foe) -> None:
    for kind in range(1, 9):
        connection = foe.associate()
        connection.sendall(struct.pack(">BxI", kind, 0xFFFFFFFF))
        assert not push(connection, bytes(1024**2), foe.many(16, 256))
        assert until_closed(connection)[:1] in (ABORT, b"")


def pdus_that_are_not_due(foe: Foe) -> None:
    for kind in (0, 1, 2, 3, 6, 8, 255):
        connection = foe.associate()
        push(connection, struct.pack(">BxI", kind, 4) + bytes(4))
        assert until_closed(connection)[:1] == ABORT


def all_places_taken_by_one_peer(foe: Foe) -> None:
    answers = set()
    for _ in range(foe.many(100, 400)):
        connection = foe.connect()
        connection.sendall(foe.request())
        answers.add(connection.recv(1))
    # Held for as long as it takes the others to notice.
    assert answers == {b"\x02", REJECT}
    foe.legitimate.served(10)


def associations_and_releases(foe: Foe) -> None:
    for _ in range(foe.many(150, 5000)):
        connection = foe.associate()
        connection.sendall(RELEASE_RQ)
        assert take_pdu(connection)[0] == 6
        connection.close()


def associations_and_aborts(foe: Foe) -> None:
    begun = store(b"1.2.9", data_set(b"1.2.9"))[:-100]
    for number in range(foe.many(200, 5000)):
        connection = foe.associate()
        push(connection, begun if number % 2 else b"")
        if number % 4 < 2:
            push(connection, struct.pack(">BxI4x", 7, 4))
            connection.close()
        else:
            reset(connection)


def an_association_for_every_object(foe: Foe) -> None:
    data = data_set(b"1.2.10", study=b"1.2.99")
    for _ in range(foe.many(150, 10_000)):
        connection = foe.associate()
        connection.sendall(store(b"1.2.10", data))
        assert take_status(connection) == 0x0000
        connection.close()


def requests_we_do_not_serve(foe: Foe) -> None:
    connection = foe.associate()
    for command in (0x10, 0x20, 0x21, 0x100, 0x110, 0x120, 0x130, 0x140, 0x150, 0x7FFF):
        for data in (None, b"", bytes(1000)):
            for context_id in (1, 3):
                elements = {
                    Element.AFFECTED_SOP_CLASS_UID: CT.encode(),
                    Element.COMMAND_FIELD: command,
                    Element.MESSAGE_ID: 7,
                    Element.COMMAND_DATA_SET_TYPE: 0x0101 if data is None else 1,
                    0x0600: b"../../SOMEWHERE ",
                }
                push(connection, message_pdus(context_id, write_command(elements), data, 0))
                assert take_status(connection) == 0x0211
    push(connection, echo_message())
    assert take_status(connection) == 0x0000


def responses_to_nothing(foe: Foe) -> None:
    for command in (0x8001, 0x8010, 0x8020, 0x8021, 0x8030, 0x8100, 0xFFFF):
        connection = foe.associate()
        elements = {Element.COMMAND_FIELD: command, Element.STATUS: 0}
        push(connection, message_pdus(3, write_command(elements), None, 0))
        assert until_closed(connection)[:1] == ABORT


def endless_command_sets(foe: Foe) -> None:
    for fragment in (bytes(16_000), b"x"):
        connection = foe.associate()
        size = len(fragment)
        assert not push(connection, pdu(pdv(3, 1, fragment)) * (64_000 // size), 1000)
        assert until_closed(connection)[:1] in (ABORT, b"")


def objects_that_nobody_asked_for(foe: Foe) -> None:
    connection = foe.associate()
    names = set()
    for number in range(foe.many(20, 2000)):
        sop = f"1.2.98.{number}"
        data = data_set(sop.encode(), study=b"1.2.98")
        for originator in (None, (b"OTHER", 77), (OURSELVES.encode(), foe.receiver.message_id)):
            more = {}
            if originator is not None:
                more[Element.MOVE_ORIGINATOR_AE_TITLE] = originator[0]
                more[Element.MOVE_ORIGINATOR_MESSAGE_ID] = originator[1]
            push(connection, store(sop.encode(), data, elements=more))
            assert take_status(connection) == 0x0000
        names.add(file_name(sop, data))
    assert names <= foe.receiver.quarantined()


NAMES = {
    "two dots": b"..",
    "one dot": b".",
    "a way up": b"../../../../../../tmp/hostile",
    "a way from the root": b"/tmp/hostile",
    "a way down": b"a/b/c",
    "another system's way": b"..\\..\\hostile",
    "a drive": b"C:\\hostile",
    "a home": b"~root/hostile",
    "a NUL inside": b"1.2\x003.4",
    "line ends": b"1.2\r\n3.4",
    "terminal codes": b"\x1b[2J1.2",
    "formats": b"%s%n{0}$HOME`id`",
    "wildcards": b"*?*",
    "no ASCII": b"\xff\xfe\x80\xc3\x28",
    "blanks": b"   ",
    "nothing": b"",
    "65 characters": b"1" + b".2" * 32,
    "80 digits": b"9" * 80,
    "256 characters": b"1.2." * 64,
    "16,000 characters": b"1.2." * 4000,
}


def names_that_are_paths_or_too_long(foe: Foe) -> None:
    before = len(foe.receiver.quarantined())
    for name in NAMES.values():
        try:
            connection = foe.associate(calling=name)
        except AssertionError:
            # What can be no AE title at all is told so.
            connection = foe.associate()
        elements = {
            Element.MOVE_ORIGINATOR_AE_TITLE: name,
            Element.MOVE_ORIGINATOR_MESSAGE_ID: foe.receiver.message_id,
            Element.AFFECTED_SOP_CLASS_UID: name,
        }
        push(connection, store(name, data_set(name, study=name), elements=elements))
        assert take_status(connection) == 0x0000
        # In the object only, and in the request only.
        push(connection, store(b"1.2.97.1", data_set(name, study=name)))
        assert take_status(connection) == 0x0000
        push(connection, store(name, data_set(b"1.2.97.2", study=b"1.2.97")))
        assert take_status(connection) == 0x0000
        connection.close()
    # The same bytes lie there once.
    assert len(foe.receiver.quarantined()) >= before + 2 * len(NAMES)


def names_in_the_negotiation(foe: Foe) -> None:
    for name in NAMES.values():
        for abstract, syntax in ((name, EXPLICIT.encode()), (CT.encode(), name), (name, name)):
            connection = foe.connect()
            connection.sendall(foe.request(items=proposed(3, abstract, syntax)))
            kind = connection.recv(1)
            assert kind in (b"\x02", REJECT, ABORT, b"")
            if kind == b"\x02":
                (length,) = struct.unpack(">xI", take(connection, 5))
                take(connection, length)
                # Refused in its context it is a PDV on no context.
                push(connection, store(name, data_set(b"1.2.96.1", study=b"1.2.96")))
                with contextlib.suppress(ConnectionError):
                    assert take_status(connection) == 0x0000
            connection.close()
        connection = foe.connect()
        connection.sendall(foe.request(application=name))
        assert connection.recv(1) in (REJECT, ABORT, b"")


def many_sop_classes_of_many_characters(foe: Foe) -> None:
    connection = foe.associate()
    data = data_set(b"1.2.95", study=b"1.2.95", size=2)
    for number in range(foe.many(400, 2000)):
        name = f"{number:05}".encode() + b"\xff" * 60_000
        assert push(connection, store(b"1.2.95", data, sop_class=name))
        assert take_status(connection) == 0x0000


def deflate_bombs(foe: Foe) -> None:
    pack = zlib.compressobj(9, wbits=-15)
    bomb = pack.compress(data_set(b"1.2.94", size=0)[:-12])
    bomb += pack.compress(element(0x7FE00010, b"OW", b"", 128 * 1024**2))
    for _ in range(128):
        bomb += pack.compress(bytes(1024**2))
    bomb += pack.flush()
    assert len(bomb) < 256 * 1024
    connection = foe.associate()
    for number in range(foe.many(2, 20)):
        sop = f"1.2.94.{number}"
        push(connection, store(sop.encode(), bomb, context_id=5))
        assert take_status(connection) == 0x0000
        assert file_name(sop, bomb, syntax=DEFLATED) in foe.receiver.quarantined()


def nested_sequences(foe: Foe) -> None:
    levels = 100_000
    sequence = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * levels
    connection = foe.associate()
    push(connection, store(b"1.2.93", sequence))
    assert take_status(connection) == 0x0000
    assert file_name("1.2.93", sequence) in foe.receiver.quarantined()


def a_private_sop_class(foe: Foe) -> None:
    """Accepted as any other: what was requested of it is kept, the rest is apart."""
    connection = foe.associate()
    for study, sop in ((REQUESTED, "1.2.92.1"), ("1.2.92", "1.2.92.2")):
        data = data_set(sop.encode(), study=study.encode())
        push(
            connection,
            store(sop.encode(), data, context_id=7, sop_class=PRIVATE_CLASS.encode()),
        )
        assert take_status(connection) == 0x0000
        name = file_name(sop, data, sop_class=PRIVATE_CLASS)
        if study == REQUESTED:
            foe.receiver.wanted.add(name)
        else:
            assert name in foe.receiver.quarantined()


def duplicates_with_other_content(foe: Foe) -> None:
    """Under the UIDs of an object that has arrived: nothing that lies there is replaced."""
    ready = foe.receiver.spool / "ready" / str(REFERENCE)
    before = {path: path.read_bytes() for path in ready.iterdir()}
    sop = "1.2.826.0.1.7.1.0"
    connection = foe.associate()
    for number in range(foe.many(20, 1000)):
        data = data_set(sop.encode(), size=2 + 2 * number)
        foe.receiver.wanted.add(file_name(sop, data))
        push(connection, store(sop.encode(), data) * 2)
        assert take_status(connection) == take_status(connection) == 0x0000
    assert {path: path.read_bytes() for path in before} == before


def large_objects_on_all_associations_at_once(foe: Foe) -> None:
    """Each has sent enough to fill whatever is filled for it, and goes on."""
    connections = [foe.associate() for _ in range(40)]
    size = 4 * 1024**2
    command = store(b"1.2.91", b"")[:-12]
    fragment = pdu(pdv(3, 0, bytes(128 * 1024)))
    for connection in connections:
        push(connection, command)
    for _ in range(size // len(fragment)):
        for connection in connections:
            assert push(connection, fragment)
    foe.legitimate.served(3)


def floods_of_empty_fragments(foe: Foe) -> None:
    connections = [foe.associate() for _ in range(4)]
    for connection in connections[:2]:
        push(connection, store(b"1.2.90", b"")[:-12])
    kinds = [0, 0, 1, 1]
    end = time.monotonic() + foe.many(1, 40) / 4
    while time.monotonic() < end:
        for kind, connection in zip(kinds, connections, strict=True):
            push(connection, pdu(*[pdv(3, kind, b"")] * 1000) * 10)


PATIENT_ATTACKS = [
    an_association_request_of_four_gigabytes,
    silent_connections,
    connections_that_say_one_byte,
    other_protocols_on_the_port,
    stuffed_association_requests,
    wrong_ae_titles,
    strange_addresses,
    connections_that_come_and_go,
    a_pdu_of_four_gigabytes,
    pdus_that_are_not_due,
    all_places_taken_by_one_peer,
    associations_and_releases,
    associations_and_aborts,
    an_association_for_every_object,
    requests_we_do_not_serve,
    responses_to_nothing,
    endless_command_sets,
    objects_that_nobody_asked_for,
    names_that_are_paths_or_too_long,
    names_in_the_negotiation,
    many_sop_classes_of_many_characters,
    deflate_bombs,
    nested_sequences,
    a_private_sop_class,
    duplicates_with_other_content,
    large_objects_on_all_associations_at_once,
    floods_of_empty_fragments,
]


@pytest.mark.parametrize("attack", PATIENT_ATTACKS, ids=lambda attack: attack.__name__)
def test_a_legitimate_sender_is_served_throughout(patient_receiver, scale, attack):
    with attacked(patient_receiver, scale) as foe:
        attack(foe)


# --- against the clock


def dripping(foe: Foe) -> None:
    """A byte now and then, at every place of a conversation where one can be waited for."""
    request, message = foe.request(), store(b"1.2.89", data_set(b"1.2.89"))
    begun = store(b"1.2.89", b"")[:-12]
    plans = [
        (foe.connect(), request),
        (foe.connect(), b"\x01\0\0\0\xff\0" + request[6:] + bytes(1000)),
        (foe.associate(), message),
        (foe.associate(), struct.pack(">BxI", 4, 16_000) + bytes(100)),
    ]
    for said in (begun, begun + pdu(pdv(3, 0, bytes(99))), begun + b"\x04\0\0"):
        connection = foe.associate()
        connection.sendall(said)
        plans.append((connection, struct.pack(">BxI", 4, 16_000) + bytes(100)))
    assert_all_cut_off(plans)


def trickling(foe: Foe) -> None:
    """Whole PDUs of one byte each, so that only the message takes too long."""
    begun = store(b"1.2.88", b"")[:-12]
    plans = []
    for said, piece in (
        (b"", pdu(pdv(3, 1, b"x"))),
        (b"", pdu(pdv(3, 1, b""))),
        (begun, pdu(pdv(3, 0, b"x"))),
        (begun, pdu(pdv(3, 0, b""))),
    ):
        connection = foe.associate()
        connection.sendall(said)
        plans.append((connection, [piece] * 10_000))
    assert_all_cut_off(plans)


def assert_all_cut_off(plans: list) -> None:
    """Say the next piece of each plan again and again; all are closed in time."""
    rest = {connection: iter(pieces) for connection, pieces in plans}
    deadline = time.monotonic() + max(QUICK.values()) + 5
    while rest:
        assert time.monotonic() < deadline, f"{len(rest)} connections are still open"
        closed, _, _ = select.select(rest, [], [], 0.1)
        for connection in closed:
            # An A-ABORT, or the end.
            del rest[connection]
            assert until_closed(connection)[:1] in (ABORT, b"")
        for connection, pieces in rest.items():
            piece = next(pieces, b"")
            push(connection, bytes((piece,)) if isinstance(piece, int) else piece)


def silence(foe: Foe) -> None:
    connections = [foe.connect() for _ in range(20)] + [foe.associate() for _ in range(10)]
    begun = foe.associate()
    begun.sendall(store(b"1.2.87", b"")[:-12])
    for connection in (*connections, begun):
        assert until_closed(connection)[:1] in (ABORT, b"")


def a_slow_reader(foe: Foe) -> None:
    connection = foe.associate()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    # Whose answers are as long as they get. Ends when the receiver has waited long enough.
    elements = {
        Element.AFFECTED_SOP_CLASS_UID: b"1" * 60_000,
        Element.COMMAND_FIELD: 0x30,
        Element.COMMAND_DATA_SET_TYPE: 0x0101,
    }
    request = message_pdus(1, write_command(elements), None, 0)
    assert not push(connection, request, 10_000)


def data_sets_without_a_last_fragment(foe: Foe) -> None:
    connection = foe.associate()
    push(connection, store(b"1.2.85", b"")[:-12])
    piece = pdu(pdv(3, 0, bytes(16_000)))
    while push(connection, piece, 10):
        # Not as fast as it goes: the disk is everybody's.
        select.select([connection], [], [], 0.02)
    assert until_closed(connection)[:1] in (ABORT, b"")


QUICK_ATTACKS = [dripping, trickling, silence, a_slow_reader, data_sets_without_a_last_fragment]


@pytest.mark.parametrize("attack", QUICK_ATTACKS, ids=lambda attack: attack.__name__)
def test_nobody_gets_more_time_than_there_is(quick_receiver, scale, attack):
    with attacked(quick_receiver, scale) as foe:
        attack(foe)


# --- in the middle of a run


@pytest.mark.parametrize(
    "forged",
    subset(["other studies", "unlisted instances", "other patients"], ["other patients"]),
)
def test_what_a_foe_sends_while_a_study_arrives_is_not_archived(tmp_path, forged):
    objects = list(tiny_instances(2, instances=3))
    study = objects[0].study_instance_uid

    def forge(stored: StoredInstance, number: int) -> tuple[str, bytes]:
        image = decoded(stored.encoded(), stored.transfer_syntax_uid)
        image.PatientName = image.StudyDescription = "FORGED"
        if forged == "other studies":
            image.StudyInstanceUID = image.SeriesInstanceUID = f"1.2.99.{number}"
        if forged == "other patients":
            image.PatientID = "FORGED"
        else:
            image.SOPInstanceUID = f"1.2.98.{number}"
        return image.SOPInstanceUID, encoded(image, stored.transfer_syntax_uid)

    class Moment(threading.Event):
        """In place of an event the archive waits for, within the answer to a C-MOVE."""

        def wait(self, timeout: float | None = None) -> bool:
            receiver = place.site.receiver
            address = (OUR_ADDRESS, receiver.port)
            contexts = [context_key(objects[0])]
            sender = StoreAssociation("FOE", receiver.ae_title, address, contexts)
            for number, stored in enumerate(objects):
                sop, data = forge(stored, number)
                for originator in (None, (place.pacs.requests("C-FIND")[0].calling_ae_title, 1)):
                    status = sender.store(
                        sender.context_id(stored),
                        message_id=1,
                        sop_class_uid=stored.sop_class_uid,
                        sop_instance_uid=sop,
                        data=data,
                        originator=originator,
                    )
                    assert status == 0x0000
                    sent.append(sop)
            sender.release()
            return True

    sent: list[str] = []
    stall = Behaviour("net.stall_after", answers=2, hold=Moment(), service="C-MOVE", on_request=1)
    with site_around(tmp_path, objects, script=[stall]) as place:
        rows = place.pull().rows
        assert len(sent) == 2 * len(objects)
        if forged != "other patients":
            assert rows == {Verdict.ARCHIVED: 2}
            assert len(place.manifest(study).instances) == 3
        assert not any(b"FORGED" in data for data in place.archived().values())
        assert place.quarantined()
        place.audit()


# --- over TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            tool("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
            "-keyout", key, "-out", certificate, "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost",
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


def test_silent_and_halting_tls_clients_hold_up_nobody(tmp_path, certificate, scale):
    chain, key = certificate
    client = ssl.create_default_context(cafile=chain)
    more = {**QUICK, "certificate": str(chain), "key": str(key)}
    with (
        running(tmp_path, client, **more) as receiver,
        attacked(receiver, scale, client) as foe,
    ):
        hello = client_hello()
        for said in (b"", hello[:10], hello, foe.request(), hello + hello, b"\x16\x03\x01\xff\xff"):
            for _ in range(foe.many(10, 100)):
                push(foe.connect(), said)
        foe.legitimate.served(5)
        assert_all_cut_off([(foe.connect(), hello), (foe.connect(), hello + bytes(1000))])
