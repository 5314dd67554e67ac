"""Plots of the report page, as SVG with the colours and the font of the page around it.

Drawn by matplotlib without pyplot. Each picture is drawn twice, for wide and for narrow screens:
a merely scaled one has unreadable letters on a phone.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta, tzinfo
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from prefect_dicom.core.model import StudyState
from prefect_dicom.ledger import Sample
from prefect_dicom.report.formatting import format_bytes
from prefect_dicom.report.summary import CohortSummary, Interval, ModalityTotals, windows

_SIZES = {"wide": (7.6, 2.5), "narrow": (3.7, 2.5)}
"""Inches, of 72 units each."""
_POINTS = 200
_SLOTS = {"wide": 120, "narrow": 48}
_MOST_WINDOWS = 400
_TIMES = ["%Y", "%b", "%d %b", "%H:%M", "%H:%M", "%H:%M:%S"]
_TIMES_AT_ZERO = ["%Y", "%b %Y", "%d %b", "%d %b", "%H:%M", "%H:%M"]
"""Of ticks a year, a month, a day, an hour, a minute and a second apart."""

# Stand-ins, which become the page's own colours: see _styled.
_INK, _RULE, _CLOSED = "#000001", "#000002", "#000003"
_FILLS = {
    StudyState.ARCHIVED: "#000011",
    StudyState.FAILED: "#000012",
    StudyState.LISTED: "#000013",
    StudyState.PENDING: "#000014",
}
_RATE = "#000015"
_VARIABLES = {
    _INK: "ink",
    _RULE: "rule",
    _CLOSED: "closed",
    _FILLS[StudyState.ARCHIVED]: "archived",
    _FILLS[StudyState.FAILED]: "failed",
    _FILLS[StudyState.LISTED]: "under-way",
    _FILLS[StudyState.PENDING]: "pending",
    _RATE: "rate",
}
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prefect-dicom",
    # A label is a label, whatever a PACS has put into it.
    "text.parse_math": False,
    "text.usetex": False,
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
}
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}


def progress(summary: CohortSummary) -> Markup:
    """Studies by state over time."""
    samples = list(_thinned(summary.samples, _POINTS))
    times: Any = [sample.at for sample in samples]
    order = [*_FILLS]
    layers = [[sample.studies[state] for sample in samples] for state in order]

    def draw(axes: Axes, shape: str) -> None:
        axes.stackplot(times, layers, colors=[_FILLS[state] for state in order], linewidth=0)
        axes.set_ylim(0, max(1, *(sample.studies.total() for sample in samples)))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _over_time(axes, times[0], times[-1], summary.zone, shape)

    archived = summary.totals.studies[StudyState.ARCHIVED]
    return _drawn(
        "progress", f"Studies by state over time; {archived} of {summary.studies} archived", draw
    )


def throughput(summary: CohortSummary) -> Markup:
    """Bytes archived per second over time, with the times at which the schedule is closed."""
    begin, end = summary.samples[0].at, summary.samples[-1].at

    def draw(axes: Axes, shape: str) -> None:
        edges, rates = _rates(summary.intervals, begin, end, _SLOTS[shape])
        if summary.schedule is not None:
            shades = [
                (at, until)
                for at, until, is_open in windows(summary.schedule, begin, end)
                if not is_open
            ]
            # Times are data of matplotlib, which its types do not know.
            at: Any
            until: Any
            for at, until in shades[:_MOST_WINDOWS]:
                axes.axvspan(at, until, color=_CLOSED, linewidth=0, zorder=0)
        slots: Any = edges
        axes.stairs(rates, slots, fill=True, color=_RATE, linewidth=0)
        axes.set_ylim(0, max(1, *rates) * 1.08)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{format_bytes(value)}/s" if value else "0")
        )
        _over_time(axes, begin, end, summary.zone, shape)

    mean = format_bytes(summary.rates().bytes_per_second)
    return _drawn("throughput", f"Bytes archived per second over time; {mean}/s on average", draw)


def sizes(kinds: Sequence[ModalityTotals]) -> Markup:
    """Bytes archived of each modality."""

    def draw(axes: Axes, shape: str) -> None:
        places = range(len(kinds))
        widths = [kind.size_bytes for kind in kinds]
        most = max(1, *widths)
        axes.barh(places, widths, color=_RATE, height=0.62, linewidth=0)
        for place, kind in zip(places, kinds, strict=True):
            axes.text(
                kind.size_bytes + most * 0.015, place, format_bytes(kind.size_bytes), va="center"
            )
        axes.set_yticks(places, [kind.modality for kind in kinds])
        axes.invert_yaxis()
        axes.set_xlim(0, most * (1.18 if shape == "wide" else 1.4))
        axes.xaxis.set_visible(False)
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)

    words = ", ".join(f"{kind.modality} {format_bytes(kind.size_bytes)}" for kind in kinds[:3])
    return _drawn("sizes", f"Bytes archived by modality: {words}", draw, rows=len(kinds))


def _rates(
    intervals: Iterable[Interval], begin: datetime, end: datetime, slots: int
) -> tuple[list[datetime], list[float]]:
    """Return the edges of equal time slots, and the bytes per second in each."""
    width = max(timedelta(seconds=1), (end - begin) / slots)
    sums = [0.0] * slots
    for interval in intervals:
        if not interval.size_bytes:
            continue
        length = max(interval.end - interval.begin, timedelta(microseconds=1))
        first = int((interval.begin - begin) / width)
        last = min(slots - 1, int((interval.end - begin) / width))
        for slot in range(min(first, slots - 1), last + 1):
            overlap = min(interval.end, begin + (slot + 1) * width) - max(
                interval.begin, begin + slot * width
            )
            sums[slot] += interval.size_bytes * (max(timedelta(), overlap) / length)
    edges = [begin + number * width for number in range(slots + 1)]
    return edges, [size / width.total_seconds() for size in sums]


def _over_time(axes: Axes, begin: datetime, end: datetime, zone: tzinfo, shape: str) -> None:
    limits: Any = begin, max(end, begin + timedelta(seconds=1))
    axes.set_xlim(*limits)
    locator = AutoDateLocator(  # type: ignore[no-untyped-call]
        tz=zone, maxticks=8 if shape == "wide" else 4, minticks=3
    )
    axes.xaxis.set_major_locator(locator)
    formatter = ConciseDateFormatter(  # type: ignore[no-untyped-call]
        locator, tz=zone, formats=_TIMES, zero_formats=_TIMES_AT_ZERO, show_offset=False
    )
    axes.xaxis.set_major_formatter(formatter)


def _thinned(samples: Sequence[Sample], most: int) -> Iterable[Sample]:
    """Return at most ``most`` samples, evenly chosen, including the first and the last."""
    if len(samples) <= most:
        return samples
    return [samples[round(i * (len(samples) - 1) / (most - 1))] for i in range(most)]


def _drawn(name: str, title: str, draw: Callable[[Axes, str], None], rows: int = 0) -> Markup:
    """Draw a plot in both shapes, each in an element that is shown where it fits."""
    pictures = []
    for shape, (width, height) in _SIZES.items():
        height = 0.32 * rows + 0.2 if rows else height
        with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
            # About letters that its own font lacks: the page's font draws them.
            warnings.simplefilter("ignore", UserWarning)
            figure = Figure(figsize=(width, height), layout="constrained")
            draw(figure.add_subplot(), shape)
            target = io.StringIO()
            canvas: Any = FigureCanvasSVG(figure)
            canvas.print_svg(target, metadata=_NO_METADATA)
        pictures.append(
            f'<div class="{shape}">{_styled(target.getvalue(), f"{name}-{shape}", title)}</div>'
        )
    return Markup("".join(pictures))


def _styled(svg: str, name: str, title: str) -> str:
    """Turn an SVG document into an element of a page: its colours, its font, unique ids."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'<svg ([^>]*?)(width|height)="[^"]*pt"', r"<svg \1", svg)
    svg = re.sub(r'<svg ([^>]*?)(width|height)="[^"]*pt"', r"<svg \1", svg)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub("#0000[01][0-9]", lambda match: f"var(--{_VARIABLES[match[0]]})", svg)
    head = f'<svg role="img" aria-label="{Markup.escape(title)}"'
    return head + svg.removeprefix("<svg")
