"""The page on cohort files is true: each row of its tables is read as it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prefect_dicom.cohort.list_options import ListOptions
from prefect_dicom.cohort.rows import read_list
from prefect_dicom.core.errors import CohortError
from tests.support.lists import workbook

PAGE = (Path(__file__).resolve().parents[2] / "docs/cohort-files.md").read_text(encoding="utf-8")
_ROW = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \| (.+) \|$", re.MULTILINE)


def examples(heading: str) -> list[tuple[str, str, str]]:
    """Header, row and words of each example below a heading."""
    (section,) = re.findall(rf"^## {heading}$(.*?)^## ", PAGE, re.MULTILINE | re.DOTALL)
    return _ROW.findall(section)


def test_there_are_examples_of_both():
    assert len(examples("Taken")) >= 10 and len(examples("Refused")) >= 12
    assert PAGE.count("\n| `") == len(examples("Taken")) + len(examples("Refused"))


@pytest.mark.parametrize(("header", "row", "words"), examples("Taken"))
def test_what_is_taken_is_a_row(tmp_path, header, row, words):
    (tmp_path / "list.csv").write_text(f"{header}\n{row}\n", encoding="utf-8")
    given = read_list(tmp_path / "list.csv")
    assert len(given.rows) == 1
    if shown := re.search("Note .cohort file.: (.*)\\.``", words):
        assert given.notes == (shown[1],)
    assert bool(given.notes) == any(word in words for word in ("note", "ignored"))


@pytest.mark.parametrize(("header", "row", "words"), examples("Refused"))
def test_what_is_refused_is_refused_with_these_words(tmp_path, header, row, words):
    (tmp_path / "list.csv").write_text(f"{header}\n{row}\n", encoding="utf-8")
    with pytest.raises(CohortError) as caught:
        read_list(tmp_path / "list.csv")
    fault = "\n".join(caught.value.faults)
    assert re.split("[,:]", words)[0] in fault, fault
    secrets = [value for value in re.split("[,;]", row) if len(value) > 4]
    assert not [value for value in secrets if value in fault]


def test_other_words_for_nothing_that_it_names_are_refused_too(tmp_path):
    (words,) = (words for _, _, words in examples("Refused") if "word for nothing" in words)
    others = re.findall("`([^`]+)`", words)
    assert len(others) == 5
    for word in others:
        (tmp_path / "list.csv").write_text(f"PatientID,AccessionNumber\n1,{word}\n")
        with pytest.raises(CohortError, match="word for nothing"):
            read_list(tmp_path / "list.csv")


def test_what_is_asked_about_is_chosen_as_it_says(tmp_path):
    (quoted,) = re.findall('"(37 of 50 rows are hidden)"', PAGE)
    rows = [["MRN"], *([str(number)] for number in range(50))]
    hidden = {line: {"hidden": True} for line in range(2, 39)}
    path = workbook(tmp_path / "list.xlsx", rows, hidden=hidden)
    with pytest.raises(CohortError, match=quoted):
        read_list(path)
    for choice in re.findall("`--hidden-rows ([a-z-]+)`", PAGE):
        assert read_list(path, options=ListOptions(hidden_rows=choice)).rows
