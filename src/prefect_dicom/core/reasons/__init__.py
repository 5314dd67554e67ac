"""The table of reasons: how a row, a study, an instance or a run can end.

Each code has one entry with all its columns (:class:`Reason`): texts for people, and reactions of
the program. Entries are grouped by what they concern: :mod:`.rows`, :mod:`.studies`,
:mod:`.instances`, :mod:`.deidentification`, :mod:`.deliveries`, :mod:`.nodes`, :mod:`.web` (nodes
that speak DICOMweb), :mod:`.tls` and :mod:`.site` (everything on our side). A new reason is one
new entry in one of these;
``python -m prefect_dicom.core.reasons`` then writes ``docs/reasons.md``.
"""

from __future__ import annotations

from prefect_dicom.core.model import Disposition
from prefect_dicom.core.reasons.deidentification import DEIDENTIFICATION
from prefect_dicom.core.reasons.deliveries import DELIVERIES
from prefect_dicom.core.reasons.instances import INSTANCES
from prefect_dicom.core.reasons.nodes import NODES
from prefect_dicom.core.reasons.reason import PAGE, Consequence, Reason, Scope, pointer
from prefect_dicom.core.reasons.rows import ROWS
from prefect_dicom.core.reasons.site import SITE
from prefect_dicom.core.reasons.studies import STUDIES
from prefect_dicom.core.reasons.tls import TLS
from prefect_dicom.core.reasons.web import WEB

__all__ = [
    "PAGE",
    "REASONS",
    "WORTH_A_RERUN",
    "Consequence",
    "Reason",
    "Scope",
    "page",
    "pointer",
    "reason_for",
]

REASONS: dict[str, Reason] = {
    reason.code: reason
    for reason in (
        *ROWS,
        *STUDIES,
        *INSTANCES,
        *DEIDENTIFICATION,
        *DELIVERIES,
        *NODES,
        *WEB,
        *TLS,
        *SITE,
    )
}


WORTH_A_RERUN = tuple(
    code for code, reason in REASONS.items() if reason.disposition is not Disposition.PERMANENT
)
"""What is tried again where nobody names reasons."""


def reason_for(code: str) -> Reason:
    """The reason with this code; an unknown code is a bug and raises KeyError."""
    return REASONS[code]


def page() -> str:
    """All reasons, in the order of their table: the text of ``docs/reasons.md``."""
    return (
        "# Reasons\n\n"
        "Every row, study and instance that is not archived has a reason code, and so has every "
        "run\nthat ends early. This page explains each of them. `prefect-dicom explain CODE` "
        "prints the same.\nThis page is written by `python -m prefect_dicom.core.reasons`.\n\n"
        + "\n".join(reason.section() for reason in REASONS.values())
    )
