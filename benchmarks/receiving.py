"""Receiving by C-MOVE and by C-GET, beside DCMTK and pynetdicom."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.corpus import Study
from benchmarks.sender import Orthanc
from prefect_dicom.archive.spool import Spool
from prefect_dicom.core.model import InformationModel, RetrieveMethod
from prefect_dicom.network.get import c_get
from prefect_dicom.network.query_keys import retrieve_identifier
from prefect_dicom.network.storage_scp import Expectation, StoreHandler


def receiving_rates(
    orthanc: Orthanc, work: Sequence[tuple[object, Study]], rounds: int
) -> dict[str, list[float]]:
    """Objects a second for each (receiver, study), measured in turn so many times.

    Raises
    ------
    RuntimeError
        Objects are missing: what is incomplete is not compared.
    """
    rates: dict[str, list[float]] = {receiver.name: [] for receiver, _ in work}
    # One round more, whose figures are left out: caches and processes are cold.
    for number in range(rounds + 1):
        for receiver, study in work:
            with receiver.expecting(study):
                seconds = orthanc.move(study, receiver.ae_title)
                if (arrived := receiver.emptied(study)) != len(study.files):
                    raise RuntimeError(f"{receiver.name}: {arrived} of {len(study.files)} arrived")
            if number:
                rates[receiver.name].append(len(study.files) / seconds)
    return rates


def getting_rates(
    orthanc: Orthanc, study: Study, folder: Path, context: tuple[str, str], rounds: int
) -> dict[str, list[float]]:
    """Objects a second of our C-GET and of getscu at its best, in turn; getscu's with its start."""
    node = orthanc.node(RetrieveMethod.C_GET)
    root = InformationModel.STUDY_ROOT
    identifier = retrieve_identifier(root, "STUDY", "", [study.study_instance_uid], [], [])
    spool = Spool(folder / "spool")
    rates: dict[str, list[float]] = {"prefect-dicom": [], "getscu, best": []}
    for number in range(rounds + 1):
        expectation = Expectation({study.study_instance_uid: 1})
        began = time.perf_counter()
        c_get(node, identifier, contexts=[context], store_handler=StoreHandler(spool, expectation))
        seconds = {"prefect-dicom": time.perf_counter() - began}
        arrived = {"prefect-dicom": len(spool.files(1))}
        spool.drop(1)
        target = folder / "getscu"
        target.mkdir()
        seconds["getscu, best"] = orthanc.get(study, target)
        arrived["getscu, best"] = len(list(target.iterdir()))
        shutil.rmtree(target)
        for name, count in arrived.items():
            if count != len(study.files):
                raise RuntimeError(f"{name}: {count} of {len(study.files)} arrived")
            if number:
                rates[name].append(count / seconds[name])
    return rates
