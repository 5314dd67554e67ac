"""Hosts that are network namespaces: each with an address, a loopback and mounts of its own.

Needs root, Linux and iproute2. All hosts are on one bridge; this one is on it too, under
:attr:`Network.here`. What a host runs sees the folders of this machine, but for those that are
mounted over for it: its own disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_networks = itertools.count()


def lacking() -> str:
    """Why there can be no such hosts here; empty if there can."""
    if shutil.which("ip") is None:
        return "needs the program ip (Debian: apt install iproute2)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    name = f"pd{os.getpid()}probe"
    probe = subprocess.run(["ip", "netns", "add", name], capture_output=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return "" if probe.returncode == 0 else "needs network namespaces, which are not allowed here"


class Network:
    """A bridge, and hosts on it; a context manager that leaves nothing behind.

    Attributes
    ----------
    here : str
        The address of this host on the bridge.
    range : str
        All its addresses, as a CIDR.
    """

    def __init__(self, *names: str) -> None:
        number = next(_networks)
        # Of the range for benchmarks (RFC 2544): no network that is in use anywhere.
        self._prefix = f"198.{18 + number % 2}.{os.getpid() % 250}"
        self._id = f"pd{os.getpid()}x{number}"
        self.here = f"{self._prefix}.1"
        self.range = f"{self._prefix}.0/24"
        self._numbers = {name: 10 + place for place, name in enumerate(names)}

    def __enter__(self) -> Network:
        with contextlib.ExitStack() as stack:
            stack.callback(self._remove)
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("address", "add", f"{self.here}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            for name in self._numbers:
                self._add(name)
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    @property
    def _bridge(self) -> str:
        return f"{self._id}b"

    def _namespace(self, name: str) -> str:
        return f"{self._id}{name}"

    def _link(self, name: str) -> str:
        """The end of the host's cable that is on this side."""
        return f"{self._id}v{self._numbers[name]}"

    def _add(self, name: str) -> None:
        space = self._namespace(name)
        _ip("netns", "add", space)
        _ip("link", "add", self._link(name), "type", "veth", "peer", "eth0", "netns", space)
        _ip("link", "set", self._link(name), "master", self._bridge, "up")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "address", "add", f"{self.address(name)}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")

    def _remove(self) -> None:
        for name in self._numbers:
            self.kill(name)
            subprocess.run(["ip", "netns", "del", self._namespace(name)], capture_output=True)
            subprocess.run(["ip", "link", "del", self._link(name)], capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)

    # --- what a test does with it

    def address(self, name: str) -> str:
        return f"{self._prefix}.{self._numbers[name]}"

    @contextlib.contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Be on the host: sockets that this thread makes, and threads that it starts, are."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/run/netns/{self._namespace(name)}", os.O_RDONLY)
        try:
            _enter(there)
            yield
        finally:
            _enter(home)
            os.close(there)
            os.close(home)

    def start(
        self,
        name: str,
        *command: str | Path,
        environment: Mapping[str, str],
        log: Path,
        disks: Mapping[Path, Path] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen:
        """Start a program on a host, in a process group of its own.

        Parameters
        ----------
        disks : mapping of Path to Path
            Folders that the host sees in place of others: what is seen there, and what it is.
        """
        mounts = "".join(
            f"mount --bind {shlex.quote(str(own))} {shlex.quote(str(seen))} && "
            for seen, own in (disks or {}).items()
        )
        script = f"{mounts}exec {shlex.join(map(str, command))}"
        with log.open("ab") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", self._namespace(name), "sh", "-c", script],
                stdout=output,
                stderr=output,
                env=dict(environment),
                cwd=cwd,
                start_new_session=True,
            )

    def cut(self, name: str) -> None:
        """Pull the host's cable: nothing comes or goes any more, and nobody is told."""
        _ip("link", "set", self._link(name), "down")

    def mend(self, name: str) -> None:
        """Put the cable back."""
        _ip("link", "set", self._link(name), "up")

    def kill(self, name: str) -> int:
        """Kill every process on the host; returns how many there were."""
        found = subprocess.run(
            ["ip", "netns", "pids", self._namespace(name)], capture_output=True, text=True
        )
        numbers = [int(number) for number in found.stdout.split() if int(number) != os.getpid()]
        for number in numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        return len(numbers)


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
