"""Whatever hostile peers do to the receiver, a legitimate sender is served all the while.

The receiver runs in its process, as at a site. While each attack goes on a legitimate sender
stores requested instances on one association and asks C-ECHO on new ones, each answered within a
second. Afterwards the process is as it was: memory, threads, open files; it has written nothing
outside its spool, and of what nobody asked for nothing has got past quarantine.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
import zlib
from collections.abc import Iterator

import pytest

from prefect_dicom.network.dimse import Element, write_command
from tests.support.campaign import subset
from tests.support.hostile_peers import (
    ABORT,
    CONTEXTS,
    OURSELVES,
    PRIVATE_CLASS,
    REFERENCE,
    REJECT,
    REQUESTED,
    STRANGE_ADDRESS,
    USER_INFORMATION,
    Foe,
    Receiver,
    association_item,
    attacked,
    client_hello,
    data_set,
    file_name,
    proposed,
    push,
    request_of,
    running,
    store,
    take,
    take_pdu,
    take_status,
    until_closed,
)
from tests.support.part10_objects import DEFLATED, element
from tests.support.wire import (
    CT,
    EXPLICIT,
    RELEASE_RQ,
    echo_message,
    message_pdus,
    pdu,
    pdv,
)

pytestmark = [pytest.mark.campaign("hostile peers"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def patient_receiver(request, tmp_path_factory, authority) -> Iterator[Receiver]:
    """With the deadlines of a site: minutes. Over plain DICOM, or over TLS."""
    tls = authority.tls(authority.issue("patient")) if request.param == "TLS" else None
    with running(tmp_path_factory.mktemp("patient"), tls) as receiver:
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
        "half a mebibyte of empty items": fill(association_item(0x99, b""), 520_000)
        + USER_INFORMATION,
        "half a mebibyte of contexts": fill(proposed(1, uid, uid), 520_000) + USER_INFORMATION,
        "half a mebibyte of syntaxes": b"".join(
            proposed(2 * n + 1, uid, *[uid] * 130) for n in range(128)
        )
        + USER_INFORMATION,
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
            assert said == bytes((3, 0, 0, 0, 0, 4, 0, 1, 1, 7))


def strange_addresses(foe: Foe) -> None:
    for number in range(foe.many(300, 10_000)):
        connection = foe.connect_plain(STRANGE_ADDRESS)
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
            # What can be no AE title at all is rejected.
            connection = foe.associate()
        elements = {
            Element.MOVE_ORIGINATOR_AE_TITLE: name,
            Element.MOVE_ORIGINATOR_MESSAGE_ID: foe.receiver.message_id,
            Element.AFFECTED_SOP_CLASS_UID: name,
        }
        push(connection, store(name, data_set(name, study=name), elements=elements))
        assert take_status(connection) == 0x0000
        # In the instance only, and in the request only.
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
        foe.receiver.until_quarantined(file_name(sop, bomb, syntax=DEFLATED))


def nested_sequences(foe: Foe) -> None:
    levels = 100_000
    sequence = b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff" * levels
    connection = foe.associate()
    push(connection, store(b"1.2.93", sequence))
    assert take_status(connection) == 0x0000
    foe.receiver.until_quarantined(file_name("1.2.93", sequence))


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
            foe.receiver.until_quarantined(name)


def duplicates_with_other_content(foe: Foe) -> None:
    """Under the UIDs of an instance that has arrived: nothing that lies there is replaced."""
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
@pytest.mark.parametrize("patient_receiver", subset(["plain", "TLS"], ["plain"]), indirect=True)
def test_a_legitimate_sender_is_served_throughout(patient_receiver, scale, attack):
    with attacked(patient_receiver, scale) as foe:
        attack(foe)
