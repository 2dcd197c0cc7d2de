"""What the service manager is told, over a real socket."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pbsfs.base.errors import MountError
from pbsfs.runtime import service as module
from pbsfs.runtime.service import ServiceManager, inherited
from tests.support.manager import Manager, manager


@pytest.fixture(params=["path", "abstract"])
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    with manager(tmp_path, abstract=request.param == "abstract") as found:
        yield found


def test_it_is_told_in_lines(listening: Manager) -> None:
    service = ServiceManager(listening.address)
    service.ready("datastore /srv is mounted at /mnt")
    service.stopping()
    assert listening.told() == ["READY=1", "STATUS=datastore /srv is mounted at /mnt"]
    assert listening.told() == ["STOPPING=1"]


def test_a_status_is_one_line_whatever_is_in_it(listening: Manager) -> None:
    ServiceManager(listening.address).ready("at /mnt/a\nMAINPID=1\n\udcff")
    assert listening.told() == ["READY=1", "STATUS=at /mnt/a MAINPID=1 \udcff"]


@pytest.mark.parametrize("address", [None, ""])
def test_without_a_manager_nothing_is_sent(address: str | None) -> None:
    ServiceManager(address).ready("x")
    ServiceManager(address).stopping()


def test_a_manager_that_does_not_listen_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ServiceManager(str(tmp_path / "none")).ready("x")
    (record,) = caplog.records
    assert record.getMessage() == (
        f"cannot notify the service manager at {tmp_path}/none: No such file or directory"
    )
    caplog.clear()


def test_a_manager_that_does_not_read_hangs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as full:
        full.bind(str(tmp_path / "full"))
        while not caplog.records:
            ServiceManager(str(tmp_path / "full")).stopping()
    assert "Resource temporarily unavailable" in caplog.text
    caplog.clear()


def test_a_descriptor_is_left_until_the_manager_has_it(listening: Manager) -> None:
    reading, writing = os.pipe()
    keeping = threading.Thread(target=ServiceManager(listening.address).keep, args=(writing, "mount"))
    keeping.start()
    assert listening.told() == ["FDSTOREREMOVE=1", "FDNAME=mount"]
    lines, (kept,) = listening.given()
    assert lines == ["FDSTORE=1", "FDNAME=mount"]
    lines, (barrier,) = listening.given()
    assert lines == ["BARRIER=1"]
    assert keeping.is_alive()
    os.close(barrier)
    keeping.join()
    os.write(kept, b"it")
    assert os.read(reading, 9) == b"it"
    for fd in (reading, writing, kept):
        os.close(fd)
    ServiceManager(listening.address).drop("mount")
    assert listening.told() == ["FDSTOREREMOVE=1", "FDNAME=mount"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (None, "there is no service manager to keep the mount; start pbsfs by a unit of systemd"),
        (
            "none",
            "the service manager did not take the mount: No such file or directory; start pbsfs by a unit",
        ),
        ("silent", "the service manager did not take the mount; look at its log with journalctl"),
    ],
)
def test_a_descriptor_that_nobody_takes_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str | None, reason: str
) -> None:
    monkeypatch.setattr(module, "KEPT_WITHIN", 0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as silent:
        silent.bind(str(tmp_path / "silent"))
        with pytest.raises(MountError) as raised:
            ServiceManager(None if name is None else str(tmp_path / name)).keep(1, "mount")
    assert str(raised.value).startswith(reason)


def test_a_descriptor_comes_by_its_name_and_stays_here(monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[tuple[int, bool]] = []
    monkeypatch.setattr(os, "set_inheritable", lambda fd, what: changed.append((fd, what)))
    told = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "other:mount"}
    assert inherited(told, "mount") == 4
    assert changed == [(4, False)]
    assert inherited(told, "none") is None
    assert inherited({**told, "LISTEN_PID": "1"}, "mount") is None
    assert inherited({}, "mount") is None


def test_a_descriptor_that_is_not_open_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": ":" * 60000 + "mount"}
    with pytest.raises(MountError, match="descriptor 60003 of the mount: Bad file descriptor"):
        inherited(told, "mount")
