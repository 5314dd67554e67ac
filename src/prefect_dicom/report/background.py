"""Report page of a cohort refreshed in the background while a run works on it.

Summarizing and drawing a large cohort take seconds of computing. A separate process of low priority
does that, so that no arriving instance waits for it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from prefect_dicom.config.access_schedule import AccessSchedule
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.ledger import Cohort, Ledger
from prefect_dicom.report.tables import next_count

log = logging.getLogger(__name__)

EVERY_SECONDS = 60.0
_NICE = 10


class BackgroundPage:
    """``report.html`` of a cohort, refreshed while a run is under way.

    The first refresh comes after a minute: a short run writes its report at its end. If the page
    cannot be written the run continues without it, and a warning is logged once.

    Parameters
    ----------
    site : Site
        Site of the run.
    cohort : Cohort
        Cohort of the run.
    run : int
        Number of the run in the ledger.
    monotonic : callable
        Monotonic clock in seconds.
    """

    def __init__(
        self,
        site: Site,
        cohort: Cohort,
        run: int,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._site = site
        self._cohort = cohort
        self._run = run
        self._monotonic = monotonic
        self._began = monotonic()
        self._due = self._began + EVERY_SECONDS
        self._writer: subprocess.Popen[bytes] | None = None
        self._shown = False
        self._failed = False

    def refresh(self) -> bool:
        """Start a refresh if one is due: at most once a minute, for a twentieth of the time.

        Returns
        -------
        bool
            Whether a refresh was started.
        """
        now = self._monotonic()
        if self._writer is not None:
            if (code := self._writer.poll()) is None:
                return False
            self._due = next_count(self._began, now, EVERY_SECONDS)
            self._writer = None
            self._note(code)
        if now < self._due:
            return False
        self._began, self._shown = now, True
        self._writer = self._start()
        return True

    def write_last(self, ledger: Ledger) -> None:
        """Write the final page in this process."""
        # Imported here: matplotlib takes half a second.
        from prefect_dicom.report.page import write_page

        self._stop_writing()
        node = self._site.effective_node(self._cohort.node)
        try:
            write_page(
                ledger,
                self._cohort,
                self._site.reports,
                schedule=node.access_schedule,
                associations=node.limits.associations,
                without_run=self._run,
            )
        except Exception as error:
            # The studies are archived all the same, and the tables are there.
            log.warning("the report cannot be written (%s)", type(error).__name__)
        self._shown = False

    def close(self) -> None:
        """Stop refreshing; a page that shows the run at work is refreshed once more, unattended."""
        self._stop_writing()
        if self._shown:
            self._start(without_run=self._run)

    def _stop_writing(self) -> None:
        if self._writer is not None:
            self._writer.kill()
            self._writer.wait()
            self._writer = None

    def _start(self, without_run: int | None = None) -> subprocess.Popen[bytes]:
        node = self._site.effective_node(self._cohort.node)
        order = {
            "ledger": ledger_url(self._site),
            "cohort": self._cohort.number,
            "reports": str(self._site.reports),
            "access_schedule": node.access_schedule
            and node.access_schedule.model_dump(mode="json"),
            "associations": node.limits.associations,
            "without_run": without_run,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect_dicom.report"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A Ctrl-C is for the run.
            start_new_session=True,
        )
        # Not on its command line: the URL of a ledger may have a password.
        assert process.stdin is not None, "it is a pipe"
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(order).encode())
            process.stdin.close()
        return process

    def _note(self, code: int) -> None:
        if code and not self._failed:
            log.warning("the report cannot be written while the run is under way (%d)", code)
        self._failed = bool(code)


def main() -> int:
    """Write one page; the arguments are JSON on standard input."""
    with contextlib.suppress(OSError):
        # A service manager may forbid it.
        os.nice(_NICE)
    order = json.loads(sys.stdin.buffer.read())
    from prefect_dicom.report.page import write_page

    schedule = order["access_schedule"] and AccessSchedule.model_validate(order["access_schedule"])
    with Ledger.open(order["ledger"]) as ledger:
        write_page(
            ledger,
            ledger.cohorts.get(str(order["cohort"])),
            Path(order["reports"]),
            schedule=schedule,
            associations=order["associations"],
            without_run=order["without_run"],
        )
    return 0
