"""Client of the managed receiver: find or start it, lease it, register expected studies."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from prefect_dicom.config.node import PacsNode
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.core.errors import ReceiverError
from prefect_dicom.core.failpoints import failpoint
from prefect_dicom.core.files import file_lock, is_locked
from prefect_dicom.core.model import StudyReference
from prefect_dicom.network.storage_scp.control_protocol import (
    LOCK_NAME,
    LOG_NAME,
    SPOOL_TAKEN,
    STARTING_NAME,
    Line,
    socket_path,
)
from prefect_dicom.network.storage_scp.process import LEDGER_VARIABLE, Assignment
from prefect_dicom.network.storage_scp.server import listen
from prefect_dicom.network.storage_scp.turned_away import TurnedAway

_START_SECONDS = 30
_ANSWER_SECONDS = 30
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Received:
    """What has been received so far for one retrieve request.

    ``by_originator`` counts the instances that named the request by its Move Originator fields.
    ``refused`` is why an instance could not be written meanwhile, a reason code, else empty;
    ``turned_away`` are the peers that were turned away meanwhile.
    ``first_age_seconds`` is how long ago the first instance arrived; None where none has.
    """

    instances: int
    size_bytes: int
    quiet_seconds: float
    open_bytes: int
    refused: str = ""
    by_originator: int = 0
    turned_away: tuple[TurnedAway, ...] = ()
    first_age_seconds: float | None = None


class ReceiverLease:
    """A lease on the site's receiver. Thread-safe; a receiver that dies is started again.

    Parameters
    ----------
    site : Site
        Its receiver, spool and the nodes that may send.
    line : Line, optional
        To a receiver that runs already; without one it is found or started.
    """

    def __init__(self, site: Site, line: Line | None = None) -> None:
        self._assignment = assignment_of(site)
        self._lock = threading.Lock()
        self._line: Line | None = line or _connect_or_start(self._assignment)

    def __enter__(self) -> ReceiverLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lease back."""
        if self._line is not None:
            self._line.close()
            self._line = None

    @contextlib.contextmanager
    def expecting(
        self, studies: Mapping[str, StudyReference], originator: str
    ) -> Iterator[Request]:
        """While the block runs, the studies (by StudyInstanceUID) are expected.

        Yields
        ------
        Request
            With the message ID to send the C-MOVE with.
        """
        request = Request(self, studies, originator)
        try:
            yield request
        finally:
            request.end()

    def status(self) -> dict[str, Any]:
        """The receiver's status."""
        return self._ask({"verb": "status"})

    def stop(self) -> None:
        """Stop the receiver, even if other runs use it."""
        self._ask({"verb": "stop"})

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            answer = self._exchange(message)
            if answer is None:
                self.close()
                self._line = _connect_or_start(self._assignment)
                answer = self._exchange(message)
        if answer is None:
            raise ReceiverError("receiver-unreachable", "it ended while it was asked")
        return answer

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any] | None:
        line = self._line
        if line is None:
            return None
        try:
            line.send(message)
            return line.receive()
        except OSError:
            return None


class Request:
    """One retrieve request the receiver knows of."""

    def __init__(
        self, lease: ReceiverLease, studies: Mapping[str, StudyReference], originator: str
    ) -> None:
        self._lease = lease
        self._message = {"verb": "expect", "studies": dict(studies), "originator": originator}
        answer = lease._ask(self._message)
        self.message_id: int = answer["message_id"]
        self.quiet_seconds: float | None = answer["quiet_seconds"]
        """Seconds since something last arrived on a dead run's account; None if nothing did."""
        self.renewed = False
        """Whether the receiver has ended under this request and was started again."""
        self.awaited = False
        """Whether instances may still come when the request has ended; they are kept then."""

    def received(self) -> Received:
        """Return what has been received so far.

        Counts begin anew when the receiver had to be restarted.
        """
        answer = self._lease._ask({"verb": "received", "message_id": self.message_id})
        if "error" in answer:
            self.renewed = True
            self.message_id = self._lease._ask(self._message)["message_id"]
            answer = self._lease._ask({"verb": "received", "message_id": self.message_id})
        turned_away = tuple(map(TurnedAway.from_message, answer.pop("turned_away")))
        return Received(**answer, turned_away=turned_away)

    def end(self) -> None:
        """End the request at the receiver."""
        with contextlib.suppress(ReceiverError):
            self._lease._ask(
                {"verb": "forget", "message_id": self.message_id, "awaited": self.awaited}
            )


def running_receiver(site: Site) -> ReceiverLease | None:
    """A lease on the site's receiver if it runs, without starting one."""
    found = _connect(assignment_of(site))
    return None if found is None else ReceiverLease(site, found[0])


def check_port(site: Site) -> None:
    """Check that the site's receiver can listen, unless one is there already.

    Raises
    ------
    ReceiverError
        Something else listens on its port, or nothing can.
    """
    # Not while another run starts one, which would find the port taken.
    with file_lock(site.spool.path / STARTING_NAME):
        if not _has_a_receiver(site.spool.path):
            listen(site.receiver.bind, site.receiver.port).close()


def assignment_of(site: Site) -> Assignment:
    """The assignment of a site's receiver."""
    allowed = site.receiver.allowed_senders or _addresses_of_nodes(site)
    # Sites that deliver to nobody may share a receiver, whatever ledger each has.
    delivers = any(node.destination is not None for node in site.nodes.values())
    return Assignment(
        site.spool.path.absolute(),
        site.spool.reserve_bytes,
        site.receiver,
        tuple(allowed),
        site.metrics,
        ledger_url(site) if delivers else "",
    )


def _addresses_of_nodes(site: Site) -> list[str]:
    addresses = set()
    for node in site.nodes.values():
        if not isinstance(node, PacsNode):
            # What is retrieved by HTTP comes over a connection of ours.
            continue
        with contextlib.suppress(OSError):
            for info in socket.getaddrinfo(node.host, node.port, type=socket.SOCK_STREAM):
                addresses.add(str(ipaddress.ip_address(info[4][0])))
    return sorted(addresses)


def _connect(assignment: Assignment) -> tuple[Line, bool] | None:
    """A line to the spool's receiver, and whether it runs with this assignment."""
    try:
        folder = os.open(assignment.spool, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(_ANSWER_SECONDS)
    try:
        sock.connect(socket_path(assignment.spool, folder))
    except OSError:
        sock.close()
        return None
    finally:
        os.close(folder)
    line = Line(sock)
    hello = line.receive()
    if hello is None:
        line.close()
        return None
    return line, hello["assignment"] == assignment.to_json()


def _connect_as_assigned(assignment: Assignment) -> Line | None:
    """A line to a receiver with this assignment; one with another that nobody uses must go."""
    found = _connect(assignment)
    if found is None:
        return None
    line, same = found
    if same:
        return line
    try:
        line.send({"verb": "status"})
        status = line.receive()
        if status is not None and status["runs"] == 0:
            line.send({"verb": "stop"})
            while line.receive() is not None:
                pass
            return None
    except OSError:
        return None
    finally:
        line.close()
    raise ReceiverError(
        "receiver-taken",
        "other runs use this spool's receiver with other settings; let them end first",
    )


def _connect_or_start(assignment: Assignment) -> Line:
    line = _connect_as_assigned(assignment)
    if line is not None:
        return line
    assignment.spool.mkdir(mode=0o700, parents=True, exist_ok=True)
    with file_lock(assignment.spool / STARTING_NAME):
        deadline = time.monotonic() + _START_SECONDS
        while True:
            # Another run may have started it while this one waited for its turn.
            line = _connect_as_assigned(assignment)
            if line is not None:
                return line
            if time.monotonic() > deadline:
                raise ReceiverError("receiver-unreachable", "it was started and does not answer")
            if _has_a_receiver(assignment.spool):
                # That a dead run has started, or that is about to end: it will answer or be gone.
                time.sleep(_POLL_SECONDS)
                continue
            try:
                _start(assignment)
            except ReceiverError as error:
                # Another one was quicker; it may be gone again by now.
                if error.detail != SPOOL_TAKEN:
                    raise


def _has_a_receiver(spool: Path) -> bool:
    """Whether a process has locked the spool, even if it does not listen yet, or no longer."""
    return is_locked(spool / LOCK_NAME, create=True)


def _start(assignment: Assignment) -> None:
    with (assignment.spool / LOG_NAME).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect_dicom.network.storage_scp"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            # It outlives the run that happened to start it, and its terminal.
            start_new_session=True,
            env={**os.environ, LEDGER_VARIABLE: assignment.ledger_url},
            cwd="/",
        )
    # Both are pipes, as asked for.
    stdin, stdout = cast("IO[bytes]", process.stdin), cast("IO[bytes]", process.stdout)
    stdin.write(assignment.to_json().encode())
    stdin.close()
    failpoint("receiver-started")
    watchdog = threading.Timer(_START_SECONDS, process.kill)
    watchdog.start()
    try:
        answer = json.loads(stdout.readline() or b"{}")
    finally:
        watchdog.cancel()
        stdout.close()
    if "error" in answer:
        process.wait()
        raise ReceiverError(answer["error"], answer["detail"])
    if not answer.get("listening"):
        process.kill()
        process.wait()
        raise ReceiverError("receiver-unreachable", f"it did not start; see {LOG_NAME}")
