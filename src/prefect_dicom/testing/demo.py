"""The demo's stage: generated studies, a PACS on loopback that holds them, a site around it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefect_dicom.testing.generate import generate_cohort, write_cohort_file
from prefect_dicom.testing.pacs import ScriptedPacs

_SITE = """\
# A site for the demo. For a real one, enter your PACS below and run `prefect-dicom doctor`.
nodes:
  demo:
    host: 127.0.0.1
    port: {pacs_port}
    called_ae_title: DEMOPACS
    timeouts: {{settle_seconds: 2}}
receiver:
  ae_title: {title}
  bind: 127.0.0.1
  port: {receiver_port}
  idle_seconds: 5
archive:
  directory: archive
ledger:
  path: ledger.sqlite
spool:
  path: spool
  reserve_bytes: 200000000
reports: reports
"""


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo has prepared."""

    site: Path
    cohort: Path
    port: int
    instances: int
    pacs: ScriptedPacs

    def requests(self) -> int:
        """How many queries and retrieves the PACS has seen so far."""
        return sum(len(self.pacs.requests(service)) for service in ("C-FIND", "C-MOVE", "C-GET"))


@contextlib.contextmanager
def prepared_demo(folder: Path, studies: int) -> Iterator[Demo]:
    """Generate a cohort in ``folder``, serve it, and write a site and a cohort file for it.

    Parameters
    ----------
    folder : Path
        Created if need be; a demo that is there already is used again.
    studies : int
        How many studies to generate.
    """
    files = generate_cohort(folder / "pacs", studies=studies)
    (folder / "archive").mkdir(exist_ok=True)
    receiver_port = _free_port()
    title = f"DEMO{receiver_port}"
    with ScriptedPacs(
        [folder / "pacs"], destinations={title: ("127.0.0.1", receiver_port)}
    ) as pacs:
        site = folder / "site.yaml"
        site.write_text(_SITE.format(pacs_port=pacs.port, receiver_port=receiver_port, title=title))
        cohort = write_cohort_file(folder / "cohort.csv", files)
        yield Demo(site, cohort, pacs.port, len(files), pacs)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
