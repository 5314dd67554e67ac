"""Around a flow: the site, Prefect's settings, interruptions, and how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from prefect_dicom.cli.app import Exit, console, exit_for, print_error
from prefect_dicom.config.site import Site, load_site
from prefect_dicom.core.errors import Interrupted, PrefectDicomError

if TYPE_CHECKING:
    from prefect_dicom.ledger import Cohort, Ledger


_INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)


def run_flow(
    site: Site,
    reference: str,
    ledger: Ledger,
    cohort: Cohort,
    flow: Callable[[], Any],
    as_json: bool,
    show: Callable[..., int],
) -> int:
    """Run a flow with a live display, then show where the cohort stands."""
    from prefect_dicom.run.progress import progress_shown

    settle_prefect(site)
    error: BaseException | None = None
    try:
        with _interruptible() as interrupted, progress_shown(console, ledger, cohort):
            if not _prefect_answers():
                return Exit.CONFIGURATION
            state = flow()
            if state.is_cancelled():
                error = Interrupted()
            elif not state.is_completed():
                error = state.result(raise_on_failure=False)
    except KeyboardInterrupt:
        error = Interrupted()
    except Exception:
        # A signal to the whole process group ends the embedded server too.
        if not interrupted.is_set():
            raise
        error = Interrupted()
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


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM ends the run in order, and is noted; the next at once."""
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        if interrupted.is_set():
            # Nothing is lost by it: the next run goes on from what is on the disk.
            os._exit(Exit.INTERRUPTED)
        interrupted.set()
        console.print("Interrupted: ending what is under way. Once more to end at once.")
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in _INTERRUPTIONS}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prefect_answers() -> bool:
    """Whether Prefect's server answers; where none is configured its embedded one is started."""
    from prefect.client.orchestration import get_client

    from prefect_dicom.server.embedded import log_embedded_server

    log = log_embedded_server()
    # A Ctrl-C goes to every process of the terminal, and the embedded server would be gone
    # before the run can tell it how it ended. A blocked signal stays blocked in a child.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with get_client(sync_client=True) as client:
            trouble = client.api_healthcheck()
    except RuntimeError as error:
        trouble = error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if trouble is None:
        return True
    url = os.environ.get("PREFECT_API_URL")
    console.print(
        f"[red]Prefect's server does not answer[/] ({type(trouble).__name__}). "
        + (
            "Start it, or unset PREFECT_API_URL for an embedded one."
            if url
            else "See `prefect config view` for its address; without one it is embedded, "
            f"and its log is {log}."
        )
    )
    return False


def settle_prefect(site: Site | None = None) -> None:
    """Prefect's settings for a run of its own; whatever the user has set stays."""
    if site is not None and "PREFECT_API_URL" not in os.environ:
        from prefect_dicom.server import LocalServer

        if (url := LocalServer.of(site).url) is not None:
            os.environ["PREFECT_API_URL"] = url
    for name, value in {
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    }.items():
        os.environ.setdefault(name, value)


def site_of(reference: str) -> Site:
    """The site of ``--site``: a file, or ``block:NAME``."""
    if reference.startswith("block:"):
        settle_prefect()
        from prefect_dicom.blocks import resolve_site

        return resolve_site(reference)
    return load_site(reference)
