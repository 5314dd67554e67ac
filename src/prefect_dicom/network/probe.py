"""Probes of a node: one negotiation or one query, with its status as the PACS answers it.

Other modules turn a status into a reason code. A probe reports it, and may send keys that a pull
never sends. That is harmless: every query has a key that names one entity or a range of days, a
limited number of answers is taken, and the rest is cancelled.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydicom import charset, config
from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian

from prefect_dicom.config.node import PacsNode
from prefect_dicom.core.model import InformationModel
from prefect_dicom.core.uids import is_safe_key
from prefect_dicom.network.association import associate
from prefect_dicom.network.exchange import Response
from prefect_dicom.network.information_models import QUERY_RETRIEVE_CLASSES
from prefect_dicom.network.requestor import Requestor
from prefect_dicom.network.status import SUCCESS
from prefect_dicom.network.upper_layer.association_items import OperationsWindow
from prefect_dicom.network.upper_layer.negotiation import (
    ANSWER_BYTES,
    MODEL_CONTEXT_ID,
    request_pdu,
)

_NAME_ONE = (
    "PatientID",
    "AccessionNumber",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPInstanceUID",
    "StudyDate",
)
_RELEASE_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Offer:
    """Presentation contexts and roles that a node grants.

    Parameters
    ----------
    accepted : frozenset of (str, str)
        Abstract syntaxes, each with the transfer syntax it was proposed with.
    scp_roles : frozenset of str
        SOP classes for which we may be SCP.
    operations_window : int
        Operations we may have outstanding, 0 for any number.
    """

    accepted: frozenset[tuple[str, str]]
    scp_roles: frozenset[str]
    operations_window: int


@dataclass(frozen=True, slots=True)
class Answers:
    """Status and answers of a query.

    Parameters
    ----------
    status : int or None
        Of the final response; None where there was none, or only after a C-CANCEL.
    rows : tuple of dict
        By keyword, the encoded values of each answer.
    """

    status: int | None
    rows: tuple[dict[str, bytes], ...]

    @property
    def found(self) -> bool:
        """Whether it succeeded and has answers."""
        return bool(self.rows) and self.status in (SUCCESS, None)


def negotiate(
    node: PacsNode,
    proposed: Sequence[tuple[str, str]],
    roles: Iterable[str] = (),
    operations_window: OperationsWindow | None = None,
) -> Offer:
    """Open an association, look at what is granted, and release it.

    Parameters
    ----------
    proposed : sequence of (abstract syntax, transfer syntax)
        At most 128.
    roles, operations_window
        See :func:`~prefect_dicom.network.upper_layer.negotiation.request_pdu`.

    Raises
    ------
    PacsError
        The association could not be opened.
    """
    request = request_pdu(
        node.calling_ae_title,
        node.called_ae_title,
        [(abstract, [syntax]) for abstract, syntax in proposed],
        roles,
        operations_window,
    )
    stream, granted = associate(node, request, ANSWER_BYTES)
    with contextlib.closing(stream.connection):
        stream.release(time.monotonic() + _RELEASE_SECONDS)
    return Offer(
        frozenset(
            pair
            for number, pair in enumerate(proposed)
            if granted.results.get(2 * number + MODEL_CONTEXT_ID) == 0
        ),
        granted.scp_roles,
        granted.operations_window,
    )


def models_offered(node: PacsNode) -> dict[str, tuple[InformationModel, ...]]:
    """The information models a node accepts, by service.

    Raises
    ------
    PacsError
        See :func:`negotiate`.
    """
    syntax = str(ImplicitVRLittleEndian)
    proposed = [
        (uid, syntax) for models in QUERY_RETRIEVE_CLASSES.values() for uid in models.values()
    ]
    accepted = {abstract for abstract, _ in negotiate(node, proposed).accepted}
    return {
        service: tuple(model for model, uid in models.items() if uid in accepted)
        for service, models in QUERY_RETRIEVE_CLASSES.items()
    }


def ask(
    requestor: Requestor,
    level: str,
    match: Mapping[str, str | Sequence[str]],
    wanted: Iterable[str] = (),
    *,
    most: int,
    character_set: str | None = None,
) -> Answers:
    """Send one C-FIND and take at most ``most`` answers; the rest is cancelled.

    Parameters
    ----------
    level : str
        ``PATIENT``, ``STUDY``, ``SERIES`` or ``IMAGE``.
    match : mapping
        Keyword to value, or to a list of UIDs. One at least names one entity, or days; others
        may hold wildcards.
    wanted : iterable of str
        Keywords to be returned.
    character_set : str, optional
        What the query declares and is encoded in.

    Raises
    ------
    ValueError
        Where no key limits what is asked for, or the values cannot be encoded.
    PacsError
        The association could not be opened, or ended without a final response.
    """
    identifier = _identifier(level, match, wanted, character_set)
    rows: list[dict[str, bytes]] = []
    with contextlib.closing(requestor.find_responses(identifier)) as responses:
        for response in responses:
            if not response.is_pending:
                return Answers(response.status, tuple(rows))
            if len(rows) == most:
                break
            rows.append(_row(response))
    return Answers(None, tuple(rows))


def text(row: Mapping[str, bytes], keyword: str) -> str | None:
    """A value decoded as its answer declares; None where that cannot be."""
    declared = row.get("SpecificCharacterSet", b"").decode("latin-1").split("\\")
    try:
        encodings = charset.convert_encodings([one.strip() for one in declared])
        decoded = charset.decode_bytes(row.get(keyword, b""), encodings, {ord("^"), ord("=")})
    except (LookupError, ValueError):
        return None
    return None if "\ufffd" in decoded else decoded


def _identifier(
    level: str,
    match: Mapping[str, str | Sequence[str]],
    wanted: Iterable[str],
    character_set: str | None,
) -> Dataset:
    limiting = [match[keyword] for keyword in _NAME_ONE if keyword in match]
    values = [one for value in limiting for one in ([value] if isinstance(value, str) else value)]
    if not any(map(is_safe_key, values)):
        raise ValueError("a query without a key that names one entity, or days")
    identifier = Dataset()
    identifier.QueryRetrieveLevel = level
    if character_set is not None:
        identifier.SpecificCharacterSet = character_set.split("\\")
    for keyword, value in {**dict.fromkeys(wanted, ""), **match}.items():
        tag = tag_for_keyword(keyword)
        if tag is None:
            raise ValueError("not a DICOM keyword")
        value = value if isinstance(value, str) else list(value)
        identifier.add(DataElement(tag, dictionary_VR(tag), value, validation_mode=config.IGNORE))
    return identifier


def _row(response: Response) -> dict[str, bytes]:
    row: dict[str, bytes] = {}
    try:
        answer = response.identifier()
        for tag in answer.keys():  # noqa: SIM118 - items() would decode the values
            value = answer.get_item(tag).value
            if isinstance(value, bytes):
                row[keyword_for_tag(tag)] = value.strip(b" \0")
    except Exception:
        # Not a data set, in any of a dozen ways: an answer without values.
        return {}
    return row
