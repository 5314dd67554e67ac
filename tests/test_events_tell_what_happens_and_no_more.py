"""Events tell what happens in numbers and reason codes, and disturb nobody."""

from __future__ import annotations

from datetime import datetime

import pytest

from prefect_dicom.events import Event


@pytest.mark.parametrize(
    "fault",
    [
        {"name": "study.lost"},
        {"name": "study.failed", "reason": "Zyxquordt^Immanuela"},
        {"name": "study.failed", "figures": {"patient": "Zyxquordt^Immanuela"}},
        {"name": "study.failed", "at": datetime(2026, 1, 1)},
    ],
)
def test_an_event_has_no_room_for_anything_but_numbers_and_codes(fault):
    with pytest.raises(ValueError) as caught:
        Event(**fault)
    assert "Zyxquordt" not in str(caught.value)
