"""The command ``accept``: what a person decides about studies that would fail otherwise."""

from __future__ import annotations

import json
from typing import Annotated, Any

from cyclopts import Parameter

from prefect_dicom.cli.app import (
    DEFAULT_SITE,
    CohortName,
    Exit,
    JsonOption,
    SiteOption,
    app,
    check_known,
    counted,
    output,
)
from prefect_dicom.cli.cohort_state import print_next_command
from prefect_dicom.cli.flow_runner import site_of
from prefect_dicom.config.site import ledger_url
from prefect_dicom.core.errors import ConfigurationError
from prefect_dicom.core.reasons import REASONS


@app.command(sort_key=5.5)
def accept(
    cohort: CohortName,
    /,
    *,
    study: Annotated[
        tuple[int, ...], Parameter(help="Number of a study; see the list.", show_default=False)
    ] = (),
    reason: Annotated[
        tuple[str, ...],
        Parameter(help="Every study that waits for this reason.", show_default=False),
    ] = (),
    by: Annotated[
        str, Parameter(help="Who decides; your account by default.", show_default=False)
    ] = "",
    note: Annotated[str, Parameter(help="What for; kept in the ledger.", show_default=False)] = "",
    withdraw: Annotated[
        bool, Parameter(help="Take the decision back, where nothing is archived by it yet.")
    ] = False,
    site: SiteOption = DEFAULT_SITE,
    json_: JsonOption = False,
) -> int:
    """Accept studies as they are; without `--study` or `--reason`, list what there is to decide.

    A study can be accepted though all its objects name another PatientID than the PACS lists
    (`patient-id-differs`; with `--reason`, of later studies of the cohort too), or though the PACS
    never sends some of its instances: its manifest then names what is missing. `--withdraw` takes
    back what no run has carried out. The ledger keeps who has decided and when. `accept.csv` in the
    reports folder has what identifies patients.
    """
    from prefect_dicom.ledger import Ledger
    from prefect_dicom.operations.acceptance import Decision
    from prefect_dicom.operations.acceptance import accept as accept_studies
    from prefect_dicom.operations.acceptance import withdraw as withdraw_decisions

    settings = site_of(site)
    check_known("--reason", reason, [c for c, r in REASONS.items() if r.acceptable])
    if withdraw and not study and not reason:
        raise ConfigurationError(
            "command line", ["--withdraw: say what with --study NUMBER or --reason CODE"]
        )
    with Ledger.open(ledger_url(settings)) as ledger:
        known = ledger.cohorts.get(cohort)
        if not study and not reason:
            return _show(settings, ledger, known, json_)
        decide = withdraw_decisions if withdraw else accept_studies
        accepted = decide(settings, ledger, known, Decision(study, reason, by, note))
    code = Exit.ALL_WELL if accepted else Exit.NOT_ALL
    if json_:
        print(json.dumps([_as_result(each) for each in accepted], indent=1))
        return code
    _print_decisions(accepted)
    if withdraw and not accepted:
        output.print("Nothing of that was accepted and is not archived; nothing was withdrawn.")
    elif not accepted:
        output.print("No study waits for that; nothing was accepted.")
    elif not withdraw:
        print_next_command(known, site)
    return code


def _show(settings: Any, ledger: Any, known: Any, as_json: bool) -> int:
    """List what waits for a decision, and what was decided."""
    from prefect_dicom.report import open_questions
    from prefect_dicom.report.acceptances import write_acceptances

    questions = open_questions(ledger, known)
    accepted = ledger.acceptances.of_cohort(known.number)
    table = write_acceptances(ledger, known, settings.reports / known.name)
    if as_json:
        waiting = [
            {
                "study": question.record.reference,
                "lines": list(question.lines),
                "reason": question.reason,
                "what": question.what,
            }
            for question in questions
        ]
        result = {"waiting": waiting, "accepted": [_as_result(each) for each in accepted]}
        print(json.dumps(result | {"table": str(table or "")}, indent=1))
        return Exit.ALL_WELL
    for question in questions:
        lines = ", ".join(map(str, question.lines))
        output.print(
            f"study {question.record.reference} (line {lines}): {question.what} "
            f"({question.reason})",
            markup=False,
            soft_wrap=True,
        )
    output.print(
        f"{counted(len(questions), 'study waits', 'studies wait')} for a decision. Accept with "
        f"--study NUMBER, or all of a kind with --reason CODE."
        if questions
        else "No study waits for a decision."
    )
    _print_decisions(accepted)
    if table is not None:
        output.print(f"With identifiers: {table}", markup=False, soft_wrap=True)
    return Exit.ALL_WELL


def _print_decisions(accepted: Any) -> None:
    from prefect_dicom.report import format_acceptance

    for each in accepted:
        output.print(f"Accepted: {format_acceptance(each)}", markup=False, soft_wrap=True)


def _as_result(accepted: Any) -> dict[str, Any]:
    return {
        "study": accepted.study,
        "reason": accepted.reason,
        "missing_instances": len(accepted.missing),
        "accepted_by": accepted.accepted_by,
        "accepted_at": accepted.accepted_at.isoformat(timespec="seconds"),
        "withdrawn_by": accepted.withdrawn_by,
    }
