"""Elements that every copy gets (PS3.15 E.1.1, E.3.6): what was done, and whose copy it is."""

from __future__ import annotations

from collections.abc import Mapping

from prefect_dicom.deidentify.copy import ENGINE_VERSION, Piece
from prefect_dicom.deidentify.elements import ITEM, Encoding
from prefect_dicom.deidentify.options import TEMPORAL_INFORMATION, Options
from prefect_dicom.deidentify.table import EDITION
from prefect_dicom.deidentify.values import padded

_IDENTITY_REMOVED, _METHOD, _METHOD_CODES = 0x00120062, 0x00120063, 0x00120064
_TEMPORAL_INFORMATION = 0x00280303
WRITTEN_HERE = frozenset({_IDENTITY_REMOVED, _METHOD, _METHOD_CODES, _TEMPORAL_INFORMATION})


def additions(
    options: Options,
    encoding: Encoding,
    identity: Mapping[int, tuple[bytes, str]],
) -> list[tuple[int, list[Piece]]]:
    """Encode the elements, each with its tag.

    Parameters
    ----------
    identity : mapping of int to tuple
        VR and text of the elements that say whose copy it is.
    """
    items = b""
    for code, meaning in sorted(options.codes):
        item = b"".join(
            _encoded(encoding, tag, vr, text)
            for tag, vr, text in (
                (0x00080100, b"SH", code),
                (0x00080102, b"SH", "DCM"),
                (0x00080104, b"LO", meaning),
            )
        )
        items += encoding.delimiter(ITEM, len(item)) + item
    texts = {
        **identity,
        _IDENTITY_REMOVED: (b"CS", "YES"),
        _METHOD: (
            b"LO",
            f"PS3.15 {EDITION} Basic Profile\\prefect-dicom engine {ENGINE_VERSION}",
        ),
        _TEMPORAL_INFORMATION: (b"CS", TEMPORAL_INFORMATION[options.dates]),
    }
    added: list[tuple[int, list[Piece]]] = [
        (tag, [_encoded(encoding, tag, vr, text)]) for tag, (vr, text) in texts.items()
    ]
    added.append((_METHOD_CODES, [encoding.header(_METHOD_CODES, b"SQ", len(items)), items]))
    return added


def _encoded(encoding: Encoding, tag: int, vr: bytes, text: str) -> bytes:
    value = padded(text.encode("ascii"))
    return encoding.header(tag, vr, len(value)) + value
