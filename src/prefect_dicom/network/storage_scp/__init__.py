"""The managed receiver: a storage SCP in its own process, shared by the runs of a host.

``intake`` decides where an object belongs, ``server`` is the process, ``client`` a run's side of
it, ``protocol`` what they say to each other. The byte path itself is
:mod:`prefect_dicom.network.storage_scp.transfer`.
"""

from prefect_dicom.network.storage_scp.client import ReceiverLease, Request, running_receiver
from prefect_dicom.network.storage_scp.store_handler import Expectation, Intake

__all__ = ["Expectation", "Intake", "ReceiverLease", "Request", "running_receiver"]
