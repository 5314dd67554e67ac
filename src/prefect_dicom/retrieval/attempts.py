"""Attempts at the instances of a study: which were in vain, and which are not made again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from prefect_dicom.core.model import InstanceKey
from prefect_dicom.core.uids import normal_uid
from prefect_dicom.network.retrieve_result import RetrieveResult
from prefect_dicom.retrieval.bounds import FAULTY_SAMPLE, UNSENT


class Attempts:
    """What requests for a study's instances have brought, in this run.

    An instance is *settled* when no further request of this run can bring it: the node has said
    more than once that it cannot send it, or everything that it could be asked by was tried.
    """

    def __init__(self) -> None:
        self._unsent: Counter[InstanceKey] = Counter()
        self._settled: set[InstanceKey] = set()
        self._in_vain: Counter[InstanceKey] = Counter()
        self._alone: set[InstanceKey] = set()
        self._suspects: dict[InstanceKey, str] = {}
        self._proven: Counter[str] = Counter()
        self._on_the_way: set[str] = set()
        self._faulty = 0
        self._is_explained = False

    # --- instances that do not come

    def record_unsent(self, keys: Iterable[InstanceKey], *, way_is_open: bool) -> None:
        """The node has said that it could not send these instances.

        Parameters
        ----------
        way_is_open : bool
            Whether it cannot be the way from the node to here that was meant.
        """
        self._unsent.update(keys)
        self._is_explained |= way_is_open

    @property
    def is_explained(self) -> bool:
        """Whether the node has said that it is its own instances that it cannot send."""
        return self._is_explained

    def is_unsent(self, key: InstanceKey) -> bool:
        """Whether the node has said that it cannot send an instance."""
        return self._unsent[key] > 0

    def is_unsent_for_good(self, key: InstanceKey) -> bool:
        """Whether the node has said so as often as it is asked."""
        return self._unsent[key] >= UNSENT.most

    def settle(self, keys: Iterable[InstanceKey]) -> None:
        """Request these instances no more in this run."""
        self._settled.update(keys)

    def is_settled(self, key: InstanceKey) -> bool:
        """Whether an instance is not requested any more in this run."""
        return key in self._settled

    def record_in_vain(self, keys: Collection[InstanceKey]) -> None:
        """A request came to its end, of the PACS's own accord, and did not bring these."""
        self._in_vain.update(keys)
        if len(keys) == 1:
            self._alone.update(keys)

    def are_hopeless(self, keys: Collection[InstanceKey]) -> bool:
        """Whether another pass of the same run would bring none of these instances either.

        They are settled, or were requested among others and alone, to the same end.
        """
        return bool(keys) and all(
            key in self._settled or (key in self._alone and self._in_vain[key] > 1) for key in keys
        )

    # --- faulty instances

    def record_suspect(self, key: InstanceKey, code: str) -> None:
        """A faulty instance was set aside; it may have been damaged on its way."""
        self._faulty += 1
        self._suspects[key] = code

    def record_proven(self, key: InstanceKey, code: str) -> None:
        """An instance has come again with the same bytes: it is faulty at its source."""
        self._suspects.pop(key, None)
        self._proven[code] += 1

    def record_whole(self, key: InstanceKey) -> None:
        """An instance is here; if it had been set aside, it was damaged on its way.

        So may the others have been that were set aside for the same: they are requested again.
        """
        code = self._suspects.pop(key, None)
        if code is not None:
            self._on_the_way.add(code)

    def is_proven(self, code: str) -> bool:
        """Whether this fault is the source's, as those that were requested again have shown."""
        return self._proven[code] >= FAULTY_SAMPLE.most

    @property
    def faulty_count(self) -> int:
        """How many faulty instances were set aside, to be requested again before a verdict."""
        return self._faulty

    @property
    def suspects(self) -> Collection[InstanceKey]:
        """The faulty instances that were set aside."""
        return self._suspects.keys()

    def forget_suspects(self, code: str) -> None:
        """The suspects with this fault are judged like those that were requested again."""
        self._suspects = {key: one for key, one in self._suspects.items() if one != code}

    def held_back(self) -> set[InstanceKey]:
        """The suspects that are not requested again, as others with their fault stand for them."""
        alike: Counter[str] = Counter(self._proven)
        held = set()
        for key, code in self._suspects.items():
            alike[code] += 1
            if alike[code] > FAULTY_SAMPLE.most and code not in self._on_the_way:
                held.add(key)
        return held


def unsent_instances(
    outcome: RetrieveResult, asked: Collection[InstanceKey], missing: set[InstanceKey]
) -> set[InstanceKey]:
    """The instances that a node says it could not send.

    Parameters
    ----------
    outcome : RetrieveResult
        How a request has ended, whose answer accounts for all that it selects.
    asked : collection of InstanceKey
        Those that it was sent for.
    missing : set of InstanceKey
        Those that have not come, faulty ones left aside. What is said to have been completed has
        to be here.
    """
    left = {key for key in asked if key in missing}
    if len(left) != outcome.failed:
        return set()
    named = {normal_uid(uid) for uid in outcome.failed_sop_instance_uids}
    all_named = {normal_uid(key.sop_instance_uid) for key in left} <= named
    return left if all_named or not named else set()
