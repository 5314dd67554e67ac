"""Files of many vendors: copies are as valid as their originals, and name nobody."""

from __future__ import annotations

import re
import shutil
import subprocess
from io import BytesIO
from pathlib import Path

import pydicom
import pytest

from prefect_dicom.core.errors import InstanceRejected
from prefect_dicom.deidentify.elements import read_part_ten
from prefect_dicom.deidentify.engine import Deidentifier
from prefect_dicom.deidentify.keys import ProjectKey
from prefect_dicom.deidentify.options import Dates, Options, Retain
from prefect_dicom.deidentify.pixels import CANNOT_BE_CLEANED, judge
from tests.support.corpus import full_corpus, small_corpus

ENGINE = Deidentifier(ProjectKey("corpus", bytes(range(32))), Options())
WITH_OPTIONS = Deidentifier(
    ProjectKey("corpus", bytes(range(32))),
    Options(
        Dates.MODIFIED, frozenset(Retain) - {Retain.UIDS, Retain.INSTITUTION}, {"chest": "CHEST"}
    ),
)
IDENTIFYING = ("PatientName", "PatientID", "AccessionNumber", "OtherPatientIDs", "OperatorsName")


@pytest.fixture
def files(scale, corpus) -> list[Path]:
    few = small_corpus()[::8]
    number = scale(len(few), len(full_corpus()))
    return few if number == len(few) else full_corpus()


def copies(files: list[Path], engine: Deidentifier):
    for path in files:
        data = path.read_bytes()
        try:
            file = read_part_ten(data)
            if judge(file).reason != CANNOT_BE_CLEANED:
                yield path, data, b"".join(engine.copy(file).pieces)
        except InstanceRejected as error:
            assert error.code == "deidentify-unreadable"


def errors_of(path: Path) -> set[str]:
    """Errors of dciodvfy, without values: it knows the IODs of 2022."""
    told = subprocess.run(["dciodvfy", "-new", str(path)], capture_output=True, check=False)
    lines = (told.stderr + told.stdout).decode("latin-1").splitlines()
    return {re.sub(r"<[^>]*>|= *\S+", "", line) for line in lines if line.startswith("Error")}


@pytest.mark.campaign("de-identified corpus")
@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dicom3tools")
def test_copies_have_no_error_that_their_originals_lack(files, tmp_path):
    for path, _, copy in copies(files, ENGINE):
        made = tmp_path / "copy.dcm"
        made.write_bytes(copy)
        assert errors_of(made) <= errors_of(path), path


@pytest.mark.campaign("de-identified corpus")
@pytest.mark.parametrize("engine", [ENGINE, WITH_OPTIONS], ids=["basic", "options"])
def test_copies_of_the_corpus_name_nobody_and_keep_their_pixels(files, engine):
    checked = 0
    for path, data, copy in copies(files, engine):
        before = pydicom.dcmread(BytesIO(data), force=True)
        after = pydicom.dcmread(BytesIO(copy))
        assert after.PatientIdentityRemoved == "YES"
        for keyword in IDENTIFYING:
            value = str(before.get(keyword, "")).strip()
            if len(value) >= 6 and not value.isdigit():
                assert value.encode("utf-8", "ignore") not in copy, (path, keyword)
        for uid in {str(e.value) for e in before.iterall() if e.VR == "UI" and e.value}:
            if uid.startswith(("1.2.840.10008.", "[")) or len(uid) < 12:
                continue
            structural = [e.keyword for e in before.iterall() if str(e.value) == uid]
            if not any("Class" in each or "Syntax" in each for each in structural):
                assert uid.encode() not in copy, (path, structural)
        if "PixelData" in before:
            assert after.PixelData == before.PixelData, path
        checked += 1
    assert checked >= 10
