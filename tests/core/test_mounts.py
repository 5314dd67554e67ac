"""Which paths lie on a file system that hosts share over a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefect_dicom.core.mounts import network_file_system

TABLE = r"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 22 0:30 / /data rw shared:2 - nfs4 filer:/export rw,vers=4.2
31 30 254:1 / /data/local rw shared:3 - xfs /dev/vdb rw
32 22 0:31 / /mnt/with\040space rw - cifs //filer/share rw
33 22 0:32 / /home/anna/remote rw - fuse.sshfs anna@host: rw
34 22 0:33 / /crypt rw - fuse.gocryptfs /plain rw
35 22 254:2 / /again rw - ext4 /dev/vdc rw
36 22 0:34 / /again rw - nfs filer:/again rw
37 22 0:35 / /data2 rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/ledger.sqlite", None),
        ("/data", "nfs4"),
        ("/data/cohorts/ledger.sqlite", "nfs4"),
        ("/data/local/ledger.sqlite", None),
        ("/data2/ledger.sqlite", None),
        ("/mnt/with space/ledger.sqlite", "cifs"),
        ("/home/anna/remote/x", "fuse.sshfs"),
        ("/crypt/ledger.sqlite", None),
        ("/again/ledger.sqlite", "nfs"),
    ],
)
def test_the_mount_that_a_path_lies_on_counts(tmp_path, path, kind):
    table = tmp_path / "mountinfo"
    table.write_text(TABLE)
    assert network_file_system(Path(path), table) == kind


def test_without_a_table_of_mounts_nothing_is_said(tmp_path):
    assert network_file_system(Path("/data"), tmp_path / "mountinfo") is None


def test_the_disk_of_this_machine_is_local(tmp_path):
    assert network_file_system(tmp_path) is None
