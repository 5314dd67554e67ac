"""The limits of the transfer loop: lengths, deadlines and floods, from any peer."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefect_dicom.network.dimse import Element, unsigned_short, write_command
from prefect_dicom.network.storage_scp.close_reason import CloseKind
from prefect_dicom.network.storage_scp.transfer import (
    Limits,
)
from tests.support.wire import (
    RELEASE_RP,
    RELEASE_RQ,
    Conversation,
    MemoryStoreHandler,
    converse,
    pdu,
    pdv,
    responses,
    statuses,
    store_command,
    store_message,
)

COMMAND = store_command("1.2.3")
ABORT_UNSPECIFIED = bytes((7, 0, 0, 0, 0, 4, 0, 0, 2, 0))


@pytest.mark.parametrize("length", [64 * 1024**2 + 2, 0xFFFFFFFF])
@pytest.mark.parametrize("announced", [16 * 1024, 256 * 1024, 0])
def test_a_pdu_has_an_end_whatever_was_announced(announced, length):
    _, end, said = converse(struct.pack(">BxI", 4, length), limits=Limits(pdu_bytes=announced))
    assert end.kind is CloseKind.REFUSED
    assert said == bytes((7, 0, 0, 0, 0, 4, 0, 0, 2, 6))


@pytest.mark.parametrize("mebibytes", [1, 4])
def test_a_pdu_longer_than_announced_is_an_instance_all_the_same(mebibytes):
    data = bytes(range(256)) * (mebibytes * 4096)
    talk = Conversation(limits=Limits(pdu_bytes=16 * 1024))
    talk.ours.sendall(pdu(pdv(3, 3, COMMAND)) + pdu(pdv(3, 2, data)) + RELEASE_RQ)
    commands, behind = responses(talk.everything())
    assert [unsigned_short(command, Element.STATUS) for command in commands] == [0]
    assert behind == RELEASE_RP
    assert talk.store_handler.instances[0][3] == data


def test_a_pdu_longer_than_announced_has_as_much_more_time():
    limits = Limits(pdu_bytes=1024, pdu_seconds=10.0)
    assert [limits.seconds_of(length) for length in (10, 1024, 4096)] == [10.0, 10.0, 40.0]


@pytest.mark.parametrize("announced", [256 * 1024, 0])
def test_a_pdu_of_many_megabytes_takes_no_memory(announced):
    talk = Conversation(CountingStoreHandler(), limits=Limits(pdu_bytes=announced))
    size = 48 * 1024 * 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    talk.ours.sendall(pdu(pdv(3, 3, COMMAND)))
    talk.ours.sendall(struct.pack(">BxIIBB", 4, size + 6, size + 2, 3, 2))
    chunk = bytes(1024 * 1024)
    for _ in range(48):
        talk.ours.sendall(chunk)
    talk.ours.shutdown(socket.SHUT_WR)
    assert statuses(talk.everything()) == [0]
    assert talk.store_handler.bytes == size
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024


class CountingStoreHandler(MemoryStoreHandler):
    """Keeps no bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def begin(self, request, background):
        part = super().begin(request, background)
        part.write = self._count
        return part

    def _count(self, fragments):
        self.bytes += sum(map(len, fragments))


def test_a_command_set_has_an_end():
    chunk = pdu(pdv(3, 1, bytes(32 * 1024)))
    _, end, _ = converse(chunk, chunk, chunk)
    assert end.kind is CloseKind.REFUSED


def test_an_identifier_has_an_end():
    elements = {Element.COMMAND_FIELD: 0x0020, Element.COMMAND_DATA_SET_TYPE: 1}
    find = pdu(pdv(3, 3, write_command(elements)))
    chunk = pdu(pdv(3, 0, bytes(32 * 1024)))
    _, end, _ = converse(find, *[chunk] * 33)
    assert end.kind is CloseKind.REFUSED


def test_a_peer_that_drips_bytes_is_cut_off_by_the_pdu_deadline():
    talk = Conversation(limits=Limits(pdu_seconds=0.5))
    stream = store_message("1.2.3", bytes(100))
    began = time.monotonic()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for number in range(len(stream)):
            talk.ours.send(stream[number : number + 1])
            threading.Event().wait(0.05)
    assert time.monotonic() - began < 5
    assert talk.everything() == ABORT_UNSPECIFIED
    assert talk.end.kind is CloseKind.REFUSED


def test_an_instance_without_end_is_cut_off_by_the_message_deadline():
    talk = Conversation(limits=Limits(message_seconds=0.5))
    fragment = pdu(pdv(3, 0, b"ab"), pdv(3, 0, b""))
    talk.ours.sendall(pdu(pdv(3, 3, COMMAND)))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while talk.end is None:
            talk.ours.send(fragment)
            threading.Event().wait(0.02)
    assert talk.everything() == ABORT_UNSPECIFIED
    assert len(talk.store_handler.abandoned) == 1


def test_a_silent_association_is_aborted_after_the_idle_time():
    talk = Conversation(limits=Limits(idle_seconds=0.2))
    assert talk.everything()[:6] == bytes((7, 0, 0, 0, 0, 4))
    assert talk.end.kind is CloseKind.IDLE


def test_silence_within_an_instance_counts_too():
    talk = Conversation(limits=Limits(idle_seconds=0.2))
    talk.ours.sendall(pdu(pdv(3, 3, COMMAND)))
    assert talk.everything()[:6] == bytes((7, 0, 0, 0, 0, 4))
    assert len(talk.store_handler.abandoned) == 1


def test_a_peer_that_does_not_read_our_answers_is_cut_off():
    talk = Conversation(limits=Limits(pdu_seconds=0.5))
    with contextlib.suppress(OSError):
        while talk.end is None:
            talk.ours.sendall(store_message("1.2.3", b"ab") * 100)
    talk.everything()
    assert talk.end.kind is CloseKind.REFUSED


FRAGMENTS = st.one_of(
    st.binary(max_size=40),
    st.builds(pdv, st.integers(0, 255), st.integers(0, 3), st.binary(max_size=40)),
    st.sampled_from(
        [pdv(3, 3, COMMAND), pdv(3, 2, b"ab"), pdv(3, 0, b"ab"), pdv(1, 3, COMMAND[:-9])]
    ),
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40),
            st.builds(lambda parts: pdu(*parts), st.lists(FRAGMENTS, max_size=4)),
            st.builds(
                lambda kind, data: struct.pack(">BxI", kind, len(data)) + data,
                st.integers(0, 255),
                st.binary(max_size=20),
            ),
        ),
        max_size=5,
    )
)
@pytest.mark.needs("time")
def test_the_loop_ends_and_leaves_nothing_behind_whatever_comes(chunks):
    talk = Conversation()
    with contextlib.suppress(OSError):
        for chunk in chunks:
            talk.ours.sendall(chunk)
        talk.ours.shutdown(socket.SHUT_WR)
    talk.everything()
    store_handler = talk.store_handler
    assert talk.end is not None
    assert len(store_handler.began) == len(store_handler.completed) + len(store_handler.abandoned)
