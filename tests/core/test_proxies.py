"""Loopback is never asked through a proxy, whoever asks and however the proxy is set."""

from __future__ import annotations

import http.server
import threading
import urllib.request
from collections.abc import Iterator

import httpx
import pytest
from botocore.utils import get_environ_proxies

from prefect_dicom.core.proxies import is_loopback, proxy_variables, spare_loopback
from tests.support.proxies import Proxy, refusing_proxy
from tests.support.sites import LOOPBACK


@pytest.fixture
def proxy(monkeypatch) -> Iterator[Proxy]:
    with refusing_proxy() as proxy:
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        yield proxy


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(
        (LOOPBACK, 0), http.server.SimpleHTTPRequestHandler
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://{LOOPBACK}:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "All_Proxy", "SOCKS_PROXY"])
def test_loopback_is_spared_where_a_proxy_is_set(name):
    environ = {name: "http://proxy.hospital.example:8080"}
    spare_loopback(environ)
    assert environ["no_proxy"] == environ["NO_PROXY"] == "localhost,127.0.0.1,::1"
    assert proxy_variables(environ) == [name]


@pytest.mark.parametrize(
    ("given", "then"),
    [
        ({"NO_PROXY": "a.example"}, "a.example,localhost,127.0.0.1,::1"),
        ({"no_proxy": "a.example, b.example"}, "a.example,b.example,localhost,127.0.0.1,::1"),
        # Most clients prefer the name in small letters.
        ({"no_proxy": "b.example", "NO_PROXY": "a.example"}, "b.example,localhost,127.0.0.1,::1"),
        ({"no_proxy": "", "NO_PROXY": "a.example"}, "a.example,localhost,127.0.0.1,::1"),
        ({"no_proxy": "127.0.0.1"}, "127.0.0.1,localhost,::1"),
    ],
)
def test_what_was_spared_before_stays(given, then):
    environ = {"HTTP_PROXY": "http://proxy.example", **given}
    spare_loopback(environ)
    assert environ["no_proxy"] == environ["NO_PROXY"] == then


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"HTTP_PROXY": ""},
        {"NO_PROXY": "a.example"},
        {"HTTP_PROXY": "http://proxy.example", "NO_PROXY": "*"},
    ],
)
def test_nothing_is_set_where_there_is_no_proxy(environ):
    before = dict(environ)
    spare_loopback(environ)
    assert environ == before


def test_a_server_on_loopback_under_another_name_is_spared_too():
    environ = {"HTTP_PROXY": "http://proxy.example"}
    spare_loopback(environ, "http://127.0.0.2:4200/api", "http://prefect.example/api", None)
    assert environ["no_proxy"] == "localhost,127.0.0.1,::1,127.0.0.2"


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("LocalHost", True),
        ("minio.localhost", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("", False),
    ],
)
def test_hosts_that_are_this_one(host, loopback):
    assert is_loopback(host) is loopback


def test_no_client_asks_the_proxy_for_loopback(proxy, server, monkeypatch):
    import os

    environ = dict(os.environ)
    spare_loopback(environ)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, environ[name])
    assert httpx.get(server).is_success
    # Not urlopen: it would keep this proxy for whatever the process requests later.
    with urllib.request.build_opener().open(server) as answer:
        assert answer.status == 200
    assert get_environ_proxies(server) == {}
    assert proxy.requests == []
    # Others are still asked for there.
    assert httpx.get("http://archive.example/").status_code == 407
    assert get_environ_proxies("https://archive.example/")["https"] == proxy.url
