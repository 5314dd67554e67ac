"""What README.md and docs/ tell a user to write and to type is read, parsed and run here."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import NamedTuple

import pydicom
import pytest
import yaml
from commands import CommandLine
from sites import credentials, site_around

from prefect_dicom.cli import Exit, app
from prefect_dicom.cohort import read_cohort
from prefect_dicom.configuration import load_site
from prefect_dicom.model import DateRange, InstanceState, StudyState, Verdict
from prefect_dicom.reasons import REASONS
from prefect_dicom.testing.generate import generate_cohort
from prefect_dicom.testing.objects import object_of_file
from prefect_dicom.testing.s3 import S3Server

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {"README.md": README} | {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").rglob("*.md"))
}


class Block(NamedTuple):
    """A fenced block of a document."""

    document: str
    language: str
    text: str


BLOCKS = [
    Block(document, *found)
    for document, text in DOCUMENTS.items()
    for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]
COMMANDS = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    if block.language == "sh"
    for line in block.text.splitlines()
    if shlex.split(line, comments=True)
]


def block(language: str) -> str:
    """The only block in this language."""
    (only,) = (block.text for block in BLOCKS if block.language == language)
    return only


def prose(document: str) -> str:
    return re.sub(r"^```.*?^```$", "", DOCUMENTS[document], flags=re.MULTILINE | re.DOTALL)


# --- what is to be typed


def test_every_block_is_of_a_kind_that_is_tested_here():
    assert {block.language for block in BLOCKS} <= {"sh", "yaml", "csv"}
    assert {words[0] for words in COMMANDS} == {"make", "pip", "prefect-dicom", "prefect"}


def test_make_has_the_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [words[1] for words in COMMANDS if words[0] == "make"]
    assert targets == ["demo", "test"]
    assert [target for target in targets if f"\n{target}:" not in makefile] == []


def test_the_package_has_the_name_that_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = [words[2:] for words in COMMANDS if words[:2] == ["pip", "install"]]
    assert installed == [[project["name"]]]
    assert project["scripts"].keys() == {"prefect-dicom"}
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in README


@pytest.mark.parametrize(
    "words", [words[1:] for words in COMMANDS if words[0] == "prefect-dicom"], ids=shlex.join
)
def test_every_command_and_its_options_are_understood(words):
    app.parse_args(words, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_in_the_prose_exists(document):
    for text in re.findall(r"`prefect-dicom ([^`]+)`", prose(document)):
        command, rest, _ = app.parse_commands(shlex.split(text))
        assert command, text
        app.parse_args([*command, "--help"], exit_on_error=False, print_error=False)


def test_every_command_of_prefect_and_its_options_are_understood(tmp_path):
    commands = [words[1:] for words in COMMANDS if words[0] == "prefect"]
    assert commands

    def help_of(words: list[str]) -> str:
        names = [word for word in words if re.fullmatch(r"[a-z-]+", word)]
        names = [name for name in names if not name.startswith("--")][:2]
        names = names[:1] if names[0] == "deploy" else names
        told = subprocess.run(
            [sys.executable, "-m", "prefect", *names, "--help"],
            capture_output=True,
            text=True,
            env={"COLUMNS": "200", "PATH": "", "HOME": str(tmp_path)},
        )
        assert told.returncode == 0, told.stderr
        return told.stdout

    with ThreadPoolExecutor() as pool:
        for words, told in zip(commands, pool.map(help_of, commands), strict=True):
            options = [word for word in words if word.startswith("--") and word != "--no-prompt"]
            assert [option for option in options if option not in told] == []
    (file,) = (words[words.index("--prefect-file") + 1] for words in commands if "deploy" in words)
    assert (ROOT / file).is_file()


# --- what is to be written


def test_the_site_file_loads_and_says_what_is_said_of_it(tmp_path):
    (tmp_path / "site.yaml").write_text(block("yaml"))
    site = load_site(tmp_path / "site.yaml", environ={})
    assert list(site.nodes) == ["main"]
    assert site.ledger.path == tmp_path / "ledger.sqlite"
    assert site.reports == tmp_path / "reports"


def test_the_cohort_file_is_read_as_it_is_explained(tmp_path):
    (tmp_path / "cohort.csv").write_text(block("csv"))
    first, second = read_cohort(tmp_path / "cohort.csv")
    assert (first.patient_id, first.modality) == ("000123", "CT")
    assert first.study_date == DateRange(date(2024, 1, 1), date(2024, 3, 31))
    assert (second.accession_number, second.patient_id) == ("A4711", None)


@pytest.fixture
def studies(tmp_path) -> list:
    """Two studies that the README's cohort file names."""
    made = generate_cohort(tmp_path / "made", studies=2, instances_per_series=2)
    objects = []
    for path in made:
        dataset = pydicom.dcmread(path)
        if "study-0001" in path.parts:
            dataset.PatientID, dataset.StudyDate, dataset.Modality = "000123", "20240215", "CT"
        else:
            dataset.AccessionNumber = "A4711"
        dataset.save_as(path)
        objects.append(object_of_file(path))
    return objects


def test_the_first_real_pull_goes_as_it_is_told(tmp_path, studies, monkeypatch):
    told = [words[1:] for words in COMMANDS if words[0] == "prefect-dicom"]
    assert [words[0] for words in told[:3]] == ["doctor", "pull", "status"]
    with S3Server("research-images") as bucket:
        credentials(bucket, monkeypatch)
        with site_around(tmp_path, studies, bucket=bucket) as place:
            # The README's own file; of it only addresses and places are other ones here.
            document = yaml.safe_load(block("yaml"))
            here = yaml.safe_load(place.file.read_text())
            node = here["nodes"]["pacs"]
            node["called_ae_title"] = place.pacs.ae_title
            for name, part in document.items():
                mine = part["main"] if name == "nodes" else part
                other = node if name == "nodes" else here[name]
                mine |= {key: other[key] for key in other if key != "bucket"}
            document["receiver"]["bind"] = "127.0.0.1"
            place.file.write_text(yaml.safe_dump(document | {"ledger": here["ledger"]}))
            (tmp_path / "cohort.csv").write_text(block("csv"))
            try:
                command = CommandLine(tmp_path, tmp_path / "home")
                for words in told[:3]:
                    ended = command(*words)
                    assert ended.code == 0, ended.output + ended.complaints
                assert "2 rows: 2 archived; 2 of 2 studies" in ended.output
                verify = next(words for words in told if words[0] == "verify")
                assert command(*verify).code == 0
            finally:
                assert command("receiver", "stop").code == 0
            place.file.write_text(yaml.safe_dump(here))


# --- what is said


def test_the_verdicts_are_those_there_are():
    table = README[README.index("| verdict |") :].split("\n\n")[0]
    named = [row.split("|")[1].strip() for row in table.splitlines()[2:]]
    assert named == [verdict for verdict in Verdict if verdict is not Verdict.PENDING]


def test_the_exit_codes_are_those_there_are():
    sentence = re.search(r"The exit code is [^.]*\.", README).group(0)
    assert set(map(int, re.findall(r"\d", sentence))) == set(Exit) - {Exit.UNEXPECTED}


def test_the_reason_codes_are_those_there_are():
    chapter = README[README.index("## When the doctor") :].split("\n## ")[0]
    table = chapter[chapter.index("| it says |") :].split("\n\n")[0]
    says = [row.split("|")[1] for row in table.splitlines()[2:]]
    codes = [code for cell in says for code in re.findall(r"`([a-z-]+)`", cell)]
    assert len(codes) > 5
    assert [code for code in codes if code not in REASONS] == []


def test_the_states_are_those_there_are():
    states = DOCUMENTS["docs/promise.md"].split("## States")[1].split("\n## ")[0]
    named = set(re.findall(r"\*([a-z]+)\*", states))
    assert named == {*StudyState, *InstanceState}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_and_every_folder_is_there(document):
    base = (ROOT / document).parent
    links = re.findall(r"\]\(([^)#:]+)\)", DOCUMENTS[document])
    folders = re.findall(r"^\| `([^`]+/)` \|", DOCUMENTS[document], re.MULTILINE)
    assert [link for link in links if not (base / link).exists()] == []
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []
