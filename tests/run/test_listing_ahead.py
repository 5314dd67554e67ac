"""While one chunk is retrieved the next is claimed and listed, one an association and no more."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefect_dicom.core.errors import Interrupted, PacsError
from prefect_dicom.core.model import Chunk
from prefect_dicom.run.run import Run
from prefect_dicom.testing import Behaviour, tiny_instances
from tests.support.sites import Place, site_around, until

STUDIES = 4


@contextlib.contextmanager
def site(tmp_path, *script: Behaviour, associations: int = 2, retrieve: str = "c-get", **parts):
    limits = {"chunk_studies": 1, "associations": associations}
    with site_around(
        tmp_path,
        tiny_instances(STUDIES, instances=2),
        script=script,
        retrieve=retrieve,
        node={"limits": limits},
        **parts,
    ) as place:
        yield place


@contextlib.contextmanager
def found(place: Place) -> Iterator[tuple[Run, list[Chunk]]]:
    """A run that has found its studies, and their chunks."""
    with place.opened() as pull:
        for page in pull.discovery.pages():
            pull.discovery.discover(*page)
        yield pull, list(pull.chunks.chunks())


def listed(place: Place) -> set[str]:
    """The studies whose lists the PACS has been asked for."""
    queries = [r for r in place.pacs.requests("C-FIND") if r.level in ("SERIES", "IMAGE")]
    return {uid for r in queries for uid in r.keys["StudyInstanceUID"].split("\\")}


@pytest.mark.parametrize("retrieve", ["c-get", "c-move"])
def test_the_next_chunks_are_listed_while_a_retrieve_is_open(tmp_path, retrieve):
    service, gate = retrieve.upper(), threading.Event()
    held = Behaviour("net.first_byte", service=service, on_request=1, hold=gate)
    with site(tmp_path, held, retrieve=retrieve) as place:
        with found(place) as (pull, chunks), ThreadPoolExecutor(STUDIES) as pool:
            first = pool.submit(pull.retrieval.retrieve, chunks[0])
            until(lambda: place.pacs.requests(service), "the first chunk is asked for")
            # It is as if the other association retrieved as well.
            with pull.turns.turn(chunks[0]):
                others = [pool.submit(pull.retrieval.retrieve, chunk) for chunk in chunks[1:]]
                until(lambda: len(listed(place)) == STUDIES, "all are listed")
                assert len(place.pacs.requests(service)) == 1
                assert len(pull.ledger.claims.live()) == STUDIES
            gate.set()
            assert [each.result() for each in (first, *others)] == [1] * STUDIES
            assert sum(map(pull.archiving.archive, chunks)) == STUDIES
        place.is_whole()


def test_what_was_listed_ahead_is_given_back_when_its_node_fails(tmp_path):
    with site(tmp_path, associations=1) as place:
        with found(place) as (pull, chunks), ThreadPoolExecutor(2) as pool, pull.turns.one_pass():
            with pull.turns.turn(chunks[0]):
                ahead = pool.submit(pull.retrieval.retrieve, chunks[1])
                until(lambda: listed(place), "it is listed")
                # What its requests would meet, another chunk has met.
                with pytest.raises(PacsError), pull.retrieval._withdrawing("pacs"):
                    raise PacsError("pacs-unreachable")
            assert ahead.result() == 0
            assert pull.ledger.claims.live() == []
            assert place.pacs.requests("C-GET") == []
        place.goes_on()


def test_what_was_listed_ahead_is_given_back_when_the_run_is_to_stop(tmp_path):
    with site(tmp_path, associations=1) as place:
        with found(place) as (pull, chunks), ThreadPoolExecutor(1) as pool:
            with pull.turns.turn(chunks[0]):
                ahead = pool.submit(pull.retrieval.retrieve, chunks[1])
                until(lambda: listed(place), "it is listed")
                pull.control.stop.set()
                with pytest.raises(Interrupted):
                    ahead.result()
            assert pull.ledger.claims.live() == []
        assert place.pacs.requests("C-GET") == []
        place.goes_on()


def test_a_node_that_is_asked_for_less_is_asked_for_no_list_ahead(tmp_path):
    with site(tmp_path) as place:
        with found(place) as (pull, chunks), ThreadPoolExecutor(1) as pool:
            pull.access.admission("pacs")._limit.decrease("pacs-slow")
            assert pull.access.chunks_ahead("pacs") == 0
            with pull.turns.turn(chunks[0]):
                behind = pool.submit(pull.retrieval.retrieve, chunks[1])
                until(lambda: len(pull.ledger.claims.live()) == 1, "it is claimed")
                assert listed(place) == set()
            assert behind.result() == 1
            pull.archiving.archive(chunks[1])
        place.goes_on()


def test_no_chunk_has_its_turn_while_too_many_wait_for_their_upload(tmp_path):
    with site(tmp_path, associations=1) as place:
        with found(place) as (pull, chunks):
            for chunk in chunks[:3]:
                pull.retrieval.retrieve(chunk)
            assert not pull.turns.has_room("pacs")
            pull.archiving.archive(chunks[0])
            assert pull.turns.has_room("pacs")
            for chunk in chunks[1:3]:
                pull.archiving.archive(chunk)
        place.goes_on()
