"""File systems of paths: which of them are shared over a network."""

from __future__ import annotations

import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
"""Mounts of this process (Linux, proc(5)); elsewhere there is no such file."""

_NETWORK = {
    "9p",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "davfs",
    "glusterfs",
    "gpfs",
    "lustre",
    "ncpfs",
    "nfs",
    "nfs4",
    "orangefs",
    "panfs",
    "prl_fs",
    "pvfs2",
    "smb2",
    "smb3",
    "smbfs",
    "vboxsf",
    "wekafs",
}
_FUSE = re.compile(r"fuse\.(.*fs|.*ceph.*|.*gluster.*|.*rclone.*|.*s3.*|.*gcs.*|.*nfs.*|.*smb.*)")
_LOCAL_FUSE = re.compile(r"fuse\.(fuse-overlayfs|gocryptfs|encfs|cryfs|bindfs|mergerfs|lxcfs|ntfs)")
_ESCAPE = re.compile(r"\\([0-7]{3})")


def network_file_system(path: Path, mounts: Path = MOUNTS) -> str | None:
    """Return the type of the network file system that a path lies on.

    Parameters
    ----------
    path : Path
        It need not exist.
    mounts : Path
        Table of mounts.

    Returns
    -------
    str or None
        Such as ``nfs4`` or ``fuse.sshfs``. None for a local disk, and where there is no table.
    """
    try:
        lines = mounts.read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    place = path.resolve()
    # A later mount covers an earlier one at the same place.
    found, depth = "", -1
    for line in lines:
        fields, _, after = line.partition(" - ")
        point = Path(_ESCAPE.sub(lambda m: chr(int(m[1], 8)), fields.split(" ")[4]))
        if place.is_relative_to(point) and len(point.parts) >= depth:
            found, depth = after.split(" ")[0], len(point.parts)
    is_network = found in _NETWORK or (
        _FUSE.fullmatch(found) is not None and _LOCAL_FUSE.fullmatch(found) is None
    )
    return found if is_network else None
