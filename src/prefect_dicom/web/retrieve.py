"""Instances by WADO-RS, PS3.18 10.4: one request, its parts into the spool as they arrive.

Instances are requested as they are stored (``transfer-syntax=*``): without that a server converts
them, or fails at what it cannot decode after it has sent the others with status 200. No request
here asks for a conversion.
"""

from __future__ import annotations

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


def receive(response: Response, sink: StoreHandler, host: str, *, single: bool) -> str | None:
    """Take the instances of an answer that reports success.

    Parameters
    ----------
    sink : StoreHandler
        Where instances go.
    host : str
        Where they come from, for the note of one that was not requested.
    single : bool
        Whether the request was for one instance, which may come without parts.

    Returns
    -------
    str or None
        A code of :mod:`prefect_dicom.core.reasons`; None where the answer was whole.
    """
    found = parse_content_type(response.headers.get("Content-Type", ""))
    request = StoreRequest(0, "", "", "", peer_address=host)
    if found is None:
        return "answer-unusable"
    try:
        if found.media_type == "multipart/related" and found.boundary is not None:
            return _receive_parts(response, sink, request, found.boundary)
        if found.media_type == DICOM and single:
            return _receive_single(response, sink, request)
    except (Interrupted, _Stopped):
        return "interrupted"
    except MultipartFault:
        return "answer-unusable"
    except ResponseCut:
        return "association-lost"
    except PacsError as error:
        return error.code
    return "answer-unusable"


def _receive_parts(
    response: Response, sink: StoreHandler, request: StoreRequest, boundary: bytes
) -> str | None:
    def begin(headers: dict[str, str]) -> InstancePart:
        kind = parse_content_type(headers.get("content-type", ""))
        encoding = headers.get("content-transfer-encoding", "").lower()
        if kind is None or kind.media_type != DICOM or encoding not in _PLAIN_ENCODINGS:
            raise MultipartFault("a part that is no instance")
        return InstancePart(sink, request)

    reader = MultipartReader(boundary, response.read_into, begin)
    whole = reader.read()
    if reader.unequal:
        return "answer-unusable"
    return None if whole else "response-cut-short"


def _receive_single(response: Response, sink: StoreHandler, request: StoreRequest) -> str | None:
    if not response.is_bounded:
        # Nothing would show that it is cut.
        return "answer-unusable"
    part = InstancePart(sink, request)
    try:
        buffer = memoryview(bytearray(BUFFER_BYTES))
        while size := response.read_into(buffer):
            part.write(buffer[:size])
    except BaseException:
        part.abandon()
        raise
    part.complete()
    return None
