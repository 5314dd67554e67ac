"""DICOMweb, PS3.18: nodes that are searched by QIDO-RS and retrieved from by WADO-RS.

``client`` is the client of such a node. ``search`` reads the pages of a search and ``dicom_json``
their answers; ``query_string`` writes what is searched for, without any encoding that a server may
not undo. ``retrieve`` requests instances, and ``multipart`` takes them apart as their bytes arrive.
Below: ``connection`` (HTTP/1.1 with bounds, time limits for silence, and no log of URLs),
``authentication``, ``content_type``, and ``status``, which maps what a server answers to reason
codes.
"""
