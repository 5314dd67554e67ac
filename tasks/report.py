"""Artifacts of a run in Prefect."""

from __future__ import annotations

import contextlib
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from prefect_dicom.run.engine import Artifact, ArtifactKind


def create_artifact(artifact: Artifact) -> UUID | None:
    """Create an artifact of the flow run. Returns its id, or None where it has none.

    A server that cannot be reached for a link or for progress stops nothing.
    """
    if artifact.kind in (ArtifactKind.TABLE, ArtifactKind.MARKDOWN):
        return _created(artifact)
    with contextlib.suppress(Exception):
        return _created(artifact)
    return None


def _created(artifact: Artifact) -> UUID | None:
    data, key, words = artifact.data, artifact.key, artifact.description
    match artifact.kind:
        case ArtifactKind.TABLE:
            created = create_table_artifact(data, key=key, description=words)
        case ArtifactKind.MARKDOWN:
            created = create_markdown_artifact(data, key=key, description=words)
        case ArtifactKind.LINK:
            created = create_link_artifact(
                data, link_text=artifact.link_text, key=key, description=words
            )
        case ArtifactKind.PROGRESS:
            created = create_progress_artifact(data, key=key, description=words)
    # Prefect returns a coroutine inside an event loop; a run has none.
    return created if isinstance(created, UUID) else None


def update_progress(artifact: UUID, percent: float, description: str) -> None:
    """Update a progress artifact, if the server can be reached."""
    with contextlib.suppress(Exception):
        update_progress_artifact(artifact, percent, description=description)
