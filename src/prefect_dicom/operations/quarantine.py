"""Quarantine: list instances, release them to their studies, or delete them.

An instance is named by the beginning of its SHA-256. Releasing moves it to the received instances;
the next run validates it as if it had just arrived, and archives it in the one order of writes
(``docs/promise.md``). Nothing here writes to the archive or the ledger.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from prefect_dicom.archive.manifest import decode_manifest
from prefect_dicom.archive.spool import Quarantined, Spool
from prefect_dicom.config.site import Site, ledger_url
from prefect_dicom.core.errors import ConfigurationError, InstanceRejected, PrefectDicomError
from prefect_dicom.core.model import (
    Disposition,
    Identity,
    InstanceKey,
    InstanceState,
    StudyReference,
    StudyState,
)
from prefect_dicom.core.reasons import Consequence, reason_for
from prefect_dicom.core.uids import normal_uid
from prefect_dicom.dicom.part10 import Scan, survey
from prefect_dicom.ledger import InstanceRecord, Ledger, StudyRecord
from prefect_dicom.retrieval.accepted import AcceptedOfStudy

_NAME_DIGITS = 12
_FEWEST_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Released:
    """Result of the release of one instance.

    Attributes
    ----------
    entry : Quarantined
        The instance.
    study : StudyReference or None
        Study that it was released to.
    trouble : PrefectDicomError or None
        Why it stays in quarantine.
    reopened_by : str or None
        Permanent reason that must be passed to a rerun for the study to be retried.
    """

    entry: Quarantined
    study: StudyReference | None = None
    trouble: PrefectDicomError | None = None
    reopened_by: str | None = None


def name_of(entry: Quarantined) -> str:
    """Return the name of an instance in quarantine, which is stable and free of patient data."""
    return entry.sha256[:_NAME_DIGITS]


def in_quarantine(site: Site, reasons: Collection[str] = ()) -> list[Quarantined]:
    """Return the instances in quarantine for any of the reasons (default: all), oldest first.

    Only the notes are read, so that large instances take no longer.
    """
    found = _spool(site).quarantine_entries()
    chosen = [entry for entry in found if not reasons or entry.reason in reasons]
    return sorted(chosen, key=lambda entry: (entry.since, entry.sha256))


def named(entries: Sequence[Quarantined], names: Collection[str]) -> list[Quarantined]:
    """Return the entries with these names, which are beginnings of their SHA-256.

    Raises
    ------
    ConfigurationError
        Lists every name that fits none or several entries.
    """
    chosen: dict[str, Quarantined] = {}
    faults = []
    for name in names:
        fitting = [entry for entry in entries if entry.sha256.startswith(name.lower())]
        if len(name) < _FEWEST_DIGITS:
            faults.append(f"{ascii(name)}: give at least {_FEWEST_DIGITS} characters of a name")
        elif len(fitting) == 1:
            chosen[fitting[0].sha256] = fitting[0]
        else:
            count = f"{len(fitting)} instances fit" if fitting else "no instance fits"
            faults.append(f"{ascii(name)[:80]}: {count} this name in quarantine")
    if faults:
        raise ConfigurationError("command line", faults)
    return list(chosen.values())


def described(
    site: Site, entry: Quarantined, *, with_identifiers: bool = False
) -> dict[str, str | int | None]:
    """Describe one instance by its headers; nothing is decoded or inflated.

    Parameters
    ----------
    site : Site
        Site with spool and ledger.
    entry : Quarantined
        The instance.
    with_identifiers : bool
        Whether to add what identifies a patient: PatientID and UIDs.
    """
    scan = survey(_spool(site).quarantine_path(entry.sha256))
    identity, structure = scan.identity, scan.structure
    with Ledger.open(ledger_url(site)) as ledger:
        record = _study_of(ledger, identity, entry)
    facts: dict[str, str | int | None] = {
        "name": name_of(entry),
        "sha256": entry.sha256,
        "size_bytes": entry.size_bytes,
        "reason": entry.reason,
        "meaning": reason_for(entry.reason).meaning,
        "what_to_do": reason_for(entry.reason).what_to_do,
        "since": entry.since.isoformat(timespec="seconds"),
        "sender": entry.sender,
        "study": None if record is None else record.reference,
        "study_state": None if record is None else str(record.state),
        "SOPClass": _name_of_uid(identity.sop_class_uid),
        "TransferSyntax": _name_of_uid(identity.transfer_syntax_uid),
        "Modality": identity.modality,
        "Rows": structure.rows,
        "Columns": structure.columns,
        "NumberOfFrames": structure.number_of_frames,
        "fault": None if scan.fault is None else scan.fault.code,
    }
    if with_identifiers:
        patient = identity.patient_id
        facts |= {
            "PatientID": None if patient is None else patient.decode("latin-1"),
            "StudyInstanceUID": identity.study_instance_uid,
            "SeriesInstanceUID": identity.series_instance_uid,
            "SOPInstanceUID": identity.sop_instance_uid,
            "SOPClassUID": identity.sop_class_uid,
            "requested_SOPInstanceUID": identity.requested_sop_instance_uid,
        }
    return facts


def release(site: Site, entries: Sequence[Quarantined]) -> Iterator[Released]:
    """Release instances to their studies, each if its study still lacks it.

    That is: the ledger has the study, the PACS's instance list names the instance, no other is
    received or stored in its place, no run works on the study at this moment, and validation
    finds nothing that would quarantine it again.

    Yields
    ------
    Released
        For each entry, as it is decided.
    """
    spool = _spool(site)
    with Ledger.open(ledger_url(site)) as ledger:
        for entry in entries:
            try:
                yield _release(ledger, spool, entry)
            except PrefectDicomError as error:
                yield Released(entry, trouble=error)


def drop(site: Site, entries: Sequence[Quarantined]) -> None:
    """Delete instances in quarantine."""
    spool = _spool(site)
    for entry in entries:
        spool.forget_quarantined(entry.sha256)


def _spool(site: Site) -> Spool:
    return Spool(site.spool.path, site.spool.reserve_bytes)


def _release(ledger: Ledger, spool: Spool, entry: Quarantined) -> Released:
    path = spool.quarantine_path(entry.sha256)
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise PrefectDicomError("spool-damaged", "it has gone from quarantine") from None
    if found != entry.sha256:
        raise PrefectDicomError("spool-damaged", "its bytes are not those that arrived")
    scan = survey(path)
    record = _study_of(ledger, scan.identity, entry)
    if record is None:
        raise InstanceRejected("not-requested", "the ledger has no study of its StudyInstanceUID")
    reference = record.reference

    def move() -> str | None:
        # Read again: a run may have worked on it meanwhile.
        study = ledger.studies.get(reference)
        assert study is not None, "no study is ever deleted"
        _check_place(ledger, study, scan, entry)
        spool.give_back(entry.sha256, reference)
        return study.reason if study.disposition is Disposition.PERMANENT else None

    return Released(entry, reference, reopened_by=ledger.claims.while_unclaimed(reference, move))


def _study_of(ledger: Ledger, identity: Identity, entry: Quarantined) -> StudyRecord | None:
    """Find its study by its StudyInstanceUID, or by the note if it has none or is unreadable."""
    if identity.study_instance_uid is not None:
        return ledger.studies.find(normal_uid(identity.study_instance_uid))
    return None if entry.study is None else ledger.studies.get(entry.study)


def _check_place(ledger: Ledger, study: StudyRecord, scan: Scan, entry: Quarantined) -> None:
    """Check that the study lacks this instance.

    Raises
    ------
    InstanceRejected
        It does not, with the reason.
    """
    # Imported here: pydicom is slow to import, and listing should be fast.
    from prefect_dicom.dicom.validation import Expected, listed_key, validate

    if study.state is StudyState.ARCHIVED:
        _check_archived(ledger, study, scan.identity, entry)
    instances = ledger.instances.of_study(study.reference)
    if not instances:
        raise InstanceRejected("not-requested", "the PACS has not listed its study yet")
    listed = {record.key: record for record in instances if record.reason != "no-longer-listed"}
    key = listed_key(scan.identity, listed)
    if key not in listed:
        raise InstanceRejected("not-requested", "the PACS does not list it in its study")
    _check_free(listed[key], entry)
    expected = Expected(
        study.study.study_instance_uid,
        key,
        listed[key].sop_class_uid,
        study.study.patient_id or None,
        _accepted_patient_ids(ledger, study),
    )
    verdict = validate(scan, expected)
    if verdict.consequence is Consequence.QUARANTINE:
        raise InstanceRejected(verdict.findings[0], "it would come back here")


def _accepted_patient_ids(ledger: Ledger, study: StudyRecord) -> frozenset[str]:
    """Other PatientIDs that a person has accepted for the study, in any cohort that takes it."""
    reference, named = study.reference, study.patient_id_of_instances
    found: frozenset[str] = frozenset()
    for cohort in ledger.cohorts.that_take(reference):
        accepted = AcceptedOfStudy()
        numbers = ledger.acceptances.numbers_of_rows(cohort, [reference])
        accepted.record(
            ledger.acceptances.of_studies(cohort, [reference])[reference],
            numbers.get(reference, ()),
        )
        if named and accepted.allows(named):
            accepted.take(named)
        found |= accepted.patient_ids
    return found


def _check_archived(
    ledger: Ledger, study: StudyRecord, identity: Identity, entry: Quarantined
) -> None:
    """Raise: the study is complete as archived."""
    from prefect_dicom.dicom.validation import listed_key

    data = ledger.manifests.get(study.reference)
    assert data is not None, "an archived study has its manifest"
    manifest = decode_manifest(data)
    hashes = {
        InstanceKey(each.series_instance_uid, each.sop_instance_uid): each.sha256
        for each in manifest.instances
    }
    held = hashes.get(listed_key(identity, hashes))
    if held is None:
        raise InstanceRejected("not-requested", "its study is archived, whole without it")
    if held == entry.sha256:
        raise InstanceRejected("not-requested", "it is archived already and may be dropped")
    raise InstanceRejected("conflicting-content", "another instance is archived in its place")


def _check_free(record: InstanceRecord, entry: Quarantined) -> None:
    if not record.is_here:
        return
    if record.sha256 != entry.sha256:
        raise InstanceRejected("conflicting-content", "another instance was received in its place")
    if record.state is InstanceState.STORED:
        raise InstanceRejected("not-requested", "it is in the archive already and may be dropped")


def _name_of_uid(uid: str | None) -> str | None:
    """Return the name of a standard UID; others are not shown, as they may identify."""
    from pydicom.uid import UID_dictionary  # type: ignore[attr-defined]  # not in __all__

    if uid is None:
        return None
    return UID_dictionary.get(uid, ("not in the standard",))[0]
