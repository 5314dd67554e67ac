"""Formatting for people: a cohort in one line, sizes, durations and estimates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prefect_dicom.core.model import Evidence, StudyState, Verdict
from prefect_dicom.ledger import Totals

if TYPE_CHECKING:
    from prefect_dicom.report.estimate import Estimate

# PS3.3 C.7.3.1.1.1: what goes with images and says nothing of their size.
_BESIDE_IMAGES = {"SR", "PR", "KO", "DOC", "REG", "FID", "RWV", "PLAN", "AU"}
_UNKNOWN = "unknown"


def format_totals(totals: Totals) -> str:
    """A cohort in one line."""
    verdicts = ", ".join(f"{totals.rows[v]} {v}" for v in Verdict if totals.rows[v])
    gaps = f"; {format_gaps(totals)}" if totals.unproved else ""
    return (
        f"{sum(totals.rows.values())} rows: {verdicts or 'none'}; "
        f"{totals.studies[StudyState.ARCHIVED]} of {sum(totals.studies.values())} studies, "
        f"{totals.stored} of {totals.expected} instances, "
        f"{format_bytes(totals.size_bytes)} archived"
        f"{f', {totals.missing} accepted as missing' if totals.missing else ''}"
        f"{format_nodes(totals)}{format_evidence(totals)}{gaps}"
    )


def format_evidence(totals: Totals) -> str:
    """How many studies were archived by less than the PACS's own list of their instances.

    Examples
    --------
    >>> from collections import Counter
    >>> of = Counter({Evidence.SERIES_COUNTS: 12, Evidence.INSTANCE_LIST: 3})
    >>> format_evidence(Totals(Counter(), Counter(), 0, 0, 0, 0, 0, evidence=of))
    ', 12 studies by series counts'
    """
    return "".join(
        f", {count} {'study' if count == 1 else 'studies'} by {evidence.replace('-', ' ')}"
        for evidence in Evidence
        if evidence is not Evidence.INSTANCE_LIST and (count := totals.evidence[evidence])
    )


def format_nodes(totals: Totals) -> str:
    """How many studies came from where, if they are from more than one node.

    Examples
    --------
    >>> from collections import Counter
    >>> of = Counter(main=30, vna=12)
    >>> format_nodes(Totals(Counter(), Counter(), 0, 0, 0, 0, 0, nodes=of))
    ' (30 from main, 12 from vna)'
    """
    if len(totals.nodes) < 2:
        return ""
    named = ", ".join(f"{count} from {node}" for node, count in totals.nodes.most_common())
    return f" ({named})"


def format_gaps(totals: Totals, most: int = 3) -> str:
    """The windows in which a PACS may have more studies of rows, by how many rows; ``most`` named.

    Examples
    --------
    >>> from collections import Counter
    >>> nothing = Totals(Counter(), Counter(), 0, 0, 0, 0, 0, Counter({"20240305": 2}))
    >>> format_gaps(nothing)
    'lists not proved whole: 20240305 (2 rows)'
    """
    named = [
        f"{gap} ({rows} row{'s' * (rows != 1)})" for gap, rows in totals.unproved.most_common(most)
    ]
    if more := len(totals.unproved) - len(named):
        named.append(f"{more} more")
    return f"lists not proved whole: {', '.join(named)}"


def format_bytes(size_bytes: float) -> str:
    """A size for people, in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.1f} TB"


def format_duration(seconds: float) -> str:
    """A duration for people.

    Examples
    --------
    >>> [format_duration(s) for s in (4.2, 90, 12_000, 200_000)]
    ['4 s', '1 min 30 s', '3 h 20 min', '2 d 7 h']
    """
    rest = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def format_estimate(estimate: Estimate) -> str:
    """What pulling a cohort would take, in one line."""
    total = estimate.total
    words = (
        f"{total.studies} studies, {total.instances} instances, "
        f"{format_bytes(total.size_bytes)}: about {format_duration(estimate.seconds)} of "
        f"running at {format_bytes(estimate.bytes_per_second)}/s "
        f"({'as earlier runs' if estimate.rate_learned else 'assumed'}), at most "
        f"{format_bytes(estimate.spool_bytes)} in the spool at a time"
    )
    if estimate.ends is not None:
        words += (
            f"; within the node's windows {format_duration(estimate.ends.seconds)} of them, "
            f"done by {estimate.ends.words}"
        )
    return f"at most {words}" if estimate.narrowed else words


def format_modalities(modalities: Iterable[str]) -> str:
    """The modalities of a study, from its Modalities in Study (0008,0061): those of its images.

    Examples
    --------
    >>> [format_modalities(names) for names in (["SR", "CT"], ["PT", "CT"], ["SR"], [])]
    ['CT', 'CT+PT', 'SR', 'unknown']
    """
    named = {name.strip().upper() for name in modalities} - {""}
    return "+".join(sorted(named - _BESIDE_IMAGES or named)) or _UNKNOWN
