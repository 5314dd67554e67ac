"""Reports of storage commitment (N-EVENT-REPORT), PS3.4 J.3.3: read, and answered."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

from pydicom.uid import UID
from pynetdicom.dsutils import decode

from prefect_dicom.core.uids import normal_uid
from prefect_dicom.network.dimse import (
    NO_DATA_SET,
    RESPONSE,
    CommandField,
    Element,
    Elements,
    unsigned_short,
    write_command,
)


@dataclass(frozen=True, slots=True)
class Report:
    """What a node says of the instances of a transaction.

    Parameters
    ----------
    results : dict of str to int
        By SOP Instance UID: 0 where it is committed, else the failure reason of PS3.3 C.14.
    """

    transaction_uid: str
    results: dict[str, int]


ReportHandler = Callable[[Report | None], int]
"""Takes a report, or None for one that cannot be read; returns the status to answer."""


def read_report(data_set: bytes, transfer_syntax: str) -> Report | None:
    """Read the event information of an N-EVENT-REPORT, PS3.4 J.3.3; None where it is none.

    An instance that is both committed and failed has failed.
    """
    syntax = UID(transfer_syntax)
    try:
        found = decode(io.BytesIO(data_set), syntax.is_implicit_VR, syntax.is_little_endian)
        results = {
            normal_uid(str(item.ReferencedSOPInstanceUID)): 0
            for item in found.get("ReferencedSOPSequence") or ()
        }
        for item in found.get("FailedSOPSequence") or ():
            reason = int(item.get("FailureReason") or 0x0110)
            results[normal_uid(str(item.ReferencedSOPInstanceUID))] = reason
        return Report(normal_uid(str(found.TransactionUID)), results)
    except Exception:
        # Bytes that are no data set raise a dozen types.
        return None


def report_response(elements: Elements, status: int) -> bytes:
    """The command set of the response to an N-EVENT-REPORT, PS3.7 10.3.1.2."""
    answer: dict[int, bytes | int] = {
        Element.COMMAND_FIELD: CommandField.N_EVENT_REPORT_RQ | RESPONSE,
        Element.MESSAGE_ID_BEING_RESPONDED_TO: unsigned_short(elements, Element.MESSAGE_ID) or 0,
        Element.COMMAND_DATA_SET_TYPE: NO_DATA_SET,
        Element.STATUS: status,
    }
    for element in (
        Element.AFFECTED_SOP_CLASS_UID,
        Element.AFFECTED_SOP_INSTANCE_UID,
        Element.EVENT_TYPE_ID,
    ):
        if element in elements:
            answer[element] = elements[element]
    return write_command(answer)
