"""Rules of the house that no other tool holds: who imports what, which codes exist, what is locked.

The order of the layers is kept by import-linter (``.importlinter``, ``make layers``).
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from prefect_dicom.core import errors
from prefect_dicom.core.reasons import REASONS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "prefect_dicom": ROOT / "src" / "prefect_dicom",
    "prefect_dicom.flows": ROOT / "flows",
    "prefect_dicom.tasks": ROOT / "tasks",
}
CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)+|interrupted|unexpected")

# Which modules may import a library, and which of them only inside functions.
IMPORTERS = {
    "pynetdicom": ({"network", "testing"}, set()),
    # The auditor of prefect_dicom.testing looks into the bucket for itself.
    "boto3": ({"archive", "blocks", "testing"}, set()),
    "botocore": ({"archive", "blocks", "testing"}, {"web"}),
    "sqlalchemy": ({"ledger"}, set()),
    "pandas": ({"api", "cohort", "report"}, set()),
    "matplotlib": ({"report"}, set()),
    "jinja2": ({"report"}, set()),
    "prefect": ({"flows", "tasks", "blocks", "server"}, {"cli"}),
}


@functools.cache
def modules() -> list[tuple[str, Path, ast.Module]]:
    """Name below ``prefect_dicom``, path and syntax tree of every module of the package."""
    found = []
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            below = path.relative_to(folder).with_suffix("").parts
            dotted = ".".join((*package.split(".")[1:], *below)).removesuffix("__init__")
            found.append((dotted.strip("."), path, ast.parse(path.read_text(encoding="utf-8"))))
    return found


def imports(tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """Each imported name, its line, and whether it is imported when the module is."""
    at_once = {node for statement in tree.body for node in _outside_functions(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno, node in at_once
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno, node in at_once


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        for child in ast.iter_child_nodes(node):
            yield from _outside_functions(child)


@pytest.mark.parametrize("library", sorted(IMPORTERS))
def test_a_library_is_imported_only_where_it_belongs(library):
    anywhere, in_functions = IMPORTERS[library]
    strangers = []
    for module, path, tree in modules():
        top = module.split(".")[0]
        for name, line, at_once in imports(tree):
            if name.split(".")[0] != library or top in anywhere:
                continue
            if top not in in_functions or at_once:
                strangers.append(f"{path.relative_to(ROOT)}:{line}")
    assert strangers == []


def test_imports_are_absolute_and_name_the_package():
    # Prefect loads flows by file name as top-level modules: relative imports cannot work there.
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for _, path, tree in modules()
        for name, line, _ in imports(tree)
        if name.startswith(".") or name.split(".")[0] in ("flows", "tasks")
    ]
    assert wrong == []


def error_codes() -> Iterator[tuple[str, str]]:
    """Every reason code written out where an error is made or compared, and where that is."""
    classes = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PrefectDicomError)
    } - {"ConfigurationError", "CohortError", "FaultyFileError"}  # these take no code
    for _, path, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare) and _names_a_code(node.left):
                for constant in map(_choices, node.comparators):
                    yield from (
                        (code, f"{path.relative_to(ROOT)}:{node.lineno}") for code in constant
                    )
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            first = node.args[:1] if called in classes | {"reason_for"} else []
            named = [k.value for k in node.keywords if k.arg in ("code", "reason")]
            for value in (*first, *named):
                for constant in _choices(value):
                    yield constant, f"{path.relative_to(ROOT)}:{node.lineno}"


def _names_a_code(node: ast.expr) -> bool:
    """Whether what is compared is a reason code, as ``error.code`` and ``task.failure`` are."""
    return getattr(node, "attr", getattr(node, "id", "")) in ("code", "reason", "failure")


def _choices(value: ast.expr) -> Iterator[str]:
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        yield value.value
    elif isinstance(value, ast.IfExp):
        yield from _choices(value.body)
        yield from _choices(value.orelse)
    elif isinstance(value, ast.BoolOp):
        for part in value.values:
            yield from _choices(part)


def test_every_reason_code_that_is_used_exists():
    found = list(error_codes())
    assert len(found) > 20, "the search finds nothing any more"
    assert [where for code, where in found if code and code not in REASONS] == []


# These map what others enumerate (statuses, exceptions) to one code for each event.
EVENT_TABLES = {
    "archive.s3_errors",
    "ledger.errors",
    "network.association_errors",
    "network.status",
    "web.status",
}


def codes_of_collection(node: ast.AST) -> list[str]:
    """The reason codes written out in a set, tuple, list or dictionary."""
    if isinstance(node, ast.Dict):
        elements = [*node.keys, *node.values]
    elif isinstance(node, ast.Set | ast.Tuple | ast.List):
        elements = node.elts
    else:
        return []
    values = [element.value for element in elements if isinstance(element, ast.Constant)]
    return [value for value in values if value in REASONS]


def test_what_is_done_about_a_reason_code_is_in_the_table_alone():
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for module, path, tree in modules()
        if not module.startswith("core.reasons") and module not in EVENT_TABLES
        for node in ast.walk(tree)
        if len(codes_of_collection(node)) > 1
    ]
    assert found == [], "give the table of prefect_dicom.core.reasons a column for it"


def test_a_reason_code_is_words_joined_by_hyphens():
    assert [code for code in REASONS if not CODE.fullmatch(code)] == []


def test_every_package_is_named_in_the_build():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    packages = {
        ".".join(filter(None, ("prefect_dicom", module)))
        for module, path, _ in modules()
        if path.name == "__init__.py"
    }
    assert [package for package in sorted(packages) if f'"{package}"' not in text] == []


def test_the_lock_has_versions_and_hashes_and_no_places():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "://" not in text
    assert "file:" not in text
    assert "--index" not in text
    assert "--find-links" not in text
    requirements = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert len(requirements) > 50
    assert [r for r in requirements if "==" not in r] == []
    assert text.count("\n    --hash=sha256:") >= len(requirements)


def locked() -> dict[str, str]:
    """Version of each locked package, by normalised name."""
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^ ;]+)", lock, re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


@pytest.mark.parametrize("python", ["3.11.2", "3.12.0", "3.13.0"])
@pytest.mark.needs("time")
def test_the_lock_is_complete_for_every_python(python):
    # A patch release can need a package that the next one does not.
    environment = {
        "python_full_version": python,
        "python_version": ".".join(python.split(".")[:2]),
        "extra": "",
    }
    missing = []
    for name in locked():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for text in importlib.metadata.requires(name) or ():
                needed = Requirement(text)
                wanted = needed.marker is None or needed.marker.evaluate(environment)
                if wanted and canonicalize_name(needed.name) not in locked():
                    missing.append(f"{name} needs {needed.name}")
    assert missing == []


def test_the_lock_meets_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["test"],
        *project["project"]["optional-dependencies"]["postgres"],
    ]
    versions = locked()
    unmet = []
    for text in wanted:
        requirement = Requirement(text)
        version = versions.get(canonicalize_name(requirement.name))
        if version is None or not requirement.specifier.contains(version):
            unmet.append(text)
    assert unmet == [], "run make lock"


MOST_LINES, MOST_PUBLIC_METHODS, MOST_ARGUMENTS = 500, 25, 8
TABLES = {
    "core.reasons.rows",
    "core.reasons.studies",
    "core.reasons.nodes",
    "core.reasons.site",
    "ledger.schema",
}
"""Modules that are tables of data, and as long as these are."""


def _is_public_method(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and not node.name.startswith("_")


def test_modules_classes_and_constructors_stay_small():
    large = []
    for module, path, tree in modules():
        if module not in TABLES and (lines := len(path.read_text().splitlines())) > MOST_LINES:
            large.append(f"{module}: {lines} lines")
        for node in ast.walk(tree):
            if not isinstance(node, ast.ClassDef):
                continue
            if (methods := sum(map(_is_public_method, node.body))) > MOST_PUBLIC_METHODS:
                large.append(f"{module}.{node.name}: {methods} public methods")
            for function in node.body:
                if isinstance(function, ast.FunctionDef) and function.name == "__init__":
                    named = function.args.args[1:] + function.args.kwonlyargs
                    if len(named) > MOST_ARGUMENTS:
                        large.append(f"{module}.{node.name}: {len(named)} arguments")
    assert large == []
