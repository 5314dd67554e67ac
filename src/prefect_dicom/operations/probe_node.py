"""Probe of a PACS node by a bounded number of requests that change nothing on it.

At most ``MOST_REQUESTS`` associations and requests, one after the other except the last, which
find how many associations are served at a time. Every query names one study, series or range of
days, and is cancelled after ``MOST_ANSWERS`` answers. Retrieval is probed with a handful of
instances of one study, requested by UID, at most ``MOST_INSTANCES`` by one request (or one short
series, where the node sends no single ones), which are dropped. Nothing is sent to the node
for storage, and nothing is moved elsewhere or deleted.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from prefect_dicom.config.capabilities import NodeCapabilities, Service
from prefect_dicom.config.site import Site
from prefect_dicom.config.web_node import WebNode
from prefect_dicom.core.errors import PacsError, PrefectDicomError
from prefect_dicom.core.model import CohortRow, InformationModel, RetrieveMethod
from prefect_dicom.network.information_models import QUERY_RETRIEVE_CLASSES
from prefect_dicom.network.presentation_contexts import COMMON_SYNTAXES
from prefect_dicom.network.probe import models_offered, negotiate
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.storage_scp import ReceiverLease
from prefect_dicom.network.upper_layer.association_items import OperationsWindow
from prefect_dicom.operations.probe_keys import KeyProbe
from prefect_dicom.operations.probe_queries import QueryProbe
from prefect_dicom.operations.probe_retrieval import probe_retrieval
from prefect_dicom.operations.probe_session import ProbeSession, RequestsSpent
from prefect_dicom.operations.probe_web import WebFacts, probe_web

MOST_ASSOCIATIONS = 8
"""Limit on associations at the same time."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Result of the probe of one node.

    Attributes
    ----------
    capabilities : NodeCapabilities
        What the node does; fields that could not be probed are unset.
    requests, instances : int
        Requests sent and instances received for it.
    notes : tuple of str
        Text for people: what could not be probed, and why.
    """

    capabilities: NodeCapabilities
    requests: int
    instances: int
    notes: tuple[str, ...] = ()


def probe_node(site: Site, name: str, row: CohortRow | None = None) -> ProbeResult:
    """Find out what a node does.

    Parameters
    ----------
    site : Site
        Site with the node.
    name : str
        Name of the node in the site.
    row : CohortRow, optional
        Names the study to probe with; by default a small recent one is searched.

    Returns
    -------
    ProbeResult
        The node's capabilities, and the requests and instances it took.

    Raises
    ------
    PrefectDicomError
        The node cannot be queried at all, or the spool cannot be used.
    """
    node = site.nodes[name]
    if isinstance(node, WebNode):
        return _result(probe_web(site, node, row))
    session = ProbeSession(site, node)
    with contextlib.ExitStack() as stack:
        stack.enter_context(session.requestor)
        if site.receives:
            try:
                session.lease = stack.enter_context(ReceiverLease(site))
            except PrefectDicomError as error:
                session.notes.append(f"C-MOVE was not tried: the receiver does not run ({error})")
        else:
            session.notes.append("C-MOVE was not tried: the site has no receiver")
        with contextlib.suppress(RequestsSpent):
            _NodeProbe(session).run(row)
    return _result(session)


def _result(found: ProbeSession | WebFacts) -> ProbeResult:
    return ProbeResult(
        NodeCapabilities.model_validate(found.facts),
        found.requests,
        found.instances,
        tuple(found.notes),
    )


class _NodeProbe:
    """All probes of one node, from what most depends on to what least does."""

    def __init__(self, session: ProbeSession) -> None:
        self._session = session

    def run(self, row: CohortRow | None) -> None:
        """Run all probes until the limit on requests is reached."""
        node, facts = self._session.node, self._session.facts
        # Whether the node is there and lets us in: the error of an echo says most.
        self._session.spend()
        self._session.requestor.echo()
        self._offers()
        if node.information_model in facts.get("find_models", InformationModel):
            self._by_queries(row)
        self._associations()
        self._advise()

    def _by_queries(self, row: CohortRow | None) -> None:
        session, queries, keys = self._session, QueryProbe(self._session), KeyProbe(self._session)
        listed = queries.list_studies()
        studies = queries.named(row) if row is not None else queries.candidates(listed)
        if not studies:
            session.notes.append(
                "no study was found to try with: name one by --patient, --study or --accession"
            )
            return
        series = queries.probe_levels(studies[0])
        queries.probe_uid_lists(listed or studies)
        keys.probe_keys(studies[0])
        keys.probe_character_sets([*studies, *listed])
        probe_retrieval(session, studies[0], series)

    def _advise(self) -> None:
        """Add notes on what to change in the site file."""
        node, facts, notes = self._session.node, self._session.facts, self._session.notes
        own = node.information_model
        other = next(model for model in InformationModel if model is not own)
        for service, key in (("C-FIND", "find_models"), ("C-MOVE", "move_models")):
            models = facts.get(key, (own,))
            if own not in models and other in models:
                notes.append(
                    f"{service} is offered in another model: set `information_model: {other}`"
                )
        by_get = node.retrieve is RetrieveMethod.C_GET
        mine, others = ("c_get", "c_move") if by_get else ("c_move", "c_get")
        result = facts.get(mine, Service.WORKS)
        if result is Service.WORKS or facts.get(others) is not Service.WORKS:
            return
        if by_get:
            words = "runs ask by C-MOVE; set `retrieve: c-move`"
        else:
            words = "try `prefect-dicom doctor` for the way back, or set `retrieve: c-get`"
        notes.append(f"{mine.replace('_', '-').upper()} came to {result}: {words}")

    def _offers(self) -> None:
        node, facts = self._session.node, self._session.facts
        self._session.spend_alone()
        try:
            models = models_offered(node)
        except PacsError as error:
            self._session.notes.append(f"information models were not tried: {error.code}")
            return
        facts["find_models"] = models["C-FIND"]
        facts["move_models"] = models["C-MOVE"]
        facts["get_models"] = models["C-GET"]
        if node.information_model not in models["C-MOVE"]:
            facts["c_move"] = Service.NOT_OFFERED
            return
        self._session.spend_alone()
        # Some nodes abort on a proposal with optional items.
        with contextlib.suppress(PacsError):
            model = QUERY_RETRIEVE_CLASSES["C-MOVE"][node.information_model]
            any_number = OperationsWindow(0, 1)
            offer = negotiate(node, [(model, COMMON_SYNTAXES[1])], operations_window=any_number)
            facts["asynchronous_operations"] = offer.operations_window

    def _associations(self) -> None:
        """Count the associations served at the same time; an accepted one may still wait."""
        node = self._session.node
        self._session.requestor.close()
        most = min(MOST_ASSOCIATIONS, node.limits.associations + 2)
        served = 0
        with contextlib.ExitStack() as stack:
            for _ in range(most):
                requestor = stack.enter_context(Requestor(node))
                self._session.spend()
                try:
                    requestor.echo()
                except PacsError:
                    break
                served += 1
        if served:
            self._session.facts["associations"] = served
