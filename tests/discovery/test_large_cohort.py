"""However many rows a cohort has: memory stays as it is, and no answer is asked for again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefect_dicom.core.model import Verdict
from prefect_dicom.discovery.service import ROWS_PER_WRITE
from prefect_dicom.report.estimate import estimate_pull
from prefect_dicom.testing import tiny_instances
from tests.support import program
from tests.support.sites import Place, site_around, until

HOURS = 4 * 3600
GROWTH_BYTES = 25_000_000
"""What Python's allocator and SQLite's cache may still take after the first tenth of the rows."""
COMMANDS = {
    "steps": program("planning_process"),
    "flow": [sys.executable, "-m", "prefect_dicom.cli", "pull", "--dry-run"],
}


def resident_bytes(pid: int) -> int:
    """What a process has in memory now (VmRSS)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the process has ended")


@contextmanager
def planning(place: Place, cohort: Path, through: str) -> Iterator[subprocess.Popen]:
    """A dry run; what the block leaves of it is killed."""
    where = [str(place.file), str(cohort)]
    if through == "flow":
        where = [str(cohort), "--site", str(place.file)]
    home = {"PREFECT_HOME": str(place.folder / "prefect"), "PYTHONUNBUFFERED": "1"}
    with (place.folder / "planning.log").open("ab") as log:
        process = subprocess.Popen(
            [*COMMANDS[through], *where],
            stdout=log,
            stderr=log,
            env={**os.environ, **home},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """Kill it, and Prefect's server with it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.timeout(HOURS)
@pytest.mark.campaign("discovery of a large cohort")
@pytest.mark.parametrize(
    "through", ["steps", pytest.param("flow", marks=pytest.mark.whole_campaign)]
)
def test_memory_is_flat_and_what_was_answered_is_not_asked_again(tmp_path, scale, through):
    rows = scale(250, 100_000 if through == "steps" else 20_000)
    with site_around(tmp_path, tiny_instances(rows), retrieve="c-get") as place:
        pacs, associations = place.pacs, 4
        place.change(node={"limits": {"associations": associations}})
        cohort = place.cohort(
            {"AccessionNumber": stored.attributes["AccessionNumber"]} for stored in pacs.holdings
        )
        with planning(place, cohort, through) as process:
            asked = lambda: len(pacs.log) >= rows // 2 or process.poll() is not None  # noqa: E731
            until(asked, "half of the rows have been asked for", HOURS)
            kill(process)
            assert process.returncode == -signal.SIGKILL
        before = len(pacs.log)
        began = time.monotonic()
        with planning(place, cohort, through) as process:
            memory = []
            for wanted in (before + rows // 10, rows - rows // 50):
                reached = lambda n=wanted: len(pacs.log) >= n or process.poll() is not None  # noqa: E731
                until(reached, f"the PACS has been asked {wanted} times", HOURS)
                memory.append(resident_bytes(process.pid))
            until(lambda: process.poll() is not None, "it has ended", HOURS)
            assert process.returncode == 0, (place.folder / "planning.log").read_text()
        seconds = time.monotonic() - began
        queries = Counter(request.keys["AccessionNumber"] for request in pacs.log)
        again = sum(count - 1 for count in queries.values())
        print(
            f"{through}: {rows} rows, {len(pacs.log)} queries, of them {again} once more after the "
            f"kill; {(len(pacs.log) - before) / seconds:.0f} rows/s with start and end; "
            f"{memory[0] / 1e6:.0f} MB after a tenth more, {memory[1] / 1e6:.0f} MB at the end"
        )
        assert len(queries) == rows
        # One a row, but for what had been answered and was not in the ledger when it was killed.
        assert again <= ROWS_PER_WRITE + associations
        assert {request.service for request in pacs.log} == {"C-FIND"}
        assert memory[1] - memory[0] < GROWTH_BYTES
        with place.ledger() as ledger:
            totals = ledger.progress.totals(1)
            estimate = estimate_pull(ledger, ledger.cohorts.get("1"), place.site)
        assert (totals.unasked, totals.rows) == (0, {Verdict.PENDING: rows})
        assert (estimate.total.studies, estimate.total.instances) == (rows, rows)
        assert estimate.unfound_rows == 0
