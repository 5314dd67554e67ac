"""Types of fields that several settings have: AE titles, names, paths, addresses."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, ValidationInfo

from prefect_dicom.core.uids import ae_title_fault, is_name


def _ae_title(title: str) -> str:
    if fault := ae_title_fault(title):
        raise ValueError(f"expected an AE title of 1 to 16 ASCII characters; it {fault}")
    return title


def _node_name(name: str) -> str:
    if not is_name(name):
        raise ValueError(
            "expected a name of letters, digits, '.', '_' and '-' (64 at most, no blanks); "
            "it appears in paths and logs"
        )
    return name


def _placed(path: Path, info: ValidationInfo) -> Path:
    """The path with ``~`` expanded, and seen from the site file's folder where there is one."""
    if path == Path() or any(ord(c) < 32 for c in str(path)):
        raise ValueError("expected a path that names something, without control characters")
    try:
        path = path.expanduser()
    except RuntimeError:
        raise ValueError("expected a path; the home directory it begins with is unknown") from None
    folder = (info.context or {}).get("folder")
    return folder / path if folder else path


AeTitle = Annotated[str, AfterValidator(_ae_title)]
NodeName = Annotated[str, AfterValidator(_node_name)]
PlacedPath = Annotated[Path, AfterValidator(_placed)]


def address_of_this_host(bind: str) -> str:
    if ip_address(bind) is None:
        raise ValueError(
            "expected an IP address of this host; `ip address` lists them "
            "(a name may resolve to another interface tomorrow)"
        )
    return bind


def http_url(text: str) -> SplitResult | None:
    """The parts of an absolute URL of HTTP; None for what is none."""
    try:
        parts = urlsplit(text)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        return None
    return parts if fits else None


def ip_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
