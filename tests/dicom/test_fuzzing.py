"""Damaged bytes at every place where we read what others have written.

Whatever comes: our own error or a result, within seconds and a bounded memory, without a word in
the log or a warning, and without a thread or file left behind.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import openpyxl
import pandas
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pynetdicom import AE, build_context

from prefect_dicom.archive.manifest import decode_manifest, encode_manifest
from prefect_dicom.archive.spool import Spool
from prefect_dicom.cohort.definition import read_cohort_file
from prefect_dicom.cohort.filters import (
    decode_filters,
    encode_filters,
    judge_study,
    sort_series,
)
from prefect_dicom.cohort.rows import read_cohort
from prefect_dicom.config.node import PacsNode, Timeouts
from prefect_dicom.config.site import load_site
from prefect_dicom.core.errors import ArchiveError, CohortError, ConfigurationError, PacsError
from prefect_dicom.core.errors import InstanceRejected as Rejected
from prefect_dicom.core.model import Evidence, ManifestInstance, Study, StudyManifest
from prefect_dicom.dicom.part10 import scan, survey
from prefect_dicom.dicom.validation import validate
from prefect_dicom.network.exchange import Response
from prefect_dicom.network.find.list_instances import list_instances
from prefect_dicom.network.find.list_studies import find_studies
from prefect_dicom.network.get import c_get
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.storage_scp.connection import Connection, ConnectionPolicy
from prefect_dicom.network.storage_scp.server import StorageScp
from prefect_dicom.network.storage_scp.store_handler import Expectation, StoreHandler
from prefect_dicom.testing import ScriptedPacs, tiny_instances
from tests.support.corpus import corpus_directory, small_corpus
from tests.support.mutations import Fuzz, damaged
from tests.support.part10_objects import (
    BIG_ENDIAN,
    DEFLATED,
    EXPECTED,
    EXPLICIT,
    IMPLICIT,
    JPEG,
    SEQUENCE_END,
    ct,
    element,
    encapsulated,
    encoded,
    received,
    sequence_of,
)
from tests.support.wire import CT, MemoryStoreHandler, make_instance

pytestmark = [
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.timeout(3600),
]

STUDY = "1.2.3"


@pytest.fixture
def fuzz(seed, caplog, tmp_path, request) -> Callable[[str], Fuzz]:
    return lambda section: Fuzz(seed, section, caplog, tmp_path)


# --- PDU streams: what was said in whole conversations, before and within the association


class Tap:
    """Stands between two peers and keeps what each of them says."""

    def __init__(self, port: int) -> None:
        self.asked, self.answered = bytearray(), bytearray()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._target = port
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Tap:
        self._begin(self._connect)
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(20)
        self._server.close()

    def _begin(self, target: Callable, *arguments: object) -> None:
        self._threads.append(threading.Thread(target=target, args=arguments, daemon=True))
        self._threads[-1].start()

    def _connect(self) -> None:
        here, _ = self._server.accept()
        there = socket.create_connection(("127.0.0.1", self._target))
        self._begin(self._carry, here, there, self.asked)
        self._begin(self._carry, there, here, self.answered)

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket, kept: bytearray) -> None:
        with contextlib.suppress(OSError):
            while said := source.recv(65536):
                kept += said
                target.sendall(said)
        for half in (source, target):
            with contextlib.suppress(OSError):
                half.shutdown(socket.SHUT_RDWR)


def recorded_stores() -> list[bytes]:
    """C-ECHO and C-STORE in three syntaxes, released and aborted; a rejected association."""
    said = []
    with StorageScp(
        "127.0.0.1", 0, "US", MemoryStoreHandler(), policy=ConnectionPolicy(lambda address: True)
    ) as scp:
        for syntax, ending in ((EXPLICIT, "release"), (IMPLICIT, "abort"), (DEFLATED, "release")):
            entity = AE("SENDER")
            contexts = [build_context("1.2.840.10008.1.1"), build_context(CT, syntax)]
            with Tap(scp.port) as tap:
                sender = entity.associate("127.0.0.1", tap.port, contexts, ae_title="US")
                assert sender.send_c_echo().Status == 0x0000
                for number in (1, 2):
                    instance = make_instance(number, size=16)
                    instance.file_meta.TransferSyntaxUID = UID(syntax)
                    instance._read_implicit = None
                    assert sender.send_c_store(instance).Status == 0x0000
                getattr(sender, ending)()
            said.append(bytes(tap.asked))
        with Tap(scp.port) as tap:
            assert (
                AE("SENDER")
                .associate("127.0.0.1", tap.port, contexts, ae_title="NOBODY")
                .is_rejected
            )
        said.append(bytes(tap.asked))
    return said


def pdus(stream: bytes) -> list[bytes]:
    """A conversation in its PDUs."""
    pieces = []
    while len(stream) >= 6:
        (length,) = struct.unpack_from(">I", stream, 2)
        pieces.append(stream[: 6 + length])
        stream = stream[6 + length :]
    return pieces


def damaged_stream(rng, conversations: Sequence[Sequence[bytes]]) -> bytes:
    """A conversation with PDUs exchanged, repeated, damaged; often after a sound start."""
    said = list(rng.choice(conversations))
    sound = rng.choice((0, 1, 1, 1, 2, 3))
    start, rest = said[:sound], said[sound:] or [b""]
    everything = [pdu for conversation in conversations for pdu in conversation]
    for _ in range(rng.choice((0, 0, 1, 3))):
        at = rng.randrange(len(rest) + 1)
        rest[at : at + rng.choice((0, 0, 1))] = rng.choice(
            ([], [rng.choice(everything)], [rng.choice(everything)] * rng.choice((2, 20)))
        )
    for _ in range(rng.choice((1, 1, 2))):
        if rest:
            at = rng.randrange(len(rest))
            rest[at] = damaged(rng, [rest[at], rest[at], rng.choice(everything)])
    if rng.random() < 0.2:
        return b"".join(start) + damaged(rng, [b"".join(rest)])
    return b"".join(start + rest)


@pytest.mark.campaign("fuzz: PDU streams")
def test_no_stream_of_pdus_breaks_the_receiver(fuzz, scale, tmp_path):
    conversations = [pdus(stream) for stream in recorded_stores()]
    assert [len(conversation) > 3 for conversation in conversations] == [True] * 3 + [False]
    spool = Spool(tmp_path / "spool")
    store_handler = StoreHandler(spool)
    store_handler.expect(Expectation({STUDY: 1}, "US", 1))
    scp = StorageScp(
        "127.0.0.1", 0, "US", store_handler, policy=ConnectionPolicy(lambda address: True)
    )
    checks = fuzz("PDU streams")
    files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    taken = 0
    for number, lot in checks.lots(scale(300, 20_000)):
        stream = damaged_stream(lot, conversations)[:100_000]
        with checks.case(number, stream):
            ours, theirs = socket.socketpair()
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400_000)
            with ours:
                # Both buffers hold all that is said: no thread is needed.
                ours.sendall(stream)
                ours.shutdown(socket.SHUT_WR)
                connection = Connection(theirs, "192.0.2.1", time.monotonic() + 30)
                scp._connections[connection] = None
                scp._serve(connection)
            assert scp.associations == 0
            assert not store_handler.open_bytes
            arrived = [Path(entry).name for entry in spool.incoming.iterdir()]
            assert arrived == []
        for folder in (spool.quarantined, spool.ready / "1"):
            for path in folder.glob("*"):
                assert path.suffix in (".dcm", ".json") and len(path.stem) == 64
                taken += path.suffix == ".dcm"
                path.unlink()
    assert {path.name for path in spool.path.iterdir()} == {
        "incoming", "ready", "suspect", "quarantine"
    }  # fmt: skip
    assert {path.name for path in spool.ready.iterdir()} <= {"1"}
    # Most of them went far enough to say something.
    assert taken > number // 4
    assert len(os.listdir("/proc/self/fd")) <= files
    assert threading.active_count() <= threads


class Parrot:
    """Says what it is told to whoever connects, at once, and nothing more."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self.says = b""
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._thread.join(20)
        self._server.close()

    def node(self) -> PacsNode:
        seconds = ("connect", "acse", "find", "first_byte", "stall")
        return PacsNode(
            host="127.0.0.1",
            port=self.port,
            called_ae_title="PACS",
            timeouts=Timeouts(**{f"{name}_seconds": 1 for name in seconds}),
        )

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.sendall(self.says)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(5)
                while connection.recv(65536):
                    pass


@pytest.fixture
def parrot() -> Iterator[Parrot]:
    parrot = Parrot()
    yield parrot
    parrot.close()


def identifier() -> Dataset:
    asked = Dataset()
    asked.QueryRetrieveLevel = "STUDY"
    asked.StudyInstanceUID = STUDY
    return asked


@pytest.mark.campaign("fuzz: PDU streams")
def test_no_stream_of_pdus_breaks_a_get(fuzz, scale, parrot):
    objects = list(tiny_instances(1, instances=3))
    contexts = [(objects[0].sop_class_uid, objects[0].transfer_syntax_uid)]
    with ScriptedPacs(instances=objects) as pacs:
        asked = identifier()
        asked.StudyInstanceUID = objects[0].study_instance_uid
        with Tap(pacs.port) as tap:
            node = parrot.node().model_copy(
                update={"port": tap.port, "called_ae_title": pacs.ae_title}
            )
            outcome = c_get(node, asked, contexts=contexts, store_handler=MemoryStoreHandler())
        assert outcome.completed == 3
    conversations = [pdus(bytes(tap.answered))]
    checks = fuzz("C-GET")
    for number, lot in checks.lots(scale(100, 5_000)):
        parrot.says = damaged_stream(lot, conversations)[:100_000]
        store_handler = MemoryStoreHandler()
        with checks.case(number, parrot.says, seconds=8):
            with contextlib.suppress(PacsError):
                c_get(parrot.node(), asked, contexts=contexts, store_handler=store_handler)
            assert len(store_handler.began) == len(store_handler.completed) + len(
                store_handler.abandoned
            )


@pytest.mark.campaign("fuzz: PDU streams")
def test_no_stream_of_pdus_breaks_a_query(fuzz, scale, parrot):
    with ScriptedPacs(instances=tiny_instances(3)) as pacs, Tap(pacs.port) as tap:
        node = parrot.node().model_copy(update={"port": tap.port, "called_ae_title": pacs.ae_title})
        with Requestor(node) as requestor:
            assert len(find_studies(requestor, {"StudyDate": "20200101-20300101"})) == 3
    conversations = [pdus(bytes(tap.answered))]
    checks = fuzz("C-FIND")
    for number, lot in checks.lots(scale(10, 1_000)):
        parrot.says = damaged_stream(lot, conversations)[:100_000]
        with (
            checks.case(number, parrot.says, seconds=15),
            contextlib.suppress(PacsError),
            Requestor(parrot.node()) as requestor,
        ):
            find_studies(requestor, {"StudyDate": "20200101-20300101"})


# --- identifiers of answers


class Answered(Requestor):
    """A requestor whose peer gives these answers to every query."""

    def __init__(self, answers: Sequence[bytes], syntax: str) -> None:
        super().__init__(PacsNode(host="pacs", port=104, called_ae_title="PACS"))
        self._answers, self._syntax = answers, UID(syntax)

    def send(self, service: str, identifier: Dataset) -> SimpleNamespace:
        responses = [self._response(0xFF00, answer) for answer in self._answers]
        waiting = iter([*responses, self._response(0x0000, b"")])
        return SimpleNamespace(
            next=lambda seconds: next(waiting),
            answered=True,
            fresh=True,
            ended=True,
            abort=lambda: None,
        )

    def _response(self, status: int, answer: bytes) -> Response:
        return Response(status, {}, answer, self._syntax)


@pytest.mark.campaign("fuzz: data sets")
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_no_identifier_breaks_a_query(fuzz, scale, syntax):
    seeds = []
    for stored in tiny_instances(2, instances=2):
        answer = Dataset()
        for keyword, value in stored.attributes.items():
            setattr(answer, keyword, value)
        answer.ModalitiesInStudy = ["CT", "SR"]
        answer.NumberOfStudyRelatedInstances = "12"
        answer.NumberOfSeriesRelatedInstances = "2"
        answer.SpecificCharacterSet = ["ISO_IR 100", "ISO 2022 IR 87"]
        answer.PatientID = "M\xfcller"
        answer.ReferencedStudySequence = sequence_of(Dataset(), undefined=True)
        seeds.append(encoded(answer, syntax))
    checks = fuzz(f"identifiers {syntax}")
    for number, lot in checks.lots(scale(150, 5_000)):
        answers = [damaged(lot, seeds), lot.choice(seeds)][: lot.choice((1, 2))]
        requestor = Answered(answers, syntax)
        with checks.case(number, b"".join(answers)):
            with contextlib.suppress(PacsError):
                find_studies(requestor, {"PatientID": "1"})
            with contextlib.suppress(PacsError):
                list_instances(requestor, stored.study_instance_uid)


def test_an_element_that_only_looks_like_one_is_no_value():
    answer = element(0x00080016, b"UI", b"1.2\0") + struct.pack("<HH2sH", 8, 0x61, b"C\0", 0)
    answer += element(0x00100010, b"PN", b"A^B ")
    [study] = find_studies(Answered([answer], EXPLICIT), {"PatientID": "1"})
    assert study.modalities == ()


# --- data sets


def data_set_seeds() -> list[bytes]:
    """Objects of all encodings: generated, and where the corpus is there, its small files."""
    seeds = [received(encoded(ct(), syntax), syntax) for syntax in (EXPLICIT, IMPLICIT, BIG_ENDIAN)]
    inner = Dataset()
    inner.CodeValue = "1"
    inner.ConceptNameCodeSequence = sequence_of(Dataset())
    for undefined in (True, False):
        nested = ct(ProcedureCodeSequence=sequence_of(inner, undefined=undefined))
        seeds += [received(encoded(nested, syntax), syntax) for syntax in (EXPLICIT, IMPLICIT)]
    whole = encoded(ct(PixelData=None))
    seeds.append(received(whole + encapsulated(b"\xff\xd8" * 20, b"\xff\xd9" * 9), JPEG))
    pack = zlib.compressobj(wbits=-15)
    seeds.append(received(pack.compress(encoded(ct())) + pack.flush(), DEFLATED))
    if corpus_directory() is not None:
        small = [path for path in small_corpus() if path.stat().st_size < 64 * 1024]
        seeds += [path.read_bytes() for path in small]
    return seeds


@pytest.mark.campaign("fuzz: data sets")
def test_no_data_set_breaks_the_inspection(fuzz, scale, tmp_path):
    seeds = data_set_seeds()
    path = tmp_path / "object.dcm"
    checks = fuzz("data sets")
    for number, lot in checks.lots(scale(500, 20_000)):
        data = damaged(lot, seeds)
        path.write_bytes(data)
        with checks.case(number, data):
            found = survey(path)
            findings = validate(found, EXPECTED)
            try:
                assert scan(path) == found
            except Rejected as rejected:
                assert rejected.code == found.fault.code
                assert rejected.code in findings.findings


@pytest.mark.parametrize("levels", [1_000, 50_000])
@pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
def test_sequences_nested_deeper_than_any_stack_are_walked(tmp_path, levels, syntax):
    tag = b"\x08\x00\x40\x11" + (b"SQ\0\0" if syntax == EXPLICIT else b"")
    opening = tag + b"\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    closing = b"\xfe\xff\x0d\xe0\0\0\0\0" + SEQUENCE_END
    path = tmp_path / "nested.dcm"
    path.write_bytes(received(opening * levels + closing * levels, syntax))
    assert survey(path).fault is None
    path.write_bytes(received(opening * levels, syntax))
    assert survey(path).fault.code == "instance-truncated"


# --- cohort files


def cohort_rows() -> list[dict[str, str]]:
    return [
        {"PatientID": f"SECRET-{n}", "StudyDate": "2024-01-31", "AccessionNumber": f"SECRET{n}"}
        for n in range(8)
    ]


def workbook() -> bytes:
    book = openpyxl.Workbook()
    book.active.append(list(cohort_rows()[0]))
    for row in cohort_rows():
        book.active.append(list(row.values()))
    book.active.append(["SECRET-9", 45000, 12345678901234567890])
    written = io.BytesIO()
    book.save(written)
    return written.getvalue()


def damaged_workbook(rng, seed: bytes) -> bytes:
    """A workbook that can be unpacked, with damage in one of its parts."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(seed)) as parts, zipfile.ZipFile(written, "w") as others:
        names = parts.namelist()
        chosen = rng.choice([*names, *(name for name in names if "sheet" in name)])
        for name in names:
            data = parts.read(name)
            others.writestr(name, damaged(rng, [data]) if name == chosen else data)
    return written.getvalue()


COHORTS = {
    "csv": lambda: [
        pandas.DataFrame(cohort_rows()).to_csv(index=False, sep=separator).encode(encoding)
        for separator in ",;\t"
        for encoding in ("utf-8", "utf-8-sig", "utf-16")
    ],
    "xlsx": lambda: [workbook()],
    "parquet": lambda: [pandas.DataFrame(cohort_rows()).to_parquet(index=False)],
}


@pytest.mark.campaign("fuzz: files")
@pytest.mark.parametrize("kind", COHORTS)
def test_no_cohort_file_breaks_its_reader(fuzz, scale, tmp_path, kind):
    seeds = COHORTS[kind]()
    path = tmp_path / f"cohort.{kind}"
    checks = fuzz(f"cohort {kind}")
    for number, lot in checks.lots(scale(80, 3_000)):
        data = damaged(lot, seeds)
        if kind == "xlsx" and lot.random() < 0.8:
            data = damaged_workbook(lot, seeds[0])
        path.write_bytes(data)
        with checks.case(number, data, seconds=5):
            try:
                assert read_cohort(path)
            except CohortError as error:
                # Whoever reads the log is not to read the cohort.
                assert "SECRET" not in str(error)


# --- configuration

SITE = b"""\
nodes:
  pacs: {host: 192.0.2.1, port: 104, called_ae_title: PACS}
  other:
    host: pacs.example.org
    port: 11112
    called_ae_title: "OTHER"
    retrieve: c-get
    limits: {associations: 2, chunk_studies: 20}
    timeouts:
      find_seconds: 300
receiver: &receiver
  bind: 127.0.0.1
  allowed_senders: [10.20.0.0/16, 192.0.2.1]
archive:
  bucket: research
  prefix: a/b
  endpoint: https://s3.example.org:9000
ledger:
  url: postgresql+psycopg://user@host:5432/database
spool:
  path: ./spool
"""
SITES = [
    SITE,
    SITE.replace(b"user@host", b"user:SECRET@host"),
    SITE.replace(b"bucket: research", b"bucket: research\n  secret_access_key: SECRET"),
    b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(
        b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 9)) for n in range(98, 110)
    )
    + b"nodes: *m\n",
    b"nodes: " + b"[" * 1500,
    b"nodes: " + b"{a: " * 5000 + b"}" * 5000,
    b"nodes: &x {y: *x}\n",
    b"!!python/object/apply:os.system [exit]\n",
    b"nodes: !!binary aGVsbG8=\nspool: {path: !!timestamp 2024-01-01}\n",
]


@pytest.mark.campaign("fuzz: files")
def test_no_site_file_breaks_its_reader(fuzz, scale, tmp_path):
    path = tmp_path / "site.yaml"
    checks = fuzz("site files")
    for number, lot in checks.lots(scale(100, 3_000)):
        data = SITES[number] if 0 <= number < len(SITES) else damaged(lot, [SITE, *SITES[:3]])
        path.write_bytes(data)
        with checks.case(number, data, seconds=10):
            try:
                load_site(path, {})
            except ConfigurationError as error:
                assert "SECRET" not in str(error)


DEFINITION = b"""\
list: patients.csv
window: {around: StudyDate, days_before: 30}
exclude: [patients.csv]
studies:
  StudyDate: 20240101-20240331
  Modality: [CT, PT]
  StudyDescription: ["*thorax*", {regex: "(?i)low.?(dose|contrast)[a-z]{2,5} *$"}]
  PatientAge: 18-80
  PatientSex: {not: F}
series:
  NumberOfSeriesRelatedInstances: {more_than: 40, less_than: 900}
  SeriesDescription: {is: "a*", not: ["*thorax*", {regex: "scout|x+y"}]}
most_per_patient: {studies: 1, take: latest}
"""
DEFINITIONS = [
    b"studies: {StudyDate: 00010101-99991231}\n",
    b"studies: {StudyDate: 20240101-20240331, StudyDescription: {regex: '" + b"(" * 190 + b"'}}\n",
    b"studies: {StudyDate: 20240101-20240331, StudyDescription: {regex: '" + b"a*" * 95 + b"'}}\n",
    b"studies: {StudyDate: 20240101-20240331, StudyDescription: {regex: 'a{4294967296}'}}\n",
    b"studies: {PatientAge: 99999999999999999999999}\n",
    b"list: /dev/zero\n",
    b"list: .\nexclude: [., /proc/self/mem]\n",
    b"list: " + b"a/" * 5000 + b"\n",
    b"series: " + b"{not: " * 4000 + b"}" * 4000 + b"\n",
    b"window: &x {around: *x}\n",
]


@pytest.mark.campaign("fuzz: files")
def test_no_definition_of_a_cohort_breaks_its_reader(fuzz, scale, tmp_path):
    path = tmp_path / "cohort.yaml"
    (tmp_path / "patients.csv").write_text("PatientID,StudyDate\n0001,20240131\n")
    answer = {keyword: "a" * 63 + "!" for keyword in ("SeriesDescription", "Modality")}
    checks = fuzz("definitions")
    for number, lot in checks.lots(scale(200, 10_000)):
        seeds = [DEFINITION, *DEFINITIONS[:5]]
        data = DEFINITIONS[number] if 0 <= number < len(DEFINITIONS) else damaged(lot, seeds)
        path.write_bytes(data)
        with checks.case(number, data, seconds=10), contextlib.suppress(CohortError):
            filters = read_cohort_file(path).filters
            sort_series(filters.series, {"1.2": answer})
            judge_study(filters, Study("1.2", study_description="a" * 63 + "!"))
            assert decode_filters(encode_filters(filters)) == filters


# --- manifests


@pytest.mark.campaign("fuzz: files")
def test_no_manifest_breaks_its_reader(fuzz, scale):
    instances = tuple(
        ManifestInstance("1.2", f"1.3.{n}", CT, EXPLICIT, f"studies/{n}.dcm", 100 + n, "ab" * 32)
        for n in range(3)
    )
    manifest = StudyManifest("1.2", "pacs", Evidence.INSTANCE_LIST, "2026-01-01", instances)
    of_a_part = replace(manifest, selection='Modality is "CT"', unwanted_series=("1.4", "1.5"))
    seeds = [
        encode_manifest(manifest),
        encode_manifest(of_a_part),
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b"9" * 10_000,
        b"\xff\xfe{\0}\0",
    ]
    checks = fuzz("manifests")
    for number, lot in checks.lots(scale(300, 10_000)):
        data = seeds[number] if 1 < number < len(seeds) else damaged(lot, seeds[:2])
        with checks.case(number, data), contextlib.suppress(ArchiveError):
            encode_manifest(decode_manifest(data))


# --- the tests themselves


class Knot:
    """Garbage that only a collection finds, and that warns when it is found."""

    def __init__(self) -> None:
        self.itself = self
        self.socket = socket.socket()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_earlier_tests_left_behind_is_not_blamed_on_a_case(fuzz):
    Knot()
    checks = fuzz("garbage")
    for number, _ in checks.lots(3):
        data = b'{"a":' * 50_000
        with checks.case(number, data), pytest.raises(ArchiveError):
            decode_manifest(data)
