"""Query strings of searches, PS3.18 8.3.4 and 10.6.1, from the identifier of a query.

Some servers do not undo percent-encoding: a value with an encoded character then matches nothing,
and a patient has disappeared. So only characters are encoded that a query string cannot hold. Where
a value has one of these, it is searched for as it should be; if that finds nothing, by a pattern
with a wildcard in the character's place, whose answers are compared here.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.valuerep import PersonName

from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.uids import is_uid, normal_uid
from prefect_dicom.network.find.answers import text_of

_LONGEST_URL = 8000
# RFC 3986 3.4, and what servers read literally though it should be encoded. A comma makes a list.
_PLAIN = re.compile(r"[A-Za-z0-9._~!$'()*/:;=?@^-]")
_ABOVE = {
    "STUDY": (),
    "SERIES": ("StudyInstanceUID",),
    "IMAGE": ("StudyInstanceUID", "SeriesInstanceUID"),
}
_RESOURCE = {"STUDY": "studies", "SERIES": "series", "IMAGE": "instances"}
UNIQUE_KEYS = {
    "STUDY": "StudyInstanceUID",
    "SERIES": "SeriesInstanceUID",
    "IMAGE": "SOPInstanceUID",
}
_RETURNED_ANYWAY = {
    *("StudyInstanceUID", "StudyDate", "AccessionNumber", "InstanceAvailability"),
    *("ModalitiesInStudy", "PatientName", "PatientID", "PatientBirthDate"),
    *("NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances"),
    *("SeriesInstanceUID", "Modality", "SeriesNumber", "NumberOfSeriesRelatedInstances"),
    *("SOPInstanceUID", "SOPClassUID", "InstanceNumber"),
}
"""Attributes that every server returns, PS3.18 10.6.3: one that is named is not worth a refusal."""
_NO_KEYS = ("QueryRetrieveLevel", "SpecificCharacterSet")


@dataclass(frozen=True, slots=True)
class Search:
    """One search: what is matched, and what is to be returned.

    Parameters
    ----------
    level : str
        ``STUDY``, ``SERIES`` or ``IMAGE``.
    match : mapping of str to sequence of str
        Keywords and their values; several are a list of UIDs.
    returned : sequence of str
        Keywords of attributes that are to be returned.
    """

    level: str
    match: Mapping[str, Sequence[str]]
    returned: Sequence[str]

    @classmethod
    def of(cls, identifier: Dataset, level: str) -> Search:
        """The search that an identifier of a C-FIND stands for."""
        match: dict[str, Sequence[str]] = {}
        returned = []
        for tag in identifier.keys():  # noqa: SIM118
            keyword = keyword_for_tag(tag)
            if keyword in _NO_KEYS:
                continue
            element = identifier.get_item(tag)
            # A person's name is none of the texts that it can be taken for.
            is_name = isinstance(element.value, PersonName)
            text = str(element.value) if is_name else text_of(identifier, keyword)
            if text:
                match[keyword] = text.split("\\")
            else:
                returned.append(keyword)
        return cls(level, match, returned)

    @property
    def named(self) -> Sequence[str]:
        """The unique keys that are searched for at the search's own level."""
        return [normal_uid(uid) for uid in self.match.get(UNIQUE_KEYS[self.level], ())]

    @property
    def encodes(self) -> bool:
        """Whether a value has a character that a query string cannot hold."""
        _, inside = self._split()
        return any(not _is_plain(value) for values in inside.values() for value in values)

    def url(self, base: str) -> str:
        """Its URL without paging; values are encoded where they have to be."""
        return self._url(base, lambda text: "".join(map(_encoded, text)))

    def wider_url(self, base: str) -> str | None:
        """A URL that holds no encoded character; None where it would select nearly anything."""
        _, inside = self._split()
        values = [value for values in inside.values() for value in values]
        if any(not any(map(_PLAIN.match, value)) for value in values):
            return None
        return self._url(base, lambda text: re.sub(r"\*+", "*", "".join(map(_widened, text))))

    def takes(self, answer: Dataset) -> bool:
        """Whether an answer to the wider search has the values that were to be searched for."""
        _, inside = self._split()
        for keyword, values in inside.items():
            if all(map(_is_plain, values)):
                continue
            found = text_of(answer, keyword)
            if not any(_matches(value, found) for value in values):
                return False
        return True

    def _url(self, base: str, write: Callable[[str], str]) -> str:
        path, inside = self._split()
        parameters = [
            f"{keyword}={','.join(map(write, values))}" for keyword, values in inside.items()
        ]
        parameters += [
            f"includefield={keyword}"
            for keyword in self.returned
            if keyword not in _RETURNED_ANYWAY
        ]
        url = f"{base}/{path}?{'&'.join(parameters)}"
        if len(url) > _LONGEST_URL:
            raise PacsError("request-refused", "the search is too long for a URL")
        return url

    def _split(self) -> tuple[str, dict[str, Sequence[str]]]:
        """The path of the search, and the keys that are not in it."""
        inside = dict(self.match)
        segments = []
        for keyword in _ABOVE[self.level]:
            values = inside.get(keyword, ())
            if len(values) != 1:
                break
            del inside[keyword]
            kind = "studies" if keyword == "StudyInstanceUID" else "series"
            segments.append(f"{kind}/{segment(values[0])}")
        return "/".join([*segments, _RESOURCE[self.level]]), inside


def segment(uid: str) -> str:
    """A UID as a segment of a path.

    Raises
    ------
    PacsError
        ``request-refused`` for one that a path cannot hold.
    """
    uid = normal_uid(uid)
    if is_uid(uid):
        return uid
    if uid.strip(".") == "":
        raise PacsError("request-refused", "a UID that no path of a URL can hold")
    return quote(uid, safe="", errors="surrogateescape")


def retrieve_paths(identifier: Dataset) -> Iterator[tuple[str, bool]]:
    """The paths that an identifier of a retrieve request stands for, PS3.18 10.4.1.

    Yields
    ------
    tuple of str and bool
        A path, and whether it is of one instance.
    """
    study, series, instances = (
        [normal_uid(uid) for uid in text_of(identifier, keyword).split("\\") if uid]
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
    )
    if not series:
        for uid in study:
            yield f"studies/{segment(uid)}", False
        return
    above = f"studies/{segment(study[0])}/series"
    if not instances:
        for uid in series:
            yield f"{above}/{segment(uid)}", False
        return
    for uid in instances:
        yield f"{above}/{segment(series[0])}/instances/{segment(uid)}", True


def _is_plain(value: str) -> bool:
    return all(map(_PLAIN.match, value))


def _encoded(character: str) -> str:
    if _PLAIN.match(character):
        return character
    return quote(character, safe="", errors="surrogateescape")


def _widened(character: str) -> str:
    # One character is several bytes for some servers.
    if _PLAIN.match(character):
        return character
    return "?" if character.isascii() else "*"


def _matches(value: str, found: str) -> bool:
    """Whether a value is what was searched for; one with a wildcard of its own is a pattern."""
    if "*" in value:
        pattern = re.sub(r"([\[?])", r"[\1]", value)
        return fnmatch.fnmatchcase(found, pattern)
    return found.strip(" \0") == value.strip(" \0")
