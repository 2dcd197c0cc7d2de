"""`pbsfs status`: mounts and NBD servers, and whether they answer."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from pbsfs.fuse import mountpoint
from pbsfs.fuse.mountpoint import SILENT_STATE, states
from pbsfs.nbd import servers
from tests.support.mounts import mounted
from tests.support.needs import need, need_root
from tests.support.program import PBSFS, error_of, output_of, run
from tests.support.stocked import IMAGE, Stocked
from tests.support.waiting import wait_until


def at(place: Path | str) -> dict[str, Any]:
    """What the status has about a place."""
    found = [
        entry for entry in json.loads(run([PBSFS, "status", "--json"]).stdout) if entry["place"] == str(place)
    ]
    assert len(found) == 1
    return dict(found[0])


@pytest.mark.mount
def test_a_mount_is_listed_and_whether_it_answers(stocked: Stocked, tmp_path: Path) -> None:
    place = tmp_path / "m"
    with mounted(stocked.path, place, "-o", "fsname=home:") as mount:
        entry = {"kind": "mount", "place": str(place), "source": "home:", "state": "answers"}
        assert at(place) == entry
        row = ["mount", str(place), "home:", "answers"]
        assert row in [line.split() for line in run([PBSFS, "status"]).stdout.splitlines()]
        mount.signal(signal.SIGKILL)
        wait_until(mount.is_dead, "it is dead")
        assert at(place) == entry | {"state": "its process has died"}
        assert "its process has died; clear it with: pbsfs umount" in error_of_status()


def error_of_status() -> str:
    done = run([PBSFS, "status", "--json"])
    return error_of(done, 7)


def test_a_mount_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mountpoint, "ANSWER_PATIENCE", 0.0)
    monkeypatch.setattr(threading.Thread, "start", lambda _thread: None)
    monkeypatch.setattr(threading.Thread, "join", lambda _thread, _limit: None)
    assert states([tmp_path, tmp_path / "b"]) == [SILENT_STATE] * 2


def test_a_mount_that_no_thread_can_ask_is_listed_without_its_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert states([tmp_path]) == ["not asked: can't start new thread"]


def test_a_server_is_listed_with_its_address(stocked: Stocked, tmp_path: Path) -> None:
    need("nbdkit")
    need_root("see all servers")
    show = f"{PBSFS} status --json"
    text = output_of(PBSFS, "nbd", "--datastore-dir", stocked.path, IMAGE, "--run", f'{show}; echo "$uri"')
    listed, _bracket, uri = text.rpartition("]\n")
    entry = next(entry for entry in json.loads(f"{listed}]") if entry["place"] == uri.strip())
    assert (entry["kind"], entry["source"]) == ("nbd", IMAGE)
    assert entry["state"].startswith("process ")


@pytest.mark.parametrize(
    ("words", "address", "path"),
    [
        (["--unix=/run/a b", "python", "/x/nbd_bridge.py", "path="], "nbd+unix:///?socket=/run/a%20b", ""),
        (["--ipaddr=::1", "--port=10810", "python", "nbd_bridge.py", "path=a"], "nbd://[::1]:10810/", "a"),
        (["--port=\u0663", "python", "nbd_bridge.py", "vmid=100"], None, None),
        (["python", "nbd_bridge.py"], None, None),
    ],
)
def test_the_address_is_that_of_the_arguments(
    words: list[str], address: str | None, path: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = [[""], ["bash", "nbd_bridge.py"], ["/usr/bin/nbdkit", "memory", "1G"]]
    for pid, line in enumerate([["/usr/sbin/nbdkit", *words], *others], 7):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_text("".join(f"{word}\0" for word in line))
        (tmp_path / str(pid) / "status").write_text("Name:\tnbdkit\nUid:\t0\t1000\t0\t0\n")
    (tmp_path / "99").mkdir()  # it has ended
    monkeypatch.setattr(servers, "PROC", tmp_path)
    assert list(servers.servers()) == [servers.Server(7, 1000, address, path)]
