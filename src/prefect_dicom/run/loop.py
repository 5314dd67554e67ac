"""Pass after pass over a cohort, while there is reason to; no Prefect.

A pass asks for all open rows, then pulls all open studies, once. One that the node has kept from
its end is followed by another when the admission of its node says so: one that stopped at a failure
of the node, and one that left something undone for a passing reason, wait by the same admission.
When that is used up, or a person has to act first, what is left stays pending for a rerun.

A run whose cohort is paused gives back what it has in hand, waits in place and goes on with
another pass. One that is told to end does so at once: what it leaves is what a run leaves that
was killed, and the ledger knows all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from prefect_dicom.core.errors import (
    Interrupted,
    PacsError,
    PrefectDicomError,
    WindowClosed,
    passes_by_itself,
)
from prefect_dicom.core.model import RequestedState, Verdict
from prefect_dicom.ledger import Totals
from prefect_dicom.run.planning import Plan
from prefect_dicom.run.steps import Pull

TICK_SECONDS = 2.0
"""How often a run that waits looks around."""


class Show(Protocol):
    """Shows people how far a cohort is, and what its run waits for."""

    def __call__(
        self, count: Callable[[], Totals], waits: str = "", *, now: bool = False
    ) -> None: ...


@dataclass(kw_only=True)
class Passes:
    """The passes of a run that finds the studies of its cohort, and no more."""

    plan: Plan
    ask_for_rows: Callable[[int, int], PrefectDicomError | None]
    """Asks for the rows of these lines, the first and the last; what kept it from its end."""
    show: Show
    say: Callable[[str], None]
    """Says what the run waits for, once, in words for people."""
    share: Callable[[], AbstractContextManager]
    """Held while the nodes may be asked: a share in what others grant of them."""

    def run(self) -> PrefectDicomError | None:
        """Pass after pass; returns what kept the last one from its end.

        A run that begins while its cohort is paused ends at once: those that a schedule begins
        do not pile up. One that was under way waits.
        """
        if self.plan.told() is RequestedState.PAUSED:
            return Interrupted()
        while True:
            trouble = self._until_told()
            if not isinstance(trouble, Interrupted):
                return trouble
            if isinstance(trouble, WindowClosed) and not self.plan.is_stopping():
                if not self._wait_for_window():
                    return trouble
                continue
            if not self.plan.wait_in_place(self.look):
                return trouble

    def one_pass(self) -> PrefectDicomError | None:
        """Ask for all open rows, once; returns what kept it from its end.

        Those that another run has taken are among them: which studies there are of a patient is
        known when all have been asked for.
        """
        trouble = self._ask_for_rows()
        while trouble is None and self._others_leave(self.plan.rows_of_others, "rows"):
            trouble = self._ask_for_rows()
        return trouble

    def look(self) -> None:
        """Show where the cohort is, and write it down; as often as somebody likes."""
        self.show(self._count, self.plan.waits())
        self.plan.sample()

    def _count(self) -> Totals:
        return self.plan.ledger.progress.totals(self.plan.cohort.number)

    def _until_told(self) -> PrefectDicomError | None:
        """Pass after pass, until people or the clock want something else of the run."""
        passes = 0
        with self.share():
            trouble = self.one_pass()
            while self._worth_another(trouble, passes := passes + 1):
                self.say(self.plan.waits() or "another pass")
                self._wait()
                trouble = self.one_pass()
        return trouble

    def _worth_another(self, trouble: PrefectDicomError | None, passes: int) -> bool:
        """Whether there is to be another pass; the node's admission then says when."""
        plan = self.plan
        admissions = [
            admission
            for admission in map(plan.admission, plan.cohort.nodes)
            if not admission.disabled_for
        ]
        if not admissions or plan.is_stopping():
            return False
        if isinstance(trouble, PacsError) and len(admissions) < len(plan.cohort.nodes):
            # What that node was to be asked for, the others are.
            trouble = None
        if isinstance(trouble, PacsError) and any(
            admission.seconds_left() for admission in admissions
        ):
            return True
        if trouble is not None and not passes_by_itself(trouble):
            return False
        # Last, because it changes what has failed: only where it is going to be tried again.
        rested = [admission.delay_next_pass(passes) for admission in admissions]
        return any(rested) and (plan.reopen_transient() or trouble is not None)

    def _wait(self) -> None:
        """Wait until a node may be asked, and show it."""
        plan = self.plan
        self.show(self._count, plan.waits(), now=True)
        while left := plan.seconds_left():
            if plan.clock.wait(plan.stop, min(left, TICK_SECONDS)) or plan.is_stopping():
                return
            self.look()

    def _wait_for_window(self) -> bool:
        """Wait until a node may be asked again, where the site wants it so; whether to go on."""
        plan = self.plan
        closed = [node for node in plan.cohort.nodes if plan.schedules.waits_for_opening(node)]
        if not closed:
            return False
        plan.close_requestors()
        self.show(self._count, plan.waits(), now=True)
        while left := min(map(plan.schedules.seconds_closed, closed)):
            plan.clock.wait(plan.stop, min(left, plan.clock.look_seconds))
            if plan.is_stopping():
                break
            self.look()
        return True

    def _ask_for_rows(self) -> PrefectDicomError | None:
        if self.plan.is_stopping():
            return Interrupted()
        for first_line, last_line in self.plan.discovery_pages():
            if (trouble := self.ask_for_rows(first_line, last_line)) is not None:
                return trouble
            self.look()
        return None

    def _others_leave(self, held_by_others: Callable[[], tuple[int, bool]], what: str) -> bool:
        """Wait for what other runs work on; whether some of it has fallen free, unfinished.

        Parameters
        ----------
        held_by_others : callable
            Says how much of it they hold, and whether some has fallen free.
        """
        plan = self.plan
        told = False
        # What falls free may be a disabled node's, which this run does not ask any more.
        disabled = any(plan.admission(node).disabled_for for node in plan.cohort.nodes)
        while not plan.is_stopping():
            held, fallen_free = held_by_others()
            if fallen_free or not held or disabled:
                return fallen_free and not disabled
            words = f"waiting for {held} {what} that another run works on"
            if not told:
                told = True
                self.say(words)
            self.show(self._count, words)
            plan.clock.wait(plan.stop, TICK_SECONDS)
        # Told to wait or to end: what is left is not done, and that keeps it from its end.
        return True


@dataclass(kw_only=True)
class PullPasses(Passes):
    """The passes of a run that brings the studies of its cohort into the archive."""

    plan: Pull
    pull_studies: Callable[[], PrefectDicomError | None]
    """Brings all open studies, once; what kept it from its end."""

    def one_pass(self) -> PrefectDicomError | None:
        """All open rows, then all open studies, once; returns what kept it from its end.

        What other runs were working on belongs to it: they may die over it, on other hosts too.
        """
        pull = self.plan
        if all(map(pull.is_closed, pull.cohort.nodes)):
            # No task is begun only to say that its time has not come.
            return WindowClosed()
        trouble = super().one_pass()
        needs_all = pull.filters.per_patient is not None
        if trouble is None or (isinstance(trouble, WindowClosed) and not needs_all):
            # Of several nodes another one may be asked, for what was found there.
            trouble = self._pull_and_turn() or trouble
        while trouble is None and self._others_leave(pull.left_to_others, "studies"):
            trouble = self._pull_and_turn()
        return trouble

    def _pull_and_turn(self) -> PrefectDicomError | None:
        """All open studies; what one node has failed at, the next one is asked for at once."""
        self.plan.take_turned()
        trouble = self.pull_studies()
        while self.plan.take_turned() and not self.plan.is_stopping():
            trouble = self.pull_studies() or trouble
        return trouble


def what_is_left(
    plan: Plan, trouble: PrefectDicomError | None, totals: Totals
) -> PrefectDicomError | None:
    """What the user has to be told as the run's failure, of what kept its last pass from its end.

    Nothing where people or the clock ended it, or where the cohort has come to its end without
    a node that was left alone.
    """
    missing = next((node for node in plan.cohort.nodes if plan.others_go_on(node)), None)
    if missing is not None and (trouble is None or isinstance(trouble, PacsError)):
        if not totals.rows[Verdict.PENDING]:
            # Noted with the cohort.
            return None
        trouble = trouble or PacsError(plan.admission(missing).disabled_for)
    if isinstance(trouble, Interrupted):
        return None
    if not isinstance(trouble, PacsError):
        return trouble
    left = totals.rows[Verdict.PENDING]
    nodes = [
        node for node in plan.cohort.nodes if plan.admission(node).disabled_for
    ] or plan.cohort.nodes
    named = " and ".join(f"node {node}" for node in nodes)
    words = f"{named} is left alone now; {left} rows stay pending, none is lost"
    return PacsError(trouble.code, "; ".join(filter(None, (trouble.detail, words))))
