"""Messages of validation: where a value lies, what was found and what was expected.

Validation is pydantic's; its errors become one line of text each.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Discriminator, SecretStr, Tag, ValidationError
from pydantic.fields import FieldInfo

SECRET_KEY = re.compile(r"passw(or)?d|passphrase|pwd|secret|access_?key|api_?key|token|credential")
"""Keys that look like secrets, in lower case with underscores."""


def faults_of(
    error: ValidationError,
    model: type[BaseModel],
    lines: Mapping[tuple[str | int, ...], int] | None = None,
    show: Callable[[Any], str] | None = None,
) -> list[str]:
    """Faults of a validation, one line each: key, what was found, what was expected.

    Parameters
    ----------
    model : type of BaseModel
        What was validated; its fields say what was expected.
    lines : mapping, optional
        Line of each key in the file.
    show : callable, optional
        Formats what was found; :func:`shown` by default.
    """
    show = show or shown
    faults = []
    for item in error.errors(include_url=False):
        path, field, owner = _path_of(item["loc"], model)
        line = (lines or {}).get(path)
        where = f" (line {line})" if line else ""
        if item["type"] == "extra_forbidden":
            fault = f"unknown key{where}; {_suggestion(str(path[-1]), owner)}"
        elif item["type"] == "missing":
            description = None if field is None else field.description
            fault = f"missing; expected {_expected(field)}: {_lower(description)}"
        elif item["type"] == "value_error" and _is_group(item["input"]):
            fault = f"{format_fault(item, field)}{where}"
        elif item["type"] == "archive_choice" and _is_group(item["input"]):
            found = "both" if "bucket" in item["input"] else "neither"
            fault = f"found {found}{where}; {format_fault(item, field)}"
        else:
            fault = f"found {show(item['input'])}{where}; {format_fault(item, field)}"
        faults.append(f"{dotted(path)}: {fault}" if path else fault)
    return faults


def format_fault(item: Mapping[str, Any], field: FieldInfo | None = None) -> str:
    """What was expected: by the text of a validator, or by the field."""
    if item["type"] == "archive_choice":
        return str(item["msg"])
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    if field is None:
        return "expected something else"
    expected = _expected(field)
    if expected.startswith(("a text", "a path")) and isinstance(item["input"], (int, float)):
        expected += "; put it in quotes"
    return f"expected {expected} ({field.description})"


def dotted(path: tuple[str | int, ...]) -> str:
    """Path of a key as text, like ``nodes.main.limits[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{_key_text(part)}"
    return text.removeprefix(".")


def _key_text(key: str) -> str:
    return key if re.fullmatch(r"[\w-]{1,64}", key) else ascii(key[:64])


def shown(value: Any) -> str:
    """A value as it may be repeated to the user, without passwords and cut at 80 characters."""
    if _is_group(value):
        return "a list" if isinstance(value, (list, tuple)) else "a group of keys"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, SecretStr) or (isinstance(value, str) and "@" in value):
        return "a value that may hold a password (not shown)"
    text = ascii(str(value)) if isinstance(value, (str, Path)) else str(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _is_group(value: Any) -> bool:
    return isinstance(value, (Mapping, BaseModel, list, tuple))


def _lower(sentence: str | None) -> str:
    text = sentence or ""
    return text if text[:2].isupper() else text[:1].lower() + text[1:]


def _path_of(
    loc: tuple[str | int, ...], model: type[BaseModel]
) -> tuple[tuple[str | int, ...], FieldInfo | None, type[BaseModel] | None]:
    """Path of an error as the user wrote it, its field, and the model of that."""
    path: list[str | int] = []
    annotation: Any = model
    field: FieldInfo | None = None
    owner: type[BaseModel] | None = None
    for part in loc:
        if part == "[key]":
            continue
        choices = {
            tag.tag: get_args(choice)[0]
            for choice in union_members(annotation)
            for tag in getattr(choice, "__metadata__", ())
            if isinstance(tag, Tag)
        }
        if part in choices:
            annotation = choices[part]
            continue
        path.append(part)
        annotation = next(iter(union_members(annotation)), None)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            owner = annotation
            field = annotation.model_fields.get(str(part))
            annotation = field.annotation if field else None
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        elif get_origin(annotation) is tuple:
            annotation = get_args(annotation)[0]
    return tuple(path), field, owner


def union_members(annotation: Any) -> Iterator[Any]:
    """Members of a union but None; any other type is its own only member."""
    if get_origin(annotation) is Annotated and Discriminator in map(type, annotation.__metadata__):
        yield from union_members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        yield from (member for member in get_args(annotation) if member is not NoneType)
    else:
        yield annotation


def plain_members(annotation: Any) -> list[Any]:
    """Members of a union but None, without what is annotated to them."""
    return [
        get_args(member)[0] if get_origin(member) is Annotated else member
        for member in union_members(annotation)
    ]


def _expected(field: FieldInfo | None) -> str:
    if field is None:
        return "something else"
    alternatives = plain_members(field.annotation)
    annotation = alternatives[0]
    bounds = {
        name: value
        for constraint in field.metadata
        for name in ("ge", "gt", "le", "min_length", "max_length")
        if (value := getattr(constraint, name, None)) is not None
    }
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(get_args(annotation))
    if get_origin(annotation) is tuple:
        member = get_args(annotation)[0]
        if isinstance(member, type) and issubclass(member, Enum):
            return "a list of " + ", ".join(one.value for one in member)
        return "a list"
    if get_origin(annotation) is dict:
        return "at least one name with its keys below it"
    if issubclass(annotation, BaseModel):
        return "a group of keys: " + ", or ".join(
            ", ".join(_public(model.model_fields)) for model in alternatives
        )
    if issubclass(annotation, Enum):
        return "one of " + ", ".join(member.value for member in annotation)
    if annotation is bool:
        groups = alternatives[1:]
        keys = ", or ".join(", ".join(_public(group.model_fields)) for group in groups)
        return "true, false or a group of keys: " + keys if groups else "true or false"
    if annotation in (int, float):
        return ("a whole number" if annotation is int else "a number") + _range(bounds)
    if annotation is Path:
        return "a path"
    if "min_length" in bounds:
        return f"a text of {bounds['min_length']} to {bounds['max_length']} characters"
    return "a text"


def _range(bounds: Mapping[str, Any]) -> str:
    if "le" in bounds:
        return f" from {bounds['ge']} to {bounds['le']}"
    if "gt" in bounds:
        return f" greater than {bounds['gt']}"
    return f" of at least {bounds['ge']}"


def _public(fields: Mapping[str, FieldInfo]) -> list[str]:
    """Names of the fields that may be written into a file."""
    return [name for name in fields if not SECRET_KEY.search(name)]


def _suggestion(key: str, owner: type[BaseModel] | None) -> str:
    """The known key that was probably meant, here or in a group below."""
    fields = dict(owner.model_fields) if owner else {}
    known = _public(fields)
    if near := difflib.get_close_matches(key, known, n=1):
        return f"did you mean `{near[0]}`?"
    for name, field in fields.items():
        group = next(union_members(field.annotation))
        if isinstance(group, type) and issubclass(group, BaseModel) and key in group.model_fields:
            return f"it belongs under `{name}`"
    return "known keys here: " + ", ".join(known)
