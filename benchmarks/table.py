"""The table that is printed, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Line:
    """One comparison: what was measured, and what was hoped for.

    ``at_least`` says which side of the target is the good one.
    """

    work: str
    value: float
    target: float | None = None
    at_least: bool = True
    unit: str = ""
    detail: str = ""

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        met = self.value >= self.target if self.at_least else self.value <= self.target
        return "met" if met else "not met"

    def __str__(self) -> str:
        target = ""
        if self.target is not None:
            target = f"{'>=' if self.at_least else '<='} {_number(self.target)}{self.unit}"
        cells = (self.work, f"{_number(self.value)}{self.unit}", target, self.verdict, self.detail)
        return f"| {' | '.join(cells)} |"


HEAD = "| work | measured | target | | median (lowest-highest), and what was done |\n"
HEAD += "|---" * 5 + "|"


def ratio(
    work: str, ours: Sequence[float], theirs: Sequence[float], target: float | None, unit: str
) -> Line:
    """A line that compares two rates, with the spread of both."""
    detail = f"{spread(ours)} to {spread(theirs)} {unit}"
    return Line(work, median(ours) / median(theirs), target, detail=detail)


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest."""
    return f"{_number(median(values))} ({_number(min(values))}-{_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
