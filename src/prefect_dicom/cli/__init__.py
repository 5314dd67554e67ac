"""The command line: a thin face over the flows and steps.

Results go to standard output, progress and complaints to standard error. Exit codes: 0 all
archived (or all well), 1 something unexpected, 2 some rows are not archived (or a check found
faults), 3 configuration, cohort file or command line, 4 interrupted.

What a command needs is imported in it: `--help`, a complaint about a file and `status` come
without Prefect, pynetdicom, pandas or boto3.
"""

from prefect_dicom.cli import archive, control, doctor, pull, quarantine, receiver, server, status
from prefect_dicom.cli.app import Exit, app, main

__all__ = ["Exit", "app", "main"]

COMMANDS = (archive, control, doctor, pull, quarantine, receiver, server, status)
"""Modules with commands, which are known to the application once they are imported."""
