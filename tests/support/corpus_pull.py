"""Pull everything a real archive holds, and compare what arrived with what it hands out.

    python -m tests.support.corpus_pull  # Orthanc by C-MOVE and by WADO-RS into S3, by C-GET into
                                         # a directory, dcmqrscp by both into a directory
    python -m tests.support.corpus_pull web  # Orthanc by WADO-RS alone

Prints one line a pull: instances the archive lists, archived byte for byte, named with a reason,
and unexplained, which must be none. Orthanc is asked for its list and files by REST, dcmqrscp's
are read from its own storage.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
from pydicom.datadict import dictionary_has_tag, dictionary_VR

from prefect_dicom.archive import open_archive
from prefect_dicom.archive.manifest import decode_manifest
from prefect_dicom.config.archive import DirectoryArchive, S3Archive
from prefect_dicom.config.node import PacsNode
from prefect_dicom.config.receiver import Receiver
from prefect_dicom.config.site import Ledger as LedgerSettings
from prefect_dicom.config.site import Site, Spool, ledger_url
from prefect_dicom.config.web_node import WebNode
from prefect_dicom.core.model import RetrieveMethod, StudyState
from prefect_dicom.core.uids import is_safe_key, is_uid, normal_uid
from prefect_dicom.ledger import Ledger
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_run
from tests.support.corpus import full_corpus
from tests.support.peers import US, Dcmqrscp, Held, Orthanc, Peer, free_port
from tests.support.radosgw import radosgw
from tests.support.web import WebOrthanc

TITLE = "CORPUSPULL"
"""AE title of our receiver, a move destination of the archives."""

_IDENTITY = ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "PatientID"]


# Data Set Trailing Padding (FFFC,FFFC), PS3.10 7.2: little and big endian.
_PADDING = (b"\xfc\xff\xfc\xff", b"\xff\xfc\xff\xfc")


def _read(part10: bytes) -> dict:
    """What the elements of a file hold, in whatever encoding and VR they are written.

    Group lengths, padding and empty values say nothing. The order of the bytes of a value is
    left out, which differs between little and big endian, and so is what lies in sequences,
    whose lengths are written in two ways.
    """
    dataset = pydicom.dcmread(BytesIO(part10), force=True)
    held = {}
    for tag in list(dataset.keys()):
        element = dataset.get_item(tag)
        is_sequence = "SQ" in (element.VR, dictionary_VR(tag) if dictionary_has_tag(tag) else "")
        if tag.element and tag != 0xFFFCFFFC and not is_sequence:
            value = element.value if isinstance(element.value, bytes) else b""
            held[tag] = Counter(value.translate(None, b" \0"))
    return {tag: count for tag, count in held.items() if count}


@dataclass
class Comparison:
    """What became of the instances an archive holds."""

    held: int = 0
    identical: int = 0
    named: Counter[str] = field(default_factory=Counter)
    unexplained: list[Held] = field(default_factory=list)

    def count(self, stored: bytes, originals: list[bytes]) -> None:
        """Compare an archived object with what the archive gives to others."""
        ours, theirs = data_set_of(stored), [data_set_of(original) for original in originals]
        if ours in theirs:
            self.identical += 1
        elif any(t.startswith(ours) and t[len(ours) :][:4] in _PADDING for t in theirs):
            self.named["sent-without-trailing-padding"] += 1
        elif any(_read(original) == _read(stored) for original in originals):
            # Written anew by the sender in the transfer syntax that was negotiated.
            self.named["sent-in-another-encoding"] += 1
        else:
            self.named["other-bytes"] += 1

    def text(self) -> str:
        reasons = ", ".join(f"{count} {code}" for code, count in self.named.most_common())
        return (
            f"{self.held} instances held, {self.identical} archived byte for byte, "
            f"{sum(self.named.values())} named with a reason ({reasons or 'none'}), "
            f"{len(self.unexplained)} unexplained"
        )


def data_set_of(part10: bytes) -> bytes:
    """The data set of a Part 10 file, without preamble and file meta information."""
    at = 132
    while part10[at : at + 2] == b"\x02\x00":
        if part10[at + 4 : at + 6] in (b"OB", b"UN", b"OW", b"SQ", b"UT"):
            at += 12 + int.from_bytes(part10[at + 8 : at + 12], "little")
        else:
            at += 8 + int.from_bytes(part10[at + 6 : at + 8], "little")
    return part10[at:]


def compressed_options(folder: Path, files: Iterable[Path]) -> tuple[str, ...]:
    """Options with which dcmqrscp takes and sends these files in the syntaxes they are in.

    By default it refuses every compressed one; a profile for each direction lists what it may.
    """
    kinds = sorted({kind for path in files if (kind := _kind(path))})
    queries = [f"1.2.840.10008.5.1.4.1.2.{root}.{use}" for root in (1, 2) for use in (1, 2, 3)]
    sections = ["[[TransferSyntaxes]]", "[Plain]", "TransferSyntax1 = 1.2.840.10008.1.2.1"]
    sections += ["TransferSyntax2 = 1.2.840.10008.1.2"]
    names = {syntax: f"S{i}" for i, syntax in enumerate(sorted({s for _, s in kinds}))}
    for syntax, section in names.items():
        sections += [f"[{section}]", f"TransferSyntax1 = {syntax}"]
    sections += ["[Any]"]
    sections += [f"TransferSyntax{i} = {syntax}" for i, syntax in enumerate(names, 1)]
    sections += ["[[PresentationContexts]]", "[In]"]
    incoming = [f"{uid}\\Plain" for uid in ("1.2.840.10008.1.1", *queries)]
    incoming += [f"{sop_class}\\Any" for sop_class in sorted({c for c, _ in kinds})]
    sections += [f"PresentationContext{i} = {c}" for i, c in enumerate(incoming, 1)]
    sections += ["[Out]"]
    outgoing = [f"{sop_class}\\{names[syntax]}" for sop_class, syntax in kinds]
    sections += [f"PresentationContext{i} = {c}" for i, c in enumerate(outgoing, 1)]
    # In a C-GET the requestor is SCP of the storage classes.
    sections += ["[[SCPSCURoleSelection]]", "[Roles]"]
    classes = sorted({sop_class for sop_class, _ in kinds})
    sections += [f"Role{i} = {sop_class}\\Both" for i, sop_class in enumerate(classes, 1)]
    sections += ["[[Profiles]]", "[Incoming]", "PresentationContexts = In"]
    sections += ["SCPSCURoleSelection = Roles"]
    sections += ["[Outgoing]", "PresentationContexts = Out"]
    path = folder / "dcmqrscp-profiles.cfg"
    path.write_text("\n".join(sections) + "\n")
    return ("-xf", str(path), "Incoming", "Outgoing")


def fetched_by_dcmtk(peer: Peer, folder: Path, studies: Iterable[str]) -> dict[Held, Path]:
    """What an archive gives to DCMTK's getscu, bit by bit, and as which instances."""
    folder.mkdir()
    for study in studies:
        subprocess.run(
            ["getscu", "-S", "+B", "-od", str(folder), "-aec", peer.ae_title, "-aet", US]
            + ["127.0.0.1", str(peer.port), "-k", "QueryRetrieveLevel=STUDY"]
            + ["-k", f"StudyInstanceUID={study}"],
            env={**os.environ, "TCP_NODELAY": "1"},
            check=False,
            capture_output=True,
        )
    return instances_in(folder)


def sent_by(peer: Peer, folder: Path, port: int, studies: Iterable[str]) -> dict[Held, Path]:
    """What an archive sends to DCMTK's own receiver, bit by bit, and as which instances."""
    folder.mkdir()
    options = ("--bit-preserving", "-xf", "/etc/dcmtk/storescp.cfg", "AllDICOM", "-pdu", "131072")
    environment = {**os.environ, "TCP_NODELAY": "1"}
    receiver = subprocess.Popen(
        ["storescp", "--fork", *options, "-uf", "-od", str(folder), str(port)], env=environment
    )
    try:
        keys = [f"StudyInstanceUID={study}" for study in studies]
        for key in keys:
            subprocess.run(
                ["movescu", "-S", "-aec", peer.ae_title, "-aem", TITLE, "127.0.0.1"]
                + [str(peer.port), "-k", "QueryRetrieveLevel=STUDY", "-k", key],
                env=environment,
                check=False,
                capture_output=True,
            )
    finally:
        receiver.terminate()
        receiver.wait()
    return instances_in(folder)


def _file_of(orthanc: Orthanc, one: Held) -> list[bytes]:
    return [orthanc.file(one.id)]


def read_all(*paths: Path | None) -> list[bytes]:
    return [path.read_bytes() for path in paths if path is not None]


def instances_in(folder: Path) -> dict[Held, Path]:
    """Every instance below a folder, with its file."""
    held = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "index.dat":
            dataset = pydicom.dcmread(path, force=True, specific_tags=_IDENTITY)
            uids = [normal_uid(str(dataset.get(keyword, ""))) for keyword in _IDENTITY[:3]]
            held[Held(*uids)] = path
    return held


def patients_of(files: Iterable[Path]) -> dict[str, set[str]]:
    """The PatientIDs under each StudyInstanceUID."""
    patients: dict[str, set[str]] = {}
    for path in files:
        dataset = pydicom.dcmread(path, force=True, specific_tags=_IDENTITY)
        study = normal_uid(str(dataset.get("StudyInstanceUID", "")))
        patients.setdefault(study, set()).add(str(dataset.get("PatientID", "")))
    return patients


def _kind(path: Path) -> tuple[str, str] | None:
    try:
        dataset = pydicom.dcmread(path, specific_tags=["SOPClassUID"])
        return str(dataset.SOPClassUID), str(dataset.file_meta.TransferSyntaxUID)
    except Exception:
        # Not a file an archive could be sent; the loader says so.
        return None


def write_cohort(path: Path, held: Iterable[Held], patients: dict[str, set[str]]) -> None:
    """A row for each study: by its UID; by patient too where that is not enough."""
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["StudyInstanceUID", "PatientID"])
        for study in sorted({one.study for one in held}):
            owners = patients.get(study, set())
            if is_uid(study):
                rows.writerow([study, ""])
            else:
                rows.writerows(["", owner] for owner in owners if is_safe_key(owner))


def pull_all(site: Site, cohort: Path) -> int:
    """Pull a cohort without Prefect; returns its number in the ledger."""
    number = register_cohort(site, cohort, None).number
    with open_run(site, number) as pull:
        work_through(pull)
    return number


def compare(
    site: Site,
    cohort: int,
    held: list[Held],
    originals: Callable[[Held], list[bytes]],
    *,
    whole_files: bool = False,
) -> Comparison:
    """Hold the archive against what the PACS holds; ``whole_files``: file meta included."""
    result = Comparison(len(held))
    archive = open_archive(site.archive)
    with Ledger.open(ledger_url(site)) as ledger:
        reasons = {
            normal_uid(s.study.study_instance_uid): s.reason or "pending"
            for s in ledger.studies.of_cohort(cohort)
            if s.state is not StudyState.ARCHIVED
        }
        rows = {r.study_instance_uid: v.reason for r, v in ledger.rows.with_verdicts(cohort)}
        withheld = {}
        keys = {}
        for _, data in ledger.manifests.of_cohort(cohort):
            manifest = decode_manifest(data)
            study = manifest.study_instance_uid
            for instance in manifest.instances:
                series, sop = instance.series_instance_uid, instance.sop_instance_uid
                keys[study, series, sop] = instance.key
            for instance in manifest.withheld:
                series, sop = instance.series_instance_uid, instance.sop_instance_uid
                withheld[study, series, sop] = instance.reason
    for one in held:
        triple = tuple(map(normal_uid, one[:3]))
        if triple in keys:
            stored = b"".join(archive.read(keys[triple]))
            if whole_files and stored in originals(one):
                result.identical += 1
            elif whole_files:
                result.unexplained.append(one)
            else:
                result.count(stored, originals(one))
        elif triple in withheld:
            result.named[withheld[triple]] += 1
        elif triple[0] in reasons:
            result.named[reasons[triple[0]]] += 1
        elif triple[0] in rows:
            result.named[rows[triple[0]]] += 1
        elif not is_safe_key(triple[0]):
            result.named["unsafe-uid"] += 1
        else:
            result.unexplained.append(one)
    archive.close()
    return result


def site_for(
    folder: Path, node: PacsNode | WebNode, archive, url: str | None = None, **parts
) -> Site:
    """A site around a peer, in a folder of its own."""
    return Site(
        nodes={"peer": node},
        archive=archive,
        ledger=LedgerSettings(url=url) if url else LedgerSettings(path=folder / "ledger.sqlite"),
        spool=Spool(path=folder / "spool", reserve_bytes=0),
        reports=folder / "reports",
        **parts,
    )


def one_pull(
    folder: Path,
    title: str,
    peer: Peer,
    retrieve: RetrieveMethod,
    port: int,
    held: dict[Held, Callable[[], list[bytes]]],
    patients: dict[str, set[str]],
    archive: S3Archive | DirectoryArchive | None = None,
    url: str | None = None,
) -> Comparison:
    """Pull all, compare, print the line."""
    folder.mkdir()
    if archive is None:
        (folder / "archive").mkdir()
        archive = DirectoryArchive(directory=folder / "archive")
    receiver = Receiver(ae_title=TITLE, bind="127.0.0.1", port=port, idle_seconds=1)
    site = site_for(folder, peer.node(retrieve), archive, url, receiver=receiver)
    return _pulled(site, folder, title, held, patients)


def _pulled(
    site: Site,
    folder: Path,
    title: str,
    held: dict[Held, Callable[[], list[bytes]]],
    patients: dict[str, set[str]],
    *,
    whole_files: bool = False,
) -> Comparison:
    write_cohort(folder / "cohort.csv", held, patients)
    began = time.monotonic()
    cohort = pull_all(site, folder / "cohort.csv")
    seconds = time.monotonic() - began
    result = compare(site, cohort, list(held), lambda one: held[one](), whole_files=whole_files)
    print(f"{title}: {result.text()} [{seconds:.0f} s]", flush=True)
    for one in result.unexplained:
        print("  unexplained:", *one)
    return result


def main() -> int:
    """Run all pulls; the exit code tells whether every instance is accounted for."""
    files = full_corpus()
    parts = (_pull_web,) if sys.argv[1:] == ["web"] else (_pull_orthanc, _pull_web, _pull_dcmqrscp)
    with tempfile.TemporaryDirectory() as name:
        results = [result for part in parts for result in part(Path(name), files)]
    return 1 if any(result.unexplained for result in results) else 0


def bucket_of(s3: Any) -> S3Archive:
    """The bucket of a radosgw as the archive of a site."""
    return S3Archive(
        bucket=s3.bucket,
        endpoint=s3.endpoint,
        access_key_id=s3.access_key,
        secret_access_key=s3.secret_key,
    )


def _pull_web(folder: Path, files: list[Path]) -> Iterator[Comparison]:
    """Orthanc by WADO-RS: whole files are compared, file meta and preamble included."""
    if (absent := WebOrthanc.absent()) is not None:
        print(f"WADO-RS: left out, {absent}")
        return
    with WebOrthanc(folder / "web-orthanc") as orthanc:
        stores = orthanc.load(files).stored
        held = {one: partial(_file_of, orthanc, one) for one in orthanc.instances()}
        print(f"Orthanc answered {stores} stores with success and lists {len(held)} instances")
        with radosgw(folder / "rgw-web") as s3:
            yield one_web_pull(folder / "3", orthanc, held, patients_of(files), bucket_of(s3))


def one_web_pull(
    folder: Path,
    orthanc: WebOrthanc,
    held: dict[Held, Callable[[], list[bytes]]],
    patients: dict[str, set[str]],
    archive: S3Archive | DirectoryArchive,
) -> Comparison:
    """Pull all by WADO-RS, compare, print the line."""
    folder.mkdir()
    site = site_for(folder, WebNode(dicomweb=orthanc.url), archive)
    title = "Orthanc, WADO-RS into S3"
    return _pulled(site, folder, title, held, patients, whole_files=True)


def _pull_orthanc(folder: Path, files: list[Path]) -> Iterator[Comparison]:
    port = free_port()
    with Orthanc(folder / "orthanc", {TITLE: port}) as orthanc:
        stores = orthanc.load(files).stored
        held = {one: partial(_file_of, orthanc, one) for one in orthanc.instances()}
        print(f"Orthanc answered {stores} stores with success and lists {len(held)} instances")
        patients = patients_of(files)
        with radosgw(folder / "rgw") as s3:
            to_s3 = (RetrieveMethod.C_MOVE, port, held, patients, bucket_of(s3))
            yield one_pull(folder / "1", "Orthanc, C-MOVE into S3", orthanc, *to_s3)
        to_folder = (RetrieveMethod.C_GET, port, held, patients)
        yield one_pull(folder / "2", "Orthanc, C-GET into a directory", orthanc, *to_folder)


def _pull_dcmqrscp(folder: Path, files: list[Path]) -> Iterator[Comparison]:
    port = free_port()
    options = compressed_options(folder, files)
    with Dcmqrscp(folder / "dcmqrscp", {TITLE: port}, options) as dcmqrscp:
        stores = dcmqrscp.load(files).stored
        paths = instances_in(dcmqrscp.directory / "storage")
        studies = sorted({one.study for one in paths if is_uid(one.study)})
        # It writes anew what it reads from its storage: DCMTK's own receiver is the witness.
        sent = sent_by(dcmqrscp, folder / "witness", port, studies)
        fetched = fetched_by_dcmtk(dcmqrscp, folder / "fetched", studies)
        held = {
            one: partial(read_all, path, sent.get(one), fetched.get(one))
            for one, path in paths.items()
        }
        print(
            f"dcmqrscp answered {stores} stores with success, holds {len(held)} instances "
            f"and sends {len(sent)} of them to storescp"
        )
        patients = patients_of(paths.values())
        for number, retrieve in enumerate((RetrieveMethod.C_MOVE, RetrieveMethod.C_GET), 4):
            title = f"dcmqrscp, {retrieve.upper()} into a directory"
            yield one_pull(folder / str(number), title, dcmqrscp, retrieve, port, held, patients)


if __name__ == "__main__":
    sys.exit(main())
