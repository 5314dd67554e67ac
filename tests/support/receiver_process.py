"""The receiver's process as a site runs it, but watched, and with deadlines a test can wait for.

``python receiver_process.py '{"pdu_seconds": 1}' < assignment``; the keys are those of
:class:`~prefect_dicom.network.storage_scp.transfer.Limits`, and ``negotiation_seconds``. Every
write outside the spool goes into the log as ``OUTSIDE``.
"""

from __future__ import annotations

import json
import logging
import os
import sys

from prefect_dicom.network.storage_scp.process import Assignment, serve_forever
from prefect_dicom.network.storage_scp.transfer import Limits

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.truncate": 1,
    "os.chmod": 1,
}


def watch(spool: str) -> None:
    """Tell of everything this process changes outside of a folder."""
    inside = os.path.realpath(spool)

    def audit(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & _WRITING or (isinstance(mode, str) and set(mode) & set("wax+"))
            paths = arguments[:1] if writes else ()
        elif event in _CHANGES:
            paths = arguments[: _CHANGES[event]]
        else:
            return
        for path in paths:
            if isinstance(path, int):
                continue
            real = os.path.realpath(os.fsdecode(path))
            if os.path.commonpath((inside, real)) != inside:
                os.write(2, f"OUTSIDE {event}\n".encode())

    sys.addaudithook(audit)


def main(deadlines: str) -> None:
    os.umask(0o077)
    sys.dont_write_bytecode = True
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    more = json.loads(deadlines)
    scp = {}
    if "negotiation_seconds" in more:
        scp["negotiation_seconds"] = more.pop("negotiation_seconds")
    assignment = Assignment.from_json(sys.stdin.read())
    watch(str(assignment.spool))
    serve_forever(assignment, limits=Limits(**more), **scp)


if __name__ == "__main__":
    main(sys.argv[1])
