"""TLS settings: what a site file may say, what is wrong with its files, how they are renewed."""

from __future__ import annotations

import os
import re
import ssl
from pathlib import Path

import pytest
from pydantic import ValidationError

from prefect_dicom.blocks import DicomSite
from prefect_dicom.config.certificates import read_certificates
from prefect_dicom.config.site import Site, load_site
from prefect_dicom.config.tls import AllowedCertificate, Tls, TlsProfile
from prefect_dicom.config.tls_context import (
    client_context,
    current_client_context,
    server_context,
)
from prefect_dicom.config.tls_files import certificate_values, tls_faults
from prefect_dicom.core.errors import ConfigurationError
from tests.support.certificates import Authority

TLS = """\
tls: {trust: ca.crt, certificate: ours.crt, key: ours.key}
"""
REST = """\
archive: {directory: archive}
spool: {path: spool}
"""


def nodes(keys: str = "") -> str:
    return f"nodes: {{main: {{host: pacs.example.org, port: 2762, called_ae_title: MAIN{keys}}}}}\n"


@pytest.fixture
def load(tmp_path: Path):
    def load(*parts: str) -> Site:
        file = tmp_path / "site.yaml"
        file.write_text("".join(parts) + REST)
        return load_site(file, {})

    return load


@pytest.fixture
def fault(load):
    """The only fault of a site file of these parts."""

    def fault(*parts: str) -> str:
        with pytest.raises(ConfigurationError) as caught:
            load(*parts)
        (only,) = caught.value.faults
        return only

    return fault


# --- the site file


def test_true_stands_for_the_keys_of_the_site_and_false_for_plain_dicom(load, tmp_path):
    site = load(TLS, nodes(", tls: true"), "receiver: {tls: true}\n")
    expected = Tls(
        trust=tmp_path / "ca.crt", certificate=tmp_path / "ours.crt", key=tmp_path / "ours.key"
    )
    assert site.nodes["main"].tls == site.receiver.tls == site.tls == expected
    assert load(TLS, nodes()).nodes["main"].tls is False
    assert load(TLS, nodes()).receiver.tls is False


def test_a_node_may_have_keys_of_its_own(load, tmp_path):
    site = load(TLS, nodes(", tls: {trust: system, profile: bcp195-modified}, tls_name: p.example"))
    own = site.nodes["main"].tls
    assert own == Tls(trust="system", profile=TlsProfile.BCP195_MODIFIED)
    assert site.nodes["main"].tls_name == "p.example"


def test_each_group_of_keys_is_listed_once_by_its_place(load):
    site = load(TLS, nodes(", tls: true"), "receiver: {tls: {trust: a, certificate: b, key: c}}\n")
    assert list(site.tls_settings()) == ["tls", "receiver.tls"]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([nodes(", tls: true")], "main has `tls: true`; expected the keys of TLS here"),
        ([nodes(), "receiver: {tls: true}\n"], "it has `tls: true`; expected the keys of TLS"),
        ([TLS, nodes(", tls: yes")], "nodes.main.tls: found 'yes' (line 2); expected true, false"),
        ([TLS, nodes(", tls: {certificate: a, key: b}")], "nodes.main.tls.trust: missing"),
        (["tls: {trust: a, key: b}\n", nodes()], "`certificate` is missing"),
        (["tls: {trust: a, certificate: b}\n", nodes()], "`key` is missing"),
        (["tls: {trust: a, verify: false}\n", nodes()], "tls.verify: unknown key"),
        (
            ["tls: {trust: a}\n", nodes(), "receiver: {tls: true}\n"],
            "expected `certificate` and `key` in the site's `tls`",
        ),
        ([TLS, nodes(", tls_name: pacs")], "expected it only together with `tls`"),
        ([TLS, nodes(), "receiver: {allowed_certificates: [DNS:a]}\n"], "together with `tls`"),
        (
            [TLS, nodes(), "receiver: {tls: true, allowed_certificates: [pacs.example.org]}\n"],
            "expected DNS:name, IP:address or URI:uri",
        ),
        (
            [
                TLS,
                nodes(),
                "receiver: {tls: true, require_certificate: false, "
                "allowed_certificates: [DNS:a]}\n",
            ],
            "expected `require_certificate: true`",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(fault, parts, words):
    assert words in fault(*parts)


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("DNS:PACS.Example.org", "DNS:pacs.example.org"),
        ("IP:2001:DB8::1", "IP:2001:db8::1"),
        ("sha256:" + "AB:" * 31 + "ab", "SHA256:" + "ab" * 32),
        ("URI:urn:oid:1.2.3", "URI:urn:oid:1.2.3"),
    ],
)
def test_a_certificate_has_one_spelling(written, normal):
    assert AllowedCertificate(certificate=written).certificate == normal


def test_no_key_of_tls_turns_verification_off():
    assert set(Tls.model_fields) == {"profile", "trust", "certificate", "key", "crl"}
    with pytest.raises(ValidationError):
        Tls(trust="ca.crt", profile="none")


def test_a_block_keeps_true_and_its_site_has_the_keys(tmp_path):
    folder = tmp_path / "tls"
    tls = {"trust": folder / "ca", "certificate": folder / "crt", "key": folder / "key"}
    node = {"host": "pacs", "port": 2762, "called_ae_title": "MAIN", "tls": True}
    parts = {
        "archive": {"directory": tmp_path / "a"},
        "ledger": {"path": tmp_path / "l"},
        "spool": {"path": tmp_path / "s"},
    }
    block = DicomSite(tls=tls, nodes={"main": node}, receiver={"tls": True}, **parts)
    assert block.nodes["main"].tls is True
    assert block.site().nodes["main"].tls == block.site().receiver.tls == Tls(**tls)
    with pytest.raises(ValidationError, match="absolute"):
        DicomSite(tls={"trust": "ca.crt"}, nodes={"main": node}, **parts)


# --- its files


def test_good_files_have_no_faults(authority):
    assert tls_faults(authority.tls(authority.issue("good")), "tls") == []
    assert tls_faults(Tls(trust="system"), "tls") == []


def test_all_faults_of_all_files_are_reported_at_once(load, tmp_path):
    site = load(TLS, nodes(", tls: true"), "receiver: {tls: {trust: a, certificate: b, key: c}}\n")
    with pytest.raises(ConfigurationError) as caught:
        site.check_tls_files()
    named = [
        re.match(r"([\w.]+): (\S+) cannot be read \(No such file", f) for f in caught.value.faults
    ]
    assert [match and match.groups() for match in named] == [
        ("tls.certificate", str(tmp_path / "ours.crt")),
        ("tls.key", str(tmp_path / "ours.key")),
        ("tls.trust", str(tmp_path / "ca.crt")),
        ("receiver.tls.certificate", str(tmp_path / "b")),
        ("receiver.tls.key", str(tmp_path / "c")),
        ("receiver.tls.trust", str(tmp_path / "a")),
    ]


def of_others(authority: Authority) -> Tls:
    first, second = authority.issue("first"), authority.issue("second")
    return authority.tls(first, key=second.key)


def open_to_all(authority: Authority) -> Tls:
    identity = authority.issue("open")
    identity.key.chmod(0o644)
    return authority.tls(identity)


def not_pem(authority: Authority, key: str) -> Tls:
    text = authority.folder / "text"
    text.write_text("no PEM")
    text.chmod(0o600)
    return authority.tls(authority.issue("text"), **{key: text})


def stale_list(authority: Authority) -> Tls:
    return authority.tls(authority.issue("listed"), crl=authority.revoke(days=(-3, -1)))


@pytest.mark.parametrize(
    ("make", "key", "words"),
    [
        (of_others, "key", "is not the key of `certificate`"),
        (open_to_all, "key", "has the mode 0644"),
        (lambda a: a.tls(a.issue("locked", passphrase=b"secret")), "key", "is encrypted"),
        (lambda a: a.tls(a.issue("short", rsa_bits=1024)), "certificate", "too short to be safe"),
        (lambda a: a.tls(a.issue("old", days=(-3, -1))), "certificate", "expired on"),
        (lambda a: a.tls(a.issue("new", days=(1, 2))), "certificate", "is not valid before"),
        (lambda a: not_pem(a, "certificate"), "certificate", "holds no certificate"),
        (lambda a: not_pem(a, "key"), "key", "holds no private key"),
        (lambda a: not_pem(a, "trust"), "trust", "holds no certificate"),
        (lambda a: not_pem(a, "crl"), "crl", "holds no revocation list"),
        (stale_list, "crl", "without a current one every peer is refused"),
    ],
)
def test_a_faulty_file_is_named_with_its_key_and_what_to_do(authority, make, key, words):
    tls = make(authority)
    (only,) = tls_faults(tls, "nodes.main.tls")
    assert only.startswith(f"nodes.main.tls.{key}: {getattr(tls, key)} ") and words in only


def test_roots_keys_may_be_read_by_a_group(authority):
    identity = authority.issue("grouped")
    identity.key.chmod(0o640)
    assert bool(tls_faults(authority.tls(identity), "tls")) == (os.getuid() != 0)


# --- contexts


@pytest.mark.parametrize("profile", TlsProfile)
def test_both_profiles_have_only_forward_secrecy_authenticated_ciphers_and_new_versions(
    authority, profile
):
    tls = authority.tls(authority.issue("profile"), profile=profile)
    for context in (client_context(tls), server_context(tls)):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.options & ssl.OP_NO_RENEGOTIATION and context.options & ssl.OP_NO_COMPRESSION
        for suite in context.get_ciphers():
            assert suite["aead"] and suite["strength_bits"] >= 128
            assert suite["kea"] == "kx-any" or suite["kea"] == "kx-ecdhe", suite["name"]
    assert client_context(tls).check_hostname
    assert server_context(tls).num_tickets == 0


def test_a_context_follows_its_files_and_survives_the_middle_of_a_renewal(authority, caplog):
    identity = authority.issue("renewed")
    tls = authority.tls(identity)
    context = current_client_context(tls)
    first = context()
    assert context() is first

    old_key = identity.key.read_bytes()
    authority.issue("renewed", days=(-1, 1))
    new_key = identity.key.read_bytes()
    identity.key.write_bytes(old_key)
    assert context() is first and "the last ones stay" in caplog.text
    identity.key.unlink()
    assert context() is first
    identity.key.write_bytes(new_key)
    assert context() is not first


def test_the_facts_of_a_certificate_are_words_for_people(authority):
    identity = authority.issue("facts", "pacs.example.org", "10.1.2.3", days=(-1, 2.5))
    (one,) = read_certificates(identity.certificate)
    assert one.words.startswith("CN=facts (DNS:pacs.example.org, IP:10.1.2.3), until ")
    assert one.words.endswith("2 days left")
    assert {"DNS:pacs.example.org", "IP:10.1.2.3", identity.fingerprint} == one.identities


def test_the_seconds_until_our_certificates_expire_are_a_metric(authority):
    tls = authority.tls(authority.issue("measured", days=(-1, 2)))
    (value,) = certificate_values({"receiver": tls, "nodes.main.tls": Tls(trust="system")})
    assert (value.name, value.labels) == (
        "prefect_dicom_certificate_seconds_left",
        {"certificate": "receiver"},
    )
    assert 1.99 * 86400 < value.value <= 2 * 86400
