"""Whatever a peer sends, the receiver stays up, small, and open for the others."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import os
import selectors
import socket
import struct
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom import AE, build_context

from prefect_dicom.config.tls_context import client_context, current_server_context
from prefect_dicom.core.errors import ReceiverError
from prefect_dicom.network.storage_scp.association_events import Happening
from prefect_dicom.network.storage_scp.connection import ConnectionPolicy
from prefect_dicom.network.storage_scp.pending import PendingConnections, Readiness
from prefect_dicom.network.storage_scp.sender_tls import SenderTls
from prefect_dicom.network.storage_scp.server import StorageScp
from tests.support.hostile_peers import client_hello
from tests.support.peers import free_port
from tests.support.wire import (
    CT,
    MemoryStoreHandler,
    association_request,
    make_instance,
    message_pdus,
    pdu,
    pdv,
    store_command,
)

COMMAND = store_command("1.2.3")
REQUEST = association_request()


class Listener:
    """Collects events and lets a test wait for one."""

    def __init__(self):
        self.events = []
        self._changed = threading.Condition()

    def __call__(self, event):
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait_for(self, happening, count=1, seconds=20):
        def there():
            return sum(e.happening is happening for e in self.events) >= count

        with self._changed:
            assert self._changed.wait_for(there, seconds), [e.happening for e in self.events]


@contextlib.contextmanager
def receiving(store_handler=None, **more):
    listener = Listener()
    names = {field.name for field in dataclasses.fields(ConnectionPolicy)}
    policy = {name: more.pop(name) for name in names & more.keys()}
    scp = StorageScp(
        "127.0.0.1",
        0,
        "PREFECTDICOM",
        store_handler or MemoryStoreHandler(),
        policy=ConnectionPolicy(**{"allowed": lambda address: True, **policy}),
        on_event=listener,
        **more,
    )
    scp.listener = listener
    with scp:
        yield scp


def connect(receiver):
    connection = socket.create_connection(("127.0.0.1", receiver.port), 20)
    connection.settimeout(20)
    return connection


def associate(receiver):
    application = AE("SENDER")
    return application.associate(
        "127.0.0.1",
        receiver.port,
        contexts=[
            build_context("1.2.840.10008.1.1"),
            build_context(CT, ExplicitVRLittleEndian),
        ],
        ae_title="PREFECTDICOM",
    )


def echoes(receiver):
    association = associate(receiver)
    assert association.is_established
    status = association.send_c_echo()
    association.release()
    return status.Status == 0x0000


def until_closed(connection):
    said = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while chunk := connection.recv(65536):
            said += chunk
    connection.close()
    return bytes(said)


# --- the door


def test_an_address_that_is_not_allowed_is_closed_without_a_byte():
    with receiving(allowed=lambda address: False) as receiver:
        connection = connect(receiver)
        assert until_closed(connection) == b""
        receiver.listener.wait_for(Happening.NOT_ALLOWED)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"\0"])
def test_what_is_not_dicom_is_closed_at_once(said):
    with receiving() as receiver:
        connection = connect(receiver)
        connection.sendall(said)
        assert until_closed(connection) == b""
        receiver.listener.wait_for(Happening.UNINTELLIGIBLE)
        assert echoes(receiver)


HOSTILE_REQUESTS = {
    "four gigabytes": b"\x01\0\xff\xff\xff\xff" + bytes(1000),
    "no content": b"\x01\0\0\0\0\0",
    "zeros": b"\x01\0\0\0\x01\0" + bytes(256),
    "another PDU": pdu(pdv(3, 3, COMMAND)),
    "thousands of empty items": b"\x01\0\0\0\xff\xf0" + bytes(68) + b"\x20\0\0\0" * 16363,
    "no user information": REQUEST[:2] + struct.pack(">I", 68 + 25) + REQUEST[6 : 74 + 25],
    "cut short": REQUEST[:2] + struct.pack(">I", 90) + REQUEST[6:96],
}


@pytest.mark.parametrize("name", HOSTILE_REQUESTS)
def test_a_hostile_association_request_is_aborted(name):
    with receiving() as receiver:
        connection = connect(receiver)
        with contextlib.suppress(OSError):
            connection.sendall(HOSTILE_REQUESTS[name])
        assert until_closed(connection)[:1] in (b"\x07", b"\x03", b"")
        assert echoes(receiver)
        assert receiver.associations <= 1


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_association_requests_do_no_harm(data):
    damaged = bytearray(REQUEST)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(1, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with one_receiver() as receiver:
        connection = connect(receiver)
        with contextlib.suppress(OSError):
            connection.sendall(bytes(damaged))
            connection.shutdown(socket.SHUT_WR)
        until_closed(connection)


_shared: list = []


@contextlib.contextmanager
def one_receiver():
    """One receiver for all examples of a property."""
    if not _shared:
        _shared.append(
            StorageScp(
                "127.0.0.1", 0, "X", MemoryStoreHandler(), policy=ConnectionPolicy(lambda a: True)
            )
        )
        _shared[0].start()
    yield _shared[0]


def test_the_receiver_of_the_damaged_requests_is_still_there():
    with one_receiver() as receiver:
        connection = connect(receiver)
        connection.sendall(REQUEST)
        assert connection.recv(10)[:10] == bytes((3, 0, 0, 0, 0, 4, 0, 1, 1, 7))
        connection.close()
        receiver.stop()
        _shared.clear()


def test_a_slow_negotiation_is_cut_off():
    with receiving(negotiation_seconds=0.3) as receiver:
        connection = connect(receiver)
        connection.sendall(b"\x01")
        assert until_closed(connection) == b""


def test_silent_connections_take_no_association_from_the_pacs():
    with receiving(max_associations=2) as receiver:
        silent = [connect(receiver) for _ in range(20)]
        assert echoes(receiver)
        for connection in silent:
            connection.close()


@pytest.fixture
def served(monkeypatch):
    """The connections that were given a thread."""
    given, serve = [], StorageScp._serve

    def noted(scp, connection):
        given.append(connection)
        serve(scp, connection)

    monkeypatch.setattr(StorageScp, "_serve", noted)
    return given


def test_a_peer_has_no_thread_before_its_request_is_whole(served):
    with receiving() as receiver, connect(receiver), connect(receiver) as hesitant:
        for number, piece in enumerate((REQUEST[:1], REQUEST[1:6], REQUEST[6:40]), 1):
            hesitant.sendall(piece)
            # Whoever says all of it is served meanwhile.
            assert echoes(receiver)
            assert len(served) == number
        hesitant.sendall(REQUEST[40:])
        assert hesitant.recv(1) == b"\x02"
        assert len(served) == 4


@pytest.mark.parametrize("said", [b"", REQUEST[:1], REQUEST[:40]])
def test_a_peer_that_says_no_more_before_its_request_is_whole_is_forgotten(served, said):
    with receiving() as receiver, connect(receiver) as connection:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        receiver.listener.wait_for(Happening.UNINTELLIGIBLE)
        assert until_closed(connection) == b""
        assert not receiver._connections and not served


class Waiting:
    """A connection that waits, and its peer's end."""

    def __init__(self):
        self.socket, self.peer = socket.socketpair()
        self.deadline = time.monotonic() + 30


@pytest.fixture
def waiting():
    waiting = Waiting()
    with waiting.socket, waiting.peer:
        yield waiting


def test_what_the_kernel_does_not_hold_back_is_left_to_a_thread(waiting):
    # It counts no bytes for such sockets, and has room for so many with others.
    with selectors.DefaultSelector() as selector:
        pending = PendingConnections(selector, lambda said: 100, 100)
        waiting.peer.send(b"x")
        assert pending.look(waiting) is Readiness.WAITING
        assert selector.select(20)
        assert pending.look(waiting) is Readiness.READY
        pending.leave(waiting)
        assert waiting not in pending and not selector.get_map()


class NoRoom(selectors.DefaultSelector):
    def register(self, *arguments):
        raise OSError(errno.ENOSPC, "as many as fs.epoll.max_user_watches")


def test_what_the_kernel_does_not_watch_is_left_to_a_thread(waiting):
    with NoRoom() as selector:
        pending = PendingConnections(selector, lambda said: 100, 100)
        assert pending.look(waiting) is Readiness.READY
        assert waiting not in pending


def test_connections_beyond_all_limits_are_closed():
    with receiving(max_associations=1) as receiver:
        silent = [connect(receiver) for _ in range(80)]
        receiver.listener.wait_for(Happening.CROWDED, count=15)
        for connection in silent:
            connection.close()


def test_associations_beyond_the_limit_are_rejected_as_busy():
    with receiving(max_associations=2) as receiver:
        first, second = associate(receiver), associate(receiver)
        third = associate(receiver)
        assert third.is_rejected
        answer = third.acceptor.primitive
        assert (answer.result, answer.result_source, answer.diagnostic) == (2, 3, 2)
        first.release()
        receiver.listener.wait_for(Happening.ENDED)
        fourth = associate(receiver)
        assert fourth.is_established
        fourth.release()
        second.release()


def test_one_peer_can_be_limited():
    with receiving(max_associations=10, max_associations_per_peer=1) as receiver:
        first = associate(receiver)
        assert associate(receiver).is_rejected
        first.release()


def test_a_taken_port_is_reported():
    with receiving() as receiver:
        other = StorageScp(
            "127.0.0.1",
            receiver.port,
            "X",
            MemoryStoreHandler(),
            policy=ConnectionPolicy(lambda address: True),
        )
        with pytest.raises(ReceiverError) as raised:
            other.start()
        assert raised.value.code == "receiver-taken"


def test_a_foreign_address_cannot_be_listened_on():
    other = StorageScp(
        "192.0.2.7", free_port(), "X", MemoryStoreHandler(), policy=ConnectionPolicy(lambda a: True)
    )
    with pytest.raises(ReceiverError) as raised:
        other.start()
    assert raised.value.code == "receiver-unreachable"


# --- stopping


def test_idle_associations_are_aborted_at_once():
    with receiving() as receiver:
        connection = connect(receiver)
        connection.sendall(REQUEST)
        receiver.listener.wait_for(Happening.ACCEPTED)
        began = time.monotonic()
        receiver.stop(grace_seconds=30)
        assert time.monotonic() - began < 5
        assert until_closed(connection)[-10:-4] == bytes((7, 0, 0, 0, 0, 4))


def test_an_instance_under_way_is_finished_before_the_end():
    store_handler = MemoryStoreHandler()
    with receiving(store_handler) as receiver:
        connection = connect(receiver)
        connection.sendall(REQUEST)
        receiver.listener.wait_for(Happening.ACCEPTED)
        connection.sendall(pdu(pdv(3, 3, COMMAND)))
        store_handler.wait_until(lambda i: i.began)
        stopping = threading.Thread(target=receiver.stop, args=(20,))
        stopping.start()
        while receiver._listener is not None:
            threading.Event().wait(0.01)
        connection.sendall(pdu(pdv(3, 2, b"ab")))
        stopping.join(20)
        assert not stopping.is_alive()
        said = until_closed(connection)
        assert said[-10:-4] == bytes((7, 0, 0, 0, 0, 4))
        assert [part.data for part in store_handler.completed] == [b"ab"]


def test_an_instance_that_does_not_end_is_cut_off_after_the_grace():
    store_handler = MemoryStoreHandler()
    with receiving(store_handler) as receiver:
        connection = connect(receiver)
        connection.sendall(REQUEST)
        receiver.listener.wait_for(Happening.ACCEPTED)
        connection.sendall(pdu(pdv(3, 3, COMMAND)))
        store_handler.wait_until(lambda i: i.began)
        began = time.monotonic()
        receiver.stop(grace_seconds=0.2)
        assert time.monotonic() - began < 5
        assert len(store_handler.abandoned) == 1
        connection.close()


def test_threads_and_files_are_back_at_the_baseline_after_many_associations():
    with receiving() as receiver:
        assert echoes(receiver)
        receiver.listener.wait_for(Happening.ENDED, count=1)
        files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        for number in range(300):
            connection = connect(receiver)
            connection.sendall(REQUEST)
            if number % 3 == 0:
                connection.recv(1)
            connection.close()
        receiver.listener.wait_for(Happening.ENDED, count=100)
        receiver.stop()
        assert len(os.listdir("/proc/self/fd")) <= files
        assert threading.active_count() <= threads


# --- TLS


@pytest.fixture(scope="module")
def identity(authority):
    return authority.issue("limits")


@pytest.fixture
def tls(authority, identity):
    settings = authority.tls(identity)
    return SenderTls(current_server_context(settings)), client_context(settings)


def test_instances_arrive_over_tls_and_an_idle_association_can_be_stopped(tls):
    server, client = tls
    store_handler = MemoryStoreHandler()
    with receiving(store_handler, tls=server) as receiver:
        application = AE("SENDER")
        association = application.associate(
            "localhost",
            receiver.port,
            contexts=[build_context(CT, ExplicitVRLittleEndian)],
            ae_title="PREFECTDICOM",
            tls_args=(client, "localhost"),
        )
        assert association.is_established
        instance = make_instance(1, size=512)
        assert association.send_c_store(instance).Status == 0x0000
        ((_, _, _, data),) = store_handler.instances
        assert data.endswith(b"\x01" * 512 * 512 * 2)
        began = time.monotonic()
        receiver.stop()
        assert time.monotonic() - began < 5
        association.abort()


def test_silent_clients_do_not_hold_up_the_handshakes_of_others(tls):
    server, client = tls
    with receiving(tls=server) as receiver:
        silent = [connect(receiver) for _ in range(5)]
        began = datetime.datetime.now(datetime.UTC)
        with (
            connect(receiver) as plain,
            client.wrap_socket(plain, server_hostname="localhost") as connection,
        ):
            connection.sendall(REQUEST)
            assert connection.recv(1) == b"\x02"
        assert datetime.datetime.now(datetime.UTC) - began < datetime.timedelta(seconds=5)
        for connection in silent:
            connection.close()


@pytest.mark.parametrize("said", [REQUEST, REQUEST[:20], b"GET / HTTP/1.1\r\n\r\n", b"\0"])
def test_plain_dicom_on_a_port_of_tls_is_reset_without_a_thread(tls, said):
    server, _ = tls
    with receiving(tls=server) as receiver:
        threads = threading.active_count()
        with connect(receiver) as connection:
            connection.sendall(said)
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
            assert threading.active_count() == threads
        receiver.listener.wait_for(Happening.UNINTELLIGIBLE)
        (event,) = receiver.listener.events
        assert event.code == ("sender-without-tls" if said[:1] == b"\x01" else "")


def test_a_hello_that_drips_in_takes_no_thread_and_ends_in_time(tls):
    server, _ = tls
    hello = client_hello()
    with receiving(tls=server, negotiation_seconds=1) as receiver:
        threads = threading.active_count()
        with connect(receiver) as connection:
            for begin in (hello[:1], hello[1:5], hello[5:40]):
                connection.sendall(begin)
            assert threading.active_count() == threads
            assert until_closed(connection) == b""
        receiver.listener.wait_for(Happening.UNINTELLIGIBLE)


def test_an_association_that_floods_us_with_requests_gets_all_answers():
    store_handler = MemoryStoreHandler()
    with receiving(store_handler) as receiver:
        connection = connect(receiver)
        connection.sendall(REQUEST)
        receiver.listener.wait_for(Happening.ACCEPTED)
        connection.sendall(
            b"".join(
                message_pdus(3, store_command(f"1.2.{n}", message_id=n), b"ab", 0)
                for n in range(500)
            )
        )
        store_handler.wait_until(lambda i: len(i.completed) == 500)
        connection.close()
