"""Choices of a person about a list: what no reader can know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, cast, get_args

from prefect_dicom.core.errors import CohortError

HiddenRows: TypeAlias = Literal["take", "leave-out"]
FaultyLines: TypeAlias = Literal["refuse", "set-apart"]


@dataclass(frozen=True, slots=True)
class ListOptions:
    """How a list is read where it leaves a choice."""

    hidden_rows: HiddenRows | None = None
    """Whether rows that a workbook hides are taken; None: they are asked about."""
    faulty_lines: FaultyLines | None = None
    """Whether lines with faults are set apart, so that the others go on; None: they refuse it."""

    @classmethod
    def of(cls, hidden_rows: str | None, faulty_lines: str | None = None) -> ListOptions:
        """The choices of these names.

        Raises
        ------
        CohortError
            One of them is no choice.
        """
        faults = [
            f"{key}: expected {' or '.join(choices)}"
            for key, given, choices in (
                ("hidden_rows", hidden_rows, get_args(HiddenRows)),
                ("faulty_lines", faulty_lines, get_args(FaultyLines)),
            )
            if given is not None and given not in choices
        ]
        if faults:
            raise CohortError("the choices for a list", faults)
        return cls(cast("HiddenRows | None", hidden_rows), cast("FaultyLines | None", faulty_lines))

    @property
    def text(self) -> str:
        """The choices in words; empty where none was made."""
        chosen = {"hidden_rows": self.hidden_rows, "faulty_lines": self.faulty_lines}
        return "".join(f"{key}={value};" for key, value in chosen.items() if value is not None)

    @property
    def sets_apart(self) -> bool:
        """Whether faulty lines are set apart."""
        return self.faulty_lines == "set-apart"

    def or_else(self, other: ListOptions) -> ListOptions:
        """These choices, and those of another where none was made."""
        return ListOptions(
            self.hidden_rows or other.hidden_rows, self.faulty_lines or other.faulty_lines
        )


NO_CHOICES = ListOptions()
