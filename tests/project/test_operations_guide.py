"""The operations guide: its commands exist, its links lead somewhere, and its advice works."""

from __future__ import annotations

import re
import shlex
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest
import yaml

from prefect_dicom.cli import app
from prefect_dicom.config.receiver import Metrics, Receiver
from prefect_dicom.core import metrics
from prefect_dicom.testing import tiny_instances
from tests.support.sites import site_around

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "operations.md"
TEXT = GUIDE.read_text(encoding="utf-8")
FIREWALL = ROOT / "deployments" / "firewall.nft"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def commands(program: str) -> list[list[str]]:
    """The words after a program's name, of each line of the guide that runs it."""
    found = []
    for line in "\n".join(blocks("sh")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == [program] or ("exec" in words and program in words):
            found.append(words[words.index(program) + 1 :])
    return found


def test_every_command_of_ours_exists():
    ours = commands("prefect-dicom")
    assert len(ours) >= 3
    for words in ours:
        app.parse_args(words, exit_on_error=False, print_error=False)


def test_every_link_leads_somewhere():
    def anchors(text: str) -> set[str]:
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    links = re.findall(r"\]\((?!https?:)([^)]+)\)", TEXT)
    assert len(links) > 10
    for link in links:
        path, _, anchor = link.partition("#")
        target = (GUIDE.parent / path).resolve() if path else GUIDE
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_files_that_are_installed_exist():
    for words in (*commands("install"), *commands("cp")):
        for word in words:
            if word.startswith(("deployments/", "configs/")) and word != "deployments/.env":
                assert (ROOT / word).exists(), word


def test_metrics_are_the_ones_there_are():
    table = section("Metrics")
    named = set()
    for row in re.findall(r"^\| (`prefect_dicom_.*?) \|", table, re.MULTILINE):
        named |= {n.replace("…_", "prefect_dicom_") for n in re.findall(r"`(\S+?)`", row)}
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    metrics.Instruments(registry)
    counted = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in registry.collect()
    }
    assert named == counted | set(metrics.READ)
    (settings,) = (yaml.safe_load(block) for block in blocks("yaml") if "metrics:" in block)
    Metrics.model_validate(settings["metrics"])


def test_the_firewalls_open_the_ports_there_are():
    port = Receiver().port
    assert f"(`{port}`)" in section("Firewall") or f"({port})" in section("Firewall")
    for words in commands("ufw"):
        assert words[:4] == ["allow", "proto", "tcp", "from"]
        assert int(words[-1]) in (port, 9464)
    rules = [w for words in commands("firewall-cmd") for w in words if "rich-rule" in w]
    assert len(rules) == 2
    for rule in rules:
        assert re.search(rf"port port=({port}|9464) protocol=tcp accept$", rule)
    assert f"tcp dport {port} accept" in FIREWALL.read_text()


@pytest.mark.skipif(not shutil.which("nft", path="/usr/sbin:/usr/bin"), reason="needs nftables")
def test_nftables_takes_the_table():
    # A user that is not there yet is no name to nft.
    text = FIREWALL.read_text().replace("skuid prefect-dicom", "skuid 10001")
    words = ["unshare", "--net", "--map-root-user", "/usr/sbin/nft", "--check", "--file", "-"]
    done = subprocess.run(words, input=text, capture_output=True, text=True)
    if "Operation not permitted" in done.stderr or "not supported" in done.stderr:
        pytest.skip("the kernel lets nobody check it here")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_backup_made_while_a_run_works_can_be_put_back_and_nothing_moves_twice(tmp_path):
    (statement,) = re.findall(r'"(VACUUM INTO [^"]+)"', section("Backups"))
    copy = tmp_path / "copy.sqlite"
    with site_around(tmp_path, tiny_instances(2), retrieve="c-get") as place:
        cohort = place.cohort()
        with place.opened(cohort):
            with sqlite3.connect(tmp_path / "ledger.sqlite") as connection:
                connection.execute(statement.replace("/backup/ledger.sqlite", str(copy)))
            connection.close()
        place.pull(cohort)
        asked = place.asked_for("C-GET")
        assert asked

        for name in ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"):
            (tmp_path / name).unlink(missing_ok=True)
        copy.chmod(0o600)
        copy.rename(tmp_path / "ledger.sqlite")
        place.pull(cohort)
        assert place.asked_for("C-GET") == asked
        place.is_whole()
