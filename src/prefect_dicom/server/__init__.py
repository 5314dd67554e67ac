"""The site's own Prefect server, for a machine without one: ``prefect-dicom up``.

::

    local       folder, state, start and stop of the server; does not import Prefect
    supervisor  the background process that starts server and worker and restarts them
    provision   creates limits, blocks, the automation and the deployments on the server
    settings    environment variables with which server and worker run
    embedded    the log file of the server that Prefect starts where there is none
"""

from prefect_dicom.server.local import LocalServer

__all__ = ["LocalServer"]
