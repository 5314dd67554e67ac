"""Presentation contexts of a C-GET, in groups that fit an association.

One presentation context holds one SOP class and, so that the PACS has no choice, one transfer
syntax; an association holds 128 contexts at most (PS3.8 9.3.2.2), one of them the model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum

from pynetdicom import AllStoragePresentationContexts

from prefect_dicom.network.upper_layer.negotiation import STORAGE_CONTEXTS, Pair

COMMON_SYNTAXES = (
    "1.2.840.10008.1.2.1",  # Explicit VR Little Endian
    "1.2.840.10008.1.2",  # Implicit VR Little Endian
    "1.2.840.10008.1.2.4.70",  # JPEG Lossless, first-order prediction
    "1.2.840.10008.1.2.4.90",  # JPEG 2000, lossless
    "1.2.840.10008.1.2.4.91",  # JPEG 2000
    "1.2.840.10008.1.2.4.50",  # JPEG Baseline
    "1.2.840.10008.1.2.4.51",  # JPEG Extended
    "1.2.840.10008.1.2.4.57",  # JPEG Lossless
    "1.2.840.10008.1.2.4.80",  # JPEG-LS, lossless
    "1.2.840.10008.1.2.4.81",  # JPEG-LS
    "1.2.840.10008.1.2.5",  # RLE
    "1.2.840.10008.1.2.2",  # Explicit VR Big Endian
    "1.2.840.10008.1.2.1.99",  # Deflated: some inflate what could be sent as it is
)
"""What most instances are kept in."""

RARE_SYNTAXES = (
    "1.2.840.10008.1.2.8.1",
    "1.2.840.113619.5.2",  # GE's private one, which its PACS keep and send
    *(f"1.2.840.10008.1.2.4.{n}" for n in (92, 93, 110, 111, 112, 201, 202, 203)),
    # Video, each also as fragmentable.
    *(f"1.2.840.10008.1.2.4.{n}" for n in range(100, 109)),
    *(f"1.2.840.10008.1.2.4.{n}.1" for n in range(100, 107)),
)

_COMMON_CLASSES = (
    "1.2.840.10008.5.1.4.1.1.2",  # CT
    "1.2.840.10008.5.1.4.1.1.4",  # MR
    "1.2.840.10008.5.1.4.1.1.1",  # CR
    "1.2.840.10008.5.1.4.1.1.1.1",  # DX
    "1.2.840.10008.5.1.4.1.1.7",  # Secondary Capture
    "1.2.840.10008.5.1.4.1.1.6.1",  # Ultrasound
    "1.2.840.10008.5.1.4.1.1.3.1",  # Ultrasound multi-frame
    "1.2.840.10008.5.1.4.1.1.128",  # PET
    "1.2.840.10008.5.1.4.1.1.88.67",  # X-ray dose report
    "1.2.840.10008.5.1.4.1.1.11.1",  # Presentation state
)
STORAGE_CLASSES = tuple(
    dict.fromkeys(
        (*_COMMON_CLASSES, *(str(c.abstract_syntax) for c in AllStoragePresentationContexts))
    )
)
"""All storage classes of the standard, the most frequent first: for PACS that return no classes."""


class Breadth(Enum):
    """How a PACS is given the choice of transfer syntaxes, quickest first."""

    COMMON = "common"
    """The common ones of each class at once."""
    ALL = "all"
    """All of each class at once, in more associations."""
    SINGLE = "single"
    """One syntax for all classes, then the next: some PACS (dcmqrscp) always take the first
    context of a class, and fail where the instance is in another syntax."""


def context_groups(
    sop_classes: Iterable[str], breadth: Breadth = Breadth.COMMON
) -> Iterator[tuple[frozenset[str], tuple[Pair, ...]]]:
    """Groups of SOP classes, each with the contexts to propose for it.

    Parameters
    ----------
    sop_classes : iterable of str
        In the order in which they are to be tried.
    breadth : Breadth
        Which transfer syntaxes to propose together.

    Examples
    --------
    >>> [len(classes) for classes, _ in context_groups(map(str, range(25)))]
    [9, 9, 7]
    """
    unique = list(dict.fromkeys(sop_classes))
    if breadth is Breadth.SINGLE:
        for start in range(0, len(unique), STORAGE_CONTEXTS):
            group = unique[start : start + STORAGE_CONTEXTS]
            for syntax in COMMON_SYNTAXES + RARE_SYNTAXES:
                yield frozenset(group), tuple((c, syntax) for c in group)
        return
    syntaxes = COMMON_SYNTAXES + (RARE_SYNTAXES if breadth is Breadth.ALL else ())
    most = STORAGE_CONTEXTS // len(syntaxes)
    for start in range(0, len(unique), most):
        group = unique[start : start + most]
        yield frozenset(group), tuple((c, s) for c in group for s in syntaxes)
