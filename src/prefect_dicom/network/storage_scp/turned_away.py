"""Who was turned away by a storage SCP, by address, AE title and cause, for logs and diagnosis.

A PACS that cannot send to us reports nothing of use. What we turned away while its instances were
due is most likely it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from prefect_dicom.core.reasons import reason_for
from prefect_dicom.network.storage_scp.association_events import (
    REJECTED_CALLED_AE_TITLE,
    REJECTED_LOCAL_LIMIT,
    AssociationEvent,
    Happening,
)

log = logging.getLogger(__name__)

# Peers choose their titles: neither memory nor the log may grow with them.
_MOST_KEPT = 64
_MOST_LINES_AN_HOUR = 60
_HOUR_SECONDS = 3600.0

NOT_ALLOWED = "sender-not-allowed"
OTHER_TITLE = "receiver-title-unknown"
NOT_UNDERSTOOD = "sender-not-understood"


@dataclass(frozen=True, slots=True)
class TurnedAway:
    """A peer that was turned away, and why.

    Parameters
    ----------
    code : str
        Reason code; empty where it may come again, as at the limit of associations.
    peer_address : str
        Its address.
    calling_ae_title, called_ae_title : str
        What it wrote, where it came so far.
    detail : str
        What was wrong, in words.
    """

    code: str
    peer_address: str
    calling_ae_title: str = ""
    called_ae_title: str = ""
    detail: str = ""

    @classmethod
    def of(cls, event: AssociationEvent) -> TurnedAway | None:
        """The peer of an event; None where it was not turned away, or has said nothing."""
        titles = event.peer_address, event.calling_ae_title, event.called_ae_title
        if event.code:
            return cls(event.code, *titles, event.detail)
        if event.happening is Happening.NOT_ALLOWED:
            return cls(NOT_ALLOWED, event.peer_address)
        if event.happening is Happening.REJECTED:
            if event.rejection == REJECTED_CALLED_AE_TITLE:
                return cls(OTHER_TITLE, *titles)
            if event.rejection == REJECTED_LOCAL_LIMIT:
                return cls("", *titles, "the limit of `receiver.associations` is reached")
            numbers = ",".join(map(str, event.rejection or ()))
            return cls(NOT_UNDERSTOOD, *titles, f"rejected with ({numbers})")
        if event.happening is Happening.UNINTELLIGIBLE and event.detail:
            return cls(NOT_UNDERSTOOD, *titles, event.detail)
        return None

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> TurnedAway:
        """The inverse of :meth:`to_message`."""
        return cls(**message)

    def to_message(self) -> dict[str, Any]:
        """As the control protocol has it."""
        return asdict(self)

    @property
    def words(self) -> str:
        """What happened, in a sentence without its stop."""
        who = self.peer_address
        if self.calling_ae_title:
            who += f" ({self.calling_ae_title})"
        if self.code == NOT_ALLOWED:
            return f"a connection from {who} was refused, which is not in `allowed_senders`"
        if self.code == OTHER_TITLE:
            title = f'"{self.called_ae_title}"' if self.called_ae_title else "by no AE title"
            return f"an association from {who} was rejected, which called {title}"
        return f"a connection from {who} was turned away: {self.detail}"


def most_telling(turned_away: Iterable[TurnedAway]) -> TurnedAway | None:
    """The one that best explains why nothing arrived, the latest of its kind.

    Who called a title spoke of a receiver; who was not understood may be anybody.
    """
    explaining = [one for one in turned_away if one.code and _explains(one)]
    # Of equals the last one: they come in the order of time.
    return max(reversed(explaining), key=_explains, default=None)


def _explains(turned_away: TurnedAway) -> int:
    return reason_for(turned_away.code).explains_silence


class TurnedAwayRecord:
    """The peers that were turned away lately, each once, with the time. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[TurnedAway, float] = {}
        self._counts: Counter[str] = Counter()
        self._lines: list[float] = []

    def note(self, event: AssociationEvent) -> None:
        """Keep the peer of an event, and log it if it is new."""
        turned_away = TurnedAway.of(event)
        if turned_away is None:
            return
        now = time.monotonic()
        with self._lock:
            self._counts[turned_away.code or "associations-limit"] += 1
            is_new = self._last.pop(turned_away, None) is None
            self._last[turned_away] = now
            if len(self._last) > _MOST_KEPT:
                del self._last[next(iter(self._last))]
            is_logged = is_new and self._has_room_for_a_line(now)
        if is_logged:
            log.warning("%s", turned_away.words)

    def _has_room_for_a_line(self, now: float) -> bool:
        self._lines = [at for at in self._lines if now - at < _HOUR_SECONDS]
        if len(self._lines) >= _MOST_LINES_AN_HOUR:
            return False
        self._lines.append(now)
        return True

    def counts(self) -> dict[str, int]:
        """How many were turned away in all, by reason."""
        with self._lock:
            return dict(self._counts)

    def since(self, moment: float) -> list[TurnedAway]:
        """Those that were turned away since then (of ``time.monotonic``), the latest last."""
        with self._lock:
            return [one for one, at in self._last.items() if at >= moment]
