"""Whatever is planted wherever: no marker, no UID and no date of the original is in a copy."""

from __future__ import annotations

import random
from io import BytesIO

import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefect_dicom.deidentify.elements import read_part_ten
from prefect_dicom.deidentify.engine import Deidentifier
from prefect_dicom.deidentify.keys import ProjectKey
from prefect_dicom.deidentify.options import Options, Retain
from tests.support.planted import (
    KNOWN_TAGS,
    OTHER_TAGS,
    SYNTAXES,
    Plant,
    identifiers_in,
    plant,
    planted_file,
)

ENGINE = Deidentifier(ProjectKey("probe", bytes(range(32))), Options())
RETAINING = Deidentifier(
    ProjectKey("probe", bytes(range(32))),
    Options(retain=frozenset({Retain.SAFE_PRIVATE})),
)
SEQUENCES = [tag for tag in KNOWN_TAGS if plant(tag).vr == b"SQ"]
PLAIN = [tag for tag in KNOWN_TAGS if plant(tag).vr != b"SQ"]


def copied(data: bytes, engine: Deidentifier = ENGINE) -> bytes:
    return b"".join(engine.copy(read_part_ten(data)).pieces)


leaves = st.one_of(
    st.sampled_from(PLAIN).map(plant), st.sampled_from(OTHER_TAGS).map(lambda each: Plant(*each))
)
trees = st.recursive(
    leaves,
    lambda inner: st.builds(plant, st.sampled_from(SEQUENCES), st.lists(inner, max_size=4)),
    max_leaves=20,
)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(st.lists(trees, min_size=5, max_size=30), st.sampled_from(SYNTAXES), st.booleans())
def test_nothing_planted_at_any_depth_is_in_the_copy(plants, syntax, undefined):
    data = planted_file(plants, syntax, undefined=undefined)
    assert identifiers_in(data)

    copy = copied(data)

    assert identifiers_in(copy) == []
    assert pydicom.dcmread(BytesIO(copy)).PatientIdentityRemoved == "YES"


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("depth", [0, 1, 4])
def test_every_attribute_of_the_dictionary_is_treated_at_every_depth(syntax, depth):
    plants = [plant(tag) for tag in PLAIN]
    plants += [Plant(*each) for each in OTHER_TAGS]
    for _ in range(depth):
        # A sequence without a row of the table, so that its items are what is judged.
        plants = [Plant(0x00082218, b"SQ", tuple(plants))]

    assert identifiers_in(copied(planted_file(plants, syntax))) == []


def test_sequences_in_and_outside_the_table_are_entered_or_removed():
    plants = [plant(tag, [plant(0x00100010), plant(0x00081155)]) for tag in SEQUENCES]

    assert identifiers_in(copied(planted_file(plants))) == []


@pytest.mark.campaign("planted identifiers")
def test_objects_drawn_by_lot_keep_nothing(seed, scale):
    lot = random.Random(seed)

    def drawn(depth: int) -> Plant:
        kind = lot.random()
        if depth < 5 and kind < 0.25:
            inner = [drawn(depth + 1) for _ in range(lot.randrange(5))]
            return plant(lot.choice(SEQUENCES), inner)
        return Plant(*lot.choice(OTHER_TAGS)) if kind < 0.4 else plant(lot.choice(PLAIN))

    for _ in range(scale(100, 100_000)):
        plants = [drawn(0) for _ in range(lot.randrange(1, 40))]
        data = planted_file(plants, lot.choice(SYNTAXES), undefined=lot.random() < 0.5)
        engine = lot.choice((ENGINE, RETAINING))
        left = identifiers_in(copied(data, engine))
        assert left == [], plants
