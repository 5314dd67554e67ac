"""Real archives for tests: Debian's Orthanc and DCMTK's dcmqrscp, on free loopback ports.

Each runs in a directory of its own, knows the destinations it was started with, and tells what
it did: its instances, and the C-STORE sub-operations it sent.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt

from prefect_dicom.config.node import Limits, PacsNode, Timeouts
from prefect_dicom.core.model import RetrieveMethod
from prefect_dicom.network.logging import configure_logging
from prefect_dicom.network.upper_layer.sockets import prepare
from tests.support.corpus import corpus_rows
from tests.support.loading import Loaded, acknowledge_received, load

US = "PREFECTDICOM"
"""Our AE title, as caller and as destination."""

_UNCOMPRESSED = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2")
_START_SECONDS = 30


class Held(NamedTuple):
    """An instance an archive holds. ``id`` is the archive's own name of it."""

    study: str
    series: str
    sop: str
    id: str = ""


# Below Linux's net.ipv4.ip_local_port_range.
_PORTS = range(10_000, 32_000)


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on.

    Not one the system hands out by itself: until it is listened on, another process may have got
    it for a connection of its own.
    """
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Peer:
    """An archive in a process of its own."""

    program = ""
    package = ""
    ae_title = ""
    loading_associations = 1
    environment = {"TCP_NODELAY": "1"}
    """DCMTK's switch against Nagle's algorithm; empty: as installed."""
    _sending: re.Pattern

    def __init__(self, directory: Path, destinations: Mapping[str, int] | None = None) -> None:
        self.directory = directory
        self.destinations = dict(destinations or {})
        self.port = free_port()
        self.log = directory / "log"
        self._process: subprocess.Popen | None = None

    @classmethod
    def absent(cls) -> str | None:
        """Why it cannot be used here, or None."""
        if shutil.which(cls.program, path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
            return None
        return f"{cls.program} is not installed (Debian package {cls.package})"

    def node(self, retrieve: RetrieveMethod = RetrieveMethod.C_MOVE, **overrides) -> PacsNode:
        """The archive as a site would configure it; short time-outs, for the tests' sake.

        Keys of ``limits`` and ``timeouts`` may be given by name beside those of the node.
        """
        for part, kind in (("limits", Limits), ("timeouts", Timeouts)):
            given = {key: overrides.pop(key) for key in list(overrides) if key in kind.model_fields}
            if part == "timeouts":
                given = {
                    **{"connect_seconds": 5, "acse_seconds": 10, "find_seconds": 30},
                    **{"first_byte_seconds": 60, "stall_seconds": 30, "settle_seconds": 1},
                    **given,
                }
            overrides.setdefault(part, kind(**given))
        settings = {
            "host": "127.0.0.1",
            "port": self.port,
            "called_ae_title": self.ae_title,
            "calling_ae_title": US,
            "retrieve": retrieve,
        }
        return PacsNode(**{**settings, **overrides})

    def load(self, paths: Iterable[Path]) -> Loaded:
        """Store files in it: see :func:`tests.support.loading.load`."""
        return load(self.port, self.ae_title, paths, self.loading_associations)

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.directory,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                tail = self.log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{self.program} does not start:\n{tail}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Stop it, its children too; fine to repeat."""
        process, self._process = self._process, None
        if process is None:
            return
        # The group is its own (start_new_session): dcmqrscp forks for every association.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def moves(self) -> int:
        """How many C-STORE sub-operations it has sent in all, C-MOVE and C-GET, by its log."""
        return len(self._sending.findall(self.log.read_text(errors="replace")))

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _ready(self) -> bool:
        return _listens(self.port)


class Orthanc(Peer):
    """Orthanc 1.10.1 without plugins; its REST interface is the tests' witness.

    Knows our AE title and the destinations; anybody else may echo and store, and is aborted at
    the first query. ``settings`` are added to its configuration.
    """

    program = "Orthanc"
    package = "orthanc"
    ae_title = "ORTHANC"
    loading_associations = 4
    _sending = re.compile(
        r"OUTGOING DIMSE MESSAGE =+\n"
        r"Message Type +: C-STORE RQ\n"
        r"(?:.*\n)*?Affected SOP Instance UID +: (\S*)\n"
    )

    def __init__(self, directory: Path, destinations=None, **settings) -> None:
        super().__init__(directory, destinations)
        self.http_port = free_port()
        self.settings = settings

    def _command(self) -> list[str]:
        configuration = self.directory / "orthanc.json"
        known = {US: free_port(), **self.destinations}
        content = {
            "Name": "test",
            "StorageDirectory": str(self.directory / "storage"),
            "IndexDirectory": str(self.directory / "storage"),
            "Plugins": [],
            "HttpServerEnabled": True,
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": True,
            "AuthenticationEnabled": False,
            "DicomAet": self.ae_title,
            "DicomPort": self.port,
            "DicomModalities": {
                title: _orthanc_modality(title, port) for title, port in known.items()
            },
            "DicomAlwaysAllowEcho": True,
            "DicomAlwaysAllowStore": True,
            "DicomThreadsCount": 4,
            "UnknownSopClassAccepted": True,
            "OverwriteInstances": False,
            "LimitFindResults": 0,
            "LimitFindInstances": 0,
            "StableAge": 1,
            # A crash of the test machine may cost the test archive its data.
            "SyncStorageArea": False,
            **self.settings,
        }
        configuration.write_text(json.dumps(content, indent=1))
        return [
            shutil.which(self.program) or "/usr/sbin/Orthanc",
            "--verbose",
            "--trace-dicom",
            str(configuration),
        ]

    def _ready(self) -> bool:
        return _listens(self.http_port) and _listens(self.port)

    def know(self, ae_title: str, port: int) -> None:
        """Add a destination, or correct its port, while it runs."""
        body = _orthanc_modality(ae_title, port)
        self.rest(f"/modalities/{ae_title}", "PUT", body)

    def instances(self) -> list[Held]:
        """Every instance it holds."""
        series = {one["ID"]: one for one in self._json("/series?expand")}
        studies = {one["ID"]: one for one in self._json("/studies?expand")}
        held = []
        for one in self._json("/instances?expand"):
            its_series = series[one["ParentSeries"]]
            its_study = studies[its_series["ParentStudy"]]
            held.append(
                Held(
                    its_study["MainDicomTags"].get("StudyInstanceUID", ""),
                    its_series["MainDicomTags"].get("SeriesInstanceUID", ""),
                    one["MainDicomTags"].get("SOPInstanceUID", ""),
                    one["ID"],
                )
            )
        return held

    def sent(self) -> list[str]:
        """SOP Instance UIDs of all C-STORE sub-operations it has sent, in their order."""
        return self._sending.findall(self.log.read_text(errors="replace"))

    def file(self, identifier: str) -> bytes:
        """The bytes of an instance as it holds them, with its own file meta group."""
        return self.rest(f"/instances/{identifier}/file")

    def rest(self, path: str, method: str = "GET", body: object = None) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http_port}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def _json(self, path: str):
        return json.loads(self.rest(path))


def _orthanc_modality(title: str, port: int) -> dict:
    return {
        "AET": title,
        "Host": "127.0.0.1",
        "Port": port,
        "AllowEcho": True,
        "AllowFind": True,
        "AllowGet": True,
        "AllowMove": True,
        "AllowStore": True,
    }


class Dcmqrscp(Peer):
    """DCMTK 3.6.7's dcmqrscp: checks the called AE title, and no caller.

    As installed it takes uncompressed objects only. With ``takes_compressed`` it holds the
    corpus whole, and fails to send by C-MOVE what is compressed: an archive that lists
    instances it cannot deliver.
    """

    program = "dcmqrscp"
    package = "dcmtk"
    ae_title = "DCMQRSCP"
    _sending = re.compile(r"Store SCU RQ: MsgID")

    def __init__(
        self,
        directory: Path,
        destinations: Mapping[str, int] | None = None,
        arguments: Sequence[str] = (),
        takes_compressed: bool = False,
    ) -> None:
        super().__init__(directory, destinations)
        self.arguments = list(arguments)
        self.takes_compressed = takes_compressed

    def _command(self) -> list[str]:
        storage = self.directory / "storage"
        storage.mkdir(exist_ok=True)
        hosts = "\n".join(
            f"host{number} = ({title}, 127.0.0.1, {port})"
            for number, (title, port) in enumerate(self.destinations.items())
        )
        configuration = self.directory / "dcmqrscp.cfg"
        configuration.write_text(
            f"NetworkTCPPort = {self.port}\nMaxPDUSize = 131072\nMaxAssociations = 16\n"
            f"HostTable BEGIN\n{hosts}\nHostTable END\n"
            "VendorTable BEGIN\nVendorTable END\n"
            f"AETable BEGIN\n{self.ae_title} {storage} RW (500, 1024mb) ANY\nAETable END\n"
        )
        arguments = list(self.arguments)
        if self.takes_compressed:
            profile = self.directory / "associations.cfg"
            profile.write_text(_profile())
            arguments += ["--assoc-config-file", str(profile), "Incoming", "Outgoing"]
        return [self.program, "-v", "-c", str(configuration), *arguments]


def _profile() -> str:
    """An association profile of DCMTK: the corpus's classes in every syntax it occurs in."""
    rows = corpus_rows()
    classes = sorted({row["sop_class_uid"] for row in rows})
    found = sorted({row["transfer_syntax_uid"] for row in rows} - set(_UNCOMPRESSED))
    models = [f"1.2.840.10008.5.1.4.1.2.{model}.{kind}" for model in (1, 2) for kind in (1, 2, 3)]
    incoming = [(uid, "Uncompressed") for uid in ("1.2.840.10008.1.1", *models)]
    incoming += [(uid, "Any") for uid in classes]

    def section(name: str, key: str, values: Iterable[str]) -> str:
        lines = [f"{key}{number} = {value}" for number, value in enumerate(values, 1)]
        return "\n".join([f"[{name}]", *lines, ""])

    return "".join(
        [
            "[[TransferSyntaxes]]\n",
            section("Uncompressed", "TransferSyntax", _UNCOMPRESSED),
            section("Any", "TransferSyntax", [*found, *_UNCOMPRESSED]),
            "[[PresentationContexts]]\n",
            section("In", "PresentationContext", [f"{uid}\\{name}" for uid, name in incoming]),
            section("Out", "PresentationContext", [f"{uid}\\Uncompressed" for uid in classes]),
            "[[Profiles]]\n",
            "[Incoming]\nPresentationContexts = In\n",
            "[Outgoing]\nPresentationContexts = Out\n",
        ]
    )


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


class Inbox:
    """A storage SCP that keeps nothing but who asked for what; for tests of C-MOVE alone."""

    def __init__(self, port: int, status: int = 0x0000, delay: threading.Event | None = None):
        self.port = port
        self.received: list[tuple[str, int]] = []
        """SOP Instance UID and Move Originator Message ID of every object, in their order."""
        self._status = status
        self._delay = delay
        self._application = AE(ae_title=US)
        for context in AllStoragePresentationContexts:
            self._application.add_supported_context(context.abstract_syntax, ALL_TRANSFER_SYNTAXES)

    def __enter__(self) -> Inbox:
        configure_logging()
        self._server = self._application.start_server(
            ("127.0.0.1", self.port),
            block=False,
            evt_handlers=[
                (evt.EVT_CONN_OPEN, lambda event: prepare(event.assoc.dul.socket.socket)),
                (evt.EVT_DATA_RECV, acknowledge_received),
                (evt.EVT_C_STORE, self._store),
            ],
        )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._delay is not None:
            self._delay.set()
        self._server.shutdown()

    def _store(self, event: evt.Event) -> int:
        request = event.request
        if self.received and self._delay is not None:
            self._delay.wait(30)
        self.received.append((str(request.AffectedSOPInstanceUID), request.MoveOriginatorMessageID))
        return self._status


def prepared(kind: type[Peer], factory: pytest.TempPathFactory, destinations, **settings):
    missing = kind.absent()
    if missing:
        pytest.skip(missing)
    return kind(factory.mktemp(kind.program.lower()), destinations, **settings)
