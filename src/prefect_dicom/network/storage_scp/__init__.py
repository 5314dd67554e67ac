"""The storage SCP: the byte path from a peer's C-STORE to the spool, and its process.

``transfer`` is the loop from socket to file that C-GET uses too, ``server`` the SCP that accepts
associations, ``pending`` holds connections that are none yet. ``store_handler`` decides which
study an instance belongs to. ``process`` is the managed receiver, shared by the runs of a host,
``client`` a run's lease on it, ``control_protocol`` the messages between both.
"""

from prefect_dicom.network.storage_scp.client import (
    ReceiverLease,
    Request,
    check_port,
    running_receiver,
)
from prefect_dicom.network.storage_scp.store_handler import Expectation, StoreHandler

__all__ = [
    "Expectation",
    "StoreHandler",
    "ReceiverLease",
    "Request",
    "check_port",
    "running_receiver",
]
