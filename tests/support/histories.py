"""A ledger with a cohort that was pulled over days, written in seconds: for what reads it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timedelta
from itertools import accumulate
from typing import Any, TypeVar

from sqlalchemy import insert, update

from prefect_dicom.config.access_schedule import AccessSchedule, schedule_state
from prefect_dicom.core.model import Evidence, StudyState
from prefect_dicom.ledger import Cohort, Ledger, schema

T = TypeVar("T")

FAILURES = {
    "instances-missing": 0.03,
    "nothing-arrived": 0.02,
    "study-offline": 0.012,
    "wrong-patient": 0.004,
}
"""Of studies, each with its share of them."""
ROWS_WITHOUT_STUDY = {"no-match": 0.02, "several-patients": 0.01, "pacs-failure": 0.005}
MODALITIES = {("CT",): 0.4, ("MR",): 0.2, ("CR",): 0.2, ("US",): 0.12, ("CT", "PT"): 0.08}
_SIZES = {"CT": (420, 530_000), "MR": (640, 260_000), "CR": (2, 9_000_000), "US": (30, 2_000_000)}
"""Instances of a study, bytes of one."""
_STEP = timedelta(minutes=5)


def written(
    ledger: Ledger,
    rows: int,
    *,
    begin: datetime,
    work: timedelta,
    done: float = 1.0,
    schedule: AccessSchedule | None = None,
    description: str = "",
    seed: int = 1,
) -> Cohort:
    """A cohort of so many rows, of which a part is done by now.

    That took so much work, of runs that were there whenever the windows of ``access_schedule`` were
    open. Nothing is in the archive.
    """
    lot = random.Random(seed)
    cohort = ledger.cohorts.add(f"{seed:064x}", "main", [], f"chest-{seed}")
    its_rows: list[dict[str, Any]] = []
    studies: list[dict[str, Any]] = []
    for line in range(2, 2 + rows):
        reason = _drawn(lot, ROWS_WITHOUT_STUDY)
        its_rows.append(
            {
                "cohort": cohort.number,
                "line": line,
                "accession_number": f"A{line:07d}",
                "discovered": True,
                "reason": reason,
            }
        )
        if reason is None:
            modalities = _drawn(lot, MODALITIES) or ("CT",)
            studies.append(_study(line, modalities, description))
    samples, runs = _pull(lot, studies, round(len(studies) * done), begin, work, schedule)
    links = [{"line": study["reference"], "study": study["reference"]} for study in studies]
    with ledger._database.write() as connection:
        for table, entries in {
            schema.runs: runs,
            schema.cohort_rows: its_rows,
            schema.studies: studies,
            schema.row_studies: links,
            schema.samples: samples,
        }.items():
            if "cohort" in table.c:
                entries = [entry | {"cohort": cohort.number} for entry in entries]
            connection.execute(insert(table), entries)
        its = schema.cohorts.c.number == cohort.number
        connection.execute(update(schema.cohorts).where(its).values(rows=rows))
    return ledger.cohorts.get(str(cohort.number))


def _study(line: int, modalities: tuple[str, ...], description: str) -> dict[str, Any]:
    nothing = ("reason", "evidence", "listed_at", "claimed_at", "failed_at", "archived_at")
    nothing += ("archived_instances", "withheld_instances", "missing_instances")
    nothing += ("archived_bytes", "selection")
    return {name: None for name in nothing} | {
        "reference": line,
        "study_instance_uid": f"1.2.826.0.1.{line}",
        "node": "main",
        "patient_id": f"P{line:07d}",
        "accession_number": f"A{line:07d}",
        "study_date": "20250301",
        "modalities": list(modalities),
        "study_description": description,
        "state": StudyState.PENDING,
        "attempt": 0,
    }


def _pull(
    lot: random.Random,
    studies: list[dict[str, Any]],
    to_do: int,
    begin: datetime,
    work: timedelta,
    schedule: AccessSchedule | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Let so many of the studies end, step by step; samples and runs of that."""
    samples: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    states = Counter({StudyState.PENDING: len(studies)})
    stored = size = ended = 0
    at, worked = begin, timedelta()
    paces = list(accumulate(lot.uniform(0.5, 1.5) for _ in range(work // _STEP)))
    while ended < to_do:
        at += _STEP
        if schedule is not None and schedule_state(schedule, at).closed:
            if runs and runs[-1]["ended_at"] is None:
                runs[-1]["ended_at"] = at
            continue
        if not runs or runs[-1]["ended_at"] is not None:
            number = len(runs) + 1
            lock = lot.getrandbits(60)
            runs.append(
                {"number": number, "lock": lock, "kind": "pull", "started_at": at, "ended_at": None}
            )
        worked += _STEP
        goal = to_do if worked >= work else round(to_do * paces[worked // _STEP - 1] / paces[-1])
        for study in studies[ended:goal]:
            _end(lot, study, at)
            states[StudyState.PENDING] -= 1
            states[study["state"]] += 1
            stored += study["archived_instances"] or 0
            size += study["archived_bytes"] or 0
        ended = max(ended, goal)
        samples.append(
            {
                "at": at,
                "run": runs[-1]["number"],
                "unasked": 0,
                **{str(state): states[state] for state in StudyState},
                "expected": stored,
                "received": 0,
                "stored": stored,
                "size_bytes": size,
                "schedule_open": None if schedule is None else True,
            }
        )
    if runs:
        runs[-1]["ended_at"] = at
    return samples, runs


def _end(lot: random.Random, study: dict[str, Any], at: datetime) -> None:
    reason = _drawn(lot, FAILURES)
    study["attempt"] = 1
    study["claimed_at"] = at - timedelta(seconds=lot.lognormvariate(3.5, 1))
    if reason is not None:
        study |= {"state": StudyState.FAILED, "reason": reason, "failed_at": at}
        return
    instances, each = _SIZES[study["modalities"][0]]
    instances = max(1, round(instances * lot.uniform(0.3, 2)))
    study |= {
        "state": StudyState.ARCHIVED,
        "evidence": Evidence.INSTANCE_LIST,
        "listed_at": study["claimed_at"],
        "archived_at": at,
        "archived_instances": instances,
        "withheld_instances": 0,
        "missing_instances": 0,
        "archived_bytes": instances * each,
        "selection": "",
    }


def _drawn(lot: random.Random, shares: Mapping[T, float]) -> T | None:
    """One of them, by its share; None for what is left of the whole."""
    drawn = lot.random()
    for what, share in shares.items():
        drawn -= share
        if drawn < 0:
            return what
    return None
