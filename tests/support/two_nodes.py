"""A site with two nodes around two scripted PACS: an archive and the VNA behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from prefect_dicom.core.model import RowVerdict
from prefect_dicom.run.loop import work_through
from prefect_dicom.run.registration import register_cohort
from prefect_dicom.run.run import open_run
from prefect_dicom.testing import Behaviour, ScriptedPacs, StoredInstance
from prefect_dicom.testing.audit import Auditor
from tests.support.sites import LOOPBACK, Place, site_around


@dataclass
class Two:
    """A site with the nodes ``main`` and ``vna``, of which C-GET or C-MOVE is asked."""

    place: Place
    main: ScriptedPacs
    vna: ScriptedPacs
    auditor: Auditor
    number: int = 1
    nodes: Sequence[str] = ("main", "vna")

    def cohort(self, *rows: Mapping[str, str]) -> Path:
        """A list of these rows."""
        return self.place.cohort(rows)

    def pull(self, *rows: Mapping[str, str], every_node: bool = False) -> list[RowVerdict]:
        site = self.place.site
        path = self.cohort(*rows)
        known = register_cohort(site, path, list(self.nodes), every_node=every_node)
        self.number = known.number
        with open_run(site, known.number) as pull:
            work_through(pull)
        return self.verdicts()

    def rerun(self) -> list[RowVerdict]:
        with open_run(self.place.site, self.number, "rerun") as pull:
            pull.ledger.cohorts.reopen(self.number)
            work_through(pull)
        return self.verdicts()

    def verdicts(self) -> list[RowVerdict]:
        with self.place.ledger() as ledger:
            found = list(ledger.rows.verdicts(self.number))
            assert sum(ledger.progress.totals(self.number).rows.values()) == len(found)
        assert self.auditor.audit() == []
        return found

    def words(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [(str(v.verdict), v.reason, v.nodes) for v in self.verdicts()]

    def sent(self, pacs: ScriptedPacs, of: Sequence[StoredInstance]) -> int:
        uids = {stored.sop_instance_uid for stored in of}
        return sum(each in uids for each in pacs.sent_instances())


@contextlib.contextmanager
def two_nodes(
    folder: Path,
    main: Sequence[StoredInstance],
    vna: Sequence[StoredInstance],
    *,
    faulty_main: Sequence[Behaviour] = (),
    faulty_vna: Sequence[Behaviour] = (),
    retrieve: str = "c-get",
    **parts: Mapping,
) -> Iterator[Two]:
    folder.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(
            site_around(folder, main, script=faulty_main, retrieve=retrieve, **parts)
        )
        receiver = place.site.receiver
        second = stack.enter_context(
            ScriptedPacs(
                instances=vna,
                script=faulty_vna,
                destinations={receiver.ae_title: (LOOPBACK, receiver.port)},
            )
        )
        document = yaml.safe_load(place.file.read_text())
        first = document["nodes"].pop("pacs")
        document["nodes"] = {"main": first, "vna": {**first, "port": second.port}}
        document["retry_after_seconds"] = []
        place.file.write_text(yaml.safe_dump(document))
        auditor = Auditor(place.site, {"main": place.pacs, "vna": second})
        yield Two(place, place.pacs, second, auditor)
