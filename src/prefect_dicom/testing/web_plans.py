"""Plan of a scripted DICOMweb server: what it is about to answer, for a script to edit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prefect_dicom.testing.instances import StoredInstance

if TYPE_CHECKING:
    from prefect_dicom.testing.web_server import ScriptedWeb

Json = dict[str, Any]
"""A data set in the DICOM JSON Model, PS3.18 Annex F."""


@dataclass(eq=False)
class WebPart:
    """One instance of an answer: its bytes, and the headers of its part."""

    stored: StoredInstance
    data: bytes
    headers: dict[str, str]


@dataclass(eq=False)
class WebPlan:
    """Plan of the answer to one request."""

    web: ScriptedWeb
    level: str
    keys: dict[str, str]
    """The matching keys by keyword, those in the path among them."""
    limit: int | None = None
    offset: int = 0
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    ignored_keys: frozenset[str] = frozenset()
    decodes: bool = True
    """False: values in a query are taken as they are written."""
    answers: list[Json] = field(default_factory=list)
    """Of a search: those of the page."""
    parts: list[WebPart] = field(default_factory=list)
    """Of a retrieval."""
    boundary: str = "scripted-0f3c"
    closing: bool = True
    """False: the closing delimiter is left out."""
    framing: str = "length"
    """How the body ends: by its length, chunked, or close (of the connection)."""
    single: bool = False
    """One instance comes without parts."""
    body: bytes | Callable[[], Iterator[bytes]] | None = None
    """In place of the answers or parts."""
    cut_after: int | None = None
    """The connection is closed after so many bytes of the body."""
    chunk_bytes: int = 64 * 1024
    hold_after: int | None = None
    """Nothing is sent after so many bytes of the body until ``hold`` is set."""
    hold: threading.Event | None = None
    pause_seconds: float = 0
    """Waited for before each piece of the body."""
    edit: Callable[[bytes], bytes] | None = None
    """Makes another body of the true one."""

    def concerns(self, study: str) -> bool:
        """Whether the request names, or the answer is of, this study."""
        if self.keys.get("StudyInstanceUID") == study:
            return True
        if any(part.stored.study_instance_uid == study for part in self.parts):
            return True
        return any(one.get("0020000D", {}).get("Value") == [study] for one in self.answers)
