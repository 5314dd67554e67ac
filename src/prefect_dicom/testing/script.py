"""The script of a :class:`~prefect_dicom.testing.pacs.ScriptedPacs`: misbehaviour as data.

Before the PACS carries out a request, the behaviours of its script edit the plan of it
(:mod:`prefect_dicom.testing.plans`). :data:`KNOBS` is the table of all behaviours; a further one is
a further row in the ``knobs_`` module of its subject.

Examples
--------
>>> Behaviour("find.cap", answers=5, times=1)
Behaviour('find.cap', answers=5, times=1)
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from prefect_dicom.testing.knobs_answers import ANSWER_KNOBS
from prefect_dicom.testing.knobs_association import ASSOCIATION_KNOBS
from prefect_dicom.testing.knobs_change import CHANGE_KNOBS
from prefect_dicom.testing.knobs_find import FIND_KNOBS
from prefect_dicom.testing.knobs_identity import IDENTITY_KNOBS
from prefect_dicom.testing.knobs_keep import KEEP_KNOBS
from prefect_dicom.testing.knobs_network import NETWORK_KNOBS
from prefect_dicom.testing.knobs_retrieve import RETRIEVE_KNOBS
from prefect_dicom.testing.knobs_store import STORE_KNOBS
from prefect_dicom.testing.knobs_web import WEB_KNOBS
from prefect_dicom.testing.plans import Knob, Plan, Stage, SubOperation

KNOBS: dict[str, Knob] = {
    knob.name: knob
    for knob in (
        *ASSOCIATION_KNOBS,
        *FIND_KNOBS,
        *IDENTITY_KNOBS,
        *ANSWER_KNOBS,
        *CHANGE_KNOBS,
        *RETRIEVE_KNOBS,
        *STORE_KNOBS,
        *KEEP_KNOBS,
        *NETWORK_KNOBS,
        *WEB_KNOBS,
    )
}
"""All knobs by their name."""


class Behaviour:
    """One misbehaviour in the script of a PACS: a knob, its arguments, and limits.

    Parameters
    ----------
    knob : str
        Name in :data:`KNOBS`.
    service : str, optional
        Only requests of this service ("A-ASSOCIATE", "C-FIND", "C-MOVE", "C-GET", "C-STORE"; of a
        DICOMweb server "QIDO-RS", "WADO-RS").
    on_request : int, optional
        Only the request with this number, counted for each service from 1; every connection
        that comes is a request of A-ASSOCIATE.
    study : str, optional
        Only requests that concern this StudyInstanceUID, and of those only its instances.
    times : int, optional
        Only this number of times; requests at which the knob found nothing to do do not count.
    probability : float, optional
        Only with this probability, drawn for each request that all of the above lets through.
    seed : int
        Seed of these draws.
    **arguments
        Arguments of the knob.

    Raises
    ------
    ValueError
        If there is no such knob.
    TypeError
        If the knob does not have such arguments.
    """

    def __init__(
        self,
        knob: str,
        *,
        service: str | None = None,
        on_request: int | None = None,
        study: str | None = None,
        times: int | None = None,
        probability: float | None = None,
        seed: int = 0,
        **arguments: Any,
    ) -> None:
        if knob not in KNOBS:
            raise ValueError(f"no knob {knob!r}; there are {', '.join(sorted(KNOBS))}")
        self.knob = knob
        self.service = service
        self.on_request = on_request
        self.study = study
        self.times = times
        self.probability = probability
        self.seed = seed
        self.arguments = arguments
        self.chosen: dict[str, frozenset[str]] = {}
        """SOP Instance UIDs picked by number, per study, for later requests."""
        self._lock = threading.Lock()
        self._lots = random.Random(seed)
        self._used = 0
        self._row = KNOBS[knob]
        inspect.signature(self._row.apply).bind(None, self, **arguments)

    def __repr__(self) -> str:
        limits = {
            "service": self.service,
            "on_request": self.on_request,
            "study": self.study,
            "times": self.times,
            "probability": self.probability,
            "seed": self.seed or None,
        }
        words = self.arguments | {k: v for k, v in limits.items() if v is not None}
        return f"Behaviour({self.knob!r}{''.join(f', {k}={v!r}' for k, v in words.items())})"

    @property
    def used(self) -> int:
        """Number of requests changed so far."""
        return self._used

    def apply(self, stage: Stage, service: str, number: int, plan: Plan) -> None:
        """Edit the plan of a request, if the limits of the behaviour allow it."""
        if stage not in self._row.stages:
            return
        if self.service not in (None, service):
            return
        if self.on_request not in (None, number):
            return
        if self.study is not None and not plan.concerns(self.study):
            return
        with self._lock:
            if self.times is not None and self._used >= self.times:
                return
            if self.probability is not None and self._lots.random() >= self.probability:
                return
            if self._row.apply(plan, self, **self.arguments) is not False:
                self._used += 1

    def pick(
        self, operations: Iterable[SubOperation], instances: int | Sequence[str]
    ) -> list[SubOperation]:
        """Select sub-operations.

        Parameters
        ----------
        operations : iterable of SubOperation
            Sub-operations of the plan.
        instances : int or sequence of str
            SOP Instance UIDs, or a number per study: the last ones of the first request that sends
            the study, and the same ones in later requests.
        """
        operations = [o for o in operations if self.study in (None, o.stored.study_instance_uid)]
        if not isinstance(instances, int):
            return [o for o in operations if o.stored.sop_instance_uid in instances]
        by_study: dict[str, list[str]] = {}
        for operation in operations:
            by_study.setdefault(operation.stored.study_instance_uid, []).append(
                operation.stored.sop_instance_uid
            )
        for study, uids in by_study.items():
            self.chosen.setdefault(study, frozenset(uids[max(0, len(uids) - instances) :]))
        return [
            o
            for o in operations
            if o.stored.sop_instance_uid in self.chosen[o.stored.study_instance_uid]
        ]


def knob_table() -> str:
    """Return all knobs as a Markdown table, sorted by name."""
    lines = ["| knob | arguments | what the PACS does |", "|---|---|---|"]
    for _, knob in sorted(KNOBS.items()):
        words = ", ".join(_argument(name, default) for name, default in knob.arguments.items())
        lines.append(f"| `{knob.name}` | {words} | {knob.meaning} |")
    return "\n".join(lines) + "\n"


def _argument(name: str, default: Any) -> str:
    if default is inspect.Parameter.empty:
        return f"`{name}`"
    is_status = name == "status" and isinstance(default, int)
    return f"`{name}={f'0x{default:04X}' if is_status else repr(default)}`"
