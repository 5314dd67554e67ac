"""Retrieval from the nodes of a run: sessions, instance lists and the managed receiver."""

from __future__ import annotations

import contextlib
import threading
from functools import partial

from prefect_dicom.archive.spool import Spool
from prefect_dicom.config.node import NodeSettings
from prefect_dicom.core.model import RetrieveMethod
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.network.storage_scp import ReceiverLease
from prefect_dicom.retrieval.fetch import Retrieval
from prefect_dicom.retrieval.ingest import Ingest
from prefect_dicom.retrieval.instance_list import Listing
from prefect_dicom.retrieval.send import NodeSession, Reception
from prefect_dicom.retrieval.strategy import PeerCapabilities
from prefect_dicom.run.context import RunContext


class NodeRetrieval:
    """Factory of retrievals and instance lists over a borrowed association. Thread-safe.

    Parameters
    ----------
    closing : contextlib.ExitStack
        Closes with the run what is opened here.
    """

    def __init__(self, context: RunContext, spool: Spool, closing: contextlib.ExitStack) -> None:
        self._context = context
        self._spool = spool
        self._closing = closing
        self._lock = threading.Lock()
        self._lease: ReceiverLease | None = None
        self._capabilities: dict[str, PeerCapabilities] = {}

    def retrieval(self, node: str, requestor: NodeClient) -> Retrieval:
        """Return the retrieval of studies from a node."""
        context = self._context
        session = NodeSession(
            node=self._effective_node(node),
            requestor=requestor,
            pool=context.access.pool,
            capabilities=self.capabilities(node),
            admission=context.access.admission(node),
            wait=lambda: context.access.wait_for(node, holding=requestor),
            stopping=partial(context.access.is_ending, node),
            note=partial(context.notes.add, node),
        )
        reception = Reception(
            self._spool, self.ingest(), self.receiver, context.site.receiver.ae_title
        )
        return Retrieval(session, reception, self.listing(node, requestor))

    def ingest(self) -> Ingest:
        """Return an ingest of received instances, for one thread."""
        return Ingest(
            self._context.ledger,
            self._spool,
            leave_out_faulty=self._context.site.validation.faulty == "leave-out",
        )

    def listing(self, node: str, requestor: NodeClient) -> Listing:
        """Return the reader of a node's instance lists."""
        context = self._context
        return Listing(
            requestor,
            context.ledger,
            self._spool,
            weakest=context.site.validation.evidence,
            pool=context.access.pool,
            capabilities=self.capabilities(node).queries,
            filters=context.filters,
        )

    def capabilities(self, node: str) -> PeerCapabilities:
        """Capabilities of a node for retrieval, as configured and as this run has found out."""
        with self._lock:
            if node not in self._capabilities:
                site = self._context.site
                self._capabilities[node] = PeerCapabilities.of(
                    site.capabilities[node], site.nodes[node], site.receives
                )
            return self._capabilities[node]

    def contradictions(self, node: str) -> dict[str, bool]:
        """By key of the capabilities file, whether the node has behaved otherwise in this run."""
        capabilities = self.capabilities(node)
        return {
            "uid_lists_in_retrieves": capabilities.one_uid_only,
            "image_level_retrieve": capabilities.refuses_image_level,
            "levels": self._lacks_a_level(node),
        }

    def receiver(self) -> ReceiverLease | None:
        """Return the lease on the managed receiver, started if need be; None if the site has none.

        Raises
        ------
        ReceiverError
            The receiver cannot run.
        """
        with self._lock:
            if self._lease is None and self._context.site.receives:
                self._lease = self._closing.enter_context(ReceiverLease(self._context.site))
            return self._lease

    def prepare(self) -> None:
        """Start the receiver if any node needs it: its faults show before the first request."""
        for name, node in self._context.site.nodes.items():
            if self.capabilities(name).method is not None:
                self._context.notes.add(
                    name, "its capabilities say that it refuses C-GET; C-MOVE is used"
                )
            elif node.retrieve is not RetrieveMethod.C_MOVE:
                continue
            self.receiver()

    def _effective_node(self, node: str) -> NodeSettings:
        """The node's settings, with the request size that its access schedule allows."""
        effective = self._context.site.effective_node(node)
        most = self._context.access.rates.request_instances(node)
        limits = effective.limits.model_copy(update={"chunk_instances": most})
        return effective.model_copy(update={"limits": limits})

    def _lacks_a_level(self, node: str) -> bool:
        """Whether the node does not answer at a level at which its capabilities say it does."""
        answers = self.capabilities(node).queries.answers
        levels = self._context.site.capabilities[node].levels or ()
        return any(not answers.get(level, True) for level in levels)
