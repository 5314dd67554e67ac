"""Prefect gets a home that can be written, or whoever starts a run is told at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_dicom.config.site import load_site
from prefect_dicom.core.errors import ConfigurationError
from prefect_dicom.server.home import choose_home
from tests.support.disks import fill, read_only, small_disk
from tests.support.sites import site_around


@pytest.fixture
def site(tmp_path):
    (tmp_path / "site").mkdir()
    with site_around(tmp_path / "site", [], retrieve="c-get") as place:
        yield load_site(place.file)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("environ", [{}, {"PREFECT_HOME": ""}])
def test_the_usual_home_is_made_and_kept(home, site, environ):
    chosen = choose_home(environ, site)
    assert (chosen.path, chosen.instead_of) == (home / ".prefect", "")
    assert environ == {} and chosen.path.is_dir()


def test_a_home_that_is_named_is_kept(tmp_path, home, site):
    environ = {"PREFECT_HOME": str(tmp_path / "mine")}
    assert choose_home(environ, site).path == tmp_path / "mine"
    assert environ == {"PREFECT_HOME": str(tmp_path / "mine")}


def test_where_there_is_no_home_it_is_beside_the_ledger(tmp_path, home, site):
    home.write_text("not a folder")
    environ: dict[str, str] = {}
    chosen = choose_home(environ, site)
    assert chosen.path == tmp_path / "site" / "prefect-home"
    assert environ["PREFECT_HOME"] == str(chosen.path)
    assert str(home / ".prefect") in chosen.instead_of and "not a directory" in chosen.instead_of


@pytest.mark.parametrize("but", [0, 1_000_000])
def test_a_full_disk_is_no_home(tmp_path, home, site, but):
    with small_disk(home, mebibytes=24):
        fill(home, but=but)
        chosen = choose_home({}, site)
    assert chosen.path == tmp_path / "site" / "prefect-home"
    assert "its disk is full" in chosen.instead_of


def test_a_database_that_is_there_needs_little_more(home, site):
    with small_disk(home, mebibytes=24):
        (home / ".prefect").mkdir()
        (home / ".prefect" / "prefect.db").touch()
        fill(home, but=2_000_000)
        assert choose_home({}, site).instead_of == ""


def test_the_servers_that_a_read_only_home_names_are_still_known(tmp_path, home, site):
    (home / ".prefect").mkdir(parents=True)
    (home / ".prefect" / "profiles.toml").write_text("")
    environ: dict[str, str] = {}
    with read_only(home):
        chosen = choose_home(environ, site)
    assert chosen.path == tmp_path / "site" / "prefect-home"
    assert environ["PREFECT_PROFILES_PATH"] == str(home / ".prefect" / "profiles.toml")


def test_a_named_home_that_cannot_be_used_is_a_fault(tmp_path, home, site):
    (tmp_path / "mine").write_text("not a folder")
    with pytest.raises(ConfigurationError) as caught:
        choose_home({"PREFECT_HOME": str(tmp_path / "mine")}, site)
    (fault,) = caught.value.faults
    assert caught.value.source == "PREFECT_HOME" and str(tmp_path / "mine") in fault


def test_without_any_home_one_line_names_both_variables(tmp_path, home, site):
    home.write_text("not a folder")
    (tmp_path / "site" / "prefect-home").write_text("neither")
    for known in (None, site):
        with pytest.raises(ConfigurationError) as caught:
            choose_home({}, known)
        (fault,) = caught.value.faults
        assert "HOME or PREFECT_HOME" in fault and "\n" not in fault
