"""A small PACS on loopback that can be told to misbehave.

It is a real DICOM peer: associations, presentation contexts, hierarchical C-FIND with the
matching of PS3.4 C.2.2.2, C-MOVE with Move Originator fields, C-GET, C-STORE, C-CANCEL and
C-ECHO. What it sends is byte for byte what it holds. Every request it gets is in its log.

Examples
--------
>>> from prefect_dicom.testing import Behaviour, ScriptedPacs
>>> with ScriptedPacs(["archive"], destinations={"ME": ("127.0.0.1", 11112)}) as pacs:
...     pacs.script.append(Behaviour("move.drop_instances", instances=2, times=1))
...     # ... let the set-up under test pull from ("127.0.0.1", pacs.port) ...
...     moves = pacs.requests("C-MOVE")  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import socket
import ssl
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

from pydicom.config import IGNORE
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import (
    AllTransferSyntaxes,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)
from pynetdicom import AE, AllStoragePresentationContexts, build_context, dsutils, evt
from pynetdicom.association import Association
from pynetdicom.dimse_messages import C_GET_RSP, C_MOVE_RSP
from pynetdicom.dimse_primitives import C_ECHO, C_FIND, C_GET, C_MOVE, C_STORE
from pynetdicom.presentation import PresentationContext
from pynetdicom.sop_class import (
    PatientRootQueryRetrieveInformationModelFind,
    PatientRootQueryRetrieveInformationModelGet,
    PatientRootQueryRetrieveInformationModelMove,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from prefect_dicom.testing.associating import AssociationPlan, End
from prefect_dicom.testing.instances import (
    Holdings,
    StoredInstance,
    instance_of_bytes,
    instance_of_file,
    text_of,
)
from prefect_dicom.testing.matching import LEVELS, UNIQUE_KEYS, levels_down_to, select
from prefect_dicom.testing.script import (
    CANCEL,
    DESTINATION_UNKNOWN,
    IDENTIFIER_DOES_NOT_MATCH,
    PENDING,
    SUCCESS,
    UNABLE_TO_PROCESS,
    Behaviour,
    Connection,
    FindPlan,
    Plan,
    RetrievePlan,
    Stage,
    SubOperation,
)
from prefect_dicom.testing.sending import (
    CONTEXTS_PER_ASSOCIATION,
    StoreAssociation,
    context_key,
    contexts_to_send_in,
    send_at_once,
    without_message_log,
)

LOGGER = logging.getLogger(__name__)

SUB_OPERATIONS_FAILED = 0xA702
SOME_SUB_OPERATIONS_FAILED = 0xB000

_PATIENT_ROOT = frozenset(
    {
        PatientRootQueryRetrieveInformationModelFind,
        PatientRootQueryRetrieveInformationModelMove,
        PatientRootQueryRetrieveInformationModelGet,
    }
)
_MODELS = (
    *sorted(_PATIENT_ROOT),
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelMove,
    StudyRootQueryRetrieveInformationModelGet,
)
# Native encodings first, so that a sender which offers a choice does not re-encode.
_PLAIN = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    ExplicitVRBigEndian,
    DeflatedExplicitVRLittleEndian,
)
_STORAGE_SYNTAXES = list(dict.fromkeys(map(str, (*_PLAIN, *AllTransferSyntaxes))))


@dataclass
class Sent:
    """A C-STORE sub-operation that was made.

    ``status`` is the receiver's answer, None while there is none (or if there never was); ``at``
    is the time of ``time.monotonic`` when it began.
    """

    study_instance_uid: str
    series_instance_uid: str
    sop_instance_uid: str
    status: int | None = None
    at: float = field(default_factory=time.monotonic)


@dataclass
class Request:
    """A request as it came, and what became of it.

    ``number`` counts the requests of one ``service`` from 1. ``status`` is the final status, None
    while there is none (or if the association ended before there was). ``at`` is the time of
    ``time.monotonic`` when it came.
    """

    service: str
    number: int
    message_id: int
    calling_ae_title: str
    called_ae_title: str
    sop_class_uid: str = ""
    level: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    destination: str = ""
    status: int | None = None
    answers: int = 0
    sent: list[Sent] = field(default_factory=list)
    at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Change:
    """An association was accepted (``by`` 1), or has ended (-1); ``at`` is of the monotonic clock.

    One whose peer has vanished ends when the PACS does: nothing tells it.
    """

    at: float
    calling_ae_title: str
    by: int


@dataclass
class PacsPolicy:
    """What a :class:`ScriptedPacs` grants to whom; may be changed while it runs.

    Attributes
    ----------
    calling_ae_titles : collection of str
        AE titles that may call; empty: all. Read when the PACS is made.
    unknown_calling : {"reject", "abort"}
        What happens to other callers: the association is rejected (1,1,3), or it is accepted
        and the first request is answered with A-ABORT. Read when the PACS is made.
    relational : bool
        Whether queries without the unique keys of the levels above are answered (PS3.4
        C.4.1.2.2.1); else they are refused with A900.
    associations : int
        Associations accepted at the same time; one more is rejected (2,3,2). Read when the PACS
        is made.
    """

    calling_ae_titles: Collection[str] = ()
    unknown_calling: str = "reject"
    relational: bool = False
    associations: int = 100


class ScriptedPacs:
    """A PACS for tests and demonstrations; a context manager.

    Parameters
    ----------
    files : iterable of Path or str
        Part 10 files to hold, which stay on the disk. Of a folder every Part 10 file below it is
        held; :attr:`left_out` lists those that no PACS could send.
    instances : iterable of StoredInstance
        Further instances, whose data sets may be made only when they are sent.
    ae_title : str
        The called AE title it answers to; others are rejected (1,1,7).
    host, port : str, int
        Address to listen on; port 0 takes a free one, see :attr:`port`.
    destinations : mapping of str to (str, int)
        Move destinations: AE title to host and port. :attr:`destinations` may be changed later.
    script : iterable of Behaviour
        How it misbehaves; :attr:`script` may be changed later.
    policy : PacsPolicy, optional
        Who may call, and what is granted.

    Attributes
    ----------
    holdings : Holdings
        The instances it holds; may be changed while it runs.
    left_out : list of Path
        Files below a folder that no PACS could send.
    port : int
        The port it listens on.
    log : list of Request
        Every request in the order of arrival; C-CANCEL is one of them.
    comings_and_goings : list of Change
        Begin and end of associations, see :meth:`most_associations`.

    Raises
    ------
    ValueError
        If a file (not one below a folder) names no transfer syntax.
    """

    def __init__(
        self,
        files: Iterable[Path | str] = (),
        *,
        instances: Iterable[StoredInstance] = (),
        ae_title: str = "DEMOPACS",
        host: str = "127.0.0.1",
        port: int = 0,
        destinations: Mapping[str, tuple[str, int]] | None = None,
        script: Iterable[Behaviour] = (),
        policy: PacsPolicy | None = None,
    ) -> None:
        self.holdings = Holdings(instances)
        self.left_out: list[Path] = []
        for path in map(Path, files):
            if path.is_dir():
                self._hold_folder(path)
            else:
                self.add(path)
        self.ae_title = ae_title
        self.host = host
        self.port = port
        self.destinations = dict(destinations or {})
        self.script = list(script)
        self.policy = policy or PacsPolicy()
        self.log: list[Request] = []
        self.comings_and_goings: list[Change] = []
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server: ThreadedAssociationServer | None = None
        self._threads: list[threading.Thread] = []
        self._entity = AE(ae_title)
        self._entity.require_called_aet = True
        self._entity.maximum_associations = self.policy.associations
        self._entity.network_timeout = None  # a peer may wait as long as it likes
        if self.policy.calling_ae_titles and self.policy.unknown_calling == "reject":
            self._entity.require_calling_aet = sorted(self.policy.calling_ae_titles)

    def _hold_folder(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if _is_part10(path):
                try:
                    self.add(path)
                except ValueError:
                    self.left_out.append(path)

    # --- life

    def __enter__(self) -> ScriptedPacs:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> ScriptedPacs:
        """Listen. :attr:`port` is the port from here on.

        Raises
        ------
        OSError
            If the port is taken.
        """
        self._closing.clear()
        self._contexts = self._supported_contexts()
        self._listen()
        return self

    def _listen(self) -> None:
        self._server = self._entity.make_server(
            (self.host, self.port),
            contexts=[build_context(Verification)],  # copied for each association; see _contexts
            evt_handlers=[
                (evt.EVT_CONN_OPEN, send_at_once),
                (evt.EVT_ESTABLISHED, self._note_established),
                (evt.EVT_CONN_CLOSE, self._note_closed),
            ],
            server_class=_Server,
            request_handler=self._handler_class(),
        )
        self._entity._servers.append(self._server)  # its shutdown() takes it out again
        self.port = self._server.server_address[1]
        self._run(self._server.serve_forever, 0.05)

    def close(self) -> None:
        """End all associations and stop listening. What was held and logged stays."""
        self._closing.set()
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            for association in server.active_associations:
                association.abort()
        for thread in self._threads:
            thread.join(10)
        self._threads.clear()

    def restart(self, back: threading.Event | None = None) -> None:
        """Go down as in a crash, with all associations, and come back at the same port.

        Parameters
        ----------
        back : threading.Event, optional
            Comes back when it is set; None: at once.
        """
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        for association in server.active_associations:
            _cut(association)
        if back is None:
            self._listen()
        else:
            self._run(self._come_back, back)

    def _come_back(self, back: threading.Event) -> None:
        while not back.wait(0.02):
            if self._closing.is_set():
                return
        self._listen()

    def _run(self, function: Any, *arguments: Any) -> None:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _handler_class(self) -> type[RequestHandler]:
        pacs = self

        class Handler(RequestHandler):
            def handle(self) -> None:
                self.begun = pacs._begin(self.request)
                if self.begun is not None:
                    super().handle()

            def _create_association(self) -> Association:
                association = super()._create_association()
                association.acceptor.supported_contexts = pacs._contexts
                without_message_log(association)
                association.scripted, number = self.begun
                association.acse._negotiate_as_acceptor = lambda: pacs._negotiate(
                    association, number
                )
                # In place of pynetdicom's service classes, which answer only as they should.
                association._serve_request = lambda message, context_id: pacs._serve(
                    association, message, context_id
                )
                return association

        return Handler

    def _supported_contexts(self) -> list[PresentationContext]:
        contexts = [build_context(Verification)]
        contexts += [build_context(uid) for uid in _MODELS]
        held: dict[str, Counter[str]] = {}
        for stored in self.holdings:
            held.setdefault(stored.sop_class_uid, Counter())[stored.transfer_syntax_uid] += 1
        known = [str(context.abstract_syntax) for context in AllStoragePresentationContexts]
        for uid in dict.fromkeys([*known, *held]):
            # The acceptor's order decides: a C-GET that offers a choice of syntaxes in one
            # context gets the one most objects of the class are stored in.
            syntaxes = [syntax for syntax, _ in held.get(uid, Counter()).most_common()]
            contexts.append(_storage_context(uid, *dict.fromkeys(syntaxes + _STORAGE_SYNTAXES)))
        return contexts

    # --- what a test asks

    def requests(self, service: str) -> list[Request]:
        """The logged requests of one service ("C-MOVE", "C-FIND", ...)."""
        return [request for request in list(self.log) if request.service == service]

    def sent_instances(self) -> list[str]:
        """The SOP Instance UIDs of all sub-operations, in the order they were made."""
        return [sent.sop_instance_uid for request in list(self.log) for sent in request.sent]

    def add(self, *files: Path) -> None:
        """Hold these Part 10 files too. Their SOP classes should be standard ones."""
        for path in files:
            self.holdings.add(instance_of_file(Path(path)))

    # --- requests

    def _number(self, service: str) -> int:
        with self._lock:
            number = self._numbers[service] = self._numbers.get(service, 0) + 1
        return number

    def _note(self, association: Association, service: str, message: Any) -> Request:
        number = self._number(service)
        with self._lock:
            request = Request(
                service,
                number,
                message.MessageID if service != "C-CANCEL" else message.MessageIDBeingRespondedTo,
                association.requestor.ae_title,
                association.requestor.primitive.called_ae_title,
                str(getattr(message, "AffectedSOPClassUID", "") or ""),
            )
            self.log.append(request)
        return request

    def _serve(self, association: Association, message: Any, context_id: int) -> None:
        """Answer one request, in the association's own thread."""
        context = association._accepted_cx.get(context_id)
        service = _SERVICES.get(type(message))
        if context is None or service is None or not message.is_valid_request:
            association.abort()
            return
        request = self._note(association, service, message)
        if end := association.scripted.end.get("request"):
            _end(association, end)
            return
        if (
            self.policy.unknown_calling == "abort"
            and self.policy.calling_ae_titles
            and association.requestor.ae_title not in self.policy.calling_ae_titles
        ):
            association.abort()
            return
        association.dimse.cancel_req = {}
        association._is_paused = True  # the answers to sub-operations of a C-GET are ours
        try:
            exchange = _Exchange(self, association, context, message, request)
            getattr(exchange, service.replace("-", "_").lower())()
        except _AssociationLost:
            LOGGER.debug("the peer went away during a %s", service)
        except Exception:
            LOGGER.exception("a %s could not be answered", service)
            association.abort()
        finally:
            association._is_paused = False
            association.dimse.cancel_req = {}

    def _behave(self, stage: Stage, request: Request, plan: FindPlan | RetrievePlan) -> None:
        self._apply(stage, request.service, request.number, plan)

    def _apply(self, stage: Stage, service: str, number: int, plan: Plan) -> None:
        for behaviour in list(self.script):
            behaviour.apply(stage, service, number, plan)

    # --- associations

    def _begin(self, connection: socket.socket) -> tuple[AssociationPlan, int] | None:
        """What is to become of a new connection, and its number; None where that was its end."""
        number, plan = self._number("A-ASSOCIATE"), AssociationPlan(self)
        self._apply(Stage.CONNECT, "A-ASSOCIATE", number, plan)
        if plan.listen_again is not None:
            self.restart(plan.listen_again)
        if plan.end_at_once is not None:
            _close(connection, plan.end_at_once)
            return None
        if plan.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            connection.settimeout(10)
            with contextlib.suppress(OSError):
                context.wrap_socket(connection, server_side=True)
            _close(connection, End("close"))
            return None
        return plan, number

    def _negotiate(self, association: Association, number: int) -> None:
        """Answer an association request, in the association's own thread."""
        plan = association.scripted
        self._apply(Stage.ASSOCIATE, "A-ASSOCIATE", number, plan)
        if plan.hold is not None:
            while not (plan.hold.wait(0.02) or self._closing.is_set()):
                if not association.dul.is_alive() or association.acse.is_aborted():
                    return
        if plan.reject is not None:
            _say(association, plan.rejection)
        elif end := plan.end.get("instead"):
            _end(association, end)
        else:
            if not plan.roles:
                contexts = [copy(context) for context in self._contexts]
                for context in contexts:
                    context.scu_role = context.scp_role = None
                association.acceptor.supported_contexts = contexts
            honest = association.acse.send_accept
            association.acse.send_accept = lambda: self._accept(association, honest)
            type(association.acse)._negotiate_as_acceptor(association.acse)
            return
        association.kill()

    def _accept(self, association: Association, send: Callable[[], None]) -> None:
        """Accept the association, with the contexts that the script leaves."""
        plan = association.scripted
        for number, context in list(association._accepted_cx.items()):
            service = _SERVICE_OF.get(str(context.abstract_syntax), "C-STORE")
            context.result = plan.refused.get(service, plan.refused.get("all", 0))
            if context.result:
                del association._accepted_cx[number]
                association._rejected_cx.append(context)
        if not plan.list_contexts:
            association._accepted_cx, association._rejected_cx = {}, []
        send()
        if end := plan.end.get("accepted"):
            while association.dul.to_provider_queue.queue:  # the acceptance goes out first
                time.sleep(0.001)
            _end(association, end)

    @property
    def connections(self) -> int:
        """How many connections have come."""
        return self._numbers.get("A-ASSOCIATE", 0)

    def _note_established(self, event: evt.Event) -> None:
        event.assoc.counted = True
        self._note_change(event.assoc, 1)

    def _note_closed(self, event: evt.Event) -> None:
        if getattr(event.assoc, "counted", False):
            event.assoc.counted = False
            self._note_change(event.assoc, -1)

    def _note_change(self, association: Association, by: int) -> None:
        with self._lock:
            change = Change(time.monotonic(), association.requestor.ae_title, by)
            self.comings_and_goings.append(change)

    def most_associations(self, vanished: Mapping[str, float] | None = None) -> int:
        """The most associations that stood at a time.

        Parameters
        ----------
        vanished : mapping of str to float, optional
            Calling AE titles whose host is gone, and since when: theirs are none from then on.
        """
        gone = vanished or {}
        standing: Counter[str] = Counter()
        most = 0
        for change in list(self.comings_and_goings):
            if change.at >= gone.get(change.calling_ae_title, math.inf):
                continue
            for title, at in gone.items():
                if change.at >= at:
                    standing[title] = 0
            standing[change.calling_ae_title] += change.by
            most = max(most, standing.total())
        return most

    def established(self) -> int:
        """How many associations stand."""
        server = self._server
        return 0 if server is None else sum(a.is_established for a in server.active_associations)


_SERVICES = {
    C_ECHO: "C-ECHO",
    C_FIND: "C-FIND",
    C_MOVE: "C-MOVE",
    C_GET: "C-GET",
    C_STORE: "C-STORE",
}


_COUNTERS = (
    "NumberOfRemainingSuboperations",
    "NumberOfCompletedSuboperations",
    "NumberOfFailedSuboperations",
    "NumberOfWarningSuboperations",
)


_SERVICE_OF = {
    str(Verification): "C-ECHO",
    str(PatientRootQueryRetrieveInformationModelFind): "C-FIND",
    str(PatientRootQueryRetrieveInformationModelMove): "C-MOVE",
    str(PatientRootQueryRetrieveInformationModelGet): "C-GET",
    str(StudyRootQueryRetrieveInformationModelFind): "C-FIND",
    str(StudyRootQueryRetrieveInformationModelMove): "C-MOVE",
    str(StudyRootQueryRetrieveInformationModelGet): "C-GET",
}


class _AssociationLost(Exception):
    """The requestor's association is gone; nobody is left to answer."""


class _Server(ThreadedAssociationServer):
    request_queue_size = 128
    daemon_threads = True


class _Exchange:
    """One request and its answers."""

    def __init__(
        self,
        pacs: ScriptedPacs,
        association: Association,
        context: PresentationContext,
        message: Any,
        request: Request,
    ) -> None:
        self.pacs = pacs
        self.association = association
        self.context = context
        self.message = message
        self.request = request
        self.noted_cancel = False
        self.on_cancel = "stop"

    # --- services

    def c_echo(self) -> None:
        self.respond(SUCCESS)

    def c_store(self) -> None:
        message = self.message
        if message.DataSet is not None:
            data = message.DataSet.getvalue()
        else:  # pynetdicom has been set, for the whole process, to write them into files
            path = Path(message._dataset_path[0])
            with path.open("rb") as file:
                file.seek(message._dataset_path[1])
                data = file.read()
            message._dataset_file.close()
            path.unlink(missing_ok=True)
        stored = instance_of_bytes(
            data,
            str(self.context.transfer_syntax[0]),
            sop_class_uid=str(message.AffectedSOPClassUID),
            sop_instance_uid=str(message.AffectedSOPInstanceUID),
        )
        self.request.keys = {
            "StudyInstanceUID": stored.study_instance_uid,
            "SOPInstanceUID": stored.sop_instance_uid,
        }
        self.pacs.holdings.add(stored)
        self.respond(SUCCESS)

    def c_find(self) -> None:
        fault = self.read_identifier()
        if fault is not None:
            self.respond(fault)
            return
        plan = FindPlan(self.pacs, self.request.level, dict(self.request.keys), self.declared)
        self.pacs._behave(Stage.FIND_QUERY, self.request, plan)
        if plan.refuse is None:
            found = select(self.pacs.holdings, plan.level, plan.keys, plan.matches)
            plan.answers = [self.answer(known) for known, _ in found]
            plan.matched = True
            self.pacs._behave(Stage.FIND_ANSWER, self.request, plan)
        if plan.refuse is not None:
            self.respond(plan.refuse)
            return
        for number, answer in enumerate(plan.answers):
            self.pass_by(plan.connection, number)
            if self.cancelled():
                self.respond(CANCEL)
                return
            data = plan.rewritten.get(number, bytes)(self.encode(answer))
            self.respond(plan.pending, data, astray=number in plan.astray)
            self.request.answers += 1
        self.pass_by(plan.connection, len(plan.answers))
        self.pacs._behave(Stage.FIND_DONE, self.request, plan)
        self.respond(plan.status)

    def c_move(self) -> None:
        self.request.destination = (self.message.MoveDestination or "").strip()
        plan = self.retrieve_plan()
        if plan is None:
            return
        address = self.pacs.destinations.get(self.request.destination)
        if address is None:
            self.respond(DESTINATION_UNKNOWN, counts=(None, 0, 0, 0))
            return
        _Retrieval(self, plan, _MoveSender(self, plan, address)).run()

    def c_get(self) -> None:
        plan = self.retrieve_plan()
        if plan is not None:
            _Retrieval(self, plan, _GetSender(self, plan)).run()

    def retrieve_plan(self) -> RetrievePlan | None:
        fault = self.read_identifier()
        request = self.request
        unique = UNIQUE_KEYS.get(request.level, "")
        if fault is None and not request.keys.get(unique):
            fault = IDENTIFIER_DOES_NOT_MATCH
        if fault is not None:
            self.respond(fault, counts=(None, 0, 0, 0))
            return None
        keys = {k: v for k, v in request.keys.items() if k in UNIQUE_KEYS.values()}
        chosen = select(self.pacs.holdings, request.level, keys)
        operations = [SubOperation.of(stored) for _, members in chosen for stored in members]
        plan = RetrievePlan(self.pacs, request.level, operations, request.service, keys)
        self.pacs._behave(Stage.RETRIEVE, request, plan)
        self.on_cancel = plan.on_cancel
        if plan.refuse is not None:
            self.respond(plan.refuse, counts=(None, 0, 0, 0))
            return None
        return plan

    # --- identifiers

    def read_identifier(self) -> int | None:
        """Fill the request's level and keys; the status to refuse it with, or None.

        Baseline behaviour, PS3.4 C.4.1.2.1 and C.4.2.2.1: one value for each unique key above
        the level, Patient Root from the patient on, Study Root from the study on.
        """
        syntax = self.context.transfer_syntax[0]
        stream = self.message.Identifier or BytesIO()
        identifier = dsutils.decode(
            stream, syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated
        )
        self.asked = [e.keyword or str(e.tag) for e in identifier]
        self.declared = text_of(identifier, "SpecificCharacterSet")
        request = self.request
        request.level = text_of(identifier, "QueryRetrieveLevel")
        request.keys = {
            keyword: text_of(identifier, keyword)
            for keyword in self.asked
            if keyword not in ("QueryRetrieveLevel", "SpecificCharacterSet")
        }
        root = LEVELS if request.sop_class_uid in _PATIENT_ROOT else LEVELS[1:]
        if request.level not in root:
            return IDENTIFIER_DOES_NOT_MATCH
        if not self.pacs.policy.relational:
            # Like Orthanc and DCMTK: a query may name several entities above its level.
            several = "*?" if request.service == "C-FIND" else "*?\\"
            for level in root[: root.index(request.level)]:
                key = request.keys.get(UNIQUE_KEYS[level], "")
                if not key or any(character in key for character in several):
                    return IDENTIFIER_DOES_NOT_MATCH
        return None

    def answer(self, known: Mapping[str, str]) -> Dataset:
        """The identifier of one match: what was asked for, as far as it is known."""
        level = self.request.level
        keywords = [k for k in self.asked if k in known]
        keywords += [UNIQUE_KEYS[one] for one in levels_down_to(level) if one != "PATIENT"]
        answer = Dataset()
        if known["SpecificCharacterSet"]:
            _set(answer, "SpecificCharacterSet", known["SpecificCharacterSet"])
        for keyword in dict.fromkeys(keywords):
            _set(answer, keyword, known[keyword])
        answer.QueryRetrieveLevel = level
        answer.RetrieveAETitle = self.pacs.ae_title
        return answer

    # --- answers

    def respond(
        self,
        status: int,
        identifier: Dataset | bytes | None = None,
        counts: Sequence[int | None] | None = None,
        astray: bool = False,
    ) -> None:
        """Send a response; ``counts`` are remaining, completed, failed and warning.

        One that goes ``astray`` says that it responds to the message before.
        """
        if not self.connected():
            raise _AssociationLost
        response = type(self.message)()
        response.MessageID = self.message.MessageID
        response.MessageIDBeingRespondedTo = self.message.MessageID - astray
        response.AffectedSOPClassUID = self.message.AffectedSOPClassUID
        if isinstance(response, C_STORE):
            response.AffectedSOPInstanceUID = self.message.AffectedSOPInstanceUID
        response.Status = status
        if identifier is not None:
            encoded = identifier if isinstance(identifier, bytes) else self.encode(identifier)
            response.Identifier = BytesIO(encoded)
        long_counts = any(count is not None and count >> 16 for count in counts or ())
        if counts is not None and not long_counts:
            for keyword, count in zip(_COUNTERS, counts, strict=True):
                setattr(response, keyword, count)
        if status >> 8 != PENDING >> 8:
            self.request.status = status
        if long_counts:
            self.send_with_long_counts(response, counts)
        else:
            self.association.dimse.send_msg(response, self.context.context_id)

    def send_with_long_counts(self, response: Any, counts: Sequence[int | None]) -> None:
        """Send counters that no US can hold, in four bytes each."""
        message = {C_MOVE: C_MOVE_RSP, C_GET: C_GET_RSP}[type(response)]()
        message.primitive_to_message(response)
        for keyword, count in zip(_COUNTERS, counts, strict=True):
            if count is not None:
                tag = tag_for_keyword(keyword)
                message.command_set[tag] = DataElement(tag, "UL", count & 0xFFFFFFFF)
        message._set_command_group_length()
        dimse = self.association.dimse
        for primitive in message.encode_msg(self.context.context_id, dimse.maximum_pdu_size):
            dimse.dul.send_pdu(primitive)

    def encode(self, identifier: Dataset) -> bytes:
        syntax = self.context.transfer_syntax[0]
        how = syntax.is_implicit_VR, syntax.is_little_endian, syntax.is_deflated
        data = dsutils.encode(identifier, *how)
        if data is None:  # its texts are not in the character set it declares
            identifier.SpecificCharacterSet = "ISO_IR 192"
            data = dsutils.encode(identifier, *how)
        if data is None:
            raise ValueError("the answer cannot be encoded")
        return data

    # --- the association

    def connected(self) -> bool:
        association = self.association
        return (
            association.is_established
            and not association._sent_abort
            and not association.acse.is_aborted()
            and association.dul.is_alive()
            and association.dul.socket is not None
            and association.dul.socket.socket is not None
        )

    def cancelled(self) -> bool:
        cancel = self.association.dimse.cancel_req.get(self.message.MessageID)
        if cancel is not None and not self.noted_cancel:
            self.noted_cancel = True
            self.pacs._note(self.association, "C-CANCEL", cancel)
            if self.on_cancel == "answer":
                self.respond(CANCEL)
            elif self.on_cancel == "abort":
                self.drop(End())
        return cancel is not None and self.on_cancel == "stop"

    def pass_by(self, connection: Connection, answers: int) -> None:
        """Hold or drop the association, if the script says so at this number of answers."""
        hold = connection.hold_before.get(answers)
        if hold is not None:
            self.wait_for(hold)
        if connection.pause_seconds:
            self.wait_for(threading.Event(), connection.pause_seconds)
        if connection.mute_after == answers:
            self.pacs._closing.wait()
            raise _AssociationLost
        if connection.restart_after == answers:
            self.pacs.restart(connection.back)
            raise _AssociationLost
        if connection.drop_after == answers:
            self.drop(connection.drop_by)

    def wait_for(self, hold: threading.Event, most_seconds: float = math.inf) -> None:
        until = time.monotonic() + most_seconds
        while not hold.wait(0.02) and time.monotonic() < until:
            if self.pacs._closing.is_set() or self.cancelled():
                return

    def drop(self, end: End) -> None:
        _end(self.association, end)
        raise _AssociationLost


class _Retrieval:
    """The sub-operations of one C-MOVE or C-GET."""

    def __init__(self, exchange: _Exchange, plan: RetrievePlan, sender: _Sender) -> None:
        self.exchange = exchange
        self.plan = plan
        self.sender = sender
        self.total = sum(o.counted for o in plan.operations)
        self.completed = self.failed = self.warnings = 0
        self.failed_uids: list[str] = []
        self.answered = False
        self.lost = False

    def run(self) -> None:
        turn, exchange = self.plan.turn, self.exchange
        if turn is None:
            self.run_now()
            return
        while not turn.acquire(timeout=0.02):
            if exchange.pacs._closing.is_set() or exchange.cancelled() or not exchange.connected():
                raise _AssociationLost
        with contextlib.ExitStack() as stack:
            stack.callback(turn.release)
            self.run_now()

    def run_now(self) -> None:
        plan, pacs = self.plan, self.exchange.pacs
        if plan.final_before is None:
            self.carry_out(plan.operations, 0)
            self.finish()
            if plan.late:
                self.answered = plan.keep_sending = True
                pacs._run(self.send_the_rest, plan.late, 0, plan.late_hold)
            return
        # Success first: the rest is sent while the requestor already goes on.
        first, rest = plan.operations[: plan.final_before], plan.operations[plan.final_before :]
        hold = plan.connection.hold_before.pop(plan.final_before, None)
        self.carry_out(first, 0)
        self.answered = True
        self.exchange.respond(
            SUCCESS, counts=(None, self.total, 0, 0) if plan.count else (None, 0, 0, 0)
        )
        pacs._run(self.send_the_rest, rest, len(first), hold)

    def send_the_rest(
        self, operations: Sequence[SubOperation], number: int, hold: threading.Event | None
    ) -> None:
        if hold is not None:
            self.exchange.wait_for(hold)
        self.carry_out(operations, number)

    def carry_out(self, operations: Sequence[SubOperation], first_number: int) -> None:
        exchange, plan = self.exchange, self.plan
        try:
            for number, operation in enumerate(operations, first_number):
                if not self.answered and not self.lost:
                    self.pass_by(number)
                    if exchange.cancelled():
                        break
                if exchange.pacs._closing.is_set():
                    break
                if not self.lost and not plan.keep_sending and not exchange.connected():
                    raise _AssociationLost
                if plan.stop_at_class and not self.sender.has_context(operation):
                    self.account(operation, None)
                    plan.status = UNABLE_TO_PROCESS
                    break
                self.account(operation, self.sender.send(operation) if operation.readable else None)
                if plan.stop_at_failure and self.failed:
                    plan.status, plan.count = UNABLE_TO_PROCESS, False
                    break
                if self.remaining and self.may_report():
                    self.report(PENDING)
            else:
                if not self.answered and not self.lost:
                    self.pass_by(first_number + len(operations))
        finally:
            self.sender.end()

    def pass_by(self, number: int) -> None:
        try:
            self.exchange.pass_by(self.plan.connection, number)
        except _AssociationLost:
            if not self.plan.keep_sending:
                raise
            self.lost = True

    @property
    def remaining(self) -> int:
        return self.total - self.completed - self.failed - self.warnings

    def account(self, operation: SubOperation, status: int | None) -> None:
        if not operation.counted:
            return
        if status == SUCCESS and not self.plan.disown:
            self.completed += 1
        elif status and (status >> 12 == 0xB or status in (0x0107, 0x0116)):
            self.warnings += 1
        else:
            self.failed += 1
            self.failed_uids.append(operation.sop_instance_uid)

    def report(self, status: int, identifier: Dataset | None = None) -> None:
        remaining = self.remaining if status in (PENDING, CANCEL) else None
        counts = (remaining, self.completed, self.failed, self.warnings)
        if not self.plan.count:
            counts = (None if remaining is None else 0, 0, 0, 0)
        if self.plan.counts is not None:
            counts = self.plan.counts
        try:
            self.exchange.respond(status, identifier, counts)
        except _AssociationLost:
            if not self.plan.keep_sending:
                raise
            self.lost = True

    def may_report(self) -> bool:
        """Whether pending responses are still to be sent."""
        over = self.answered or self.lost or self.request_is_answered()
        return self.plan.pendings and not over

    def request_is_answered(self) -> bool:
        """Whether the final response has gone out already, to a C-CANCEL that stops nothing."""
        return self.exchange.request.status is not None

    def finish(self) -> None:
        if self.lost or self.request_is_answered():
            return
        status = self.plan.status
        if status is None:
            if self.exchange.cancelled():
                status = CANCEL
            elif not self.failed and not self.warnings:
                status = SUCCESS
            elif self.completed or self.warnings:
                status = SOME_SUB_OPERATIONS_FAILED
            else:
                status = SUB_OPERATIONS_FAILED
        identifier = None
        failed_uids = self.failed_uids if self.plan.count else []
        if self.plan.failed_list is not None:
            failed_uids = self.plan.failed_list(failed_uids)
        if status != SUCCESS and failed_uids:
            identifier = Dataset()
            identifier.FailedSOPInstanceUIDList = failed_uids
        self.report(status, identifier)


class _Sender:
    """Sends objects, each in its own SOP class and transfer syntax."""

    def __init__(self, exchange: _Exchange, plan: RetrievePlan) -> None:
        self.exchange = exchange
        self.plan = plan
        self.message_ids = itertools.cycle(range(1, 65536))
        self.under_way: deque[Sent] = deque()
        """Sent, and not answered yet: more than one only within a window."""

    def has_context(self, operation: SubOperation) -> bool:
        """Whether the receiver takes the object's SOP class in its transfer syntax."""
        raise NotImplementedError

    def begin(self, operation: SubOperation, sent: Sent) -> None:
        """Send the C-STORE request."""
        raise NotImplementedError

    def response(self) -> int:
        """The status of the next C-STORE response."""
        raise NotImplementedError

    def send(self, operation: SubOperation) -> int | None:
        """The status the receiver answered; None without an answer or a context."""
        if not self.under_way:
            if not self.has_context(operation):
                return None
            for one in (operation, *self.ahead(operation)):
                self.under_way.append(self.note(one))
                self.begin(one, self.under_way[-1])
        sent = self.under_way.popleft()
        sent.status = self.response()
        return sent.status

    def ahead(self, operation: SubOperation) -> Iterator[SubOperation]:
        """What goes out together with an object, before the first response is read."""
        if self.plan.window == 1:
            return
        start = self.plan.operations.index(operation)
        for one in self.plan.operations[start + 1 : start + self.plan.window]:
            if not one.readable or not self.has_context(one):
                return
            yield one

    def end(self) -> None:
        """End what was opened for sending."""

    def note(self, operation: SubOperation) -> Sent:
        stored = operation.stored
        sent = Sent(
            stored.study_instance_uid, stored.series_instance_uid, operation.sop_instance_uid
        )
        self.exchange.request.sent.append(sent)
        return sent


class _GetSender(_Sender):
    """Over the association of the C-GET, where the requestor took the SCP role."""

    def __init__(self, exchange: _Exchange, plan: RetrievePlan) -> None:
        super().__init__(exchange, plan)
        self.contexts = contexts_to_send_in(exchange.association)
        if plan.nagle:
            exchange.association.dul.socket.socket.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_NODELAY, 0
            )

    def has_context(self, operation: SubOperation) -> bool:
        return context_key(operation.stored) in self.contexts

    def begin(self, operation: SubOperation, sent: Sent) -> None:
        stored = operation.stored
        if not self.exchange.connected():
            raise _AssociationLost
        message = C_STORE()
        message.MessageID = next(self.message_ids)
        message.Priority = 0
        message.AffectedSOPClassUID = stored.sop_class_uid
        message.AffectedSOPInstanceUID = operation.sop_instance_uid
        message.DataSet = BytesIO(operation.data())
        self.exchange.association.dimse.send_msg(message, self.contexts[context_key(stored)])

    def response(self) -> int:
        _, response = self.exchange.association.dimse.get_msg(block=True)
        if response is None:
            raise _AssociationLost
        return response.Status


class _MoveSender(_Sender):
    """Over associations to the move destination; another one past each 128 contexts."""

    def __init__(self, exchange: _Exchange, plan: RetrievePlan, address: tuple[str, int]) -> None:
        super().__init__(exchange, plan)
        self.address = address
        self.proposed: set[tuple[str, str]] = set()
        self.receiver: StoreAssociation | None = None
        self.sent_over_it = 0
        self.empty: list[StoreAssociation] = []

    def has_context(self, operation: SubOperation) -> bool:
        stored = operation.stored
        if self.under_way:
            return self.receiver is not None and self.receiver.context_id(stored) is not None
        used_up = self.plan.each_association == self.sent_over_it
        if used_up or context_key(stored) not in self.proposed:
            self.release()
            for _ in range(self.plan.empty_associations):
                self.open_empty(context_key(stored))
            self.plan.empty_associations = 0
            self.open(context_key(stored))
        return self.receiver is not None and self.receiver.context_id(stored) is not None

    def send(self, operation: SubOperation) -> int | None:
        try:
            return super().send(operation)
        except ConnectionError:
            self.receiver.close()
            self.receiver = None  # and no other: what is left of these contexts has failed
            self.under_way.clear()
            return None

    def begin(self, operation: SubOperation, sent: Sent) -> None:
        exchange, stored = self.exchange, operation.stored
        originator = exchange.association.requestor.ae_title, exchange.message.MessageID
        self.sent_over_it += 1
        self.receiver.request(
            self.receiver.context_id(stored),
            message_id=next(self.message_ids),
            sop_class_uid=stored.sop_class_uid,
            sop_instance_uid=operation.sop_instance_uid,
            data=operation.data(),
            originator=originator if operation.originator else None,
        )

    def response(self) -> int:
        return self.receiver.response()

    def open(self, first: tuple[str, str]) -> None:
        pairs = dict.fromkeys([first, *(context_key(o.stored) for o in self.plan.operations)])
        contexts = list(itertools.islice(pairs, CONTEXTS_PER_ASSOCIATION))
        self.proposed = set(contexts)
        self.sent_over_it = 0
        with contextlib.suppress(ConnectionError):
            self.receiver = self.association(contexts)

    def open_empty(self, context: tuple[str, str]) -> None:
        with contextlib.suppress(ConnectionError):
            association = self.association([context])
            if self.plan.empty_stay_open:
                self.empty.append(association)
            else:
                association.release()

    def association(self, contexts: Sequence[tuple[str, str]]) -> StoreAssociation:
        return StoreAssociation(
            self.exchange.pacs.ae_title,
            self.exchange.request.destination,
            self.address,
            contexts,
            nagle=self.plan.nagle,
        )

    def release(self) -> None:
        self.proposed.clear()
        if self.receiver is not None:
            self.receiver.release()
            self.receiver = None

    def end(self) -> None:
        self.release()
        while self.empty:
            self.empty.pop().release()


@cache
def _storage_context(uid: str, *syntaxes: str) -> PresentationContext:
    """What is offered for a class; made once: a PACS has hundreds, of many syntaxes each."""
    context = build_context(uid, list(syntaxes))
    context.scu_role = context.scp_role = True  # C-GET: we send, the requestor takes
    return context


def _set(answer: Dataset, keyword: str, text: str) -> None:
    vr = dictionary_VR(keyword)
    value: Any = text
    if vr in ("CS", "UI") and "\\" in text:
        value = text.split("\\")
    elif vr == "US":
        value = int(text)
    # As stored, however odd: an archive does not repair what it was given.
    answer.add(DataElement(tag_for_keyword(keyword), vr, value, validation_mode=IGNORE))


def _cut(association: Association) -> None:
    """End an association's connection without a word."""
    with contextlib.suppress(OSError, AttributeError):
        association.dul.socket.socket.shutdown(socket.SHUT_RDWR)


def _end(association: Association, end: End) -> None:
    """End an association as the script says."""
    if end == End():
        association.abort()
        return
    # pynetdicom sends no A-ABORT with other numbers.
    connection = association.dul.socket.socket
    if connection is not None:
        _close(connection, end)


def _say(association: Association, pdu: bytes) -> None:
    with contextlib.suppress(OSError, AttributeError):
        association.dul.socket.socket.sendall(pdu)


def _close(connection: socket.socket, end: End) -> None:
    with contextlib.suppress(OSError):
        if end.how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
            return
        connection.sendall(end.pdu)
        connection.shutdown(socket.SHUT_WR if end.pdu else socket.SHUT_RDWR)


def _is_part10(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
