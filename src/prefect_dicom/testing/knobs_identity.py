"""Knobs for who a patient is said to be: numbers that were merged, or differ between places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefect_dicom.testing.plans import FindPlan, Knob, Stage

if TYPE_CHECKING:
    from prefect_dicom.testing.script import Behaviour


def _alias(
    plan: FindPlan, by: Behaviour, *, asked: str, held: Sequence[str], key: str = "PatientID"
) -> bool:
    otherwise = plan.matches
    if plan.keys.get(key) != asked:
        return False

    def matching(keyword: str, wanted: str, value: str) -> bool:
        if keyword == key and value in held:
            return True
        return otherwise(keyword, wanted, value)

    plan.matches = matching
    return True


IDENTITY_KNOBS = (
    Knob(
        "find.alias",
        (Stage.FIND_QUERY,),
        "Matches the value `asked` of a `key` with the values `held` too, and answers with these: "
        "a merged patient, known by an old number.",
        _alias,
    ),
)
