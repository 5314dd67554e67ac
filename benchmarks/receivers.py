"""Storage SCPs that are compared: each a process of its own, on a port of its own.

All write into a directory below the one given and are emptied between two measurements. The
sender knows each by its ``ae_title``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.corpus import Study
from prefect_dicom.archive.spool import Spool
from prefect_dicom.config.archive import DirectoryArchive
from prefect_dicom.config.node import PacsNode
from prefect_dicom.config.receiver import Metrics, Receiver
from prefect_dicom.config.site import Site
from prefect_dicom.config.site import Spool as SpoolSettings
from prefect_dicom.config.tls import Tls
from prefect_dicom.network.storage_scp import ReceiverLease
from tests.support.peers import free_port

CALLER = "PREFECTDICOM"
_START_SECONDS = 20


class StoreScp:
    """DCMTK's storescp. ``best`` is what makes it fastest, else it runs as installed."""

    def __init__(self, directory: Path, *, best: bool, tls: Tls | None = None) -> None:
        self.name = "storescp, best" if best else "storescp, as installed"
        self.ae_title = "BEST" if best else "INSTALLED"
        self._tls: list[str] = []
        if tls is not None:
            self.name, self.ae_title = f"{self.name}, TLS", f"{self.ae_title}TLS"
            files = ("+tls", tls.key, tls.certificate, "+cf", tls.trust)
            self._tls = [*map(str, files), "+py"]
        self.port = free_port()
        self._directory = directory
        self._best = best

    def __enter__(self) -> StoreScp:
        self._directory.mkdir(parents=True)
        command = ["storescp", *self._tls, "-od", str(self._directory)]
        environment = dict(os.environ)
        environment.pop("TCP_NODELAY", None)
        if self._best:
            command += ["--fork", "+B", "-pdu", "131072"]
            environment["TCP_NODELAY"] = "1"
        self._process = started([*command, str(self.port)], self.port, environment)
        return self

    def __exit__(self, *_: object) -> None:
        ended(self._process)

    @contextlib.contextmanager
    def expecting(self, study: Study) -> Iterator[None]:
        """It takes whatever comes."""
        yield

    def emptied(self, study: Study) -> int:
        """Delete what has come; returns how many objects it was."""
        return _emptied(self._directory)


class PlainPynetdicom:
    """pynetdicom as its documentation shows it: decode, add the file meta, save."""

    name = "pynetdicom, plain"
    ae_title = "PYNETDICOM"

    def __init__(self, directory: Path) -> None:
        self.port = free_port()
        self._directory = directory

    def __enter__(self) -> PlainPynetdicom:
        self._directory.mkdir(parents=True)
        command = [sys.executable, str(Path(__file__).with_name("plain_pynetdicom.py"))]
        self._process = started([*command, str(self.port), str(self._directory)], self.port)
        return self

    def __exit__(self, *_: object) -> None:
        ended(self._process)

    @contextlib.contextmanager
    def expecting(self, study: Study) -> Iterator[None]:
        """It takes whatever comes."""
        yield

    def emptied(self, study: Study) -> int:
        """Delete what has come; returns how many objects it was."""
        return _emptied(self._directory)


class OurReceiver:
    """The managed receiver with its spool, told what to expect as a run tells it."""

    def __init__(self, directory: Path, *, metrics: bool = False, tls: Tls | None = None) -> None:
        self.name = "prefect-dicom, counting" if metrics else "prefect-dicom"
        if tls is not None:
            self.name += ", TLS"
        self.port = free_port()
        node = PacsNode(host="127.0.0.1", port=1, called_ae_title="SENDER")
        # A receiver's title is taken on the whole host.
        self.ae_title = f"BENCH{self.port}"
        self.site = Site(
            nodes={"sender": node},
            receiver=Receiver(
                ae_title=self.ae_title, port=self.port, idle_seconds=1, tls=tls or False
            ),
            archive=DirectoryArchive(directory=directory / "archive"),
            spool=SpoolSettings(path=directory / "spool", reserve_bytes=0),
            metrics=Metrics(port=free_port() if metrics else None),
        )
        self._directory = directory

    def __enter__(self) -> OurReceiver:
        self._directory.mkdir(parents=True)
        self._spool = Spool(self.site.spool.path)
        self._lease = ReceiverLease(self.site)
        return self

    def __exit__(self, *_: object) -> None:
        self._lease.stop()
        self._lease.close()

    @property
    def pid(self) -> int:
        return self._lease.status()["pid"]

    @contextlib.contextmanager
    def expecting(self, *studies: Study) -> Iterator[None]:
        """What comes is attributed to these studies."""
        wanted = {study.study_instance_uid: n for n, study in enumerate(studies, 1)}
        with self._lease.expecting(wanted, CALLER) as self._request:
            yield

    def emptied(self, *studies: Study) -> int:
        """Delete what has come; returns how many objects it was."""
        # As a run does before it looks: the last one may not have its name yet.
        self._request.received()
        objects = 0
        for number, _ in enumerate(studies, 1):
            objects += len(self._spool.files(number))
            self._spool.drop(number)
        return objects


def started(
    command: list[str],
    port: int,
    environment: dict[str, str] | None = None,
    seconds: float = _START_SECONDS,
) -> subprocess.Popen:
    """A server process that listens on ``port``."""
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return process
        if process.poll() is not None or time.monotonic() > deadline:
            ended(process)
            raise RuntimeError(f"{command[0]} does not start")
        time.sleep(0.05)


def ended(process: subprocess.Popen) -> None:
    """End a process that :func:`started` began."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _emptied(directory: Path) -> int:
    files = [path for path in directory.rglob("*") if path.is_file()]
    shutil.rmtree(directory)
    directory.mkdir()
    return len(files)
