"""The blocks follow Prefect's standard, keep their secrets, and are the settings of a site file."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from importlib.metadata import entry_points
from uuid import uuid4

import pytest
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from pydantic import SecretStr, ValidationError

import prefect_dicom
from prefect_dicom.blocks import (
    DicomArchive,
    DicomLedger,
    DicomPacs,
    DicomReceiver,
    DicomSite,
    resolve_site,
)
from prefect_dicom.config.archive import DirectoryArchive, S3Archive
from prefect_dicom.config.node import PacsNode
from prefect_dicom.config.receiver import Receiver
from prefect_dicom.config.site import Site, Spool, ledger_url, load_site
from prefect_dicom.core.errors import ConfigurationError

BLOCKS = [DicomArchive, DicomLedger, DicomPacs, DicomReceiver, DicomSite]
PASSWORD = "hunter2-secret"
URL = f"postgresql+psycopg://user:{PASSWORD}@db.example.org/dicom"


class StandardSuite(BlockStandardTestSuite):
    def test_has_a_valid_image(self, block):
        pytest.skip(
            "a logo has to be an http address, fetched by every browser that opens the form; "
            "hospital networks are closed, so the blocks have none"
        )


class TestDicomPacs(StandardSuite):
    @pytest.fixture
    def block(self):
        return DicomPacs


class TestDicomReceiver(StandardSuite):
    @pytest.fixture
    def block(self):
        return DicomReceiver


class TestDicomArchive(StandardSuite):
    @pytest.fixture
    def block(self):
        return DicomArchive


class TestDicomLedger(StandardSuite):
    @pytest.fixture
    def block(self):
        return DicomLedger


class TestDicomSite(StandardSuite):
    @pytest.fixture
    def block(self):
        return DicomSite


def pacs(**settings) -> DicomPacs:
    return DicomPacs(
        **{"host": "pacs.example.org", "port": 104, "called_ae_title": "MAIN", **settings}
    )


def s3_archive() -> DicomArchive:
    return DicomArchive(
        bucket="research-imaging",
        aws_access_key_id="AKIAEXAMPLE",
        aws_secret_access_key=PASSWORD,
        aws_session_token=f"token-{PASSWORD}",
    )


def site_block(**settings) -> DicomSite:
    return DicomSite(
        **{
            "nodes": {"main": pacs()},
            "archive": s3_archive(),
            "ledger": DicomLedger(url=URL),
            "spool": {"path": "/data/spool"},
            **settings,
        }
    )


# ---------------------------------------------------------------------- the same as a site file


def test_a_site_block_gives_the_same_site_as_a_file(tmp_path):
    file = tmp_path / "site.yaml"
    file.write_text(
        """\
nodes:
  main: {host: pacs.example.org, port: 104, called_ae_title: MAIN, limits: {associations: 1}}
receiver: {bind: 192.0.2.10}
archive: {directory: archive}
ledger: {path: ledger.sqlite}
spool: {path: spool, reserve_bytes: 0}
validation: {faulty: leave-out}
"""
    )

    block = site_block(
        nodes={"main": pacs(limits={"associations": 1})},
        receiver=DicomReceiver(bind="192.0.2.10"),
        archive=DicomArchive(directory=tmp_path / "archive"),
        ledger=DicomLedger(path=tmp_path / "ledger.sqlite"),
        spool={"path": tmp_path / "spool", "reserve_bytes": 0},
        validation={"faulty": "leave-out"},
    )

    assert block.site() == load_site(file, {})


def test_the_site_of_a_block_is_made_of_plain_settings():
    site = site_block().site()

    assert type(site) is Site
    assert [type(part) for part in (site.nodes["main"], site.receiver, site.archive)] == [
        PacsNode,
        Receiver,
        S3Archive,
    ]


def test_an_archive_block_carries_the_credentials_of_its_bucket():
    archive = s3_archive().settings()

    assert archive.access_key_id == SecretStr("AKIAEXAMPLE")
    assert archive.secret_access_key == SecretStr(PASSWORD)
    assert archive.session_token == SecretStr(f"token-{PASSWORD}")


def test_an_archive_block_has_as_many_connections_as_its_kind_if_none_are_given(tmp_path):
    assert s3_archive().settings().connections == 16
    assert DicomArchive(directory=tmp_path).settings() == DirectoryArchive(directory=tmp_path)
    assert DicomArchive(directory=tmp_path, connections=2).settings().connections == 2


def test_reports_lie_beside_the_spool_where_the_block_does_not_say():
    assert str(site_block().site().reports) == "/data/reports"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: pacs(host="0.0.0.0"), "reaches no peer"),
        (lambda: pacs(hots="pacs"), "hots"),
        (lambda: DicomReceiver(bind="0.0.0.0"), "at least one address"),
        (lambda: DicomArchive(), "exactly one of"),
        (lambda: DicomArchive(bucket="images", directory="/a"), "exactly one of"),
        (lambda: DicomArchive(bucket="ab"), "at least 3 characters"),
        (lambda: DicomArchive(directory="archive"), "absolute"),
        (lambda: DicomArchive(directory="/a", endpoint="http://s3"), "no endpoint together"),
        (lambda: DicomArchive(directory="/a", connections=200), "from 1 to 64"),
        (lambda: DicomArchive(bucket="images", aws_access_key_id="x"), "together"),
        (lambda: DicomLedger(), "exactly one of"),
        (lambda: DicomLedger(path="/l.sqlite", url=URL), "only one of"),
        (lambda: DicomLedger(path="l.sqlite"), "absolute"),
        (lambda: DicomLedger(url=f"mysql://u:{PASSWORD}@h/d"), "postgresql"),
        (lambda: site_block(nodes={}), "at least 1 item"),
        (lambda: site_block(nodes={"a b": pacs()}), "expected a name"),
        (lambda: site_block(spool={"path": "spool"}), "absolute"),
        (lambda: site_block(reports="reports"), "absolute"),
        (
            lambda: site_block(archive=DicomArchive(directory="/data/spool/archive")),
            "separate directories",
        ),
    ],
)
def test_a_block_is_refused_for_what_a_file_is_refused_for(make, words):
    with pytest.raises(ValidationError, match=words) as caught:
        make()

    assert PASSWORD not in str(caught.value)


# ---------------------------------------------------------------------------- secrets in blocks


@pytest.mark.parametrize("block", [s3_archive(), DicomLedger(url=URL), site_block()])
@pytest.mark.needs("time")
def test_a_block_document_stores_its_secrets_and_shows_stars(block):
    def document(include_secrets: bool) -> str:
        made = block._to_block_document(
            name="x",
            block_schema_id=uuid4(),
            block_type_id=uuid4(),
            include_secrets=include_secrets,
        )
        return str(made.data)

    assert PASSWORD in document(include_secrets=True)
    assert PASSWORD not in document(include_secrets=False)
    assert PASSWORD not in repr(block) + str(block) + str(block.model_dump())


def test_the_site_of_a_block_does_not_show_its_secrets():
    site = site_block().site()

    assert PASSWORD not in repr(site) + str(site) + site.model_dump_json()
    assert ledger_url(site) == URL


def test_the_schemas_name_every_secret():
    assert set(DicomSite.model_json_schema()["secret_fields"]) == {
        "archive.aws_access_key_id",
        "archive.aws_secret_access_key",
        "archive.aws_session_token",
        "ledger.url",
    }


# -------------------------------------------------------------------------- finding and loading


def test_prefect_finds_the_blocks_by_the_entry_point():
    (entry_point,) = entry_points(group="prefect.collections", name="prefect_dicom")
    module = entry_point.load()

    assert {name for name in dir(module) if Block.is_block_class(getattr(module, name))} == {
        "Block",
        *(block.__name__ for block in BLOCKS),
    }
    for block in BLOCKS:
        assert Block.get_block_class_from_key(block.get_block_type_slug()) is block


def test_the_package_shows_its_blocks_to_prefects_register_command():
    assert {name for name in dir(prefect_dicom) if name.startswith("Dicom")} == {
        block.__name__ for block in BLOCKS
    }
    assert all(getattr(prefect_dicom, block.__name__) is block for block in BLOCKS)
    with pytest.raises(AttributeError, match="DicomNothing"):
        _ = prefect_dicom.DicomNothing


def modules_after(statement: str, *names: str) -> str:
    code = f"import sys; {statement}; print([m for m in {names} if m in sys.modules])"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    ).stdout.strip()


def test_the_library_does_not_import_prefect():
    assert (
        modules_after("import prefect_dicom.api, prefect_dicom.retrieval.fetch", "prefect") == "[]"
    )
    assert modules_after("import prefect_dicom.admission.circuit_breaker", "pydantic") == "[]"


def test_the_blocks_import_no_dicom_s3_or_database_library():
    heavy = ("pynetdicom", "pydicom", "boto3", "botocore", "pandas")
    assert modules_after("import prefect_dicom.blocks", *heavy) == "[]"


def test_a_reference_without_a_prefix_is_a_site_file(tmp_path):
    with pytest.raises(ConfigurationError, match="No such file"):
        resolve_site(str(tmp_path / "none.yaml"))


@pytest.fixture(scope="module")
def server(prefect_harness):
    site_block().save("whole")


@pytest.mark.timeout(300)
class TestWithAServer:
    """What only Prefect's server can answer."""

    @pytest.fixture(autouse=True)
    def _server(self, server):
        pass

    def test_a_saved_site_is_resolved_by_its_name_secrets_and_all(self):
        site = resolve_site("block:whole")

        assert site == site_block().site()
        assert ledger_url(site) == URL
        assert site.archive.secret_access_key.get_secret_value() == PASSWORD

    def test_a_saved_site_serves_many_hosts(self, monkeypatch):
        shared = resolve_site("block:whole")
        monkeypatch.setenv("PREFECT_DICOM_RECEIVER_AE_TITLE", "HOST2")
        here = resolve_site("block:whole")
        assert here.receiver == shared.receiver.model_copy(update={"ae_title": "HOST2"})

    def test_a_site_refers_to_parts_that_are_blocks_of_their_own(self):
        for part, name in ((s3_archive(), "bucket"), (DicomReceiver(), "here"), (pacs(), "main")):
            part.save(name, overwrite=True)
        site_block(
            nodes={"main": DicomPacs.load("main")},
            receiver=DicomReceiver.load("here"),
            archive=DicomArchive.load("bucket"),
        ).save("of-parts", overwrite=True)
        DicomReceiver(bind="192.0.2.10").save("here", overwrite=True)

        site = resolve_site("block:of-parts")

        assert site.receiver.bind == "192.0.2.10"
        assert site.archive == s3_archive().settings()
        assert site.nodes == {"main": pacs().settings()}

    def test_the_server_shows_stars_to_who_does_not_ask_for_secrets(self):
        with get_client(sync_client=True) as client:
            document = client.read_block_document_by_name(
                "whole", "dicom-site", include_secrets=False
            )

        assert PASSWORD not in document.model_dump_json()
        assert document.data["ledger"]["url"] == "*" * 8

    def test_prefects_register_command_registers_all_of_them(self):
        answer = subprocess.run(
            [sys.executable, "-m", "prefect", "block", "register", "-m", "prefect_dicom"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()},
        )

        assert "Successfully registered 5 blocks" in answer.stdout

    def test_a_block_that_does_not_exist_is_a_fault_of_the_configuration(self):
        with pytest.raises(ConfigurationError, match="no block of this name"):
            resolve_site("block:none")

    def test_a_stored_block_with_faults_is_refused_with_all_of_them(self):
        site_block().save("old", overwrite=True)
        with get_client(sync_client=True) as client:
            document = client.read_block_document_by_name("old", "dicom-site")
            data = {**document.data, "validation": {"faulty": "drop"}, "spool": {"path": "spool"}}
            client.request(
                "PATCH",
                "/block_documents/{id}",
                path_params={"id": document.id},
                json={"data": data, "merge_existing_data": False},
            )

        with pytest.raises(ConfigurationError) as caught:
            resolve_site("block:old")

        assert {fault.split(":")[0] for fault in caught.value.faults} >= {
            "spool",
            "validation.faulty",
        }
        assert PASSWORD not in str(caught.value)

    def test_a_site_is_resolved_in_an_asynchronous_flow_too(self):
        async def within() -> Site:
            return resolve_site("block:whole")

        assert asyncio.run(within()).spool == Spool(path="/data/spool")
