"""Acceptance of studies by a person: recorded in the ledger, carried out by the next run.

A study is accepted for what it failed for: its instances name another PatientID, or some never
came. The instances that were received lie in quarantine; they are given back to the study, so that
no PACS is asked for them again. Nothing here writes to the archive.
"""

from __future__ import annotations

import contextlib
import getpass
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial

from prefect_dicom.archive.spool import Spool
from prefect_dicom.config.site import Site
from prefect_dicom.core.errors import ClaimLost, ConfigurationError
from prefect_dicom.core.model import StudyReference, StudyState
from prefect_dicom.ledger import Acceptance, Cohort, Ledger
from prefect_dicom.operations.quarantine import in_quarantine
from prefect_dicom.report.acceptances import (
    OTHER_PATIENT_ID,
    Question,
    open_questions,
    write_acceptances,
)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person wants to accept.

    Parameters
    ----------
    studies : collection of StudyReference
        Single studies of the cohort.
    reasons : collection of str
        All studies that wait for one of these reasons. ``patient-id-differs`` is accepted of
        later studies of the cohort too.
    by : str
        Who decides; the account of the system by default.
    note : str
        What for.
    """

    studies: Collection[StudyReference] = ()
    reasons: Collection[str] = ()
    by: str = ""
    note: str = ""


def accept(site: Site, ledger: Ledger, cohort: Cohort, decision: Decision) -> list[Acceptance]:
    """Record what a person accepts, give back what lies in quarantine, and reopen the studies.

    Returns
    -------
    list of Acceptance
        As recorded. A study on which a run works at the moment is left out.

    Raises
    ------
    ConfigurationError
        A study is named that does not wait for a decision; nothing is accepted then.
    """
    chosen = _chosen(open_questions(ledger, cohort), decision)
    _give_back(site, ledger, [each for each in chosen if each.reason == OTHER_PATIENT_ID])
    by = decision.by.strip() or getpass.getuser()
    accepted = [_acceptance(question, by, decision.note) for question in chosen]
    if OTHER_PATIENT_ID in decision.reasons:
        of_all = Acceptance(None, OTHER_PATIENT_ID, accepted_by=by, note=decision.note)
        accepted.append(of_all)
    recorded = ledger.acceptances.add(cohort.number, accepted)
    write_acceptances(ledger, cohort, site.reports / cohort.name)
    return recorded


def withdraw(site: Site, ledger: Ledger, cohort: Cohort, decision: Decision) -> list[Acceptance]:
    """Take back what was accepted, as far as nothing is archived by it.

    Returns
    -------
    list of Acceptance
        The decisions that do not hold any more.

    Raises
    ------
    ConfigurationError
        A study is named of which nothing was accepted, or which is archived as it was accepted;
        nothing is withdrawn then.
    """
    holding = [a for a in ledger.acceptances.of_cohort(cohort.number) if a.withdrawn_at is None]
    archived = {
        record.reference
        for record in ledger.studies.of_cohort(cohort.number)
        if record.state is StudyState.ARCHIVED
    }
    open_ = [each for each in holding if each.study not in archived]
    faults = [
        f"--study {reference}: "
        + ("it is archived as it was accepted" if reference in archived else "nothing was accepted")
        for reference in sorted(set(decision.studies) - {each.study for each in open_})
    ]
    if faults:
        raise ConfigurationError("command line", faults)
    chosen = [e for e in open_ if e.study in decision.studies or e.reason in decision.reasons]
    by = decision.by.strip() or getpass.getuser()
    numbers = {each.number for each in chosen}
    ledger.acceptances.withdraw(numbers, by)
    write_acceptances(ledger, cohort, site.reports / cohort.name)
    return [a for a in ledger.acceptances.of_cohort(cohort.number) if a.number in numbers]


def _chosen(questions: list[Question], decision: Decision) -> list[Question]:
    waiting = {question.record.reference for question in questions}
    if unknown := sorted(set(decision.studies) - waiting):
        raise ConfigurationError(
            "command line",
            [
                f"--study {reference}: does not wait for a decision; `prefect-dicom accept COHORT` "
                "lists those that do"
                for reference in unknown
            ],
        )
    return [
        question
        for question in questions
        if question.record.reference in decision.studies or question.reason in decision.reasons
    ]


def _acceptance(question: Question, by: str, note: str) -> Acceptance:
    named = question.record.patient_id_of_instances
    return Acceptance(
        question.record.reference,
        question.reason,
        patient_id=named if question.reason == OTHER_PATIENT_ID else None,
        missing=question.missing,
        accepted_by=by,
        note=note,
    )


def _give_back(site: Site, ledger: Ledger, questions: Iterable[Question]) -> None:
    """Give the quarantined instances of studies back to them, for the next run to validate."""
    references = {question.record.reference for question in questions}
    if not references:
        return
    spool = Spool(site.spool.path, site.spool.reserve_bytes)
    for entry in in_quarantine(site, [OTHER_PATIENT_ID]):
        if entry.study not in references:
            continue
        # Where a run has it, that asks for what is missing.
        with contextlib.suppress(ClaimLost):
            give_back = partial(spool.give_back, entry.sha256, entry.study)
            ledger.claims.while_unclaimed(entry.study, give_back)
