"""The flow ``verify-archive``: check the archive against the manifests, without the PACS."""

from __future__ import annotations

from prefect import flow, get_run_logger, runtime
from prefect.artifacts import create_table_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from prefect_dicom.archive.verification import verify_cohort
from prefect_dicom.blocks import resolve_site
from prefect_dicom.core.model import Level
from prefect_dicom.run.artifacts import artifact_key
from prefect_dicom.run.error_translation import without_phi


def _flow_run_name() -> str:
    return f"verify-{runtime.flow_run.parameters['cohort'] or 'all'}"


@flow(name="verify-archive", flow_run_name=_flow_run_name, persist_result=False)
def verify_archive(
    cohort: str | None = None, site: str = "site.yaml", level: Level = Level.CHECKSUM
) -> State:
    """Check every archived study of a cohort against its manifest.

    Parameters
    ----------
    cohort : str, optional
        Name or number of the cohort in the ledger; without one, all that is archived.
    site : str
        Path of the site's YAML file, or ``block:NAME`` of a DicomSite block.
    level : Level
        How thorough the check is: ``exists``, ``size``, ``checksum`` or ``read``.
    """
    with without_phi():
        results = list(verify_cohort(resolve_site(site), cohort, level))
    faulty = [r for r in results if r.faults]
    create_table_artifact(
        [
            {"study": r.reference, "instances": r.instances, "fault": code, "count": count}
            for r in faulty
            for code, count in sorted(r.faults.items())
        ]
        or [{"study": "all", "instances": sum(r.instances for r in results), "fault": "none"}],
        key=artifact_key("verification", cohort or "all"),
        description=f"{len(results)} studies checked, {len(faulty)} with faults",
    )
    words = f"{len(results)} studies checked at level {level}, {len(faulty)} with faults"
    get_run_logger().info(words)
    return Failed(message=words) if faulty else Completed(message=words)
