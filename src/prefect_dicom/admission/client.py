"""The clients of a node, by the protocol that the node speaks."""

from __future__ import annotations

from prefect_dicom.config.capabilities import NodeCapabilities
from prefect_dicom.config.node import NodeSettings, PacsNode
from prefect_dicom.config.web_node import WebNode
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.web.client import WebClient, authenticator_of


class ClientFactory:
    """Makes the clients of one node. Thread-safe.

    Parameters
    ----------
    node : NodeSettings
        The node.
    capabilities : NodeCapabilities
        What was learnt of it before.
    """

    def __init__(self, node: NodeSettings, capabilities: NodeCapabilities) -> None:
        self._node = node
        self._capabilities = capabilities
        # Of all clients together: a token is issued once.
        self._authenticator = authenticator_of(node) if isinstance(node, WebNode) else None

    def new(self, answered: set[str] | None = None) -> NodeClient:
        """Make a client; nothing is opened yet.

        Parameters
        ----------
        answered : set of str, optional
            See :class:`~prefect_dicom.network.node_client.NodeClient`.
        """
        node = self._node
        if isinstance(node, WebNode):
            return WebClient(node, answered, self._authenticator, self._capabilities)
        assert isinstance(node, PacsNode)
        return Requestor(node, answered)
