"""The application: shared options and messages of the commands, entry point and exit codes."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import logging
import os
import signal
import sys
from collections.abc import Collection
from enum import IntEnum
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.text import Text

from prefect_dicom import __version__
from prefect_dicom.core.errors import (
    ConfigurationError,
    FaultyFileError,
    Interrupted,
    PrefectDicomError,
)
from prefect_dicom.core.model import Disposition
from prefect_dicom.core.proxies import spare_loopback


class Exit(IntEnum):
    """Exit codes of the commands."""

    ALL_WELL = 0
    UNEXPECTED = 1
    NOT_ALL = 2
    CONFIGURATION = 3
    INTERRUPTED = 4


_one_spelling = Parameter(negative=())
app = App(
    name="prefect-dicom",
    version=__version__,
    help="Pull a cohort out of a PACS into an archive, with a proof for every study and a "
    "verdict for every row. Start with `prefect-dicom demo`, then `prefect-dicom doctor`.",
    default_parameter=_one_spelling,
    suppress_keyboard_interrupt=False,
)

console = Console(stderr=True, highlight=False)
output = Console(highlight=False)

DEFAULT_SITE = "site.yaml"
SiteOption = Annotated[str, Parameter(name=["--site", "-s"], help="Site file, or block:NAME.")]
JsonOption = Annotated[
    bool, Parameter(name="--json", help="Print the result as JSON.", show_default=False)
]
CohortName = Annotated[str, Parameter(help="Name or number of a cohort; see `status`.")]


class _LastHandler:
    """The last exit handler: ends the process without taking Prefect's modules apart.

    That takes Python more than a second of CPU, for which whoever has interrupted a run waits.
    """

    code: int | None = None
    """None as long as no command has ended."""

    def __call__(self) -> None:
        """End a process that has Prefect in it, when all else has ended."""
        if self.code is None or "prefect" not in sys.modules:
            return
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(self.code)


def main() -> None:
    """Entry point: exceptions become messages and exit codes."""
    os.umask(0o077)
    # Before all other handlers, behind which it runs.
    end = _LastHandler()
    atexit.register(end)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    spare_loopback(os.environ)
    # As by Ctrl-C; what has more to do at its end has a handler of its own.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = app(exit_on_error=False, result_action="return_value")
    except CycloptsError:
        # It has been printed.
        code = Exit.CONFIGURATION
    except FaultyFileError as error:
        console.print(
            Text.assemble((error.source, "red"), f": {counted(len(error.faults), 'fault')}")
        )
        for fault in error.faults:
            console.print(f"  - {fault}", markup=False)
        code = Exit.CONFIGURATION
    except PrefectDicomError as error:
        print_error(error)
        code = exit_for(error)
    except KeyboardInterrupt:
        console.print("Interrupted.")
        code = Exit.INTERRUPTED
    end.code = code if isinstance(code, int) else Exit.ALL_WELL
    sys.exit(end.code)


def counted(count: int, one: str, many: str = "") -> str:
    """A number with its noun, in the plural where it is not one."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def check_known(option: str, given: Collection[str], known: Collection[str]) -> None:
    """Raise a ConfigurationError that lists all unknown names, with the nearest known ones."""
    faults = []
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            words = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            faults.append(f"{option}: no {ascii(name)[:80]} is known; {words}")
    if faults:
        raise ConfigurationError("command line", faults)


def print_error(error: PrefectDicomError) -> None:
    """Print what an error means, and what to do."""
    console.print(Text.assemble((error.reason.meaning, "red"), f" ({error.code})"))
    if error.detail:
        console.print(f"  {error.detail}", markup=False)
    console.print(f"  {error.reason.what_to_do}", markup=False)


def exit_for(error: PrefectDicomError) -> Exit:
    """The exit code of a command that ended by an error."""
    if isinstance(error, Interrupted):
        return Exit.INTERRUPTED
    if error.disposition is Disposition.OPERATOR:
        return Exit.CONFIGURATION
    if error.code != "unexpected":
        return Exit.NOT_ALL
    return Exit.UNEXPECTED
