"""Faults of a list: those of its lines, which can be set apart, and those of the whole."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

_MOST_FAULTS = 200


@dataclass(slots=True)
class ListFaults:
    """Faults of a list, none of which repeats a cell's content."""

    whole: list[str] = field(default_factory=list)
    """The list cannot be used with them, whatever its lines are."""
    by_line: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))

    def of_line(self, line: int, fault: str, column: str = "") -> None:
        """Add the fault of a line, or of its cell in a column of that name."""
        cell = f', column "{column}"' if column else ""
        self.by_line[line].append(f"line {line}{cell}: {fault}")

    @property
    def all(self) -> list[str]:
        """All of them, by line; those of the whole list behind."""
        return [fault for line in sorted(self.by_line) for fault in self.by_line[line]] + self.whole

    @property
    def first(self) -> list[str]:
        """The first of them, and the number of the others."""
        faults = self.all
        if len(faults) > _MOST_FAULTS:
            return [*faults[:_MOST_FAULTS], f"and {len(faults) - _MOST_FAULTS} more"]
        return faults

    def __bool__(self) -> bool:
        return bool(self.whole or self.by_line)
