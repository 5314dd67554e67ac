"""Peers that pad, leave out or overdo what nobody needs are served; who is turned away is named."""

from __future__ import annotations

import contextlib
import itertools
import logging
import socket
import struct
from functools import partial
from pathlib import Path

import pytest
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
)

from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import Verdict
from prefect_dicom.network.dimse import Element, read_command, unsigned_short
from prefect_dicom.network.storage_scp import ReceiverLease
from prefect_dicom.network.storage_scp.association_events import Happening
from prefect_dicom.network.storage_scp.connection import ConnectionPolicy
from prefect_dicom.network.storage_scp.server import StorageScp
from prefect_dicom.network.storage_scp.turned_away import TurnedAwayRecord, most_telling
from prefect_dicom.network.upper_layer.association_items import ae_title
from prefect_dicom.network.upper_layer.negotiation import kept_transfer_syntax, read_answer
from prefect_dicom.operations.doctor import examine
from prefect_dicom.run.loop import work_through
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.hostile_peers import (
    association_item,
    client_hello,
    proposed,
    request_of,
    take_pdu,
    until_closed,
)
from tests.support.sites import site_around
from tests.support.wire import (
    CT,
    EXPLICIT,
    IMPLICIT,
    RELEASE_RQ,
    MemoryStoreHandler,
    store_message,
)

OURS = b"PREFECTDICOM"
REJECTED_TITLE = bytes((3, 0, 0, 0, 0, 4, 0, 1, 1, 7))
LENGTH = association_item(0x51, bytes(4))
IMPLEMENTATION = association_item(0x52, b"1.2.3.4")


class Listening:
    """A storage SCP, what it stored, and who it turned away."""

    def __init__(self, *, allowed: bool = True) -> None:
        self.store_handler = MemoryStoreHandler()
        self.record = TurnedAwayRecord()
        self.events: list = []
        self._allowed = allowed

    def __enter__(self) -> Listening:
        self._scp = StorageScp(
            "127.0.0.1",
            0,
            OURS.decode(),
            self.store_handler,
            policy=ConnectionPolicy(lambda address: self._allowed),
            on_event=self._note,
        )
        self._scp.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._scp.stop()

    def _note(self, event) -> None:
        self.events.append(event)
        self.record.note(event)

    def connect(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self._scp.port), 20)
        connection.settimeout(20)
        return connection

    def stores_after(self, request: bytes) -> None:
        """Store one instance over an association that was requested so."""
        with self.connect() as connection:
            connection.sendall(request)
            kind, _ = take_pdu(connection)
            assert kind == 2, f"no association, but a PDU of type {kind}"
            connection.sendall(store_message("1.2.3", b"abcd"))
            assert status_in_pieces(connection) == 0x0000
            connection.sendall(RELEASE_RQ)
            assert take_pdu(connection)[0] == 6
        assert [one[3] for one in self.store_handler.instances] == [b"abcd"]


def status_in_pieces(connection: socket.socket) -> int | None:
    """The status of the next response, which may be of many PDUs with a fragment each."""
    command, is_last = b"", False
    while not is_last:
        kind, body = take_pdu(connection)
        assert kind == 4
        command += body[6:]
        is_last = bool(body[5] & 2)
    return unsigned_short(read_command(command), Element.STATUS)


def request(called: bytes = OURS, **parts: bytes) -> bytes:
    items = proposed(1, b"1.2.840.10008.1.1", IMPLICIT.encode())
    items += proposed(3, CT.encode(), EXPLICIT.encode())
    return request_of(called, **{"items": items, **parts})


def with_user_items(*items: bytes) -> bytes:
    return request(user=association_item(0x50, b"".join(items)))


# --- a sender's request

REQUESTS = {
    "a called title with NULs behind": request(OURS.ljust(16, b"\0")),
    "a called title with blanks before and NULs behind": request(b"  " + OURS + b"\0\0"),
    "a called title that ends like a C string": request(OURS + b"\0xy"),
    "a calling title with NULs behind": request(calling=b"PACS".ljust(16, b"\0")),
    "a calling title of blanks": request(calling=b" " * 16),
    "a calling title of NULs": request(calling=b"\0" * 16),
    "a calling title with a Latin-1 letter": request(calling="RÖNTGEN".encode("latin-1")),
    "a calling title in UTF-8": request(calling="RÖNTGEN".encode()),
    "a calling title with control characters": request(calling=b"A\tB\x1b[2J"),
    "a version name of 21 characters": with_user_items(
        LENGTH, IMPLEMENTATION, association_item(0x55, b"V" * 21)
    ),
    "a version name of 2000 characters": with_user_items(
        LENGTH, IMPLEMENTATION, association_item(0x55, b"V" * 2000)
    ),
    "a version name with a NUL in its length": with_user_items(
        LENGTH, IMPLEMENTATION, association_item(0x55, b"VERSION\0")
    ),
    "a version name with a NUL behind it": with_user_items(
        LENGTH, IMPLEMENTATION, association_item(0x55, b"VERSION") + b"\0"
    ),
    "a NUL between a version name and other items": with_user_items(
        association_item(0x55, b"VERSION") + b"\0", LENGTH, IMPLEMENTATION
    ),
    "a version name of other letters": with_user_items(
        LENGTH, IMPLEMENTATION, association_item(0x55, b"\xff\xfe\x80")
    ),
    "an empty version name": with_user_items(LENGTH, IMPLEMENTATION, association_item(0x55, b"")),
    "a user item of an unknown type": with_user_items(
        LENGTH, association_item(0x5F, b"whatever"), IMPLEMENTATION
    ),
    "a user item that is longer than the others leave": with_user_items(
        LENGTH, IMPLEMENTATION, struct.pack(">BxH", 0x55, 400) + b"short"
    ),
    "an item of an unknown type": request(
        items=association_item(0x99, b"whatever") + proposed(3, CT.encode(), EXPLICIT.encode())
    ),
    "no maximum length": with_user_items(IMPLEMENTATION),
    "a maximum length of 1": with_user_items(association_item(0x51, b"\0\0\0\1"), IMPLEMENTATION),
    "a maximum length of two bytes": with_user_items(
        association_item(0x51, b"\x40\0"), IMPLEMENTATION
    ),
    "no implementation": with_user_items(LENGTH),
    "an implementation that is no UID": with_user_items(
        LENGTH, association_item(0x52, b"Our PACS, version 3" * 10)
    ),
    "roles without a class": with_user_items(LENGTH, association_item(0x54, b"\0\0\1\1")),
    "roles that are cut short": with_user_items(LENGTH, association_item(0x54, b"\0\x19" + b"1.2")),
    "a user's identity": with_user_items(
        LENGTH, association_item(0x58, b"\1\1\0\4user\0\0"), IMPLEMENTATION
    ),
    "UIDs with NULs behind": request(
        items=proposed(3, CT.encode() + b"\0", EXPLICIT.encode() + b"\0"),
        application=b"1.2.840.10008.3.1.1.1\0",
    ),
    "an empty class beside": request(
        items=proposed(1, b"", EXPLICIT.encode()) + proposed(3, CT.encode(), EXPLICIT.encode())
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_what_nobody_needs_is_no_reason_to_refuse_instances(name):
    with Listening() as receiver:
        receiver.stores_after(REQUESTS[name])
        assert receiver.record.since(0.0) == []


@pytest.mark.parametrize("called", [b"SOMEBODY", b"prefectdicom", b"", b"RONTGEN \xd6"])
@pytest.mark.parametrize("padding", [b" ", b"\0"])
def test_who_calls_somebody_else_is_rejected_and_never_aborted(called, padding, caplog):
    caplog.set_level(logging.WARNING)
    with Listening() as receiver:
        with receiver.connect() as connection:
            connection.sendall(request(called.ljust(16, padding), calling=b"MODALITY\0\0"))
            assert until_closed(connection) == REJECTED_TITLE
        (away,) = receiver.record.since(0.0)
    title = called.decode("latin-1")
    assert (away.code, away.peer_address) == ("receiver-title-unknown", "127.0.0.1")
    assert (away.calling_ae_title, away.called_ae_title) == ("MODALITY", title)
    assert [line.getMessage() for line in caplog.records if "MODALITY" in line.getMessage()] == [
        away.words
    ]
    assert title in away.words


def test_who_calls_somebody_else_is_rejected_without_user_information_too():
    with Listening() as receiver, receiver.connect() as connection:
        connection.sendall(request(b"SOMEBODY\0\0", user=b""))
        assert until_closed(connection) == REJECTED_TITLE


CLASSES = {
    (classes, syntaxes): b"".join(
        proposed(
            2 * number + 3,
            CT.encode() if number == 0 else f"1.2.840.10008.5.1.4.1.1.{number}".encode(),
            EXPLICIT.encode(),
            *(f"1.2.840.10008.1.2.4.{other:03}".encode() for other in range(syntaxes - 1)),
        )
        for number in range(classes)
    )
    for classes, syntaxes in ((60, 45), (127, 45), (127, 60))
}


@pytest.mark.parametrize("size", CLASSES, ids=str)
def test_a_request_may_be_as_long_as_an_association_is_wide(size):
    with Listening() as receiver:
        receiver.stores_after(request(items=CLASSES[size]))


@pytest.mark.parametrize("whole", [True, False])
def test_a_longer_request_comes_in_pieces_too(whole):
    said = request(items=CLASSES[127, 45])
    with Listening() as receiver, receiver.connect() as connection:
        pieces = [said] if whole else [said[:3], said[3:70_000], said[70_000:]]
        for piece in pieces:
            connection.sendall(piece)
        assert take_pdu(connection)[0] == 2


@pytest.mark.parametrize(
    ("offered", "taken"),
    [
        ("I", "I"),
        ("IBE", "E"),
        ("BIE", "E"),
        ("BE", "E"),
        ("IDE", "E"),
        ("IB", "B"),
        ("ID", "D"),
        ("B", "B"),
        ("DB", "D"),
        ("IJE", "J"),
        ("EJ", "E"),
        ("BDIJ", "J"),
    ],
)
def test_of_several_syntaxes_the_one_is_taken_to_which_nothing_is_re_encoded(offered, taken):
    syntaxes = {
        "I": ImplicitVRLittleEndian,
        "E": ExplicitVRLittleEndian,
        "B": ExplicitVRBigEndian,
        "D": DeflatedExplicitVRLittleEndian,
        "J": JPEG2000Lossless,
    }
    assert kept_transfer_syntax([syntaxes[one] for one in offered]) == syntaxes[taken]


def test_a_title_ends_where_its_padding_begins():
    for before, behind in itertools.product(("", " ", "\0"), ("", "  ", "\0\0", "\0x", " \0")):
        assert ae_title(f"{before}PACS{behind}".encode()) == "PACS"
    assert ae_title(b"A B") == "A B"


# --- who is turned away


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "no DICOM"),
        (b"\x04\0\0\0\0\4abcd", "no A-ASSOCIATE-RQ"),
        (b"\x01\0\0\0\0\4abcd", "cut short"),
        (request(user=b""), "without user information"),
        (request(application=b"1.2.3"), "(1,1,2)"),
    ],
    ids=["HTTP", "data", "short", "no user information", "application"],
)
def test_who_is_not_understood_is_named_with_what_came(said, words, caplog):
    caplog.set_level(logging.WARNING)
    with Listening() as receiver:
        with receiver.connect() as connection:
            connection.sendall(said)
            until_closed(connection)
        (away,) = receiver.record.since(0.0)
    assert away.code == "sender-not-understood" and words in away.words
    assert away.words in caplog.text


def test_tls_on_a_port_of_plain_dicom_has_a_reason_of_its_own():
    with Listening() as receiver:
        with receiver.connect() as connection:
            connection.sendall(client_hello())
            until_closed(connection)
        (away,) = receiver.record.since(0.0)
    assert (away.code, away.detail) == ("sender-with-tls", "it speaks TLS")


def test_who_says_nothing_is_not_named():
    with Listening() as receiver:
        receiver.connect().close()
        with receiver.connect() as connection:
            connection.sendall(request(b"SOMEBODY"))
            until_closed(connection)
        # A health check of a load balancer comes every few seconds.
        assert Happening.UNINTELLIGIBLE in {event.happening for event in receiver.events}
        assert [one.code for one in receiver.record.since(0.0)] == ["receiver-title-unknown"]


def test_an_address_that_is_not_allowed_is_named_once(caplog):
    caplog.set_level(logging.WARNING)
    with Listening(allowed=False) as receiver:
        for _ in range(5):
            with receiver.connect() as connection:
                assert until_closed(connection) == b""
        (away,) = receiver.record.since(0.0)
    assert (away.code, away.peer_address) == ("sender-not-allowed", "127.0.0.1")
    assert "allowed_senders" in away.words and caplog.text.count(away.words) == 1


def test_neither_the_record_nor_the_log_grows_with_what_peers_call(caplog):
    caplog.set_level(logging.WARNING)
    with Listening() as receiver:
        for number in range(200):
            with receiver.connect() as connection:
                connection.sendall(request(f"TITLE{number}".encode()))
                assert until_closed(connection) == REJECTED_TITLE
        kept = receiver.record.since(0.0)
    assert len(kept) == 64 and kept[-1].called_ae_title == "TITLE199"
    assert len(caplog.records) <= 60


def test_a_title_that_was_called_tells_more_than_a_stranger():
    with Listening() as receiver:
        for said in (request(b"SOMEBODY"), client_hello()):
            with receiver.connect() as connection:
                connection.sendall(said)
                until_closed(connection)
        assert most_telling(receiver.record.since(0.0)).code == "receiver-title-unknown"
        assert most_telling([]) is None


# --- a PACS's acceptance


def acceptance(*user: bytes, items: bytes = b"", without_user: bool = False) -> bytes:
    body = b"\0\1\0\0" + b"PACS\xd6".ljust(16, b"\0") + bytes(16) + bytes(32)
    body += association_item(0x10, b"1.2.840.10008.3.1.1.1") + items
    if not without_user:
        body += association_item(0x50, b"".join(user))
    return struct.pack(">BxI", 2, len(body)) + body


RESULT = association_item(
    0x21, bytes((3, 0, 0, 0)) + association_item(0x40, b"1.2.840.10008.1.2\0")
)


@pytest.mark.parametrize(
    ("pdu", "longest"),
    [
        (acceptance(LENGTH, IMPLEMENTATION, items=RESULT), 0),
        (acceptance(association_item(0x51, b"\0\0\x40\0"), items=RESULT), 16384),
        (acceptance(IMPLEMENTATION, items=RESULT), 0),
        (acceptance(items=RESULT), 0),
        (acceptance(items=RESULT, without_user=True), 0),
        (acceptance(association_item(0x51, b"\0\0\0\2"), items=RESULT), 2),
        (acceptance(association_item(0x51, b""), items=RESULT), 0),
        (acceptance(LENGTH, association_item(0x55, b"V" * 21), items=RESULT), 0),
        (acceptance(association_item(0x55, b"V") + b"\0", LENGTH, items=RESULT), 0),
        (acceptance(LENGTH, association_item(0x5F, b"x"), items=RESULT), 0),
        (acceptance(LENGTH, items=association_item(0x99, b"x") + RESULT), 0),
    ],
)
def test_an_acceptance_is_read_for_what_it_grants(pdu, longest):
    granted = read_answer(pdu)
    assert granted.results == {3: 0}
    assert granted.transfer_syntaxes == {3: "1.2.840.10008.1.2"}
    assert granted.peer_pdu_bytes == longest


# --- against a PACS: doctor and run, by C-MOVE and C-GET

HELD = list(tiny_instances(3, instances=2))


@pytest.fixture
def around(tmp_path: Path, standing):
    return partial(site_around, tmp_path, HELD, standing=standing)


def is_pulled(place) -> None:
    assert [f for f in examine(place.site) if not f.ok] == []
    assert place.pull().rows == {Verdict.ARCHIVED: 3}
    place.audit()


ACCEPTANCES = {
    "no maximum length": {"leave_out": [0x51]},
    "a maximum length of 1": {"leave_out": [0x51], "add": association_item(0x51, b"\0\0\0\1")},
    "a maximum length of 20": {"leave_out": [0x51], "add": association_item(0x51, b"\0\0\0\x14")},
    "a long version name": {"leave_out": [0x55], "add": association_item(0x55, b"V" * 21)},
    "a NUL behind the version name": {
        "leave_out": [0x55],
        "add": association_item(0x55, b"VERSION") + b"\0",
    },
    "an unknown item": {"add": association_item(0x5F, b"whatever")},
    "nothing of itself": {"leave_out": [0x51, 0x52, 0x55]},
    "other titles": {"called": b"\xd6\xff\0\0", "calling": b"\0" * 16},
}


@pytest.mark.parametrize("retrieve", ["c-move", "c-get"])
@pytest.mark.parametrize("name", ACCEPTANCES)
def test_an_acceptance_with_odd_items_is_one(name, retrieve, around):
    script = [Behaviour("assoc.items", **ACCEPTANCES[name])]
    with around(script=script, retrieve=retrieve) as place:
        is_pulled(place)


SENDERS = {
    "a title padded with NUL": [("store.titles", {"called": OURS.ljust(16, b"\0")})],
    "no calling title": [("store.titles", {"calling": b" " * 16})],
    "a Latin-1 letter": [("store.titles", {"calling": b"R\xd6NTGEN"})],
    "a long version name": [("store.items", {"add": association_item(0x55, b"V" * 30)})],
    "no maximum length": [("store.items", {"leave_out": [0x51]})],
    "sixty classes": [("store.contexts", {"classes": 60})],
    "127 classes": [("store.contexts", {"classes": 127})],
    "PDUs of 1 MiB": [("store.long_pdus", {}), ("store.huge", {"mebibytes": 3})],
}


@pytest.mark.parametrize("name", SENDERS)
def test_a_sender_with_an_odd_request_is_received(name, around):
    script = [Behaviour(knob, **arguments) for knob, arguments in SENDERS[name]]
    with around(script=script) as place:
        _call(place, script, str)
        is_pulled(place)


def test_pdus_of_a_mebibyte_are_received_by_c_get_too(around):
    script = [Behaviour("store.huge", mebibytes=3)]
    with around(script=script, retrieve="c-get") as place:
        is_pulled(place)


@pytest.mark.parametrize("receives", [False, True], ids=["no receiver", "a receiver"])
def test_a_pacs_that_ignores_roles_and_sends_all_the_same_is_pulled_from(
    receives, tmp_path, standing
):
    script = [Behaviour("assoc.no_roles", sends=True)]
    more = {"standing": standing} if receives else {}
    with site_around(tmp_path, HELD, script=script, retrieve="c-get", **more) as place:
        is_pulled(place)
        assert not place.pacs.requests("C-MOVE")


def test_a_pacs_that_ignores_roles_and_sends_nothing_is_not_asked_for_long(tmp_path):
    script = [Behaviour("assoc.no_roles")]
    with site_around(tmp_path, HELD[:4], script=script, retrieve="c-get") as place:
        place.pull()
        assert {v.reason for v in place.verdicts()} == {"sop-classes-refused"}
        assert len(place.pacs.requests("C-GET")) <= 3


def _call(place, script, changed) -> None:
    """Have the PACS call the receiver's title changed, where it is to call one, padded by NUL."""
    title = changed(place.site.receiver.ae_title)
    for behaviour in script:
        if behaviour.arguments.get("called"):
            behaviour.arguments["called"] = title.encode().ljust(16, b"\0")


TURNED_AWAY = {
    "another address": (
        Behaviour("store.source", address="127.0.0.2"),
        str,
        "sender-not-allowed",
        ["127.0.0.2", "allowed_senders"],
    ),
    "a title in lower case": (
        Behaviour("store.titles", called=OURS),
        str.lower,
        "receiver-title-unknown",
        ["127.0.0.1 (DEMOPACS)", '"test'],
    ),
    "a title of somebody else": (
        Behaviour("store.titles", called=OURS),
        lambda title: "OTHER",
        "receiver-title-unknown",
        ['"OTHER"'],
    ),
}


@pytest.mark.parametrize("reported", [None, 0x0000, 0xC000], ids=["A702", "success", "C000"])
@pytest.mark.parametrize("name", TURNED_AWAY)
def test_doctor_and_run_name_who_was_turned_away(name, reported, around):
    behaviour, changed, code, words = TURNED_AWAY[name]
    script = [behaviour]
    if reported is not None:
        script.append(Behaviour("move.final_status", status=reported))
    node = {"timeouts": {"settle_seconds": 0.2}}
    with around(script=script, node=node) as place:
        _call(place, script, changed)
        (fault,) = [f for f in examine(place.site) if not f.ok]
        assert f"({code}: " in fault.words
        assert all(word in fault.words for word in words)
        with place.opened() as pull:
            with pytest.raises(PacsError) as error:
                work_through(pull)
            (noted,) = pull.ledger.cohorts.notes(pull.cohort.number)
        assert error.value.code == code
        assert all(word in str(noted) for word in words)
        assert {reason for _, reason in place.reasons()} <= {code, None}
        log = (place.site.spool.path / "receiver.log").read_text()
        assert all(word in log for word in words)
        # It is corrected, and everything comes.
        place.pacs.script.clear()
        assert place.rerun().rows == {Verdict.ARCHIVED: 3}


def test_a_stranger_at_the_port_is_not_blamed_for_what_arrives(around):
    with around() as place:

        def knock(pacs) -> None:
            with contextlib.suppress(OSError):
                address, source = ("127.0.0.1", place.site.receiver.port), ("127.0.0.9", 0)
                with socket.create_connection(address, 5, source) as connection:
                    connection.recv(1)

        place.pacs.script.append(Behaviour("pacs.mutate", change=knock))
        is_pulled(place)


def test_the_receiver_says_whom_it_turned_away(around):
    with around() as place, ReceiverLease(place.site) as lease:
        address, source = ("127.0.0.1", place.site.receiver.port), ("127.0.0.8", 0)
        with socket.create_connection(address, 5, source) as connection:
            assert until_closed(connection) == b""
        assert any("127.0.0.8" in words for words in lease.status()["turned_away"])
