"""Probe of matching keys: which the node matches, ignores or chokes on, in which characters."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from prefect_dicom.config.capabilities import KeyCapability, Match
from prefect_dicom.core.uids import is_safe_key
from prefect_dicom.network.probe import text
from prefect_dicom.operations.probe_session import ProbeSession, ascii_value, raw_value

OTHER_VALUES = {
    "PatientID": "NO-SUCH-VALUE-Z0",
    "AccessionNumber": "NO-SUCH-VALUE-Z0",
    "StudyDate": "18010101",
    "PatientName": "Nosuchvalue^Zz",
    "PatientBirthDate": "18010101",
    "PatientSex": "M",
    "ModalitiesInStudy": "ZZ",
    "StudyDescription": "NO-SUCH-VALUE-Z0",
}
"""Probed matching keys, each with a value that no study has (but for the sex)."""
_WITH_WILDCARDS = ("PatientID", "AccessionNumber")
_WITH_CASE = ("PatientID", "AccessionNumber", "PatientName", "StudyDescription")
_EVERYBODYS_CHARACTER_SETS = ("ISO_IR 192", "ISO_IR 100")


class KeyProbe:
    """Probe of the matching keys of C-FIND and of its character sets.

    Parameters
    ----------
    session : ProbeSession
        Session whose facts are filled in.
    """

    def __init__(self, session: ProbeSession) -> None:
        self._facts = session.facts
        self._ask = session.ask
        self._unique_keys = session.unique_keys
        self._can_be_named = session.can_be_named

    def probe_keys(self, study: dict[str, bytes]) -> None:
        """Find for each matching key whether the node matches, ignores or chokes on it."""
        capabilities = {}
        rows = self._ask("STUDY", self._unique_keys(study), OTHER_VALUES).rows
        spoil = set() if rows else {k for k in OTHER_VALUES if not self._returns(study, k)}
        study = {**study, **(rows[0] if rows else {})}
        for key in OTHER_VALUES:
            if key in spoil:
                capabilities[key] = KeyCapability(match=Match.EMPTIES)
                continue
            value = ascii_value(study, key).split("\\")[0]
            capability = self._key(study, key, value if is_safe_key(value) else "")
            if capability.match is not None:
                capabilities[key] = capability
        self._facts["keys"] = capabilities

    def _returns(self, study: dict[str, bytes], key: str) -> bool:
        """Whether the study is found when only this key is requested; adds its value."""
        rows = self._ask("STUDY", self._unique_keys(study), [key]).rows
        if rows:
            study.update(rows[0])
        return bool(rows)

    def _key(self, study: dict[str, bytes], key: str, value: str) -> KeyCapability:
        """Probe one key beside the study's unique keys."""

        def found(value: str) -> bool:
            return bool(self._ask("STUDY", {**self._unique_keys(study), key: value}).rows)

        other = OTHER_VALUES[key]
        if found("F" if other == value else other):
            return KeyCapability(match=Match.IGNORED)
        if not value:
            return KeyCapability()
        if not found(value):
            return KeyCapability(match=Match.EMPTIES)
        swapped = value.swapcase()
        return KeyCapability(
            match=Match.MATCHED,
            wildcards=found(f"{value[:1]}*") if key in _WITH_WILDCARDS else None,
            case_sensitive=not found(swapped) if key in _WITH_CASE and swapped != value else None,
        )

    def probe_character_sets(self, studies: Sequence[dict[str, bytes]]) -> None:
        """Find the character sets of answers, and those in which a query matches a name."""
        declared = {raw_value(study, "SpecificCharacterSet") or "ISO_IR 6" for study in studies}
        self._facts["answer_character_sets"] = sorted(declared)
        capability = self._facts["keys"].get("PatientName")
        if capability is None or capability.match is not Match.MATCHED:
            return
        for study in studies:
            name = text(study, "PatientName")
            if name and not name.isascii() and self._can_be_named(study) and is_safe_key(name):
                break
        else:
            return
        own = raw_value(study, "SpecificCharacterSet")
        understood = []
        for one in dict.fromkeys((own, *_EVERYBODYS_CHARACTER_SETS)):
            with contextlib.suppress(ValueError, LookupError):
                match = {**self._unique_keys(study), "PatientName": name}
                if one and self._ask("STUDY", match, character_set=one).rows:
                    understood.append(one)
        self._facts["query_character_sets"] = understood
