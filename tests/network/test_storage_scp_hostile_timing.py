"""Peers that stall the receiver, interfere with a run or halt in TLS are cut off in time."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from prefect_dicom.core.model import Verdict
from prefect_dicom.network.dimse import Element, write_command
from prefect_dicom.testing import Behaviour, tiny_instances
from prefect_dicom.testing.instances import StoredInstance, decoded, encoded
from prefect_dicom.testing.sending import StoreAssociation, context_key
from tests.support.campaign import subset
from tests.support.hostile_peers import (
    ABORT,
    GROWTH_BYTES,
    OUR_ADDRESS,
    QUICK,
    Foe,
    Receiver,
    association_item,
    attacked,
    client_hello,
    data_set,
    push,
    running,
    store,
    until_closed,
)
from tests.support.sites import site_around
from tests.support.wire import (
    message_pdus,
    pdu,
    pdv,
)

pytestmark = [pytest.mark.campaign("hostile peers"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def quick_receiver(tmp_path_factory) -> Iterator[Receiver]:
    """With deadlines of seconds."""
    with running(tmp_path_factory.mktemp("quick"), **QUICK) as receiver:
        yield receiver


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


def windows_that_are_exceeded(foe: Foe) -> None:
    """Any number of outstanding requests is asked for, and sent, and no response read."""
    window = association_item(0x53, bytes(4))
    user = association_item(0x50, association_item(0x51, bytes(4)) + window)
    connections = [foe.associate(user=user) for _ in range(foe.many(4, 20))]
    sop = b"1.2.84"
    requests = store(sop, data_set(sop, study=b"1.2.840", size=100)) * 100
    for connection in connections:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # Each is slowed down to nothing, then cut off; none makes us hold more meanwhile.
        assert not push(connection, requests, 10_000)
    assert foe.receiver.growth() < GROWTH_BYTES


def data_sets_without_a_last_fragment(foe: Foe) -> None:
    connection = foe.associate()
    push(connection, store(b"1.2.85", b"")[:-12])
    piece = pdu(pdv(3, 0, bytes(16_000)))
    while push(connection, piece, 10):
        # Not as fast as it goes: the disk is everybody's.
        select.select([connection], [], [], 0.02)
    assert until_closed(connection)[:1] in (ABORT, b"")


QUICK_ATTACKS = [
    dripping,
    trickling,
    silence,
    a_slow_reader,
    windows_that_are_exceeded,
    data_sets_without_a_last_fragment,
]


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


def test_silent_and_halting_tls_clients_hold_up_nobody(tmp_path, authority, scale):
    tls = authority.tls(authority.issue("receiver"))
    with running(tmp_path, tls, **QUICK) as receiver, attacked(receiver, scale) as foe:
        hello = client_hello()
        for said in (b"", hello[:10], hello, foe.request(), hello + hello, b"\x16\x03\x01\xff\xff"):
            for _ in range(foe.many(10, 100)):
                push(foe.connect_plain(), said)
        foe.legitimate.served(5)
        assert_all_cut_off(
            [(foe.connect_plain(), hello), (foe.connect_plain(), hello + bytes(1000))]
        )
