"""Pull a cohort out of a PACS into object storage, with a proof for every study.

Public are the names in ``__all__`` here and in :mod:`prefect_dicom.flows`,
:mod:`prefect_dicom.blocks` and :mod:`prefect_dicom.testing`. Importing this package imports next to
nothing: each name is imported when it is first used. Servers and workers find the blocks by the
entry point ``prefect.collections``, or by ``prefect block register -m prefect_dicom``.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_dicom import blocks, flows, testing
    from prefect_dicom.api import PullResult, find, pull, read_cohort
    from prefect_dicom.blocks import (
        DicomArchive,
        DicomLedger,
        DicomPacs,
        DicomReceiver,
        DicomSite,
    )
    from prefect_dicom.config.site import Site, load_site
    from prefect_dicom.core.errors import (
        CohortError,
        ConfigurationError,
        Interrupted,
        PrefectDicomError,
    )

__version__ = version("prefect-dicom")

__all__ = [
    "CohortError",
    "ConfigurationError",
    "DicomArchive",
    "DicomLedger",
    "DicomPacs",
    "DicomReceiver",
    "DicomSite",
    "Interrupted",
    "PrefectDicomError",
    "PullResult",
    "Site",
    "__version__",
    "blocks",
    "find",
    "flows",
    "load_site",
    "pull",
    "read_cohort",
    "testing",
]

_NAMES = {
    "prefect_dicom.api": ("PullResult", "find", "pull", "read_cohort"),
    "prefect_dicom.blocks": (
        "DicomArchive",
        "DicomLedger",
        "DicomPacs",
        "DicomReceiver",
        "DicomSite",
    ),
    "prefect_dicom.config.site": ("Site", "load_site"),
    "prefect_dicom.core.errors": (
        "CohortError",
        "ConfigurationError",
        "Interrupted",
        "PrefectDicomError",
    ),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
