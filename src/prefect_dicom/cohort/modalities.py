"""DICOM's terms for modalities, and the words that people write instead.

No PACS has a study of the modality ``MRI``: its images say ``MR``. A list or a definition that asks
for it finds nothing, which reads like an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from prefect_dicom.cohort.altered_values import is_for_nothing

_DEFINED = (
    "ANN AR ASMT AU BDUS BI BMD CFM CR CT CTPROTOCOL DG DMS DOC DX ECG EEG EMG EOG EPS ES FID GM "
    "HC HD IO IOL IVOCT IVUS KER KO LEN LS M3D MG MR NM OAM OCT OP OPM OPR OPT OPTBSV OPTENF OPV "
    "OSS OT PA PLAN POS PR PT PX REG RESP RF RG RTDOSE RTIMAGE RTINTENT RTPLAN RTRAD RTRECORD "
    "RTSEGANN RTSTRUCT RWV SEG SM SMR SR SRF STAIN TEXTUREMAP TG US VA XA XAPROTOCOL XC "
    "AS CD CF CP CS DD DF DM DS EC FA FS LP MA MS ST VF"
)
"""PS3.3 C.7.3.1.1.1; the retired ones last, which old studies have."""
_DEFINED_TERMS = frozenset(_DEFINED.split())

_WORDS = {
    "MR": "mri mrt mris mrts cmr cmrt irm rm rmn nmr mra mrs mrcp fmri mrtomographie kernspin "
    "magneticresonance resonancia risonanza mprage",
    "CT": "cat cta tc tac tdm kt hrct ldct cbct ctscan catscan scanner tomography cts cct "
    "tomographie computedtomography computertomographie computertomografie tomografia",
    "PT": "pet tep petct petmr petmri petscan fdg fdgpet ptct ptmr",
    "US": "usg sono sonography sonographie sonografie ultrasound ultraschall ultrason echo eco "
    "echography echographie echocardiography ecografia doppler tte tee uzi ultrageluid",
    "MG": "mammo mam mmg mammography mammographie mammografie mammografia mamografia mx dbt "
    "tomosynthesis tomosynthese",
    "CR or DX": "xr xray xrays rx rtg cxr rontgen roentgen radiograph radiography radiographie "
    "radiografia radiologie plainfilm conventional",
    "NM": "spect spectct nuc nucmed nuclear nuclearmedicine nuklearmedizin scintigraphy "
    "szintigraphie scintigraphie gammagrafia bonescan",
    "XA": "angio angiography angiographie angiografia dsa cath coro",
    "RF": "fl fluoro fluoroscopy durchleuchtung fluoroscopie",
    "BMD": "dexa dxa",
    "PX": "opg pano panoramic",
    "SM": "wsi pathology histology",
    "ES": "endo endoscopy endoskopie endoscopie",
    "ECG": "ekg",
    "SR": "report reports",
    "SEG": "segmentation",
    "RTSTRUCT": "rtss rtst rtstr struct",
    "RTDOSE": "rtd dose",
    "OT": "other",
}
_TERMS = {word: term for term, words in _WORDS.items() for word in words.split()}
_LETTERS = re.compile(r"[^a-z]")
_BETWEEN_TERMS = re.compile(r"[\s,;/|+&^]+")
_CODE = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9_]{1,16}")
"""CS of PS3.5 6.2, in either case; a number is no modality."""
_ANY = frozenset(
    [
        *("all", "any", "every", "various", "several", "multi", "multiple", "mixed", "div"),
        *("diverse", "alle", "alles", "jede", "egal", "tous", "toutes", "todas", "todos", "tutti"),
    ]
)


def is_defined(code: str) -> bool:
    """Whether a code is one of DICOM's own terms; case is of no account."""
    return code.strip().upper() in _DEFINED_TERMS


def is_for_anything(code: str) -> bool:
    """Whether a code is a word for any modality, or for several."""
    return code.strip().casefold() in _ANY


def likely_term(code: str) -> str | None:
    """DICOM's term for what somebody has written as a modality; None for a term or a private one.

    Examples
    --------
    >>> likely_term("MRI"), likely_term("CT scan"), likely_term("ct"), likely_term("ACME")
    ('MR', 'CT', None, None)
    """
    if is_defined(code):
        return None
    word = _LETTERS.sub("", code.casefold())
    if word in _TERMS:
        return _TERMS[word]
    parts = [part for part in re.split(r"[^A-Za-z0-9]+", code) if part]
    if len(parts) < 2:
        return None
    return next(
        (
            part.upper() if is_defined(part) else _TERMS[part.casefold()]
            for part in parts
            if is_defined(part) or part.casefold() in _TERMS
        ),
        None,
    )


def stated_terms(answered: Iterable[str]) -> frozenset[str] | None:
    """The terms that a PACS states by its values of ModalitiesInStudy, in upper case.

    Some write several into one value, or a word of their own.

    Returns
    -------
    frozenset of str or None
        None where it states nothing: without a value, and where one is a wildcard, a word for
        nothing or for anything, or no code at all. The study may be of any modality then.

    Examples
    --------
    >>> sorted(stated_terms(["CT/sr", "MRI"]) or ()), stated_terms(["CT", "*"]), stated_terms([])
    (['CT', 'MR', 'SR'], None, None)
    """
    terms: set[str] = set()
    for value in filter(None, (each.strip(" \0") for each in answered)):
        if is_for_nothing(value, is_code=True):
            return None
        parts = [part for part in _BETWEEN_TERMS.split(value) if part]
        if all(map(is_defined, parts)):
            terms.update(part.upper() for part in parts)
        elif (term := likely_term(value)) is not None and not set("*?") & set(value):
            terms.update(term.split(" or "))
        elif any(_CODE.fullmatch(p) is None or is_for_anything(p) for p in parts):
            return None
        else:
            terms.update(part.upper() for part in parts)
    return frozenset(terms) or None
