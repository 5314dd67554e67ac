"""An HTTP proxy as hospitals have it: it answers everybody without credentials by 407."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.sites import LOOPBACK

_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY")


@dataclass
class Proxy:
    """A proxy that passes nothing on.

    Attributes
    ----------
    url : str
        Its own address.
    requests : list of str
        What it was asked for: method and target of each request.
    """

    url: str
    requests: list[str] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which all clients use it."""
        return dict.fromkeys(_VARIABLES, self.url)


@contextlib.contextmanager
def refusing_proxy() -> Iterator[Proxy]:
    """A proxy that answers every request by 407, and keeps what it was asked for."""

    class Refuses(BaseHTTPRequestHandler):
        def _refuse(self) -> None:
            proxy.requests.append(f"{self.command} {self.path}")
            self.send_response(407)
            self.send_header("Proxy-Authenticate", "Basic")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_CONNECT = _refuse

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer((LOOPBACK, 0), Refuses) as server:
        proxy = Proxy(f"http://{LOOPBACK}:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()
            thread.join()
