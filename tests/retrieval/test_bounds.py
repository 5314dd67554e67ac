"""How often a node is asked in vain is one table, and the promise shows it."""

from __future__ import annotations

from pathlib import Path

from prefect_dicom.retrieval.bounds import BOUNDS, bounds_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "promise.md"


def test_the_promise_has_the_table_of_bounds_as_it_is():
    assert bounds_table() in PAGE.read_text(encoding="utf-8")


def test_no_bound_is_more_than_some_tens():
    assert all(0 < bound.most <= 40 for bound in BOUNDS)
