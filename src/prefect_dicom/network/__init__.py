"""DICOM over the network: the only package, beside ``testing``, that imports pynetdicom.

Requests: ``association`` opens an association, ``exchange`` is one request on it, and
``requestor`` keeps it for many; ``node_client`` is what discovery and retrieval need of whatever
client. ``find``, ``move`` and ``get`` are the services, ``probe`` tries out what a node grants.
``query_keys`` makes identifiers and refuses unsafe ones, ``presentation_contexts`` lists what a
C-GET proposes. Receiving: ``storage_scp``. Results: ``status`` and ``association_errors`` map what
a peer answers to reason codes, ``retrieve_result`` is the end of a C-MOVE or C-GET. Below both
sides: ``dimse`` (messages) and ``upper_layer`` (PDUs, streams, negotiation).
"""
