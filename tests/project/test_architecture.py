"""What the architecture page, the picture and CONTRIBUTING.md name exists."""

from __future__ import annotations

import ast
import configparser
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "prefect_dicom"
PAGES = {name: (ROOT / name).read_text() for name in ("docs/architecture.md", "CONTRIBUTING.md")}
ROOMS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"flows", "tasks", "blocks"}
PATH = re.compile(r"[\w.][\w./-]*/[\w./-]*|[\w.-]+\.(md|py|yaml|lock)")
DOTTED = re.compile(r"(?:prefect_dicom\.)?([a-z_]\w*(?:\.\w+)+)")
ELSEWHERE = {
    "incoming/",
    "ready/<study>/<sha256>.dcm",
    "report.html",
    "archive.connections",
    "metrics/",
}
"""Files that a run makes, and keys of the site file."""


def code_spans(page: str) -> set[str]:
    """The inline code of a page, without its fenced blocks."""
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`([^`\n]+)`", prose)) - ELSEWHERE


def layers() -> list[str]:
    """The rooms in the order of the import contract, from the top."""
    contract = configparser.ConfigParser()
    contract.read(ROOT / ".importlinter")
    text = contract["importlinter:contract:layers"]["layers"]
    return re.findall(r"\w+", text)


def is_path(span: str) -> bool:
    return PATH.fullmatch(span) is not None


def is_there(name: str) -> bool:
    """Whether a dotted name is a module of the package, or is defined in one."""
    parts = name.removeprefix("prefect_dicom.").split(".")
    folder = ROOT if parts[0] in ("flows", "tasks") else PACKAGE
    path = folder
    while parts and (path / parts[0]).is_dir():
        path /= parts.pop(0)
    if parts and (path / f"{parts[0]}.py").is_file():
        path /= f"{parts.pop(0)}.py"
    else:
        path /= "__init__.py"
    body = ast.parse(path.read_text(encoding="utf-8")).body
    for part in parts:
        found = [node for node in body if part in names_of(node)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def names_of(node: ast.stmt) -> list[str]:
    """The names that a statement of a module or a class defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


@pytest.mark.parametrize("page", PAGES)
def test_every_path_that_is_named_exists(page):
    named = {span for span in code_spans(page) if is_path(span)}
    assert len(named) > 15, "the search finds nothing any more"
    missing = [p for p in sorted(named) if not ((ROOT / p).exists() or (PACKAGE / p).exists())]
    assert missing == []


def test_every_module_and_function_that_is_named_exists():
    named = {
        found[1]
        for page in PAGES
        for span in code_spans(page)
        if not is_path(span) and (found := DOTTED.fullmatch(span))
        if found[1].split(".")[0] in ROOMS
    }
    assert len(named) > 50, "the search finds nothing any more"
    assert [name for name in sorted(named) if not is_there(name)] == []


def test_every_room_has_its_line():
    table = PAGES["docs/architecture.md"].split("| room |")[1].split("\n\n")[0]
    named = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", table, re.MULTILINE)
    assert named == layers()


def test_the_picture_has_the_layers_of_the_import_contract():
    picture = ElementTree.parse(ROOT / "docs" / "architecture.svg")
    rooms = [text.text for text in picture.iter() if text.get("class") == "room"]
    assert rooms == layers()
