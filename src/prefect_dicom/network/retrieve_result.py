"""The result of one C-MOVE, C-GET or WADO-RS request."""

from __future__ import annotations

from dataclasses import dataclass

from prefect_dicom.network.status import CANCEL, SUCCESS


@dataclass(frozen=True, slots=True)
class RetrieveResult:
    """The end of a retrieve request, PS3.7 9.1.3.1 and 9.1.4.1, as the PACS reports it.

    Evidence and not proof: peers report success with nothing sent, and zeros after they sent
    half. What lies in the spool decides.

    Parameters
    ----------
    status : int or None
        Status of the final response; None where the association ended without one.
    remaining, completed, failed, warning : int or None
        The sub-operation counters of the final response, or of the last one there was. None
        where the peer did not send them.
    failed_sop_instance_uids : tuple of str
        The Failed SOP Instance UID List (0008,0058), where the peer sent one.
    error_comment_present : bool
        Whether there was an Error Comment (0000,0902); its text is the peer's, and stays out.
    lost : str or None
        A code of :mod:`prefect_dicom.core.reasons` where the association ended early.
    turned_away : str or None
        A code of :mod:`prefect_dicom.core.reasons` where nothing was received, and our receiver
        turned away a peer meanwhile: what the PACS reports of it is not the cause.
    accepted : tuple of (str, str)
        SOP class and transfer syntax of the storage contexts that the PACS accepted for a C-GET.
    retry_after_seconds : float or None
        How long the node asks not to be asked again, where it says so.
    """

    status: int | None
    remaining: int | None = None
    completed: int | None = None
    failed: int | None = None
    warning: int | None = None
    failed_sop_instance_uids: tuple[str, ...] = ()
    error_comment_present: bool = False
    lost: str | None = None
    turned_away: str | None = None
    accepted: tuple[tuple[str, str], ...] = ()
    retry_after_seconds: float | None = None

    @property
    def sent(self) -> int:
        """The sub-operations that the peer says to have completed, with a warning or without."""
        return (self.completed or 0) + (self.warning or 0)

    def accounts_for(self, instances: int) -> bool:
        """Whether the final response says of each instance if it was sent, and which were not.

        Believed for what is missing, never for what has been sent: where a PACS says that it
        cannot send an instance there is nothing to wait for.

        Parameters
        ----------
        instances : int
            How many were asked for.
        """
        if self.lost is not None or self.status in (None, CANCEL) or not self.failed:
            return False
        says_which = bool(self.failed_sop_instance_uids) or not self.sent
        return says_which and self.sent + self.failed == instances

    @property
    def reports_success(self) -> bool:
        """Whether the final response says success, without a warning."""
        return self.status == SUCCESS
