"""What a query has to find in the corpus, told by its manifest and its files alone.

Nothing of the product is in here: another reading of the same rules. A query is a row of a cohort
file, as keywords and texts.
"""

from __future__ import annotations

import csv
import fnmatch
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pydicom

FOUND = "found"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_READ_FROM_FILES = ("AccessionNumber", "StudyDate", "StudyDescription", "PatientBirthDate")


@dataclass
class HeldStudy:
    """A study as an archive has to tell it: one for each patient that has it."""

    uid: str
    patient: str
    names: set[str] = field(default_factory=set)
    modalities: set[str] = field(default_factory=set)
    reported: dict[str, set[str]] = field(default_factory=dict)
    series: dict[str, tuple[str, set[str]]] = field(default_factory=dict)
    """Modality and SOP Instance UIDs of each series."""

    def one(self, keyword: str) -> str:
        """The value of an attribute that all objects of the study agree in."""
        [value] = self.reported[keyword]
        return value

    @property
    def day(self) -> str:
        """Eight digits; empty where the date is none of the calendar's."""
        return _digits(self.one("StudyDate")) or ""


@dataclass(frozen=True)
class Oracle:
    """An archive's holdings, and what of them its answers can tell.

    ``letters`` is the encoding that answers come in, None where they come as stored; what it
    lacks is dropped. ``modalities`` is False for an archive that does not tell a study's.
    """

    studies: tuple[HeldStudy, ...]
    letters: str | None = None
    modalities: bool = True

    def answer(self, query: Mapping[str, str]) -> tuple[str, frozenset[str]]:
        """What becomes of the row, and the UIDs of its studies."""
        own = [study for study in self.studies if _identified(query, study)]
        if not own:
            return "no-match", frozenset()
        passing = [study for study in own if self._passes(query, study)]
        if not passing:
            return "excluded-by-filter", frozenset()
        uids = {study.uid for study in passing}
        if len({study.patient for study in own if study.uid in uids}) > 1:
            return "several-patients", frozenset()
        if not all(self._is_the_patients(query, study) for study in passing):
            return "name-disagrees", frozenset()
        return FOUND, frozenset(uids)

    def _passes(self, query: Mapping[str, str], study: HeldStudy) -> bool:
        if days := query.get("StudyDate"):
            first, last = days.split("-") if "-" in days else (days, days)
            day = _digits(study.one("StudyDate"))
            if day is None or not (first or "0") <= day <= (last or "9"):
                return False
        modalities = {one.lower() for one in study.modalities} if self.modalities else set()
        wanted = query.get("Modality", "").lower()
        # Where none is told it may be any.
        if wanted and modalities and wanted not in modalities:
            return False
        if pattern := query.get("StudyDescription"):
            text = study.one("StudyDescription").lower()
            return fnmatch.fnmatchcase(text, pattern.lower().replace("[", "[[]"))
        return True

    def _is_the_patients(self, query: Mapping[str, str], study: HeldStudy) -> bool:
        born = query.get("PatientBirthDate")
        if born and _digits(study.one("PatientBirthDate")) != born:
            return False
        if name := query.get("PatientName"):
            [reported] = study.names
            return _same_name(name, self._as_answered(reported))
        return True

    def _as_answered(self, text: str) -> str:
        if self.letters is None:
            return text
        return text.encode(self.letters, "ignore").decode(self.letters)


def _identified(query: Mapping[str, str], study: HeldStudy) -> bool:
    wanted = {
        "PatientID": study.patient,
        "StudyInstanceUID": study.uid,
        "AccessionNumber": None,
    }
    given = {keyword: query[keyword].strip() for keyword in wanted if query.get(keyword)}
    if "AccessionNumber" in given:
        wanted["AccessionNumber"] = study.one("AccessionNumber")
    return bool(given) and all(wanted[keyword] == value for keyword, value in given.items())


def _digits(day: str) -> str | None:
    """A day as eight digits, if it is one of the calendar's."""
    match = re.fullmatch(r"(\d{4})(\.?)(\d\d)\2(\d\d)", day)
    if match is None:
        return None
    year, _, month, number = match.groups()
    longest = 29 if month == "02" else 30 if month in ("04", "06", "09", "11") else 31
    leap = int(year) % 4 == 0 and (int(year) % 100 or int(year) % 400 == 0)
    if month == "02" and not leap:
        longest = 28
    fine = year != "0000" and "01" <= month <= "12" and 1 <= int(number) <= longest
    return year + month + number if fine else None


def _same_name(asked: str, reported: str) -> bool:
    def groups(name: str) -> list[str]:
        return [group.strip(" ^").lower() for group in name.split("=")]

    wanted, found = groups(asked), groups(reported)
    if len(wanted) == 1:
        return wanted[0] in found
    both = [(a, b) for a, b in zip(wanted, found, strict=False) if a and b]
    return bool(both) and all(a == b for a, b in both)


def held_studies(corpus: Path, paths: Collection[Path], took: str) -> tuple[HeldStudy, ...]:
    """The studies of those files that an archive takes.

    Parameters
    ----------
    took : str
        The manifest's column of what the archive answered to each file.
    """
    studies: dict[tuple[str, str], HeldStudy] = {}
    with (corpus / "MANIFEST.csv").open(newline="", encoding="utf-8") as file:
        # A deflated object is sent inflated to an archive that takes no other.
        rows = [
            row
            for row in csv.DictReader(file)
            if row[took] == "0x0000" or row["transfer_syntax_uid"] == _DEFLATED
        ]
    for row in rows:
        path = corpus / row["path"]
        if path not in paths:
            continue
        key = row["study_instance_uid"], row["patient_id"].strip()
        study = studies.setdefault(key, HeldStudy(*key))
        study.names.add(row["patient_name"])
        study.modalities |= {row["modality"]} - {""}
        series = study.series.setdefault(row["series_instance_uid"], (row["modality"], set()))
        series[1].add(row["sop_instance_uid"])
        for keyword, value in _read(path).items():
            study.reported.setdefault(keyword, set()).add(value)
    return tuple(studies.values())


def _read(path: Path) -> dict[str, str]:
    with warnings.catch_warnings(action="ignore"):
        data = pydicom.dcmread(path, force=True, specific_tags=list(_READ_FROM_FILES))
        return {keyword: str(data.get(keyword) or "").strip() for keyword in _READ_FROM_FILES}


def names_by_patient(studies: Iterable[HeldStudy]) -> dict[str, str]:
    """Every patient's name that is the same in all of the patient's studies."""
    names: dict[str, set[str]] = {}
    for study in studies:
        names.setdefault(study.patient, set()).update(study.names)
    return {patient: min(some) for patient, some in names.items() if len(some) == 1}
