"""A Prefect server of the site's own, for a machine that has none: ``prefect-dicom up``.

::

    local      where it lies, whether it runs, what it says; starting and stopping it. No Prefect.
    keeper     the one process in the background: starts server and worker, and again if they die
    furnish    what the server is given: limits, blocks, the automation, the deployments
    profile    the settings Prefect runs with
"""

from prefect_dicom.server.local import LocalServer

__all__ = ["LocalServer"]
