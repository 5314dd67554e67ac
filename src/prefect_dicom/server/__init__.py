"""The site's own Prefect server, for a machine without one: ``prefect-dicom up``.

::

    local       folder, state, start and stop of the server; does not import Prefect
    supervisor  the background process that starts server and worker and restarts them
    provision   creates limits, blocks, the automation and the deployments on the server
    settings    environment variables with which server and worker run
    home        the folder in which Prefect keeps its files; does not import Prefect
    connection  whether a server can be used: the one configured, or an embedded one
    embedded    the server of a single run, where there is none; a process of its own
    needs       whether a run needs a server at all; does not import Prefect
    serverless  runs without one: a journal each, recorded afterwards; does not import Prefect
    recorder    the process that takes journals into the database of Prefect's home
    database    that database: migrated, or copied from an empty one
    work        what the runs on a local server are doing; does not import Prefect
"""

from prefect_dicom.server.local import LocalServer

__all__ = ["LocalServer"]
