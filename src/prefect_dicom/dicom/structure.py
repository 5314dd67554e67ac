"""Shape of a data set: what the headers say of its pixels and of its form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PixelData:
    """First pixel data element: (7FE0,0008), (7FE0,0009) or (7FE0,0010).

    Attributes
    ----------
    tag : int
        Its tag.
    length_bytes : int or None
        None if it is encapsulated (PS3.5 A.4).
    fragments, fragment_bytes : int
        Fragments of encapsulated pixel data behind the Basic Offset Table, and their size.
    """

    tag: int
    length_bytes: int | None
    fragments: int = 0
    fragment_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Structure:
    """Attributes of a data set's shape; None where an element is absent.

    Attributes
    ----------
    requested_sop_class_uid : str or None
        From the file meta, which is written from the C-STORE request.
    rows, columns, samples_per_pixel, bits_allocated : int or None
        PS3.3 C.7.6.3.
    number_of_frames : int or None
        1 where it is absent, None where it holds no number.
    photometric_interpretation : str or None
        (0028,0004).
    pixel_data : PixelData or None
        The first pixel data element.
    has_pixel_data_provider, has_spectroscopy_data : bool
        Whether (0028,7FE0) or (5600,0020) is present.
    other_syntax : bool
        Whether the elements are not encoded in the transfer syntax of the file meta.
    twice : frozenset of str
        Fields of :class:`~prefect_dicom.core.model.Identity` that occur again with another value.
    trailing_bytes : int
        Zeros or blanks behind the last element.
    oddities : frozenset of str
        Reason codes of what is not as the standard has it, and was read all the same.
    complete : bool
        False where the walk stopped at its limit on elements.
    """

    requested_sop_class_uid: str | None = None
    rows: int | None = None
    columns: int | None = None
    samples_per_pixel: int | None = None
    bits_allocated: int | None = None
    number_of_frames: int | None = 1
    photometric_interpretation: str | None = None
    pixel_data: PixelData | None = None
    has_pixel_data_provider: bool = False
    has_spectroscopy_data: bool = False
    other_syntax: bool = False
    twice: frozenset[str] = frozenset()
    trailing_bytes: int = 0
    complete: bool = True
    oddities: frozenset[str] = frozenset()
