"""The run loop: pass after pass over a cohort, while there is reason to; no Prefect.

A pass queries all unresolved rows, then pulls all unfinished studies, once. Another pass follows if
the node failed or something failed for a transient reason. Before it, the loop waits for the next
value of ``retry_after_seconds``. After the last value, or if a person must act, the rest stays
pending for a rerun.

A run whose cohort is paused gives back what it has in hand, waits in place and goes on with
another pass. One that is cancelled ends at once: what it leaves is what a run leaves that was
killed, and the ledger knows all of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from prefect_dicom.admission.node_access import NodeAccess
from prefect_dicom.core.errors import (
    Interrupted,
    PacsError,
    PrefectDicomError,
    WindowClosed,
    is_transient,
)
from prefect_dicom.core.model import Chunk, RequestedState, Verdict
from prefect_dicom.ledger import Totals
from prefect_dicom.run.control import RunControl
from prefect_dicom.run.run import DryRun, Run, reopen_transient

TICK_SECONDS = 2.0
"""How often a run that waits looks around."""


class Show(Protocol):
    """Shows people how far a cohort is, and what its run waits for."""

    def __call__(
        self, count: Callable[[], Totals], waits: str = "", *, now: bool = False
    ) -> None: ...


class PassLoop(ABC):
    """Passes of a run, again after a pause and after the opening of an access schedule."""

    @property
    @abstractmethod
    def access(self) -> NodeAccess:
        """Access to the nodes of the run."""

    @property
    @abstractmethod
    def control(self) -> RunControl:
        """The state that is requested of the run."""

    def work_through(self) -> PrefectDicomError | None:
        """Make pass after pass. Returns the error that stopped the last one, or None.

        A run that begins while its cohort is paused ends at once: those that a schedule begins
        do not pile up. One that was under way waits.
        """
        if self.control.requested_state() is RequestedState.PAUSED:
            return Interrupted()
        while True:
            trouble = self._passes()
            if not isinstance(trouble, Interrupted):
                return trouble
            if isinstance(trouble, WindowClosed) and not self.control.is_stopping():
                if not self._wait_for_opening():
                    return trouble
            elif not self._wait_while_paused():
                return trouble

    @abstractmethod
    def look(self) -> None:
        """Show where the run is, as often as somebody likes."""

    @abstractmethod
    def _passes(self) -> PrefectDicomError | None:
        """Make pass after pass, until people or an access schedule stop the run."""

    @abstractmethod
    def _wait_for_opening(self) -> bool:
        """Wait until an access schedule opens, where the site wants that; whether to go on."""

    def _wait_while_paused(self) -> bool:
        """Wait where the run is paused, without an association; whether it is to go on."""
        if self.control.requested_state() is RequestedState.PAUSED:
            self.access.close()
            return self.control.wait_while_paused(self.look)
        return self.control.requested_state() is RequestedState.RUNNING


@dataclass(kw_only=True)
class DiscoveryLoop(PassLoop):
    """The passes of a run that finds the studies of its cohort, and no more."""

    run: DryRun
    discover: Callable[[int, int], PrefectDicomError | None]
    """Queries the rows of some lines, first to last. Returns the error that stopped it, or None."""
    show: Show
    say: Callable[[str], None]
    """Says what the run waits for, once, as text for people."""
    limits: Callable[[], AbstractContextManager[None]]
    """Held while the nodes may be asked: concurrency limits that others grant."""

    @property
    def access(self) -> NodeAccess:
        """Access to the nodes of the run."""
        return self.run.access

    @property
    def control(self) -> RunControl:
        """The state that is requested of the run."""
        return self.run.control

    def one_pass(self) -> PrefectDicomError | None:
        """Query every unresolved row once. Returns the error that stopped the pass, or None.

        Those that another run has taken are among them: which studies there are of a patient is
        known when all have been asked for.
        """
        trouble = self._discover_all()
        while trouble is None and self._wait_for_others(self.run.discovery.rows_of_others, "rows"):
            trouble = self._discover_all()
        return trouble

    def look(self) -> None:
        """Show where the cohort is, and record it; as often as somebody likes."""
        self._show()
        self.run.reporting.sample()

    def _show(self, *, now: bool = False) -> None:
        reporting = self.run.reporting
        self.show(reporting.totals, reporting.format_waits(), now=now)

    # --- passes

    def _passes(self) -> PrefectDicomError | None:
        """Make pass after pass, until people or an access schedule stop the run."""
        passes = 1
        with self.limits():
            trouble = self.one_pass()
            while self._is_worth_another(trouble) and self._schedule_another(trouble, passes):
                self.say(self.run.reporting.format_waits() or "another pass")
                self.run.reporting.record_waits()
                self._wait_for_nodes()
                self.run.reporting.record_waits()
                trouble = self.one_pass()
                passes += 1
        return trouble

    def _is_worth_another(self, trouble: PrefectDicomError | None) -> bool:
        """Whether a node can still be asked, and no person has to act first."""
        if not self.run.failover.enabled() or self.run.control.is_stopping():
            return False
        trouble = self._without_disabled(trouble)
        return trouble is None or is_transient(trouble) or self._is_waited_for(trouble)

    def _schedule_another(self, trouble: PrefectDicomError | None, passes: int) -> bool:
        """Delay the nodes and reopen what failed for a transient reason.

        Returns
        -------
        bool
            False where there is nothing to do for another pass, or no pass is left.
        """
        trouble = self._without_disabled(trouble)
        if self._is_waited_for(trouble):
            return True
        admissions = [self.run.access.admission(node) for node in self.run.failover.enabled()]
        delayed = [admission.delay_next_pass(passes) for admission in admissions]
        # Last, because it changes what has failed: only where it is going to be tried again.
        return any(delayed) and (reopen_transient(self.run) or trouble is not None)

    def _without_disabled(self, trouble: PrefectDicomError | None) -> PrefectDicomError | None:
        """The error of a pass, unless other nodes are asked for what a disabled one was to be."""
        if isinstance(trouble, PacsError) and self.run.failover.disabled():
            return None
        return trouble

    def _is_waited_for(self, trouble: PrefectDicomError | None) -> bool:
        """Whether a node has failed and is waiting."""
        failover = self.run.failover
        return isinstance(trouble, PacsError) and any(
            self.run.access.admission(node).seconds_left() for node in failover.enabled()
        )

    def _discover_all(self) -> PrefectDicomError | None:
        if self.run.control.is_stopping():
            return Interrupted()
        for first_line, last_line in self.run.discovery.pages():
            if (trouble := self.discover(first_line, last_line)) is not None:
                return trouble
            self.look()
        return None

    # --- waits

    def _wait_for_nodes(self) -> None:
        """Wait until a node may be asked, and show it."""
        run = self.run
        self._show(now=True)
        while left := run.failover.seconds_left():
            waited = run.clock.wait(run.control.stop, min(left, TICK_SECONDS))
            if waited or run.control.is_stopping():
                return
            self.look()

    def _wait_for_opening(self) -> bool:
        """Wait until an access schedule opens, where the site wants that; whether to go on."""
        run = self.run
        schedules = run.access.schedules
        closed = [node for node in run.cohort.nodes if schedules.waits_for_opening(node)]
        if not closed:
            return False
        run.access.close()
        self._show(now=True)
        while left := min(map(schedules.seconds_closed, closed)):
            run.clock.wait(run.control.stop, min(left, run.clock.look_seconds))
            if run.control.is_stopping():
                break
            self.look()
        return True

    def _wait_for_others(self, held_by_others: Callable[[], tuple[int, bool]], what: str) -> bool:
        """Wait for what other runs work on; whether some of it has fallen free, unfinished.

        Parameters
        ----------
        held_by_others : callable
            Says how much of it they hold, and whether some has fallen free.
        """
        run = self.run
        said = False
        # What falls free may be a disabled node's, which this run does not ask any more.
        disabled = bool(run.failover.disabled())
        while not run.control.is_stopping():
            held, fallen_free = held_by_others()
            if fallen_free or not held or disabled:
                if said:
                    run.reporting.record_waits()
                return fallen_free and not disabled
            words = f"waiting for {held} {what} that another run works on"
            if not said:
                said = True
                self.say(words)
                run.reporting.record_waits(words)
            self.show(run.reporting.totals, words)
            run.clock.wait(run.control.stop, TICK_SECONDS)
        # Paused or cancelled: what is left is not done, and that keeps the pass from its end.
        return True


@dataclass(kw_only=True)
class PullLoop(DiscoveryLoop):
    """The passes of a run that brings the studies of its cohort into the archive."""

    run: Run
    pull: Callable[[], PrefectDicomError | None]
    """Pulls every unfinished study once. Returns the error that stopped it, or None."""

    def look(self) -> None:
        """Show where the cohort is, record it, and warn of disks that fill up."""
        super().look()
        self.run.disks.look()

    def one_pass(self) -> PrefectDicomError | None:
        """Query all unresolved rows, then pull all unfinished studies, once.

        What other runs were working on belongs to it: they may die over it, on other hosts too.

        Returns
        -------
        PrefectDicomError or None
            The error that stopped the pass.
        """
        run = self.run
        if all(map(run.access.is_closed, run.cohort.nodes)):
            # No task is begun only to say that its time has not come.
            return WindowClosed()
        trouble = super().one_pass()
        needs_all = run.context.filters.per_patient is not None
        if trouble is None or (isinstance(trouble, WindowClosed) and not needs_all):
            # Of several nodes another one may be asked, for what was found there.
            trouble = self._pull_from_all() or trouble
        while trouble is None and self._wait_for_others(run.chunks.studies_of_others, "studies"):
            trouble = self._pull_from_all()
        return trouble

    def _pull_from_all(self) -> PrefectDicomError | None:
        """Pull all unfinished studies; at once from the next node where one has failed."""
        failover = self.run.failover
        failover.take_request()
        trouble = self.pull()
        while failover.take_request() and not self.run.control.is_stopping():
            trouble = self.pull() or trouble
        return trouble


def remaining_error(
    run: DryRun, trouble: PrefectDicomError | None, totals: Totals
) -> PrefectDicomError | None:
    """The error a run ends with, of the error that stopped its last pass.

    None where people or an access schedule ended it, or where the cohort has come to its end
    without a node that was disabled.
    """
    failover = run.failover
    missing = next((node for node in failover.nodes if failover.can_continue_without(node)), None)
    if missing is not None and (trouble is None or isinstance(trouble, PacsError)):
        if not totals.rows[Verdict.PENDING]:
            # Noted with the cohort.
            return None
        code = run.access.admission(missing).disabled_for
        trouble = PacsError(code) if trouble is None and code is not None else trouble
    if isinstance(trouble, Interrupted):
        return None
    if not isinstance(trouble, PacsError):
        return trouble
    left = totals.rows[Verdict.PENDING]
    disabled = " and ".join(f"node {node} is disabled" for node in failover.disabled())
    words = (trouble.detail, disabled, f"{left} rows stay pending, none is lost")
    return PacsError(trouble.code, "; ".join(filter(None, words)))


def note_disabled_nodes(run: DryRun) -> None:
    """Note with the cohort which node was disabled, where the others were asked in its stead."""
    for node in run.failover.nodes:
        if run.failover.continue_without(node):
            return


def work_through(run: Run) -> None:
    """Bring a cohort as far as it goes, one step after the other in this thread.

    For notebooks and tests: no Prefect, no second pass, and errors come out. Of several nodes the
    next one is asked at once for what one has failed at.
    """
    for first_line, last_line in run.discovery.pages():
        run.discovery.discover(first_line, last_line)
    while True:
        run.failover.take_request()
        for node, chunks in run.chunks.chunks_by_node().items():
            _pull_chunks(run, node, chunks)
        if not run.failover.take_request():
            return


def _pull_chunks(run: Run, node: str, chunks: Iterator[Chunk]) -> None:
    for chunk in chunks:
        try:
            run.retrieval.retrieve(chunk)
            run.archiving.archive(chunk)
        except PacsError:
            if not run.failover.continue_without(node):
                raise
            return
        finally:
            run.archiving.give_back(chunk)
