"""Whoever tries a set-up against the scripted PACS finds every knob on one page."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pynetdicom import AE, build_context
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind as FIND

from prefect_dicom.testing import KNOBS, Behaviour, ScriptedPacs, generate_cohort
from prefect_dicom.testing.script import knob_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scripted-pacs.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_page_ends_with_the_table_of_all_knobs_as_they_are():
    heading = "python -m prefect_dicom.testing --knobs"
    assert knob_table() == TEXT.partition(f"`{heading}` prints this table.\n\n")[2], (
        f"run: {heading}"
    )
    assert re.findall(r"^\| `([a-z_.0-9]+)`", knob_table(), re.MULTILINE) == sorted(KNOBS)


@pytest.mark.parametrize("knob", sorted(KNOBS))
def test_a_knob_says_what_its_arguments_are(knob):
    meaning = KNOBS[knob].meaning
    named = set(re.findall(r"`([a-z_]+)`", meaning))
    # What the words name is there, and what has no default cannot be left to guessing.
    assert named <= KNOBS[knob].arguments.keys()


def test_every_limit_of_a_behaviour_is_on_the_page():
    limits = set(Behaviour.__init__.__kwdefaults__)
    assert limits == {
        *re.findall(r"[`( ](\w+)=", TEXT.partition("| limit |")[2].partition("\n\n")[0])
    }


def test_the_command_of_the_page_starts_a_pacs_with_its_script(tmp_path):
    files = generate_cohort(tmp_path, studies=3, instances_per_series=1)
    ours = {"python": sys.executable, "files": str(tmp_path), "11113": "0"}
    reported = re.search(r"```sh\n(.*?)```", TEXT, re.DOTALL)[1].replace("\\\n", " ")
    command = [ours.get(word, word) for word in shlex.split(reported)]
    assert command[0] == sys.executable and str(tmp_path) in command
    command += ["--behave", "find.cap answers=2 status=0xB001", "--behave", "find.ff01 times=1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert f"with {len(files)} instances of 3 studies" in line
            port = int(re.search(r":(\d+) ", line)[1])
            peer = AE("ME").associate("127.0.0.1", port, [build_context(FIND)], ae_title="DEMOPACS")
            identifier = Dataset()
            identifier.QueryRetrieveLevel, identifier.PatientID = "STUDY", ""
            statuses = [s.Status for s, _ in peer.send_c_find(identifier, FIND)]
            peer.release()
            assert statuses == [0xFF01, 0xFF01, 0xB001]
        finally:
            process.terminate()


@pytest.mark.parametrize("line", ["find.nonsense", "find.cap", "find.cap answers", "find.cap n=2"])
def test_a_line_that_is_no_behaviour_is_refused_in_words(line, tmp_path):
    command = [sys.executable, "-m", "prefect_dicom.testing", "--directory", str(tmp_path)]
    done = subprocess.run([*command, "--behave", line], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "argument --behave:" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.needs("time")
def test_the_example_of_the_page_runs():
    example = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    names: dict = {}
    exec(compile(example, str(PAGE), "exec"), names)
    assert names["moves"] == names["sent"] == []
    assert isinstance(names["pacs"], ScriptedPacs)
