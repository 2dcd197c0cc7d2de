"""A mount that one process attaches and another one serves, without privileges and in its own namespace."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pbsfs.fuse.mountpoint import mounted_at
from tests.support.manager import Manager, manager
from tests.support.mounts import cleaned_up, is_free
from tests.support.needs import need, need_fuse, need_root
from tests.support.program import PBSFS, environment, error_of, pbsfs
from tests.support.stocked import CONFIGURATION, IMAGE, Stocked, stock
from tests.support.waiting import LIMIT, wait_until

pytestmark = [pytest.mark.mount, pytest.mark.root]

# What systemd does for a service: the descriptor, a mount namespace if it is told so, no capability.
SERVICE = """
exec 3<&"$1"
export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=mount
shift
exec "$@"
"""
APART = ("unshare", "--mount", "--propagation", "slave")
POWERLESS = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")


@pytest.fixture
def stocked(tmp_path: Path) -> Stocked:
    need_root("attach a mount for another process")
    need_fuse()
    need("bash", "setpriv", "unshare")
    return stock(tmp_path / "datastore")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    (place := tmp_path / "m").mkdir()
    with cleaned_up(place):
        yield place


@contextmanager
def attached(stocked: Stocked, place: Path, service: Manager, *options: str) -> Iterator[int]:
    """The connection of a mount that waits at `place`, as the service manager has it."""
    command: list[str | Path] = [PBSFS, "mount", "--attach-for", "root", *options, stocked.path, place]
    with subprocess.Popen(command, env=environment(NOTIFY_SOCKET=service.address)) as attaching:
        assert service.told() == ["FDSTOREREMOVE=1", "FDNAME=mount"]
        lines, (connection,) = service.given()
        assert lines == ["FDSTORE=1", "FDNAME=mount"]
        lines, (barrier,) = service.given()
        assert lines == ["BARRIER=1"]
        assert attaching.poll() is None  # until the manager has all of it
        os.close(barrier)
        assert attaching.wait(LIMIT) == 0
    try:
        yield connection
    finally:
        os.close(connection)


def serving(
    connection: int, stocked: Stocked, place: Path, service: Manager, *how: str
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *("bash", "-c", SERVICE, "service", str(connection), *how, *POWERLESS),
            *(PBSFS, "mount", "--foreground", stocked.path, place),
        ],
        env=environment(NOTIFY_SOCKET=service.address),
        pass_fds=[connection],
    )


def test_a_process_without_privileges_serves_it_for_all(
    stocked: Stocked, place: Path, tmp_path: Path
) -> None:
    with manager(tmp_path) as service:
        with attached(stocked, place, service, "-o", "allow_other,noexec") as connection:
            mount = mounted_at(place)
            assert mount is not None
            assert (mount.type, mount.source, mount.owner) == ("fuse.pbsfs", str(stocked.path), 0)
            table = Path("/proc/self/mounts").read_text().splitlines()
            (options,) = (line.split()[3].split(",") for line in table if line.split()[1] == str(place))
            assert {"ro", "nosuid", "nodev", "noexec", "allow_other", "default_permissions"} <= set(options)
            process = serving(connection, stocked, place, service, *APART)
        assert service.told() == ["FDSTOREREMOVE=1", "FDNAME=mount"]
        assert service.told()[0] == "READY=1"
        # Outside of the namespace of the process.
        assert (place / CONFIGURATION).read_bytes() == stocked.contents[CONFIGURATION]
        assert (place / IMAGE).read_bytes() == stocked.contents[IMAGE]
        # Another one unmounts it, as the unit does.
        process.terminate()
        assert process.wait(LIMIT) == 0
        assert pbsfs("umount", place).returncode == 0


def test_it_ends_when_it_is_unmounted(stocked: Stocked, place: Path, tmp_path: Path) -> None:
    with manager(tmp_path) as service:
        with attached(stocked, place, service) as connection:
            process = serving(connection, stocked, place, service)
        service.told()
        assert service.told()[0] == "READY=1"
        assert pbsfs("umount", place).returncode == 0
        assert process.wait(LIMIT) == 0


def test_nothing_stays_mounted_if_nobody_keeps_it(stocked: Stocked, place: Path) -> None:
    done = pbsfs("mount", "--attach-for", "root", stocked.path, place, env=environment())
    assert "there is no service manager to keep the mount" in error_of(done, 7)
    wait_until(lambda: is_free(place), "it is unmounted")


def test_a_user_who_does_not_exist_is_refused(stocked: Stocked, place: Path) -> None:
    done = pbsfs("mount", "--attach-for", "nobody-here", stocked.path, place)
    assert "--attach-for nobody-here: there is no such user" in error_of(done, 2)
    assert mounted_at(place) is None
