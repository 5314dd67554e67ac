"""SOP classes of the Query/Retrieve information models, PS3.4 C.6."""

from __future__ import annotations

from pynetdicom.sop_class import (
    PatientRootQueryRetrieveInformationModelFind,
    PatientRootQueryRetrieveInformationModelGet,
    PatientRootQueryRetrieveInformationModelMove,
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
)

from prefect_dicom.core.model import InformationModel

QUERY_RETRIEVE_CLASSES: dict[str, dict[InformationModel, str]] = {
    "C-FIND": {
        InformationModel.STUDY_ROOT: StudyRootQueryRetrieveInformationModelFind,
        InformationModel.PATIENT_ROOT: PatientRootQueryRetrieveInformationModelFind,
    },
    "C-MOVE": {
        InformationModel.STUDY_ROOT: StudyRootQueryRetrieveInformationModelMove,
        InformationModel.PATIENT_ROOT: PatientRootQueryRetrieveInformationModelMove,
    },
    "C-GET": {
        InformationModel.STUDY_ROOT: StudyRootQueryRetrieveInformationModelGet,
        InformationModel.PATIENT_ROOT: PatientRootQueryRetrieveInformationModelGet,
    },
}
"""SOP class UID by service and information model."""
