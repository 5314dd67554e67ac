"""One study on its way to a target: what it consists of, and what became of each instance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prefect_dicom.core.deliveries import (
    DeliveredInstance,
    DeliveredState,
    DeliveryClaim,
    DeliveryEvidence,
)
from prefect_dicom.core.model import InstanceKey, ManifestInstance, Study, StudyReference


@dataclass(slots=True, eq=False)
class StudyDelivery:
    """A claimed delivery in a run.

    Parameters
    ----------
    claim : DeliveryClaim
        The right to work on it.
    study : Study
        As the ledger has it.
    instances : dict of InstanceKey to ManifestInstance
        What is to be at the target.
    outcomes : dict of InstanceKey to DeliveredInstance
        What became of those that were sent, in this run and before.
    evidence : dict of InstanceKey to DeliveryEvidence
        The strongest so far, where it is stronger than acceptance.
    """

    claim: DeliveryClaim
    study: Study = field(repr=False)
    instances: dict[InstanceKey, ManifestInstance] = field(repr=False)
    outcomes: dict[InstanceKey, DeliveredInstance] = field(default_factory=dict, repr=False)
    evidence: dict[InstanceKey, DeliveryEvidence] = field(default_factory=dict, repr=False)

    @property
    def reference(self) -> StudyReference:
        """The study's number in the ledger."""
        return self.claim.study

    @property
    def is_whole(self) -> bool:
        """Whether the target has accepted every instance."""
        return not any(self.due()) and not self.refused

    @property
    def refused(self) -> list[DeliveredInstance]:
        """Instances that the target has refused."""
        return [one for one in self.outcomes.values() if one.state is DeliveredState.FAILED]

    def due(self) -> Iterator[tuple[InstanceKey, ManifestInstance]]:
        """Instances without an outcome, in the order of their series."""
        for key, instance in sorted(self.instances.items()):
            if key not in self.outcomes:
                yield key, instance

    def note(self, outcomes: Iterable[DeliveredInstance]) -> None:
        """Take in outcomes that are recorded."""
        self.outcomes.update((one.key, one) for one in outcomes)

    def why_refused(self) -> tuple[str, str]:
        """The most frequent reason of refused instances, and how many there are of each status."""
        codes = Counter(one.reason or "" for one in self.refused)
        statuses = Counter(
            "no status" if one.status is None else f"{one.status:04X}" for one in self.refused
        )
        words = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
        text = f"{len(self.refused)} of {len(self.instances)} instances: {words}"
        return max(sorted(codes), key=codes.__getitem__), text
