"""Which instances may pass by what their pixels or content may show (PS3.15 E.1.1, E.3.1, E.3.4).

Attributes can be cleaned by a table; a picture of a screen, a report or a voice cannot. What is not
clean by the way it was made is withheld until a person has looked at it.
"""

from __future__ import annotations

from dataclasses import dataclass

from prefect_dicom.deidentify.elements import PIXEL_DATA, PartTen

CANNOT_BE_CLEANED = "object-cannot-be-cleaned"
MAY_IDENTIFY = "pixels-may-identify"
FACES = "faces-not-removed"

_STORAGE = "1.2.840.10008.5.1.4.1.1."
_CONTENT_CLASSES = ("88.", "104.", "11.", "131", "9.4.", "200.", "201.")
"""Reports, documents, presentation states, structured displays, voices and inventories."""
_CONTENT_MODALITIES = frozenset({"SR", "DOC", "PR", "KO", "AU", "PLAN"})
_TOMOGRAPHY = frozenset({"2", "2.1", "2.2", "4", "4.1", "4.3", "4.4", "20", "128", "128.1", "130"})
"""CT, MR, PT and NM: made by reconstruction, which burns nothing in."""
_COMPUTED = ("66.", "481.", "30", "4.2", "67", "9.")
"""Segmentations, registrations, radiotherapy, parametric maps, waveforms: no pictures."""
_PICTURES_AMONG_COMPUTED = frozenset({"481.1"})

_RISKY_WORDS = (
    "SECONDARY",
    "SCREEN",
    "REPORT",
    "DOSE",
    "CAPTURE",
    "SUMMARY",
    "PASTED",
    "FUSED",
    "RESULT",
)
_HEADS = ("HEAD", "BRAIN", "SKULL", "FACE", "ORBIT", "SINUS", "NECK", "PITUITARY", "IAC")
_FINE_SLICE_MM = 3.0

_SOP_CLASS, _MODALITY, _IMAGE_TYPE = 0x00080016, 0x00080060, 0x00080008
_BURNED_IN, _PHOTOMETRIC = 0x00280301, 0x00280004
_BODY_PART, _SLICE_THICKNESS, _DESCRIPTION = 0x00180015, 0x00180050, 0x00081030


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether an instance may pass."""

    reason: str = ""
    """Reason code why it is withheld; empty: it passes."""
    because: str = ""
    """What was seen, for people. Names no patient."""
    warnings: tuple[str, ...] = ()
    """Reason codes of what passes, and a person should know."""


def judge(file: PartTen, trusted: frozenset[str] = frozenset()) -> Judgement:
    """Judge an instance by its class, modality and type of image.

    Parameters
    ----------
    trusted : frozenset of str
        Modalities of radiographs (``CR``, ``DX``, ``MG`` ...) whose images a site knows to have
        nothing burned in.
    """
    kind = file.text(_SOP_CLASS).removeprefix(_STORAGE)
    modality = file.text(_MODALITY)
    if kind.startswith(_CONTENT_CLASSES) or modality in _CONTENT_MODALITIES:
        return Judgement(CANNOT_BE_CLEANED, f"its content is text or sound ({modality or kind})")
    if not any(element.tag in PIXEL_DATA for element in file.elements):
        return Judgement()
    if kind.startswith(_COMPUTED) and kind not in _PICTURES_AMONG_COMPUTED:
        return Judgement()
    because = _risk(file, kind, modality, trusted)
    if because:
        return Judgement(MAY_IDENTIFY, because)
    return Judgement(warnings=(FACES,) if _shows_a_face(file) else ())


def _risk(file: PartTen, kind: str, modality: str, trusted: frozenset[str]) -> str:
    """What about the pixels may identify somebody; empty if nothing."""
    if file.text(_BURNED_IN).upper() == "YES":
        return "Burned In Annotation is YES"
    image_type = file.text(_IMAGE_TYPE).upper()
    if found := next((word for word in _RISKY_WORDS if word in image_type), ""):
        return f"Image Type has {found}"
    if modality in trusted:
        return ""
    if kind not in _TOMOGRAPHY:
        return f"images of this class often have text burned in ({modality or kind})"
    if not file.text(_PHOTOMETRIC).startswith("MONOCHROME"):
        return "a coloured image of this class is a rendered one"
    return "" if image_type else "Image Type is missing"


def _shows_a_face(file: PartTen) -> bool:
    """Whether a face can be rendered from the series: 113102 is never claimed."""
    place = f"{file.text(_BODY_PART)} {file.text(_DESCRIPTION)}".upper()
    try:
        thickness = float(file.text(_SLICE_THICKNESS))
    except ValueError:
        return False
    return 0 < thickness <= _FINE_SLICE_MM and any(head in place for head in _HEADS)
