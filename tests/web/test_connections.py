"""Connections to a DICOMweb node: TLS, proxies, and how long a busy server is left alone."""

from __future__ import annotations

import pytest
import yaml

from prefect_dicom.admission.node import NodeAdmission
from prefect_dicom.config.tls_context import server_context
from prefect_dicom.config.web_node import WebNode
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import Verdict
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_run
from prefect_dicom.testing import Behaviour, ScriptedPacs, ScriptedWeb, tiny_instances
from prefect_dicom.web.client import WebClient, retry_after
from prefect_dicom.web.proxy import proxy_for
from tests.support.certificates import Authority
from tests.support.proxies import refusing_proxy
from tests.support.web import web_site

HELD = list(tiny_instances(1, instances=2))


def keys_of(authority: Authority, identity=None) -> dict[str, str]:
    keys = {"trust": str(authority.trust)}
    if identity is not None:
        keys |= {"certificate": str(identity.certificate), "key": str(identity.key)}
    return keys


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


def test_a_server_of_https_is_verified_and_shown_our_certificate(authority, tmp_path):
    tls = server_context(authority.tls(authority.issue("server")))
    ours = authority.issue("client")
    with ScriptedWeb(HELD, tls=tls) as web:
        assert web.url.startswith("https:")
        place = web_site(tmp_path, web.url, web, node={"tls": keys_of(authority, ours)})
        assert set(place.pull().rows) == {Verdict.ARCHIVED}


@pytest.mark.parametrize(
    ("names", "ours", "reason"),
    [
        (("127.0.0.1",), None, "tls-client-certificate-refused"),
        (("elsewhere.example.org",), "client", "tls-name-mismatch"),
    ],
)
def test_a_certificate_that_does_not_fit_has_its_reason(authority, tmp_path, names, ours, reason):
    tls = server_context(authority.tls(authority.issue("other", *names)))
    identity = None if ours is None else authority.issue(ours)
    with ScriptedWeb(HELD, tls=tls) as web:
        place = web_site(tmp_path, web.url, web, node={"tls": keys_of(authority, identity)})
        with pytest.raises(PacsError, match=reason):
            place.pull()
    assert web.log == []


def test_a_server_of_another_authority_is_not_trusted(authority, tmp_path):
    other = Authority(tmp_path / "other", "Other CA")
    tls = server_context(other.tls(other.issue("server")), require_certificate=False)
    with ScriptedWeb(HELD, tls=tls) as web:
        place = web_site(tmp_path / "site", web.url, web, node={"tls": keys_of(authority)})
        with pytest.raises(PacsError, match="tls-server-not-trusted"):
            place.pull()
    assert web.log == []


def test_https_to_a_server_of_http_is_told_apart(tmp_path):
    with ScriptedWeb(HELD) as web:
        url = web.url.replace("http:", "https:")
        place = web_site(tmp_path, url, web)
        with pytest.raises(PacsError, match="tls-not-spoken"):
            place.pull()


def test_nothing_that_listens_has_its_reason(tmp_path):
    web = ScriptedWeb(HELD)
    with web:
        place = web_site(tmp_path, web.url, web)
    with (
        pytest.raises(PacsError, match="pacs-refused"),
        WebClient(place.site.nodes["pacs"]) as client,
    ):
        client.echo()


def test_proxies_are_for_other_hosts(tmp_path, monkeypatch):
    with refusing_proxy() as proxy, ScriptedWeb(HELD) as web:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("no_proxy", "spared.example.org")
        assert set(web_site(tmp_path, web.url, web).pull().rows) == {Verdict.ARCHIVED}
        assert proxy.requests == []
        assert proxy_for("https", "spared.example.org", 443) is None
        far = web_site(tmp_path / "far", "https://pacs.example.org/dicom-web", web)
        with (
            pytest.raises(PacsError, match="pacs-unreachable.*407"),
            WebClient(far.site.nodes["pacs"]) as client,
        ):
            client.echo()
        assert proxy.requests == ["CONNECT pacs.example.org:443"]


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks():
    now = 1000.0
    admission = NodeAdmission((30, 60), 2, now=lambda: now, jitter=lambda: 1.0)
    admission.record_failure("pacs-busy", now, 90.0)
    assert admission.seconds_left() == 90.0
    admission = NodeAdmission((30, 60), 2, now=lambda: now, jitter=lambda: 1.0)
    admission.record_failure("pacs-busy", now, 5.0)
    assert admission.seconds_left() == 30.0


def test_what_a_server_asks_for_reaches_who_waits():
    with ScriptedWeb(HELD) as web:
        web.script.append(Behaviour("web.status", status=503, retry_after="77"))
        with WebClient(web_node(web)) as client, pytest.raises(PacsError) as error:
            client.echo()
    assert error.value.retry_after_seconds == 77.0
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def web_node(web) -> WebNode:
    return WebNode(dicomweb=web.url)


def test_a_cohort_may_have_nodes_of_both_kinds(tmp_path):
    held = list(tiny_instances(3, instances=2))
    uids = list(dict.fromkeys(one.study_instance_uid for one in held))
    main = [one for one in held if one.study_instance_uid != uids[2]]
    with ScriptedPacs(instances=main) as pacs, ScriptedWeb(held) as web:
        # DIMSE has two of the studies and fails at one of them; DICOMweb has all.
        pacs.script.append(Behaviour("pacs.corrupt", instances=2, study=uids[1]))
        place = web_site(tmp_path, web.url, web)
        document = yaml.safe_load(place.file.read_text())
        node = {"host": "127.0.0.1", "port": pacs.port, "called_ae_title": pacs.ae_title}
        main_node = {**node, "retrieve": "c-get"}
        document["nodes"] = {"main": main_node, "vna": document["nodes"]["pacs"]}
        document["retry_after_seconds"] = []
        place.file.write_text(yaml.safe_dump(document))
        rows = place.cohort([{"StudyInstanceUID": uid} for uid in uids])
        known = register_cohort(place.site, rows, ["main", "vna"])
        with open_run(place.site, known.number) as pull:
            work_through(pull)
        totals = place.totals()
    assert dict(totals.rows) == {Verdict.ARCHIVED: 3}
    sent = set(web.sent_instances())
    by_web = {one.study_instance_uid for one in held if one.sop_instance_uid in sent}
    assert by_web == {uids[1], uids[2]}
