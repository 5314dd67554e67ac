"""Proxies of the environment are for other hosts: what listens on this one is asked directly.

Prefect's server, an object store in tests and the demo listen on loopback. Where ``HTTP_PROXY`` is
set and ``NO_PROXY`` is not, their clients would send requests for this host to the proxy, which
refuses them or asks a host of its own.
"""

from __future__ import annotations

import ipaddress
from collections.abc import MutableMapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from urllib.request import OpenerDirector

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
    """Whether a host name or address stands for this host on every host."""
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def spare_loopback(environ: MutableMapping[str, str], *urls: str | None) -> None:
    """Add loopback to the hosts that are not asked through a proxy, where there is one.

    Parameters
    ----------
    environ : mutable mapping
        Environment of this process, or of one that is started.
    urls : str or None
        Addresses that are used; those on loopback under another name are spared too.
    """
    if not proxy_variables(environ):
        return
    # Most clients prefer the name in small letters.
    given = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    spared = [entry for entry in map(str.strip, given.split(",")) if entry]
    if "*" in spared:
        return
    hosts = (urlsplit(url).hostname for url in urls if url)
    wanted = [*_LOOPBACK, *(host for host in hosts if host and is_loopback(host))]
    entries = ",".join(dict.fromkeys([*spared, *wanted]))
    environ["no_proxy"] = environ["NO_PROXY"] = entries


def proxy_variables(environ: MutableMapping[str, str]) -> list[str]:
    """Names of the variables that set a proxy: ``HTTP_PROXY``, ``https_proxy``, ``ALL_PROXY``."""
    return sorted(
        name
        for name, value in environ.items()
        if value and name.lower().endswith("_proxy") and name.lower() != "no_proxy"
    )


def direct_opener() -> OpenerDirector:
    """An opener of URLs on this host, which uses no proxy whatever the environment says."""
    # Most processes that import this module open none.
    import urllib.request

    return urllib.request.build_opener(urllib.request.ProxyHandler({}))
