"""Provision a Prefect server for a site; idempotent.

Creates the work pool with a queue for runs that query a PACS, a limit ``pacs-<node>`` per node, the
block types, the automations that mark dead and stranded runs, and a deployment of every flow. Later
changes by a person (schedules, parameters, limits of queues, a paused automation) are kept.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml
from prefect import Flow
from prefect.automations import Automation
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    DeploymentScheduleCreate,
    DeploymentUpdate,
    GlobalConcurrencyLimitCreate,
    GlobalConcurrencyLimitUpdate,
    WorkPoolCreate,
)
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.types.entrypoint import EntrypointType
from prefect.workers.process import ProcessWorker

from prefect_dicom import __version__, blocks
from prefect_dicom.config.site import Site, load_site
from prefect_dicom.core.events import AUTOMATIONS
from prefect_dicom.flows import (
    archive_new,
    deliver_cohort,
    pull_cohort,
    rerun_failed,
    verify_archive,
)
from prefect_dicom.server.settings import DEAD_AFTER_SECONDS
from prefect_dicom.server.supervisor import POOL, RUNS_OF_A_NODE

QUEUE = "pacs"
"""Work queue of the runs that query a PACS."""


def provision(site: Site, file: Path) -> None:
    """Provision the server that the environment names (``PREFECT_API_URL``).

    Parameters
    ----------
    site : Site
        Nodes, and their limits.
    file : Path
        Site file, the default of every deployment's ``site`` parameter.
    """
    with get_client(sync_client=True) as client:
        _pool(client, len(site.nodes))
        for node in site.nodes:
            _limit(client, f"pacs-{node}", site.effective_node(node).limits.associations)
        for block in (
            blocks.DicomPacs,
            blocks.DicomReceiver,
            blocks.DicomArchive,
            blocks.DicomLedger,
            blocks.DicomSite,
        ):
            # Prefect's annotation names its asynchronous client; called here, it takes this one.
            block.register_type_and_schema(client=client)  # type: ignore[arg-type]
        for automation in (dead_runs(), stranded_runs()):
            if not client.read_automations_by_name(automation.name):
                automation.create()
        for deployment in deployments_of(site, file):
            _deploy(client, deployment)


def _limit(client: SyncPrefectClient, name: str, associations: int) -> None:
    """Create an inactive limit: runs of one ledger share a node's associations by that ledger.

    It is for sites where runs of several ledgers query the same node. A run holds its slots from
    its start to its end, and the next one waits for all of that.
    """
    try:
        known = client.read_global_concurrency_limit_by_name(name)
    except ObjectNotFound:
        client.create_global_concurrency_limit(
            GlobalConcurrencyLimitCreate(name=name, limit=associations, active=False)
        )
    else:
        if known.limit != associations:
            client.update_global_concurrency_limit(
                name, GlobalConcurrencyLimitUpdate(limit=associations)
            )


def _pool(client: SyncPrefectClient, nodes: int) -> None:
    template = ProcessWorker.get_default_base_job_template()
    pool = WorkPoolCreate(name=POOL, type=ProcessWorker.type, base_job_template=template)
    try:
        client.create_work_pool(pool)
    except ObjectAlreadyExists:
        return
    client.request(
        "POST",
        "/work_pools/{work_pool_name}/queues",
        path_params={"work_pool_name": POOL},
        json={"name": QUEUE, "concurrency_limit": RUNS_OF_A_NODE * nodes},
    )


def dead_runs() -> Automation:
    """Return the automation that marks runs without a heartbeat as crashed.

    Prefect has none by default; a killed run would be shown as running for ever.
    """
    known = yaml.safe_load((AUTOMATIONS / "dead-runs.yaml").read_text())
    # Flows send heartbeats more often than that: see settings.
    known["trigger"]["within"] = DEAD_AFTER_SECONDS
    return Automation(**known)


def stranded_runs() -> Automation:
    """Return the automation that marks runs as crashed which a worker took and never began.

    They count in the limit of their queue: with as many as the limit, no other run begins.
    """
    return Automation(**yaml.safe_load((AUTOMATIONS / "stranded-runs.yaml").read_text()))


def deployments_of(site: Site, file: Path) -> Iterator[RunnerDeployment]:
    """Yield a deployment of every flow for a site; all schedules are created inactive."""
    own = {"site": str(file.absolute())}
    asking = {"work_queue_name": QUEUE}
    yield _deployment(pull_cohort, "cohort", own, **asking)
    yield _deployment(rerun_failed, "failures", own, "30 22 * * *", "nightly", **asking)
    yield _deployment(deliver_cohort, "delivery", own, "0 4 * * *", "nightly", **asking)
    # Nodes to which studies are delivered have no new studies of their own.
    sources = [name for name, node in site.nodes.items() if node.destination is None]
    for node in sources or site.nodes:
        several = len(sources) > 1
        name = f"new-{node}" if several else "new"
        parameters = own | {"days": 7} | ({"node": node} if several else {})
        yield _deployment(archive_new, name, parameters, "0 1 * * *", "nightly", **asking)
    yield _deployment(verify_archive, "weekly", own, "0 6 * * 0", "sundays")


def _deployment(
    flow: Flow[..., Any],
    name: str,
    parameters: dict[str, Any],
    cron: str = "",
    slug: str = "",
    **more: Any,
) -> RunnerDeployment:
    schedules = []
    if cron:
        when = CronSchedule(cron=cron, timezone=local_time_zone())
        schedules.append(DeploymentScheduleCreate(schedule=when, active=False, slug=slug))
    deployment = flow.to_deployment(
        name,
        parameters=parameters,
        schedules=schedules,
        tags=["dicom"],
        version=__version__,
        work_pool_name=POOL,
        # By its dotted name: a worker needs the package, not a file at a certain path.
        entrypoint_type=EntrypointType.MODULE_PATH,
        **more,
    )
    return cast(RunnerDeployment, deployment)


def _deploy(client: SyncPrefectClient, deployment: RunnerDeployment) -> None:
    try:
        known = client.read_deployment_by_name(deployment.full_name)
    except ObjectNotFound:
        deployment.apply()
        return
    client.update_deployment(
        known.id,
        DeploymentUpdate(
            entrypoint=deployment.entrypoint,
            version=deployment.version,
            description=deployment.description,
            parameter_openapi_schema=deployment._parameter_openapi_schema.model_dump(),
        ),
    )


def local_time_zone() -> str:
    """Return the name of this host's time zone; UTC if it has none."""
    if name := os.environ.get("TZ", "").lstrip(":"):
        return name
    try:
        return Path("/etc/localtime").resolve().as_posix().split("/zoneinfo/")[1]
    except IndexError:
        return "UTC"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    provision(load_site(path), path)
