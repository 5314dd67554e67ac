"""Users get one package: the folders flows/ and tasks/ are inside it, never beside it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources, so that nothing is left in them."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("src", "flows", "tasks"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.name in ("pyproject.toml", "README.md") or path.name.startswith("LICENSE"):
            shutil.copy(path, copy)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."],
        cwd=copy,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site_packages(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return directory


def test_its_only_names_are_the_package_and_its_metadata(site_packages):
    names = {path.name for path in site_packages.iterdir()}
    assert "prefect_dicom" in names
    (metadata,) = names - {"prefect_dicom"}
    assert metadata.startswith("prefect_dicom-")
    assert metadata.endswith(".dist-info")


def test_every_module_of_the_sources_is_in_it(site_packages):
    places = {
        ROOT / "src" / "prefect_dicom": Path(),
        ROOT / "flows": Path("flows"),
        ROOT / "tasks": Path("tasks"),
    }
    expected = {
        place / path.relative_to(folder)
        for folder, place in places.items()
        for path in folder.rglob("*.py")
    }
    package = site_packages / "prefect_dicom"
    assert {path.relative_to(package) for path in package.rglob("*.py")} == expected


def test_it_is_typed(site_packages):
    assert (site_packages / "prefect_dicom" / "py.typed").exists()


def test_flows_and_tasks_are_imported_from_it_anywhere(site_packages, tmp_path):
    # Folders of these names where the user works are the user's own.
    for name in ("flows", "tasks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise AssertionError('not ours')\n")
    program = (
        "import prefect_dicom, prefect_dicom.tasks, prefect_dicom.flows\n"
        "for module in (prefect_dicom, prefect_dicom.tasks, prefect_dicom.flows):\n"
        "    print(module.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site_packages)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(Path(line).is_relative_to(site_packages) for line in lines)
