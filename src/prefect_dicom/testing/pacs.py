"""A small scriptable PACS on loopback that misbehaves on request.

It is a real DICOM peer: associations, presentation contexts, hierarchical C-FIND with the
matching of PS3.4 C.2.2.2, C-MOVE with Move Originator fields, C-GET, C-STORE, C-CANCEL and
C-ECHO. What it sends is byte for byte what it holds. Every request it gets is in its log.

Examples
--------
>>> from prefect_dicom.testing import Behaviour, ScriptedPacs
>>> with ScriptedPacs(["dicom-files"], destinations={"ME": ("127.0.0.1", 11112)}) as pacs:
...     pacs.script.append(Behaviour("move.drop_instances", instances=2, times=1))
...     # ... let the set-up under test pull from ("127.0.0.1", pacs.port) ...
...     moves = pacs.requests("C-MOVE")  # doctest: +SKIP
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pynetdicom import AE, build_context, evt
from pynetdicom.dimse_primitives import C_ECHO, C_FIND, C_GET, C_MOVE, C_STORE
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]  # made at import
from pynetdicom.transport import ThreadedAssociationServer

from prefect_dicom.config.tls import Tls
from prefect_dicom.testing.acceptor import Acceptor, AssociationServer
from prefect_dicom.testing.connection_ends import (
    AssociationLost,
    ScriptedAssociation,
    cut_association,
    end_association,
)
from prefect_dicom.testing.exchange import Exchange
from prefect_dicom.testing.instances import Holdings, StoredInstance, instance_of_file
from prefect_dicom.testing.plans import FindPlan, KeepPlan, Plan, RetrievePlan, Stage
from prefect_dicom.testing.request_log import AssociationChange, Request
from prefect_dicom.testing.script import Behaviour
from prefect_dicom.testing.sending import send_at_once

LOGGER = logging.getLogger(__name__)

_SERVICES = {
    C_ECHO: "C-ECHO",
    C_FIND: "C-FIND",
    C_MOVE: "C-MOVE",
    C_GET: "C-GET",
    C_STORE: "C-STORE",
}


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
    tls : Tls, optional
        TLS, and nothing else, is spoken to who calls and to move destinations: the certificate,
        and who is trusted. Who calls shows a certificate. Read for each connection.
    """

    calling_ae_titles: Collection[str] = ()
    unknown_calling: str = "reject"
    relational: bool = False
    associations: int = 100
    tls: Tls | None = None


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
    association_changes : list of AssociationChange
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
        self.association_changes: list[AssociationChange] = []
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
        """Start listening and set :attr:`port`.

        Returns
        -------
        ScriptedPacs
            The PACS itself.

        Raises
        ------
        OSError
            If the port is taken.
        """
        self._closing.clear()
        self._acceptor = Acceptor(self)
        self._listen()
        return self

    def _listen(self) -> None:
        self._server = self._entity.make_server(
            (self.host, self.port),
            contexts=[build_context(Verification)],  # copied for each association; see Acceptor
            evt_handlers=[
                (evt.EVT_CONN_OPEN, send_at_once),
                (evt.EVT_ESTABLISHED, self._note_established),
                (evt.EVT_CONN_CLOSE, self._note_closed),
            ],
            server_class=AssociationServer,
            request_handler=self._acceptor.handler_class(),
        )
        self._entity._servers.append(self._server)  # its shutdown() takes it out again
        self.port = self._server.server_address[1]
        self._run(self._server.serve_forever, 0.05)

    def close(self) -> None:
        """End all associations and stop listening; holdings and log stay."""
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
        """Crash with all associations, and restart on the same port.

        Parameters
        ----------
        back : threading.Event, optional
            Restarts when it is set; None: at once.
        """
        server, self._server = self._server, None
        if server is None:
            return
        server.shutdown()
        for association in server.active_associations:
            cut_association(association)
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

    # --- for tests

    def requests(self, service: str) -> list[Request]:
        """Return the logged requests of one service ("C-MOVE", "C-FIND", ...)."""
        return [request for request in list(self.log) if request.service == service]

    def sent_instances(self) -> list[str]:
        """Return the SOP Instance UIDs of all sub-operations in order."""
        return [sent.sop_instance_uid for request in list(self.log) for sent in request.sent]

    def add(self, *files: Path) -> None:
        """Hold further Part 10 files, whose SOP classes should be standard ones."""
        for path in files:
            self.holdings.add(instance_of_file(Path(path)))

    # --- requests

    def _number(self, service: str) -> int:
        with self._lock:
            number = self._numbers[service] = self._numbers.get(service, 0) + 1
        return number

    def _note(self, association: ScriptedAssociation, service: str, message: Any) -> Request:
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

    def _serve(self, association: ScriptedAssociation, message: Any, context_id: int) -> None:
        """Answer one request, in the association's own thread."""
        context = association._accepted_cx.get(context_id)
        service = _SERVICES.get(type(message))
        if context is None or service is None or not message.is_valid_request:
            association.abort()
            return
        request = self._note(association, service, message)
        if end := association.scripted.end.get("request"):
            end_association(association, end)
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
            exchange = Exchange(self, association, context, message, request)
            getattr(exchange, service.replace("-", "_").lower())()
        except AssociationLost:
            LOGGER.debug("the peer went away during a %s", service)
        except Exception:
            LOGGER.exception("a %s could not be answered", service)
            association.abort()
        finally:
            association._is_paused = False
            association.dimse.cancel_req = {}

    def _behave(
        self, stage: Stage, request: Request, plan: FindPlan | RetrievePlan | KeepPlan
    ) -> None:
        self._apply(stage, request.service, request.number, plan)

    def _apply(self, stage: Stage, service: str, number: int, plan: Plan) -> None:
        for behaviour in list(self.script):
            behaviour.apply(stage, service, number, plan)

    # --- associations

    @property
    def connections(self) -> int:
        """Number of connections so far."""
        return self._numbers.get("A-ASSOCIATE", 0)

    def _note_established(self, event: evt.Event) -> None:
        association: ScriptedAssociation = event.assoc
        association.counted = True
        self._note_change(association, 1)

    def _note_closed(self, event: evt.Event) -> None:
        association: ScriptedAssociation = event.assoc
        if getattr(association, "counted", False):
            association.counted = False
            self._note_change(association, -1)

    def _note_change(self, association: ScriptedAssociation, by: int) -> None:
        with self._lock:
            change = AssociationChange(time.monotonic(), association.requestor.ae_title, by)
            self.association_changes.append(change)

    def most_associations(self, vanished: Mapping[str, float] | None = None) -> int:
        """Return the most associations at the same time.

        Parameters
        ----------
        vanished : mapping of str to float, optional
            Monotonic time by calling AE title of a vanished host, whose associations do not count
            from then on.
        """
        gone = vanished or {}
        standing: Counter[str] = Counter()
        most = 0
        for change in list(self.association_changes):
            if change.at >= gone.get(change.calling_ae_title, math.inf):
                continue
            for title, at in gone.items():
                if change.at >= at:
                    standing[title] = 0
            standing[change.calling_ae_title] += change.by
            most = max(most, standing.total())
        return most

    def established(self) -> int:
        """Return the number of established associations."""
        server = self._server
        return 0 if server is None else sum(a.is_established for a in server.active_associations)


def _is_part10(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
