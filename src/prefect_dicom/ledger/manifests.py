"""Manifests of archived studies."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from sqlalchemy import select

from prefect_dicom.core.model import StudyReference
from prefect_dicom.ledger.database import Database
from prefect_dicom.ledger.errors import translate_database_errors
from prefect_dicom.ledger.queries import listable_with, selection_of
from prefect_dicom.ledger.schema import manifests, row_studies, studies

# Manifests read at a time: one can have megabytes.
_PAGE_SIZE = 8


class Manifests:
    """Manifests of archived studies, as they are in the archive."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @translate_database_errors
    def get(self, reference: StudyReference) -> bytes | None:
        """Return the manifest of an archived study, or None."""
        with self._database.read() as connection:
            body = connection.execute(
                select(manifests.c.body).where(manifests.c.study == reference)
            ).scalar()
        return None if body is None else zlib.decompress(body)

    def of_cohort(self, cohort: int | None) -> Iterator[tuple[StudyReference, bytes]]:
        """Yield the manifests of a cohort's archived studies (None: of all), by reference."""
        reference = 0
        while page := self._page(cohort, reference):
            yield from page
            reference = page[-1][0]

    @translate_database_errors
    def _page(
        self, cohort: int | None, after: StudyReference
    ) -> list[tuple[StudyReference, bytes]]:
        query = select(manifests.c.study, manifests.c.body).where(manifests.c.study > after)
        if cohort is not None:
            query = query.where(
                select(row_studies.c.study)
                .join(studies, studies.c.reference == row_studies.c.study)
                .where(
                    row_studies.c.cohort == cohort,
                    row_studies.c.study == manifests.c.study,
                    row_studies.c.reason.is_(None),
                    listable_with(selection_of(cohort)),
                )
                .exists()
            )
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(manifests.c.study).limit(_PAGE_SIZE)).all()
        return [(row.study, zlib.decompress(row.body)) for row in rows]
