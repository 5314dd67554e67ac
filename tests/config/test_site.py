"""A site file is loaded, or refused with all its faults at once; no secret is in it or shown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, SecretStr, ValidationError

from prefect_dicom.config.access_schedule import AccessSchedule, Window
from prefect_dicom.config.archive import DirectoryArchive, S3Archive, S3Settings
from prefect_dicom.config.destination import Destination
from prefect_dicom.config.node import Limits, PacsNode, Timeouts
from prefect_dicom.config.projects import Project
from prefect_dicom.config.receiver import Metrics, Receiver
from prefect_dicom.config.site import (
    Ledger,
    Site,
    Spool,
    Validation,
    ledger_url,
    load_site,
)
from prefect_dicom.config.tls import Tls
from prefect_dicom.config.yaml import LEDGER_URL_VARIABLE
from prefect_dicom.core.errors import ConfigurationError
from prefect_dicom.core.model import Disposition, RetrieveMethod

CONFIGS = Path(__file__).parents[2] / "configs"
PASSWORD = "hunter2-secret"

MINIMAL = """\
nodes:
  main:
    host: pacs.example.org
    port: 104
    called_ae_title: MAIN
archive:
  directory: archive
spool:
  path: spool
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def load(folder: Path):
    def load(text: str, environ: dict[str, str] | None = None) -> Site:
        file = folder / "site.yaml"
        file.write_text(text, encoding="utf-8")
        return load_site(file, environ or {})

    return load


@pytest.fixture
def faults(load):
    def faults(text: str, environ: dict[str, str] | None = None) -> list[str]:
        with pytest.raises(ConfigurationError) as caught:
            load(text, environ)
        return list(caught.value.faults)

    return faults


@pytest.fixture
def fault_with(faults):
    """The single fault of the minimal file when keys are changed: dotted key -> value."""

    def fault_with(changes: dict[str, Any]) -> str:
        found = faults(yaml.safe_dump(changed(changes)))
        assert len(found) == 1, found
        return found[0]

    return fault_with


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    site = yaml.safe_load(MINIMAL)
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        place = site
        for parent in parents:
            place = place.setdefault(parent, {})
        if value is None:
            del place[last]
        else:
            place[last] = value
    return site


# ------------------------------------------------------------------------------ what is loaded


def test_nine_lines_of_settings_are_a_site(load, folder):
    site = load(MINIMAL)

    assert site.nodes["main"].host == "pacs.example.org"
    assert site.nodes["main"].retrieve is RetrieveMethod.C_MOVE
    assert site.receiver == Receiver()
    assert site.archive == DirectoryArchive(directory=folder / "archive")


def test_relative_paths_are_seen_from_the_folder_of_the_site_file(load, folder):
    site = load(MINIMAL)

    assert site.spool.path == folder / "spool"
    assert site.reports == folder / "reports"


def test_a_relative_path_of_the_site_file_gives_absolute_paths(load, folder, monkeypatch):
    load(MINIMAL)
    monkeypatch.chdir(folder)

    assert load_site("site.yaml", {}).spool.path == folder / "spool"


def test_a_tilde_is_the_home_directory(load, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder / "home"))

    site = load(MINIMAL.replace("path: spool", "path: ~/spool"))

    assert site.spool.path == folder / "home" / "spool"


def test_without_a_ledger_it_is_a_sqlite_file_beside_the_site_file(load, folder):
    for text in (MINIMAL, MINIMAL + "ledger:\n", MINIMAL + "ledger: {}\n"):
        assert ledger_url(load(text)) == f"sqlite:///{folder}/ledger.sqlite"


def test_the_ledger_may_be_another_file_or_postgresql(load, folder):
    site = load(MINIMAL + "ledger: {path: state/l.sqlite}\n")
    assert ledger_url(site) == f"sqlite:///{folder}/state/l.sqlite"

    site = load(MINIMAL + "ledger: {url: postgresql://user@db.example.org/dicom}\n")
    assert ledger_url(site) == "postgresql+psycopg://user@db.example.org/dicom"


def test_the_environment_says_what_differs_between_the_hosts_of_a_site(load):
    text = MINIMAL + "receiver: {ae_title: ALL, bind: 10.0.0.1, port: 104, associations: 7}\n"
    here = {
        "PREFECT_DICOM_RECEIVER_AE_TITLE": "HOST2",
        "PREFECT_DICOM_RECEIVER_BIND": "10.0.0.2",
        "PREFECT_DICOM_RECEIVER_PORT": "11113",
        "PREFECT_DICOM_CALLING_AE_TITLE": "CALLER2",
    }
    site = load(text, here)
    assert site.receiver == Receiver(ae_title="HOST2", bind="10.0.0.2", port=11113, associations=7)
    assert site.nodes["main"].calling_ae_title == "CALLER2"
    assert load(text, dict.fromkeys(here, "")) == load(text)
    assert load(text, {"PREFECT_DICOM_RECEIVER_AE_TITLE": "HOST3"}).receiver.bind == "10.0.0.1"


def test_faulty_variables_of_a_host_are_told_by_their_names(faults):
    reported = faults(
        MINIMAL,
        {
            "PREFECT_DICOM_RECEIVER_AE_TITLE": "LONGER THAN SIXTEEN",
            "PREFECT_DICOM_RECEIVER_PORT": "none",
            "PREFECT_DICOM_CALLING_AE_TITLE": "A\\B",
        },
    )
    assert [fault.split(":")[0] for fault in reported] == [
        "environment variable PREFECT_DICOM_RECEIVER_AE_TITLE",
        "environment variable PREFECT_DICOM_RECEIVER_PORT",
        "environment variable PREFECT_DICOM_CALLING_AE_TITLE",
    ]
    # What the file leaves out may be wrong together with what the host says.
    (fault,) = faults(MINIMAL, {"PREFECT_DICOM_RECEIVER_BIND": "0.0.0.0"})
    assert fault.startswith("environment variable PREFECT_DICOM_RECEIVER_BIND: expected at least")


def test_the_environment_overrides_the_ledger_and_its_password_is_never_shown(load):
    url = f"postgresql+psycopg://user:{PASSWORD}@db.example.org/dicom"

    site = load(MINIMAL + "ledger: {path: l.sqlite}\n", {LEDGER_URL_VARIABLE: url})

    assert ledger_url(site) == url
    assert PASSWORD not in repr(site) + str(site) + site.model_dump_json()


def test_a_key_without_a_value_counts_as_left_out(load):
    site = load(MINIMAL + "receiver:\nvalidation:\n  faulty:\n")

    assert site.receiver == Receiver()
    assert site.validation == Validation()


def test_plain_texts_are_texts_whatever_yaml_1_1_took_them_for(load):
    text = MINIMAL.replace("called_ae_title: MAIN", "called_ae_title: NO")

    node = load(text.replace("port: 104", "port: 0104")).nodes["main"]

    assert (node.called_ae_title, node.port) == ("NO", 104)


def test_an_anchor_may_share_settings_between_nodes(load):
    site = load(
        """\
nodes:
  one: &one
    host: one.example.org
    port: 104
    called_ae_title: ONE
    limits: &gentle {associations: 1}
  two: {host: two.example.org, port: 105, called_ae_title: TWO, limits: *gentle}
  three: {<<: *one, called_ae_title: THREE}
archive: {directory: archive}
spool: {path: spool}
"""
    )

    assert site.nodes["two"].limits == Limits(associations=1)
    three = site.nodes["three"]
    assert (three.host, three.called_ae_title) == ("one.example.org", "THREE")


def test_a_bucket_or_a_directory_is_recognised_by_its_key(load):
    assert isinstance(load(yaml.safe_dump(changed({}))).archive, DirectoryArchive)
    s3 = load(yaml.safe_dump(changed({"archive": {"bucket": "images", "prefix": "a/b/"}})))

    assert isinstance(s3.archive, S3Archive)
    assert s3.archive.prefix == "a/b"


def test_an_empty_text_is_no_endpoint(load):
    archive = {"bucket": "images", "endpoint": "", "region": ""}
    assert load(yaml.safe_dump(changed({"archive": archive}))).archive.endpoint is None


def test_settings_do_not_change(load):
    with pytest.raises(ValidationError, match="frozen"):
        load(MINIMAL).reports = Path("elsewhere")


# ----------------------------------------------------------------------- how faults are told


def test_all_faults_of_a_file_are_told_at_once_each_with_its_line(faults):
    found = faults(
        """\
nodes:
  main:
    hots: pacs.example.org
    port: abc
    called_ae_title: 12345
    stall_seconds: 5
    retrieve: move
  bad name:
    host: 0.0.0.0
    port: true
    called_ae_title: SEVENTEEN_LETTERS
    limits: {associations: 0, chunk_studies: 1.5}
receiver:
  bind: 0.0.0.0
  port: 0
  colour: red
archive:
  bucket: images
  directory: archive
spool: /spool
validation:
  faulty: drop
"""
    )

    places = [re.match(r"(.+?): ", fault)[1] for fault in found]
    assert sorted(places) == sorted(
        [
            "nodes.main.hots",
            "nodes.main.host",
            "nodes.main.port",
            "nodes.main.called_ae_title",
            "nodes.main.stall_seconds",
            "nodes.main.retrieve",
            "nodes.'bad name'",
            "nodes.'bad name'.host",
            "nodes.'bad name'.port",
            "nodes.'bad name'.called_ae_title",
            "nodes.'bad name'.limits.associations",
            "nodes.'bad name'.limits.chunk_studies",
            "receiver.port",
            "receiver.colour",
            "receiver.allowed_senders",
            "archive",
            "spool",
            "validation.faulty",
        ]
    )
    assert (
        "nodes.main.port: found 'abc' (line 4); expected a whole number from 1 to 65535 "
        "(Port of the PACS.)" in found
    )


def test_the_error_names_the_file_and_asks_for_a_person(load, folder):
    with pytest.raises(ConfigurationError, match="site.yaml") as caught:
        load("nodes: {}\n")

    assert caught.value.source == str(folder / "site.yaml")
    assert caught.value.disposition is Disposition.OPERATOR


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("archive.directroy", "x", "did you mean `directory`?"),
        ("nodes.main.calledaetitle", "X", "did you mean `called_ae_title`?"),
        ("nodes.main.chunk_studies", 5, "it belongs under `limits`"),
        ("zzz", 5, "known keys here: tls, nodes, receiver, archive, ledger, spool"),
    ],
)
def test_an_unknown_key_is_a_fault_that_names_what_was_probably_meant(
    fault_with, key, value, words
):
    fault = fault_with({key: value})

    assert fault.startswith(f"{key}: unknown key (line ")
    assert words in fault


@pytest.mark.parametrize("key", ["nodes", "archive", "spool"])
def test_a_missing_group_is_told_with_the_keys_it_needs(fault_with, key):
    fault = fault_with({key: None})

    assert fault.startswith(f"{key}: missing; expected ")


@pytest.mark.parametrize("field", ["host", "port", "called_ae_title"])
def test_a_node_needs_host_port_and_called_ae_title(fault_with, field):
    assert fault_with({f"nodes.main.{field}": None}).startswith(f"nodes.main.{field}: missing;")


def test_a_key_that_stands_twice_is_a_fault(faults):
    found = faults(MINIMAL.replace("    port: 104\n", "    port: 104\n    port: 105\n"))

    assert found == ["nodes.main.port: found twice, in lines 4 and 5; leave one out"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("nodes: [\n", "line 2, column 1"),
        ("a: b\n c: d\n", "line 2, column 3"),
        ("\tnodes: 1\n", "line 1, column 1"),
        ("nodes: 'x\n", "line 2, column 1"),
        ("a: 1\n---\nb: 2\n", "line 2, column 1"),
        ("a: 1\nb: \x01\n", "line 2, column 4"),
    ],
)
def test_what_is_not_yaml_is_told_with_line_and_column(faults, text, place):
    (fault,) = faults(text)

    assert fault.startswith(f"{place}: is not YAML")


@pytest.mark.parametrize("text", ["", "# nothing\n", "- nodes\n", "nodes\n"])
def test_a_file_without_keys_is_refused(faults, text):
    (fault,) = faults(text)
    assert "expected keys at the outermost level" in fault


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("receiver: !other {}\n", "receiver: found a YAML tag"),
        ("receiver: &r {x: *r}\n", "receiver.x: refers to itself"),
        ("? [a]\n: b\n", "found a list or mapping as a key"),
        ("receiver: {<<: 3}\n", "receiver: found '<<' without a group of keys"),
    ],
)
def test_what_is_yaml_but_no_setting_is_refused(faults, text, words):
    assert any(words in fault for fault in faults(MINIMAL + text))


def test_a_file_that_cannot_be_read_is_refused(folder):
    (folder / "latin.yaml").write_bytes(b"nodes: \xe4")
    for place, words in [
        (folder / "none.yaml", "No such file"),
        (folder, "Is a directory"),
        (folder / "latin.yaml", "not UTF-8"),
        ("a\0b", "not a usable path"),
        ("~no-such-user-here/site.yaml", "cannot be read"),
    ]:
        with pytest.raises(ConfigurationError, match=words):
            load_site(place, {})


def test_a_value_is_shown_at_most_in_part(fault_with):
    assert len(fault_with({"nodes.main.port": "9" * 5000})) < 300


# ------------------------------------------------------------------------ what is not accepted


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("nodes", {}, "at least one name"),
        ("nodes.main.host", "0.0.0.0", "reaches no peer"),
        ("nodes.main.host", "::", "reaches no peer"),
        ("nodes.main.host", "", "expected a host name or an IP address"),
        ("nodes.main.host", "10.0.0.1:104", "as `port`"),
        ("nodes.main.host", "[::1]", "without brackets"),
        ("nodes.main.host", "10.0.0.256", "from 0 to 255"),
        ("nodes.main.host", "dicom://pacs", "with nothing around it"),
        ("nodes.main.port", 0, "from 1 to 65535"),
        ("nodes.main.port", 65536, "from 1 to 65535"),
        ("nodes.main.port", True, "found true"),
        ("nodes.main.called_ae_title", "A" * 17, "has 17 characters"),
        ("nodes.main.called_ae_title", "", "is empty"),
        ("nodes.main.calling_ae_title", "A\\B", "without backslash"),
        ("nodes.main.called_ae_title", 12345, "put it in quotes"),
        ("nodes.main.information_model", "composite", "study-root, patient-root"),
        ("nodes.main.retrieve", "wado", "c-move, c-get"),
        ("nodes.main.timeouts", {"stall_seconds": 0}, "greater than 0"),
        ("nodes.main.timeouts", {"stall_seconds": float("inf")}, "greater than 0"),
        ("nodes.main.limits", 3, "a group of keys: associations"),
        ("receiver", {"ae_title": "Ä"}, "ASCII"),
        ("receiver", {"bind": "myhost"}, "expected an IP address of this host"),
        ("receiver", {"bind": ""}, "expected an IP address of this host"),
        ("receiver", {"port": 0}, "from 1 to 65535"),
        ("receiver", {"allowed_senders": ["pacs.example.org"]}, "host names are not resolved"),
        ("receiver", {"allowed_senders": ["10.0.0.5/24"]}, "expected 10.0.0.0/24"),
        ("receiver", {"allowed_senders": "10.0.0.5"}, "expected a list"),
        ("archive", {"prefix": "x"}, "found neither"),
        ("archive", {"bucket": "abc", "directory": "x"}, "found both"),
        ("archive", "x", "exactly one of `bucket` (S3) and `directory`"),
        ("archive", {"bucket": "ab"}, "3 to 63 characters"),
        ("archive", {"bucket": "s3://images"}, "name of the bucket alone"),
        ("archive", {"bucket": "images", "prefix": "/a"}, "single slashes"),
        ("archive", {"bucket": "images", "prefix": "a/../b"}, "single slashes"),
        ("archive", {"bucket": "images", "endpoint": "s3.example.org"}, "a URL like"),
        ("archive", {"bucket": "images", "endpoint": "ftp://s3"}, "a URL like"),
        ("archive", {"bucket": "images", "endpoint": "http://s3:99999"}, "a URL like"),
        ("archive", {"bucket": "images", "kms_key_id": "k"}, "`encryption: aws:kms`"),
        ("archive", {"bucket": "images", "encryption": "rot13"}, "none, AES256, aws:kms"),
        ("archive", {"bucket": "images", "part_bytes": 1024}, "at least 5242880"),
        ("ledger", {"path": "l.sqlite", "url": "postgresql://h/d"}, "only one of"),
        ("ledger", {"url": "sqlite:///l.sqlite"}, "for SQLite give `path`"),
        ("ledger", {"url": "postgresql://h"}, "/database"),
        ("ledger", {"path": "what?.sqlite"}, "without a question mark"),
        ("ledger", {"path": ""}, "that names something"),
        ("spool.path", "~no-such-user-here/spool", "home directory"),
        ("spool.path", "a\x01b", "control characters"),
        ("spool.reserve_bytes", -1, "at least 0"),
        ("validation", {"faulty": "drop"}, "archive, leave-out"),
        ("reports", 3, "put it in quotes"),
    ],
)
def test_a_value_that_cannot_work_is_one_fault_that_says_what_was_expected(
    fault_with, key, value, words
):
    fault = fault_with({key: value})

    assert fault.startswith(key)
    assert words in fault


def test_a_sixteen_character_ae_title_is_accepted(load):
    site = load(yaml.safe_dump(changed({"nodes.main.called_ae_title": "A" * 16})))
    assert site.nodes["main"].called_ae_title == "A" * 16


@pytest.mark.parametrize("bind", ["0.0.0.0", "::"])
def test_listening_on_every_interface_demands_that_the_senders_are_named(load, fault_with, bind):
    fault = fault_with({"receiver": {"bind": bind}})
    assert fault.startswith("receiver.allowed_senders: expected at least one address, because ")

    receiver = {"bind": bind, "allowed_senders": ["10.1.2.3", "fd00::/8"]}
    assert load(yaml.safe_dump(changed({"receiver": receiver}))).receiver.bind == bind


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spool.path", "archive/spool"),
        ("spool.path", "x/../archive"),
        ("archive.directory", "spool/archive"),
    ],
)
def test_spool_and_archive_do_not_lie_in_one_another(fault_with, key, value):
    assert fault_with({key: value}).startswith(
        "spool: expected spool and archive in separate directories"
    )


def test_spool_and_archive_are_compared_where_they_really_lie(fault_with, folder):
    (folder / "archive").mkdir()
    (folder / "link").symlink_to(folder / "archive")

    assert "separate directories" in fault_with({"spool.path": "link/spool"})


def test_neighbours_with_a_common_beginning_are_separate(load):
    text = MINIMAL.replace("path: spool", "path: archive-spool")
    assert load(text).spool.path.name == "archive-spool"


def test_the_checks_hold_for_settings_built_in_python_too():
    with pytest.raises(ValidationError, match="reaches no peer"):
        PacsNode(host="0.0.0.0", port=104, called_ae_title="X")
    with pytest.raises(ValidationError, match="separate directories"):
        Site(
            nodes={"main": PacsNode(host="pacs", port=104, called_ae_title="X")},
            archive=DirectoryArchive(directory="/data/archive"),
            spool=Spool(path="/data"),
        )
    with pytest.raises(ValidationError, match="together"):
        S3Archive(bucket="images", access_key_id=SecretStr("key"))


# -------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    "key",
    [
        "password",
        "nodes.main.Password",
        "archive.secret_access_key",
        "archive.access_key_id",
        "archive.aws-secret-access-key",
        "archive.session_token",
        "ledger.passwd",
        "receiver.secret",
    ],
)
def test_a_key_named_like_a_secret_is_refused_with_where_secrets_belong(fault_with, key):
    changes = {"archive": {"bucket": "images"}} if key.startswith("archive") else {}

    fault = fault_with({**changes, key: PASSWORD})

    assert fault.startswith(f"{key}: ")
    assert "AWS_ACCESS_KEY_ID" in fault
    assert LEDGER_URL_VARIABLE in fault
    assert "DicomArchive" in fault
    assert PASSWORD not in fault


def test_a_node_may_be_named_as_one_likes(load):
    text = MINIMAL.replace("main:", "secretariat:")
    assert list(load(text).nodes) == ["secretariat"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ledger", {"url": f"postgresql://user:{PASSWORD}@db/dicom"}),
        ("ledger", {"url": f"postgresql://user@db/dicom?password={PASSWORD}"}),
        ("ledger", {"url": f"mysql://user:{PASSWORD}@db/dicom"}),
        ("ledger", f"postgresql://user:{PASSWORD}@db/dicom"),
        ("archive", {"bucket": "images", "endpoint": f"https://user:{PASSWORD}@s3/"}),
        ("spool.path", {"password": PASSWORD}),
        ("reports", [PASSWORD]),
    ],
)
def test_a_secret_in_a_value_is_refused_and_never_repeated(faults, key, value):
    found = faults(yaml.safe_dump(changed({key: value})))

    assert any(fault.startswith(key) for fault in found)
    assert PASSWORD not in " ".join(found)


@pytest.mark.parametrize("sigil", ["*", "@", "!", "&a *", "'", "%"])
def test_a_secret_that_breaks_the_yaml_is_not_repeated(faults, sigil):
    assert PASSWORD not in " ".join(faults(MINIMAL + f"password: {sigil}{PASSWORD}\n"))


def test_a_faulty_ledger_url_in_the_environment_is_told_without_it(faults):
    (fault,) = faults(MINIMAL, {LEDGER_URL_VARIABLE: f"mysql://user:{PASSWORD}@db/dicom"})

    assert fault.startswith(f"environment variable {LEDGER_URL_VARIABLE}: expected postgresql")
    assert PASSWORD not in fault


def test_settings_built_in_python_do_not_repeat_a_secret_in_their_error():
    with pytest.raises(ValidationError) as caught:
        Ledger(url=f"mysql://user:{PASSWORD}@db/dicom", path=3)

    assert PASSWORD not in str(caught.value)


# ---------------------------------------------------------------------------------- any content

KEYS = st.sampled_from(
    [
        *Site.model_fields,
        *PacsNode.model_fields,
        *Receiver.model_fields,
        *S3Settings.model_fields,
        *DirectoryArchive.model_fields,
        *Ledger.model_fields,
        "main",
        "<<",
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.dates(),
    st.text(max_size=20),
    st.sampled_from(["0.0.0.0", "~x/y", "http://[", "postgresql://h:x/y", "10.0.0.0/99", "c-get"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


def is_site_or_configuration_error(folder: Path, content: bytes) -> None:
    file = folder / "any.yaml"
    file.write_bytes(content)
    try:
        site = load_site(file, {})
    except ConfigurationError as error:
        assert error.faults
    else:
        assert isinstance(site, Site)


@settings(max_examples=150, deadline=None)
@given(parts=st.dictionaries(KEYS, VALUES, max_size=5), section=KEYS, value=VALUES)
@pytest.mark.needs("time")
def test_any_values_give_a_site_or_a_configuration_error(tmp_path_factory, parts, section, value):
    folder = tmp_path_factory.getbasetemp()
    site = {**yaml.safe_load(MINIMAL), **parts}
    if isinstance(site.get("nodes"), dict):
        site["nodes"] = {**site["nodes"], "other": {section: value}}
    is_site_or_configuration_error(folder, yaml.safe_dump(site).encode())


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="nodes:[]{}&*!|>-?'\"%@`#~, \n\t01.<=\\", max_size=60))
def test_any_text_gives_a_site_or_a_configuration_error(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp()
    is_site_or_configuration_error(folder, text.encode())
    is_site_or_configuration_error(folder, (MINIMAL + text).encode())


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=100))
def test_any_bytes_give_a_site_or_a_configuration_error(tmp_path_factory, content):
    is_site_or_configuration_error(tmp_path_factory.getbasetemp(), content)


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 20_000,
        "a: " + "{a: " * 20_000,
        "receiver: &a0 {}\n"
        + "".join(f"k{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)),
        "reports: !!timestamp x\nspool: !!int x\nledger: !!binary '*'\n",
    ],
    ids=["deep list", "deep mapping", "aliases of aliases", "false tags"],
)
@pytest.mark.needs("time")
def test_hostile_yaml_is_refused_in_short_time(faults, text):
    assert faults(text)


# --------------------------------------------------------------------------- the example files


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_each_example_file_is_a_site(file):
    load_site(file, {})


def test_the_examples_are_the_ones_documented():
    assert {file.name for file in CONFIGS.iterdir() if file.is_file()} >= {
        "minimal.yaml",
        "s3.yaml",
        "postgresql.yaml",
        "c-get.yaml",
        "two-nodes.yaml",
        "full.yaml",
        "tls.yaml",
        "dicomweb.yaml",
        "orthanc.json",
        "dcmqrscp.cfg",
    }


def fields_of_a_file(model: type[BaseModel]) -> set[str]:
    secrets = S3Archive.model_fields.keys() - S3Settings.model_fields.keys()
    return model.model_fields.keys() - secrets


FULL = (CONFIGS / "full.yaml").read_text(encoding="utf-8")
_ABSENT = [
    (PacsNode, "access_schedule"),
    (PacsNode, "destination"),
    (Site, "tls"),
    (Site, "projects"),
]
GROUPS = [
    ("nodes.main", PacsNode),
    ("nodes.main.limits", Limits),
    ("nodes.main.timeouts", Timeouts),
    ("nodes.main.access_schedule", AccessSchedule),
    ("nodes.main.destination", Destination),
    ("nodes.main.access_schedule.windows.0", Window),
    ("receiver", Receiver),
    ("tls", Tls),
    ("archive", S3Archive),
    ("archive", DirectoryArchive),
    ("ledger", Ledger),
    ("spool", Spool),
    ("validation", Validation),
    ("projects.lung-ai", Project),
    ("metrics", Metrics),
    ("", Site),
]


@pytest.mark.parametrize(
    ("place", "model"), GROUPS, ids=lambda value: getattr(value, "__name__", "")
)
def test_the_full_example_names_every_key_and_shows_its_default(place, model):
    # The two alternatives are commented out, with their key first.
    values: Any = yaml.safe_load(FULL)
    for part in place.split(".") if place else []:
        values = values[int(part) if isinstance(values, list) else part]
    commented = set(re.findall(r"^  # (\w+): ", FULL, re.MULTILINE))
    assert commented == {"directory", "url"}
    assert fields_of_a_file(model) <= values.keys() | commented

    for name, field in model.model_fields.items():
        if name not in values or field.is_required() or model is DirectoryArchive:
            continue
        if model in (AccessSchedule, Window, Tls) or (model, name) in _ABSENT:
            # By default there is none of it, and its comments say what holds then.
            continue
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            continue
        if (model, name) == (Ledger, "path"):
            default = Ledger().path
        shown = list(default) if isinstance(default, tuple) else default
        assert values[name] == (str(shown) if isinstance(shown, Path) else shown), name


def test_every_key_of_the_full_example_has_a_comment_on_its_line():
    for line in FULL.splitlines():
        if re.match(r"\s*(# )?\w+:", line) and line.strip() not in ("main:", "lung-ai:"):
            assert re.search(r"\w.* # \w|: # \w", line), line


def test_the_orthanc_example_knows_the_receiver_of_the_minimal_example():
    orthanc = json.loads((CONFIGS / "orthanc.json").read_text())
    site = load_site(CONFIGS / "minimal.yaml", {})
    node, receiver = site.nodes["main"], site.receiver

    assert (orthanc["DicomAet"], orthanc["DicomPort"]) == (node.called_ae_title, node.port)
    (entry,) = orthanc["DicomModalities"].values()
    assert (entry["AET"], entry["Host"], entry["Port"]) == (
        receiver.ae_title,
        receiver.bind,
        receiver.port,
    )
    assert node.calling_ae_title == entry["AET"]
    assert entry["AllowFind"] and entry["AllowMove"] and entry["AllowGet"]


def test_the_dcmqrscp_example_knows_the_receiver_of_the_minimal_example():
    text = (CONFIGS / "dcmqrscp.cfg").read_text()
    site = load_site(CONFIGS / "minimal.yaml", {})
    receiver = site.receiver

    assert re.search(rf"NetworkTCPPort\s*=\s*{site.nodes['main'].port}\n", text)
    assert f"({receiver.ae_title}, {receiver.bind}, {receiver.port})" in text


def test_reading_a_site_file_does_not_import_prefect_or_the_dicom_and_s3_libraries():
    heavy = ("prefect", "pynetdicom", "pydicom", "boto3", "pandas", "sqlalchemy")
    code = f"import sys, prefect_dicom.config.site; print([m for m in {heavy} if m in sys.modules])"

    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )

    assert answer.stdout.strip() == "[]"


def test_faults_of_a_window_are_told_with_their_line_and_what_was_expected(faults):
    text = MINIMAL.replace(
        "    port: 104\n",
        "    port: 104\n"
        "    access_schedule:\n"
        "      time_zone: Europe/Berlin\n"
        "      windows:\n"
        "        - hours: 22:00-06:00\n"
        "        - hours: late\n"
        "          asociations: 1\n"
        "          retrieves_per_minute: 0\n",
        1,
    )
    assert text != MINIMAL
    reported = "\n".join(faults(text))
    assert "access_schedule.windows[1].hours: found 'late' (line" in reported
    assert "did you mean `associations`?" in reported
    assert "retrieves_per_minute: found 0" in reported and "a number greater than 0" in reported
