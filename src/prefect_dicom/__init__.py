"""Pull a cohort out of a PACS into object storage, with a proof for every study.

Importing this package imports next to nothing. Its Prefect blocks are here for
``prefect block register -m prefect_dicom`` and are imported when they are asked for; servers and
workers find them by the entry point ``prefect.collections``.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

__version__ = version("prefect-dicom")

_BLOCKS = ("DicomArchive", "DicomLedger", "DicomPacs", "DicomReceiver", "DicomSite")


def __getattr__(name: str) -> Any:
    if name in _BLOCKS:
        return getattr(import_module("prefect_dicom.blocks"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_BLOCKS]
