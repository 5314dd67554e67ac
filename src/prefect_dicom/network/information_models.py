"""SOP classes of the Query/Retrieve information models, PS3.4 C.6."""

from __future__ import annotations

from prefect_dicom.core.model import InformationModel

VERIFICATION = "1.2.840.10008.1.1"
"""SOP class UID of C-ECHO, PS3.4 A.4."""

QUERY_RETRIEVE_CLASSES: dict[str, dict[InformationModel, str]] = {
    "C-FIND": {
        InformationModel.STUDY_ROOT: "1.2.840.10008.5.1.4.1.2.2.1",
        InformationModel.PATIENT_ROOT: "1.2.840.10008.5.1.4.1.2.1.1",
    },
    "C-MOVE": {
        InformationModel.STUDY_ROOT: "1.2.840.10008.5.1.4.1.2.2.2",
        InformationModel.PATIENT_ROOT: "1.2.840.10008.5.1.4.1.2.1.2",
    },
    "C-GET": {
        InformationModel.STUDY_ROOT: "1.2.840.10008.5.1.4.1.2.2.3",
        InformationModel.PATIENT_ROOT: "1.2.840.10008.5.1.4.1.2.1.3",
    },
}
"""SOP class UID by service and information model, PS3.4 C.6.1.3 and C.6.2.3."""
