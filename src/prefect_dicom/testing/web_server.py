"""A small scriptable DICOMweb server on loopback that misbehaves on request.

It has QIDO-RS at all levels, WADO-RS of studies, series and instances as they are stored, and an
issuer of tokens. Every request it gets is in its log.

Examples
--------
>>> from prefect_dicom.testing import Behaviour, ScriptedWeb, tiny_instances
>>> with ScriptedWeb(tiny_instances(2)) as web:
...     web.script.append(Behaviour("web.no_closing", times=1))
...     # ... let the set-up under test pull from web.url ...
...     retrievals = web.requests("WADO-RS")
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from pydicom.datadict import dictionary_VR, tag_for_keyword

from prefect_dicom.core.model import StoreRequest
from prefect_dicom.dicom.part10 import file_meta
from prefect_dicom.testing.instances import Holdings, StoredInstance
from prefect_dicom.testing.matching import matches, select
from prefect_dicom.testing.plans import Stage
from prefect_dicom.testing.script import Behaviour
from prefect_dicom.testing.web_plans import Json, WebPart, WebPlan

_LEVELS = {"studies": "STUDY", "series": "SERIES", "instances": "IMAGE"}
_ABOVE = {
    "studies": "StudyInstanceUID",
    "series": "SeriesInstanceUID",
    "instances": "SOPInstanceUID",
}
_CHUNK_END = b"\r\n"


@dataclass
class WebRequest:
    """A request and its result.

    Attributes
    ----------
    service : str
        "QIDO-RS", "WADO-RS" or "token".
    path, query : str
        As they were written.
    keys : dict of str to str
        Matching keys by keyword, those in the path among them.
    headers : dict of str to str
        Of the request, by their names in small letters.
    status : int
        Of the answer.
    sent : list of str
        SOP Instance UIDs of the instances that it was to hold.
    at : float
        Arrival, in seconds of ``time.monotonic``.
    """

    service: str
    path: str
    query: str
    keys: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 0
    sent: list[str] = field(default_factory=list)
    at: float = field(default_factory=time.monotonic)


class ScriptedWeb:
    """A DICOMweb server for tests; a context manager.

    Parameters
    ----------
    instances : iterable of StoredInstance
        What it holds.
    script : iterable of Behaviour
        How it misbehaves; :attr:`script` may be changed later.
    user : tuple of str and str, optional
        User and password that requests have to have (Basic).
    client : tuple of str and str, optional
        Client ID and secret to which :attr:`token_url` issues the tokens that requests have to
        have.
    tls : ssl.SSLContext, optional
        Makes it a server of https.

    Attributes
    ----------
    holdings : Holdings
        The instances it holds; may be changed while it runs.
    log : list of WebRequest
        Every request in the order of arrival.
    tokens : set of str
        The tokens that are good.
    """

    def __init__(
        self,
        instances: Iterable[StoredInstance] = (),
        *,
        script: Iterable[Behaviour] = (),
        user: tuple[str, str] | None = None,
        client: tuple[str, str] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.holdings = Holdings(instances)
        self.script = list(script)
        self.log: list[WebRequest] = []
        self.tokens: set[str] = set()
        self.token_seconds: float = 3600
        self.port = 0
        self._user = user
        self._client = client
        self._tls = tls
        self._lock = threading.Lock()
        self._numbers: dict[str, int] = {}
        self._issued = 0
        self._server: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    # --- life

    def __enter__(self) -> ScriptedWeb:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> ScriptedWeb:
        """Start listening and set :attr:`port`; returns the server itself."""
        server = ThreadingHTTPServer(("127.0.0.1", self.port), _Handler)
        server.daemon_threads = True
        cast(Any, server).web = self
        if self._tls is not None:
            server.socket = self._tls.wrap_socket(
                server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = server.server_address[1]
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stop listening; holdings and log stay."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        """Base URL of its services."""
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://127.0.0.1:{self.port}/dicom-web"

    @property
    def token_url(self) -> str:
        """URL of the issuer of tokens."""
        return self.url.replace("/dicom-web", "/token")

    # --- what happened

    def requests(self, service: str) -> list[WebRequest]:
        """The requests of a service, in the order of their arrival."""
        return [request for request in self.log if request.service == service]

    def sent_instances(self) -> list[str]:
        """SOP Instance UIDs of all that was in answers to retrievals, as often as it was."""
        return [uid for request in self.log for uid in request.sent]

    def last_of_studies(self, number: int) -> set[str]:
        """SOP Instance UIDs of the last instances of each study."""
        return {
            stored.sop_instance_uid
            for study in self.holdings.studies({})
            for stored in study[max(0, len(study) - number) :]
        }

    # --- answers

    def answer(self, request: WebRequest) -> WebPlan:
        """Plan the answer to a request and let the script edit it."""
        with self._lock:
            self.log.append(request)
            number = self._numbers[request.service] = self._numbers.get(request.service, 0) + 1
        segments = [part for part in request.path.split("/") if part][1:]
        plan = WebPlan(self, "", {})
        if not self._may(request):
            plan.status = 401
            plan.headers["WWW-Authenticate"] = 'Basic realm="scripted"'
        elif request.service == "QIDO-RS":
            self._search(request, segments, plan, number)
        else:
            self._retrieve(request, segments, plan, number)
        request.status = plan.status
        request.sent = [part.stored.sop_instance_uid for part in plan.parts]
        return plan

    def issue(self, request: WebRequest) -> tuple[int, Json]:
        """Issue a token, RFC 6749 4.4."""
        with self._lock:
            self.log.append(request)
            self._issued += 1
            token = f"token-{self._issued}"
        pair = base64.b64encode(":".join(self._client or ("", "")).encode()).decode()
        if self._client is None or request.headers.get("authorization") != f"Basic {pair}":
            request.status = 401
            return 401, {"error": "invalid_client"}
        self.tokens.add(token)
        request.status = 200
        return 200, {
            "access_token": token,
            "token_type": "Bearer",
            "expires_in": self.token_seconds,
        }

    def _may(self, request: WebRequest) -> bool:
        given = request.headers.get("authorization", "")
        if self._client is not None:
            return given.removeprefix("Bearer ") in self.tokens
        if self._user is None:
            return True
        return given == f"Basic {base64.b64encode(':'.join(self._user).encode()).decode()}"

    def _apply(self, stage: Stage, request: WebRequest, plan: WebPlan, number: int) -> None:
        for behaviour in list(self.script):
            behaviour.apply(stage, request.service, number, plan)

    def _search(self, request: WebRequest, segments: list[str], plan: WebPlan, number: int) -> None:
        plan.level = _LEVELS[segments[-1]]
        above = dict(zip(segments[:-1:2], segments[1:-1:2], strict=True))
        plan.keys = {_ABOVE[name]: unquote(uid) for name, uid in above.items()}
        parameters = parse_qsl(request.query, keep_blank_values=True)
        raw = dict(pair.partition("=")[::2] for pair in request.query.split("&") if pair)
        for name, value in parameters:
            if name == "limit":
                plan.limit = int(value)
            elif name == "offset":
                plan.offset = int(value)
            elif name != "includefield":
                # A comma that is not encoded makes a list.
                plan.keys[name] = "\\".join(map(unquote, raw[name].split(",")))
        self._apply(Stage.WEB_QUERY, request, plan, number)
        if not plan.decodes:
            plan.keys |= {name: raw[name].replace(",", "\\") for name in plan.keys if name in raw}
        request.keys = dict(plan.keys)
        keys = {
            name: value
            for name, value in plan.keys.items()
            if name not in plan.ignored_keys and tag_for_keyword(name) is not None
        }
        found = [as_json(known) for known, _ in select(self.holdings, plan.level, keys, matches)]
        end = None if plan.limit is None else plan.offset + plan.limit
        plan.answers = found[plan.offset : end]
        self._apply(Stage.WEB_SEARCH, request, plan, number)

    def _retrieve(
        self, request: WebRequest, segments: list[str], plan: WebPlan, number: int
    ) -> None:
        named = {_ABOVE[n]: unquote(u) for n, u in zip(segments[::2], segments[1::2], strict=True)}
        plan.keys = request.keys = named
        plan.level = _LEVELS[segments[-2]]
        held = [
            stored
            for study in self.holdings.studies({"StudyInstanceUID": named["StudyInstanceUID"]})
            for stored in study
            if all(stored.attributes.get(name) == uid for name, uid in named.items())
        ]
        for stored in held:
            data = part10_of(stored)
            headers = {
                "Content-Type": f"application/dicom;transfer-syntax={stored.transfer_syntax_uid}",
                "Content-Length": str(len(data)),
            }
            plan.parts.append(WebPart(stored, data, headers))
        if not held:
            plan.status = 404
        self._apply(Stage.WEB_RETRIEVE, request, plan, number)


def part10_of(stored: StoredInstance) -> bytes:
    """An instance as a Part 10 file."""
    request = StoreRequest(
        0, stored.sop_class_uid, stored.sop_instance_uid, stored.transfer_syntax_uid
    )
    return file_meta(request) + stored.encoded()


def as_json(attributes: dict[str, str]) -> Json:
    """Attributes in the DICOM JSON Model, PS3.18 Annex F."""
    found: Json = {}
    for keyword, text in attributes.items():
        tag = tag_for_keyword(keyword)
        if tag is None or keyword == "SpecificCharacterSet":
            continue
        vr = dictionary_VR(tag)
        element: Json = {"vr": vr}
        if text:
            values: list[Any] = text.split("\\")
            if vr == "PN":
                names = ("Alphabetic", "Ideographic", "Phonetic")
                values = [
                    {n: g for n, g in zip(names, v.split("="), strict=False) if g} for v in values
                ]
            elif vr == "IS":
                values = [int(v) if v.lstrip("-").isdigit() else v for v in values]
            element["Value"] = values
        found[f"{tag:08X}"] = element
    return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments: object) -> None:
        pass

    @property
    def _web(self) -> ScriptedWeb:
        return cast(ScriptedWeb, cast(Any, self.server).web)

    def _request(self, service: str) -> WebRequest:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        return WebRequest(service, parts.path, parts.query, headers=headers)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", "0")))
        status, answer = self._web.issue(self._request("token"))
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        segments = [part for part in urlsplit(self.path).path.split("/") if part]
        searched = bool(segments) and segments[-1] in _LEVELS
        plan = self._web.answer(self._request("QIDO-RS" if searched else "WADO-RS"))
        body, kind = _body(plan, searched)
        with contextlib.suppress(OSError):
            self._send(plan, body, kind)

    def _send(self, plan: WebPlan, body: Iterator[bytes], kind: str) -> None:
        whole = b"" if plan.framing != "length" else b"".join(body)
        if plan.framing == "length":
            body = iter([whole])
        self.send_response(plan.status)
        for name, value in plan.headers.items():
            self.send_header(name, value)
        if plan.status != 204:
            self.send_header("Content-Type", kind)
            if plan.framing == "chunked":
                self.send_header("Transfer-Encoding", "chunked")
            elif plan.framing == "close":
                self.send_header("Connection", "close")
            else:
                self.send_header("Content-Length", str(len(whole)))
        self.end_headers()
        self.close_connection = plan.framing == "close" or plan.cut_after is not None
        sent = 0
        for piece in _pieces(body, plan.chunk_bytes):
            time.sleep(plan.pause_seconds)
            if plan.hold_after is not None and plan.hold is not None and sent >= plan.hold_after:
                self.wfile.flush()
                plan.hold.wait()
                plan.hold_after = None
            if plan.cut_after is not None and sent + len(piece) >= plan.cut_after:
                self._write(plan, piece[: plan.cut_after - sent])
                self.connection.shutdown(socket.SHUT_WR)
                return
            self._write(plan, piece)
            sent += len(piece)
        if plan.framing == "chunked":
            self.wfile.write(b"0" + 2 * _CHUNK_END)

    def _write(self, plan: WebPlan, piece: bytes) -> None:
        if plan.framing == "chunked":
            piece = f"{len(piece):x}".encode() + _CHUNK_END + piece + _CHUNK_END
        self.wfile.write(piece)


def _pieces(body: Iterator[bytes], size: int) -> Iterator[bytes]:
    for some in body:
        for start in range(0, len(some), size):
            yield some[start : start + size]


def _body(plan: WebPlan, searched: bool) -> tuple[Iterator[bytes], str]:
    """The body of an answer and its Content-Type."""
    if callable(plan.body):
        kind = "application/dicom+json" if searched else _multipart_type(plan)
        return plan.body(), kind
    if plan.body is not None:
        return iter([plan.body]), "text/plain"
    if searched:
        body, kind = json.dumps(plan.answers).encode(), "application/dicom+json"
    elif plan.single:
        body, kind = plan.parts[0].data, "application/dicom"
    else:
        body, kind = _multipart(plan), _multipart_type(plan)
    return iter([body if plan.edit is None else plan.edit(body)]), kind


def _multipart_type(plan: WebPlan) -> str:
    return f'multipart/related; type="application/dicom"; boundary="{plan.boundary}"'


def _multipart(plan: WebPlan) -> bytes:
    delimiter = f"--{plan.boundary}".encode()
    body = b""
    for part in plan.parts:
        lines = "".join(f"{name}: {value}\r\n" for name, value in part.headers.items())
        body += delimiter + b"\r\n" + lines.encode() + b"\r\n" + part.data + b"\r\n"
    return body + (delimiter + b"--\r\n" if plan.closing else b"")
