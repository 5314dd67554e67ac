"""Retrieving by WADO-RS, beside our C-GET from the same server."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.corpus import Study
from benchmarks.sender import Orthanc
from prefect_dicom.archive.spool import Spool
from prefect_dicom.config.web_node import WebNode
from prefect_dicom.core.model import InformationModel, RetrieveMethod
from prefect_dicom.network.get import c_get
from prefect_dicom.network.query_keys import retrieve_identifier
from prefect_dicom.network.storage_scp import Expectation, StoreHandler
from prefect_dicom.web.client import WebClient


class Measured:
    """Instances a second, and CPU seconds of this process for each gigabyte, round by round."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.cpu_per_gb: list[float] = []


def web_and_get(
    orthanc: Orthanc, study: Study, folder: Path, context: tuple[str, str], rounds: int
) -> tuple[Measured, Measured]:
    """WADO-RS and C-GET of a study into a spool, in turn.

    Raises
    ------
    RuntimeError
        Instances are missing: what is incomplete is not compared.
    """
    root = InformationModel.STUDY_ROOT
    identifier = retrieve_identifier(root, "STUDY", "", [study.study_instance_uid], [], [])
    spool = Spool(folder / "spool-web")
    node = orthanc.node(RetrieveMethod.C_GET)
    url = f"http://127.0.0.1:{orthanc.http_port}/dicom-web"

    def by_get(handler: StoreHandler) -> object:
        return c_get(node, identifier, contexts=[context], store_handler=handler)

    with WebClient(WebNode(dicomweb=url)) as client:

        def by_web(handler: StoreHandler) -> object:
            return client.get(identifier, contexts=(), store_handler=handler)

        measured = {by_web: Measured(), by_get: Measured()}
        for number in range(rounds + 1):
            for retrieve, figures in measured.items():
                seconds, cpu = _timed(retrieve, study, spool)
                if number:
                    figures.rates.append(len(study.files) / seconds)
                    figures.cpu_per_gb.append(cpu / (study.size_bytes / 1e9))
        return measured[by_web], measured[by_get]


def _timed(
    retrieve: Callable[[StoreHandler], object], study: Study, spool: Spool
) -> tuple[float, float]:
    handler = StoreHandler(spool, Expectation({study.study_instance_uid: 1}))
    began, cpu = time.perf_counter(), time.process_time()
    retrieve(handler)
    took, used = time.perf_counter() - began, time.process_time() - cpu
    if (arrived := len(spool.files(1))) != len(study.files):
        raise RuntimeError(f"{retrieve.__name__}: {arrived} of {len(study.files)} arrived")
    spool.drop(1)
    return took, used
