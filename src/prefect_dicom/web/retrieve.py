"""Instances by WADO-RS, PS3.18 10.4: one request, its parts into the spool as they arrive.

Instances are requested as they are stored (``transfer-syntax=*``): without that a server converts
them, or fails at what it cannot decode after it has sent the others with status 200. No request
here asks for a conversion.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefect_dicom.core.errors import Interrupted, PacsError, SpoolFull
from prefect_dicom.core.model import StoreRequest
from prefect_dicom.network.storage_scp.store_handler import StoreHandler
from prefect_dicom.web.connection import Response, ResponseCut
from prefect_dicom.web.content_type import parse_content_type
from prefect_dicom.web.multipart import BUFFER_BYTES, MultipartFault, MultipartReader

DICOM = "application/dicom"
AS_STORED = f'multipart/related; type="{DICOM}"; transfer-syntax=*'
AS_STORED_UNQUOTED = f"multipart/related; type={DICOM}; transfer-syntax=*"
SINGLE_AS_STORED = f"{DICOM}; transfer-syntax=*"
_PLAIN_ENCODINGS = ("", "binary", "8bit", "7bit", "identity")


@dataclass(frozen=True, slots=True)
class Retrieved:
    """The end of one request.

    Parameters
    ----------
    code : str or None
        A code of :mod:`prefect_dicom.core.reasons`; None where the answer was whole.
    parts : int
        Instances that were whole.
    """

    code: str | None
    parts: int = 0


class _Stopped(Exception):
    """An instance could not be kept; nothing more is to be received."""


class InstancePart:
    """A part of an answer on its way into the spool."""

    def __init__(self, sink: StoreHandler, request: StoreRequest) -> None:
        self._sink = sink
        try:
            self._incoming = sink.begin(request, whole_file=True)
        except (SpoolFull, OSError):
            raise _Stopped from None

    def write(self, data: memoryview) -> None:
        """Take the next bytes."""
        try:
            self._incoming.write([data])
        except (SpoolFull, OSError):
            raise _Stopped from None

    def complete(self) -> None:
        """Hand a whole instance on."""
        if self._sink.complete(self._incoming) != 0:
            raise _Stopped

    def abandon(self) -> None:
        """Discard an instance that is not whole."""
        self._sink.abandon(self._incoming)


def receive(response: Response, sink: StoreHandler, host: str, *, single: bool) -> Retrieved:
    """Take the instances of an answer that reports success.

    Parameters
    ----------
    sink : StoreHandler
        Where instances go.
    host : str
        Where they come from, for the note of one that was not requested.
    single : bool
        Whether the request was for one instance, which may come without parts.
    """
    found = parse_content_type(response.headers.get("Content-Type", ""))
    request = StoreRequest(0, "", "", "", peer_address=host)
    if found is None:
        return Retrieved("answer-unusable")
    try:
        if found.media_type == "multipart/related" and found.boundary is not None:
            return _receive_parts(response, sink, request, found.boundary)
        if found.media_type == DICOM and single:
            return _receive_single(response, sink, request)
    except Interrupted:
        return Retrieved("interrupted")
    return Retrieved("answer-unusable")


def _receive_parts(
    response: Response, sink: StoreHandler, request: StoreRequest, boundary: bytes
) -> Retrieved:
    def begin(headers: dict[str, str]) -> InstancePart:
        kind = parse_content_type(headers.get("content-type", ""))
        encoding = headers.get("content-transfer-encoding", "").lower()
        if kind is None or kind.media_type != DICOM or encoding not in _PLAIN_ENCODINGS:
            raise MultipartFault("a part that is no instance")
        return InstancePart(sink, request)

    reader = MultipartReader(boundary, response.read_into, begin)
    try:
        whole = reader.read()
    except _Stopped:
        return Retrieved("interrupted", reader.parts)
    except MultipartFault:
        return Retrieved("answer-unusable", reader.parts)
    except ResponseCut:
        return Retrieved("association-lost", reader.parts)
    except PacsError as error:
        return Retrieved(error.code, reader.parts)
    if reader.unequal:
        return Retrieved("answer-unusable", reader.parts)
    return Retrieved(None if whole else "response-cut-short", reader.parts)


def _receive_single(response: Response, sink: StoreHandler, request: StoreRequest) -> Retrieved:
    if not response.is_bounded:
        # Nothing would show that it is cut.
        return Retrieved("answer-unusable")
    try:
        part = InstancePart(sink, request)
    except _Stopped:
        return Retrieved("interrupted")
    try:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        while size := response.read_into(buffer):
            part.write(buffer[:size])
    except BaseException as error:
        part.abandon()
        if isinstance(error, _Stopped):
            return Retrieved("interrupted")
        if isinstance(error, ResponseCut):
            return Retrieved("association-lost")
        if isinstance(error, PacsError):
            return Retrieved(error.code)
        raise
    try:
        part.complete()
    except _Stopped:
        return Retrieved("interrupted")
    return Retrieved(None, 1)
