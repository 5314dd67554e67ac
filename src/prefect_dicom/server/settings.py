"""Environment variables with which Prefect's server and worker run.

The caller's environment overrides all of them but those that identify the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prefect_dicom.core.proxies import spare_loopback

LOOPBACK = "127.0.0.1"
MARK = "PREFECT_DICOM_SERVER"
"""Variable that holds the server's folder in the environment of all its processes."""

_QUIET = {
    # No telemetry, and no advertising on the pages.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
}
_TUNED = {
    # One by one, as is the default, task runs and events are recorded at a fifth of the speed,
    # and while a backlog lasts the API answers 503.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "500",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "200",
    # In memory, as is the default, the leases of a running flow are gone when the server is
    # started again, and Prefect crashes the flow.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
        "prefect.server.concurrency.lease_storage.filesystem"
    ),
    # A run without a heartbeat for DEAD_AFTER_SECONDS is dead.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_WORKER_QUERY_SECONDS": "5",
}
DEAD_AFTER_SECONDS = 300
_OF_ANOTHER_SERVER = {
    "PREFECT_API_KEY",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_PROFILE",
    "PREFECT_SERVER_API_BASE_PATH",
}


def settings_of(folder: Path, port: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the processes of the server in ``folder``."""
    kept = {name: value for name, value in environ.items() if name not in _OF_ANOTHER_SERVER}
    address = f"http://{LOOPBACK}:{port}/api"
    spare_loopback(kept)
    return {
        **_QUIET,
        **_TUNED,
        **kept,
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_API_URL": address,
        "PREFECT_SERVER_API_HOST": LOOPBACK,
        "PREFECT_SERVER_API_PORT": str(port),
        # Without it the pages of a server on another port query the one on 4200.
        "PREFECT_SERVER_UI_API_URL": address,
        MARK: str(folder),
    }
