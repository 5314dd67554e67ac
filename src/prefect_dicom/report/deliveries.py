"""Tables of deliveries: what became of every study of a cohort at a target."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect_dicom.core.deliveries import DeliveryState
from prefect_dicom.core.files import create_file
from prefect_dicom.core.reasons import reason_for
from prefect_dicom.ledger import Cohort, DeliveryRecord, DeliveryTotals, Ledger
from prefect_dicom.report.files import quoted_identifier, replacing, write_table_for_people

DELIVERIES = "deliveries"
"""Name of the table, with the target's behind it, and of the folder of manifests."""

COLUMNS = (
    "study",
    "state",
    "evidence",
    "reason",
    "detail",
    "what_to_do",
    "method",
    "instances",
    "sent_at",
    "verified_at",
    "PatientID",
    "AccessionNumber",
    "StudyInstanceUID",
)


def write_deliveries(ledger: Ledger, cohort: Cohort, target: str, reports: Path) -> Path:
    """Write the table of a cohort's deliveries to a target, and the manifests of verified ones.

    Both hold identifiers, and are readable by the user alone.

    Returns
    -------
    Path
        The table.
    """
    folder = reports / cohort.name
    table = folder / f"{DELIVERIES}-{target}.csv"
    write_table_for_people(table, COLUMNS, _rows(ledger, cohort, target))
    manifests = folder / DELIVERIES / target
    manifests.mkdir(parents=True, exist_ok=True)
    for record in ledger.deliveries.of_cohort(cohort.number, target):
        path = manifests / f"{record.reference}.json"
        if record.state is not DeliveryState.VERIFIED or path.exists():
            continue
        body = ledger.deliveries.manifest(record.reference, target)
        if body is not None:
            with replacing(path) as draft, open(create_file(draft), "wb") as file:
                file.write(body)
    return table


def _rows(ledger: Ledger, cohort: Cohort, target: str) -> Iterator[dict[str, Any]]:
    for record in ledger.deliveries.of_cohort(cohort.number, target):
        yield _row(record)


def _row(record: DeliveryRecord) -> dict[str, Any]:
    study = record.study
    at = {"sent_at": record.sent_at, "verified_at": record.verified_at}
    return {
        "study": record.reference,
        "state": record.state.value,
        "evidence": "" if record.evidence is None else record.evidence.value,
        "reason": record.reason or "",
        "detail": record.detail,
        "what_to_do": "" if record.reason is None else reason_for(record.reason).what_to_do,
        "method": record.method.value,
        "instances": record.instances,
        **{name: time and time.isoformat(timespec="seconds") for name, time in at.items()},
        "PatientID": quoted_identifier(study.patient_id),
        "AccessionNumber": quoted_identifier(study.accession_number),
        "StudyInstanceUID": study.study_instance_uid,
    }


def format_delivery(totals: DeliveryTotals) -> str:
    """How far the deliveries of a cohort are, in a line.

    Examples
    --------
    >>> from collections import Counter
    >>> states = Counter({DeliveryState.VERIFIED: 3, DeliveryState.FAILED: 1})
    >>> format_delivery(DeliveryTotals(states, Counter(listed=3), Counter(), 2, 9, 100))
    '3 of 6 studies verified (3 listed), 1 failed, 2 not archived yet'
    """
    states = totals.states
    by = ", ".join(f"{count} {evidence}" for evidence, count in sorted(totals.evidence.items()))
    words = [
        f"{states[DeliveryState.VERIFIED]} of {states.total() + totals.not_due} studies verified"
        + (f" ({by})" if by else "")
    ]
    words += [
        f"{count} {name}"
        for count, name in (
            (states[DeliveryState.SENT], "sent and not verified yet"),
            (states[DeliveryState.DUE], "due"),
            (states[DeliveryState.FAILED], "failed"),
            (totals.not_due, "not archived yet"),
        )
        if count
    ]
    return ", ".join(words)
