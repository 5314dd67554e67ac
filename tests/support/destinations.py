"""A site that pulls from one scripted PACS and delivers to another peer."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prefect_dicom.delivery.run import deliver_all, open_delivery
from prefect_dicom.ledger import DeliveryRecord, DeliveryTotals
from prefect_dicom.testing import Behaviour, ScriptedPacs, StoredInstance
from tests.support.sites import LOOPBACK, Place, site_around

TARGET = "research"
COHORT = "1"


@dataclass
class Delivering:
    """A site whose archived studies go to the node ``research``."""

    place: Place

    def deliver(self, *reasons: str) -> DeliveryTotals:
        """Deliver as far as it goes, in this process."""
        with open_delivery(self.place.site, COHORT, TARGET, reasons=reasons) as run:
            deliver_all(run)
            return run.totals()

    def records(self) -> list[DeliveryRecord]:
        with self.place.ledger() as ledger:
            return list(ledger.deliveries.of_cohort(1, TARGET))

    def manifest(self, reference: int = 1) -> dict[str, Any]:
        with self.place.ledger() as ledger:
            body = ledger.deliveries.manifest(reference, TARGET)
        assert body is not None, "the delivery is not verified"
        return json.loads(body)

    def outcome(self) -> list[tuple[str, str | None]]:
        """State and reason of each delivery."""
        return [(str(r.state), r.reason) for r in self.records()]


def add_target(place: Place, port: int, ae_title: str, node: Mapping[str, Any]) -> None:
    document = yaml.safe_load(place.file.read_text())
    destination = {"attempts": 2, **node.get("destination", {})}
    document["nodes"][TARGET] = {
        "host": LOOPBACK,
        "port": port,
        "called_ae_title": ae_title,
        "retrieve": "c-get",
        "timeouts": {"settle_seconds": 0.1, "stall_seconds": 10},
        **node,
        "destination": destination,
    }
    place.file.write_text(yaml.safe_dump(document))


class Archived:
    """Sites that have pulled studies, by which: a pull for all tests that use the same ones."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sites: dict[tuple[str, ...], Path] = {}

    def copy(self, folder: Path, studies: Sequence[Sequence[StoredInstance]]) -> Path:
        """Copy the site that has these studies into a new folder; its site file."""
        instances = [one for study in studies for one in study]
        name = tuple(one.sop_instance_uid for one in instances)
        if name not in self._sites:
            made = self._folder / str(len(self._sites))
            made.mkdir()
            with site_around(made, instances, retrieve="c-get") as place:
                place.pull()
            document = yaml.safe_load(place.file.read_text())
            document["spool"]["path"] = "spool"
            place.file.write_text(yaml.safe_dump(document))
            self._sites[name] = made
        shutil.copytree(self._sites[name], folder)
        return folder / "site.yaml"


@contextlib.contextmanager
def scripted_target(
    folder: Path,
    archived: Archived,
    *studies: Sequence[StoredInstance],
    script: Sequence[Behaviour] = (),
    **node: Any,
) -> Iterator[tuple[Delivering, ScriptedPacs]]:
    """A site that has archived these studies, and a scripted PACS as the target."""
    folder = folder / f"site-{len(list(folder.iterdir()))}"
    file = archived.copy(folder, studies)
    with ScriptedPacs(ae_title="RESEARCH", script=script) as target:
        place = Place(folder, file, target)
        add_target(place, target.port, target.ae_title, node)
        yield Delivering(place), target
