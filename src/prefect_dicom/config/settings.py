"""Base class of all typed settings."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from prefect_dicom.config.messages import plain_members


class Settings(BaseModel):
    """Base of all parts: unknown keys are faults, values do not change.

    Validation messages do not repeat the input: it may be a URL with a password.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would take `port: true` for 1, and 1 or "yes" for true.
        types = plain_members(cls.model_fields[str(info.field_name)].annotation)
        wanted = bool in types
        if types == [bool] and value is not None and not isinstance(value, bool):
            raise PydanticCustomError("no_truth_value", "expected true or false")
        if isinstance(value, bool) and not wanted:
            raise PydanticCustomError("truth_value", "true and false are values of no key")
        return value
