"""The report of a cohort kept up to date while a run works on it, by a process of its own.

Looking through a large cohort and drawing take seconds of computing. They are spent in another
process, of low priority, so that nothing that arrives has to wait for them.
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


class RunningPage:
    """``report.html`` of a cohort, written anew while a run is under way.

    Not before a minute of it: a short run writes its report at its end. Where the page cannot be
    written the run goes on without, and says so once.

    Parameters
    ----------
    run : int
        The number of the run in the ledger.
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
        """Begin to write the page anew, if it is time; whether that was begun.

        At most once a minute, and for no more than a twentieth of the time.
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
        """Write the page at the end of the run, in this process, and wait for it."""
        # Imported where it is wanted: matplotlib takes half a second.
        from prefect_dicom.report.page import write_page

        self._stop_writing()
        node = self._site.asked(self._cohort.node)
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
        """End with the run. A page that shows it at work is written once more, by a process that
        nobody waits for."""
        self._stop_writing()
        if self._shown:
            self._start(without_run=self._run)

    def _stop_writing(self) -> None:
        if self._writer is not None:
            self._writer.kill()
            self._writer.wait()
            self._writer = None

    def _start(self, without_run: int | None = None) -> subprocess.Popen[bytes]:
        node = self._site.asked(self._cohort.node)
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
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(order).encode())
            process.stdin.close()
        return process

    def _note(self, code: int) -> None:
        if code and not self._failed:
            log.warning("the report cannot be written while the run is under way (%d)", code)
        self._failed = bool(code)


def main() -> int:
    """Write one page, as standard input says."""
    os.nice(_NICE)
    order = json.loads(sys.stdin.buffer.read())
    from prefect_dicom.report.page import write_page

    schedule = order["access_schedule"] and AccessSchedule.model_validate(order["access_schedule"])
    with Ledger.open(order["ledger"]) as ledger:
        write_page(
            ledger,
            ledger.cohort(str(order["cohort"])),
            Path(order["reports"]),
            schedule=schedule,
            associations=order["associations"],
            without_run=order["without_run"],
        )
    return 0
