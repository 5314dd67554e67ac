"""What pulling a cohort would take: studies, bytes, hours, and room in the spool; no Prefect.

Read from the ledger alone, after discovery. Sizes are those of what this ledger has archived,
modality by modality, where it has any of it, and the rate is that of its earlier runs; what is
assumed instead is said.
"""

from __future__ import annotations

import csv
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from prefect_dicom.config.access_schedule import RateLimits, format_time, schedule_states
from prefect_dicom.config.node import NodeSettings
from prefect_dicom.config.site import Site
from prefect_dicom.core.model import RowVerdict, StudyReference, StudyState, Verdict
from prefect_dicom.ledger import Cohort, Ledger, StudyRecord
from prefect_dicom.report import replacing
from prefect_dicom.report.formatting import format_modalities
from prefect_dicom.retrieval.requests import most_chunks_under_way, plan_chunks

ESTIMATE = "estimate"
ASSUMED_BYTES_PER_SECOND = 12_500_000
"""Where no run has been measured yet: 100 Mbit/s."""
_LOOK_AHEAD = timedelta(days=400)
FOUND, NOT_ASKED = "found", "not-asked"
"""Verdicts of a pending row: its studies are known, or it has not been queried."""

_COLUMNS = {
    "modality": "string",
    "studies": "int64",
    "series": "int64",
    "instances": "int64",
    "size_bytes": "int64",
    "instance_bytes": "int64",
    "learned": "bool_",
    "uncounted_studies": "int64",
    "seconds": "int64",
    "spool_bytes": "int64",
}
"""Column to Arrow type; the last two are of all together."""


@dataclass(frozen=True, slots=True)
class Share:
    """The studies of one modality that are still to be pulled.

    Studies go by the modalities of their images: a CT with its report is a CT, with all it has.
    """

    modality: str
    studies: int
    series: int
    """As far as the PACS counts them."""
    instances: int
    """As the PACS counts or lists them; of studies it does not count, the mean of the others."""
    size_bytes: int
    instance_bytes: int
    """Mean size of an instance."""
    learned: bool
    """Whether that is the mean of what this ledger has archived; else it is the configuration's."""
    uncounted_studies: int = 0
    """Of which the PACS does not tell the number of instances."""


@dataclass(frozen=True, slots=True)
class End:
    """When a pull that begins now would end, by the windows of its node."""

    at: datetime
    seconds: int
    """Of open windows, at what is allowed in them."""
    words: str
    """The moment on the clock of the site."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What pulling the rest of a cohort would take."""

    rows: Counter[tuple[str, str]]
    """By verdict so far and reason; ``found`` and ``not-asked`` in place of pending."""
    shares: tuple[Share, ...]
    archived_studies: int
    """Not to be pulled: they are archived already."""
    failed_studies: int
    """Not to be pulled either, but by a rerun."""
    spool_bytes: int
    """The most that lies in the spool at a time, if the largest chunks come together."""
    bytes_per_second: float
    rate_learned: bool
    """Whether that is the rate of earlier runs of this ledger at this node; else it is assumed."""
    narrowed: bool = False
    """The cohort wants some series only: what is pulled is less than this."""
    ends: End | None = None
    """When it would end within the node's windows; None where it has none, or none is enough."""
    total: Share = field(init=False)

    def __post_init__(self) -> None:
        instances = sum(share.instances for share in self.shares)
        size = sum(share.size_bytes for share in self.shares)
        total = Share(
            modality="all",
            studies=sum(share.studies for share in self.shares),
            series=sum(share.series for share in self.shares),
            instances=instances,
            size_bytes=size,
            instance_bytes=round(size / instances) if instances else 0,
            learned=all(share.learned for share in self.shares),
            uncounted_studies=sum(share.uncounted_studies for share in self.shares),
        )
        object.__setattr__(self, "total", total)

    @property
    def seconds(self) -> int:
        """Expected time of running; the PACS's own pauses come on top."""
        return round(self.total.size_bytes / self.bytes_per_second)

    @property
    def unfound_rows(self) -> int:
        """Rows of which nothing is to be pulled, though they were meant to.

        Excluded ones are none, unless nothing at all is found.
        """
        well = {FOUND, Verdict.ARCHIVED, Verdict.INCOMPLETE}
        if not {word for word, _ in self.rows}.isdisjoint(well):
            well.add(Verdict.EXCLUDED)
        return sum(count for (word, _), count in self.rows.items() if word not in well)

    def as_result(self) -> dict[str, Any]:
        """Plain values, for programs."""
        rows: Counter[Verdict | str] = Counter()
        for (word, _), count in self.rows.items():
            rows[word] += count
        return {
            "rows": dict(rows),
            "studies": self.total.studies,
            "series": self.total.series,
            "instances": self.total.instances,
            "size_bytes": self.total.size_bytes,
            "seconds": self.seconds,
            "bytes_per_second": round(self.bytes_per_second),
            "window_seconds": self.ends and self.ends.seconds,
            "ends_at": self.ends and self.ends.at.isoformat(timespec="minutes"),
            "rate_learned": self.rate_learned,
            "spool_bytes": self.spool_bytes,
            "archived_studies": self.archived_studies,
            "failed_studies": self.failed_studies,
            "narrowed": self.narrowed,
            "modalities": [asdict(share) for share in self.shares],
        }


@dataclass(slots=True)
class _Group:
    """Studies of one modality, counted."""

    studies: int = 0
    counted: int = 0
    """Of these: with a number of instances."""
    series: int = 0
    instances: int = 0
    size_bytes: int = 0

    def each(self) -> float:
        """Instances in a study, on average."""
        return self.instances / self.counted if self.counted else 0.0


def estimate_pull(
    ledger: Ledger, cohort: Cohort, site: Site, now: datetime | None = None
) -> Estimate:
    """Estimate what is still to be pulled of a cohort. Memory does not grow with it.

    Parameters
    ----------
    now : datetime, optional
        When the pull is to begin, for its end within the windows of its node.
    """
    assumed = site.effective_node(cohort.node).limits.instance_bytes
    learned: dict[str, _Group] = {}
    for modalities, studies, instances, size in ledger.progress.archived_by_modalities():
        group = learned.setdefault(format_modalities(modalities), _Group())
        group.studies += studies
        group.counted += studies
        group.instances += instances
        group.size_bytes += size
    groups: dict[str, _Group] = {}
    ended: Counter[StudyState] = Counter()
    for study in ledger.studies.of_cohort(cohort.number):
        if study.state in (StudyState.ARCHIVED, StudyState.FAILED):
            ended[study.state] += 1
            continue
        group = groups.setdefault(format_modalities(study.study.modalities), _Group())
        group.studies += 1
        group.series += study.study.number_of_series or 0
        if (left := _left(study)) is not None:
            group.counted += 1
            group.instances += left
    shares = []
    for modality, group in sorted(groups.items(), key=lambda item: (-item[1].studies, item[0])):
        known = learned.get(modality, _Group())
        instances = group.instances + round(
            (group.studies - group.counted) * (group.each() or known.each())
        )
        each = known.size_bytes / known.instances if known.instances else assumed
        shares.append(
            Share(
                modality=modality,
                studies=group.studies,
                series=group.series,
                instances=instances,
                size_bytes=round(instances * each),
                instance_bytes=round(each),
                learned=bool(known.instances),
                uncounted_studies=group.studies - group.counted,
            )
        )
    rate = ledger.progress.bytes_per_second(cohort.node)
    estimate = Estimate(
        rows=Counter(map(_end_so_far, ledger.rows.verdicts(cohort.number))),
        shares=tuple(shares),
        archived_studies=ended[StudyState.ARCHIVED],
        failed_studies=ended[StudyState.FAILED],
        spool_bytes=_spool_bytes(ledger, cohort, site, shares),
        bytes_per_second=rate or ASSUMED_BYTES_PER_SECOND,
        rate_learned=rate is not None,
        narrowed=bool(ledger.cohorts.filters(cohort.number).series),
    )
    return replace(
        estimate, ends=_end(estimate, site.effective_node(cohort.node), now or datetime.now(UTC))
    )


def _end(estimate: Estimate, node: NodeSettings, now: datetime) -> End | None:
    """Estimate when all is pulled, if the node is used as much as its schedule allows."""
    if node.access_schedule is None:
        return None
    left, seconds = float(estimate.total.size_bytes), 0.0
    for begin, state in schedule_states(node.access_schedule, now):
        if begin - now > _LOOK_AHEAD:
            break
        if state.rate_limits is None:
            continue
        rate = _rate_within(state.rate_limits, node, estimate)
        until = state.until or now + 2 * _LOOK_AHEAD
        lasts = (until - begin).total_seconds()
        if rate * lasts >= left:
            at = begin + timedelta(seconds=left / rate)
            words = format_time(at, node.access_schedule, now)
            return End(at, round(seconds + left / rate), words)
        left -= rate * lasts
        seconds += lasts
    return None


def _rate_within(rate_limits: RateLimits, node: NodeSettings, estimate: Estimate) -> float:
    """Bytes per second within what is allowed: a part of the rate of a run that may do all."""
    total, limits = estimate.total, node.limits
    associations = min(rate_limits.associations or limits.associations, limits.associations)
    share = associations / limits.associations * rate_limits.utilisation
    rates = [estimate.bytes_per_second * share]
    if rate_limits.bytes_per_second is not None:
        rates.append(rate_limits.bytes_per_second)
    each = total.instance_bytes or limits.instance_bytes
    if rate_limits.instances_per_second is not None:
        rates.append(rate_limits.instances_per_second * each)
    if rate_limits.retrieves_per_minute is not None:
        most = limits.request_instances
        most = min(most, rate_limits.request_instances(each) or most)
        requests = max(1, total.instances / most, total.studies / limits.chunk_studies)
        rates.append(rate_limits.retrieves_per_minute / 60 * total.size_bytes / requests)
    return max(min(rates), 1e-9)


def _left(study: StudyRecord) -> int | None:
    """Return the instances of a study that are not archived yet; None if unknown."""
    if study.state is StudyState.LISTED and study.expected:
        return max(0, study.expected - study.stored)
    return study.study.number_of_instances


def _end_so_far(verdict: RowVerdict) -> tuple[str, str]:
    if verdict.verdict is Verdict.PENDING:
        return (FOUND if verdict.studies else NOT_ASKED), ""
    return str(verdict.verdict), verdict.reason


def _spool_bytes(ledger: Ledger, cohort: Cohort, site: Site, shares: Sequence[Share]) -> int:
    """The chunks that can be under way at a time, if they are the largest ones."""
    of_modality = {share.modality: share for share in shares}
    sizes: dict[StudyReference, int] = {}

    def to_pull() -> Iterator[tuple[StudyReference, str, int | None]]:
        for study in ledger.studies.of_cohort(cohort.number):
            if study.state in (StudyState.ARCHIVED, StudyState.FAILED):
                continue
            share = of_modality[format_modalities(study.study.modalities)]
            instances = _left(study)
            if instances is None:
                instances = round(share.instances / share.studies)
            sizes[study.reference] = instances * share.instance_bytes
            yield study.reference, study.node, study.study.number_of_instances

    limits = site.effective_node(cohort.node).limits
    associations = sum(site.effective_node(node).limits.associations for node in cohort.nodes)
    chunks = plan_chunks(
        to_pull(), chunk_studies=limits.chunk_studies, chunk_instances=limits.chunk_instances
    )
    largest = heapq.nlargest(
        most_chunks_under_way(associations),
        (sum(sizes.pop(reference) for reference in chunk.studies) for chunk in chunks),
    )
    return sum(largest)


def write_estimate(estimate: Estimate, folder: Path) -> None:
    """Write ``estimate.parquet`` and ``estimate.csv``: a line a modality, and one for all."""
    # Imported where it is wanted, as in tables.py.
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(share) | {"seconds": None, "spool_bytes": None} for share in estimate.shares]
    together = {"seconds": estimate.seconds, "spool_bytes": estimate.spool_bytes}
    rows.append(asdict(estimate.total) | together)
    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in _COLUMNS.items()])
    with replacing(folder / f"{ESTIMATE}.parquet") as path:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
    with replacing(folder / f"{ESTIMATE}.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(_COLUMNS))
        writer.writeheader()
        writer.writerows(rows)
