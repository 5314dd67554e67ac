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

import campaign
import pytest

ROOT = Path(__file__).parents[1]
TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Safeguard:
    """A safeguard: how the code looks with and without it, and who would notice."""

    file: str
    changes: Mapping[str, str]
    noticed_by: tuple[str, ...]


SAFEGUARDS = {
    "checksum on put, S3": Safeguard(
        "archive/signed_put.py",
        {
            'return request.context["sha256"]': 'return "UNSIGNED-PAYLOAD"',
            '                "x-amz-checksum-sha256": '
            "base64.b64encode(bytes.fromhex(sha256)).decode(),\n": "",
        },
        ("test_the_signed_payload_is_the_hash_from_arrival.py",),
    ),
    "checksum on put, directory": Safeguard(
        "archive/directory.py",
        {"if digest.hexdigest() != source.sha256:": "if False:"},
        ("test_every_archive_keeps_the_same_protocol.py",),
    ),
    "conditional put, S3": Safeguard(
        "archive/s3.py",
        {
            '            "If-None-Match": "*",\n': "",
            '\n                IfNoneMatch="*",\n': "\n",
        },
        ("test_every_archive_keeps_the_same_protocol.py",),
    ),
    "conditional put, directory": Safeguard(
        "archive/directory.py",
        {
            "if (found := _size_of_file(target)) is not None:": "if False:",
            "os.link(part, target)": "os.replace(part, target)",
        },
        ("test_every_archive_keeps_the_same_protocol.py",),
    ),
    "counts of series": Safeguard(
        "work.py",
        {"return bool(self.short()) or self.contradicts_counts": "return False"},
        ("test_completeness_is_judged_by_the_best_evidence.py",),
    ),
    "counts of sub-operations": Safeguard(
        "retrieval.py",
        {"and outcome.completed == len(work.came) > 0": ""},
        ("test_completeness_is_judged_by_the_best_evidence.py",),
    ),
    "objects of series that are not listed": Safeguard(
        "work.py",
        {"return self.series is None or key.series_instance_uid in self.series": "return True"},
        ("test_completeness_is_judged_by_the_best_evidence.py",),
    ),
    "the list read again before the commit": Safeguard(
        "steps.py",
        {"                if not changed:\n": "                if True:\n"},
        ("test_running_again_moves_only_what_is_missing.py",),
    ),
    "claim check": Safeguard(
        "ledger/claims.py",
        {
            "        if lost:\n            raise ClaimLost(": (
                "        if False:\n            raise ClaimLost("
            )
        },
        ("test_no_study_is_worked_on_twice.py",),
    ),
    "claims of living runs are left alone": Safeguard(
        "ledger/claims.py",
        {"            if row.run not in living\n": ""},
        ("test_no_study_is_worked_on_twice.py",),
    ),
    "hash comparison after a restart": Safeguard(
        "archive/directory.py",
        {"if digest.hexdigest() != source.sha256:": "if False:"},
        ("test_a_damaged_spool_costs_only_what_was_damaged.py",),
    ),
    "allow-list": Safeguard(
        "receiver/server.py",
        {"return any((mapped or peer) in network for network in self._networks)": "return True"},
        (
            "test_the_receiver_survives_hostile_peers.py",
            "test_the_receiver_is_shared_and_guarded.py",
        ),
    ),
    "PDU cap": Safeguard(
        "dimse/transfer.py",
        {"if not 6 <= length <= self._longest_pdu:": "if not 6 <= length:"},
        ("test_the_receiver_is_bounded.py",),
    ),
    "nothing that was not requested": Safeguard(
        "receiver/intake.py",
        {
            "                return expectation, study\n        return None, None": (
                "                return expectation, study\n"
                "        return candidates[0], next(iter(candidates[0].studies.values()))"
            )
        },
        ("test_every_content_fault_gets_its_reaction.py", "test_what_arrives_is_judged.py"),
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
        + ["-p", "no:xdist", *safeguard.noticed_by],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": str(copy.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    # 1 are tests that failed; tests that could not be run are another code.
    assert done.returncode == 1, done.stdout[-2000:]
