"""The corpus of real DICOM files, which is not part of the project, and the choices among them.

It lies in a folder with a ``MANIFEST.csv``: beside the project, or where ``PREFECT_DICOM_CORPUS``
says.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest


def corpus_directory() -> Path | None:
    """The corpus of real files, where there is one."""
    named = os.environ.get("PREFECT_DICOM_CORPUS")
    beside = Path(__file__).parents[3] / "shared" / "data" / "dicom"
    directory = Path(named) if named else beside
    return directory if (directory / "MANIFEST.csv").is_file() else None


def corpus_rows() -> list[dict[str, str]]:
    """The corpus's manifest: the files that an archive can be sent, in its order."""
    directory = corpus_directory()
    if directory is None:
        return []
    with open(directory / "MANIFEST.csv", newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["store_orthanc_1_10_1"] == "0x0000"]


# Folders with a story: several studies of a patient, seven syntaxes in a study, a PatientID of
# wildcards, one SOP Instance UID twice, character sets, odd UIDs, eight series.
_SMALL = (
    *("neurolabusc+dcm_qa_ts/", "neurolabusc+dcm_qa_uih/", "pydicom+pydicom/dicomdirtests/"),
    *("synthetic/conflict/", "synthetic/charset/", "synthetic/odd/", "synthetic/bad/"),
    *("synthetic/valid/eight_series/", "synthetic/valid/gaps/", "synthetic/valid/priors/"),
)


def small_corpus() -> list[Path]:
    """About 200 files of all kinds: telling folders, and each class in each syntax once."""
    directory = corpus_directory()
    seen: set[tuple[str, str]] = set()
    chosen = []
    for row in sorted(corpus_rows(), key=lambda row: (int(row["size"]), row["path"])):
        kind = (row["sop_class_uid"], row["transfer_syntax_uid"])
        if row["path"].startswith(_SMALL) or kind not in seen:
            seen.add(kind)
            chosen.append(directory / row["path"])
    return sorted(chosen)


def full_corpus() -> list[Path]:
    """Every file of the corpus that an archive takes."""
    directory = corpus_directory()
    return [directory / row["path"] for row in corpus_rows()]


def corpus_lines() -> list[tuple[Path, dict[str, str]]]:
    """Every file with its line of the manifest; skips the test where there is no corpus."""
    directory = corpus_directory()
    if directory is None:
        pytest.skip("no corpus of real DICOM files (set PREFECT_DICOM_CORPUS)")
    with open(directory / "MANIFEST.csv", newline="", encoding="utf-8") as file:
        return [(directory / line["path"], line) for line in csv.DictReader(file)]
