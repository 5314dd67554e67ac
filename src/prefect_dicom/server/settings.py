"""The settings with which Prefect's server and worker run on a machine of their own.

All of them give way to what the environment sets, but those that say which server it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

LOOPBACK = "127.0.0.1"
MARK = "PREFECT_DICOM_SERVER"
"""In the environment of every process that belongs to a local server: its folder."""

_QUIET = {
    # Nothing is told to anybody, and the pages advertise nothing.
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
    # A run that does not say for DEAD_AFTER_SECONDS that it lives is dead.
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
    """The environment of everything that belongs to the server in ``folder``."""
    kept = {name: value for name, value in environ.items() if name not in _OF_ANOTHER_SERVER}
    address = f"http://{LOOPBACK}:{port}/api"
    return {
        **_QUIET,
        **_TUNED,
        **kept,
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_API_URL": address,
        "PREFECT_SERVER_API_HOST": LOOPBACK,
        "PREFECT_SERVER_API_PORT": str(port),
        # Else the pages of a server on another port ask the one on 4200.
        "PREFECT_SERVER_UI_API_URL": address,
        MARK: str(folder),
    }
