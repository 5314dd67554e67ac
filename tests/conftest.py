"""Fixtures that several files of tests share: real archives, and what to fill them with."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests.support import peers, sites
from tests.support.certificates import Authority
from tests.support.corpus import corpus_directory, full_corpus, small_corpus
from tests.support.statement_cache import share_compiled_statements

pytest_plugins = ["tests.support.campaign", "tests.support.radosgw", "tests.support.selection"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that start Prefect: the longest ones should not be left to the end."""
    long = {item.path for item in items if _starts_prefect(item)}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection() -> None:
    # What is imported and collected stays, so looking at it for garbage is time lost: here a tenth.
    gc.disable()


def pytest_collection_finish() -> None:
    share_compiled_statements()
    gc.collect()
    gc.freeze()
    gc.enable()


def _starts_prefect(item: pytest.Item) -> bool:
    rigs = {"CommandLine", "PrefectServer"} & vars(item.module).keys()
    return bool(rigs) or "prefect_harness" in item.fixturenames


class ByFile(LoadFileScheduling):
    """A file of tests is run by one process; those that share a Prefect server, by the same."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        if not _shares_prefect(file):
            return file
        # Two servers: with one, these files alone took longer than all others together.
        return "prefect, flows" if file.startswith("tests/flows/") else "prefect, commands"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByFile | None:
    return ByFile(config, log) if config.getoption("dist") == "loadfile" else None


@cache
def _shares_prefect(file: str) -> bool:
    text = (Path(__file__).parents[1] / file).read_text(encoding="utf-8")
    return re.search(r"\bprefect_(harness|api)\b", text) is not None


@pytest.fixture(scope="session")
def prefect_harness() -> Iterator[None]:
    """Prefect's own server for tests, with a database of its own; it takes 20 s to start."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture(scope="session")
def prefect_api(prefect_harness: None) -> dict[str, str]:
    """The environment of commands that use that server: they begin sooner than with their own."""
    from prefect.settings import PREFECT_API_URL

    return {"PREFECT_API_URL": PREFECT_API_URL.value()}


@pytest.fixture(scope="session")
def corpus() -> Path:
    """The directory of the corpus of real DICOM files; skips where it is absent."""
    directory = corpus_directory()
    if directory is None:
        pytest.skip("no corpus of real DICOM files (set PREFECT_DICOM_CORPUS)")
    return directory


@pytest.fixture(scope="session")
def corpus_small(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Some 240 files of all kinds; generated ones where the corpus is absent."""
    if corpus_directory() is not None:
        return small_corpus()
    from prefect_dicom.testing.generate import generate_cohort

    return generate_cohort(tmp_path_factory.mktemp("generated"), studies=20, seed=1)


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """A certificate authority of this session."""
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def foreign_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another certificate authority, which nobody trusts."""
    return Authority(tmp_path_factory.mktemp("foreign"), "Foreign CA")


@pytest.fixture(scope="session")
def receiver_port() -> int:
    """Where the archives of this session send to, under the AE title ``PREFECTDICOM``.

    Nothing listens there but what the running test starts.
    """
    return peers.free_port()


@pytest.fixture(scope="session")
def orthanc(tmp_path_factory, receiver_port, corpus_small) -> Iterator[peers.Orthanc]:
    """An Orthanc that holds the small corpus; for tests that do not change it."""
    with peers.prepared(peers.Orthanc, tmp_path_factory, {peers.US: receiver_port}) as archive:
        archive.load(corpus_small)
        yield archive


@pytest.fixture(scope="session")
def dcmqrscp(tmp_path_factory, receiver_port, corpus_small) -> Iterator[peers.Dcmqrscp]:
    """A dcmqrscp that holds what it takes of the small corpus; not to be changed either."""
    with peers.prepared(peers.Dcmqrscp, tmp_path_factory, {peers.US: receiver_port}) as archive:
        archive.load(corpus_small)
        yield archive


@pytest.fixture(scope="session")
def orthanc_full(tmp_path_factory, receiver_port, corpus) -> Iterator[peers.Orthanc]:
    """An Orthanc that holds the whole corpus; for tests with the marker ``full``."""
    with peers.prepared(peers.Orthanc, tmp_path_factory, {peers.US: receiver_port}) as archive:
        archive.load(full_corpus())
        yield archive


@pytest.fixture(scope="session")
def dcmqrscp_full(tmp_path_factory, receiver_port, corpus) -> Iterator[peers.Dcmqrscp]:
    """A dcmqrscp that holds what it takes of the whole corpus; for the marker ``full``."""
    with peers.prepared(peers.Dcmqrscp, tmp_path_factory, {peers.US: receiver_port}) as archive:
        archive.load(full_corpus())
        yield archive


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sites.Standing]:
    """A receiver for the sites of a whole file of tests, which take turns with it."""
    with sites.standing_receiver(tmp_path_factory.mktemp("receiver")) as receiver:
        yield receiver


@pytest.fixture
def around(tmp_path: Path, standing: sites.Standing) -> Callable[..., AbstractContextManager]:
    """Builds the site: of objects, and what else :func:`~sites.site_around` takes."""
    return partial(sites.site_around, tmp_path, standing=standing)


@pytest.fixture
def new_archive(tmp_path_factory) -> Iterator[Callable[..., peers.Peer]]:
    """A function that starts an empty archive of the test's own: class, destinations, settings."""
    started: list[peers.Peer] = []

    def begin(kind: type[peers.Peer], destinations=None, **settings) -> peers.Peer:
        archive = peers.prepared(kind, tmp_path_factory, destinations or {}, **settings)
        archive.start()
        started.append(archive)
        return archive

    yield begin
    for archive in started:
        archive.stop()
