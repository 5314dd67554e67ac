"""The commands ``receiver run``, ``status`` and ``stop``."""

from __future__ import annotations

import json

from cyclopts import App

from prefect_dicom.cli.app import (
    DEFAULT_SITE,
    Exit,
    JsonOption,
    SiteOption,
    _one_spelling,
    app,
    console,
    output,
)
from prefect_dicom.cli.flow_runner import site_of

receiver = App(
    name="receiver",
    help="The managed storage SCP that C-MOVE sends to.",
    default_parameter=_one_spelling,
    sort_key=9,
)
app.command(receiver)


@receiver.command(name="run")
def receiver_run(*, site: SiteOption = DEFAULT_SITE) -> int:
    """Run the receiver in the foreground until it is stopped (for service managers).

    Runs start the receiver when they need it; this command is for sites that keep it running.
    """
    from prefect_dicom.network.storage_scp.client import assignment_of
    from prefect_dicom.network.storage_scp.process import serve_forever

    settings = site_of(site)
    settings.check_tls_files()
    console.print(
        f"{settings.receiver.ae_title} on {settings.receiver.bind}:{settings.receiver.port}"
    )
    serve_forever(assignment_of(settings))
    return Exit.ALL_WELL


@receiver.command(name="status")
def receiver_status(*, site: SiteOption = DEFAULT_SITE, json_: JsonOption = False) -> int:
    """Show whether the receiver runs, and which runs use it."""
    from prefect_dicom.network.storage_scp import running_receiver

    lease = running_receiver(site_of(site))
    if lease is None:
        print(json.dumps(None)) if json_ else output.print("The receiver does not run.")
        return Exit.NOT_ALL
    with lease:
        facts = lease.status()
    if json_:
        print(json.dumps(facts, indent=1))
    else:
        for key, value in facts.items():
            output.print(f"{key}: {value}", markup=False)
    return Exit.ALL_WELL


@receiver.command(name="stop")
def receiver_stop(*, site: SiteOption = DEFAULT_SITE) -> int:
    """Stop the receiver, after the instances under way."""
    from prefect_dicom.network.storage_scp import running_receiver

    lease = running_receiver(site_of(site))
    if lease is not None:
        with lease:
            lease.stop()
    output.print("Stopped." if lease else "The receiver did not run.")
    return Exit.ALL_WELL
