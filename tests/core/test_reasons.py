"""Whatever a peer, a network, a store or a database does, it is one reason of one table.

The tables here say which. They are closed against what others enumerate: pynetdicom's statuses,
rejections and aborts, the errors of sockets, and those of the databases.
"""

from __future__ import annotations

import ast
import collections
import errno
import itertools
import re
import socket
import sqlite3
import ssl
from pathlib import Path

import psycopg
import pytest
import sqlalchemy.exc
from pynetdicom import status as tables
from pynetdicom.pdu import A_ABORT_RQ, A_ASSOCIATE_RJ
from pynetdicom.status import code_to_category

from prefect_dicom.archive import s3_errors
from prefect_dicom.core.errors import LedgerError
from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons import REASONS
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.network.association_errors import aborted, rejected, unconnected
from prefect_dicom.network.status import StorageStatus, reason_for_status

# ---------------------------------------------------------------------------------- DIMSE statuses

SERVICES = {
    "C-ECHO": tables.VERIFICATION_SERVICE_CLASS_STATUS,
    "C-FIND": tables.QR_FIND_SERVICE_CLASS_STATUS,
    "C-MOVE": tables.QR_MOVE_SERVICE_CLASS_STATUS,
    "C-GET": tables.QR_GET_SERVICE_CLASS_STATUS,
    "C-STORE": tables.STORAGE_SERVICE_CLASS_STATUS,
}
ANY_SERVICE = {
    0x0000: None,
    0x0105: "request-refused",
    0x0106: "request-refused",
    0x0107: None,
    0x0110: "pacs-failure",
    0x0111: "request-refused",
    0x0112: "request-refused",
    0x0113: "request-refused",
    0x0114: "request-refused",
    0x0115: "request-refused",
    0x0116: None,
    0x0117: "request-refused",
    0x0118: "service-not-offered",
    0x0119: "request-refused",
    0x0120: "request-refused",
    0x0121: "request-refused",
    0x0122: "service-not-offered",
    0x0123: "request-refused",
    0x0124: "not-permitted",
    0x0210: "unexpected",
    0x0211: "service-not-offered",
    0x0212: "request-refused",
    0x0213: "pacs-busy",
    0xFE00: "pacs-failure",
}
RETRIEVE = {
    # What is asked for by its UID and is not there has gone since it was listed.
    0x0112: "study-gone",
    0xA701: "pacs-busy",
    0xA702: "pacs-failure",
    0xA900: "request-refused",
    0xAA00: "request-refused",
    0xAA01: "request-refused",
    0xAA02: "request-refused",
    0xAA03: "request-refused",
    0xAA04: "request-refused",
    0xB000: None,
    0xFF00: None,
    **{status: "pacs-failure" for status in range(0xC000, 0xD000)},
}
EXPECTED = {
    "C-ECHO": ANY_SERVICE,
    "C-FIND": {
        **ANY_SERVICE,
        0xA700: "answers-capped",
        0xA710: "request-refused",
        0xA900: "request-refused",
        0xB001: "answers-capped",
        0xFE00: "answers-capped",
        0xFF00: None,
        0xFF01: None,
        **{status: "request-refused" for status in range(0xC000, 0xD000)},
    },
    "C-MOVE": {
        **ANY_SERVICE,
        **RETRIEVE,
        0xA702: "move-destination-failed",
        0xA801: "move-destination-unknown",
    },
    "C-GET": {**ANY_SERVICE, **RETRIEVE},
    "C-STORE": {
        # What is at fault is the instance, or that the target cannot take it.
        **{
            status: "delivery-refused" if code == "request-refused" else code
            for status, code in ANY_SERVICE.items()
        },
        # A full disk as often as a faulty instance.
        0x0110: "pacs-busy",
        # The target has it already: its list says whether that is so.
        0x0111: None,
        0x0118: "delivery-refused",
        0x0122: "delivery-refused",
        **dict.fromkeys(range(0xA700, 0xA800), "pacs-busy"),
        0xA702: "pacs-failure",
        **{status: "delivery-refused" for status in range(0xA900, 0xAA00)},
        0xB000: None,
        0xB006: None,
        0xB007: None,
        **{status: "delivery-refused" for status in range(0xC000, 0xD000)},
    },
}


@pytest.mark.parametrize("service", SERVICES)
def test_every_status_that_pynetdicom_knows_of_is_expected_here(service):
    assert SERVICES[service].keys() - EXPECTED[service].keys() == set()


@pytest.mark.parametrize("service", SERVICES)
def test_every_status_is_the_one_reason_that_is_expected(service):
    reported = {status: reason_for_status(service, status) for status in EXPECTED[service]}
    assert {f"{s:04X}": c for s, c in reported.items() if c != EXPECTED[service][s]} == {}


@pytest.mark.parametrize("service", SERVICES)
def test_the_set_of_reasons_is_closed_for_any_number_a_peer_may_invent(service):
    for status in range(0x10000):
        code = reason_for_status(service, status)
        assert code is None or code in REASONS, f"{status:04X}"
        if code is None:
            known = code_to_category(status) in ("Success", "Pending", "Warning")
            known |= (service, status) == ("C-STORE", 0x0111)
            assert known or status >> 12 == 0xB, f"{status:04X} is taken for a success"


@pytest.mark.parametrize("service", SERVICES)
def test_a_status_nobody_has_named_is_a_failure_that_may_pass(service):
    for status in (0x4242, 0x7777, 0xABCD, 0xFFFE):
        code = reason_for_status(service, status)
        assert REASONS[code].disposition is Disposition.TRANSIENT, f"{status:04X}"


def test_what_the_receiver_answers_are_statuses_of_the_storage_service():
    assert {int(status) for status in StorageStatus} <= tables.STORAGE_SERVICE_CLASS_STATUS.keys()


# ------------------------------------------------------------------------- A-ASSOCIATE-RJ, A-ABORT

_WITHOUT_REASON = "association-rejected"
REJECTIONS = {
    (1, 1, 1): _WITHOUT_REASON,
    (1, 1, 2): "protocol-not-supported",
    (1, 1, 3): "calling-ae-title-unknown",
    (1, 1, 7): "called-ae-title-unknown",
    (1, 2, 1): _WITHOUT_REASON,
    (1, 2, 2): "protocol-not-supported",
    # Vendors set the result carelessly: these two pass, whatever it says.
    (1, 3, 1): "pacs-busy",
    (1, 3, 2): "pacs-busy",
    (2, 1, 1): "pacs-busy",
    (2, 1, 2): "pacs-busy",
    # An AE title that is unknown for a moment: tried again, and then a person is asked.
    (2, 1, 3): _WITHOUT_REASON,
    (2, 1, 7): _WITHOUT_REASON,
    (2, 2, 1): "pacs-busy",
    (2, 2, 2): "pacs-busy",
    (2, 3, 1): "pacs-busy",
    (2, 3, 2): "pacs-busy",
}
ABORTS = {
    # (source, reason): at the first request, later
    (0, 0): ("not-permitted", "association-lost"),
    (2, 0): ("association-lost", "association-lost"),
    (2, 1): ("association-lost", "association-lost"),
    (2, 2): ("association-lost", "association-lost"),
    (2, 4): ("protocol-not-supported", "association-lost"),
    (2, 5): ("protocol-not-supported", "association-lost"),
    (2, 6): ("protocol-not-supported", "association-lost"),
}


def named_rejections() -> set[tuple[int, int, int]]:
    """Result, source and reason of each rejection that pynetdicom has words for."""
    named = set()
    for numbers in itertools.product(range(256), range(256)):
        pdu = A_ASSOCIATE_RJ()
        pdu.source, pdu.reason_diagnostic = numbers
        try:
            words = pdu.reason_str
        except ValueError:
            continue
        if words != "Reserved":
            named |= {(result, *numbers) for result in (1, 2)}
    return named


def test_every_rejection_that_pynetdicom_has_words_for_is_expected_here(caplog):
    caplog.set_level("CRITICAL", "pynetdicom")
    assert named_rejections() == REJECTIONS.keys()


def test_every_rejection_is_the_one_reason_that_is_expected():
    assert {n: rejected(*n).code for n in REJECTIONS} == REJECTIONS


@pytest.mark.needs("time")
def test_a_rejection_by_reserved_numbers_is_told_with_its_numbers():
    for numbers in itertools.product(range(256), (0, 1, 2, 3, 4, 255), range(256)):
        error = rejected(*numbers)
        assert error.code in REASONS
        if numbers not in REJECTIONS:
            assert error.code in (_WITHOUT_REASON, "pacs-busy") or numbers[0] not in (1, 2)
        assert "({},{},{})".format(*numbers) in error.detail


def test_every_abort_that_pynetdicom_has_words_for_is_expected_here(caplog):
    caplog.set_level("CRITICAL", "pynetdicom")
    named = set()
    for source, reason in itertools.product(range(256), range(256)):
        pdu = A_ABORT_RQ()
        pdu.source, pdu.reason_diagnostic = source, reason
        if source == 2 and pdu.reason_str not in ("Reserved", "(no value available)"):
            named.add((source, reason))
    # A service user gives no reason: its number is not significant.
    assert named | {(0, 0)} == ABORTS.keys()


@pytest.mark.parametrize("first", [True, False], ids=["at the first request", "later"])
def test_every_abort_is_the_one_reason_that_is_expected(first):
    for numbers, codes in ABORTS.items():
        assert aborted(*numbers, first_request=first).code == codes[not first], numbers
    for numbers in itertools.product(range(256), range(256)):
        assert aborted(*numbers, first_request=first).code in REASONS
    assert aborted(None, None, first_request=first).code == "association-lost"


# -------------------------------------------------------------------------------------- connections

CONNECTIONS = {
    socket.gaierror(socket.EAI_NONAME, ""): "pacs-address",
    UnicodeError(): "pacs-address",
    ConnectionRefusedError(errno.ECONNREFUSED, ""): "pacs-refused",
    ConnectionResetError(errno.ECONNRESET, ""): "pacs-reset",
    TimeoutError(errno.ETIMEDOUT, ""): "pacs-unreachable",
    TimeoutError("timed out"): "pacs-unreachable",
    ssl.SSLError(1, ""): "pacs-unreachable",
}


def test_every_way_a_connection_can_fail_is_the_one_reason_that_is_expected():
    for error, code in CONNECTIONS.items():
        assert unconnected(error, 1).code == code, error
    for number, name in errno.errorcode.items():
        error = unconnected(OSError(number, ""), 1)
        assert error.code in {"pacs-refused", "pacs-reset", "pacs-unreachable"}
        if type(OSError(number, "")) is OSError:
            assert error.detail == f"no connection ({name})"


# -------------------------------------------------------------------------------- store and ledger


def test_every_code_an_s3_fault_is_told_by_exists():
    tree = ast.parse(Path(s3_errors.__file__).read_text(encoding="utf-8"))
    words = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    codes = {word for word in words if re.fullmatch(r"archive(-[a-z]+)+|unexpected", word)}
    assert {"archive-refused", "archive-unavailable", "archive-checksum"} < codes
    assert codes <= REASONS.keys()


def errors_below(base: type[Exception]) -> set[type[Exception]]:
    return {base}.union(*(errors_below(one) for one in base.__subclasses__()))


def test_every_error_of_a_database_is_a_ledger_that_is_busy_damaged_or_unavailable():
    origins = errors_below(sqlite3.Error) | errors_below(psycopg.Error)
    wrappers = errors_below(sqlalchemy.exc.DBAPIError)
    assert len(origins) > 200 and sqlalchemy.exc.OperationalError in wrappers
    secret = "Zyxquordt^Immanuela"

    @translate_database_errors
    def fail(error: Exception) -> None:
        raise error

    raised = [
        wrapper(secret, {"id": secret}, origin(secret))
        for wrapper in wrappers
        for origin in (sqlite3.OperationalError, psycopg.OperationalError)
    ]
    raised += [sqlalchemy.exc.DBAPIError(secret, {}, origin(secret)) for origin in origins]
    raised += [error(secret) for error in errors_below(sqlite3.Error)]
    raised += [sqlalchemy.exc.TimeoutError(secret), sqlalchemy.exc.SQLAlchemyError(secret)]
    codes = collections.defaultdict(set)
    for error in raised:
        with pytest.raises(LedgerError) as caught:
            fail(error)
        state = getattr(getattr(error, "orig", None), "sqlstate", None)
        codes[caught.value.code].add(state)
        assert secret not in str(caught.value) and caught.value.__context__ is None
    assert codes.pop("ledger-damaged") == {"XX001", "XX002"}
    passing = codes.pop("ledger-busy")
    assert passing == {
        state for state in passing if re.match("08|40|53300|55P03|57014|57P0", state)
    }
    assert {"08006", "40001", "40P01", "55P03", "57P01", "57P03"} < passing
    assert codes.keys() == {"ledger-unavailable"}
    assert {"25006", "42501", "53100", "57P04"} < codes["ledger-unavailable"]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SQLITE_BUSY", "ledger-busy"),
        ("SQLITE_BUSY_SNAPSHOT", "ledger-busy"),
        ("SQLITE_LOCKED_SHAREDCACHE", "ledger-busy"),
        ("SQLITE_CORRUPT_INDEX", "ledger-damaged"),
        ("SQLITE_NOTADB", "ledger-damaged"),
        ("SQLITE_FULL", "ledger-unavailable"),
        ("SQLITE_IOERR_WRITE", "ledger-unavailable"),
        ("SQLITE_READONLY", "ledger-unavailable"),
    ],
)
def test_every_result_of_sqlite_is_the_one_reason_that_is_expected(name, code):
    @translate_database_errors
    def fail() -> None:
        error = sqlite3.OperationalError("SECRET^NAME")
        error.sqlite_errorname = name
        raise sqlalchemy.exc.OperationalError("SECRET", {}, error)

    with pytest.raises(LedgerError) as caught:
        fail()
    assert caught.value.code == code
    assert caught.value.detail == f"the database answered {name}"
