"""Knobs for what is listed of instances and series, and what is sent otherwise each time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefect_dicom.testing.instances import StoredInstance, with_elements
from prefect_dicom.testing.knobs_find import COUNT_OF_SERIES, answers_of, put
from prefect_dicom.testing.knobs_store import alter
from prefect_dicom.testing.plans import FindPlan, Knob, RetrievePlan, Stage

if TYPE_CHECKING:
    from prefect_dicom.testing.script import Behaviour


def _vary(
    plan: RetrievePlan,
    by: Behaviour,
    *,
    instances: int | Sequence[str] = 1,
    element: str = "InstanceCreationTime",
    value: str = "{:06d}",
) -> bool:
    said = value.format(by.used)

    def changed(data: bytes, stored: StoredInstance) -> bytes:
        if element == "PixelData":
            # It is the last one, and the value overwrites its end.
            return data[: -len(said)] + said.encode()
        return with_elements(data, stored.transfer_syntax_uid, {element: said})

    return alter(plan, by, instances, changed)


def _empty_series(
    plan: FindPlan, by: Behaviour, *, series: Sequence[str], count: int | None = None
) -> bool:
    found = [a for a in answers_of(plan, by).values() if a.get("SeriesInstanceUID") in series]
    if plan.level == "SERIES":
        for answer in found:
            if count is not None:
                put(answer, COUNT_OF_SERIES, count)
            elif COUNT_OF_SERIES in answer:
                delattr(answer, COUNT_OF_SERIES)
    if plan.level == "IMAGE":
        plan.answers[:] = [answer for answer in plan.answers if answer not in found]
    return bool(found)


CHANGE_KNOBS = (
    Knob(
        "store.vary",
        (Stage.RETRIEVE,),
        "Sends these `instances` with another `value` of an `element` at each request: its number "
        "is formatted into it.",
        _vary,
    ),
    Knob(
        "find.empty_series",
        (Stage.FIND_ANSWER,),
        "Lists no instances of these `series` (UIDs), and this `count` of them; None: no count.",
        _empty_series,
    ),
)
"""All knobs for lists that say something else, and for instances that change."""
