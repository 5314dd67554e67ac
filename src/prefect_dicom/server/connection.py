"""Whether Prefect can be used: the configured server answers, or an embedded one starts."""

from __future__ import annotations

import os
import time
from urllib.parse import urlsplit

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL

from prefect_dicom.core.errors import PrefectDicomError
from prefect_dicom.core.proxies import is_loopback, proxy_variables
from prefect_dicom.server.embedded import use_embedded_server


def reach_server() -> str:
    """Reach the Prefect server that is configured, or start an embedded one.

    Returns
    -------
    str
        Which server it is.

    Raises
    ------
    PrefectDicomError
        It does not answer, or cannot be started (``prefect-unavailable``).
    """
    log = use_embedded_server()
    begun = time.monotonic()
    url = PREFECT_API_URL.value()
    try:
        with get_client(sync_client=True) as client:
            trouble = client.api_healthcheck()
    except RuntimeError as error:
        detail = f"{error}; its log is {log}; PREFECT_HOME names another place for its database"
        raise PrefectDicomError("prefect-unavailable", detail) from None
    if trouble is None:
        if url:
            return _address(url)
        return f"embedded, started in {time.monotonic() - begun:.0f} s"
    if url:
        detail = f"{_address(url)}{_way(url)} ({type(trouble).__name__})"
    else:
        detail = f"embedded ({type(trouble).__name__}); its log is {log}"
    raise PrefectDicomError("prefect-unavailable", detail)


def _address(url: str) -> str:
    """Host and port: a URL may hold a password."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port}" if parts.port else f"{parts.hostname}"


def _way(url: str) -> str:
    proxies = proxy_variables(os.environ)
    if not proxies or is_loopback(urlsplit(url).hostname or ""):
        return ""
    return f", unless NO_PROXY names it through the proxy of {' or '.join(proxies)}"
