"""Who reads a reason code can read on: one section for each code, reachable from the message."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prefect_dicom.cli import Exit, app
from prefect_dicom.config.node import PacsNode
from prefect_dicom.config.site import Site
from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons import PAGE, REASONS, page
from tests.support.commands import CommandLine

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for folder in ("src/prefect_dicom", "flows", "tasks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")


def sections() -> dict[str, str]:
    """The page's sections by their heading."""
    return {
        part.partition("\n")[0]: part for part in re.split("^## ", TEXT, flags=re.MULTILINE)[1:]
    }


def test_every_code_has_a_section_and_every_section_a_code():
    assert list(sections()) == list(REASONS)


def test_the_page_is_what_the_table_makes_it():
    assert page() == TEXT, f"run: python -m prefect_dicom.core.reasons > {PAGE}"


@pytest.mark.parametrize("code", REASONS)
def test_a_section_says_what_happened_what_to_do_and_whether_a_rerun_helps(code):
    reason, text = REASONS[code], sections()[code]
    happened, to_do, rerun = (
        text.index(f"**{words}**")
        for words in ("What happened.", "What to do.", "Does a rerun help?")
    )
    assert happened < text.index(reason.meaning) < to_do < text.index(reason.advice) < rerun
    # More than the table says: which PACS, which number, or how to find out.
    assert to_do - happened > len(reason.meaning) + 60


def test_a_section_promises_a_rerun_only_where_one_can_help():
    for code, text in sections().items():
        answer = text.split("**Does a rerun help?** ")[1]
        if REASONS[code].disposition is Disposition.PERMANENT:
            assert not answer.startswith("Yes, without"), code
        if REASONS[code].disposition is Disposition.OPERATOR:
            assert not answer.startswith("Not by itself"), code


# --- what the sections speak of is there


def in_backticks() -> set[str]:
    return set(re.findall("`([^`\n]+)`", TEXT.replace("\n", " ")))


def test_keys_of_the_site_file_that_are_named_exist():
    parts = {name: field for name, field in Site.model_fields.items()}
    node = PacsNode.model_fields
    named = {word for word in in_backticks() if re.fullmatch(r"[a-z_]+\.[a-z_]+", word)}
    assert {"limits.associations", "receiver.bind", "timeouts.stall_seconds"} <= named
    files = {"accept.csv", "candidates.csv", "deliveries.csv"}
    files |= {"receiver.log", "recorder.log", "results.csv"}
    for word in named - files:
        part, key = word.split(".")
        owner = node[part] if part in node else parts[part]
        kinds = getattr(owner.annotation, "__args__", (owner.annotation,))
        kinds = [getattr(kind, "__origin__", kind) for kind in kinds]
        assert any(key in kind.model_fields for kind in kinds), word


def test_commands_that_are_named_exist():
    named = {w.split()[1] for w in in_backticks() if w.startswith("prefect-dicom ")}
    assert {"doctor", "rerun", "explain"} <= named
    assert named <= {name for name in app if not name.startswith("-")}


def test_codes_that_are_named_exist():
    looks_like_one = re.compile(r"[a-z]+(-[a-z]+)+")
    others = {"prefect-dicom", "c-get", "c-move", "study-root", "leave-out"}
    named = {word for word in in_backticks() if looks_like_one.fullmatch(word)}
    assert {"study-gone", "not-permitted"} <= named
    assert named - others <= REASONS.keys()


# --- from the message to the section


def test_an_advice_that_is_shown_ends_with_its_pointer():
    for code, reason in REASONS.items():
        assert reason.what_to_do == f"{reason.advice} More: `prefect-dicom explain {code}`"
        # Who has installed the package has no folder of documents.
        assert "docs/" not in reason.what_to_do + reason.meaning


def test_nothing_shows_an_advice_without_its_pointer():
    bare = re.compile(r"(reason|reason_for\(.*\)|REASONS\[.*\])\.advice\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in SOURCES
        if path.parent.name != "reasons"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if bare.search(line)
    ]
    assert found == []


def test_a_code_can_be_explained_wherever_the_package_is_installed(tmp_path):
    command = CommandLine(tmp_path, tmp_path / "home")
    ended = command("explain", "move-destination-unknown")
    assert (ended.code, ended.output) == (0, REASONS["move-destination-unknown"].section())
    assert ended.output.strip() in TEXT
    assert not ended.modules & {"prefect", "pynetdicom", "boto3", "sqlalchemy"}
    wrong = command("explain", "move-destination-unknow")
    assert wrong.code == Exit.CONFIGURATION
    assert "did you mean move-destination-unknown?" in wrong.stderr


def test_all_codes_are_listed_where_none_is_given(tmp_path):
    ended = CommandLine(tmp_path, tmp_path / "home")("explain")
    assert (ended.code, ended.stderr) == (0, "")
    listed = [line.split(None, 1) for line in ended.output.splitlines()]
    assert listed == sorted([code, reason.meaning] for code, reason in REASONS.items())
