"""Typed settings and the YAML files they come from: all faults at once, each with its line.

For the site file and for the files beside it. Validation is pydantic's; what it says is put into
words here, with what was found, where, and what was expected.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    SecretStr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from prefect_dicom.core.errors import ConfigurationError


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
        wanted = bool in _alternatives(cls.model_fields[info.field_name].annotation)
        if wanted and value is not None and not isinstance(value, bool):
            raise PydanticCustomError("no_truth_value", "expected true or false")
        if isinstance(value, bool) and not wanted:
            raise PydanticCustomError("truth_value", "true and false are values of no key")
        return value


LEDGER_URL_VARIABLE = "PREFECT_DICOM_LEDGER_URL"
"""Environment variable whose PostgreSQL URL takes the place of the site file's ``ledger``."""


# -------------------------------------------------------------------------- the text of a file


def text_of(source: str, path: str | Path) -> str:
    """The text of a file.

    Raises
    ------
    ConfigurationError
        It cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        fault = "is not UTF-8 text; save it as UTF-8"
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a usable path"
        fault = f"cannot be read ({reason}); give the path of a file"
    raise ConfigurationError(source, [fault])


SECRET_KEY = re.compile(r"passw(or)?d|passphrase|pwd|secret|access_?key|api_?key|token|credential")
WHERE_SECRETS_BELONG = (
    "a secret does not belong into this file; the archive's credentials come from the "
    "environment (AWS_ACCESS_KEY_ID …, or `profile`) or from the Prefect block DicomArchive, "
    f"the ledger's password from {LEDGER_URL_VARIABLE}"
)

# Plain scalars as YAML 1.2 has them. YAML 1.1 would read an AE title NO as false, and a port
# 0104 as the octal number 68.
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOLEAN = re.compile(r"true|True|TRUE|false|False|FALSE")
_WHOLE = re.compile(r"[-+]?[0-9]{1,100}")
_DECIMAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]{1,3})?")


class Document:
    """A YAML document as plain values, with the line of every key and the faults of its text.

    Built from the node graph of PyYAML's safe loader, which knows lines and duplicates; no tag
    constructs anything. Keys are texts. Keys without a value are left out, and so are keys that
    look like secrets, after being complained about.
    """

    def __init__(self, text: str, source: str, outermost: str) -> None:
        self.faults: list[str] = []
        self.lines: dict[tuple[str | int, ...], int] = {}
        loader = None
        try:
            loader = yaml.SafeLoader(text)
            root = loader.get_single_node()
        except yaml.YAMLError as error:
            raise ConfigurationError(source, [_syntax_fault(error, text)]) from None
        except RecursionError:
            raise ConfigurationError(source, ["is nested too deeply for such a file"]) from None
        finally:
            if loader is not None:
                loader.dispose()
        if not isinstance(root, yaml.MappingNode):
            raise ConfigurationError(
                source,
                [f"expected keys at the outermost level: {outermost}"],
            )
        self._open: set[int] = set()
        self._built: dict[int, Any] = {}
        self.values: dict[str, Any] = self._mapping(root, ())

    def _value(self, node: yaml.Node, place: tuple[str | int, ...]) -> Any:
        if id(node) in self._open:
            self.faults.append(f"{_dotted(place)}: refers to itself (line {_line(node)})")
            return None
        if not node.tag.startswith("tag:yaml.org,2002:"):
            self.faults.append(
                f"{_dotted(place)}: found a YAML tag (line {_line(node)}); "
                "expected a plain value; a text that begins with '!' goes in quotes"
            )
            return None
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        # What several aliases refer to is built once, its faults are told once.
        if id(node) not in self._built:
            self._open.add(id(node))
            self._built[id(node)] = (
                self._mapping(node, place)
                if isinstance(node, yaml.MappingNode)
                else [self._value(item, (*place, i)) for i, item in enumerate(node.value)]
            )
            self._open.discard(id(node))
        return self._built[id(node)]

    def _mapping(self, node: yaml.MappingNode, place: tuple[str | int, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.faults.append(
                    f"{_dotted(place)}: found a list or mapping as a key "
                    f"(line {_line(key_node)}); expected a name"
                )
                continue
            if key_node.tag == "tag:yaml.org,2002:merge":
                others = self._value(value_node, place)
                for other in others if isinstance(others, list) else [others]:
                    if isinstance(other, dict):
                        merged = {**other, **merged}
                    else:
                        self.faults.append(
                            f"{_dotted(place)}: found '<<' without a group of keys "
                            f"(line {_line(key_node)}); expected an alias like *other"
                        )
                continue
            key, line = key_node.value, _line(key_node)
            here = (*place, key)
            if key in first_lines:
                self.faults.append(
                    f"{_dotted(here)}: found twice, in lines {first_lines[key]} and {line}; "
                    "leave one out"
                )
                continue
            first_lines[key] = self.lines[here] = line
            if place != ("nodes",) and SECRET_KEY.search(key.lower().replace("-", "_")):
                self.faults.append(f"{_dotted(here)}: found in line {line}; {WHERE_SECRETS_BELONG}")
                continue
            value = self._value(value_node, here)
            if value is not None:
                values[key] = value
        return {**merged, **values}


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    text = node.value
    if node.style is not None:
        return text
    if _NULL.fullmatch(text):
        return None
    if _BOOLEAN.fullmatch(text):
        return text.lower() == "true"
    if _WHOLE.fullmatch(text):
        return int(text)
    if _DECIMAL.fullmatch(text):
        return float(text)
    return text


def _syntax_fault(error: yaml.YAMLError, text: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        line, column = mark.line + 1, mark.column + 1
    else:
        before = text[: getattr(error, "position", 0)]
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
    # What the parser quotes may be a piece of a secret; single characters and its own names for
    # tokens are not.
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
    problem = re.sub(r"'(?!<)[^']{2,}'", "…", problem)
    return (
        f"line {line}, column {column}: is not YAML: {problem}; check the indentation, and put "
        "texts with special characters in quotes"
    )


# ------------------------------------------------------------------------------- saying faults


def faults_of(
    error: ValidationError,
    model: type[BaseModel],
    lines: Mapping[tuple[str | int, ...], int] | None = None,
    show: Callable[[Any], str] | None = None,
) -> list[str]:
    """The faults of a validation, one line each: place, what was found, what was expected.

    Parameters
    ----------
    model : type of BaseModel
        What was validated; its fields say what was expected.
    lines : mapping, optional
        Lines of the places in a file.
    show : callable, optional
        Says what was found; without one the value is repeated, as far as :func:`shown` does.
    """
    show = show or shown
    faults = []
    for item in error.errors(include_url=False):
        place, field, owner = _place_of(item["loc"], model)
        line = (lines or {}).get(place)
        where = f" (line {line})" if line else ""
        if item["type"] == "extra_forbidden":
            told = f"unknown key{where}; {_suggestion(str(place[-1]), owner)}"
        elif item["type"] == "missing":
            told = f"missing; expected {_expected(field)}: {_lower(field.description)}"
        elif item["type"] == "value_error" and _is_group(item["input"]):
            told = f"{format_fault(item, field)}{where}"
        elif item["type"] == "archive_choice" and _is_group(item["input"]):
            found = "both" if "bucket" in item["input"] else "neither"
            told = f"found {found}{where}; {format_fault(item, field)}"
        else:
            told = f"found {show(item['input'])}{where}; {format_fault(item, field)}"
        faults.append(f"{_dotted(place)}: {told}" if place else told)
    return faults


def format_fault(item: Mapping[str, Any], field: FieldInfo | None = None) -> str:
    """What was expected: in a validator's own words, or in those of the field."""
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


def _dotted(place: tuple[str | int, ...]) -> str:
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{_key_text(part)}"
    return text.removeprefix(".")


def _key_text(key: str) -> str:
    return key if re.fullmatch(r"[\w-]{1,64}", key) else ascii(key[:64])


def shown(value: Any) -> str:
    """A value as it may be repeated to the user, whatever it is."""
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


def _place_of(
    loc: tuple[str | int, ...], model: type[BaseModel]
) -> tuple[tuple[str | int, ...], FieldInfo | None, type[BaseModel] | None]:
    """Where an error lies as the user wrote it, the field there, and the model it belongs to."""
    place: list[str | int] = []
    annotation: Any = model
    field: FieldInfo | None = None
    owner: type[BaseModel] | None = None
    for part in loc:
        if part == "[key]":
            continue
        choices = {
            tag.tag: get_args(choice)[0]
            for choice in _alternatives(annotation)
            for tag in getattr(choice, "__metadata__", ())
            if isinstance(tag, Tag)
        }
        if part in choices:
            annotation = choices[part]
            continue
        place.append(part)
        annotation = next(iter(_alternatives(annotation)), None)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            owner = annotation
            field = annotation.model_fields.get(str(part))
            annotation = field.annotation if field else None
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        elif get_origin(annotation) is tuple:
            annotation = get_args(annotation)[0]
    return tuple(place), field, owner


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union but None; anything else is its own only member."""
    if get_origin(annotation) in (Union, UnionType):
        yield from (member for member in get_args(annotation) if member is not NoneType)
    else:
        yield annotation


def _expected(field: FieldInfo | None) -> str:
    if field is None:
        return "something else"
    alternatives = [
        get_args(member)[0] if get_origin(member) is Annotated else member
        for member in _alternatives(field.annotation)
    ]
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
        return "true or false"
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
        group = next(_alternatives(field.annotation))
        if isinstance(group, type) and issubclass(group, BaseModel) and key in group.model_fields:
            return f"it belongs under `{name}`"
    return "known keys here: " + ", ".join(known)
