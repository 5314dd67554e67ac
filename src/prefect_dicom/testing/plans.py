"""Plans of a scripted PACS: what it is about to do with a request, for a script to edit.

A plan is the answer to an association request, the answers of a C-FIND, the sub-operations and
final status of a C-MOVE or C-GET, or what becomes of an instance that comes by C-STORE. A knob
edits a plan; the PACS then does what the plan says.
"""

from __future__ import annotations

import inspect
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from pydicom.dataset import Dataset

from prefect_dicom.config.tls import Tls
from prefect_dicom.testing.association_pdus import OddItems
from prefect_dicom.testing.instances import StoredInstance
from prefect_dicom.testing.matching import matches, select
from prefect_dicom.testing.sending import SenderManner
from prefect_dicom.testing.web_plans import WebPlan

if TYPE_CHECKING:
    from prefect_dicom.testing.pacs import ScriptedPacs

SUCCESS = 0x0000
CANCEL = 0xFE00
PENDING = 0xFF00
UNABLE_TO_PROCESS = 0xC000
DESTINATION_UNKNOWN = 0xA801
IDENTIFIER_DOES_NOT_MATCH = 0xA900
NOT_AUTHORISED = 0x0124

WHENS = ("instead", "accepted", "request")
"""When an association ends: in place of an acceptance, right after it, at the first request."""


class Stage(StrEnum):
    """Point in the processing of a request at which a behaviour edits the plan."""

    CONNECT = "connect"
    """A connection has come, nothing has been read from it."""
    ASSOCIATE = "associate"
    """The association request is known, nothing has been answered."""
    FIND_QUERY = "find-query"
    """The keys are known, nothing has been matched."""
    FIND_ANSWER = "find-answer"
    """The answers are known, none has been sent."""
    FIND_DONE = "find-done"
    """The final response is about to be sent; the answers have been."""
    RETRIEVE = "retrieve"
    """The sub-operations are known, none has been made."""
    KEEP = "keep"
    """An instance has come by C-STORE, and is neither held nor answered yet."""
    WEB_QUERY = "web-query"
    """The keys and the page of a search by DICOMweb are known, nothing has been matched."""
    WEB_SEARCH = "web-search"
    """The answers of its page are known, none has been sent."""
    WEB_RETRIEVE = "web-retrieve"
    """The instances of a retrieval by DICOMweb are known, none has been sent."""


@dataclass
class End:
    """End of an association: A-ABORT, or "close" or "reset" of the connection."""

    how: str = "abort"
    source: int = 0
    reason: int = 0

    @property
    def pdu(self) -> bytes:
        """The A-ABORT, PS3.8 9.3.8; empty where there is none."""
        if self.how != "abort":
            return b""
        return struct.pack(">BxL2x2B", 7, 4, self.source, self.reason)


@dataclass
class AssociationPlan:
    """Plan of a connection and of the association to be requested on it."""

    pacs: ScriptedPacs
    end_at_once: End | None = None
    """Before anything has been read from the connection."""
    listen_again: threading.Event | None = None
    """Nothing listens from now on until this is set."""
    tls: bool = False
    """TLS is expected of the peer."""
    tls_as: Tls | None = None
    """TLS with these keys in place of the PACS's."""
    hold: threading.Event | None = None
    """The answer waits for this."""
    reject: tuple[int, int, int] | None = None
    """Result, source and reason of an A-ASSOCIATE-RJ, PS3.8 9.3.4; any numbers."""
    end: dict[str, End] = field(default_factory=dict)
    """By when it ends, see :data:`WHENS`."""
    refused: dict[str, int] = field(default_factory=dict)
    """By service, or "all": the result its contexts are refused with, PS3.8 9.3.3.2."""
    list_contexts: bool = True
    """False: the acceptance says nothing of any context."""
    roles: bool = True
    """False: role selection is ignored, PS3.7 D.3.3.4."""
    sends_without_roles: bool = False
    """A C-GET sends what it has all the same."""
    items: OddItems | None = None
    """Titles and user items of the acceptance, where they are odd."""
    window: bool = False
    """An asynchronous operations window is answered as it is proposed, PS3.7 D.3.3.3."""

    def concerns(self, study: str) -> bool:
        """Never: an association names no study."""
        return False

    @property
    def rejection(self) -> bytes:
        """The A-ASSOCIATE-RJ of :attr:`reject`."""
        assert self.reject is not None, "used only where the script rejects"
        return struct.pack(">BxLx3B", 3, 4, *self.reject)


@dataclass(eq=False)
class SubOperation:
    """One C-STORE to be sent.

    ``counted`` is False for instances that were not requested and are not reported; ``originator``
    is False if the Move Originator fields (PS3.7 9.1.1.1) are left out; ``readable`` is False if
    the PACS cannot read its own copy, which fails without being sent.
    """

    stored: StoredInstance
    sop_instance_uid: str
    data: Callable[[], bytes]
    counted: bool = True
    originator: bool = True
    readable: bool = True

    @classmethod
    def of(cls, stored: StoredInstance, **changes: Any) -> SubOperation:
        """Return the correct sub-operation for an instance."""
        values: dict[str, Any] = {
            "sop_instance_uid": stored.sop_instance_uid,
            "data": stored.encoded,
        }
        return cls(stored, **(values | changes))


@dataclass
class Connection:
    """Events on the request's association, by the number of answers before them."""

    hold_before: dict[int, threading.Event] = field(default_factory=dict)
    pause_seconds: float = 0
    """Waited for before each answer."""
    drop_after: int | None = None
    drop_by: End = field(default_factory=End)
    mute_after: int | None = None
    """From here on nothing is sent, and everything received is ignored, an abort too."""
    restart_after: int | None = None
    """The whole PACS goes down here, and comes back when ``back`` is set (None: at once)."""
    back: threading.Event | None = None


@dataclass
class FindPlan:
    """Plan of the answers to a C-FIND."""

    pacs: ScriptedPacs
    level: str
    keys: dict[str, str]
    """The matching keys, by keyword."""
    declared: str = ""
    """The query's Specific Character Set."""
    matches: Callable[[str, str, str], bool] = matches
    """Whether an attribute (its keyword) matches a key (its text) by a value."""
    answers: list[Dataset] = field(default_factory=list)
    matched: bool = False
    """Whether the answers are known."""
    refuse: int | None = None
    """A final status to answer at once."""
    pending: int = PENDING
    """The status of each answer."""
    rewritten: dict[int, Callable[[bytes], bytes | None]] = field(default_factory=dict)
    """By the number of the answer: its bytes as they are sent; None: without a data set."""
    astray: set[int] = field(default_factory=set)
    """Numbers of the answers that respond to the message before."""
    status: int = SUCCESS
    connection: Connection = field(default_factory=Connection)

    def concerns(self, study: str) -> bool:
        """Whether a query asks for, or an answer is of, this study."""
        if self.matched:
            return any(a.get("StudyInstanceUID") == study for a in self.answers)
        found = select(self.pacs.holdings, self.level, self.keys)
        return any(known["StudyInstanceUID"] == study for known, _ in found)


@dataclass
class RetrievePlan:
    """Plan of the sub-operations and responses of a C-MOVE or C-GET."""

    pacs: ScriptedPacs
    level: str
    operations: list[SubOperation]
    service: str = "C-MOVE"
    keys: dict[str, str] = field(default_factory=dict)
    """The unique keys, by keyword."""
    refuse: int | None = None
    """A final status to answer at once; nothing is sent."""
    status: int | None = None
    """The final status; None: what the sub-operations' results make it."""
    count: bool = True
    """False: all counters of the responses are zero."""
    counts: tuple[int | None, ...] | None = None
    """Remaining, completed, failed and warning, in place of the true ones, in every response."""
    disown: bool = False
    """Every sub-operation is counted as failed, whatever became of it."""
    pendings: bool = True
    failed_list: Callable[[list[str]], list[str]] | None = None
    """Makes another Failed SOP Instance UID List of the true one."""
    final_before: int | None = None
    """The final response goes out before this many sub-operations have been made."""
    stop_at_failure: bool = False
    stop_at_class: bool = False
    """Stop at the first instance for which the association has no presentation context."""
    keep_sending: bool = False
    """Go on with the sub-operations when the request's association has been lost."""
    on_cancel: str = "stop"
    """What a C-CANCEL does: stop, ignore, answer (FE00, and go on sending) or abort."""
    late: list[SubOperation] = field(default_factory=list)
    """Sent after the final response, when ``late_hold`` is set."""
    late_hold: threading.Event | None = None
    turn: threading.Semaphore | None = None
    """To be had before anything is sent."""
    each_association: int | None = None
    """Instances that go over one association to the destination; None: as many as it takes."""
    empty_associations: int = 0
    """Opened to the destination first, with nothing sent over them."""
    empty_stay_open: bool = False
    window: int = 1
    """C-STORE requests that may be outstanding, whatever the receiver grants."""
    beyond_window: int | None = None
    """Where it pipelines: requests that are outstanding beyond the window that it was granted."""
    abort_within: int | None = None
    """Number (from 0) of the sub-operation in whose data set the association is aborted."""
    manner: SenderManner = field(default_factory=SenderManner)
    """How the associations to the destination are requested and used."""
    connection: Connection = field(default_factory=Connection)

    def concerns(self, study: str) -> bool:
        """Whether an instance of this study is to be sent."""
        return any(o.stored.study_instance_uid == study for o in self.operations)


@dataclass
class KeepPlan:
    """Plan for an instance that was sent to the PACS by C-STORE.

    Attributes
    ----------
    received : StoredInstance
        As it came.
    kept : StoredInstance or None
        What is held of it; None: nothing.
    status : int
        Of the response.
    end : End, optional
        The association ends instead of a response.
    """

    pacs: ScriptedPacs
    received: StoredInstance
    kept: StoredInstance | None
    status: int = SUCCESS
    end: End | None = None

    def concerns(self, study: str) -> bool:
        """Whether the instance is of this study."""
        return self.received.study_instance_uid == study


Plan = AssociationPlan | FindPlan | RetrievePlan | KeepPlan | WebPlan


@dataclass(frozen=True)
class Knob:
    """One kind of misbehaviour, observed on a real PACS, and the edit of the plan for it.

    Attributes
    ----------
    name : str
        Name of the knob.
    stages : tuple of Stage
        Where it edits the plan.
    meaning : str
        What the PACS does, with the names of the arguments.
    apply : callable
        Edits a plan; returns False if it found nothing to do.
    """

    name: str
    stages: tuple[Stage, ...]
    meaning: str
    apply: Callable[..., bool | None]

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the knob with their defaults; ``inspect.Parameter.empty`` if required."""
        parameters = list(inspect.signature(self.apply).parameters.values())[2:]
        return {parameter.name: parameter.default for parameter in parameters}
