"""Probe of C-FIND: limits on answers, levels, lists of UIDs, and the studies to probe with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta

from prefect_dicom.cohort.row_matching import identifies, study_query
from prefect_dicom.config.capabilities import QueryLevel
from prefect_dicom.core.model import CohortRow, Study
from prefect_dicom.core.uids import is_safe_key, is_uid, normal_uid
from prefect_dicom.dicom.value_matching import study_day
from prefect_dicom.network.probe import Answers
from prefect_dicom.network.status import SUCCESS
from prefect_dicom.operations.probe_keys import OTHER_VALUES
from prefect_dicom.operations.probe_session import (
    CAPPED,
    FEW,
    LIST_KEYS,
    MOST_ANSWERS,
    MOST_INSTANCES,
    OPTIONAL_KEYS,
    ProbedSeries,
    ProbeSession,
    ascii_value,
    integer_value,
    raw_value,
)

_WINDOWS_DAYS = (7, 90, 365, 3650)
_FIRST_DAY = date(1900, 1, 1)
_CANDIDATES = 5


class QueryProbe:
    """Probe of the node's queries at all levels.

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
        self._session = session

    def list_studies(self) -> list[dict[str, bytes]]:
        """Query longer and longer date ranges, until a list is long, cut or complete."""
        today = datetime.now(UTC).date() + timedelta(days=1)
        whole: tuple[dict[str, bytes], ...] = ()
        for first in [today - timedelta(days=days) for days in _WINDOWS_DAYS] + [_FIRST_DAY]:
            answers = self._between(first, today)
            if answers.status in CAPPED:
                self._facts["answer_cap_status"] = f"{answers.status:04X}"
                if answers.rows:
                    self._facts["answer_cap"] = len(answers.rows)
                if whole:
                    self._facts["longest_list"] = len(whole)
                return list(answers.rows or whole)
            if answers.status is None and answers.rows:
                # Cancelled by us at MOST_ANSWERS.
                self._facts["longest_list"] = len(answers.rows)
                return list(answers.rows)
            if answers.status == SUCCESS:
                whole = answers.rows
        if whole:
            self._halves(whole, today)
        return list(whole)

    def _between(self, first: date, last: date) -> Answers:
        days = f"{first:%Y%m%d}-{last:%Y%m%d}"
        return self._ask("STUDY", {"StudyDate": days}, LIST_KEYS, MOST_ANSWERS)

    def _halves(self, whole: Sequence[Mapping[str, bytes]], today: date) -> None:
        """Detect a silent limit: a half of the range lists studies that the whole lacks."""
        days = sorted(day for row in whole if (day := study_day(raw_value(row, "StudyDate"))))
        if not days or days[0] == days[-1]:
            return
        middle = days[len(days) // 2]
        known = {raw_value(row, "StudyInstanceUID") for row in whole}
        for first, last in ((_FIRST_DAY, middle), (middle, today)):
            half = self._between(first, last)
            if half.status != SUCCESS:
                return
            if not known.issuperset(raw_value(row, "StudyInstanceUID") for row in half.rows):
                self._facts["answer_cap"] = len(whole)
                self._facts["answer_cap_status"] = f"{SUCCESS:04X}"
                return
        self._facts["longest_list"] = len(whole)

    # --- a study to probe with

    def named(self, row: CohortRow) -> list[dict[str, bytes]]:
        """Return the study that a row names, if the node finds it."""
        answers = self._ask("STUDY", study_query(row), (*LIST_KEYS, *OPTIONAL_KEYS))
        rows = answers.rows
        if not rows:
            rows = self._ask("STUDY", study_query(row), LIST_KEYS).rows
        found = [one for one in rows if identifies(row, _study(one)) and self._can_be_named(one)]
        return self._with_details(found[:1])

    def candidates(self, listed: Sequence[dict[str, bytes]]) -> list[dict[str, bytes]]:
        """Return some studies, the best one to probe with first: small, with all identifiers."""
        usable = [one for one in listed if self._can_be_named(one)]
        # Those with most keys filled, spread over the list.
        usable.sort(key=lambda one: -sum(bool(raw_value(one, key)) for key in LIST_KEYS))
        step = max(1, len(usable) // _CANDIDATES)
        return sorted(self._with_details(usable[::step][:_CANDIDATES]), key=_awkwardness)

    def _with_details(self, studies: Iterable[dict[str, bytes]]) -> list[dict[str, bytes]]:
        """Return the studies with their optional keys; find whether the node returns them."""
        detailed = []
        for study in studies:
            answers = self._ask("STUDY", self._unique_keys(study), (*LIST_KEYS, *OPTIONAL_KEYS))
            if not answers.found and "optional_return_keys" not in self._facts:
                # It was found before, with fewer keys.
                self._facts["optional_return_keys"] = False
            elif answers.found:
                self._facts.setdefault("optional_return_keys", True)
                study = {**study, **answers.rows[0]}
                self._facts["study_counts"] = all(
                    integer_value(study, key) is not None for key in OPTIONAL_KEYS[2:]
                )
            detailed.append(study)
        return detailed

    # --- levels

    def probe_levels(self, study: dict[str, bytes]) -> list[ProbedSeries]:
        """Find the levels the node answers, and return the study's series."""
        levels = [QueryLevel.STUDY]
        patient = ascii_value(study, "PatientID")
        if is_safe_key(patient):
            answers = self._ask("PATIENT", {"PatientID": patient}, ["PatientName"])
            if any(ascii_value(row, "PatientID") == patient for row in answers.rows):
                levels.insert(0, QueryLevel.PATIENT)
        series = self._list_series(study)
        if series:
            levels.append(QueryLevel.SERIES)
            self._relational(series[0].uid)
            if self._list_images(study, series):
                levels.append(QueryLevel.IMAGE)
        self._facts["levels"] = levels
        return series

    def _list_series(self, study: Mapping[str, bytes]) -> list[ProbedSeries]:
        wanted = ("SeriesInstanceUID", "Modality", "NumberOfSeriesRelatedInstances")
        answers = self._ask("SERIES", self._unique_keys(study), wanted)
        rows = answers.rows
        if rows:
            counts = [integer_value(row, "NumberOfSeriesRelatedInstances") for row in rows]
            self._facts["series_counts"] = None not in counts
        else:
            rows = self._ask("SERIES", self._unique_keys(study), wanted[:1]).rows
            if rows:
                self._facts["series_counts"] = False
        return [
            ProbedSeries(uid, count=integer_value(row, "NumberOfSeriesRelatedInstances"))
            for row in rows
            if is_safe_key(uid := ascii_value(row, "SeriesInstanceUID"))
        ]

    def _relational(self, series: str) -> None:
        answers = self._ask("SERIES", {"SeriesInstanceUID": series}, ["StudyInstanceUID"])
        self._facts["relational_queries"] = any(
            ascii_value(row, "SeriesInstanceUID") == series for row in answers.rows
        )

    def _list_images(self, study: Mapping[str, bytes], probed: Sequence[ProbedSeries]) -> bool:
        """List the instances of up to three series, until one has enough of them."""
        answered = False
        for series in sorted(probed, key=shortest_first)[:3]:
            match = {**self._unique_keys(study), "SeriesInstanceUID": series.uid}
            answers = self._ask("IMAGE", match, ("SOPInstanceUID", "SOPClassUID"))
            series.images = [
                (sop, ascii_value(row, "SOPClassUID"))
                for row in answers.rows
                if is_safe_key(sop := ascii_value(row, "SOPInstanceUID"))
            ]
            answered = answered or bool(series.images)
            if len(series.images) >= MOST_INSTANCES:
                break
        return answered

    def probe_uid_lists(self, studies: Sequence[Mapping[str, bytes]]) -> None:
        """Find where the node matches a list of UIDs (PS3.4 C.2.2.2.2)."""
        uids = list(
            dict.fromkeys(
                uid for one in studies if is_uid(uid := ascii_value(one, "StudyInstanceUID"))
            )
        )[:3]
        if len(uids) < 2 or self._session.by_patient:
            return
        match = {"StudyInstanceUID": uids}
        for key, level, wanted in (
            ("uid_lists_in_queries", "STUDY", ()),
            ("uid_lists_above", "SERIES", ("SeriesInstanceUID",)),
        ):
            answers = self._ask(level, match, wanted, most=10 * FEW)
            found = {ascii_value(row, "StudyInstanceUID") for row in answers.rows}
            if found.issuperset(uids):
                self._facts[key] = True
            elif not self._session.is_cut(answers):
                self._facts[key] = False


def _study(row: Mapping[str, bytes]) -> Study:
    return Study(
        normal_uid(raw_value(row, "StudyInstanceUID")),
        raw_value(row, "PatientID"),
        raw_value(row, "AccessionNumber"),
    )


def _awkwardness(study: Mapping[str, bytes]) -> tuple[int, int]:
    """Sort key: most keys filled first, then fewest instances."""
    filled = sum(bool(ascii_value(study, key)) for key in OTHER_VALUES)
    letters = ascii_value(study, "PatientID").upper() != ascii_value(study, "PatientID").lower()
    count = integer_value(study, "NumberOfStudyRelatedInstances")
    enough = count is None or count >= MOST_INSTANCES
    return -(filled + letters + 2 * enough), count or 0


def shortest_first(series: ProbedSeries) -> tuple[bool, int]:
    """Sort key: the shortest series with enough instances for a list first."""
    count = len(series.images) or series.count or 0
    return count < MOST_INSTANCES, count
