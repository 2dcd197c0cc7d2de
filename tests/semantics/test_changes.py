"""What docs/semantics.md promises while backups change: a test for each promise, by its name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from pbsfs.base.names import MANIFEST
from pbsfs.formats import blob
from pbsfs.tree.tree import DEFAULT_REFRESH
from tests.support import damage, made
from tests.support.mounts import SOON, Mounted, fails_with, mounted, opened
from tests.support.serving import access, serving
from tests.support.stocked import (
    CHUNK,
    CONFIGURATION,
    FIRST,
    IMAGE,
    LOG,
    NEWER_IMAGE,
    Stocked,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount


def test_reading_leaves_no_trace(own: Stocked, tmp_path: Path) -> None:
    places = [own.path, *own.path.rglob("*")]
    for place in places:
        os.utime(place, ns=(10**18, 10**18 + 1))  # so old that every access counts, unless none does
    before = [place.lstat() for place in places]
    with mounted(own.path, tmp_path / "m") as mount:
        for path, content in own.contents.items():
            assert (mount / path).read_bytes() == content
        assert len(list(mount.place.rglob("*"))) > len(own.contents)
    after = [place.lstat() for place in places]
    for place, old, new in zip(places, before, after, strict=True):
        assert (place, new.st_atime_ns) == (place, 10**18)
        assert (place, new.st_mtime_ns, new.st_ctime_ns) == (place, old.st_mtime_ns, old.st_ctime_ns)
    assert [own.path, *own.path.rglob("*")] == places


def test_new_backups_appear_within_refresh(own: Stocked, tmp_path: Path) -> None:
    content = made.image(9, "r", tail=3)
    with mounted(own.path, tmp_path / "m", "--refresh", "1") as mount:
        third = made.snapshot(time=made.TIME + 2 * made.DAY)
        assert "2023-11-16T22:13:20Z" not in os.listdir(mount / "vm/100")
        own.writer.add_snapshot(third, {"drive-scsi0.img.fidx": content})
        own.writer.add_snapshot(made.snapshot("300", type="host"), {"a.img.fidx": content})
        finished = time.monotonic()
        wait_until(lambda: "2023-11-16T22:13:20Z" in os.listdir(mount / "vm/100"), "it is listed")
        wait_until(lambda: "host" in os.listdir(mount.place), "a first backup of its type is listed")
        latest = mount / "vm/100/latest"
        wait_until(lambda: latest.readlink() == Path("2023-11-16T22:13:20Z"), "latest follows")
        assert time.monotonic() - finished < DEFAULT_REFRESH
        assert (mount / str(third) / "drive-scsi0.img").read_bytes() == content
        assert (mount / "host/300/latest/a.img").read_bytes() == content


def test_forgotten_backups_go(own: Stocked, tmp_path: Path) -> None:
    content = own.contents[IMAGE]
    with mounted(own.path, tmp_path / "m", *SOON) as mount, (mount / IMAGE).open("rb", buffering=0) as file:
        shutil.rmtree(own.path / FIRST)
        wait_until(lambda: not (mount / FIRST).exists(), "the snapshot is gone")
        assert "2023-11-14T22:13:20Z" not in os.listdir(mount / "vm/100")
        assert fails_with(errno.ENOENT, lambda: (mount / IMAGE).open("rb"))
        assert file.read(len(content) + 1) == content
        shutil.rmtree(own.path / "vm/100")
        wait_until(lambda: not (mount / "vm/100").exists(), "the group is gone")


@pytest.mark.parametrize("kind", ["directory", "server"])
def test_a_backup_made_again_shows_its_new_content(own: Stocked, tmp_path: Path, kind: str) -> None:
    configuration = own.contents[CONFIGURATION].swapcase()  # which is as long, also compressed
    same_size = made.image(77, "r0rr0rtr", tail=1536)
    assert len(same_size) == len(own.contents[IMAGE])
    with ExitStack() as stack:
        source = own.path if kind == "directory" else access(stack.enter_context(serving(own.path)))
        mount = stack.enter_context(mounted(source, tmp_path / "m", *SOON))
        for content in (same_size, made.image(78, "r0r", tail=77)):
            shown = [(mount / path).read_bytes() for path in (IMAGE, CONFIGURATION, LOG)]
            before = stack.enter_context(opened(mount / IMAGE))
            assert os.fstat(before).st_size == len(shown[0])
            shutil.rmtree(own.path / FIRST)
            own.writer.add_snapshot(
                made.snapshot(),
                {"drive-scsi0.img.fidx": content, "qemu-server.conf.blob": configuration},
                chunk_size=CHUNK,
                owner="tester@pbs",
                notes="before the upgrade\nkeep",
                verify_state="ok",
                protected=True,
                client_log=b"made once more\n",
            )
            made_at = time.monotonic()
            wait_until(lambda t=made_at: time.monotonic() > t + 0.2, "the refresh time is over")  # type: ignore[misc]
            assert (mount / IMAGE).read_bytes() == content
            assert (mount / IMAGE).stat().st_size == len(content)
            for path, expected in ((CONFIGURATION, configuration), (LOG, b"made once more\n")):
                assert (mount / path).stat().st_size == len(expected)
                assert (mount / path).read_bytes() == expected
            configuration = b"and another\n"
            assert os.pread(before, len(shown[0]) + 1, 0) == shown[0]  # from the caches
            assert os.fstat(before).st_size == len(shown[0])
        assert mount.log_lines() == []


def test_changed_notes_are_seen(own: Stocked, tmp_path: Path) -> None:
    def attribute(mount: Mounted, path: str, name: str) -> str:
        return os.getxattr(mount / path, f"user.pbs.{name}").decode()

    with mounted(own.path, tmp_path / "m", *SOON) as mount:
        assert attribute(mount, IMAGE, "notes") == "before the upgrade\nkeep"
        path = own.path / FIRST / MANIFEST.filename
        text = json.loads(blob.decode(path.read_bytes(), max_size=1 << 20, encrypted=False))
        text["unprotected"] |= {"notes": "never mind", "verify_state": {"state": "failed", "upid": "UPID:x"}}
        damage.replace(path, blob.encode(json.dumps(text).encode()))
        (own.path / FIRST / ".protected").unlink()
        for place in (FIRST, IMAGE):
            for name, value in (("notes", "never mind"), ("verify_state", "failed"), ("protected", "false")):
                wait_until(
                    lambda p=place, n=name, v=value: attribute(mount, p, n) == v,  # type: ignore[misc]
                    f"{name} of {place} is {value}",
                )


def test_a_vanished_datastore_is_an_error(own: Stocked, tmp_path: Path) -> None:
    away = tmp_path / "away"
    with mounted(own.path, tmp_path / "m", *SOON) as mount, (mount / IMAGE).open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert os.pread(file.fileno(), 10, 0) == own.contents[IMAGE][:10]
        own.path.rename(away)
        for place in (mount.place, mount / "vm", mount / "vm/100"):
            wait_until(lambda p=place: fails_with(errno.EIO, lambda: os.listdir(p)), f"{place} is an error")  # type: ignore[misc]
        assert fails_with(errno.EIO, lambda: os.pread(file.fileno(), 10, 5 * CHUNK))
        own.path.mkdir()  # as where a disk was mounted
        for _ in range(3):
            assert fails_with(errno.EIO, lambda: os.listdir(mount.place))
        own.path.rmdir()
        away.rename(own.path)
        wait_until((mount / IMAGE).exists, "it is back")
        assert os.pread(file.fileno(), 10, 5 * CHUNK) == own.contents[IMAGE][5 * CHUNK :][:10]
        assert (mount / NEWER_IMAGE).read_bytes() == own.contents[NEWER_IMAGE]
        assert all(str(own.path) in line for line in mount.log_lines())
