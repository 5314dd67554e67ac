"""Identifiers of queries and retrieves, PS3.4 C.4.1.1.3 and C.4.2.1.4.

The guard of this package stands here: no unique key that is empty or holds a wildcard leaves
for a peer. Some answer an empty StudyInstanceUID by sending their whole archive. Texts become bytes
here and not on the way out, where what a character set lacks would become a question mark: a
wildcard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydicom import config
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from prefect_dicom.core.model import InformationModel
from prefect_dicom.core.uids import is_safe_key
from prefect_dicom.dicom.character_sets import character_sets_for, encoded

_WITH_WILDCARDS = {"PatientID", "AccessionNumber"}


def query_identifier(
    match: Mapping[str, str],
    return_keys: Sequence[str],
    characters: str = "",
    wildcards: Mapping[str, str] | None = None,
) -> Dataset:
    """The identifier of a C-FIND: values to match exactly, and empty keys to be filled.

    Parameters
    ----------
    match : mapping of str to str
        DICOM keywords and their values, sent as they are. A range of dates is a value.
    return_keys : sequence of str
        DICOM keywords to ask for.
    characters : str
        The Specific Character Set for values beyond ASCII; where it lacks their characters, or is
        empty, the first usual one that has them.
    wildcards : mapping of str to str, optional
        PatientID or AccessionNumber, and a text with one ``*`` before or behind it: the only
        wildcards that are ever sent (PS3.4 C.2.2.2.4).

    Raises
    ------
    ValueError
        Where a value is empty, holds a wildcard, a backslash or a control character; where a
        wildcard is of another form or another key.
    """
    identifier = Dataset()
    for keyword in return_keys:
        _put(identifier, keyword, "")
    singles = {keyword: _single(keyword, value) for keyword, value in match.items()}
    for keyword, value in (wildcards or {}).items():
        text = value.removesuffix("*") if value.endswith("*") else value.removeprefix("*")
        if keyword not in _WITH_WILDCARDS or text == value:
            raise ValueError(f"{keyword} is not asked for with wildcards")
        _single(keyword, text)
        singles[keyword] = value
    _put_texts(identifier, singles, characters)
    return identifier


def list_identifier(match: Mapping[str, Sequence[str]], return_keys: Sequence[str]) -> Dataset:
    """The identifier of a C-FIND that matches lists of UIDs, PS3.4 C.2.2.2.2.

    Parameters
    ----------
    match : mapping of str to sequence of str
        Keywords of unique keys, and the UIDs any of which is to match.

    Raises
    ------
    ValueError
        Where a UID is empty, holds a wildcard, a backslash or a control character.
    """
    identifier = query_identifier({}, return_keys)
    for keyword, uids in match.items():
        _put(identifier, keyword, [_single(keyword, uid) for uid in uids])
    return identifier


def retrieve_identifier(
    model: InformationModel,
    level: str,
    patient_id: str | None,
    study_uids: Sequence[str],
    series_uids: Sequence[str] = (),
    sop_uids: Sequence[str] = (),
    characters: str = "",
) -> Dataset:
    """The identifier of a C-MOVE or C-GET, PS3.4 C.4.2.1.4.1.

    Parameters
    ----------
    model : InformationModel
        In the Patient Root the PatientID is a unique key and has to be there.
    level : str
        ``STUDY``, ``SERIES`` or ``IMAGE``.
    patient_id : str or None
        Left out of Study Root identifiers, which have no such key.
    study_uids, series_uids, sop_uids : sequence of str
        A list is allowed at the request's own level only; one UID at each level above, none
        below.
    characters : str
        As in :func:`query_identifier`, for the PatientID.

    Raises
    ------
    ValueError
        Where a unique key is missing, superfluous, empty or holds a wildcard, a backslash or a
        control character: each of them would select other studies than those meant.
    """
    levels = {
        "STUDY": ("StudyInstanceUID", study_uids),
        "SERIES": ("SeriesInstanceUID", series_uids),
        "IMAGE": ("SOPInstanceUID", sop_uids),
    }
    if level not in levels:
        raise ValueError("a retrieve is at STUDY, SERIES or IMAGE level")
    identifier = Dataset()
    _put(identifier, "QueryRetrieveLevel", level)
    if model is InformationModel.PATIENT_ROOT:
        _put_texts(identifier, {"PatientID": _single("PatientID", patient_id or "")}, characters)
    below = False
    for name, (keyword, uids) in levels.items():
        if below:
            if uids:
                raise ValueError(f"{keyword} is below the {level} level")
            continue
        if not uids:
            raise ValueError(f"{keyword} is missing at the {level} level")
        if name != level and len(uids) != 1:
            raise ValueError(f"{keyword} may not be a list at the {level} level")
        _put(identifier, keyword, [_single(keyword, uid) for uid in uids])
        below = name == level
    return identifier


def _single(keyword: str, value: str) -> str:
    if not is_safe_key(value):
        raise ValueError(f"{keyword} is empty or would select more than one entity")
    return value


def _put(identifier: Dataset, keyword: str, value: str | bytes | list[str]) -> None:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise ValueError("not a DICOM keyword")
    # Values go out as they are: what is odd on the PACS has to be asked for in its odd form,
    # and pydicom's warnings would print it.
    identifier.add(DataElement(tag, dictionary_VR(tag), value, validation_mode=config.IGNORE))


def _put_texts(identifier: Dataset, values: Mapping[str, str], characters: str) -> None:
    # No character set is for UIDs (PS3.5 6.1.2.2); odd bytes in one of a peer are sent back.
    uids = {keyword for keyword in values if keyword.endswith("UID")}
    for keyword in uids:
        _put(identifier, keyword, values[keyword])
    values = {keyword: value for keyword, value in values.items() if keyword not in uids}
    declared = next(character_sets_for(list(values.values()), characters), None)
    if declared is None:
        raise ValueError("no character set has the characters of a key")
    # Only where needed: some PACS dislike a query that declares a character set.
    if not declared:
        for keyword, value in values.items():
            _put(identifier, keyword, value)
        return
    identifier.SpecificCharacterSet = declared.split("\\")
    for keyword, value in values.items():
        _put(identifier, keyword, encoded(value, declared) or b"")
