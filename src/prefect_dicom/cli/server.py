"""The commands ``up`` and ``down``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from prefect_dicom.cli.app import DEFAULT_SITE, Exit, SiteOption, app, console, output
from prefect_dicom.config.site import Site, load_site
from prefect_dicom.core.errors import ConfigurationError


@app.command(sort_key=11)
def up(
    *,
    site: SiteOption = DEFAULT_SITE,
    port: Annotated[
        int | None,
        Parameter(help="Port on loopback; by default 4200 or another free one, kept from then on."),
    ] = None,
) -> int:
    """Start a Prefect server for this site in the background, on a machine without one.

    Also starts a worker and deploys all flows. Idempotent; run it again when the site file has
    changed. Database and logs are in `prefect-server` beside the ledger. `pull` and `rerun` use it
    where PREFECT_API_URL is not set. Stop it with `down`.
    """
    from prefect_dicom.server import LocalServer

    _refuse_block(site, "up")
    local = LocalServer.of(load_site(site))
    with console.status("Starting Prefect's server: half a minute, the first time longer"):
        local.up(Path(site).expanduser(), port)
    print_server(load_site(site))
    output.print(f"Logs: {local.logs}", markup=False, soft_wrap=True)
    return Exit.ALL_WELL


@app.command(sort_key=12)
def down(*, site: SiteOption = DEFAULT_SITE) -> int:
    """Stop the Prefect server that `up` started, its worker and the runs of that worker.

    Runs end as with Ctrl-C: nothing is lost, `rerun` continues.
    """
    from prefect_dicom.server import LocalServer

    _refuse_block(site, "down")
    with console.status("Ending what is under way"):
        stopped = LocalServer.of(load_site(site)).down()
    output.print("Stopped." if stopped else "It did not run.")
    return Exit.ALL_WELL


def _refuse_block(site: str, command: str) -> None:
    if site.startswith("block:"):
        fault = f"{command}: a block is stored in a Prefect server already; name a site file"
        raise ConfigurationError("command line", [fault])


def print_server(site: Site) -> None:
    """Print the state of the server that `up` has started; nothing where there is none."""
    from prefect_dicom.server import LocalServer

    words = LocalServer.of(site).describe()
    if words:
        output.print(words, markup=False, soft_wrap=True)
