"""The command line: commands over the flows and operations.

Results go to standard output, progress and errors to standard error. Exit codes: 0 all archived
(or no fault), 1 unexpected error, 2 some rows are not archived (or a check found faults),
3 configuration, cohort file or command line, 4 interrupted.

Each command imports what it needs in its function: `--help`, the faults of a file and `status`
do not import Prefect, pynetdicom, pandas or boto3.
"""

from prefect_dicom.cli import (
    accept,
    archive,
    control,
    deidentify,
    deliver,
    doctor,
    pull,
    quarantine,
    receiver,
    server,
    status,
    why,
)
from prefect_dicom.cli.app import Exit, app, main

__all__ = ["Exit", "app", "main"]

COMMANDS = (
    accept,
    archive,
    control,
    deidentify,
    deliver,
    doctor,
    pull,
    quarantine,
    receiver,
    server,
    status,
    why,
)
"""Modules with commands; importing a module registers its commands."""
