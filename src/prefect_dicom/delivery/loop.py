"""The passes of a run that delivers: over and over, while there is reason to; no Prefect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prefect_dicom.admission.node_access import NodeAccess
from prefect_dicom.core.errors import (
    Interrupted,
    PacsError,
    PrefectDicomError,
    WindowClosed,
    is_transient,
)
from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons import REASONS, Scope
from prefect_dicom.delivery.run import DeliveryRun
from prefect_dicom.run.control import RunControl
from prefect_dicom.run.loop import TICK_SECONDS, PassLoop

_AGAIN = frozenset(
    reason.code
    for reason in REASONS.values()
    # What is of the study has had its chances in this run: a target that drops what it accepts.
    if reason.disposition is Disposition.TRANSIENT and reason.scope is not Scope.STUDY
)


@dataclass(kw_only=True)
class DeliveryLoop(PassLoop):
    """The passes of a run that delivers the studies of its cohort."""

    run: DeliveryRun
    deliver: Callable[[], PrefectDicomError | None]
    """Sends and checks every unfinished study once. Returns the error that stopped it, or None."""

    @property
    def access(self) -> NodeAccess:
        """Access to the nodes of the run."""
        return self.run.context.access

    @property
    def control(self) -> RunControl:
        """The state that is requested of the run."""
        return self.run.control

    def look(self) -> None:
        """Nothing: the command shows from the ledger how far the deliveries are."""

    def _passes(self) -> PrefectDicomError | None:
        run, passes = self.run, 1
        admission = self.access.admission(run.context.target)
        trouble = self._one_pass()
        while (
            not admission.disabled_for
            and not run.control.is_stopping()
            and (trouble is None or is_transient(trouble))
            and admission.delay_next_pass(passes)
            and (run.reopen(_AGAIN) or trouble is not None)
        ):
            self._wait_for_target()
            trouble = self._one_pass()
            passes += 1
        return trouble

    def _one_pass(self) -> PrefectDicomError | None:
        try:
            self.access.schedules.check(self.run.context.target)
        except WindowClosed as closed:
            return closed
        return self.deliver()

    def _wait_for_target(self) -> None:
        run = self.run
        admission = self.access.admission(run.context.target)
        while left := admission.seconds_left():
            waited = run.clock.wait(run.control.stop, min(left, TICK_SECONDS))
            if waited or run.control.is_stopping():
                return

    def _wait_for_opening(self) -> bool:
        """Wait until the access schedule opens, where the site wants that; whether to go on."""
        run = self.run
        schedules, target = self.access.schedules, run.context.target
        if not schedules.waits_for_opening(target):
            return False
        self.access.close()
        while left := schedules.seconds_closed(target):
            run.clock.wait(run.control.stop, min(left, run.clock.look_seconds))
            if run.control.is_stopping():
                break
        return True


def remaining_error(
    run: DeliveryRun, trouble: PrefectDicomError | None
) -> PrefectDicomError | None:
    """The error a run ends with; None where people or an access schedule ended it."""
    if isinstance(trouble, Interrupted):
        return None
    if not isinstance(trouble, PacsError):
        return trouble
    admission = run.context.access.admission(run.context.target)
    words = f"node {run.context.target} is disabled" if admission.disabled_for else ""
    detail = "; ".join(filter(None, (trouble.detail, words, "what is left stays due")))
    return PacsError(trouble.code, detail)
