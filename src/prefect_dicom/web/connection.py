"""HTTP/1.1 to one server over one connection, with bounds on everything a server can send.

Python's own parser reads status and headers; what is added here is what it lacks: a body that is
read into the caller's buffer, time limits for silence instead of for the whole exchange, a look
every moment at whether the run is to stop, and nothing that writes a URL into a log: URLs hold
patient IDs and UIDs.

The connection is kept between requests. One that turns out to be gone before a request was
answered is opened anew, once: requests here change nothing, so that they may be sent twice.
"""

from __future__ import annotations

import contextlib
import io
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse, LineTooLong
from typing import cast
from urllib.parse import SplitResult, urlsplit

from prefect_dicom.config.tls import Tls
from prefect_dicom.core.errors import Interrupted, PacsError
from prefect_dicom.network.association_errors import unconnected
from prefect_dicom.network.tls import refusal, refusal_after, secure
from prefect_dicom.network.upper_layer.sockets import acknowledge, prepare
from prefect_dicom.web.proxy import Proxy, proxy_for

_LOOK_SECONDS = 0.2
"""How late, at worst, a cancellation is noticed while bytes are waited for."""
_LEAST_BYTES = 1024
"""Fewer bytes than these within the time limit for silence are silence too."""
_READ_BYTES = 128 * 1024
_IDLE_SECONDS = 15.0
"""Servers close idle connections; one about to go is not used."""
_MOST_DRAINED_BYTES = 64 * 1024
_LONGEST_CHUNK_LINE = 4096


@dataclass(frozen=True, slots=True)
class Patience:
    """Time limits in seconds.

    Parameters
    ----------
    connect : float
        For the TCP connection, and for the TLS handshake.
    answer : float
        From a request to the end of the headers of its answer.
    silence : float
        Between two lots of bytes of a body.
    """

    connect: float
    answer: float
    silence: float


class ResponseCut(Exception):
    """A response ended before its end, as far as HTTP can show that; the text says how."""


class _Silence(Exception):
    """Nothing, or next to nothing, came within the time limit."""


class _Bytes(io.RawIOBase):
    """What a socket brings, under a time limit for silence that may be changed between reads."""

    def __init__(self, connection: socket.socket, stopping: Callable[[], bool]) -> None:
        self.patience = 0.0
        self.deadline: float | None = None
        """Of ``time.monotonic``: when what is read now has to be whole; None: at no time."""
        self._connection = connection
        self._stopping = stopping

    def readable(self) -> bool:
        return True

    def restart(self, patience: float, *, whole: bool) -> None:
        """Begin a time limit: for silence, or for all that is read until the next one begins."""
        self.patience = patience
        self._since, self._size = time.monotonic(), 0
        self.deadline = self._since + patience if whole else None

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            now = time.monotonic()
            end = self.deadline if self.deadline is not None else self._since + self.patience
            if now >= end:
                raise _Silence
            if self._stopping():
                raise Interrupted()
            self._connection.settimeout(min(_LOOK_SECONDS, end - now))
            try:
                size = self._connection.recv_into(buffer)
            except TimeoutError:
                continue
            acknowledge(self._connection)
            self._size += size
            if self._size >= _LEAST_BYTES:
                self._since, self._size = time.monotonic(), 0
            return size


class _Socket:
    """A connected socket as Python's parser of responses wants one."""

    def __init__(self, connection: socket.socket, stopping: Callable[[], bool]) -> None:
        self.connection = connection
        self.bytes = _Bytes(connection, stopping)
        self.reader = io.BufferedReader(self.bytes, _READ_BYTES)

    def makefile(self, mode: str) -> io.BufferedReader[_Bytes]:
        return self.reader

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.close()


class Response:
    """The answer to a request: its status and headers, and its body as it comes."""

    def __init__(self, response: HTTPResponse, opened: _Socket, patience: float) -> None:
        self.status = response.status
        self.headers = response.headers
        """Names in any case; of several values of a name, the first."""
        self.warnings: list[str] = response.headers.get_all("Warning") or []
        self.is_bounded = bool(response.chunked) or response.length is not None
        """Whether HTTP itself shows where the body ends, and so whether it is whole."""
        self.reusable = not response.will_close and self.is_bounded
        self.ended = False
        self._reader = opened.reader
        self._opened = opened
        self._patience = patience
        self._left = response.length
        self._chunked = bool(response.chunked)
        self._chunk_left: int | None = None
        self._inflate = _inflater(self.headers.get("Content-Encoding", ""))
        self._deflated = b""
        opened.bytes.restart(patience, whole=False)
        if self._left == 0:
            self.ended = True

    def read_into(self, buffer: memoryview) -> int:
        """Read some of the body; returns how many bytes, 0 at its end.

        Raises
        ------
        PacsError
            ``association-stalled``: nothing came for too long.
        Interrupted
            The run is to stop.
        ResponseCut
            It ended before its end.
        """
        if self._inflate is None:
            return self._receive(buffer)
        return self._inflated(buffer)

    def read(self, most: int) -> bytes:
        """The whole body of at most so many bytes.

        Raises
        ------
        PacsError
            Also ``answer-unusable`` for a longer one, or one that was cut.
        """
        body = bytearray()
        buffer = bytearray(_READ_BYTES)
        view = memoryview(buffer)
        try:
            while size := self.read_into(view):
                body += view[:size]
                if len(body) > most:
                    raise PacsError("answer-unusable", f"an answer of more than {most} bytes")
        except ResponseCut as cut:
            raise PacsError("association-lost", str(cut)) from None
        return bytes(body)

    def drain(self) -> bool:
        """Read what is left, if it is little; whether the connection can be used again."""
        if not self.reusable:
            return False
        buffer = memoryview(bytearray(_MOST_DRAINED_BYTES))
        read = 0
        with contextlib.suppress(ResponseCut, PacsError):
            while not self.ended and read < _MOST_DRAINED_BYTES:
                read += self._receive(buffer)
        return self.ended

    def _inflated(self, buffer: memoryview) -> int:
        """As :meth:`read_into`, of a body that was compressed though that was not asked for."""
        assert self._inflate is not None
        scratch = memoryview(bytearray(_READ_BYTES))
        while True:
            if self._deflated or self._inflate.unconsumed_tail:
                raw = self._inflate.unconsumed_tail or self._deflated
                self._deflated = b""
                try:
                    plain = self._inflate.decompress(raw, len(buffer))
                except zlib.error:
                    raise ResponseCut("a compressed body that is none") from None
                if plain:
                    buffer[: len(plain)] = plain
                    return len(plain)
            size = self._receive(scratch)
            if not size:
                if not self._inflate.eof:
                    raise ResponseCut("a compressed body without its end")
                return 0
            self._deflated = bytes(scratch[:size])

    def _receive(self, buffer: memoryview) -> int:
        if self.ended or not len(buffer):
            return 0
        try:
            return self._some(buffer)
        except _Silence:
            raise PacsError(
                "association-stalled", f"nothing came for {self._patience:g} s"
            ) from None
        except (OSError, ValueError) as error:
            raise ResponseCut(f"the connection ended ({type(error).__name__})") from None

    def _some(self, buffer: memoryview) -> int:
        if self._chunked:
            return self._some_of_chunk(buffer)
        wanted = buffer if self._left is None else buffer[: min(len(buffer), self._left)]
        size = self._reader.readinto1(wanted)
        if self._left is not None:
            self._left -= size
            if not size:
                raise ResponseCut("the body is shorter than its Content-Length")
            self.ended = not self._left
        else:
            self.ended = not size
        return size

    def _some_of_chunk(self, buffer: memoryview) -> int:
        if not self._chunk_left:
            if self._chunk_left == 0:
                self._line()
            try:
                self._chunk_left = int(self._line().partition(b";")[0].strip(), 16)
            except ValueError:
                raise ResponseCut("the size of a chunk is none") from None
            if self._chunk_left < 0:
                raise ResponseCut("the size of a chunk is none")
            if not self._chunk_left:
                while self._line() not in (b"\r\n", b"\n"):
                    pass
                self.ended = True
                return 0
        size = self._reader.readinto1(buffer[: min(len(buffer), self._chunk_left)])
        if not size:
            raise ResponseCut("the body ends within a chunk")
        self._chunk_left -= size
        return size

    def _line(self) -> bytes:
        line = self._reader.readline(_LONGEST_CHUNK_LINE)
        if not line.endswith(b"\n"):
            raise ResponseCut("the body ends between chunks")
        return line


def _inflater(encoding: str) -> zlib._Decompress | None:
    """What undoes a Content-Encoding; None for none.

    Raises
    ------
    PacsError
        ``answer-unusable`` for one that is not known.
    """
    if encoding.strip().lower() in ("", "identity"):
        return None
    if encoding.strip().lower() in ("gzip", "x-gzip", "deflate"):
        return zlib.decompressobj(32 + zlib.MAX_WBITS)
    raise PacsError("answer-unusable", "a body in an encoding that was not asked for")


class HttpConnection:
    """Requests to the servers of one node, over one connection at a time.

    Parameters
    ----------
    tls : Tls
        How servers of https are verified, and what we show them.
    stopping : callable
        Whether the run is to stop; called while bytes are waited for.
    """

    def __init__(self, tls: Tls, stopping: Callable[[], bool]) -> None:
        self._tls = tls
        self._stopping = stopping
        self._opened: _Socket | None = None
        self._origin: tuple[str, str, int] | None = None
        self._last_used = 0.0

    @contextlib.contextmanager
    def request(
        self,
        url: str,
        headers: Mapping[str, str],
        patience: Patience,
        *,
        method: str = "GET",
        body: bytes = b"",
    ) -> Iterator[Response]:
        """Send a request; the connection is kept if the body was read to its end, or nearly.

        Raises
        ------
        PacsError
            No connection, no answer in time, or one that is not HTTP.
        Interrupted
            The run is to stop.
        """
        parts = urlsplit(url)
        origin = origin_of(url)
        if self._opened is not None and (
            origin != self._origin or time.monotonic() - self._last_used >= _IDLE_SECONDS
        ):
            self.close()
        fresh = self._opened is None
        while True:
            opened = self._opened or self._open(origin, patience)
            try:
                response = _exchange(opened, parts, origin, method, headers, body, patience)
                break
            except ConnectionError:
                self.close()
                if fresh:
                    raise PacsError(
                        "association-lost", "the connection ended before an answer"
                    ) from None
                fresh = True
            except BaseException:
                self.close()
                raise
        try:
            yield response
        except BaseException:
            self.close()
            raise
        if response.drain():
            self._last_used = time.monotonic()
        else:
            self.close()

    def close(self) -> None:
        """Close the connection; fine to repeat."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def _open(self, origin: tuple[str, str, int], patience: Patience) -> _Socket:
        scheme, host, port = origin
        proxy = proxy_for(scheme, host, port)
        target = (host, port) if proxy is None else (proxy.host, proxy.port)
        try:
            connection = socket.create_connection(target, patience.connect)
        except (OSError, UnicodeError) as error:
            raise unconnected(error, patience.connect) from None
        prepare(connection)
        try:
            if scheme == "https":
                if proxy is not None:
                    _tunnel(connection, origin, proxy, patience, self._stopping)
                connection = secure(connection, HttpsEnd(self._tls, host), patience.connect)
        except BaseException:
            connection.close()
            raise
        self._opened, self._origin = _Socket(connection, self._stopping), origin
        return self._opened


@dataclass(frozen=True, slots=True)
class HttpsEnd:
    """The end of a connection with TLS, as :func:`~prefect_dicom.network.tls.secure` takes it."""

    tls: Tls
    host: str
    tls_name: str | None = None


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a URL: what credentials are for, RFC 6454."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or _DEFAULT_PORTS[parts.scheme]


_DEFAULT_PORTS = {"http": 80, "https": 443}


def _exchange(
    opened: _Socket,
    parts: SplitResult,
    origin: tuple[str, str, int],
    method: str,
    headers: Mapping[str, str],
    body: bytes,
    patience: Patience,
) -> Response:
    """Send a request and read status and headers of its answer.

    Raises
    ------
    ConnectionError
        The connection was gone before the first byte of an answer.
    """
    scheme, host, port = origin
    target = parts.path or "/"
    if parts.query:
        target += f"?{parts.query}"
    proxy = proxy_for(scheme, host, port) if scheme == "http" else None
    authority = _host_of_url(host)
    if port != _DEFAULT_PORTS[scheme]:
        authority += f":{port}"
    lines = {"Host": authority, "Connection": "keep-alive", **headers}
    if proxy is not None:
        target = f"{scheme}://{authority}{target}"
        lines |= proxy.headers
    if body or method != "GET":
        lines["Content-Length"] = str(len(body))
    head = _request_head(method, target, lines)
    opened.connection.settimeout(patience.connect)
    try:
        opened.connection.sendall(head + body)
    except TimeoutError:
        raise PacsError("pacs-silent", "the server does not take the request") from None
    except OSError as error:
        raise refusal_after(error, opened.connection) or ConnectionResetError() from None
    opened.bytes.restart(patience.answer, whole=True)
    return Response(_head_of(opened, method, patience.answer), opened, patience.silence)


def _host_of_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _request_head(method: str, target: str, lines: Mapping[str, str]) -> bytes:
    if any(c < " " for c in target + "".join(lines.values())):
        raise ValueError("a control character in a request line or header")
    head = f"{method} {target} HTTP/1.1\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    try:
        return head.encode("ascii")
    except UnicodeEncodeError:
        raise ValueError("a request line or header beyond ASCII") from None


def _head_of(opened: _Socket, method: str, seconds: float) -> HTTPResponse:
    """Status and headers of an answer."""
    response = HTTPResponse(cast("socket.socket", opened), method=method)
    try:
        response.begin()
    except _Silence:
        raise PacsError("pacs-silent", f"no answer within {seconds:g} s") from None
    except ConnectionError:
        # RemoteDisconnected too: nothing of an answer came.
        raise
    except OSError as error:
        # With TLS 1.3 our certificate is refused when the first answer is read.
        raise refusal(error) or ConnectionResetError() from None
    except LineTooLong:
        raise PacsError("answer-unusable", "headers without end") from None
    except (HTTPException, ValueError):
        raise PacsError("protocol-not-supported", "what answers does not speak HTTP/1.1") from None
    # It would close the reader when it goes, which the next response is read from too.
    response.fp = None  # type: ignore[assignment]
    return response


def _tunnel(
    connection: socket.socket,
    origin: tuple[str, str, int],
    proxy: Proxy,
    patience: Patience,
    stopping: Callable[[], bool],
) -> None:
    """Have a proxy connect to a server, RFC 9110 9.3.6."""
    _, host, port = origin
    authority = f"{_host_of_url(host)}:{port}"
    head = _request_head("CONNECT", authority, {"Host": authority, **proxy.headers})
    opened = _Socket(connection, stopping)
    opened.bytes.restart(patience.connect, whole=True)
    connection.settimeout(patience.connect)
    try:
        connection.sendall(head)
        response = _head_of(opened, "CONNECT", patience.connect)
    except ConnectionError:
        raise PacsError("pacs-unreachable", "the proxy closed the connection") from None
    if response.status != 200:
        raise PacsError("pacs-unreachable", f"the proxy answers with status {response.status}")
