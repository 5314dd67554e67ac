"""The commands that read the archive: ``verify`` and ``rebuild-ledger``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

from cyclopts import Parameter

from prefect_dicom.cli.app import (
    DEFAULT_SITE,
    Exit,
    JsonOption,
    SiteOption,
    app,
    console,
    counted,
    output,
)
from prefect_dicom.cli.flow_runner import site_of
from prefect_dicom.core.model import Level
from prefect_dicom.core.reasons import REASONS


@app.command(sort_key=6)
def verify(
    cohort: Annotated[
        str | None, Parameter(help="Name or number of a cohort; without one, all studies.")
    ] = None,
    /,
    *,
    site: SiteOption = DEFAULT_SITE,
    level: Annotated[Level, Parameter(help="How thorough the check is.")] = Level.CHECKSUM,
    json_: JsonOption = False,
) -> int:
    """Check every archived study against its manifest.

    `exists` and `size` list the archive, `checksum` compares the SHA-256 that the store keeps,
    `read` downloads and hashes every object. No request is sent to the PACS.
    """
    from prefect_dicom.archive.verification import verify_cohort
    from prefect_dicom.run.progress import counting_shown

    faults = _Faults(json_)
    studies = instances = 0
    incomplete = _Incomplete()
    with counting_shown(console) as say:
        for study in verify_cohort(site_of(site), cohort, level):
            studies, instances = studies + 1, instances + study.instances
            faults.note(study.reference, study.faults)
            incomplete.note(study.missing)
            say(f"{counted(studies, 'study', 'studies')}, {counted(instances, 'instance')}")
    if json_:
        figures = {"level": level, "studies": studies, "instances": instances}
        print(json.dumps(figures | incomplete.result | {"faulty": faults.studies}, indent=1))
        return faults.exit
    faults.explain()
    incomplete.explain()
    output.print(
        f"{counted(studies, 'study', 'studies')} with {counted(instances, 'instance')} checked "
        f"at level {level}: {faults.text}"
    )
    return faults.exit


@app.command(sort_key=7)
def rebuild_ledger(
    *,
    site: SiteOption = DEFAULT_SITE,
    level: Annotated[
        Level,
        Parameter(
            help="How thorough the check of the objects is, as in `verify`; `size` at least."
        ),
    ] = Level.SIZE,
    json_: JsonOption = False,
) -> int:
    """Restore a lost ledger from the manifests in the archive.

    Every manifest is checked, and the objects it names. Entries of the ledger are kept: an empty
    one is filled, an older one completed. A study with faults is added as failed, not as archived.
    No request is sent to the PACS. A later `pull` of the same cohort file transfers only what is
    missing.
    """
    from prefect_dicom.operations import rebuild
    from prefect_dicom.run.progress import counting_shown

    faults = _Faults(json_)
    outcomes: Counter[str] = Counter()
    instances = 0
    incomplete = _Incomplete()
    with counting_shown(console) as say:
        for study in rebuild.rebuild_ledger(site_of(site), level):
            faults.note(study.reference, study.faults)
            instances += study.instances
            incomplete.note(study.missing)
            if not study.faults:
                outcomes[study.outcome or "without-manifest"] += 1
            say(f"{counted(outcomes.total() + len(faults.studies), 'study', 'studies')}")
    if json_:
        figures = {"level": level, "instances": instances, "studies": dict(outcomes)}
        print(json.dumps(figures | incomplete.result | {"faulty": faults.studies}, indent=1))
        return faults.exit
    faults.explain()
    incomplete.explain()
    for outcome, meaning in _ADOPTIONS.items():
        if outcomes[outcome]:
            output.print(f"{outcomes[outcome]:>8} {meaning}", markup=False, soft_wrap=True)
    output.print(f"Manifests naming {counted(instances, 'instance')} checked: {faults.text}")
    return faults.exit


_ADOPTIONS = {
    "added": "added to the ledger as archived",
    "completed": "marked as archived, unfinished in the ledger before",
    "known": "archived in the ledger already",
    "claimed": "not changed: claimed by a run",
    "listed-otherwise": "not changed: the PACS has listed other instances since",
    "without-manifest": "without a manifest: not archived yet, pulled like any other",
}


class _Incomplete:
    """Studies whose manifest names instances that are missing, as a person has accepted."""

    def __init__(self) -> None:
        self._studies = self._instances = 0

    def note(self, missing: int) -> None:
        self._studies += missing > 0
        self._instances += missing

    @property
    def result(self) -> dict[str, Any]:
        if not self._studies:
            return {}
        return {"incomplete_studies": self._studies, "missing_instances": self._instances}

    def explain(self) -> None:
        if self._studies:
            output.print(
                f"{counted(self._studies, 'study', 'studies')} not whole: their manifests name "
                f"{counted(self._instances, 'instance')} as missing, which a person has accepted."
            )


class _Faults:
    """Studies with faults: each printed when found, the meaning of the codes at the end."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self.studies: list[dict[str, Any]] = []

    def note(self, reference: int | None, faults: Mapping[str, int]) -> None:
        if not faults:
            return
        counts = dict(sorted(faults.items()))
        self.studies.append({"study": reference, "faults": counts})
        if not self._as_json:
            name = "a study without a number" if reference is None else f"study {reference}"
            words = ", ".join(f"{count} {code}" for code, count in counts.items())
            output.print(f"[red]{name}[/]: {words}")

    def explain(self) -> None:
        for code in sorted({code for study in self.studies for code in study["faults"]}):
            output.print(
                f"{code}: {REASONS[code].meaning} {REASONS[code].what_to_do}", markup=False
            )

    @property
    def text(self) -> str:
        return f"[red]{len(self.studies)} with faults[/]" if self.studies else "[green]no faults[/]"

    @property
    def exit(self) -> Exit:
        return Exit.NOT_ALL if self.studies else Exit.ALL_WELL
