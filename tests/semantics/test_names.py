"""What docs/semantics.md promises of names and attributes: a test for each promise, by its name."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from pbsfs.base.names import MANIFEST
from tests.support import damage, made
from tests.support.handles import FileHandle, drop_caches
from tests.support.mounts import SOON, Mounted, fails_with, mounted
from tests.support.needs import need, need_root
from tests.support.program import PBSFS, environment, output_of, run
from tests.support.serving import access, serving
from tests.support.stocked import (
    ARCHIVE,
    CHUNK,
    CONFIGURATION,
    ENCRYPTED,
    FIRST,
    IMAGE,
    IN_NAMESPACE,
    LOG,
    NEWER_IMAGE,
    SECOND,
    Stocked,
    stock,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount


def test_names_have_no_storage_suffix(mount: Mounted) -> None:
    assert sorted(os.listdir(mount.place)) == ["ct", "ns", "vm"]
    assert sorted(os.listdir(mount / FIRST)) == [
        "client.log",
        "drive-scsi0.img",
        "index.json",
        "qemu-server.conf",
    ]
    assert sorted(os.listdir((mount / ARCHIVE).parent)) == ["index.json", "root.pxar"]
    assert os.listdir(mount / "ns/prod/vm") == ["100"]
    assert json.loads((mount / FIRST / "index.json").read_bytes())["backup-id"] == "100"


def test_latest_is_the_newest_readable_snapshot(own: Stocked, tmp_path: Path) -> None:
    with mounted(own.path, tmp_path / "m", *SOON) as mount:
        latest = mount / "vm/100/latest"
        assert latest.readlink() == Path("2023-11-15T22:13:20Z")
        assert (latest / "drive-scsi0.img").read_bytes() == own.contents[NEWER_IMAGE]
        damage.flip_bit(own.path / SECOND / MANIFEST.filename, 8 * 20)
        wait_until(lambda: latest.readlink() == Path("2023-11-14T22:13:20Z"), "it is the one before")
        (line,) = mount.log_lines()
        assert SECOND in line


@pytest.mark.parametrize("from_server", [False, True], ids=["directory", "server"])
def test_snapshots_are_found_with_and_without_colons(
    own: Stocked, tmp_path: Path, *, from_server: bool
) -> None:
    looks_like_a_time = "2023-11-14T22-13-20Z"
    own.writer.add_snapshot(made.snapshot(looks_like_a_time, type="host"), {"note.conf.blob": b"text"})
    with ExitStack() as stack:
        source: Path | dict[str, str] = own.path
        if from_server:
            source = access(stack.enter_context(serving(own.path)))
        usual = stack.enter_context(mounted(source, tmp_path / "usual", files=True))
        safe = stack.enter_context(mounted(source, tmp_path / "safe", "-o", "safe_names", files=True))
        colons = ["2023-11-14T22:13:20Z", "2023-11-15T22:13:20Z"]
        dashes = [name.replace(":", "-") for name in colons]
        for mount, shown, other in ((usual, colons, dashes), (safe, dashes, colons)):
            for below in ("vm/100", "files/vm/100"):
                group = mount / below
                assert sorted(os.listdir(group)) == [*shown, "latest"]
                assert (group / "latest").readlink() == Path(shown[-1])
                assert (group / "latest").lstat().st_size == len(shown[-1])
                found = {entry.name: entry.inode() for entry in os.scandir(group)}
                for name, hidden in zip(shown, other, strict=True):
                    for form in (hidden, name, hidden):
                        assert (group / form).stat().st_ino == found[name]
                        assert (group / form).is_dir()
                        assert not (group / form).is_symlink()
                assert sorted(os.listdir(group)) == [*shown, "latest"]
            for path in (IMAGE, IMAGE.replace(":", "-")):
                assert (mount / path).read_bytes() == own.contents[IMAGE]
                assert os.getxattr(mount / path, "user.pbs.backup_time") == b"2023-11-14T22:13:20Z"
            assert os.listdir(mount / "host") == [looks_like_a_time]
            assert not (mount / "host" / looks_like_a_time.replace("22-13-20", "22:13:20")).exists()
            for wrong in ("2023-11-14T22-13:20Z", "2023-11-14T22-13-21Z", "2023-11-14T22_13_20Z"):
                assert not (mount / "vm/100" / wrong).exists()
            with os.scandir(mount / "vm/100" / shown[0]) as inside:
                numbers = {entry.name: entry.inode() for entry in inside}
            with os.scandir(mount / "vm/100" / other[0]) as inside:
                assert {entry.name: entry.inode() for entry in inside} == numbers
        assert (usual / FIRST).stat().st_ino == (safe / FIRST).stat().st_ino
        # A directory in use has one name at a time, and whichever it has, programs in it go on.
        place = os.open(safe / "vm/100" / colons[0], os.O_PATH)
        try:
            for form in (dashes[0], colons[0]):
                assert (safe / "vm/100" / form).is_dir()
                assert Path(os.readlink(f"/proc/self/fd/{place}")).name in (colons[0], dashes[0])
                assert os.stat("qemu-server.conf", dir_fd=place).st_size == len(own.contents[CONFIGURATION])
        finally:
            os.close(place)
        named = source if isinstance(source, dict) else environment(PBSFS_DATASTORE_DIR=str(source))
        for typed in (
            f"vm/100/{dashes[0]}",
            safe / FIRST,
            safe / "vm/100" / dashes[0],
            usual / "vm/100" / dashes[0],
        ):
            assert "drive-scsi0.img" in output_of(PBSFS, "ls", typed, env=named)
        place_below = tmp_path / "below"
        with mounted(source, place_below, "--subtree", f"files/vm/100/{dashes[0]}", files=True) as part:
            assert (part / "qemu-server.conf").read_bytes() == own.contents[CONFIGURATION]


def test_unfinished_backups_are_not_shown(own: Stocked, tmp_path: Path) -> None:
    shutil.rmtree(own.path / "ct")
    (own.path / SECOND / MANIFEST.filename).rename(tmp_path / "manifest")
    with mounted(own.path, tmp_path / "m", *SOON) as mount:
        assert sorted(os.listdir(mount / "vm/100")) == ["2023-11-14T22:13:20Z", "latest"]
        assert not (mount / SECOND).exists()
        assert os.getxattr(mount / "vm/100", "user.pbs.last_backup") == b"2023-11-14T22:13:20Z"
        assert os.getxattr(mount / "vm/100", "user.pbs.backup_count") == b"1"
        assert (mount / "vm/100/latest").readlink() == Path("2023-11-14T22:13:20Z")
        (line,) = mount.log_lines()
        assert SECOND in line


def test_broken_snapshots_hide_nothing(own: Stocked, tmp_path: Path) -> None:
    damage.truncate(own.path / SECOND / MANIFEST.filename, 30)
    (own.path / f"{IN_NAMESPACE}.fidx").unlink()
    with mounted(own.path, tmp_path / "m") as mount:
        assert "2023-11-15T22:13:20Z" in os.listdir(mount / "vm/100")
        for _ in range(2):
            assert fails_with(errno.EIO, lambda: os.listdir(mount / SECOND))
            assert fails_with(errno.EIO, lambda: (mount / IN_NAMESPACE).open("rb"))
        assert (mount / IN_NAMESPACE).stat().st_size == len(own.contents[IN_NAMESPACE])
        assert (mount / IN_NAMESPACE).with_name("index.json").read_bytes()
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        lines = mount.log_lines()
        assert len([line for line in lines if SECOND in line and "unreadable manifest" in line]) == 1
        assert any(IN_NAMESPACE in line and "missing" in line for line in lines)


def test_changed_names_hide_no_backup(own: Stocked, tmp_path: Path) -> None:
    for path in (SECOND, "ct/200/2023-11-14T22:13:20Z"):
        (own.path / path).rename(own.path / path.replace(":", "_"))
    with mounted(own.path, tmp_path / "m", *SOON) as mount:
        for _ in range(2):
            assert sorted(os.listdir(mount / "vm/100")) == ["2023-11-14T22:13:20Z", "latest"]
            assert fails_with(errno.EIO, lambda: os.listdir(mount / "ct/200"))
        lines = [line for line in mount.log_lines() if "copying changed them" in line]
        assert len([line for line in lines if f"{own.path}/vm/100: " in line]) == 1
        assert len([line for line in lines if f"{own.path}/ct/200: " in line]) == 1
        (own.path / SECOND.replace(":", "_")).rename(own.path / SECOND)
        wait_until((mount / SECOND).exists, "the name is right again")


def test_links_in_a_datastore_are_not_followed(own: Stocked, tmp_path: Path) -> None:
    other = stock(tmp_path / "other")
    for path in (SECOND, "ct/200", f"{CONFIGURATION}.blob"):
        (own.path / path).rename(tmp_path / path.replace("/", "-"))
        (own.path / path).symlink_to(other.path / path)
    with mounted(own.path, tmp_path / "m") as mount:
        assert not (mount / SECOND).exists()
        assert not (mount / "ct").exists()
        assert fails_with(errno.EIO, (mount / CONFIGURATION).read_bytes)
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        lines = mount.log_lines()
        for path in (SECOND, "ct/200", f"{CONFIGURATION}.blob"):
            assert any(f"{own.path / path}" in line and "symbolic link" in line for line in lines)


def test_inode_numbers_are_stable(own: Stocked, tmp_path: Path) -> None:
    def numbers(mount: Mounted) -> dict[str, int]:
        found = {".": mount.place.stat().st_ino}
        for directory, names, files in os.walk(mount.place):
            for name in (*names, *files):
                path = Path(directory, name)
                found[str(path.relative_to(mount.place))] = path.lstat().st_ino
            listed = {entry.name: entry.inode() for entry in os.scandir(directory)}
            assert all(Path(directory, name).lstat().st_ino == number for name, number in listed.items())
        return found

    with mounted(own.path, tmp_path / "m", *SOON) as mount:
        first = numbers(mount)
        assert numbers(mount) == first
    with mounted(own.path, tmp_path / "m2") as mount:
        assert numbers(mount) == first
    assert len(first) > len(own.contents)
    assert len(set(first.values())) == len(first)


def test_link_counts_are_one(own: Stocked, tmp_path: Path) -> None:
    with mounted(own.path, tmp_path / "m") as mount:
        listed = output_of("ls", "-l", str(mount / "ns")).splitlines()[1:]
        assert [line.split()[1] for line in listed] == ["1"]
        for directory, names, files in os.walk(mount.place):
            assert os.stat(directory).st_nlink == 1
            assert all(Path(directory, name).lstat().st_nlink == 1 for name in (*names, *files))
        # Programs that count on 2 and one for each directory inside take that for "not counted".
        found = output_of("find", str(mount.place), "-type", "f").splitlines()
        assert sorted(found) == sorted(
            str(Path(directory, name))
            for directory, _names, files in os.walk(mount.place)
            for name in files
            if not Path(directory, name).is_symlink()
        )


def test_file_handles_outlive_the_kernels_memory(own: Stocked, tmp_path: Path) -> None:
    need_root("open files by handle, and make the kernel drop what it keeps")
    with mounted(own.path, tmp_path / "m") as mount:
        handles = {path: FileHandle(mount / path) for path in own.contents}
        drop_caches()
        for path, handle in handles.items():
            with os.fdopen(handle.open(mount.place), "rb") as file:
                assert file.read() == own.contents[path]


def test_times_are_backup_times(own: Stocked, tmp_path: Path) -> None:
    before = int(time.time())
    with mounted(own.path, tmp_path / "m") as mount:
        for path in (IMAGE, CONFIGURATION, LOG, FIRST):
            assert (mount / path).stat().st_mtime == made.TIME
        for path in (NEWER_IMAGE, SECOND, "vm/100", "vm"):
            assert (mount / path).stat().st_mtime == made.TIME + made.DAY
        assert (mount / "ct").stat().st_mtime == made.TIME
        assert before <= mount.place.stat().st_mtime <= time.time()


def test_modes_follow_uid_gid_umask(own: Stocked, mount: Mounted, tmp_path: Path) -> None:
    def modes(where: Mounted) -> set[tuple[int, int, int]]:
        found = [(where / path).stat() for path in ("vm", FIRST, IMAGE, CONFIGURATION)]
        return {(s.st_mode, s.st_uid, s.st_gid) for s in found}

    me = (os.getuid(), os.getgid())
    assert modes(mount) == {(stat.S_IFDIR | 0o550, *me), (stat.S_IFREG | 0o440, *me)}
    with mounted(own.path, tmp_path / "m", "-o", f"uid={me[0]},gid=4321,umask=022") as other:
        other_me = (me[0], 4321)
        assert modes(other) == {(stat.S_IFDIR | 0o555, *other_me), (stat.S_IFREG | 0o444, *other_me)}


def test_others_stay_outside(own: Stocked, tmp_path: Path) -> None:
    need_root("become another user")
    need("setpriv")
    tmp_path.chmod(0o755)  # and relative paths, so that what is above does not matter

    def as_nobody(*command: str) -> subprocess.CompletedProcess[str]:
        drop = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        return run([*drop, *command], cwd=tmp_path)

    assert as_nobody("ls", "datastore/vm").returncode == 0
    for place, options, is_let_in in (
        ("m", "umask=0", False),
        ("m2", "umask=0,allow_other", True),
        ("m3", "allow_other", False),
        ("m4", "allow_other,uid=65534", True),
    ):
        with mounted(own.path, tmp_path / place, "-o", options):
            done = as_nobody("cmp", f"{place}/{LOG}", f"{place}/{LOG}")
            assert (done.returncode == 0) is is_let_in, options
            assert is_let_in or "Permission denied" in done.stderr


def test_a_mount_tells_its_source(mount: Mounted, stocked: Stocked, tmp_path: Path) -> None:
    told = {"datastore_dir": str(stocked.path), "namespace": "", "subtree": ""}
    name = "user.pbs.source"
    assert os.listxattr(mount.place)[0] == name
    for path in ("", "vm", IMAGE):
        assert json.loads(os.getxattr(mount / path, name)) == told
        assert name not in os.listxattr(mount / path) or not path
    with serving(stocked.path) as server, mounted(access(server), tmp_path / "m", "--ns=prod") as other:
        told = {
            "repository": server.repository("reader@pbs"),
            "fingerprint": server.fingerprint.replace(":", "").lower(),
            "namespace": "prod",
            "subtree": "",
        }
        assert json.loads(os.getxattr(other.place, name)) == told


def test_attributes_tell_of_the_backup(mount: Mounted, stocked: Stocked) -> None:
    def attributes(path: str) -> dict[str, str]:
        names = os.listxattr(mount / path)
        assert all(name.startswith("user.pbs.") for name in names)
        return {name[9:]: os.getxattr(mount / path, name).decode() for name in names}

    snapshot = {
        "namespace": "",
        "backup_type": "vm",
        "backup_id": "100",
        "backup_time": "2023-11-14T22:13:20Z",
        "owner": "root@pam",  # of the group: that of its last backup
        "protected": "true",
        "verify_state": "ok",
        "notes": "before the upgrade\nkeep",
        "crypt_mode": "none",
    }
    size = len(stocked.contents[IMAGE])
    image = snapshot | {"archive": "drive-scsi0.img.fidx", "size": str(size), "chunk_size": str(CHUNK)}
    assert attributes(IMAGE) == image
    assert attributes(FIRST).items() >= snapshot.items()
    assert attributes(ENCRYPTED)["crypt_mode"] == "encrypt"
    assert attributes(ENCRYPTED)["key_fingerprint"] == made.KEY.fingerprint
    assert attributes("ns/prod/vm")["namespace"] == "prod"
    assert attributes("vm/100")["backup_count"] == "2"
    assert attributes("vm/100")["last_backup"] == "2023-11-15T22:13:20Z"
    assert fails_with(errno.ENODATA, lambda: os.getxattr(mount / IMAGE, "user.pbs.nonsense"))
