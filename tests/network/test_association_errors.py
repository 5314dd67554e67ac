"""Why a peer cannot be spoken with: each cause has its code, and its person to act."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time

import pytest

from prefect_dicom.config.node import PacsNode, Timeouts
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import Disposition
from prefect_dicom.network import association
from prefect_dicom.network.find.list_studies import find_studies
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.testing import PacsPolicy, ScriptedPacs
from tests.support import peers

QUICK = Timeouts(connect_seconds=0.5, acse_seconds=0.5, find_seconds=1)


def _node(port: int, host: str = "127.0.0.1", **settings) -> PacsNode:
    return PacsNode(
        **{"host": host, "port": port, "called_ae_title": "PACS", "timeouts": QUICK, **settings}
    )


def _cause(node: PacsNode, ask=Requestor.echo) -> str:
    threads = threading.active_count()
    with Requestor(node) as requestor, pytest.raises(PacsError) as error:
        ask(requestor)
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads, "a failed association leaves no thread behind"
    return error.value.code


@contextlib.contextmanager
def _listening(answer=None, backlog: int = 5):
    """A TCP server that hands each connection to ``answer``; without one it only listens."""
    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as server:
        stop = threading.Event()

        def serve():
            server.settimeout(0.05)
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    connection, _ = server.accept()
                    with connection:
                        connection.settimeout(5)
                        with contextlib.suppress(OSError):
                            answer(connection)

        thread = threading.Thread(target=serve) if answer else None
        if thread:
            thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            stop.set()
            if thread:
                thread.join()


def _after_the_request(reply: bytes):
    def answer(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(reply)
        while connection.recv(65536):
            pass

    return answer


# --- before any association -----------------------------------------------------------------


def test_a_name_that_does_not_resolve():
    node = _node(104, "no-such-host.invalid")
    assert _cause(node) == "pacs-address"


def test_a_closed_port():
    node = _node(peers.free_port())
    assert _cause(node) == "pacs-refused"


def test_an_address_that_does_not_answer():
    """A listener whose queue is full: Linux drops what comes, as a firewall does."""
    with _listening(backlog=0) as port, contextlib.ExitStack() as queue:
        for _ in range(4):
            waiting = queue.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        assert _cause(_node(port)) == "pacs-unreachable"


def test_a_peer_that_closes_at_once():
    def reset(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with _listening(reset) as port:
        assert _cause(_node(port)) == "pacs-reset"


def test_a_peer_that_accepts_and_says_nothing():
    with _listening(_after_the_request(b"")) as port:
        assert _cause(_node(port)) == "pacs-silent"


def test_a_peer_that_does_not_speak_dicom():
    with _listening(_after_the_request(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        assert _cause(_node(port)) in ("pacs-reset", "pacs-silent")


# --- rejections and aborts ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ((1, 1, 3), "calling-ae-title-unknown"),
        ((1, 1, 7), "called-ae-title-unknown"),
        ((2, 3, 1), "pacs-busy"),
        ((1, 3, 2), "pacs-busy"),
        ((1, 1, 1), "association-rejected"),
        ((1, 2, 2), "protocol-not-supported"),
        ((2, 1, 3), "association-rejected"),
        # Outside the standard: pynetdicom raises on these.
        ((1, 1, 99), "association-rejected"),
        ((1, 9, 1), "association-rejected"),
        ((2, 1, 250), "pacs-busy"),
    ],
)
def test_a_rejection_is_reported_by_its_numbers(numbers, code):
    reply = struct.pack(">BxLx3B", 3, 4, *numbers)
    with _listening(_after_the_request(reply)) as port:
        assert _cause(_node(port)) == code


def test_an_abort_instead_of_an_acceptance():
    with _listening(_after_the_request(struct.pack(">BxL2x2B", 7, 4, 0, 0))) as port:
        assert _cause(_node(port)) == "not-permitted"


def _find(requestor):
    find_studies(requestor, {"PatientID": "NOBODY-HAS-THIS"})


def test_orthanc_aborts_a_caller_it_does_not_know_at_the_first_query(orthanc):
    stranger = orthanc.node(calling_ae_title="STRANGER")
    assert _cause(stranger, _find) == "not-permitted"
    with Requestor(stranger) as requestor:
        requestor.echo()
        with pytest.raises(PacsError) as error:
            _find(requestor)
    assert error.value.code == "not-permitted"
    assert error.value.disposition is Disposition.OPERATOR


def test_dcmqrscp_rejects_a_wrong_called_title_in_exact_case(dcmqrscp):
    for title in ("WRONG", "dcmqrscp"):
        assert _cause(dcmqrscp.node(called_ae_title=title)) == "called-ae-title-unknown"


def test_an_information_model_that_is_not_offered(new_archive):
    archive = new_archive(peers.Dcmqrscp, arguments=["--no-study-root"])
    with Requestor(archive.node()) as requestor:
        assert requestor.echo() < 5
    assert _cause(archive.node(), _find) == "service-not-offered"


def test_a_limit_of_associations_is_a_matter_of_time():
    with ScriptedPacs(policy=PacsPolicy(associations=1)) as pacs:
        node = _node(pacs.port, called_ae_title=pacs.ae_title)
        with Requestor(node) as first:
            first.echo()
            assert _cause(node) == "pacs-busy"


# --- and where all is well ------------------------------------------------------------------


@pytest.mark.parametrize("archive", ["orthanc", "dcmqrscp"])
def test_an_echo_takes_milliseconds(archive, request):
    with Requestor(request.getfixturevalue(archive).node()) as requestor:
        assert min(requestor.echo() for _ in range(5)) < 0.04, "no delayed acknowledgement"


def test_a_query_takes_milliseconds_with_an_archive_as_it_is_installed(new_archive):
    """A PACS that delays what it sends; our acknowledgements make it quick."""

    class AsInstalled(peers.Orthanc):
        environment = {}

    archive = new_archive(AsInstalled)
    with Requestor(archive.node()) as requestor:
        _find(requestor)
        seconds = []
        for _ in range(15):
            started = time.monotonic()
            _find(requestor)
            seconds.append(time.monotonic() - started)
    assert sorted(seconds)[7] < 0.03, "no delayed acknowledgement"


def test_a_requestor_releases_its_association_and_leaves_no_thread(orthanc):
    threads = threading.active_count()
    before = orthanc.log.read_text(errors="replace")
    for _ in range(10):
        with Requestor(orthanc.node()) as requestor:
            requestor.echo()
    assert threading.active_count() == threads
    log = orthanc.log.read_text(errors="replace")[len(before) :]
    assert "Association Aborted" not in log


def test_a_closed_requestor_opens_anew_when_it_is_used(orthanc):
    requestor = Requestor(orthanc.node())
    requestor.close()
    requestor.echo()
    requestor.close()
    requestor.close()
    requestor.echo()
    requestor.close()


def test_a_peer_that_never_answers_the_release_costs_seconds_and_no_error(monkeypatch):
    monkeypatch.setattr(association, "_RELEASE_SECONDS", 0.2)
    with ScriptedPacs() as pacs:
        held = threading.Event()
        with _forwarding(pacs.port, drop=b"\x05", dropped=held) as port:
            requestor = Requestor(_node(port, called_ae_title=pacs.ae_title))
            requestor.echo()
            requestor.close()
        assert held.is_set()


@contextlib.contextmanager
def _forwarding(port: int, drop: bytes, dropped: threading.Event):
    """A proxy that swallows the PDUs of one type on their way to ``port``."""

    def pump(source: socket.socket, target: socket.socket, swallow: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if swallow and data[:1] == drop:
                    dropped.set()
                    continue
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def answer(connection: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", port)) as beyond:
            back = threading.Thread(target=pump, args=(beyond, connection, False))
            back.start()
            pump(connection, beyond, True)
            back.join()

    with _listening(answer) as through:
        yield through


def test_a_peer_that_stops_in_the_middle_of_a_pdu_holds_nobody():
    """The first bytes of an acceptance that is never finished, on a connection that stays."""
    with _listening(_after_the_request(b"\x02\x00\x00\x00\x10\x00half")) as port:
        started = time.monotonic()
        assert _cause(_node(port)) == "pacs-silent"
        assert time.monotonic() - started < 3
