"""Scripted PACS and generated studies, for the tests of your own set-up too.

:class:`ScriptedPacs` is a small DICOM peer on loopback that misbehaves on request
(:class:`Behaviour`); :func:`generate_cohort` writes valid files of invented patients, and
:func:`write_cohort_file` the cohort file that names their studies.
:class:`prefect_dicom.testing.audit.Auditor` audits the state after a run, or after a killed one.
"""

from prefect_dicom.testing.generate import generate_cohort, write_cohort_file
from prefect_dicom.testing.instances import StoredInstance
from prefect_dicom.testing.pacs import PacsPolicy, ScriptedPacs
from prefect_dicom.testing.peculiar import peculiar_instances
from prefect_dicom.testing.request_log import AssociationChange, Request, Sent
from prefect_dicom.testing.script import KNOBS, Behaviour
from prefect_dicom.testing.tiny import tiny_instances
from prefect_dicom.testing.web_server import ScriptedWeb, WebRequest

__all__ = [
    "KNOBS",
    "AssociationChange",
    "Behaviour",
    "PacsPolicy",
    "Request",
    "ScriptedPacs",
    "ScriptedWeb",
    "Sent",
    "StoredInstance",
    "WebRequest",
    "generate_cohort",
    "peculiar_instances",
    "tiny_instances",
    "write_cohort_file",
]
