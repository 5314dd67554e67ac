"""Presentation contexts of a C-GET, in groups that fit an association.

One presentation context holds one SOP class and, so that the PACS has no choice, one transfer
syntax; an association holds 128 contexts at most (PS3.8 9.3.2.2), one of them the model's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from itertools import islice
from threading import Lock

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

COMMON_CLASSES = (
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
        (*COMMON_CLASSES, *(str(c.abstract_syntax) for c in AllStoragePresentationContexts))
    )
)
"""All storage classes of the standard, the most frequent first: for PACS that return no classes."""


_SEARCHED_SYNTAXES: tuple[str, ...] = (
    *COMMON_SYNTAXES[2:-2],
    *COMMON_SYNTAXES[:2],
    *COMMON_SYNTAXES[-2:],
    *RARE_SYNTAXES,
)
"""In the order in which one after the other is tried: compressed ones are what it is tried for."""

_SUCCESSORS = {
    "1.2.840.10008.5.1.4.1.1.3": ("1.2.840.10008.5.1.4.1.1.3.1",),  # Ultrasound multi-frame
    "1.2.840.10008.5.1.4.1.1.6": ("1.2.840.10008.5.1.4.1.1.6.1",),  # Ultrasound
    "1.2.840.10008.5.1.4.1.1.5": ("1.2.840.10008.5.1.4.1.1.20",),  # Nuclear medicine
    "1.2.840.10008.5.1.4.1.1.12.3": ("1.2.840.10008.5.1.4.1.1.12.1",),  # X-ray, two planes
    "1.2.840.10008.5.1.4.1.1.77.1": ("1.2.840.10008.5.1.4.1.1.77.1.4",),  # Visible light
    "1.2.840.10008.5.1.4.1.1.77.2": ("1.2.840.10008.5.1.4.1.1.77.1.4",),
    "1.2.840.10008.5.1.4.1.1.9.1": (  # Waveforms
        "1.2.840.10008.5.1.4.1.1.9.1.1",
        "1.2.840.10008.5.1.4.1.1.9.1.2",
    ),
    "1.2.840.10008.5.1.4.1.1.88.1": ("1.2.840.10008.5.1.4.1.1.88.11",),  # Structured reports
    "1.2.840.10008.5.1.4.1.1.88.2": ("1.2.840.10008.5.1.4.1.1.88.33",),
    "1.2.840.10008.5.1.4.1.1.88.3": ("1.2.840.10008.5.1.4.1.1.88.33",),
    "1.2.840.10008.5.1.4.1.1.88.4": ("1.2.840.10008.5.1.4.1.1.88.33",),
}
"""Retired classes, and those that have taken their place: PACS list the one and send the other."""


def with_successors(sop_classes: Iterable[str]) -> tuple[str, ...]:
    """The classes, each retired one followed by those that have taken its place."""
    return tuple(
        dict.fromkeys(uid for given in sop_classes for uid in (given, *_SUCCESSORS.get(given, ())))
    )


def filled_up(contexts: Sequence[Pair]) -> tuple[Pair, ...]:
    """The contexts, and as many of other classes as the association has room for.

    Some PACS list one class for a series of several. In the encodings that anything may be kept
    in: objects that are no images are kept in nothing else.
    """
    known = {sop_class for sop_class, _ in contexts}
    kin = (retired for retired, now in _SUCCESSORS.items() if known.intersection((retired, *now)))
    others = (
        (sop_class, syntax)
        for sop_class in dict.fromkeys((*with_successors(kin), *STORAGE_CLASSES))
        if sop_class not in known
        for syntax in COMMON_SYNTAXES[:2]
    )
    return (*contexts, *islice(others, STORAGE_CONTEXTS - len(contexts)))


class Breadth(Enum):
    """How a PACS is given the choice of transfer syntaxes, quickest first."""

    COMMON = "common"
    """The common ones of each class at once."""
    ALL = "all"
    """All of each class at once, in more associations."""
    SINGLE = "single"
    """One syntax for all classes, then the next: some PACS (dcmqrscp) always take the first
    context of a class, and fail where the instance is in another syntax."""


class NegotiatedContexts:
    """What a node has made of the storage contexts that C-GETs have proposed. Thread-safe.

    Shared by all threads of a run: what one has learnt, the others do not propose again.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._accepted: dict[str, list[str]] = {}
        self._refused: set[Pair] = set()
        self._searched: set[str] = set()

    def record(self, proposed: Sequence[Pair], accepted: Sequence[Pair]) -> None:
        """An association was negotiated.

        A class of which some syntaxes were accepted has none that count as refused: some peers
        accept one context of a class and no more.
        """
        classes = {sop_class for sop_class, _ in accepted}
        with self._lock:
            for sop_class, syntax in accepted:
                known = self._accepted.setdefault(sop_class, [])
                if syntax not in known:
                    known.append(syntax)
            self._refused.difference_update(accepted)
            self._refused.update(pair for pair in proposed if pair[0] not in classes)

    def record_search(self, sop_classes: Iterable[str]) -> None:
        """One syntax after the other of these classes was proposed, and nothing came of it."""
        with self._lock:
            self._searched.update(sop_classes)

    def is_refused(self, sop_class: str) -> bool:
        """Whether the node has refused a class, and has never accepted it."""
        with self._lock:
            refused = any(known == sop_class for known, _ in self._refused)
            return refused and sop_class not in self._accepted

    def is_worth_search(self, sop_class: str) -> bool:
        """Whether one syntax after the other is to be proposed, for what fails with all of them.

        Not where it has been in vain for an instance of the class, and not where the node accepts
        one syntax only: then there is nothing that it could have chosen wrongly.
        """
        with self._lock:
            syntaxes = self._accepted.get(sop_class, ())
            return sop_class not in self._searched and len(syntaxes) > 1

    def worth_proposing(self, contexts: Sequence[Pair], breadth: Breadth) -> tuple[Pair, ...]:
        """Those contexts that the node has not refused.

        Of one syntax after the other, those that it accepts; but the first, which it has taken
        where it always takes the first.
        """
        with self._lock:
            if breadth is Breadth.SINGLE:
                return tuple(
                    (sop_class, syntax)
                    for sop_class, syntax in contexts
                    if sop_class not in self._searched
                    and syntax in self._accepted.get(sop_class, ())[1:]
                )
            return tuple(pair for pair in contexts if pair not in self._refused)


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
            for syntax in _SEARCHED_SYNTAXES:
                yield frozenset(group), tuple((c, syntax) for c in group)
        return
    syntaxes = COMMON_SYNTAXES + (RARE_SYNTAXES if breadth is Breadth.ALL else ())
    most = STORAGE_CONTEXTS // len(syntaxes)
    for start in range(0, len(unique), most):
        group = unique[start : start + most]
        yield frozenset(group), tuple((c, s) for c in group for s in syntaxes)
