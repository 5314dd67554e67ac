"""Identifiers: the only place that turns a text of a peer into a name, a path or a key.

A UID is a string of digits and dots of at most 64 characters (PS3.5 9.1). Peers send others:
padded, with letters, too long, path-like. They are compared as they are (without their padding)
and *encoded*, never cleaned, when they become part of a key, so that two different texts never
get the same key.
"""

from __future__ import annotations

import hashlib
import re

_UID = re.compile(r"[0-9]+(?:\.[0-9]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LONGEST_ENCODED = 128


def is_uid(text: str) -> bool:
    """Whether the text is a UID by PS3.5 9.1; leading zeros are accepted.

    Examples
    --------
    >>> is_uid("1.2.840.10008.1.1"), is_uid("1..2"), is_uid("1.2*"), is_uid("..")
    (True, False, False, False)
    """
    return len(text) <= 64 and _UID.fullmatch(text) is not None


def normal_uid(text: str) -> str:
    """A UID without its padding (NUL or blanks): the form in which UIDs are compared."""
    return text.strip(" \0")


def is_safe_key(text: str) -> bool:
    """Whether a value may be sent as a unique or single-value matching key.

    An empty value or a wildcard selects more than one entity, a backslash makes a list of it
    (PS3.4 C.2.2.2): some PACS answer an empty StudyInstanceUID by sending all they hold.
    Control characters are refused with them.

    Examples
    --------
    >>> is_safe_key("000123"), is_safe_key("***"), is_safe_key(" "), is_safe_key("A\\\\B")
    (True, False, False, False)
    """
    return bool(text.strip(" \0")) and not any(c in "*?\\" or ord(c) < 32 for c in text)


def component(uid: str) -> str:
    """A UID as one component of an object key: the UID itself, or an encoding that is no UID.

    The encoding is injective: ``x-`` and the hexadecimal digits of the UTF-8 text; past 128
    digits ``h-`` and its SHA-256.

    Examples
    --------
    >>> component("1.2.3"), component(".."), component("")
    ('1.2.3', 'x-2e2e', 'x-')
    """
    if is_uid(uid):
        return uid
    raw = uid.encode("utf-8", "surrogateescape")
    if len(raw) * 2 <= _LONGEST_ENCODED:
        return "x-" + raw.hex()
    return "h-" + hashlib.sha256(raw).hexdigest()


def uid_of(name: str) -> str | None:
    """The UID that :func:`component` encoded; None where only its hash is left.

    Examples
    --------
    >>> uid_of("1.2.3"), uid_of("x-2e2e"), uid_of("h-" + 64 * "0"), uid_of("notes")
    ('1.2.3', '..', None, None)
    """
    if is_uid(name):
        return name
    try:
        uid = bytes.fromhex(name.removeprefix("x-")).decode("utf-8", "surrogateescape")
    except ValueError:
        return None
    return uid if component(uid) == name else None


def study_prefix(study_instance_uid: str) -> str:
    """Prefix of a study's keys, relative to the archive's own prefix."""
    return f"studies/{component(study_instance_uid)}/"


def object_key(study_instance_uid: str, series_instance_uid: str, sop_instance_uid: str) -> str:
    """Key of an instance, a function of its UIDs alone."""
    return (
        f"{study_prefix(study_instance_uid)}"
        f"{component(series_instance_uid)}/{component(sop_instance_uid)}.dcm"
    )


def manifest_key(study_instance_uid: str) -> str:
    """Key of a study's manifest. Instances cannot have it: their keys have one level more."""
    return f"{study_prefix(study_instance_uid)}manifest.json"


def is_sha256(text: str) -> bool:
    """Whether the text is a SHA-256 in lower-case hexadecimal, the name of a spool file."""
    return _SHA256.fullmatch(text) is not None


def is_name(text: str) -> bool:
    """Whether the text may name a cohort, a node or a run (they appear in paths and logs)."""
    return _NAME.fullmatch(text) is not None


def ae_title_fault(title: str) -> str | None:
    """Why the text cannot be an AE title (PS3.5 6.2, VR AE), or None.

    Examples
    --------
    >>> ae_title_fault("PREFECTDICOM") is None, ae_title_fault("A" * 17)
    (True, 'has 17 characters; an AE title has 1 to 16')
    """
    if not title.strip():
        return "is empty; an AE title has 1 to 16 characters"
    if len(title) > 16:
        return f"has {len(title)} characters; an AE title has 1 to 16"
    if title != title.strip():
        return "begins or ends with a blank; peers do not agree whether those count"
    if not title.isascii() or any(ord(c) < 32 or c == "\\" for c in title):
        return "may hold ASCII characters only, without backslash and control characters"
    return None
