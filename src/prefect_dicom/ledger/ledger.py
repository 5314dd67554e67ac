"""The ledger: one open database, and a part for each thing that it keeps."""

from __future__ import annotations

from typing import Self

from prefect_dicom.core.errors import LedgerError
from prefect_dicom.ledger.acceptances import Acceptances
from prefect_dicom.ledger.claims import Claims
from prefect_dicom.ledger.cohort_rows import CohortRows
from prefect_dicom.ledger.cohorts import Cohorts
from prefect_dicom.ledger.commitments import Commitments
from prefect_dicom.ledger.database import Database, open_database
from prefect_dicom.ledger.deliveries import Deliveries
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.instances import Instances
from prefect_dicom.ledger.manifests import Manifests
from prefect_dicom.ledger.progress import Progress
from prefect_dicom.ledger.rate_limits import RateLimits
from prefect_dicom.ledger.rebuild import Rebuild
from prefect_dicom.ledger.run_control import RunControl
from prefect_dicom.ledger.runs import Runs
from prefect_dicom.ledger.studies import Studies
from prefect_dicom.ledger.study_locations import StudyLocations


class Ledger:
    """The state of every cohort row, study and instance, in SQLite or PostgreSQL.

    Open one object in a process: all threads may use it. It must not cross a fork. Every method of
    a part that changes something is one short transaction, and raises
    :class:`~prefect_dicom.core.errors.LedgerError` (``ledger-unavailable``) where the database
    fails, without any text of its statements. A method that writes about a study takes the
    study's claim and first checks that it still stands; where it does not, nothing is written
    and :class:`~prefect_dicom.core.errors.ClaimLost` is raised.

    Parameters
    ----------
    database : Database
        Shared by all parts.

    Attributes
    ----------
    cohorts : Cohorts
        Registered cohorts, their filters and notes; reopening them for a rerun.
    rows : CohortRows
        Rows of cohorts: discovery, near misses, verdicts.
    studies : Studies
        Studies and how they end.
    study_locations : StudyLocations
        The nodes of each study, for cohorts with several nodes.
    instances : Instances
        Instance lists, and instances on their way into the archive.
    manifests : Manifests
        Manifests of archived studies.
    acceptances : Acceptances
        What people have accepted of studies.
    deliveries : Deliveries
        Deliveries of studies to other nodes.
    commitments : Commitments
        Storage commitment that was requested of targets.
    claims : Claims
        Claims of runs on studies, with fencing.
    runs : Runs
        Runs under way, and how they ended.
    run_control : RunControl
        Requested state and priority of a cohort's runs.
    rate_limits : RateLimits
        Association slots and leaky buckets, per node.
    progress : Progress
        Totals and samples of cohorts.
    rebuild : Rebuild
        Import of archived studies.

    Examples
    --------
    >>> with Ledger.open("sqlite:////var/lib/site/ledger.db") as ledger:  # doctest: +SKIP
    ...     with ledger.runs.begin("pull") as run:
    ...         claims = ledger.claims.acquire(run, [1, 2, 3])
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self.cohorts = Cohorts(database)
        self.rows = CohortRows(database)
        self.studies = Studies(database)
        self.study_locations = StudyLocations(database)
        self.instances = Instances(database)
        self.manifests = Manifests(database)
        self.acceptances = Acceptances(database)
        self.deliveries = Deliveries(database)
        self.commitments = Commitments(database)
        self.claims = Claims(database)
        self.runs = Runs(database)
        self.run_control = RunControl(database)
        self.rate_limits = RateLimits(database)
        self.progress = Progress(database)
        self.rebuild = Rebuild(database)

    @classmethod
    def open(cls, url: str) -> Self:
        """Open the ledger at a URL; create it where there is none, migrate an older one.

        Parameters
        ----------
        url : str
            ``sqlite:///relative`` or ``sqlite:////absolute`` for a file (created with mode 0600),
            ``postgresql+psycopg://…`` for PostgreSQL.

        Raises
        ------
        LedgerError
            ``ledger-unavailable``, ``ledger-too-new``, ``ledger-too-old`` or ``ledger-unsafe``;
            no part of the URL is in its message.
        """
        return cls(Database(*open_database(url)))

    def close(self) -> None:
        """Close all connections; runs that are still open end with them on PostgreSQL."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @translate_database_errors
    def check_integrity(self) -> None:
        """Check every page of a SQLite file; a server has means of its own.

        Raises
        ------
        LedgerError
            ``ledger-damaged``
        """
        if not self._database.is_sqlite:
            return
        with self._database.read() as connection:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if found != "ok":
            raise LedgerError("ledger-damaged", "its pages do not fit together")
