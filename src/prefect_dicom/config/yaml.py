"""YAML documents as plain values, with the line of every key and all faults of the text at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from prefect_dicom.config.messages import SECRET_KEY, dotted
from prefect_dicom.core.errors import ConfigurationError

LEDGER_URL_VARIABLE = "PREFECT_DICOM_LEDGER_URL"
"""Environment variable whose PostgreSQL URL takes the place of the site file's ``ledger``."""


def text_of(source: str, path: str | Path) -> str:
    """Read the text of a file.

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
    look like secrets, which are faults.
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

    def _value(self, node: yaml.Node, path: tuple[str | int, ...]) -> Any:
        if id(node) in self._open:
            self.faults.append(f"{dotted(path)}: refers to itself (line {_line(node)})")
            return None
        if not node.tag.startswith("tag:yaml.org,2002:"):
            self.faults.append(
                f"{dotted(path)}: found a YAML tag (line {_line(node)}); "
                "expected a plain value; a text that begins with '!' goes in quotes"
            )
            return None
        if isinstance(node, yaml.ScalarNode):
            return _scalar(node)
        # What several aliases refer to is built once, and its faults are reported once.
        if id(node) not in self._built:
            self._open.add(id(node))
            self._built[id(node)] = (
                self._mapping(node, path)
                if isinstance(node, yaml.MappingNode)
                else [self._value(item, (*path, i)) for i, item in enumerate(node.value)]
            )
            self._open.discard(id(node))
        return self._built[id(node)]

    def _mapping(self, node: yaml.MappingNode, path: tuple[str | int, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        first_lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.faults.append(
                    f"{dotted(path)}: found a list or mapping as a key "
                    f"(line {_line(key_node)}); expected a name"
                )
                continue
            if key_node.tag == "tag:yaml.org,2002:merge":
                others = self._value(value_node, path)
                for other in others if isinstance(others, list) else [others]:
                    if isinstance(other, dict):
                        merged = {**other, **merged}
                    else:
                        self.faults.append(
                            f"{dotted(path)}: found '<<' without a group of keys "
                            f"(line {_line(key_node)}); expected an alias like *other"
                        )
                continue
            key, line = key_node.value, _line(key_node)
            here = (*path, key)
            if key in first_lines:
                self.faults.append(
                    f"{dotted(here)}: found twice, in lines {first_lines[key]} and {line}; "
                    "leave one out"
                )
                continue
            first_lines[key] = self.lines[here] = line
            if path != ("nodes",) and SECRET_KEY.search(key.lower().replace("-", "_")):
                self.faults.append(f"{dotted(here)}: found in line {line}; {WHERE_SECRETS_BELONG}")
                continue
            value = self._value(value_node, here)
            if value is not None:
                values[key] = value
        return {**merged, **values}


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    text: str = node.value
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
