"""pbsfs as its users run it: exports, mounts and nbdkit, each gone when its block ends."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.data import IMAGE, Data
from bench.limits import key_of
from bench.measures import BenchError, Sample, Watched, command, stop
from bench.serving import CHECKOUT, Access, RunningServer
from bench.store import BucketAccess
from pbsfs.base.names import Snapshot
from pbsfs.fuse.mountpoint import mounted_at

PBSFS = Path(sys.executable).with_name("pbsfs")
BRIDGE = CHECKOUT / "nbd_bridge.py"

PATIENCE = 60.0
"""Seconds for something to start."""

Source = RunningServer | Access | BucketAccess | Path
"""A server, a bucket, or a datastore's directory."""


@dataclass(frozen=True, slots=True)
class Pbsfs:
    """`home`: an empty directory, so that no settings, keys or fingerprints of the user are read."""

    home: Path

    def environment(self, source: Source) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PBS_", "PBSFS_", "AWS_", "XDG_"))
        }
        kept |= {"HOME": str(self.home), "LC_ALL": "C.UTF-8"}
        access = source.access if isinstance(source, RunningServer) else source
        return kept if isinstance(access, Path) else kept | access.environment()

    def options(self, source: Source, data: Data, *, encrypted: bool = False) -> list[str]:
        found = ["--datastore-dir", str(source)] if isinstance(source, Path) else []
        found += ["--fingerprint", source.fingerprint] if isinstance(source, BucketAccess) else []
        return found + (["--keyfile", str(data.keyfile)] if encrypted else [])

    def export(
        self,
        source: Source,
        data: Data,
        snapshot: Snapshot,
        dest: str | Path,
        *,
        program: Sequence[str | Path] = (PBSFS,),
        options: Sequence[str] = (),
    ) -> Sample:
        encrypted = key_of(snapshot) is not None
        words: list[str | Path] = [
            *program,
            "export",
            "--no-progress",
            *options,
            *self.options(source, data, encrypted=encrypted),
        ]
        words += [f"{snapshot}/{IMAGE}", dest]
        server = source.pid if isinstance(source, RunningServer | BucketAccess) else None
        environment = self.environment(source) | {"PYTHONPATH": str(CHECKOUT)}
        return command(words, size=data.data_bytes, environment=environment, server=server)

    @contextmanager
    def mounted(
        self,
        source: Source,
        data: Data,
        *options: str,
        encrypted: bool = False,
        program: Sequence[str | Path] = (PBSFS,),
    ) -> Iterator[Mount]:
        """A mount in a process of ours."""
        place = Path(tempfile.mkdtemp(prefix="mount-", dir=self.home))
        words: list[str | Path] = [
            *program,
            "mount",
            "--foreground",
            *self.options(source, data, encrypted=encrypted),
            *options,
            place,
        ]
        process = started(words, self.environment(source) | {"PYTHONPATH": str(CHECKOUT)})
        try:
            wait_for(lambda: mounted_at(place) is not None, process, f"{place} is mounted")
            server = source.pid if isinstance(source, RunningServer | BucketAccess) else None
            yield Mount(place, process.pid, Watched((process.pid,), server))
        finally:
            stop(process)
            unmount(place)
            place.rmdir()

    @contextmanager
    def nbd(
        self, source: Source, snapshot: Snapshot, data: Data, *options: str, python: Path = BRIDGE
    ) -> Iterator[Nbd]:
        """nbdkit with the bridge, or another plugin in Python that takes the same parameters."""
        words = ["python", str(python), f"path={snapshot}/{IMAGE}"]
        words += [f"datastore_dir={source}"] if isinstance(source, Path) else []
        words += [f"keyfile={data.keyfile}"] if key_of(snapshot) is not None else []
        server = source.pid if isinstance(source, RunningServer | BucketAccess) else None
        with self.nbdkit([*words, *options], self.environment(source), server) as nbd:
            yield nbd

    @contextmanager
    def nbdkit(
        self, words: Sequence[str], environment: Mapping[str, str], server: int | None = None
    ) -> Iterator[Nbd]:
        """nbdkit with any plugin, on a socket in the file system."""
        place = Path(tempfile.mkdtemp(prefix="nbd-", dir=self.home))
        socket, pidfile = place / "socket", place / "pid"
        process = started(
            [
                "nbdkit",
                "--foreground",
                "--exit-with-parent",
                "--readonly",
                "-U",
                socket,
                "-P",
                pidfile,
                *words,
            ],
            environment,
        )
        try:
            wait_for(pidfile.exists, process, "nbdkit takes connections")
            yield Nbd(socket, process.pid, Watched((process.pid,), server))
        finally:
            stop(process)
            for left in (socket, pidfile):
                left.unlink(missing_ok=True)
            place.rmdir()


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount. `watched`: its process, and the server's."""

    place: Path
    pid: int
    watched: Watched

    def image(self, snapshot: Snapshot) -> Path:
        return self.place / str(snapshot) / IMAGE


@dataclass(frozen=True, slots=True)
class Nbd:
    """nbdkit that takes connections."""

    socket: Path
    pid: int
    watched: Watched

    @property
    def uri(self) -> str:
        return f"nbd+unix:///?socket={self.socket}"


def started(words: Sequence[str | Path], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=dict(environment),
        start_new_session=True,  # Ctrl-C is for us: what was started is ended in order
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    """Waits for something that `process` does. Raises BenchError where it ends, or takes for ever."""

    def looked() -> bool:
        if process.poll() is not None:
            raise BenchError(f"waiting until {what}: the process ended with status {process.returncode}")
        return condition()

    wait_until(looked, what)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"waited {PATIENCE:.0f} s in vain until {what}")
        time.sleep(0.01)


def unmount(place: Path) -> None:
    """Whatever is left mounted there."""
    if mounted_at(place) is not None:
        words = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
        subprocess.run([*words, place], check=False, timeout=30)
