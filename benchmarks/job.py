"""One run of the package in a process of its own, which says in JSON how long it took.

::

    python -m benchmarks.job flow SITE COHORT       the flow, as a user runs it
    python -m benchmarks.job stages SITE COHORT     retrieve everything, then archive everything
    python -m benchmarks.job idle SITE COHORT       the flow with steps that do nothing
    python -m benchmarks.job report SITE COHORT     register, and report; nothing is pulled
    python -m benchmarks.job discover SITE COHORT   find the studies; nothing is pulled
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from pathlib import Path

from prefect_dicom.config.site import Site, load_site
from prefect_dicom.core.model import Chunk
from prefect_dicom.discovery.service import DiscoveryService
from prefect_dicom.flows import pull_cohort
from prefect_dicom.ledger import Ledger
from prefect_dicom.report import write_reports
from prefect_dicom.run.archiving import ChunkArchiving
from prefect_dicom.run.chunks import ChunkPlanner
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.retrieving import ChunkRetrieval
from prefect_dicom.run.run import open_dry_run, open_run


def peak_bytes(pid: int | str = "self") -> int:
    """The most memory a process has ever held (VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class _Stopwatch:
    """Seconds of CPU in the public methods of a class, all threads together.

    Of CPU: threads that wait for each other, or for a busy machine, are no cost of the ledger.
    """

    def __init__(self, kind: type) -> None:
        self.seconds = 0.0
        self._lock = threading.Lock()
        self._inside = threading.local()
        for name, method in list(vars(kind).items()):
            if not name.startswith("_") and callable(method) and not isinstance(method, type):
                setattr(kind, name, self._timed(method))

    def _timed(self, method):
        @wraps(method)
        def timed(*arguments, **options):
            if getattr(self._inside, "busy", False):
                return method(*arguments, **options)
            self._inside.busy = True
            began = time.thread_time()
            try:
                return method(*arguments, **options)
            finally:
                self._inside.busy = False
                with self._lock:
                    self.seconds += time.thread_time() - began

        return timed


def run_flow(site: Path, cohort: Path) -> dict:
    """The flow; ``ledger_seconds`` are those of all threads in the ledger."""
    ledger = _Stopwatch(Ledger)
    began = time.perf_counter()
    state = pull_cohort(str(cohort), str(site), return_state=True)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "ledger_seconds": ledger.seconds, "state": state.name}


def run_idle(site: Path, cohort: Path) -> dict:
    """The flow over all chunks with nothing done in its tasks: what Prefect costs."""
    settings = load_site(site)
    DiscoveryService.discover = lambda self, first_line, last_line: 0
    ChunkRetrieval.retrieve = lambda self, chunk: 0
    ChunkArchiving.archive = lambda self, chunk: 0
    count = len(cohort.read_text().splitlines()) - 1
    size = next(iter(settings.nodes.values())).limits.chunk_studies
    node = next(iter(settings.nodes))
    ChunkPlanner.chunks = lambda self: iter(
        Chunk(number, node, tuple(range(first, min(first + size, count))))
        for number, first in enumerate(range(0, count, size), 1)
    )
    began = time.perf_counter()
    state = pull_cohort(str(cohort), str(site), return_state=True)
    return {"seconds": time.perf_counter() - began, "state": state.name}


def run_stages(site: Path, cohort: Path) -> dict:
    """Retrieve all, then archive all, each as many at a time as in the flow."""
    settings: Site = load_site(site)
    registered = register_cohort(settings, cohort, None)
    with open_run(settings, registered.number) as pull:
        for page in pull.discovery.pages():
            pull.discovery.discover(*page)
        chunks = list(pull.chunks.chunks())
        at_once = settings.nodes[registered.node].limits.associations
        began = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(pull.retrieval.retrieve, chunks))
        retrieved = time.perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            archived = sum(pool.map(pull.archiving.archive, chunks))
        ended = time.perf_counter()
    return {"retrieve": retrieved - began, "archive": ended - retrieved, "archived": archived}


def run_report(site: Path, cohort: Path) -> dict:
    """Register a cohort, and write its reports."""
    settings = load_site(site)
    began = time.perf_counter()
    registered = register_cohort(settings, cohort, None)
    with Ledger.open(f"sqlite:///{settings.ledger.path}") as ledger:
        write_reports(ledger, registered, settings.reports)
    return {"seconds": time.perf_counter() - began}


def run_discovery(site: Path, cohort: Path) -> dict:
    """Find the studies of a cohort; memory after the first tenth of its rows, and at the end."""
    settings = load_site(site)
    registered = register_cohort(settings, cohort, None)
    asked, early_bytes = 0, 0
    with open_dry_run(settings, registered.number) as run:
        began, busy = time.perf_counter(), time.process_time()
        for page in run.discovery.pages():
            asked += run.discovery.discover(*page)
            if not early_bytes and asked >= registered.rows / 10:
                early_bytes = _resident_bytes()
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
        return {
            "seconds": seconds,
            "cpu_seconds": busy,
            "studies": run.ledger.progress.totals(registered.number).studies.total(),
            "early_bytes": early_bytes,
            "late_bytes": _resident_bytes(),
        }


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


_MODES = {
    "flow": run_flow,
    "stages": run_stages,
    "idle": run_idle,
    "report": run_report,
    "discover": run_discovery,
}

if __name__ == "__main__":
    result = _MODES[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    print(json.dumps({**result, "peak_bytes": peak_bytes()}))
