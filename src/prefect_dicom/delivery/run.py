"""A run that delivers the studies of a cohort to one target: what it holds open, and its passes."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from contextlib import ExitStack

from prefect_dicom.admission.node_access import NodeAccess
from prefect_dicom.archive import open_archive
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.core.clock import Clock
from prefect_dicom.core.errors import PrefectDicomError
from prefect_dicom.core.events import EventBus
from prefect_dicom.core.model import Chunk
from prefect_dicom.core.reasons import WORTH_A_RERUN
from prefect_dicom.delivery.chunk import ChunkDelivery
from prefect_dicom.delivery.commitments import CommitmentRequests
from prefect_dicom.delivery.context import DeliveryContext, check_source, destination_of
from prefect_dicom.ledger import Cohort, DeliveryTotals, Ledger
from prefect_dicom.run.control import RunControl


class DeliveryRun:
    """What a run that delivers holds open. Use :func:`open_delivery`.

    Prefect keeps no copy of it, and its text names the run and the cohort by their numbers.
    """

    def __init__(self, context: DeliveryContext, chunks: ChunkDelivery) -> None:
        self.context = context
        self.chunks = chunks
        self.commitments = CommitmentRequests(context, chunks)

    def __repr__(self) -> str:
        context = self.context
        return f"<{type(self).__name__} {context.record.number}: cohort {context.cohort.number}>"

    @property
    def control(self) -> RunControl:
        """The state that is requested of the run."""
        return self.context.control

    @property
    def cohort(self) -> Cohort:
        """The cohort."""
        return self.context.cohort

    @property
    def clock(self) -> Clock:
        """What time it is, and how the run waits."""
        return self.context.clock

    @property
    def events(self) -> EventBus:
        """What the run publishes."""
        return self.context.events

    def totals(self) -> DeliveryTotals:
        """How far the deliveries are."""
        return self.context.ledger.deliveries.totals(self.cohort.number, self.context.target)

    def format_waits(self) -> str:
        """What the run waits for, or sends less for; empty if nothing."""
        access, target = self.context.access, self.context.target
        words = (access.format_state(target), access.schedules.format(target))
        return "; ".join(filter(None, words))

    def plan(self) -> Iterator[Chunk]:
        """Cut the unfinished deliveries into chunks."""
        context = self.context
        size = context.node.limits.chunk_studies
        after, number = 0, 0
        while True:
            page = context.ledger.deliveries.unfinished(
                context.cohort.number, context.target, context.method, after
            )
            for start in range(0, len(page), size):
                number += 1
                yield Chunk(number, context.target, tuple(page[start : start + size]))
            if not page:
                return
            after = page[-1]

    def deliver(self, chunk: Chunk) -> str:
        """Send and verify the studies that no other run has claimed, as a step of the run."""
        worked = self.chunks.deliver(chunk.studies)
        return f"{worked} of {len(chunk.studies)} studies worked on"

    def take_reports(self) -> PrefectDicomError | None:
        """Request and judge storage commitment. Returns the error that stopped it, or None."""
        try:
            self.commitments.conclude()
        except PrefectDicomError as error:
            return error
        return None

    def reopen(self, reasons: Collection[str] = ()) -> int:
        """Make deliveries due again that failed for one of these reasons; how many.

        Without any: for those where trying again can help.
        """
        context = self.context
        return context.ledger.deliveries.reopen(
            context.cohort.number, context.target, reasons or WORTH_A_RERUN
        )


@contextlib.contextmanager
def open_delivery(
    site: Site,
    cohort: str | int,
    target: str,
    *,
    source: str | None = None,
    clock: Clock | None = None,
    ledger: Ledger | None = None,
    reasons: tuple[str, ...] = (),
) -> Iterator[DeliveryRun]:
    """Open all that a delivery of a registered cohort needs, and close it again.

    Its studies are due afterwards, unless they have been delivered to the target before; what has
    failed is due again where trying again can help.

    Parameters
    ----------
    cohort : str or int
        Name or number of a cohort in the ledger.
    target : str
        A node with ``destination`` in the site file.
    source : str, optional
        A node that sends the studies by C-MOVE; by default we send them from the archive.
    reasons : tuple of str
        Reason codes of failures that are to be tried again; by default those that are not
        permanent.

    Raises
    ------
    ConfigurationError
        The target is no destination, or the source cannot be one.
    """
    destination_of(site, target)
    check_source(site, target, source)
    with ExitStack() as stack:
        ledger = ledger or stack.enter_context(Ledger.open(ledger_url(site)))
        known = ledger.cohorts.get(str(cohort))
        archive = stack.enter_context(contextlib.closing(open_archive(site.archive)))
        record = stack.enter_context(ledger.runs.begin("deliver", known.number))
        clock = clock or Clock()
        control, events = RunControl(ledger, record, clock), EventBus()
        access = NodeAccess(site, ledger, record, clock, control, events, lambda: None)
        context = DeliveryContext(
            site=site,
            ledger=ledger,
            cohort=known,
            target=target,
            source=source,
            record=record,
            clock=clock,
            control=control,
            events=events,
            access=access,
        )
        stack.callback(access.close)
        run = DeliveryRun(context, ChunkDelivery(context, archive))
        run.reopen(reasons)
        ledger.deliveries.add(known.number, target, context.method)
        try:
            yield run
        except BaseException:
            control.stop.set()
            raise


def deliver_all(run: DeliveryRun) -> None:
    """Deliver a cohort as far as it goes, one chunk after the other in this thread.

    For notebooks and tests: no Prefect, no second pass, and errors come out.
    """
    for chunk in run.plan():
        run.chunks.deliver(chunk.studies)
    run.commitments.conclude()
