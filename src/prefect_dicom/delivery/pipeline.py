"""What the delivering flow does, with any engine: send and check chunk by chunk, then report."""

from __future__ import annotations

import contextlib
import queue

from prefect_dicom.config.site import Site
from prefect_dicom.core.errors import Interrupted, PrefectDicomError, WindowClosed
from prefect_dicom.delivery.loop import DeliveryLoop, remaining_error
from prefect_dicom.delivery.monitoring import delivery_measured
from prefect_dicom.delivery.run import DeliveryRun, open_delivery
from prefect_dicom.ledger import Ledger
from prefect_dicom.report.deliveries import format_delivery, write_deliveries
from prefect_dicom.run.artifacts import artifact_key
from prefect_dicom.run.chunk_stages import ends_a_pass
from prefect_dicom.run.engine import Artifact, ArtifactKind, EndName, Engine, RunEnd, StepRun
from prefect_dicom.run.loop import TICK_SECONDS


def deliver(
    engine: Engine,
    site: Site,
    ledger: Ledger,
    cohort: str,
    target: str,
    reasons: tuple[str, ...] = (),
    source: str | None = None,
) -> RunEnd:
    """Deliver the archived studies of a cohort as far as possible now.

    Parameters
    ----------
    cohort : str
        Name or number.
    target : str
        A node with ``destination``.
    reasons : tuple of str
        Failures that are tried again; by default those that are not permanent.
    source : str, optional
        A node that sends the studies by C-MOVE; by default we send them from the archive.

    Raises
    ------
    PrefectDicomError
        The error that stopped the last pass; what is verified stays so.
    """
    with open_delivery(site, cohort, target, source=source, ledger=ledger, reasons=reasons) as run:
        with delivery_measured(run), engine.events(run), engine.controlled(run):
            loop = DeliveryLoop(run=run, deliver=lambda: _in_chunks(run, engine))
            trouble = loop.work_through()
            totals = run.totals()
            words = format_delivery(totals)
            engine.info(f"cohort {run.cohort.name} to {target}: {words}")
            if run.control.is_cancelled():
                return RunEnd(EndName.CANCELLED, f"{words}; the next run continues from here")
            _report(run, engine, words)
            error = remaining_error(run, trouble)
            if error is not None:
                engine.error(f"{error.reason.meaning} {error.reason.what_to_do}")
                raise error
        if totals.is_verified:
            return RunEnd(EndName.COMPLETED, words)
        return RunEnd(EndName.PARTIAL, "; ".join(filter(None, (words, run.format_waits()))))


def _report(run: DeliveryRun, engine: Engine, words: str) -> None:
    context, totals = run.context, run.totals()
    write_deliveries(context.ledger, run.cohort, context.target, context.site.reports)
    counts = [*totals.states.items(), *totals.reasons.items()]
    engine.create_artifact(
        Artifact(
            ArtifactKind.TABLE,
            artifact_key("deliveries", f"{run.cohort.name}-{context.target}"),
            words,
            [{"deliveries": str(what), "count": count} for what, count in counts],
        )
    )


def _in_chunks(run: DeliveryRun, engine: Engine) -> PrefectDicomError | None:
    """Deliver every unfinished study once. Returns the error that stopped it, or None."""
    context = run.context
    chunks = run.plan()
    finished: queue.SimpleQueue[StepRun] = queue.SimpleQueue()
    under_way: list[StepRun] = []
    trouble: PrefectDicomError | None = None
    failed_in_a_row = 0
    ended = False
    try:
        while True:
            if run.control.is_stopping():
                trouble, ended = Interrupted(), True
            elif context.access.is_closed(context.target):
                trouble, ended = trouble or WindowClosed(), True
            while not ended and len(under_way) < context.access.associations(context.target):
                chunk = next(chunks, None)
                if chunk is None:
                    ended = True
                    break
                step = engine.deliver(run, chunk)
                under_way.append(step)
                step.add_done_callback(finished.put)
            if not under_way:
                return trouble or run.take_reports()
            with contextlib.suppress(queue.Empty):
                step = finished.get(timeout=TICK_SECONDS)
                under_way.remove(step)
                error = step.wait()
                if error is None:
                    failed_in_a_row = 0
                    continue
                trouble = error
                failed_in_a_row += 1
                ended |= ends_a_pass(error, failed_in_a_row)
    except BaseException:
        # Steps under way end first: they use what the caller closes next.
        run.control.stop.set()
        for step in under_way:
            step.wait()
        raise
