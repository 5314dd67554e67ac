"""The commands and snippets of README.md and docs/ are parsed and run here."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import pydicom
import pytest
import yaml

from prefect_dicom.archive.spool import Spool
from prefect_dicom.cli import Exit, app
from prefect_dicom.cohort.definition import _Definition, read_cohort_file
from prefect_dicom.cohort.rows import read_cohort
from prefect_dicom.config.site import load_site
from prefect_dicom.core.deliveries import DeliveryState
from prefect_dicom.core.model import (
    DateRange,
    InstanceState,
    Level,
    StoreRequest,
    StudyState,
    Verdict,
)
from prefect_dicom.core.reasons import REASONS
from prefect_dicom.testing import Behaviour
from prefect_dicom.testing.generate import generate_cohort
from prefect_dicom.testing.instances import changed, instance_of_file
from tests.support.commands import CommandLine, Ended
from tests.support.s3_server import S3Server
from tests.support.series import series, series_uid, study_uid
from tests.support.sites import credentials, site_around

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {"README.md": README} | {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs").rglob("*.md"))
}
TESTED_ELSEWHERE = {
    "docs/delivery.md",
    "docs/dicomweb.md",
    "docs/operations.md",
    "docs/scripted-pacs.md",
    "docs/tls.md",
    "docs/walk-through.md",
}
"""In ``tests/delivery/``, ``tests/web/``, ``tests/testing/`` and by guide in ``tests/project/``."""


class Block(NamedTuple):
    """A fenced block of a document."""

    document: str
    language: str
    text: str


BLOCKS = [
    Block(document, *found)
    for document, text in DOCUMENTS.items()
    if document not in TESTED_ELSEWHERE
    for found in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
]
COMMANDS = [
    shlex.split(line, comments=True)
    for block in BLOCKS
    if block.language == "sh"
    for line in block.text.splitlines()
    if shlex.split(line, comments=True)
]


def block(language: str, beginning: str = "") -> str:
    """The README's only block in this language, or the only one that begins like this."""
    (only,) = (
        block.text
        for block in BLOCKS
        if block.language == language and block.text.startswith(beginning)
    )
    return only


SITE = block("yaml", "nodes:")
DEFINITIONS = [
    block for block in BLOCKS if block.language == "yaml" and block.document == "docs/cohorts.md"
]


def prose(document: str) -> str:
    return re.sub(r"^```.*?^```$", "", DOCUMENTS[document], flags=re.MULTILINE | re.DOTALL)


# --- commands


def test_every_block_is_of_a_kind_that_is_tested_here():
    assert {block.language for block in BLOCKS} == {"sh", "yaml", "csv", "python"}
    assert {words[0] for words in COMMANDS} == {"make", "pip", "prefect-dicom", "prefect"}


def test_make_has_the_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = [words[1] for words in COMMANDS if words[0] == "make"]
    assert targets == ["demo", "check", "test"]
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


HELP_OF_PREFECT = """
import json, os, sys
from prefect.cli import app
for names in json.loads(sys.argv[1]):
    print(end="\\f", flush=True)
    if not os.fork():
        sys.argv = ["prefect", *names, "--help"]
        app()
        sys.exit()
    if os.wait()[1]:
        sys.exit(f"no help of {names}")
"""


def test_every_command_of_prefect_and_its_options_are_understood(tmp_path):
    commands = [words[1:] for words in COMMANDS if words[0] == "prefect"]
    assert commands

    def named(words: list[str]) -> list[str]:
        names = [word for word in words if re.fullmatch(r"[a-z-]+", word)]
        names = [name for name in names if not name.startswith("--")][:2]
        return names[:1] if names[0] == "deploy" else names

    # Importing Prefect takes seconds: one process has done it for all of them.
    shown = subprocess.run(
        [sys.executable, "-c", HELP_OF_PREFECT, json.dumps([named(words) for words in commands])],
        capture_output=True,
        text=True,
        env={"COLUMNS": "200", "PATH": "", "HOME": str(tmp_path)},
    )
    assert shown.returncode == 0, shown.stderr
    for words, text in zip(commands, shown.stdout.split("\f")[1:], strict=True):
        options = [word for word in words if word.startswith("--") and word != "--no-prompt"]
        assert [option for option in options if option not in text] == []
    (file,) = (words[words.index("--prefect-file") + 1] for words in commands if "deploy" in words)
    assert (ROOT / file).is_file()


# --- files and snippets


def test_the_site_file_loads_with_the_documented_defaults(tmp_path):
    (tmp_path / "site.yaml").write_text(SITE)
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


def test_a_definition_of_a_cohort_works_as_documented(tmp_path):
    held = [
        *series(1, 1, 2, Modality="CT", StudyDate="20240110", SeriesDescription="Axial"),
        *series(1, 2, 1, Modality="CT", StudyDate="20240110", SeriesDescription="Scout"),
        *series(2, 1, 2, Modality="CT", StudyDate="20240620", SeriesDescription="Axial"),
        *series(2, 2, 1, Modality="CT", StudyDate="20240620", SeriesDescription="A localizer"),
        *series(3, 1, 1, Modality="CT", StudyDate="20240701", PatientID="P2"),
        *series(4, 1, 1, Modality="MR", StudyDate="20240301", PatientID="P3"),
    ]
    (definition,) = re.findall(r"prefect-dicom pull (\S+\.yaml)`", README)
    (tmp_path / definition).write_text(block("yaml", "studies:\n  StudyDate: 20240101-20240630"))
    with site_around(tmp_path, held, retrieve="c-get") as place:
        totals = place.pull(tmp_path / definition)
        assert totals.rows == {Verdict.ARCHIVED: 1, Verdict.EXCLUDED: 5}
        manifest = place.manifest(study_uid(2))
        assert (len(manifest.instances), manifest.unwanted_series) == (2, (series_uid(2, 2),))


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_the_definitions_of_cohorts_that_are_shown_are_read(tmp_path, definition):
    (tmp_path / "cohort.yaml").write_text(definition.text)
    (tmp_path / "patients.csv").write_text("PatientID,IndexDate\n0001,20240131\n")
    (tmp_path / "withdrawn.csv").write_text("PatientID\n")
    assert read_cohort_file(tmp_path / "cohort.yaml").rows


def test_every_key_of_a_definition_is_described():
    text = DOCUMENTS["docs/cohorts.md"]
    parts = [_Definition, *(_Definition.model_fields[name].annotation for name in PARTS)]
    keys = {
        key
        for part in parts
        for kind in getattr(part, "__args__", (part,))
        for key in keys_of(kind)
    }
    assert {"StudyDate", "days_before", "take", "exclude", "SeriesNumber"} <= keys
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


PARTS = ("date_window", "studies", "series", "most_per_patient")


def keys_of(kind: type) -> list[str]:
    return list(getattr(kind, "model_fields", ()))


@pytest.fixture
def studies(tmp_path) -> list:
    """Two studies that the README's cohort file names."""
    made = generate_cohort(tmp_path / "made", studies=2, instances_per_series=2)
    instances = []
    for path in made:
        dataset = pydicom.dcmread(path)
        if "study-0001" in path.parts:
            dataset.PatientID, dataset.StudyDate, dataset.Modality = "000123", "20240215", "CT"
        else:
            dataset.AccessionNumber = "A4711"
        dataset.save_as(path)
        instances.append(instance_of_file(path))
    return instances


def test_the_first_real_pull_works_as_documented(tmp_path, studies, monkeypatch, prefect_api):
    documented = [
        words[1:]
        for words in COMMANDS
        # Dry runs are tested in a file of their own.
        if words[0] == "prefect-dicom" and "--dry-run" not in words
    ]
    assert [words[0] for words in documented[:4]] == ["doctor", "pull", "status", "report"]
    with S3Server("research-images") as bucket:
        credentials(bucket, monkeypatch)
        with site_around(tmp_path, studies, bucket=bucket) as place:
            # The README's own file; of it only addresses and places are other ones here.
            document = yaml.safe_load(SITE)
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
                for words in documented[:3]:
                    ended = command(*words, **prefect_api)
                    assert ended.code == 0, ended.output + ended.stderr
                assert "2 rows: 2 archived; 2 of 2 studies" in ended.output
                ended = command(*documented[3])
                assert ended.code == 0, ended.stderr
                assert ">2</b> archived" in Path(ended.output.strip()).read_text()
                verify = next(words for words in documented if words[0] == "verify")
                assert command(*verify).code == 0
            finally:
                assert command("receiver", "stop").code == 0
            place.file.write_text(yaml.safe_dump(here))


def test_python_works_as_documented(tmp_path, studies, monkeypatch, capsys, prefect_harness):
    with site_around(tmp_path, studies, retrieve="c-get") as place:
        (tmp_path / "cohort.csv").write_text(block("csv"))
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {}
        exec(compile(block("python", "import prefect_dicom"), "the example", "exec"), names)
        assert list(names["found"].line) == [2, 3]
        assert list(names["result"].rows.verdict) == ["archived"]
        assert len(names["result"].instances) == names["found"].NumberOfStudyRelatedInstances[0]
        assert "all-archived" in capsys.readouterr().out
        asked = place.asked_for("C-FIND")
        exec(compile(block("python", "from prefect import flow"), "the example", "exec"), names)
        summary = names["pull_small_studies"]()
        assert summary.startswith("2 rows: 2 archived; 2 of 2 studies")
        assert place.asked_for("C-FIND") > asked


REPAIRS = [
    shlex.split(line, comments=True)[1:]
    for part in BLOCKS
    if part.document == "docs/repair.md"
    for line in part.text.splitlines()
]


AUDIT = "from prefect_dicom.config.site import load_site"


def test_the_audit_works_as_documented(tmp_path, studies, monkeypatch, capsys):
    with site_around(tmp_path, studies, retrieve="c-get") as place:
        place.pull()
        monkeypatch.chdir(place.file.parent)
        exec(compile(block("python", AUDIT), "the example", "exec"), {})
        assert capsys.readouterr().out == ""
        shutil.rmtree(place.folder / "archive" / "studies")
        exec(compile(block("python", AUDIT), "the example", "exec"), {})
        assert "I1 " in capsys.readouterr().out


def test_checking_and_repairing_works_as_documented(tmp_path, studies):
    documented = iter(REPAIRS)

    def next_is(*beginning: str) -> list[str]:
        words = next(documented)
        assert tuple(words[: len(beginning)]) == beginning
        return words

    with site_around(tmp_path, studies, retrieve="c-get") as place:
        command = CommandLine(tmp_path, tmp_path / "home")
        # Of two instances of a study one is missing, and arrives too late.
        late = studies[0]
        place.pacs.script.append(
            Behaviour("move.drop_instances", instances=[late.sop_instance_uid])
        )
        shutil.move(place.cohort(), tmp_path / "cohort.csv")
        place.pull(tmp_path / "cohort.csv")
        for _ in range(3):
            assert command(*next_is("verify")).code == 0

        for path in tmp_path.glob("ledger.sqlite*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert "1 added to the ledger" in command(*next_is("rebuild-ledger")).output
        retrieves = place.asked_for("C-GET")
        # As the command does, but for Prefect's server, which takes its time to start.
        assert next_is("pull") == ["pull", place.cohort().name]
        assert place.pull().rows == {Verdict.ARCHIVED: 1, Verdict.PARTIAL: 1}
        assert place.asked_for("C-GET") > retrieves

        assert "1 of 5 instances never came" in command(*next_is("accept")).output
        # The study's number is another one here, and it is not accepted: the late one comes still.
        assert "does not wait for a decision" in command(*next_is("accept")).stderr
        assert "every study under another PatientID" in command(*next_is("accept")).output
        assert next_is("rerun") == ["rerun", "1"]
        assert "nothing was accepted" in command(*next_is("accept")).stderr
        assert "; withdrawn by " in command(*next_is("accept")).output

        # Two instances are in quarantine: the late one, and one of another patient.
        other = changed(late, PatientID="SOMEBODY")
        spool = Spool(place.site.spool.path)
        names = []
        for stored, reason in ((late, "not-requested"), (other, "wrong-patient")):
            classes = stored.sop_class_uid, stored.sop_instance_uid, stored.transfer_syntax_uid
            part = spool.begin(StoreRequest(1, *classes))
            part.write([stored.encoded()])
            names.append(part.sha256[:12])
            spool.quarantine(part, reason)

        def run(*beginning: str, name: str = "") -> Ended:
            words = next_is("quarantine", *beginning)
            return command(*(name if re.fullmatch("[0-9a-f]{12}", w) else w for w in words))

        assert all(name in run("list").output for name in names[:1])
        assert names[1] in run("list", "--reason").output
        assert late.patient_id not in run("show", name=names[0]).output
        assert late.patient_id in run("show", name=names[0]).output
        assert f"{names[1]}  stays" in run("release", name=names[1]).output
        assert "1 of 1 instance released" in run("release", "--reason").output
        assert run("drop", name=names[1]).output == "1 instance deleted.\n"
        assert run("drop", "--all").output == "0 instances deleted.\n"
        assert next(documented, None) is None
        assert place.rerun().studies == {StudyState.ARCHIVED: 2}


def test_the_levels_are_those_there_are():
    table = DOCUMENTS["docs/repair.md"].split("| level |")[1].split("\n\n")[0]
    assert re.findall(r"^\| `([a-z]+)`", table, re.MULTILINE) == list(Level)


# --- what is documented


def test_the_verdicts_are_those_there_are():
    table = README[README.index("| verdict |") :].split("\n\n")[0]
    named = [row.split("|")[1].strip() for row in table.splitlines()[2:]]
    assert named == [verdict for verdict in Verdict if verdict is not Verdict.PENDING]


def test_the_exit_codes_are_those_there_are():
    sentence = re.search(r"The exit code is [^.]*\.", README).group(0)
    assert set(map(int, re.findall(r"\d", sentence))) == set(Exit) - {Exit.UNEXPECTED}


def test_the_reason_codes_are_those_there_are():
    chapter = README[README.index("## When `doctor` reports") :].split("\n## ")[0]
    table = chapter[chapter.index("| it says |") :].split("\n\n")[0]
    says = [row.split("|")[1] for row in table.splitlines()[2:]]
    codes = [code for cell in says for code in re.findall(r"`([a-z-]+)`", cell)]
    assert len(codes) > 5
    assert [code for code in codes if code not in REASONS] == []


def test_the_states_are_those_there_are():
    states = DOCUMENTS["docs/promise.md"].split("## States")[1].split("\n## ")[0]
    named = set(re.findall(r"\*([a-z]+)\*", states))
    assert named == {*StudyState, *InstanceState, *DeliveryState}


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_heading_that_is_linked_to_exists(document):
    for path, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", DOCUMENTS[document]):
        target = (ROOT / document).parent / path if path else ROOT / document
        assert anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_and_every_folder_is_there(document):
    base = (ROOT / document).parent
    links = re.findall(r"\]\(([^)#:]+)\)", DOCUMENTS[document])
    folders = re.findall(r"^\| `([^`]+/)` \|", DOCUMENTS[document], re.MULTILINE)
    assert [link for link in links if not (base / link).exists()] == []
    below = (ROOT, ROOT / "src" / "prefect_dicom")
    assert [f for f in folders if not any((folder / f).is_dir() for folder in below)] == []
