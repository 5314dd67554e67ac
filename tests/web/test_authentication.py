"""Credentials: what is sent, what is renewed, and what never shows."""

from __future__ import annotations

import pytest

from prefect_dicom.config.web_node import Authentication
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import Verdict
from prefect_dicom.testing import Behaviour, ScriptedWeb, tiny_instances
from prefect_dicom.web.authentication import SignatureV4
from tests.support.web import web_site

SECRET = "s3cr:t pässword"


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("A_SECRET", SECRET)


def place_at(folder, web, **authentication):
    return web_site(folder, web.url, web, node={"authentication": authentication})


def test_user_and_password_open_the_node(tmp_path):
    with ScriptedWeb(tiny_instances(1), user=("alice", SECRET)) as web:
        place = place_at(tmp_path, web, scheme="basic", user="alice", variable="A_SECRET")
        assert set(place.pull().rows) == {Verdict.ARCHIVED}
    assert {request.status for request in web.log} == {200}


def test_a_wrong_password_disables_the_node_at_the_first_request(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("A_SECRET", "other")
    with ScriptedWeb(tiny_instances(1), user=("alice", SECRET)) as web:
        place = place_at(tmp_path, web, scheme="basic", user="alice", variable="A_SECRET")
        with pytest.raises(PacsError, match="not-permitted"):
            place.pull()
    assert len(web.log) == 1


def test_a_variable_that_is_not_set_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("A_SECRET")
    with ScriptedWeb(tiny_instances(1)) as web:
        place = place_at(tmp_path, web, scheme="basic", user="alice", variable="A_SECRET")
        with pytest.raises(PacsError, match="credentials-missing.*A_SECRET"):
            place.pull()
    assert web.log == []


def issued(folder, web):
    return place_at(
        folder,
        web,
        scheme="client-credentials",
        endpoint=web.token_url,
        client="id:1",
        variable="A_SECRET",
        scope="read",
    )


@pytest.fixture
def issuer():
    # RFC 6749 2.3.1: client ID and secret are form-encoded.
    pair = ("id%3A1", "s3cr%3At%20p%C3%A4ssword")
    with ScriptedWeb(tiny_instances(3, instances=2), client=pair) as web:
        yield web


def test_a_token_is_issued_once_for_all_connections(issuer, tmp_path):
    assert set(issued(tmp_path, issuer).pull().rows) == {Verdict.ARCHIVED}
    assert len(issuer.requests("token")) == 1


def test_a_token_that_dies_is_replaced_once(issuer, tmp_path):
    expiry = Behaviour("web.expire", service="WADO-RS", on_request=2)
    issuer.script.append(expiry)
    assert set(issued(tmp_path, issuer).pull().rows) == {Verdict.ARCHIVED}
    assert len(issuer.requests("token")) == 2


def test_a_token_is_replaced_before_it_ends(issuer, tmp_path):
    from prefect_dicom.web.client import authenticator_of

    node = issued(tmp_path, issuer).site.nodes["pacs"]
    issuer.token_seconds = 100
    authenticator = authenticator_of(node)
    at = 0.0
    authenticator._now = lambda: at  # type: ignore[attr-defined]
    first = authenticator.headers("GET", issuer.url)
    at = 79.0
    assert authenticator.headers("GET", issuer.url) == first
    at = 80.0
    assert authenticator.headers("GET", issuer.url) != first


def test_an_issuer_that_refuses_disables_the_node(tmp_path):
    with (
        ScriptedWeb(tiny_instances(1), client=("other", "one")) as web,
        pytest.raises(PacsError, match="token-not-issued.*401"),
    ):
        issued(tmp_path, web).pull()
    assert web.requests("QIDO-RS") == []


def test_a_token_in_a_file_is_read_again_when_it_was_refused(tmp_path):
    file = tmp_path / "bearer"
    file.write_text("stale\n")
    with ScriptedWeb(tiny_instances(1), client=("a", "b")) as web:
        web.tokens = {"fresh-one"}
        place = place_at(tmp_path / "site", web, scheme="bearer", file=str(file))
        with pytest.raises(PacsError, match="not-permitted"):
            place.pull()
        file.write_text("fresh-one\n")
        assert set(place.pull(place.folder / "cohort.csv").rows) == {Verdict.ARCHIVED}


def test_a_signature_covers_the_url_as_it_is_sent(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example")
    settings = Authentication(scheme="sigv4", region="eu-central-1", service="medical-imaging")
    headers = SignatureV4(settings).headers("GET", "https://aws.example.org/studies?PatientID=1")
    assert "Credential=AKIAEXAMPLE/" in headers["Authorization"]
    assert "/eu-central-1/medical-imaging/aws4_request" in headers["Authorization"]
    assert headers["X-Amz-Date"]


def test_no_secret_and_no_identifier_is_in_a_log_or_a_text(issuer, tmp_path, caplog):
    caplog.set_level("DEBUG")
    place = issued(tmp_path, issuer)
    issuer.script.append(Behaviour("web.status", service="WADO-RS", status=500))
    with pytest.raises(PacsError, match="wado-sends-nothing"):
        place.pull()
    node = place.site.nodes["pacs"]
    said = caplog.text + repr(node) + repr(place.reasons())
    held = [one.attributes for one in issuer.holdings]
    names = {a[k] for a in held for k in ("PatientID", "StudyInstanceUID", "SOPInstanceUID")}
    assert not [name for name in {*names, SECRET, "token-1"} if name in said]
