"""The managed receiver's process: a storage SCP, and a control socket for the runs it serves.

It runs for as long as any run holds a lease and a little longer. What a dead run expected stays
expected while the receiver lives: PACS go on sending after the requestor has gone, and the
next run finds these instances in the spool instead of asking for them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect_dicom.archive.spool import Spool
from prefect_dicom.config.receiver import Metrics, Receiver
from prefect_dicom.config.tls import Tls
from prefect_dicom.config.tls_files import certificate_values
from prefect_dicom.core.errors import PrefectDicomError, ReceiverError
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.files import lock_file
from prefect_dicom.core.metrics import Value
from prefect_dicom.core.metrics_endpoint import RECEIVER, CachedReading, serving
from prefect_dicom.network.storage_scp.association_events import AssociationEvent
from prefect_dicom.network.storage_scp.commitment_reports import CommitmentReports
from prefect_dicom.network.storage_scp.connection import NEGOTIATION_SECONDS, ConnectionPolicy
from prefect_dicom.network.storage_scp.control_protocol import (
    LOCK_NAME,
    SOCKET_NAME,
    SPOOL_TAKEN,
    Line,
    socket_path,
)
from prefect_dicom.network.storage_scp.limits import Limits
from prefect_dicom.network.storage_scp.sender_tls import SenderTls
from prefect_dicom.network.storage_scp.server import StorageScp
from prefect_dicom.network.storage_scp.store_handler import Expectation, StoreHandler
from prefect_dicom.network.storage_scp.turned_away import TurnedAwayRecord
from prefect_dicom.network.storage_scp.verified_senders import VerifiedSenders

log = logging.getLogger(__name__)

LEDGER_VARIABLE = "PREFECT_DICOM_RECEIVER_LEDGER"
"""Environment variable of the process with the URL of the ledger."""
_HIGHEST_MESSAGE_ID = 0xFFFF


@dataclass(frozen=True, slots=True)
class Assignment:
    """Everything the process needs, as JSON over its standard input."""

    spool: Path
    reserve_bytes: int
    settings: Receiver
    allowed_senders: tuple[str, ...]
    metrics: Metrics = field(default_factory=lambda: Metrics.model_validate({}))
    ledger_url: str = field(default="", repr=False)
    """Where reports of storage commitment are recorded. It may hold a password: it is handed over
    in the environment, and of the text below only its digest is a part."""

    def to_json(self) -> str:
        """The text the process is started with."""
        return json.dumps(
            {
                "spool": str(self.spool),
                "reserve_bytes": self.reserve_bytes,
                "settings": self.settings.model_dump(mode="json"),
                "allowed_senders": self.allowed_senders,
                "metrics": self.metrics.model_dump(mode="json"),
                "ledger": hashlib.sha256(self.ledger_url.encode()).hexdigest()[:16],
            },
            sort_keys=True,
        )

    @classmethod
    def from_json(cls, text: str) -> Assignment:
        """The inverse of :meth:`to_json`."""
        fields = json.loads(text)
        return cls(
            Path(fields["spool"]),
            fields["reserve_bytes"],
            Receiver.model_validate(fields["settings"]),
            tuple(fields["allowed_senders"]),
            Metrics.model_validate(fields["metrics"]),
            os.environ.get(LEDGER_VARIABLE, ""),
        )


class ReceiverServer:
    """The receiver of a spool. :meth:`run` returns when no run has leased it for a while.

    Parameters
    ----------
    assignment : Assignment
        The spool and the settings of the site.
    idle_seconds : float, optional
        How long it stays without a lease, instead of the site's setting.
    limits : Limits, optional
        What an association may take; no site sets it.
    negotiation_seconds : float
        See :class:`ConnectionPolicy`.
    """

    def __init__(
        self,
        assignment: Assignment,
        idle_seconds: float | None = None,
        *,
        limits: Limits | None = None,
        negotiation_seconds: float = NEGOTIATION_SECONDS,
    ) -> None:
        self._assignment = assignment
        self._settings = assignment.settings
        self._idle_seconds = self._settings.idle_seconds if idle_seconds is None else idle_seconds
        self._spool = Spool(assignment.spool, assignment.reserve_bytes)
        self._store_handler = StoreHandler(self._spool)
        self._networks = [ipaddress.ip_network(s) for s in assignment.allowed_senders]
        self._lock = threading.Lock()
        self._leases = 0
        self._idle_since = time.monotonic()
        self._requests: dict[int, Expectation] = {}
        self._orphans: dict[int, Expectation] = {}
        self._last_message_id = 0
        self._dead_runs = 0
        self._spool_bytes = CachedReading(self._spool.waiting_bytes)
        self._connections: Counter[str] = Counter()
        self._turned_away = TurnedAwayRecord()
        self._senders = VerifiedSenders()
        self._stop = threading.Event()
        self._spool_lock: int | None = None
        self._title_lock: socket.socket | None = None
        self._scp = StorageScp(
            self._settings.bind,
            self._settings.port,
            self._settings.ae_title,
            self._store_handler,
            policy=ConnectionPolicy(
                self._may_send,
                self._settings.associations,
                self._slots_of_one_peer(),
                negotiation_seconds,
            ),
            tls=SenderTls.of(self._settings),
            limits=limits,
            on_event=self._count_connection,
        )
        if assignment.ledger_url:
            self._scp.on_report = CommitmentReports(assignment.ledger_url)
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Take the locks and listen.

        Raises
        ------
        ReceiverError
            ``receiver-taken`` if spool, AE title or port have another owner.
        """
        self._own_the_spool()
        self._own_the_ae_title()
        self._spool.sweep()
        self._scp.start()
        self._control = _listen(self._assignment.spool)

    def run(self) -> None:
        """Serve until stopped, or idle for the configured time."""
        metrics, spool = self._assignment.metrics, self._assignment.spool
        with serving(metrics.bind, metrics.port, spool, self._values, process=RECEIVER):
            self._serve_until_idle()

    def _serve_until_idle(self) -> None:
        control = self._control
        if control is None:
            raise RuntimeError("start() comes before run()")
        threading.Thread(target=self._accept, args=(control,), daemon=True).start()
        while not self._stop.wait(0.5):
            with self._lock:
                idle = not self._leases and not self._store_handler.open_bytes
                if not idle:
                    self._idle_since = time.monotonic()
                elif time.monotonic() - self._idle_since > self._idle_seconds:
                    break
            if not self._has_its_spool():
                log.error("the spool directory is gone, or another one")
                break
        self._scp.stop()
        if self._has_its_spool():
            with contextlib.suppress(OSError):
                (self._assignment.spool / SOCKET_NAME).unlink()
        control.close()

    def stop(self) -> None:
        """Make :meth:`run` return."""
        self._stop.set()

    # --- ownership

    def _own_the_spool(self) -> None:
        try:
            descriptor = lock_file(self._assignment.spool / LOCK_NAME, wait=False)
        except BlockingIOError:
            raise ReceiverError("receiver-taken", SPOOL_TAKEN) from None
        self._spool_lock = descriptor

    def _has_its_spool(self) -> bool:
        """Whether the spool is still the directory whose lock is held, and not a new one."""
        if self._spool_lock is None:
            return False
        try:
            lock = os.stat(self._assignment.spool / LOCK_NAME)
        except OSError:
            return False
        return os.path.samestat(lock, os.fstat(self._spool_lock))

    def _own_the_ae_title(self) -> None:
        # An abstract socket: known to the whole host (network namespace), gone with its owner.
        if sys.platform != "linux":
            return
        lock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            lock.bind(f"\0prefect-dicom-receiver/{self._settings.ae_title}")
        except OSError:
            lock.close()
            raise ReceiverError(
                "receiver-taken",
                f"another receiver on this host has the AE title {self._settings.ae_title}",
            ) from None
        self._title_lock = lock

    def _slots_of_one_peer(self) -> int | None:
        """No one of several senders may take the last quarter of the slots."""
        senders = sum(network.num_addresses for network in self._networks)
        slots = self._settings.associations
        return None if senders == 1 else slots - slots // 4

    def _may_send(self, address: str) -> bool:
        peer = ipaddress.ip_address(address)
        mapped = getattr(peer, "ipv4_mapped", None)
        return any((mapped or peer) in network for network in self._networks)

    # --- control

    def _accept(self, control: socket.socket) -> None:
        while True:
            try:
                connection, _ = control.accept()
            except OSError:
                return
            with self._lock:
                self._leases += 1
            threading.Thread(target=self._serve, args=(Line(connection),), daemon=True).start()

    def _serve(self, line: Line) -> None:
        mine: dict[int, Expectation] = {}
        try:
            line.send({"assignment": self._assignment.to_json(), "pid": os.getpid()})
            while (message := line.receive()) is not None:
                line.send(self._answer(message, mine))
        except OSError:
            pass
        except Exception as error:
            log.error("a control connection failed: %s", type(error).__name__)
        finally:
            with self._lock:
                self._leases -= 1
                self._idle_since = time.monotonic()
                # A run that left in order has forgotten its requests; this one has died.
                self._orphans.update(mine)
                self._dead_runs += bool(mine)
            line.close()

    def _answer(self, message: dict[str, Any], mine: dict[int, Expectation]) -> dict[str, Any]:
        match message:
            case {"verb": "expect", "studies": dict(studies), "originator": str(originator)}:
                answer = self._expect(studies, originator, mine)
                failpoint("expectation-noted")
                return answer
            case {"verb": "received", "message_id": int(number)} if number in mine:
                expectation = mine[number]
                # Who is told of the end of a request looks for all that was answered before.
                self._store_handler.await_names()
                return {
                    "instances": expectation.instances,
                    "by_originator": expectation.by_originator,
                    "size_bytes": expectation.size_bytes,
                    "quiet_seconds": time.monotonic() - expectation.last_arrival,
                    "open_bytes": self._store_handler.open_bytes,
                    "first_age_seconds": expectation.first_age_seconds,
                    "refused": self._store_handler.refused_since(expectation),
                    "turned_away": [
                        one.to_message() for one in self._turned_away.since(expectation.began)
                    ],
                }
            case {"verb": "forget", "message_id": int(number)} if number in mine:
                self._forget(number, mine.pop(number), awaited=bool(message.get("awaited")))
                return {}
            case {"verb": "status"}:
                return self._status()
            case {"verb": "stop"}:
                self.stop()
                return {}
        return {"error": "not understood"}

    def _expect(
        self, studies: dict[str, Any], originator: str, mine: dict[int, Expectation]
    ) -> dict[str, Any]:
        now = time.monotonic()
        with self._lock:
            quiet = None
            for number, orphan in list(self._orphans.items()):
                if studies.keys() & orphan.studies.keys():
                    silence = now - orphan.last_arrival
                    quiet = silence if quiet is None else min(quiet, silence)
                    self._store_handler.forget(self._orphans.pop(number))
                    self._requests.pop(number, None)
            self._store_handler.take_over(studies)
            number = self._free_message_id()
            expectation = Expectation(
                {uid: int(reference) for uid, reference in studies.items()}, originator, number
            )
            self._requests[number] = expectation
            mine[number] = expectation
        self._store_handler.expect(expectation)
        return {"message_id": number, "quiet_seconds": quiet}

    def _forget(self, number: int, expectation: Expectation, *, awaited: bool) -> None:
        """End a request; what is ``awaited`` of it is kept for its studies until it comes.

        Or until somebody requests one of them again, who takes care of it from then on.
        """
        if awaited:
            self._store_handler.await_late(expectation)
        else:
            self._store_handler.forget(expectation)
        # Only then: its number is never free while something may come for it.
        with self._lock:
            self._requests.pop(number, None)

    def _free_message_id(self) -> int:
        while True:
            number = self._last_message_id = self._last_message_id % _HIGHEST_MESSAGE_ID + 1
            if number not in self._requests and not self._store_handler.awaits(number):
                return number

    def _status(self) -> dict[str, Any]:
        with self._lock:
            return {
                "pid": os.getpid(),
                "ae_title": self._settings.ae_title,
                "bind": self._settings.bind,
                "port": self._settings.port,
                "runs": self._leases - 1,
                "requests": len(self._requests),
                "quarantined": self._store_handler.quarantined,
                "open_bytes": self._store_handler.open_bytes,
                "free_bytes": self._spool.free_bytes(),
                "turned_away": [one.words for one in self._turned_away.since(0.0)],
                "tls_senders": self._senders.to_message(),
            }

    # --- metrics

    def _count_connection(self, event: AssociationEvent) -> None:
        self._turned_away.note(event)
        self._senders.note(event)
        with self._lock:
            self._connections[event.happening.value] += 1

    def _values(self) -> Iterator[Value]:
        """Values of the receiver at present, for the metrics endpoint."""
        with self._lock:
            runs, requests, dead = self._leases, len(self._requests), self._dead_runs
            connections = dict(self._connections)
        yield Value("prefect_dicom_runs", runs)
        yield Value("prefect_dicom_requests", requests)
        yield Value("prefect_dicom_dead_runs_total", dead)
        yield Value("prefect_dicom_associations", self._scp.associations)
        for happening, number in connections.items():
            yield Value("prefect_dicom_connections_total", number, {"happening": happening})
        for code, number in self._turned_away.counts().items():
            yield Value("prefect_dicom_turned_away_total", number, {"reason": code})
        if isinstance(self._settings.tls, Tls):
            yield from certificate_values({"receiver": self._settings.tls})
        yield Value("prefect_dicom_refused_objects_total", self._spool.refusals)
        yield Value("prefect_dicom_spool_free_bytes", self._spool.free_bytes())
        yield Value("prefect_dicom_spool_bytes", self._spool_bytes())


def _listen(spool: Path) -> socket.socket:
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = os.open(spool, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # The spool's lock is held: a socket that lies here is a dead receiver's.
        with contextlib.suppress(FileNotFoundError):
            (spool / SOCKET_NAME).unlink()
        control.bind(socket_path(spool, folder))
    finally:
        os.close(folder)
    control.listen(64)
    return control


def serve_forever(
    assignment: Assignment,
    *,
    limits: Limits | None = None,
    negotiation_seconds: float = NEGOTIATION_SECONDS,
) -> None:
    """Run a receiver in this process until a signal stops it, idle or not.

    The parameters are those of :class:`ReceiverServer`.
    """
    server = ReceiverServer(
        assignment,
        math.inf,
        limits=limits,
        negotiation_seconds=negotiation_seconds,
    )
    server.start()
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    signal.signal(signal.SIGINT, lambda *_: server.stop())
    server.run()


def main() -> int:
    """Entry point of the process: assignment on stdin, one line on stdout when it listens."""
    os.umask(0o077)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        server = ReceiverServer(Assignment.from_json(sys.stdin.read()))
        server.start()
    except PrefectDicomError as error:
        print(json.dumps({"error": error.code, "detail": error.detail}), flush=True)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: server.stop())
    signal.signal(signal.SIGINT, lambda *_: server.stop())
    # The run that started this process may have died; the next run needs the process as well.
    with contextlib.suppress(BrokenPipeError):
        print(json.dumps({"listening": True}), flush=True)
    # The run that started this process must not wait for this pipe any longer.
    os.dup2(2, 1)
    server.run()
    return 0
