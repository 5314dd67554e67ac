"""A real S3 for tests: a one-node Ceph (monitor, one OSD in memory, radosgw) on loopback.

From Debian's packages ``ceph-mon``, ``ceph-osd``, ``ceph-common`` and ``radosgw``. All ports are
free ones, all files lie in the directory given, all processes are children of the caller, so
several can run side by side. It is ready in three seconds; :func:`rados_gateway` is a fixture of it
for a whole session, skipped with the reason where a program is missing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.support.peers import free_port

PROGRAMS = (
    "ceph",
    "ceph-authtool",
    "ceph-mon",
    "ceph-osd",
    "monmaptool",
    "radosgw",
    "radosgw-admin",
)
ACCESS_KEY = "archivist"
SECRET_KEY = "a secret of the test bench"
START_SECONDS = 90

_CONF = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {root}/keyring
run dir = {root}/run
pid file = {root}/$name.pid
log file = {root}/$name.log
admin socket = {root}/run/$name.asok
mon data = {root}/mon
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
paxos propose interval = 0.05
paxos min wait = 0.01
osd data = {root}/osd
osd objectstore = memstore
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
memstore device bytes = 4294967296
rgw enable apis = s3, admin
rgw frontends = beast endpoint=127.0.0.1:{rgw_port}
rgw data = {root}/run
rgw enable gc threads = false
rgw enable lc threads = false
rgw enable quota threads = false
debug ms = 0
debug rgw = 0
"""


@dataclass(frozen=True)
class RadosGateway:
    """Where it listens and who may come in; ``bucket`` exists and is empty at first."""

    endpoint: str
    access_key: str
    secret_key: str
    bucket: str


def missing_programs() -> list[str]:
    """The programs a gateway needs and this machine lacks; empty where it can be started."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextmanager
def radosgw(root: Path, bucket: str = "archive") -> Iterator[RadosGateway]:
    """Start it in the directory ``root`` (made if absent) and stop it at the end.

    Raises
    ------
    RuntimeError
        A program is missing or it did not come up; the logs are in ``root``.
    """
    if missing := missing_programs():
        raise RuntimeError(f"radosgw cannot be started without {', '.join(missing)}")
    for name in ("mon", "osd", "run"):
        (root / name).mkdir(parents=True, exist_ok=True)
    mon_port, rgw_port = free_port(), free_port()
    fsid = str(uuid.uuid4())
    (root / "ceph.conf").write_text(
        _CONF.format(root=root, fsid=fsid, mon_port=mon_port, rgw_port=rgw_port)
    )
    daemons: list[subprocess.Popen] = []
    environment = {**os.environ, "CEPH_ARGS": f"--conf {root}/ceph.conf"}

    def run(*command: str) -> None:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")

    def daemon(*command: str) -> None:
        log = (root / f"{command[0]}.out").open("wb")
        with log:
            daemons.append(
                subprocess.Popen(
                    command,
                    cwd=root,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )

    try:
        _make_keyring(run)
        run("monmaptool", "--create", "--clobber", "--fsid", fsid,
            "--addv", "a", f"[v2:127.0.0.1:{mon_port}]", "monmap")  # fmt: skip
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "keyring")
        daemon("ceph-mon", "-f", "-i", "a")
        osd = str(uuid.uuid4())
        run("ceph", "--connect-timeout", "30", "osd", "new", osd)
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        daemon("ceph-osd", "-f", "-i", "0")
        run("ceph", "auth", "import", "-i", "keyring")
        run("ceph", "osd", "crush", "add", "osd.0", "1.0", "root=default", "host=localhost")
        daemon("radosgw", "-f", "-n", "client.rgw")
        endpoint = f"http://127.0.0.1:{rgw_port}"
        _wait_for(endpoint, daemons)
        run("radosgw-admin", "-n", "client.rgw", "user", "create", "--uid=test",
            "--display-name=test", f"--access-key={ACCESS_KEY}",
            f"--secret-key={SECRET_KEY}")  # fmt: skip
        gateway = RadosGateway(endpoint, ACCESS_KEY, SECRET_KEY, bucket)
        make_bucket(gateway, bucket)
        yield gateway
    finally:
        for process in reversed(daemons):
            process.kill()
        for process in daemons:
            process.wait()


@pytest.fixture(scope="session")
def rados_gateway(tmp_path_factory) -> Iterator[RadosGateway]:
    """One gateway for all tests; each of them should use a prefix or bucket of its own."""
    if missing := missing_programs():
        pytest.skip(f"radosgw cannot be started without {', '.join(missing)}")
    with radosgw(tmp_path_factory.mktemp("radosgw")) as gateway:
        yield gateway


def client_of(gateway):
    """A plain boto3 client for anything with ``endpoint``, ``access_key`` and ``secret_key``."""
    # Imported here: the helper must load where boto3 is not wanted.
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=gateway.endpoint,
        aws_access_key_id=gateway.access_key,
        aws_secret_access_key=gateway.secret_key,
        region_name="us-east-1",
        config=Config(
            signature_version="s3v4",
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 1},
        ),
    )


def make_bucket(gateway, bucket: str) -> None:
    """Create a bucket, also of a gateway that runs already."""
    client_of(gateway).create_bucket(Bucket=bucket)


def _make_keyring(run) -> None:
    run("ceph-authtool", "--create-keyring", "keyring",
        "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")  # fmt: skip
    for name, caps in (
        ("client.admin", ("mon", "allow *", "osd", "allow *", "mgr", "allow *")),
        ("osd.0", ("mon", "allow profile osd", "osd", "allow *", "mgr", "allow profile osd")),
        ("client.rgw", ("mon", "allow rw", "osd", "allow rwx", "mgr", "allow rw")),
    ):
        flags = [flag for i in range(0, len(caps), 2) for flag in ("--cap", *caps[i : i + 2])]
        run("ceph-authtool", "keyring", "--gen-key", "-n", name, *flags)


def _wait_for(endpoint: str, daemons: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        for process in daemons:
            if process.poll() is not None:
                raise RuntimeError(f"{process.args[0]} ended with {process.returncode}")
        try:
            with urlopen(endpoint, timeout=2):
                return
        except (URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"radosgw did not answer within {START_SECONDS} s")
