"""Prove a set-up before a long run: each half is tried with the least it takes.

For a node: C-ECHO, a C-FIND, and the retrieval of one instance over the configured way. C-ECHO
alone proves little: some archives answer it to anybody and abort the query that follows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from prefect_dicom.archive import open_archive
from prefect_dicom.configuration import PacsNode, Site, ledger_url
from prefect_dicom.dimse.association import Requestor
from prefect_dicom.dimse.echo import echo
from prefect_dicom.dimse.find import find_some_studies, find_studies, list_instances
from prefect_dicom.dimse.get import c_get
from prefect_dicom.dimse.identifier import retrieve_identifier
from prefect_dicom.dimse.move import move
from prefect_dicom.dimse.proposal import STORAGE_CLASSES, proposals
from prefect_dicom.errors import PrefectDicomError
from prefect_dicom.identifiers import is_safe_key
from prefect_dicom.ledger import Ledger
from prefect_dicom.matching import study_query
from prefect_dicom.model import CohortRow, Instance, RetrieveMethod, Study
from prefect_dicom.reasons import reason_for
from prefect_dicom.receiver import Expectation, Intake, ReceiverLease
from prefect_dicom.retrieval import wait_until_arrived
from prefect_dicom.spool import Spool

_PROBE = 0
"""Study reference of what the doctor retrieves; the ledger begins at 1."""
_WINDOWS_DAYS = (7, 90, 365, 3650)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's list."""

    part: str
    check: str
    ok: bool
    words: str = ""
    advice: str = ""


def examine(
    site: Site, nodes: tuple[str, ...] = (), row: CohortRow | None = None
) -> Iterator[Finding]:
    """Examine ledger, spool, archive and PACS nodes, one finding after the other.

    Parameters
    ----------
    nodes : tuple of str
        Only these nodes; all by default.
    row : CohortRow, optional
        Names the study to try with; by default a recent one is looked for.
    """
    yield _try("ledger", "opens and writes", lambda: _ledger(site))
    yield _try("spool", "private, writable, above its reserve", lambda: _spool(site))
    yield from _archive(site)
    lease: ReceiverLease | None = None
    with contextlib.ExitStack() as stack:
        chosen = {name: site.nodes[name] for name in nodes or site.nodes}
        if any(node.retrieve is RetrieveMethod.C_MOVE for node in chosen.values()):
            try:
                lease = stack.enter_context(ReceiverLease(site))
                words = f"{site.receiver.ae_title} on {site.receiver.bind}:{site.receiver.port}"
                yield Finding("receiver", "listens", True, words)
            except PrefectDicomError as error:
                yield _failed("receiver", "listens", error)
        for name, node in chosen.items():
            yield from _node(site, name, node, lease, row)


def entry_for_the_pacs(site: Site, node: PacsNode) -> str:
    """What to add to the PACS's table of known nodes, for the servers we know."""
    receiver = site.receiver
    address = receiver.bind if receiver.bind not in ("0.0.0.0", "::") else "<this host's address>"
    title = receiver.ae_title if node.retrieve is RetrieveMethod.C_MOVE else node.calling_ae_title
    lines = [
        f'Orthanc, in "DicomModalities":  "{title}" : ["{title}", "{address}", {receiver.port}]',
        f"dcmqrscp, in HostTable:  {title.lower()} = ({title}, {address}, {receiver.port})",
        f"others: a remote node / destination with AE title {title}, host {address}, port "
        f"{receiver.port}, plain DICOM, allowed to query and to retrieve",
    ]
    if node.calling_ae_title != title:
        lines.append(f"and the AE title {node.calling_ae_title} as a node that may query")
    return "\n".join(lines)


def _try(part: str, check: str, probe) -> Finding:
    try:
        return Finding(part, check, True, probe() or "")
    except PrefectDicomError as error:
        return _failed(part, check, error)


def _failed(part: str, check: str, error: PrefectDicomError, advice: str = "") -> Finding:
    words = f"{error.reason.meaning} ({error.code}{': ' + error.detail if error.detail else ''})"
    return Finding(part, check, False, words, advice or error.reason.advice)


def _ledger(site: Site) -> str:
    with Ledger.open(ledger_url(site)) as ledger, ledger.run("doctor"):
        return f"{len(ledger.cohorts())} cohorts known"


def _spool(site: Site) -> str:
    spool = Spool(site.spool.path, site.spool.reserve_bytes)
    spool.check_reserve()
    return f"{spool.free_bytes() / 1e9:.1f} GB free above the reserve"


def _archive(site: Site) -> Iterator[Finding]:
    try:
        with contextlib.closing(open_archive(site.archive)) as archive:
            for check in archive.check():
                ok = check.ok or not check.required
                advice = "" if check.ok else check.advice
                words = "" if check.ok or check.required else "no; a weaker proof, not a fault"
                yield Finding("archive", check.name, ok, words, advice)
    except PrefectDicomError as error:
        yield _failed("archive", "can be used", error)


def _node(
    site: Site, name: str, node: PacsNode, lease: ReceiverLease | None, row: CohortRow | None
) -> Iterator[Finding]:
    entry = entry_for_the_pacs(site, node)
    with Requestor(node) as requestor:
        try:
            yield Finding(name, "C-ECHO", True, f"{echo(requestor) * 1000:.0f} ms")
        except PrefectDicomError as error:
            yield _failed(name, "C-ECHO", error)
            return
        try:
            study = _some_study(requestor, row)
        except PrefectDicomError as error:
            yield _failed(name, "C-FIND", error, f"{error.reason.advice}\n{entry}")
            return
        if study is None:
            yield Finding(
                name,
                "C-FIND",
                row is None,
                "answered, but no study was found to try a retrieval with",
                "Name a study the PACS holds: --study, --accession or --patient.",
            )
            return
        yield Finding(name, "C-FIND", True, "answered")
        try:
            listed = list_instances(requestor, study.study_instance_uid, study.patient_id)
            yield Finding(name, "instance list", True, f"{len(listed.instances)} instances")
            if listed.instances:
                yield _retrieve_one(site, name, node, requestor, lease, study, listed.instances[0])
        except PrefectDicomError as error:
            yield _failed(name, "instance list", error)


def _some_study(requestor: Requestor, row: CohortRow | None) -> Study | None:
    if row is not None:
        studies = find_studies(requestor, study_query(row))
        return next((s for s in studies if is_safe_key(s.study_instance_uid)), None)
    today = datetime.now(UTC).date()
    for first in [today - timedelta(days=days) for days in _WINDOWS_DAYS] + [date(1900, 1, 1)]:
        for study in find_some_studies(requestor, first, today):
            if is_safe_key(study.study_instance_uid):
                return study
    return None


def _retrieve_one(
    site: Site,
    name: str,
    node: PacsNode,
    requestor: Requestor,
    lease: ReceiverLease | None,
    study: Study,
    instance: Instance,
) -> Finding:
    check = f"{node.retrieve.upper()} of one instance"
    identifier = retrieve_identifier(
        node.information_model,
        "IMAGE",
        study.patient_id,
        [study.study_instance_uid],
        [instance.key.series_instance_uid],
        [instance.key.sop_instance_uid],
    )
    studies = {study.study_instance_uid: _PROBE}
    spool = Spool(site.spool.path, site.spool.reserve_bytes)
    spool.drop(_PROBE)
    try:
        if node.retrieve is RetrieveMethod.C_GET:
            classes = [instance.sop_class_uid] if instance.sop_class_uid else STORAGE_CLASSES
            _, contexts = next(proposals(classes))
            intake = Intake(spool, Expectation(studies))
            c_get(node, identifier, contexts=contexts, intake=intake)
        elif lease is None:
            return Finding(name, check, False, "the receiver does not run")
        else:
            with lease.expecting(studies, node.calling_ae_title) as expected:
                title = site.receiver.ae_title
                outcome = move(requestor, identifier, title, expected.message_id)
                if outcome.status == 0:
                    wait_until_arrived(expected, 1, node.timeouts.settle_seconds)
        files = spool.files(_PROBE)
        if files:
            return Finding(name, check, True, f"{files[0].stat().st_size} bytes arrived")
    except PrefectDicomError as error:
        return _failed(name, check, error)
    finally:
        spool.drop(_PROBE)
    reason = reason_for("nothing-arrived")
    return Finding(
        name,
        check,
        False,
        "The PACS found the instance and nothing arrived.",
        f"{reason.advice}\n{entry_for_the_pacs(site, node)}",
    )
