"""Running a flow: the site, Prefect's settings, interruptions, and the exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from prefect_dicom.cli.app import Exit, console, exit_for, print_error
from prefect_dicom.config.site import Site, load_site
from prefect_dicom.core.errors import Interrupted, PrefectDicomError
from prefect_dicom.core.proxies import spare_loopback

if TYPE_CHECKING:
    from prefect_dicom.ledger import Cohort, Ledger
    from prefect_dicom.run.engine import FlowCall
    from prefect_dicom.server.home import PrefectHome


_URL = "PREFECT_API_URL"
_INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)


def run_flow(
    site: Site,
    reference: str,
    ledger: Ledger,
    cohort: Cohort,
    call: FlowCall,
    as_json: bool,
    show: Callable[..., int],
    progress: Callable[[Console, Ledger, Cohort], AbstractContextManager[None]] | None = None,
) -> int:
    """Run a flow with a live display, then print the state of the cohort.

    Parameters
    ----------
    progress : callable, optional
        The display while it runs; by default that of a pull.
    """
    from prefect_dicom.run.progress import progress_shown

    shown = progress_shown if progress is None else progress
    home = settle_prefect(site)
    if home.instead_of:
        words = f"{home.instead_of}; it is {home.path} instead."
        console.print(words, markup=False, soft_wrap=True)
    error: BaseException | None = None
    try:
        with _interruptible() as interrupted, shown(console, ledger, cohort):
            error = _run(call, home.path)
    except KeyboardInterrupt:
        error = Interrupted()
    except Exception:
        # Any error that the interruption caused.
        if not interrupted.is_set():
            raise
        error = Interrupted()
    if isinstance(error, Interrupted) and "prefect" in sys.modules:
        from prefect_dicom.server.embedded import end_embedded_server_soon

        end_embedded_server_soon()
    code = show(site, reference, ledger, cohort, as_json, error)
    if error is None:
        return code
    if isinstance(error, Interrupted):
        return Exit.INTERRUPTED
    if isinstance(error, PrefectDicomError):
        print_error(error)
        return exit_for(error)
    console.print(f"[red]The flow did not complete[/] ({type(error).__name__}).")
    return Exit.UNEXPECTED


def _run(call: FlowCall, home: Path) -> BaseException | None:
    """Run a flow, with a Prefect server where one is needed."""
    from prefect_dicom.server.needs import why_a_server_is_needed

    if not why_a_server_is_needed(home, os.environ):
        from prefect_dicom.server.serverless import run_without_server

        return run_without_server(call, home)
    # Prefect takes two seconds to import, and reads its settings then.
    from prefect_dicom.server.connection import reach_server

    reach_server()
    from prefect_dicom.flows.binding import run_with_prefect

    return run_with_prefect(call)


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Let the first SIGINT or SIGTERM end the run in order, and the next at once."""
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        if interrupted.is_set():
            # Nothing is lost: the next run continues from the ledger and the spool.
            os._exit(Exit.INTERRUPTED)
        interrupted.set()
        console.print("Interrupted: ending what is under way. Interrupt again to end at once.")
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _INTERRUPTIONS}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def settle_prefect(site: Site | None = None) -> PrefectHome:
    """Set Prefect's environment variables for a command; those the user has set are kept.

    To be called before Prefect is imported.

    Raises
    ------
    ConfigurationError
        Prefect has no home that can be written.
    """
    from prefect_dicom.server import LocalServer
    from prefect_dicom.server.home import choose_home
    from prefect_dicom.server.needs import DEFAULTS

    home = choose_home(os.environ, site)
    url = None if site is None or _URL in os.environ else LocalServer.of(site).url
    if url is not None:
        os.environ[_URL] = url
    spare_loopback(os.environ, os.environ.get(_URL))
    for name, value in {**DEFAULTS, "DO_NOT_TRACK": "1"}.items():
        os.environ.setdefault(name, value)
    return home


def site_of(reference: str) -> Site:
    """The site of ``--site``: a file, or ``block:NAME``."""
    if reference.startswith("block:"):
        settle_prefect()
        from prefect_dicom.blocks import resolve_site

        return resolve_site(reference)
    return load_site(reference)
