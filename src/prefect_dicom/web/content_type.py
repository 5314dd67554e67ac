"""Values of Content-Type: a media type and its parameters, RFC 9110 8.3.1, RFC 2046 5.1.1."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LONGEST = 2048
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_TYPE = re.compile(rf"\s*({_TOKEN}/{_TOKEN})\s*")
# Some servers leave out the quotes around values with slashes or equals signs.
_PARAMETER = re.compile(rf';\s*(?:({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s;"]+))\s*)?')
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")


@dataclass(frozen=True, slots=True)
class ContentType:
    """A media type in small letters, and its parameters by their names in small letters."""

    media_type: str
    parameters: dict[str, str]

    @property
    def boundary(self) -> bytes | None:
        """The boundary of a multipart body; None where there is none that can be."""
        text = self.parameters.get("boundary", "")
        return text.encode("ascii") if _BOUNDARY.fullmatch(text) else None


def parse_content_type(value: str) -> ContentType | None:
    """Read a Content-Type; None for what is none.

    Examples
    --------
    >>> parse_content_type('multipart/related; type="application/dicom"; boundary=a1').boundary
    b'a1'
    >>> parse_content_type("nothing") is None
    True
    """
    found = _TYPE.match(value[:_LONGEST])
    if found is None or len(value) > _LONGEST:
        return None
    parameters: dict[str, str] = {}
    at = found.end()
    while at < len(value):
        parameter = _PARAMETER.match(value, at)
        if parameter is None:
            return None
        name, quoted, plain = parameter.groups()
        if name is not None:
            text = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else plain
            if parameters.setdefault(name.lower(), text) != text:
                # Two boundaries: which of them holds is anybody's guess.
                return None
        at = parameter.end()
    return ContentType(found[1].lower(), parameters)
