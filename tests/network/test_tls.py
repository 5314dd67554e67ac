"""DICOM over TLS against DCMTK, OpenSSL and ourselves: who talks to whom, and what each fault is.

Certificates are verified in both directions. Each way to fail has a reason of its own: whoever
reads it knows which side has to change what.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from pydicom.uid import ExplicitVRLittleEndian

from prefect_dicom.config.node import PacsNode, Timeouts
from prefect_dicom.config.receiver import Receiver
from prefect_dicom.config.tls import Tls
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons import REASONS, Scope
from prefect_dicom.network.association import connect
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.storage_scp.connection import ConnectionPolicy
from prefect_dicom.network.storage_scp.sender_tls import SenderTls
from prefect_dicom.network.storage_scp.server import StorageScp
from prefect_dicom.network.storage_scp.turned_away import TurnedAwayRecord
from prefect_dicom.network.tls import peer_of
from tests.support.certificates import Authority, Identity
from tests.support.peers import free_port
from tests.support.sites import until, until_it_listens
from tests.support.wire import CT, MemoryStoreHandler, make_instance, tool

NAME = "pacs.example.org"
SHORT = Timeouts(connect_seconds=5, acse_seconds=5)


class Certificates(NamedTuple):
    """Certificates of one authority and of another, good and faulty ones."""

    authority: Authority
    foreign: Authority
    ours: Identity
    server: Identity
    misnamed: Identity
    expired: Identity
    stranger: Identity

    @property
    def tls(self) -> Tls:
        return self.authority.tls(self.ours)


@pytest.fixture(scope="module")
def certificates(authority, foreign_authority) -> Certificates:
    return Certificates(
        authority,
        foreign_authority,
        authority.issue("our-side"),
        authority.issue("pacs-side"),
        authority.issue("misnamed", NAME),
        authority.issue("expired", days=(-3, -1)),
        foreign_authority.issue("stranger"),
    )


@contextlib.contextmanager
def process(*command: object, folder: Path) -> Iterator[subprocess.Popen]:
    with (folder / "log").open("ab") as log:
        peer = subprocess.Popen(
            [tool(str(command[0])), *map(str, command[1:])], stdout=log, stderr=log, cwd=folder
        )
    try:
        yield peer
    finally:
        peer.kill()
        peer.wait()


@contextlib.contextmanager
def storescp(
    folder: Path, identity: Identity | None, trust: Path | None = None, profile: str = "+py"
) -> Iterator[int]:
    """DCMTK's receiver, which answers C-ECHO too; the port it listens on."""
    port = free_port()
    tls = () if identity is None else ("+tls", identity.key, identity.certificate)
    if trust is not None:
        tls += ("+cf", trust, profile)
    with process("storescp", *tls, port, folder=folder):
        until_it_listens(port)
        yield port


def node(port: int, tls: Tls | bool, **more) -> PacsNode:
    return PacsNode(
        host="127.0.0.1", port=port, called_ae_title="ANY", tls=tls, timeouts=SHORT, **more
    )


def failure(port: int, tls: Tls | bool, **more) -> PacsError:
    """The error of a C-ECHO."""
    with pytest.raises(PacsError) as caught, Requestor(node(port, tls, **more)) as requestor:
        requestor.echo()
    return caught.value


# --- requests to a PACS


@pytest.mark.parametrize("profile", ["bcp195", "bcp195-modified"])
@pytest.mark.parametrize(
    ("dcmtk", "version"), [("+py", "TLSv1.3"), ("+px", "TLSv1.3"), ("+pz", "TLSv1.2")]
)
def test_dcmtk_is_reached_with_both_profiles(tmp_path, certificates, profile, dcmtk, version):
    tls = certificates.authority.tls(certificates.ours, profile=profile)
    trust = certificates.authority.trust
    with storescp(tmp_path, certificates.server, trust, dcmtk) as port:
        with Requestor(node(port, tls)) as requestor:
            requestor.echo()
        with contextlib.closing(connect(node(port, tls))) as connection:
            peer = peer_of(connection)
            assert peer is not None and peer.version == version
            assert [one.subject for one in peer.chain] == ["CN=pacs-side", "CN=Test CA"]
            # What is small is not kept back, as with plain DICOM.
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_retired_profiles_have_nothing_in_common_with_ours(tmp_path, certificates):
    trust = certificates.authority.trust
    with storescp(tmp_path, certificates.server, trust, "+pa") as port:
        assert failure(port, certificates.tls).code == "tls-profile-not-supported"


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_old_versions_are_not_spoken_even_with_a_server_that_has_nothing_else(
    tmp_path, certificates, version
):
    port = free_port()
    server = certificates.server
    command = (
        "openssl", "s_server", "-accept", f"127.0.0.1:{port}", "-cert", server.certificate,
        "-key", server.key, version, "-cipher", "ALL:@SECLEVEL=0", "-quiet",
    )  # fmt: skip
    with process(*command, folder=tmp_path):
        until_it_listens(port)
        assert failure(port, certificates.tls).code == "tls-profile-not-supported"


@pytest.mark.parametrize("profile", ["+py", "+pz"], ids=["TLS 1.3", "TLS 1.2"])
def test_our_certificate_is_refused_by_one_reason_with_each_version(
    tmp_path, certificates, profile
):
    trust = certificates.authority.trust
    with storescp(tmp_path, certificates.server, trust, profile) as port:
        for identity, words in (
            (None, "none was shown"),
            (certificates.stranger, "its CA is unknown there"),
            (certificates.expired, "it has expired"),
        ):
            error = failure(port, certificates.authority.tls(identity))
            assert (error.code, error.detail) == ("tls-client-certificate-refused", words)


def test_the_certificate_of_the_pacs_is_verified_with_its_name_and_dates(tmp_path, certificates):
    trust, tls = certificates.authority.trust, certificates.tls
    with storescp(tmp_path, certificates.stranger, trust) as port:
        assert failure(port, tls).code == "tls-server-not-trusted"
    with storescp(tmp_path, certificates.expired, trust) as port:
        assert failure(port, tls).code == "tls-expired"
    with storescp(tmp_path, certificates.misnamed, trust) as port:
        error = failure(port, tls)
        assert (error.code, error.detail) == ("tls-name-mismatch", "expected the name 127.0.0.1")
        with Requestor(node(port, tls, tls_name=NAME)) as requestor:
            requestor.echo()


def test_a_revoked_certificate_is_not_trusted(tmp_path, certificates):
    revoked = certificates.authority.issue("revoked")
    crl = certificates.authority.revoke(revoked)
    tls = certificates.authority.tls(certificates.ours, crl=crl)
    with storescp(tmp_path, revoked, certificates.authority.trust) as port:
        error = failure(port, tls)
        assert (error.code, error.detail) == ("tls-server-not-trusted", "it has been revoked")
    with (
        storescp(tmp_path, certificates.server, certificates.authority.trust) as port,
        Requestor(node(port, tls)) as requestor,
    ):
        requestor.echo()


def test_tls_to_a_port_of_plain_dicom_and_plain_dicom_to_one_of_tls(tmp_path, certificates):
    with storescp(tmp_path, None) as port:
        assert failure(port, certificates.tls).code == "tls-not-spoken"
    with storescp(tmp_path, certificates.server, certificates.authority.trust) as port:
        assert failure(port, False).code == "pacs-reset"


@contextlib.contextmanager
def answering(said: bytes, reads: int = 1) -> Iterator[int]:
    """A peer that reads once, says something, and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            # Who does not like the answer resets the connection, which may show as ENOTCONN.
            with connection, contextlib.suppress(OSError):
                if reads:
                    connection.recv(65536)
                connection.sendall(said)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(10)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"\x07\0\0\0\0\4\0\0\2\1", "tls-not-spoken"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "tls-not-spoken"),
        (b"", "tls-not-spoken"),
        (b"\x15\x03\x03\0\2\2\x28", "tls-profile-not-supported"),
        (b"\x15\x03\x03\0\2\2\x46", "tls-profile-not-supported"),
        (b"\x15\x03\x03\0\2\2\x50", "tls-handshake-failed"),
    ],
    ids=["A-ABORT", "HTTP", "end", "handshake failure", "protocol version", "internal error"],
)
def test_what_answers_our_hello_decides_the_reason(certificates, said, code):
    with answering(said) as port:
        assert failure(port, certificates.tls).code == code


def test_a_tls_alert_as_the_answer_to_plain_dicom_says_that_tls_is_due():
    with answering(b"\x15\x03\x03\0\2\2\x46") as port:
        assert failure(port, False).code == "tls-required"


def test_a_peer_that_drips_its_handshake_is_given_up_in_time(certificates):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        over = threading.Event()

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"\x16\x03\x03\x40\0\2\0\x3f\xfc")
                while not over.wait(0.05):
                    connection.sendall(b"\0")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        quick = node(listener.getsockname()[1], certificates.tls).model_copy(
            update={"timeouts": Timeouts(acse_seconds=0.5)}
        )
        with pytest.raises(PacsError) as caught:
            connect(quick)
        over.set()
        thread.join(10)
    assert (caught.value.code, caught.value.detail) == (
        "pacs-silent",
        "no TLS handshake within 0.5 s",
    )


def test_a_node_outside_of_its_site_never_falls_back_to_plain_dicom():
    with answering(b"", reads=0) as port:
        assert failure(port, True).code == "tls-files-unusable"


def test_faults_that_need_a_person_disable_the_node_at_once():
    codes = {code for code in REASONS if code.startswith("tls-")}
    for code in codes - {"tls-not-spoken"}:
        assert REASONS[code].disposition is Disposition.OPERATOR, code
    assert all(REASONS[code].scope in (Scope.NODE, Scope.SITE) for code in codes)
    # A gateway that restarts ends connections in their handshake, and is back soon.
    assert REASONS["tls-not-spoken"].disposition is Disposition.TRANSIENT
    assert not REASONS["tls-not-spoken"].transient_before_success


# --- senders to our receiver


class Receiving(NamedTuple):
    """A storage SCP with TLS, what it holds, and whom it turned away."""

    port: int
    store_handler: MemoryStoreHandler
    record: TurnedAwayRecord

    def turned_away(self) -> tuple[str, str]:
        """Code and detail of the only one."""
        until(lambda: self.record.since(0.0), "somebody is turned away", 10)
        (one,) = self.record.since(0.0)
        return one.code, one.detail


@contextlib.contextmanager
def receiving(tls: Tls | bool, **settings) -> Iterator[Receiving]:
    record, store_handler = TurnedAwayRecord(), MemoryStoreHandler()
    scp = StorageScp(
        "127.0.0.1",
        0,
        "PREFECTDICOM",
        store_handler,
        policy=ConnectionPolicy(lambda address: True),
        tls=SenderTls.of(Receiver(tls=tls, **settings)),
        on_event=record.note,
    )
    with scp:
        yield Receiving(scp.port, store_handler, record)


@pytest.fixture(scope="module")
def instance_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("instance") / "ct.dcm"
    instance = make_instance(1, size=64)
    instance.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    instance.save_as(path, enforce_file_format=True)
    return path


def storescu(
    port: int,
    instance: Path,
    identity: Identity | None,
    trust: Path | None = None,
    *options: str,
    title: str = "PACS",
) -> int:
    """Send an instance with DCMTK; its exit code."""
    tls: tuple[object, ...] = ()
    if trust is not None:
        own = ("+tla",) if identity is None else ("+tls", identity.key, identity.certificate)
        tls = (*own, "+cf", trust)
    command = ("-aet", title, "-aec", "PREFECTDICOM", *tls, *options, "127.0.0.1", port, instance)
    return subprocess.run(
        [tool("storescu"), *map(str, command)], capture_output=True, timeout=30
    ).returncode


@pytest.mark.parametrize("profile", ["+py", "+px", "+pz"])
def test_dcmtk_sends_over_tls(certificates, instance_file, profile):
    with receiving(certificates.authority.tls(certificates.server)) as receiver:
        identity, trust = certificates.ours, certificates.authority.trust
        assert storescu(receiver.port, instance_file, identity, trust, profile) == 0
        ((sop_class, _, _, data),) = receiver.store_handler.instances
        assert sop_class == CT and data.endswith(b"\1" * 64 * 64 * 2)


def test_senders_that_are_not_verified_are_turned_away_by_name(certificates, instance_file):
    server, trust = certificates.server, certificates.authority.trust
    limited = certificates.authority.issue("servers-only", usage=("server",))
    for identity, words in (
        (None, "it showed no certificate"),
        (certificates.stranger, "its issuer is not in `trust`, or an intermediate CA is missing"),
        (certificates.expired, "it, or a CA of its chain, has expired"),
        (limited, "it is not made for this side of a connection (Extended Key Usage)"),
    ):
        with receiving(certificates.authority.tls(server)) as receiver:
            assert storescu(receiver.port, instance_file, identity, trust) != 0
            assert receiver.turned_away() == ("sender-certificate-refused", words)
            assert receiver.store_handler.instances == []


def test_a_sender_that_refuses_our_certificate_is_named(certificates, instance_file):
    with receiving(certificates.authority.tls(certificates.server)) as receiver:
        trust = certificates.foreign.trust
        assert storescu(receiver.port, instance_file, certificates.ours, trust) != 0
        code, words = receiver.turned_away()
        assert code == "receiver-certificate-refused" and "unknown ca" in words


def test_senders_without_a_common_profile_or_without_tls_are_named(certificates, instance_file):
    identity, trust = certificates.ours, certificates.authority.trust
    tls = certificates.authority.tls(certificates.server)
    with receiving(tls) as receiver:
        assert storescu(receiver.port, instance_file, identity, trust, "+pa") != 0
        assert receiver.turned_away()[0] == "sender-tls-failed"
    with receiving(tls) as receiver:
        assert storescu(receiver.port, instance_file, None) != 0
        assert receiver.turned_away() == ("sender-without-tls", "it speaks plain DICOM")
        assert receiver.record.counts() == {"sender-without-tls": 1}
    with receiving(False) as receiver:
        assert storescu(receiver.port, instance_file, identity, trust) != 0
        assert receiver.turned_away() == ("sender-with-tls", "it speaks TLS")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions_are_refused_even_to_a_client_that_takes_anything(certificates, version):
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.set_ciphers("ALL:@SECLEVEL=0")
    client.minimum_version = client.maximum_version = version
    client.load_verify_locations(certificates.authority.trust)
    client.load_cert_chain(certificates.ours.certificate, certificates.ours.key)
    with receiving(certificates.authority.tls(certificates.server)) as receiver:
        connection = socket.create_connection(("127.0.0.1", receiver.port), 10)
        with connection, pytest.raises(ssl.SSLError):
            client.wrap_socket(connection, server_hostname="127.0.0.1")
        assert receiver.turned_away()[0] == "sender-tls-failed"


def test_a_client_may_come_without_certificate_where_the_site_says_so(certificates, instance_file):
    tls, trust = certificates.authority.tls(certificates.server), certificates.authority.trust
    with receiving(tls, require_certificate=False) as receiver:
        assert storescu(receiver.port, instance_file, None, trust) == 0
        # One that is shown is verified all the same.
        assert storescu(receiver.port, instance_file, certificates.stranger, trust) != 0
        assert receiver.turned_away()[0] == "sender-certificate-refused"


def test_only_allowed_certificates_send_and_only_under_their_ae_title(certificates, instance_file):
    pacs = certificates.authority.issue("pacs", NAME)
    archive = certificates.authority.issue("archive", "archive.example.org")
    trust = certificates.authority.trust
    allowed = [
        {"certificate": f"DNS:{NAME}", "calling_ae_title": "PACS"},
        archive.fingerprint,
    ]
    not_named = "its certificate is not in `allowed_certificates`"
    not_its_own = "its certificate is not the one of its AE title"
    for identity, title, refused in (
        (pacs, "PACS", ""),
        (archive, "ARCHIVE", ""),
        (pacs, "OTHER", not_its_own),
        (archive, "PACS", not_its_own),
        (certificates.ours, "PACS", not_named),
    ):
        tls = certificates.authority.tls(certificates.server)
        with receiving(tls, allowed_certificates=allowed) as receiver:
            sent = storescu(receiver.port, instance_file, identity, trust, title=title)
            assert (sent == 0) == (not refused), (title, refused)
            if refused:
                assert receiver.turned_away() == ("sender-certificate-refused", refused)
                assert receiver.store_handler.instances == []
