"""The end of a mount: who waits for whom, and what is left of a mount whose connection is gone."""

from __future__ import annotations

import pbsfs.fuse.shim  # before pyfuse3, see there

import errno
import os
import threading
from pathlib import Path

import pyfuse3
import pytest
import trio

from pbsfs.base.errors import MountError
from pbsfs.fuse import session
from pbsfs.fuse.mountpoint import Mount, mounted_at
from pbsfs.fuse.notices import Notices
from tests.support.mounts import fails_with, mounted, opened
from tests.support.needs import need_fuse_control
from tests.support.run import in_trio, until
from tests.support.stocked import CONFIGURATION, stock
from tests.support.waiting import wait_until

MOUNT = Mount("0:99", Path("/"), Path("/nowhere"), "fuse.pbsfs", "x", 0)


@in_trio
async def test_a_call_is_made_in_a_thread_and_waited_for_also_if_its_task_has_ended() -> None:
    notices, gate, threads = Notices(), threading.Event(), list[int]()

    def call(number: int) -> None:
        threads.append(threading.get_ident())
        gate.wait(number)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(notices.send, call, 30)
        await until(lambda: bool(threads))
        nursery.cancel_scope.cancel()
    assert threads != [threading.get_ident()]
    assert not notices.end(0)
    gate.set()
    assert notices.end(30)
    await notices.send(call, 30)
    assert len(threads) == 1


def ended(
    monkeypatch: pytest.MonkeyPatch, *, is_released: bool = False, is_connected: bool = True
) -> list[str]:
    """What is done, in order, when a mount ends while the kernel holds a call."""
    notices, gate, done = Notices(), threading.Event(), list[str]()
    running = threading.Thread(target=lambda: trio.run(notices.send, held, gate, done), daemon=True)
    monkeypatch.setattr(session, "NOTICE_PATIENCE", 0.05)
    monkeypatch.setattr(pbsfs.fuse.shim, "is_connected", lambda: is_connected)
    monkeypatch.setattr(pyfuse3, "close", lambda *, unmount: done.append(f"closed {unmount}"))

    def abort(_mount: Mount) -> None:
        done.append("aborted")
        if is_released:
            gate.set()
            running.join(30)

    monkeypatch.setattr(session, "abort", abort)
    running.start()
    wait_until(lambda: done == ["held"], "the call is made")
    session.end(notices, MOUNT)
    gate.set()
    return list(done)


def held(gate: threading.Event, done: list[str]) -> None:
    done.append("held")
    gate.wait(30)
    done.append("released")


def test_the_session_is_closed_after_the_calls_that_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(monkeypatch, is_released=True) == ["held", "aborted", "released", "closed True"]


def test_a_session_that_a_call_still_uses_is_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(monkeypatch)[:2] == ["held", "aborted"]


def test_nothing_is_aborted_by_the_number_of_a_connection_that_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next mount on the machine gets that number."""
    assert "aborted" not in ended(monkeypatch, is_connected=False)


@pytest.mark.parametrize("is_dead", [True, False])
def test_a_mount_that_was_aborted_is_detached_and_not_the_next_one_at_its_place(
    monkeypatch: pytest.MonkeyPatch, is_dead: bool
) -> None:
    """After an unmount, the next mount there may look the same in the table, its number too."""
    detached = list[Path]()
    monkeypatch.setattr(pbsfs.fuse.shim, "is_connected", lambda: False)
    monkeypatch.setattr(pyfuse3, "close", lambda *, unmount: None)
    monkeypatch.setattr(session, "mounted_at", lambda _place: MOUNT)
    monkeypatch.setattr(session, "is_dead", lambda _place: is_dead)
    monkeypatch.setattr(session, "unmount", lambda place, **_how: detached.append(place))
    session.end(Notices(), MOUNT)
    assert detached == [MOUNT.path] * is_dead


@pytest.mark.parametrize("stays", [True, False])
def test_a_mount_that_another_process_unmounts_first_is_no_reason_for_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stays: bool
) -> None:
    table: list[Mount | None] = [MOUNT]

    def unmount(_place: Path, **_how: bool) -> None:
        if not stays:
            table[0] = None
        raise MountError("cannot unmount /nowhere: not mounted")

    monkeypatch.setattr(pbsfs.fuse.shim, "is_connected", lambda: True)
    monkeypatch.setattr(pyfuse3, "close", lambda *, unmount: None)
    monkeypatch.setattr(session, "mounted_at", lambda _place: table[0])
    monkeypatch.setattr(session, "unmount", unmount)
    session.end(Notices(), MOUNT)
    assert caplog.messages == ["cannot unmount /nowhere: not mounted"] * stays
    caplog.clear()


@pytest.mark.mount
def test_the_connection_of_a_mount_may_be_aborted(tmp_path: Path) -> None:
    need_fuse_control()
    stocked = stock(tmp_path / "datastore")
    with mounted(stocked.path, tmp_path / "m") as mount:
        found = mounted_at(mount.place)
        assert found is not None
        number = found.device.partition(":")[2]
        with opened(mount / CONFIGURATION) as fd:
            Path(f"/sys/fs/fuse/connections/{number}/abort").write_text("1")
            wait_until(mount.has_ended, "the process ends, and the mount is detached")
            assert fails_with(errno.ENOTCONN, lambda: os.read(fd, 10))
        assert os.listdir(mount.place) == []
