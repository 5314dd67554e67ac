"""A whole site with TLS: the example of ``configs/`` with Orthanc, renewal, and what stops it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from prefect_dicom.config.node import PacsNode
from prefect_dicom.config.site import load_site
from prefect_dicom.core.errors import ConfigurationError, PacsError
from prefect_dicom.core.model import StoreRequest, Verdict
from prefect_dicom.dicom.part10 import file_meta
from prefect_dicom.network.association import connect
from prefect_dicom.network.storage_scp import ReceiverLease, running_receiver
from prefect_dicom.network.tls import peer_of
from prefect_dicom.operations.doctor import entries_for_the_pacs, examine
from prefect_dicom.operations.findings import Finding
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_run
from prefect_dicom.testing import Behaviour, tiny_instances
from prefect_dicom.testing.instances import StoredInstance
from tests.support import peers, program
from tests.support.campaign import only_in, subset
from tests.support.certificates import Authority
from tests.support.peers import free_port
from tests.support.sites import LOOPBACK, Place, site_around

EXAMPLE = Path(__file__).parents[2] / "configs" / "tls.yaml"
NAME = "pacs.example.org"


def part10(stored: StoredInstance) -> bytes:
    request = StoreRequest(
        1, stored.sop_class_uid, stored.sop_instance_uid, stored.transfer_syntax_uid
    )
    return file_meta(request) + stored.encoded()


class Clinic:
    """The example site in a folder of its own, and an Orthanc with TLS in both directions."""

    def __init__(self, folder: Path, retrieve: str, **settings: object) -> None:
        self.authority = Authority(folder / "tls")
        ours = self.authority.issue("this-host", LOOPBACK, "research.example.org")
        pacs = self.authority.issue("pacs", NAME)
        assert ours.certificate.parent == folder / "tls"
        port = free_port()
        self.orthanc = peers.Orthanc(
            folder / "orthanc",
            {"PREFECTDICOM": port},
            DicomTlsEnabled=True,
            DicomTlsCertificate=str(pacs.certificate),
            DicomTlsPrivateKey=str(pacs.key),
            DicomTlsTrustedCertificates=str(self.authority.trust),
            DicomTlsRemoteCertificateRequired=True,
            DicomModalities={
                "us": {
                    "AET": "PREFECTDICOM",
                    "Host": LOOPBACK,
                    "Port": port,
                    "UseDicomTls": True,
                }
            },
            **settings,
        )
        document = yaml.safe_load(EXAMPLE.read_text())
        document["nodes"]["main"] |= {"port": self.orthanc.port, "retrieve": retrieve}
        document["nodes"]["main"]["timeouts"] = {"settle_seconds": 0.4}
        document["receiver"] |= {"port": port, "idle_seconds": 1}
        document["spool"]["reserve_bytes"] = 0
        self.file = folder / "site.yaml"
        self.file.write_text(yaml.safe_dump(document))
        self.cohort = folder / "cohort.csv"
        (folder / "archive").mkdir()

    def change(self, **receiver: object) -> None:
        """Change keys of the receiver."""
        document = yaml.safe_load(self.file.read_text())
        document["receiver"] |= receiver
        self.file.write_text(yaml.safe_dump(document))

    def change_node(self, **node: object) -> None:
        """Change keys of the node."""
        document = yaml.safe_load(self.file.read_text())
        document["nodes"]["main"] |= node
        self.file.write_text(yaml.safe_dump(document))

    def hold(self, studies: int) -> None:
        """Put studies of two instances into Orthanc, and name them in the cohort file."""
        instances = list(tiny_instances(studies, instances=2))
        for stored in instances:
            request = urllib.request.Request(
                f"http://{LOOPBACK}:{self.orthanc.http_port}/instances",
                part10(stored),
                method="POST",
            )
            with urllib.request.urlopen(request, timeout=10):
                pass
        uids = dict.fromkeys(stored.study_instance_uid for stored in instances)
        self.cohort.write_text("StudyInstanceUID\n" + "\n".join(uids) + "\n")

    def pull(self) -> dict[Verdict, int]:
        site = load_site(self.file)
        registered = register_cohort(site, self.cohort, None)
        with open_run(site, registered.number) as run:
            work_through(run)
            return dict(run.ledger.progress.totals(registered.number).rows)

    def examine(self) -> list[Finding]:
        return list(examine(load_site(self.file)))

    def stop(self) -> None:
        if (lease := running_receiver(load_site(self.file))) is not None:
            lease.stop()
            lease.close()


@pytest.fixture
def clinic(tmp_path) -> Iterator[Callable[..., Clinic]]:
    if absent := peers.Orthanc.absent():
        pytest.skip(absent)
    with contextlib.ExitStack() as stack:

        def make(retrieve: str = "c-move", **settings: object) -> Clinic:
            one = Clinic(tmp_path, retrieve, **settings)
            stack.enter_context(one.orthanc)
            stack.callback(one.stop)
            return one

        yield make


@pytest.mark.campaign("TLS")
@pytest.mark.parametrize("retrieve", subset(["c-move", "c-get"], ["c-move"]))
def test_the_example_site_pulls_from_orthanc_over_tls(clinic, retrieve):
    one = clinic(retrieve)
    one.hold(2)
    assert one.pull() == {Verdict.ARCHIVED: 2}
    assert one.orthanc.moves() == 4

    findings = one.examine()
    assert [f for f in findings if not f.ok] == []
    words = {f.check: f.words for f in findings if f.part == "main"}
    assert words["TLS"].startswith("TLSv1.3, ")
    assert words["its certificate"].startswith(f"CN=pacs (DNS:{NAME}), until ")
    assert words["issued by"].startswith("CN=Test CA, until ")
    if retrieve == "c-move":
        (sender,) = (f for f in findings if f.check.startswith("TLS of ORTHANC"))
        assert sender.words.startswith("TLSv1.3, ") and f"DNS:{NAME}" in sender.words
        one.change_node(retrieve="c-get")
        assert [f for f in one.examine() if not f.ok] == []
    # All of them live for two days only.
    expiring = [f for f in findings if f.advice.startswith(("Have it renewed", "Tell the PACS"))]
    assert {"our certificate", "its certificate"} <= {f.check for f in expiring}
    assert any(f.words.endswith("1 days left") for f in expiring)


@only_in("TLS")
@pytest.mark.parametrize("retrieve", ["c-move", "c-get"])
def test_it_pulls_with_tls_12_where_a_side_has_nothing_newer(tmp_path, clinic, retrieve):
    one = clinic(retrieve)
    one.hold(2)
    one.change(idle_seconds=60)
    # OpenSSL's own configuration keeps our processes, the receiver too, from TLS 1.3.
    (tmp_path / "openssl.cnf").write_text(
        "openssl_conf = default\n[default]\nssl_conf = ssl\n[ssl]\nsystem_default = all\n"
        "[all]\nMaxProtocol = TLSv1.2\n"
    )
    environment = {**os.environ, "OPENSSL_CONF": str(tmp_path / "openssl.cnf")}
    command = [*program("sites"), str(one.file), str(one.cohort)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    assert one.pull() == {Verdict.ARCHIVED: 2}
    assert one.orthanc.moves() == 4
    if retrieve == "c-move":
        with running_receiver(load_site(one.file)) as lease:
            assert {sender["version"] for sender in lease.status()["tls_senders"]} == {"TLSv1.2"}


def test_each_fault_is_named_by_the_doctor_with_what_the_pacs_shows(clinic, foreign_authority):
    one = clinic()
    one.hold(1)
    foreign = foreign_authority.issue("receiver")
    tls = {
        "trust": str(one.authority.trust),
        "certificate": str(foreign.certificate),
        "key": str(foreign.key),
    }
    other = ["DNS:other.example.org"]
    for change, code in (
        ({"tls": tls}, "receiver-certificate-refused"),
        ({"tls": True, "allowed_certificates": other}, "sender-certificate-refused"),
        ({"tls": False, "allowed_certificates": []}, "sender-with-tls"),
    ):
        one.change(**change)
        (fault,) = (f for f in one.examine() if not f.ok)
        assert fault.check == "C-MOVE of one instance" and code in fault.words
        one.stop()

    one.change(tls=True)
    one.change_node(tls_name="archive.example.org")
    findings = [f for f in one.examine() if f.part == "main"]
    assert [f.check for f in findings if not f.ok] == ["TLS"]
    shown = next(f for f in findings if f.check == "it is shown, and not accepted")
    assert f"DNS:{NAME}" in shown.words and "issuer CN=Test CA; SHA256:" in shown.words
    entries = entries_for_the_pacs(load_site(one.file), load_site(one.file).nodes["main"])
    assert any('"UseDicomTls": true' in entry.line for entry in entries)
    assert not any("plain DICOM" in entry.line for entry in entries)


# --- against the scripted PACS


@pytest.fixture
def place(tmp_path, authority) -> Iterator[Callable[..., Place]]:
    with contextlib.ExitStack() as stack:

        def make(studies: int = 2, **parts: object) -> Place:
            tls = authority.tls(authority.issue("site"))
            held = tiny_instances(studies, instances=2)
            return stack.enter_context(site_around(tmp_path, held, tls=tls, **parts))

        yield make


def test_certificates_are_renewed_under_load_and_no_study_is_lost(place, authority):
    one = place(15, node={"limits": {"chunk_studies": 1, "associations": 4}})
    # What is renewed is ours, in both directions; the PACS keeps its own.
    one.pacs.policy.tls = authority.tls(authority.issue("pacs"))
    over, renewed = threading.Event(), []

    def renew() -> None:
        while not over.wait(0.02):
            renewed.append(authority.issue("site").fingerprint)

    thread = threading.Thread(target=renew)
    with ReceiverLease(one.site) as lease:
        thread.start()
        try:
            totals = one.pull()
        finally:
            over.set()
            thread.join()
        site = one.site
        us = PacsNode(host=LOOPBACK, port=site.receiver.port, called_ae_title="X", tls=site.tls)
        with contextlib.closing(connect(us)) as connection:
            shown = peer_of(connection).chain[0].fingerprint
        senders = lease.status()["tls_senders"]
    assert totals.rows == {Verdict.ARCHIVED: 15}
    one.is_whole()
    assert len(renewed) > 10 and renewed[-1] == f"SHA256:{shown}"
    assert {sender["calling_ae_title"] for sender in senders} == {one.pacs.ae_title}


def test_a_pacs_whose_certificate_has_expired_stops_its_node_and_the_next_run_goes_on(
    place, authority
):
    expired = authority.tls(authority.issue("expired-pacs", days=(-3, -1)))
    one = place()
    one.pacs.script.append(Behaviour("net.tls", keys=expired, service="A-ASSOCIATE"))
    with pytest.raises(PacsError, match="tls-expired"):
        one.pull()
    assert one.totals().rows == {Verdict.PENDING: 2}
    assert one.asked_for() == 0
    one.pacs.script.clear()
    one.goes_on()


def test_faults_of_the_files_end_a_run_before_a_pacs_is_asked(place):
    one = place()
    key = one.site.tls.key
    key.chmod(0o644)
    with pytest.raises(ConfigurationError) as caught:
        one.pull()
    (fault,) = caught.value.faults
    assert fault.startswith(f"tls.key: {key} has the mode 0644")
    assert one.pacs.log == []


def test_plain_dicom_to_a_receiver_with_tls_is_the_reason_of_its_study(tmp_path, authority):
    tls = authority.tls(authority.issue("receiver")).model_dump(mode="json")
    held = tiny_instances(1, instances=2)
    with site_around(tmp_path, held, receiver={"tls": tls}) as one:
        one.pull()
        assert one.reasons() == [("failed", "sender-without-tls")]
