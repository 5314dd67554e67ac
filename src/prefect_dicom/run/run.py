"""A run: what it holds open, composed of its parts.

A :class:`DryRun` finds the studies of a cohort, a :class:`Run` brings them into the archive. The
parts meet in the ledger: discovery turns cohort rows into studies, retrieval brings a chunk of
studies into the spool, archiving puts it into the archive and commits it. The order of writes is
the design (``docs/promise.md``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from prefect_dicom.admission.node_access import NodeAccess
from prefect_dicom.admission.node_failover import NodeFailover
from prefect_dicom.admission.node_notes import NodeNotes
from prefect_dicom.archive import Archive, open_archive
from prefect_dicom.archive.spool import Spool
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.core.clock import Clock
from prefect_dicom.core.events import EventBus
from prefect_dicom.core.model import Disposition, RetrieveMethod
from prefect_dicom.core.reasons import REASONS
from prefect_dicom.core.uids import manifest_key
from prefect_dicom.discovery.service import DiscoveryService
from prefect_dicom.ledger import Cohort, Ledger
from prefect_dicom.ledger import Run as RunRecord
from prefect_dicom.network.storage_scp import check_port
from prefect_dicom.run.archiving import ChunkArchiving
from prefect_dicom.run.chunks import ChunkPlanner
from prefect_dicom.run.commit import StudyCommit, clear_finished
from prefect_dicom.run.context import RunContext
from prefect_dicom.run.control import RunControl
from prefect_dicom.run.disks import DiskWatch
from prefect_dicom.run.in_hand import StudiesInHand
from prefect_dicom.run.node_retrieval import NodeRetrieval
from prefect_dicom.run.reporting import RunReporting
from prefect_dicom.run.retrieval_turns import RetrievalTurns
from prefect_dicom.run.retrieving import ChunkRetrieval
from prefect_dicom.run.upload import Uploader, give_way

_STUDIES_AT_A_TIME = 8


class DryRun:
    """What a run on a cohort holds open to find its studies. Use :func:`open_dry_run`.

    Prefect keeps no copy of it: it is not a dataclass whose fields would be looked through, and
    its text names the run and the cohort by their numbers.

    Parameters
    ----------
    record : ledger.Run
        The run, as the ledger knows it.
    """

    def __init__(
        self, site: Site, ledger: Ledger, cohort: Cohort, record: RunRecord, clock: Clock
    ) -> None:
        control, events = RunControl(ledger, record, clock), EventBus()
        notes = NodeNotes(ledger, cohort)
        access = NodeAccess(site, ledger, record, clock, control, events, self._record_waits)
        self.context = RunContext(
            site=site,
            ledger=ledger,
            cohort=cohort,
            filters=ledger.cohorts.filters(cohort.number),
            record=record,
            clock=clock,
            control=control,
            events=events,
            access=access,
            notes=notes,
            failover=NodeFailover(cohort.nodes, access, notes),
        )
        self.discovery = DiscoveryService(
            site,
            ledger,
            record,
            cohort,
            self.context.filters,
            access,
            self.context.failover,
            notes,
        )
        self.reporting = RunReporting(self.context)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.context.record.number}: cohort {self.cohort.number}>"

    @property
    def site(self) -> Site:
        """The site."""
        return self.context.site

    @property
    def ledger(self) -> Ledger:
        """The ledger, which is open until the run ends."""
        return self.context.ledger

    @property
    def cohort(self) -> Cohort:
        """The cohort."""
        return self.context.cohort

    @property
    def clock(self) -> Clock:
        """What time it is, and how the run waits."""
        return self.context.clock

    @property
    def control(self) -> RunControl:
        """The state that is requested of the run."""
        return self.context.control

    @property
    def events(self) -> EventBus:
        """What the run publishes."""
        return self.context.events

    @property
    def access(self) -> NodeAccess:
        """Access to the nodes."""
        return self.context.access

    @property
    def failover(self) -> NodeFailover:
        """Failover between the cohort's nodes."""
        return self.context.failover

    def _record_waits(self) -> None:
        self.reporting.record_waits()


class Run(DryRun):
    """What a run on a cohort holds open to archive its studies. Use :func:`open_run`.

    Parameters
    ----------
    closing : contextlib.ExitStack
        Closes with the run what is opened while it goes on.
    """

    def __init__(
        self,
        site: Site,
        ledger: Ledger,
        cohort: Cohort,
        record: RunRecord,
        clock: Clock,
        archive: Archive,
        spool: Spool,
        closing: contextlib.ExitStack,
    ) -> None:
        super().__init__(site, ledger, cohort, record, clock)
        # Closed last: what is under way in the threads needs the receiver.
        later = closing.enter_context(contextlib.ExitStack())
        uploads = closing.enter_context(
            ThreadPoolExecutor(
                site.archive.connections, thread_name_prefix="upload", initializer=give_way
            )
        )
        aside = closing.enter_context(
            ThreadPoolExecutor(_STUDIES_AT_A_TIME, thread_name_prefix="study")
        )
        context = self.context
        self.spool = spool
        self.archive = archive
        self.in_hand = StudiesInHand()
        self.chunks = ChunkPlanner(context, spool)
        self.nodes = NodeRetrieval(context, spool, later)
        self.disks = DiskWatch(context, spool)
        self.turns = RetrievalTurns(context, spool, self.in_hand)
        uploader = Uploader(context, spool, archive, uploads)
        ending = StudyCommit(context, spool, archive)
        self.retrieval = ChunkRetrieval(
            context=context,
            discovery=self.discovery,
            planner=self.chunks,
            nodes=self.nodes,
            archive=archive,
            uploader=uploader,
            ending=ending,
            in_hand=self.in_hand,
            turns=self.turns,
            aside=aside,
        )
        self.archiving = ChunkArchiving(
            context=context,
            nodes=self.nodes,
            uploader=uploader,
            ending=ending,
            in_hand=self.in_hand,
            aside=aside,
        )


def reopen_transient(run: DryRun) -> bool:
    """Reopen the rows and studies that failed for a transient reason; whether there are any.

    Not the studies for which this run has tried everything: a rerun tries them again.
    """
    codes = [r.code for r in REASONS.values() if r.disposition is Disposition.TRANSIENT]
    reopened = run.ledger.cohorts.reopen(
        run.cohort.number, reasons=codes, besides=run.context.hopeless
    )
    return bool(reopened.studies or reopened.rows)


def has_work(ledger: Ledger, cohort: int) -> bool:
    """Whether a cohort has rows to query or studies to pull."""
    return bool(ledger.rows.to_discover(cohort, limit=1) or ledger.studies.to_pull(cohort, limit=1))


def check_first(site: Site, ledger: Ledger, cohort: Cohort | None = None) -> None:
    """Check what can be checked without a PACS, and before Prefect is started.

    Parameters
    ----------
    cohort : ledger.Cohort, optional
        Nothing is checked where it has no work left.

    Raises
    ------
    PrefectDicomError
        What is wrong with the files of TLS, the archive, the spool or the receiver's port.
    """
    if cohort is not None and not has_work(ledger, cohort.number):
        return
    site.check_tls_files()
    check_archive(site)
    Spool(site.spool.path, site.spool.reserve_bytes)
    if any(node.retrieve is RetrieveMethod.C_MOVE for node in site.nodes.values()):
        check_port(site)


def check_archive(site: Site) -> None:
    """Check that the archive is there; raises what is wrong with it."""
    with open_archive(site.archive) as archive:
        archive.check_usable()


@contextlib.contextmanager
def open_dry_run(
    site: Site, cohort: str | int, *, ledger: Ledger | None = None, clock: Clock | None = None
) -> Iterator[DryRun]:
    """Open what it takes to find the studies of a registered cohort, and close it again.

    No receiver, no spool and no archive: nothing can be retrieved with it.

    Parameters
    ----------
    cohort : str or int
        Name or number of a cohort in the ledger.
    ledger : Ledger, optional
        The site's ledger, where the caller has it open.
    clock : Clock, optional
        The time that the run goes by.
    """
    site.check_tls_files()
    with contextlib.ExitStack() as stack:
        ledger = ledger or stack.enter_context(Ledger.open(ledger_url(site)))
        known = ledger.cohorts.get(str(cohort))
        record = stack.enter_context(ledger.runs.begin("plan", known.number))
        run = DryRun(site, ledger, known, record, clock or Clock())
        stack.enter_context(_under_way(run))
        yield run


@contextlib.contextmanager
def open_run(
    site: Site,
    cohort: str | int,
    kind: str = "pull",
    clock: Clock | None = None,
    *,
    ledger: Ledger | None = None,
) -> Iterator[Run]:
    """Open all that a run on a registered cohort needs, and close it again.

    Parameters
    ----------
    cohort : str or int
        Name or number of a cohort in the ledger.
    kind : str
        What the ledger calls the run.
    clock : Clock, optional
        The time that the run goes by.
    ledger : Ledger, optional
        The site's ledger, where the caller has it open.
    """
    with contextlib.ExitStack() as stack:
        ledger = ledger or stack.enter_context(Ledger.open(ledger_url(site)))
        known = ledger.cohorts.get(str(cohort))
        archive = stack.enter_context(contextlib.closing(open_archive(site.archive)))
        # What is wrong with the archive shows before the PACS is asked for anything.
        if kind == "rerun" or has_work(ledger, known.number):
            site.check_tls_files()
            archive.check_usable()
        archive.head(manifest_key("0"))
        spool = Spool(site.spool.path, site.spool.reserve_bytes)
        spool.sweep()
        clear_finished(spool, ledger)
        closing = stack.enter_context(contextlib.ExitStack())
        record = stack.enter_context(ledger.runs.begin(kind, known.number))
        run = Run(site, ledger, known, record, clock or Clock(), archive, spool, closing)
        archive.stopping, archive.clock = run.control.is_stopping, run.clock
        stack.enter_context(_under_way(run))
        run.nodes.prepare()
        yield run


@contextlib.contextmanager
def _under_way(run: DryRun) -> Iterator[None]:
    """Report on a run while the block runs; its associations end with the block."""
    run.reporting.start()
    try:
        yield
    except BaseException:
        run.control.stop.set()
        raise
    finally:
        run.reporting.close()
        run.access.close()
