"""What the service manager is told, over a real socket."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from pbsfs.runtime.service import ServiceManager
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
