"""Table E.1-1 as data: whole, of one edition, and of codes that the engine knows."""

from __future__ import annotations

from collections import Counter

import pytest
from pydicom.datadict import dictionary_VR

from prefect_dicom.deidentify.options import BASIC, Action, Dates, Options, Retain
from prefect_dicom.deidentify.table import row_of, rows, safe_private

OPTION_COLUMNS = (
    *("safe_private", "uids", "device", "institution", "patient_characteristics"),
    *("full_dates", "modified_dates", "descriptors", "structured_content", "graphics"),
)


def test_the_table_has_as_many_rows_and_codes_as_its_edition():
    assert len(rows()) == len({row.tag for row in rows()}) == 656
    assert Counter(row.basic for row in rows()) == {
        **{"X": 416, "D": 93, "U": 55, "Z": 42, "X/D": 23},
        **{"X/Z": 11, "X/Z/D": 8, "Z/D": 6, "X/Z/U*": 2},
    }
    assert Counter(row.full_dates for row in rows())["K"] == 169
    assert Counter(row.descriptors for row in rows())["C"] == 140


def test_every_code_of_the_basic_profile_has_an_action():
    assert {row.basic for row in rows()} == BASIC.keys()


def test_options_keep_or_clean_and_say_nothing_else():
    codes = {getattr(row, column) for row in rows() for column in OPTION_COLUMNS}
    assert codes == {"", "K", "C"}


@pytest.mark.parametrize(
    ("tag", "basic"),
    [
        (0x00100010, "Z"),
        (0x00100020, "Z/D"),
        (0x0020000D, "U"),
        (0x00081140, "X/Z/U*"),
        (0x00100041, "X"),  # new in editions after 2024
        (0x50AA1234, "X"),
        (0x60023000, "X"),
        (0x00091001, "X"),
    ],
)
def test_rows_are_found_by_tag_or_by_the_family_it_belongs_to(tag, basic):
    assert row_of(tag).basic == basic


@pytest.mark.parametrize("tag", [0x00080016, 0x00080060, 0x60020022, 0x7FE00010])
def test_what_the_table_does_not_name_has_no_row(tag):
    assert row_of(tag) is None


def test_an_option_overrides_the_basic_profile_and_no_option_adds_to_it():
    basic = Options().rules()
    every = Options(Dates.FULL, frozenset(Retain)).rules()

    assert {rule.action for rule in basic.values()} == set(BASIC.values())
    for tag, rule in every.items():
        assert rule.action in (basic[tag].action, Action.KEEP)
    assert every[0x0020000D].action is every[0x00080020].action is Action.KEEP
    assert every[0x00100010].action is Action.EMPTY


def test_dates_of_a_device_are_shifted_with_the_others_and_not_kept():
    options = Options(Dates.MODIFIED, frozenset({Retain.DEVICE}))
    assert options.rules()[0x00181200].action is Action.SHIFT


def test_safe_private_elements_have_a_creator_and_an_odd_group():
    assert len(safe_private()) == 479
    assert all(group & 1 and creator for group, creator, _ in safe_private())
    assert safe_private()[0x7053, "Philips PET Private Group", 0x00] == "DS"


def test_uids_of_the_table_are_of_that_vr_in_the_dictionary():
    for tag, rule in Options().rules().items():
        if rule.row.basic == "U":
            assert dictionary_VR(tag) == "UI", rule.row
