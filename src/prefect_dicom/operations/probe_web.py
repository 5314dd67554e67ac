"""Probe of a DICOMweb node by a handful of requests that change nothing on it.

What cannot be seen from a pull is asked here: whether the server undoes percent-encoding, and
whether it matches by the keys that rows are searched by. One instance is retrieved and deleted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prefect_dicom.admission.client import ClientFactory
from prefect_dicom.archive.spool import Spool
from prefect_dicom.config.capabilities import (
    KeyCapability,
    Match,
    NodeCapabilities,
    QueryLevel,
    Service,
)
from prefect_dicom.config.site import Site
from prefect_dicom.config.web_node import WebNode
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import CohortRow, Instance, Study
from prefect_dicom.core.reasons import Scope
from prefect_dicom.core.uids import is_safe_key, normal_uid
from prefect_dicom.discovery.row_query import OF_NOBODY
from prefect_dicom.network.find.list_instances import list_instances
from prefect_dicom.network.find.list_series import list_series
from prefect_dicom.network.find.list_studies import answers_anything, find_studies
from prefect_dicom.network.query_keys import retrieve_identifier
from prefect_dicom.network.storage_scp import Expectation, StoreHandler
from prefect_dicom.operations.find_a_study import study_by_date, study_of_row
from prefect_dicom.web.client import WebClient

_PROBE = 0
"""Study reference of what is retrieved; references of the ledger begin at 1."""


@dataclass(slots=True)
class WebFacts:
    """What was found out of a DICOMweb node.

    Attributes
    ----------
    facts : dict
        Fields of :class:`~prefect_dicom.config.capabilities.NodeCapabilities`.
    requests, instances : int
        Probes made, and instances received.
    notes : list of str
        Text for people: what could not be probed, and why.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    requests: int = 0
    instances: int = 0
    notes: list[str] = field(default_factory=list)


def probe_web(site: Site, node: WebNode, row: CohortRow | None) -> WebFacts:
    """Find out what a DICOMweb node does.

    Parameters
    ----------
    row : CohortRow, optional
        Names the study to probe with; by default a recent one is searched.

    Raises
    ------
    PrefectDicomError
        The node cannot be searched at all, or the spool cannot be used.
    """
    found = WebFacts()
    with ClientFactory(node, NodeCapabilities()).new() as client:
        assert isinstance(client, WebClient)
        found.requests += 1
        client.echo()
        found.requests += 1
        study = study_by_date(client) if row is None else study_of_row(client, row)
        if study is None:
            found.notes.append(
                "no study was found to try with: name one by --patient, --study or --accession"
            )
            return found
        found.facts["study_counts"] = study.number_of_instances is not None
        _probe_keys(client, study, found)
        _probe_encoding(client, study, found)
        instance = _probe_levels(client, study, found)
        if instance is not None:
            _probe_retrieval(site, client, study, instance, found)
    return found


def _probe_keys(client: WebClient, study: Study, found: WebFacts) -> None:
    keys = {}
    for keyword, value in (
        ("PatientID", study.patient_id),
        ("AccessionNumber", study.accession_number),
        ("StudyInstanceUID", study.study_instance_uid),
    ):
        if not is_safe_key(value):
            continue
        found.requests += 2
        try:
            finds = any(
                one.study_instance_uid == study.study_instance_uid
                for one in find_studies(client, {keyword: value})
            )
            nobody = "2.25.1" if keyword == "StudyInstanceUID" else OF_NOBODY
            heeds = not answers_anything(client, {keyword: nobody})
        except PacsError as error:
            if error.scope is not Scope.REQUEST:
                raise
            finds, heeds = False, error.code != "answer-unusable"
        match = Match.MATCHED if finds and heeds else Match.EMPTIES if heeds else Match.IGNORED
        keys[keyword] = KeyCapability(match=match)
    found.facts["keys"] = keys
    ignored = [keyword for keyword, key in keys.items() if key.match is Match.IGNORED]
    if ignored:
        found.notes.append(f"it ignores {', '.join(ignored)}: rows cannot be searched by that")


def _probe_encoding(client: WebClient, study: Study, found: WebFacts) -> None:
    """Search for a PatientID whose last character is encoded though it need not be."""
    if not (study.patient_id.isascii() and study.patient_id.isalnum()):
        found.notes.append("percent-encoding was not tried: the PatientID has other characters")
        return
    found.requests += 1
    found.facts["percent_decoding"] = client.finds_encoded(study.patient_id)


def _probe_levels(client: WebClient, study: Study, found: WebFacts) -> Instance | None:
    levels = [QueryLevel.STUDY]
    instance = None
    try:
        found.requests += 1
        series = list_series(client, study.study_instance_uid, study.patient_id).series
        if series:
            levels.append(QueryLevel.SERIES)
            counts = [one.number_of_instances for one in series]
            found.facts["series_counts"] = None not in counts
        found.requests += 1
        listed = list_instances(client, study.study_instance_uid, study.patient_id).instances
        if listed:
            levels.append(QueryLevel.IMAGE)
            instance = listed[0]
    except PacsError as error:
        if error.scope is not Scope.REQUEST:
            raise
        found.notes.append(f"below the study: {error.reason.meaning} ({error.code})")
    found.facts["levels"] = tuple(levels)
    return instance


def _probe_retrieval(
    site: Site, client: WebClient, study: Study, instance: Instance, found: WebFacts
) -> None:
    spool = Spool(site.spool.path, site.spool.reserve_bytes)
    spool.drop(_PROBE)
    studies = {normal_uid(study.study_instance_uid): _PROBE}
    identifier = retrieve_identifier(
        client.node.query_model,
        "IMAGE",
        None,
        [study.study_instance_uid],
        [instance.key.series_instance_uid],
        [instance.key.sop_instance_uid],
    )
    found.requests += 1
    try:
        handler = StoreHandler(spool, Expectation(studies))
        outcome = client.get(identifier, contexts=(), store_handler=handler)
        arrived = len(spool.files(_PROBE))
    finally:
        spool.drop(_PROBE)
    found.instances += arrived
    found.facts["image_level_retrieve"] = arrived > 0
    found.facts["wado_rs"] = Service.WORKS if arrived else Service.REFUSED
    if not arrived:
        found.notes.append(f"WADO-RS of one instance ended with {outcome.lost or 'nothing'}")
