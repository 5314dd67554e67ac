"""A node and an identifier for C-GETs, and the error that one ends with."""

from __future__ import annotations

import pytest
from pydicom.dataset import Dataset

from prefect_dicom.config.node import PacsNode, Timeouts
from prefect_dicom.core.errors import PacsError
from prefect_dicom.core.model import InformationModel
from prefect_dicom.network.get import c_get
from tests.support.wire import (
    CT,
    EXPLICIT,
    MemoryStoreHandler,
)

STUDY = "1.2.3"


def identifier(study: str = STUDY) -> Dataset:
    dataset = Dataset()
    dataset.QueryRetrieveLevel = "STUDY"
    dataset.StudyInstanceUID = study
    return dataset


def node(port: int, *, title: str = "PACS", model=InformationModel.STUDY_ROOT, **timeouts):
    return PacsNode(
        host="127.0.0.1",
        port=port,
        called_ae_title=title,
        information_model=model,
        timeouts=Timeouts(**{"connect_seconds": 5, "acse_seconds": 10, **timeouts}),
    )


def raised(port, **more):
    with pytest.raises(PacsError) as error:
        c_get(
            node(port, **more),
            identifier(),
            contexts=[(CT, EXPLICIT)],
            store_handler=MemoryStoreHandler(),
        )
    return error.value.code
