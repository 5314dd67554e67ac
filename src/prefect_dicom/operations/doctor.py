"""Check of a set-up before a long run, with as little traffic as possible.

For a node: C-ECHO, a C-FIND, and the retrieval of one instance over the configured way. C-ECHO
alone proves little: some PACS answer it to anybody and abort the query that follows.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import socket
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from pydicom.dataset import Dataset

from prefect_dicom.admission.client import ClientFactory
from prefect_dicom.archive import open_archive
from prefect_dicom.archive.spool import Spool
from prefect_dicom.config.node import NodeSettings, PacsNode
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.core.errors import PacsError, PrefectDicomError
from prefect_dicom.core.model import CohortRow, Instance, RetrieveMethod, Study
from prefect_dicom.core.mounts import network_file_system
from prefect_dicom.core.reasons import Scope
from prefect_dicom.core.uids import normal_uid
from prefect_dicom.ledger import Ledger
from prefect_dicom.network.find.list_instances import list_instances
from prefect_dicom.network.move import move
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.network.presentation_contexts import STORAGE_CLASSES, Breadth, context_groups
from prefect_dicom.network.query_keys import retrieve_identifier
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.network.status import is_unable_to_process, reason_for_status
from prefect_dicom.network.storage_scp import Expectation, ReceiverLease, StoreHandler
from prefect_dicom.network.storage_scp.turned_away import TurnedAway, most_telling
from prefect_dicom.operations.destination_check import check_destination
from prefect_dicom.operations.find_a_study import (
    study_by_date,
    study_by_patient,
    study_of_row,
)
from prefect_dicom.operations.findings import Finding, checked, error_words, failed_finding
from prefect_dicom.operations.tls_check import check_files, check_node, check_senders
from prefect_dicom.retrieval.send import wait_until_received

_PROBE = 0
"""Study reference of what the doctor retrieves; references of the ledger begin at 1."""
_LEDGER_ADVICE = (
    "SQLite's locks do not hold on network file systems: the ledger may be refused or damaged. "
    "Point `ledger.path` to a local disk; several hosts share a ledger in PostgreSQL."
)
_SPOOL_ADVICE = "Point `spool.path` to a local disk of each host: a spool is never shared."
_SERVICES = {True: ("C-ECHO", "C-FIND"), False: ("HTTP", "QIDO-RS")}
"""By whether a node speaks DIMSE: what it is asked first, and how it is searched."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A line for a PACS's table of known nodes, and its place in a product's configuration."""

    place: str
    line: str


def examine(
    site: Site, nodes: tuple[str, ...] = (), row: CohortRow | None = None
) -> Iterator[Finding]:
    """Check ledger, spool, archive, receiver and PACS nodes.

    Parameters
    ----------
    site : Site
        Site to check.
    nodes : tuple of str
        Names of the nodes to check; all by default.
    row : CohortRow, optional
        Names the study to check with; by default a recent one is searched.

    Yields
    ------
    Finding
        For each check, as it is made.
    """
    yield checked("ledger", "is whole and takes writes", lambda: _ledger(site))
    if site.ledger.path is not None:
        yield from _local("ledger", site.ledger.path, _LEDGER_ADVICE)
    yield from _local("spool", site.spool.path, _SPOOL_ADVICE)
    yield checked("spool", "is private, writable, above its reserve", lambda: _spool(site))
    yield from _archive(site)
    yield from check_files(site)
    lease: ReceiverLease | None = None
    with contextlib.ExitStack() as stack:
        chosen = {name: site.nodes[name] for name in nodes or site.nodes}
        if any(node.retrieve is RetrieveMethod.C_MOVE for node in chosen.values()):
            try:
                lease = stack.enter_context(ReceiverLease(site))
                words = f"{site.receiver.ae_title} on {site.receiver.bind}:{site.receiver.port}"
                yield Finding("receiver", "listens", True, words)
            except PrefectDicomError as error:
                yield failed_finding("receiver", "listens", error)
        for name, node in chosen.items():
            if isinstance(node, PacsNode) and node.destination is not None:
                yield from check_destination(name, node, node.destination)
                if name not in nodes:
                    # Nothing is queried there, unless somebody names it.
                    continue
            if isinstance(node, PacsNode):
                yield from _way_back(site, name, node)
            yield from _node(site, name, node, lease, row)


def entries_for_the_pacs(site: Site, node: NodeSettings) -> list[Entry]:
    """Return the lines for the PACS's table of known nodes, for some products.

    A DICOMweb server has no such table.
    """
    if not isinstance(node, PacsNode):
        return []
    address, port = _address_for(site, node), site.receiver.port
    titles = {node.calling_ae_title: "query and retrieve"}
    if node.retrieve is RetrieveMethod.C_MOVE:
        receiver = site.receiver.ae_title
        both = "query and retrieve, and be sent to" if receiver in titles else "be sent to"
        titles[receiver] = both
    secured = site.receiver.tls is not False
    entries = []
    for title, purpose in titles.items():
        orthanc: object = [title, address, port]
        if secured:
            orthanc = {"AET": title, "Host": address, "Port": port, "UseDicomTls": True}
        line = f"{json.dumps(title.lower())} : {json.dumps(orthanc)}"
        entries.append(Entry('Orthanc, in "DicomModalities"', line))
        if not secured:
            name = re.sub("[^a-z0-9]", "_", title.lower())
            line = f"{name} = ({title}, {address}, {port})"
            entries.append(Entry("dcmqrscp, in HostTable", line))
        protocol = "DICOM over TLS 1.2 or 1.3" if secured else "plain DICOM"
        words = f"{title} at {address}, port {port}, {protocol}; may {purpose}"
        entries.append(Entry("others, as a remote node", words))
    return entries


def _address_for(site: Site, node: PacsNode) -> str:
    """Return the address at which the PACS reaches this host."""
    bind = site.receiver.bind
    if node.retrieve is RetrieveMethod.C_MOVE and not ipaddress.ip_address(bind).is_unspecified:
        return bind
    ours, _ = _route_to(node)
    return ours or "<this host's address>"


def _route_to(node: PacsNode) -> tuple[str, str]:
    """Return our address and the PACS's on the route to it; empty if it does not resolve."""
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(
            node.host, node.port, type=socket.SOCK_DGRAM
        ):
            # Sends nothing: connecting a datagram socket only chooses the route.
            with contextlib.suppress(OSError), socket.socket(family, kind) as sock:
                sock.connect(address)
                return sock.getsockname()[0], sock.getpeername()[0]
    return "", ""


def _ledger(site: Site) -> str:
    with Ledger.open(ledger_url(site)) as ledger, ledger.runs.begin("doctor"):
        ledger.check_integrity()
        known = len(ledger.cohorts.all())
        return f"{known} cohort{'' if known == 1 else 's'} known"


def _spool(site: Site) -> str:
    spool = Spool(site.spool.path, site.spool.reserve_bytes)
    spool.check_reserve()
    return f"{spool.free_bytes() / 1e9:.1f} GB free above the reserve"


def _local(part: str, path: Path, advice: str) -> Iterator[Finding]:
    """Warn of what lies on a network file system."""
    if (kind := network_file_system(path)) is not None:
        yield Finding(part, "lies on a local disk", True, f"no, on {kind}", advice)


def _archive(site: Site) -> Iterator[Finding]:
    try:
        with contextlib.closing(open_archive(site.archive)) as archive:
            for check in archive.check():
                ok = check.ok or not check.required
                advice = "" if check.ok else check.advice
                words = "" if check.ok or check.required else "no; not a fault"
                yield Finding("archive", check.name, ok, words, advice)
    except PrefectDicomError as error:
        yield failed_finding("archive", "can be used", error)


def _way_back(site: Site, name: str, node: PacsNode) -> Iterator[Finding]:
    """Warn of a receiver that listens where the PACS cannot reach it."""
    bind = site.receiver.bind
    ours, theirs = _route_to(node)
    if (
        node.retrieve is not RetrieveMethod.C_MOVE
        or not ipaddress.ip_address(bind).is_loopback
        or ours in ("", theirs)
        or ipaddress.ip_address(theirs).is_loopback
    ):
        return
    yield Finding(
        name,
        "the way back",
        True,
        f"the receiver listens on {bind} only, and the PACS is another host",
        f"Set `receiver.bind: {ours}`, this host's address on the way to the PACS, unless "
        "something forwards the PACS's connections.",
    )


def _node(
    site: Site, name: str, node: NodeSettings, lease: ReceiverLease | None, row: CohortRow | None
) -> Iterator[Finding]:
    if isinstance(node, PacsNode) and not (yield from check_node(name, node)):
        return
    echo, find = _SERVICES[isinstance(node, PacsNode)]
    with ClientFactory(node, site.capabilities[name]).new() as requestor:
        check, began = echo, time.monotonic()
        try:
            yield Finding(name, check, True, f"{requestor.echo() * 1000:.0f} ms")
            check, began = find, time.monotonic()
            study = yield from _first_study(name, requestor, row)
            if study is None:
                yield Finding(
                    name,
                    check,
                    row is None,
                    "answers, but there is no such study"
                    if row
                    else "answers, but found no study to try a retrieval with",
                    "Name a study the PACS holds: --study, --accession or --patient.",
                )
                return
            yield Finding(name, check, True, "answers")
            check, began = "instance list", time.monotonic()
            listed = list_instances(requestor, study.study_instance_uid, study.patient_id)
            if not listed.instances:
                words = "the PACS lists no instance of the study tried"
                yield Finding(name, check, False, words, "Name another: --study, --accession.")
                return
            yield Finding(name, check, True, f"{len(listed.instances)} in the study tried")
            check, began = f"{node.retrieve.upper()} of one instance", time.monotonic()
            words = _retrieve_one(site, node, requestor, lease, study, listed.instances[0])
            yield Finding(name, check, True, words)
            yield from check_senders(name, lease)
        except PrefectDicomError as error:
            yield failed_finding(name, check, error, time.monotonic() - began)


def _first_study(
    name: str, requestor: NodeClient, row: CohortRow | None
) -> Generator[Finding, None, Study | None]:
    """A study to try a retrieval with: by the row or by date, and else by another key.

    One query that fails proves nothing against queries: PACS end the association over a value of
    their database that they cannot read, or over a key that they cannot match.

    Raises
    ------
    PacsError
        Of the first query, where the second one fails too.
    """
    first, second = study_by_date, study_by_patient
    words = "Queries by date", "a query by PatientID"
    if row is not None:
        first, second = partial(study_of_row, row=row), study_by_date
        words = "The query for it", "a query by date"
    try:
        return first(requestor)
    except PacsError as error:
        # An abort at the first request may be for what was asked, and not for who asks.
        by_abort = error.code == "not-permitted" or error.code == "protocol-not-supported"
        if error.scope is not Scope.REQUEST and not by_abort:
            raise
        failed = error
    try:
        study = second(requestor)
    except PacsError:
        raise failed from None
    find = _SERVICES[isinstance(requestor, Requestor)][1]
    yield Finding(
        name,
        f"{find} by date" if row is None else f"{find} of the study",
        row is None,
        f"{error_words(failed)}; {words[1]} is answered",
        f"{words[0]} failed: the PACS's log says over what. Rows with other identifiers are found.",
    )
    return study


def _retrieve_one(
    site: Site,
    node: NodeSettings,
    requestor: NodeClient,
    lease: ReceiverLease | None,
    study: Study,
    instance: Instance,
) -> str:
    """Retrieve one instance and drop it; returns the details of the result.

    Raises
    ------
    PrefectDicomError
        The instance did not arrive.
    """
    if node.retrieve is RetrieveMethod.C_MOVE and lease is None:
        raise PacsError("receiver-unreachable", "it does not run; not tried")
    identifier = retrieve_identifier(
        node.query_model,
        "IMAGE",
        study.patient_id,
        [study.study_instance_uid],
        [instance.key.series_instance_uid],
        [instance.key.sop_instance_uid],
    )
    studies = {normal_uid(study.study_instance_uid): _PROBE}
    spool = Spool(site.spool.path, site.spool.reserve_bytes)
    spool.drop(_PROBE)
    turned_away: Sequence[TurnedAway] = ()
    try:
        if node.retrieve is RetrieveMethod.WADO_RS:
            handler = StoreHandler(spool, Expectation(studies))
            outcome = requestor.get(identifier, contexts=(), store_handler=handler)
        elif node.retrieve is RetrieveMethod.C_GET:
            classes: Sequence[str]
            classes = [instance.sop_class_uid] if instance.sop_class_uid else STORAGE_CLASSES
            for _, contexts in chain.from_iterable(context_groups(classes, b) for b in Breadth):
                handler = StoreHandler(spool, Expectation(studies))
                outcome = _get(requestor, identifier, contexts, handler)
                if spool.files(_PROBE):
                    break
        else:
            assert lease is not None, "checked above"
            assert isinstance(requestor, Requestor), "only nodes that speak DIMSE have C-MOVE"
            with lease.expecting(studies, requestor.node.calling_ae_title) as expected:
                title = site.receiver.ae_title
                outcome = move(requestor, identifier, title, expected.message_id)
                if outcome.reports_success:
                    wait_until_received(expected, 1, node.timeouts.settle_seconds)
                turned_away = expected.received().turned_away
        for file in spool.files(_PROBE):
            return f"arrives, {file.stat().st_size} bytes"
    finally:
        spool.drop(_PROBE)
    raise _why_nothing_arrived(site, node, outcome, turned_away)


def _get(
    requestor: NodeClient,
    identifier: Dataset,
    contexts: Sequence[tuple[str, str]],
    store_handler: StoreHandler,
) -> RetrieveResult:
    try:
        return requestor.get(identifier, contexts=contexts, store_handler=store_handler)
    except PacsError as error:
        if error.code != "sop-classes-refused":
            raise
        # The node may accept the next proposal.
        return RetrieveResult(None, lost=error.code)


def _why_nothing_arrived(
    site: Site, node: NodeSettings, outcome: RetrieveResult, turned_away: Sequence[TurnedAway]
) -> PacsError:
    if (found := most_telling(turned_away)) is not None:
        ours = f"; ours is {site.receiver.ae_title}" if found.called_ae_title else ""
        return PacsError(found.code, found.words + ours)
    if outcome.status is None:
        return PacsError(outcome.lost or "association-lost")
    service = node.retrieve.upper()
    code = reason_for_status(service, outcome.status) or "nothing-arrived"
    if service == "C-MOVE" and is_unable_to_process(outcome.status):
        # The node has just answered queries: most likely it does not know the move destination.
        code = "move-destination-failed"
    return PacsError(code, f"status {outcome.status:04X}")
