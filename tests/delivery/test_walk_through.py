"""The walk-through: each of its commands does what the page says, against the same servers."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLosslessSV1

from tests.support.peers import US, Orthanc, free_port
from tests.support.sites import until, until_it_listens
from tests.support.wire import make_instance, write_instances

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "walk-through.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"^```sh\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
SOURCE_PORT = "4242"


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Both Orthancs and storescp; the folder with the two files; ports by those of the page."""
    if (reason := Orthanc.absent()) or not shutil.which("storescp"):
        pytest.skip(reason or "storescp is not installed (Debian package dcmtk)")
    folder = tmp_path_factory.mktemp("walk")
    store_port = free_port()
    second = Orthanc(folder / "second")
    second.ae_title = "ORTHANC2"
    first = Orthanc(folder / "first", {"ORTHANC2": second.port, "STORESCP": store_port})
    (plain,) = write_instances(folder, 1, size=64)
    plain.rename(folder / "plain.dcm")
    compressed = make_instance(2)
    compressed.StudyInstanceUID, compressed.SeriesInstanceUID = "1.2.4", "1.2.4.1"
    compressed.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    compressed.PixelData = encapsulate([bytes(range(200))])
    compressed["PixelData"].VR = "OB"
    compressed.save_as(folder / "compressed.dcm", enforce_file_format=True)
    inbox = folder / "inbox"
    inbox.mkdir()
    storescp = subprocess.Popen(
        ["storescp", "-od", str(inbox), "+xa", "-aet", "STORESCP", str(store_port)]
    )
    try:
        with first, second:
            until_it_listens(store_port)
            yield folder, first, second, inbox
    finally:
        storescp.terminate()
        storescp.wait(10)


def run(line: str, folder: Path, first: Orthanc, study: str = "", series: str = ""):
    words = shlex.split(line)
    words = [word.replace("STUDY_UID", study).replace("SERIES_UID", series) for word in words]
    words = [str(first.port) if word == SOURCE_PORT else word for word in words]
    words = ["127.0.0.1" if word == "localhost" else word for word in words]
    return subprocess.run(
        [words[0], "-v", *words[1:]], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_every_command_of_the_page_does_what_it_says(servers):
    folder, first, second, inbox = servers
    plain = "storescu -aet PREFECTDICOM -aec ORTHANC localhost 4242 plain.dcm"
    assert plain in COMMANDS and all(US in line for line in COMMANDS)
    trap = run(plain.replace("plain.dcm", "compressed.dcm"), folder, first)
    assert trap.returncode and not first.instances()
    study = series = ""
    for line in COMMANDS:
        ended = run(line, folder, first, study, series)
        said = ended.stdout + ended.stderr
        assert ended.returncode == 0, f"{line}\n{said}"
        if line.startswith("storescu") and not study:
            held = first.instances()
            study, series = held[0].study, held[0].series
        elif line.startswith("findscu"):
            assert "Find Response: 1" in said, f"{line}\n{said}"
    assert len(first.instances()) == 2
    of_study = [one for one in first.instances() if one.study == study]
    until(lambda: len(second.instances()) == len(of_study), "the second Orthanc has the study")
    assert len(list(inbox.iterdir())) == len(of_study)
    # getscu writes beside the files of the page.
    got = {path.name for path in folder.iterdir() if path.is_file()} - {
        "plain.dcm",
        "compressed.dcm",
    }
    assert len(got) == len(of_study)


def test_the_tests_that_the_page_names_are_there():
    for path in re.findall(r"`(tests/[\w/]+\.py)`", TEXT):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"`(test_\w+)`", TEXT):
        assert name in (ROOT / "tests" / "delivery" / "test_c_store.py").read_text(), name
