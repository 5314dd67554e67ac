"""The client of a node, by the protocol that the node speaks."""

from __future__ import annotations

from prefect_dicom.config.node import PacsNode
from prefect_dicom.network.node_client import NodeClient
from prefect_dicom.network.requestor import Requestor


def client_of(node: PacsNode, answered: set[str] | None = None) -> NodeClient:
    """Make a client of a node; nothing is opened yet.

    Parameters
    ----------
    answered : set of str, optional
        See :class:`~prefect_dicom.network.node_client.NodeClient`.
    """
    return Requestor(node, answered)
