"""Each safeguard is switched off in a copy of the code, and tests notice.

What a test would not miss is not kept by tests. The copy is the whole package with one thing
changed; the tests named with it are run against the copy, and have to fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import campaign

ROOT = Path(__file__).parents[2]
TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Safeguard:
    """A safeguard: how the code looks with and without it, and who would notice."""

    file: str
    changes: Mapping[str, str]
    noticed_by: tuple[str, ...]


SAFEGUARDS = {
    "checksum on put, S3": Safeguard(
        "archive/s3_put.py",
        {
            'return request.context["sha256"]': 'return "UNSIGNED-PAYLOAD"',
            'headers["x-amz-checksum-sha256"] = base64_digest(sha256)': "pass",
        },
        ("archive/test_s3_put.py",),
    ),
    "checksum on put, directory": Safeguard(
        "archive/directory.py",
        {"if digest.hexdigest() != source.sha256:": "if False:"},
        ("archive/test_base.py",),
    ),
    "conditional put, S3": Safeguard(
        "archive/s3.py",
        {'**({"If-None-Match": "*"} if condition else {}),': ""},
        ("archive/test_base.py",),
    ),
    "conditional completion, S3": Safeguard(
        "archive/s3_multipart.py",
        {'condition = {"IfNoneMatch": "*"} if form.condition else {}': "condition = {}"},
        ("archive/test_s3.py",),
    ),
    "service that keeps to conditions, S3": Safeguard(
        "archive/s3.py",
        {
            "        if not self._usable:\n            self.check_usable()\n": "",
            "            if stored:\n": "            if False:\n",
        },
        ("archive/test_s3_services.py",),
    ),
    "conditional put, directory": Safeguard(
        "archive/directory.py",
        {
            "if (found := _size_of_file(target)) is not None:": "if False:",
            "os.link(incoming, target)": "os.replace(incoming, target)",
        },
        ("archive/test_base.py",),
    ),
    "counts of series": Safeguard(
        "retrieval/study_task.py",
        {"return bool(self.short_series()) or self.contradicts_counts": "return False"},
        ("retrieval/test_completeness.py",),
    ),
    "counts of sub-operations": Safeguard(
        "retrieval/study_task.py",
        {"and outcome.completed == len(sent) > 0": ""},
        ("retrieval/test_completeness.py",),
    ),
    "objects of series that are not listed": Safeguard(
        "retrieval/study_task.py",
        {"return self.series is None or key.series_instance_uid in self.series": "return True"},
        ("retrieval/test_completeness.py",),
    ),
    "the list read again before the commit": Safeguard(
        "run/archiving.py",
        {"                if not changed:\n": "                if True:\n"},
        ("run/test_rerun.py",),
    ),
    "claim check": Safeguard(
        "ledger/database.py",
        {
            "        if lost:\n            raise ClaimLost(": (
                "        if False:\n            raise ClaimLost("
            )
        },
        ("ledger/test_claims.py",),
    ),
    "claims of living runs are kept": Safeguard(
        "ledger/claims.py",
        {"            if row.run not in living\n": ""},
        ("ledger/test_claims.py",),
    ),
    "hash comparison after a restart": Safeguard(
        "archive/directory.py",
        {"if digest.hexdigest() != source.sha256:": "if False:"},
        ("archive/test_spool.py",),
    ),
    "allow-list": Safeguard(
        "network/storage_scp/process.py",
        {"return any((mapped or peer) in network for network in self._networks)": "return True"},
        (
            "network/test_storage_scp_hostile_peers.py",
            "network/test_storage_scp_process.py",
        ),
    ),
    "PDU cap": Safeguard(
        "network/storage_scp/transfer.py",
        {"if not 6 <= length <= _LONGEST_PDU_BYTES:": "if not 6 <= length:"},
        ("network/test_transfer_limits.py",),
    ),
    "nothing that was not requested": Safeguard(
        "network/storage_scp/store_handler.py",
        {
            "                return expectation, study\n        return None": (
                "                return expectation, study\n"
                "        return candidates[0], next(iter(candidates[0].studies.values()))"
            )
        },
        ("retrieval/test_content_faults.py", "retrieval/test_ingest.py"),
    ),
}


@pytest.fixture
def copy(tmp_path) -> Path:
    """The package as it is installed, in a place that comes before the installed one."""
    package = tmp_path / "prefect_dicom"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "prefect_dicom", package, ignore=ignored)
    for name in ("flows", "tasks"):
        shutil.copytree(ROOT / name, package / name, ignore=ignored)
    return package


def without(safeguard: Safeguard, package: Path) -> None:
    file = package / safeguard.file
    text = file.read_text()
    for there, instead in safeguard.changes.items():
        assert text.count(there) == 1, f"{safeguard.file} has changed: {there.strip()}"
        text = text.replace(there, instead)
    compile(text, safeguard.file, "exec")
    file.write_text(text)


@pytest.mark.parametrize("name", SAFEGUARDS)
def test_every_safeguard_is_where_this_says(name, copy):
    without(SAFEGUARDS[name], copy)
    assert all((TESTS / file).is_file() for file in SAFEGUARDS[name].noticed_by)


@pytest.mark.campaign("safeguards switched off")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", campaign.subset(SAFEGUARDS, ["checksum on put, S3"]))
def test_tests_notice_that_it_is_switched_off(name, copy):
    safeguard = SAFEGUARDS[name]
    without(safeguard, copy)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        + ["-p", "no:xdist", *(TESTS / file for file in safeguard.noticed_by)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(copy.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    # 1 are tests that failed; tests that could not be run are another code.
    assert done.returncode == 1, done.stdout[-2000:]
