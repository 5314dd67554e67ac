"""The PACS of the benchmarks: Debian's Orthanc, with or without Nagle's algorithm."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

from benchmarks.corpus import Study
from benchmarks.receivers import CALLER
from prefect_dicom.config.tls import Tls
from tests.support import peers
from tests.support.web import dicomweb_plugin, web_settings

_MOVE_SECONDS = 300


class Orthanc(peers.Orthanc):
    """Without the log the tests need. ``no_delay=False`` is Orthanc as installed.

    With its plugin for DICOMweb where that is installed and ``web`` is true.
    """

    def __init__(
        self,
        directory: Path,
        *,
        no_delay: bool,
        destinations: Mapping[str, int] | None = None,
        tls: Tls | None = None,
        over_tls: Mapping[str, int] | None = None,
        web: bool = False,
    ) -> None:
        settings: dict[str, object] = {}
        if web and dicomweb_plugin() is not None:
            settings = web_settings()
        known = {CALLER: 1, **(destinations or {}), **(over_tls or {})}
        if tls is not None:
            settings = {
                "DicomTlsCertificate": str(tls.certificate),
                "DicomTlsPrivateKey": str(tls.key),
                "DicomTlsTrustedCertificates": str(tls.trust),
                "DicomModalities": {
                    title: {
                        "AET": title,
                        "Host": "127.0.0.1",
                        "Port": port,
                        "UseDicomTls": title in (over_tls or {}),
                    }
                    for title, port in known.items()
                },
            }
        super().__init__(directory, destinations, **settings)
        self.environment = {"TCP_NODELAY": "1"} if no_delay else {}

    def _command(self) -> list[str]:
        return [word for word in super()._command() if word not in ("--verbose", "--trace-dicom")]

    def hold(self, studies: Iterable[Study]) -> None:
        """Store the files of these studies, over its REST interface."""

        def post(path: Path) -> None:
            url = f"http://127.0.0.1:{self.http_port}/instances"
            with urlopen(Request(url, path.read_bytes(), method="POST"), timeout=120):
                pass

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(post, [path for study in studies for path in study.files]))

    def move(self, study: Study, destination: str) -> float:
        """Send a study to a destination it knows, by DCMTK's movescu; the seconds it took."""
        return self.move_all([study], destination)

    def move_all(self, studies: Iterable[Study], destination: str) -> float:
        """Send studies by one request, likewise."""
        uids = "\\".join(study.study_instance_uid for study in studies)
        return timed(
            ["movescu", "-aet", CALLER, "-aec", self.ae_title, "-aem", destination, "-S"]
            + ["127.0.0.1", str(self.port), "-k", "0008,0052=STUDY"]
            + ["-k", f"0020,000D={uids}"]
        )

    def get(self, study: Study, folder: Path, *, best: bool = True) -> float:
        """Fetch a study by DCMTK's getscu; the seconds it took."""
        command = ["getscu", "-aet", CALLER, "-aec", self.ae_title, "-S", "-od", str(folder)]
        if best:
            command += ["+B", "-pdu", "131072"]
        command += ["127.0.0.1", str(self.port), "-k", "0008,0052=STUDY"]
        return timed([*command, "-k", f"0020,000D={study.study_instance_uid}"], no_delay=best)


def timed(command: list[str], *, no_delay: bool = True) -> float:
    """Run a program of DCMTK's to its end; the seconds it took.

    Raises
    ------
    RuntimeError
        It failed.
    """
    environment = {**os.environ, "TCP_NODELAY": "1"}
    if not no_delay:
        del environment["TCP_NODELAY"]
    began = time.perf_counter()
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=_MOVE_SECONDS
    )
    took = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-300:]}")
    return took
