"""What docs/semantics.md promises of a mount: a test for each promise, by its name."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pbsfs.base.names import MANIFEST, Namespace
from pbsfs.formats import blob
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode
from pbsfs.fuse.mountpoint import mounted_at
from pbsfs.testing.writer import DatastoreWriter
from pbsfs.tree.tree import DEFAULT_REFRESH
from tests.fuse import (
    test_semantics_cache,
    test_semantics_disks,
    test_semantics_files,
    test_semantics_restore,
)
from tests.support import damage, made, mounts
from tests.support.handles import FileHandle, drop_caches
from tests.support.keyfiles import PASSWORD, key_file
from tests.support.large import large_images
from tests.support.mounts import Mounted, cleaned_up, fails_with, mounted, opened, read_at, refusal
from tests.support.needs import need, need_fuse, need_root
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs, run
from tests.support.server import READER, ReferenceServer
from tests.support.server.releases import PBS_4
from tests.support.serving import SECRET, STORE, TOKEN, access, serving
from tests.support.stocked import (
    ARCHIVE,
    CHUNK,
    CONFIGURATION,
    ENCRYPTED,
    FIRST,
    IMAGE,
    IN_NAMESPACE,
    LAYOUT,
    LOG,
    NEWER_IMAGE,
    SECOND,
    Stocked,
    stock,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount

SOON = ("--refresh", "0.1")
DOCUMENT = Path(__file__).parents[2] / "docs" / "semantics.md"


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Stocked:
    """A datastore that no test changes."""
    return stock(tmp_path_factory.mktemp("stocked") / "datastore")


@pytest.fixture(scope="module")
def mount(stocked: Stocked, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    """Its mount, for tests that only look; nothing may be logged."""
    with mounted(stocked.path, tmp_path_factory.mktemp("mount") / "m") as found:
        yield found


@pytest.fixture
def own(tmp_path: Path) -> Stocked:
    """A datastore of the test's own, to change."""
    return stock(tmp_path / "datastore")


# --- the document itself


def test_promises_and_tests_have_the_same_names() -> None:
    promises = re.findall(r"^- \*\*`(\w+)`\*\*:", DOCUMENT.read_text(), re.MULTILINE)
    names = [
        *globals(),
        *vars(test_semantics_files),
        *vars(test_semantics_disks),
        *vars(test_semantics_restore),
        *vars(test_semantics_cache),
    ]
    tests = [name.removeprefix("test_") for name in names if name.startswith("test_")]
    tests.remove("promises_and_tests_have_the_same_names")
    for module in ("semantics_cache", "semantics_files", "semantics_disks", "semantics_restore"):
        tests.remove(module)
    assert len(promises) == len(set(promises)) > 0
    assert sorted(promises) == sorted(tests)


# --- reading


def test_reads_equal_the_backup(mount: Mounted, stocked: Stocked) -> None:
    for path, content in stocked.contents.items():
        assert (mount / path).read_bytes() == content
    content = stocked.contents[IMAGE]
    places = random.Random(5)
    ranges = [(places.randrange(len(content) + 10), places.randrange(1, 3 * CHUNK)) for _ in range(200)]

    def read(part: tuple[int, int]) -> bool:
        offset, size = part
        return read_at(mount / IMAGE, offset, size) == content[offset : offset + size]

    with ThreadPoolExecutor(8) as readers:
        assert all(readers.map(read, ranges))


def test_writes_fail_with_erofs(mount: Mounted) -> None:
    image, new = mount / IMAGE, mount / "vm/new"
    before = image.stat()
    attempts: list[Callable[[], Any]] = [
        lambda: image.open("r+b"),
        lambda: image.open("ab"),
        lambda: image.open("wb"),
        lambda: os.truncate(image, 0),
        lambda: new.write_bytes(b""),
        new.mkdir,
        lambda: new.symlink_to("latest"),
        lambda: os.link(image, image.with_name("second")),
        lambda: os.mkfifo(new),
        image.unlink,
        (mount / FIRST).rmdir,
        lambda: image.rename(image.with_name("other")),
        lambda: image.chmod(0o600),
        lambda: os.chown(image, os.getuid(), os.getgid()),
        lambda: os.utime(image, (0, 0)),
        lambda: os.setxattr(image, "user.pbs.notes", b"mine"),
        lambda: os.removexattr(image, "user.pbs.owner"),
    ]
    for number, attempt in enumerate(attempts):
        assert fails_with(errno.EROFS, attempt), f"attempt {number} succeeded"
    assert image.stat() == before


def test_damage_fails_only_what_touches_it(own: Stocked, tmp_path: Path) -> None:
    content = own.contents[IMAGE]
    digest = hashlib.sha256(content[CHUNK : 2 * CHUNK]).digest()
    damage.flip_bit(own.writer.chunk_path(digest), 8 * 1000)
    with mounted(own.path, tmp_path / "m") as mount:
        for _ in range(3):
            for offset in range(0, len(content), CHUNK // 2):
                is_damaged = CHUNK <= offset < 2 * CHUNK
                part = content[offset : offset + CHUNK // 2]
                if is_damaged:
                    assert fails_with(errno.EIO, lambda at=offset: read_at(mount / IMAGE, at, CHUNK // 2))  # type: ignore[misc]
                else:
                    assert read_at(mount / IMAGE, offset, CHUNK // 2) == part
        assert (mount / NEWER_IMAGE).read_bytes() == own.contents[NEWER_IMAGE]
        (line,) = mount.log_lines()
        assert digest.hex() in line
        assert IMAGE in line  # which is the snapshot and the image's name


def test_chunks_that_are_elsewhere_are_not_damage(own: Stocked, tmp_path: Path) -> None:
    kept = own.writer.chunk_path(hashlib.sha256(own.contents[IMAGE][:CHUNK]).digest())
    for chunk in own.path.glob(".chunks/*/*"):
        if chunk != kept:
            os.truncate(chunk, 0)
    with mounted(own.path, tmp_path / "m", "--on-damage", "zero") as mount:
        assert read_at(mount / IMAGE, 0, 4096) == own.contents[IMAGE][:4096]
        assert fails_with(errno.EIO, (mount / IMAGE).read_bytes)
        assert (mount / CONFIGURATION).read_bytes() == own.contents[CONFIGURATION]
        assert os.getxattr(mount / IMAGE, "user.pbs.damaged_ranges") == b""
        lines = mount.log_lines()
        assert "is the cache of a datastore in an object store" in lines[0]
        assert any("is not here" in line for line in lines[1:])


def test_encrypted_files_need_their_key(own: Stocked, tmp_path: Path) -> None:
    with mounted(own.path, tmp_path / "m") as mount:
        assert (mount / ENCRYPTED).stat().st_size == 2 * CHUNK + 5
        for _ in range(2):
            assert fails_with(errno.EACCES, lambda: (mount / ENCRYPTED).open("rb"))
        (line,) = mount.log_lines()
        assert ENCRYPTED in line
        assert made.KEY.fingerprint in line


def keys_in(directory: Path, **keys: Key) -> str:
    """The option that gives some keys, which lie in `directory` after that."""
    directory.mkdir()
    for name, key in keys.items():
        (directory / f"{name}.json").write_bytes(key_file(key=key.reveal()))
    return f"--keyfile={directory}"


SEALED = made.image(4, "r0", tail=5)
"""What `ENCRYPTED` holds."""


def test_damage_reads_as_zeros_where_asked(own: Stocked, tmp_path: Path) -> None:
    content = own.contents[IMAGE]
    shown = content[:CHUNK] + bytes(CHUNK) + content[2 * CHUNK :]
    digest = hashlib.sha256(content[CHUNK : 2 * CHUNK]).digest()
    chunk = own.writer.chunk_path(digest)
    whole = chunk.read_bytes()
    damage.flip_bit(chunk, 8 * 1000)
    with mounted(own.path, tmp_path / "m", "--on-damage", "zero") as mount:
        for _ in range(3):
            assert (mount / IMAGE).read_bytes() == shown
        assert os.getxattr(mount / IMAGE, "user.pbs.damaged_ranges") == b"%d+%d" % (CHUNK, CHUNK)
        (line,) = mount.log_lines()
        for part in (IMAGE, f"bytes {CHUNK} to {2 * CHUNK - 1}", f"{CHUNK} bytes", digest.hex()):
            assert part in line
        damage.replace(chunk, whole)
        wait_until(lambda: (mount / IMAGE).read_bytes() == content, "what was repaired is seen")
    assert mount.log_lines()[-1].endswith(f"{IMAGE}: {CHUNK}+{CHUNK}")


def test_zeros_never_stand_for_more_than_chunks(own: Stocked, tmp_path: Path) -> None:
    damage.flip_bit(own.path / f"{IMAGE}.fidx", 8 * 4100)
    damage.flip_bit(own.path / f"{CONFIGURATION}.blob", 8 * 14)
    damage.flip_bit(own.path / SECOND / MANIFEST.filename, 8 * 20)
    with mounted(own.path, tmp_path / "m", "--on-damage", "zero") as mount:
        for path in (IMAGE, CONFIGURATION):
            assert fails_with(errno.EIO, lambda p=path: (mount / p).open("rb"))  # type: ignore[misc]
        assert fails_with(errno.EIO, lambda: os.listdir(mount / SECOND))
        assert fails_with(errno.EACCES, lambda: (mount / ENCRYPTED).open("rb"))
        with (mount / IN_NAMESPACE).open("rb", buffering=0) as file:
            own.path.rename(tmp_path / "away")
            assert fails_with(errno.EIO, lambda: file.read(10))
        assert len(mount.log_lines()) >= 5
        assert not any("shown as zeros" in line for line in mount.log_lines())


def test_encrypted_files_read_like_others_with_their_key(own: Stocked, tmp_path: Path) -> None:
    other = made.image(5, "0r", tail=9)
    snapshot = made.snapshot("102")
    files = {"drive-scsi0.img.fidx": other, "a.conf.blob": b"a" * 100}
    mode = CryptMode.ENCRYPT
    own.writer.add_snapshot(snapshot, files, crypt_mode=mode, key=made.OTHER_KEY, chunk_size=CHUNK)
    keys = keys_in(tmp_path / "keys", first=made.KEY, second=made.OTHER_KEY)
    with mounted(own.path, tmp_path / "m", keys) as mount:
        for path, content in ((ENCRYPTED, SEALED), (f"{snapshot}/drive-scsi0.img", other)):
            found = (mount / path).stat()
            assert (mount / path).read_bytes() == content
            assert (found.st_size, found.st_blocks) == (len(content), -(-(len(content) - CHUNK) // 512))
        with (mount / ENCRYPTED).open("rb") as file:
            assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == CHUNK
        assert (mount / str(snapshot) / "a.conf").read_bytes() == b"a" * 100
        for path, content in own.contents.items():
            assert (mount / path).read_bytes() == content


# --- signatures


def change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest of the snapshot in the directory `path`, as who does not have the key can."""
    file = path / MANIFEST.filename
    data = json.loads(blob.decode(file.read_bytes(), max_size=1 << 20, encrypted=False))
    change(data)
    damage.replace(file, blob.encode(json.dumps(data).encode()))


def test_a_manifest_that_was_changed_is_refused(own: Stocked, tmp_path: Path) -> None:
    group = (own.path / ENCRYPTED).parent.parent
    genuine = (own.path / ENCRYPTED).parent

    def drop(*names: str) -> Callable[[dict[str, Any]], object]:
        return lambda data: [data.pop(name) for name in names]

    changes: list[Callable[[dict[str, Any]], object]] = [
        drop("signature"),
        lambda data: data["files"][0].update(size=5),
        lambda data: data["files"][0].update({"crypt-mode": "none"}),
        lambda data: data.update({"backup-time": made.TIME + 1}),  # as it would have to be here
    ]
    copies = [group / f"2023-11-14T22:13:{30 + number}Z" for number in range(len(changes))]
    for copy, change in zip(copies, changes, strict=True):
        shutil.copytree(genuine, copy)
        change_manifest(copy, change)
    shutil.copytree(genuine, group / "2023-11-14T22:13:50Z")  # signed, but of another time
    names = [path.name for path in (*copies, group / "2023-11-14T22:13:50Z")]
    with mounted(own.path, tmp_path / "m", keys_in(tmp_path / "keys", key=made.KEY)) as mount:
        for name in names:
            path = mount / "vm/101" / name / "drive-scsi0.img"
            assert fails_with(errno.EIO, lambda p=path: p.open("rb")), name  # type: ignore[misc]
            assert any(name in line and "index.json" in line for line in mount.log_lines())
        assert (mount / ENCRYPTED).read_bytes() == SEALED


def test_an_index_that_was_swapped_is_refused(own: Stocked, tmp_path: Path) -> None:
    evil = made.image(6, "r0", tail=5)
    path = own.writer.add_snapshot(made.snapshot("999"), {"x.img.fidx": evil}, chunk_size=CHUNK)
    (own.path / f"{ENCRYPTED}.fidx").write_bytes((path / "x.img.fidx").read_bytes())
    signed = made.image(7, "rr")
    snapshot = made.snapshot("102")
    sealed = own.writer.add_snapshot(
        snapshot, {"x.img.fidx": signed}, crypt_mode=CryptMode.ENCRYPT, key=made.KEY, chunk_size=CHUNK
    )
    digest = made.KEY.digest(signed[:CHUNK])
    damage.replace(own.writer.chunk_path(digest), blob.encode(signed[:CHUNK]))
    assert sealed.is_dir()
    with mounted(own.path, tmp_path / "m", keys_in(tmp_path / "keys", key=made.KEY)) as mount:
        assert fails_with(errno.EIO, lambda: (mount / ENCRYPTED).open("rb"))
        image = mount / str(snapshot) / "x.img"
        assert fails_with(errno.EIO, lambda: read_at(image, 0, 10))
        assert read_at(image, CHUNK, 10) == signed[CHUNK:][:10]
        first, second = mount.log_lines()
        assert "checksum differs from the manifest" in first
        assert "not encrypted" in second


def test_what_another_key_signed_is_refused(own: Stocked, tmp_path: Path) -> None:
    signed = made.snapshot("102")
    files = {"x.img.fidx": made.image(7, "r")}
    own.writer.add_snapshot(signed, files, crypt_mode=CryptMode.SIGN_ONLY, key=made.KEY)
    with mounted(own.path, tmp_path / "m", keys_in(tmp_path / "keys", key=made.OTHER_KEY)) as mount:
        for path in (ENCRYPTED, f"{signed}/x.img"):
            assert fails_with(errno.EACCES, lambda p=path: (mount / p).open("rb"))  # type: ignore[misc]
        for path, content in own.contents.items():
            assert (mount / path).read_bytes() == content
        lines = mount.log_lines()
        assert len(lines) == 2
        assert all(made.KEY.fingerprint in line for line in lines)


def test_keys_stay_in_the_process(own: Stocked, tmp_path: Path) -> None:
    need_root("look into the process of a mount")
    (path := tmp_path / "key.json").write_bytes(key_file("scrypt"))
    log = tmp_path / "m.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mounts, "environment", lambda: environment(PBS_ENCRYPTION_PASSWORD=PASSWORD))
        with mounted(own.path, tmp_path / "m", f"--keyfile={path}", "--log-level", "debug") as mount:
            assert (mount / ENCRYPTED).read_bytes() == SEALED
            process = Path(f"/proc/{mount.pid}")
            seen = [(process / name).read_bytes() for name in ("cmdline", "environ")] + [log.read_bytes()]
            for secret in (PASSWORD.encode(), made.KEY.reveal(), made.KEY.reveal().hex().encode()):
                assert not any(secret in text for text in seen)
            assert b64encode(made.KEY.reveal()) not in b"".join(seen)
            line = (process / "limits").read_text().partition("Max core file size")[2]
            assert line.split()[:2] == ["0", "0"]
            mount.log_lines()


# --- sizes and holes


def test_sizes_are_exact(mount: Mounted, stocked: Stocked) -> None:
    sizes = {path: (mount / path).stat().st_size for path in stocked.contents}
    assert sizes == {path: len(content) for path, content in stocked.contents.items()}


def test_blocks_count_only_data(mount: Mounted, stocked: Stocked) -> None:
    data = LAYOUT.replace("0", "")
    assert (mount / IMAGE).stat().st_blocks == (len(data) * CHUNK + 1536) // 512
    assert (mount / ARCHIVE).stat().st_blocks == -(-len(stocked.contents[ARCHIVE]) // 512)
    assert (mount / CONFIGURATION).stat().st_blocks == -(-len(stocked.contents[CONFIGURATION]) // 512)
    assert (mount / ENCRYPTED).stat().st_blocks == -(-(2 * CHUNK + 5) // 512)
    shown = int(output_of("du", "--block-size=1", str(mount / IMAGE)).split()[0])
    assert shown == len(data) * CHUNK + 1536


def test_holes_are_found_by_seeking(mount: Mounted, stocked: Stocked) -> None:
    size = len(stocked.contents[IMAGE])
    with (mount / IMAGE).open("rb") as file:

        def seek(offset: int, whence: int) -> int:
            return os.lseek(file.fileno(), offset, whence)

        # rr00tr0r and a tail
        assert seek(0, os.SEEK_DATA) == 0
        assert seek(0, os.SEEK_HOLE) == 2 * CHUNK
        assert seek(2 * CHUNK - 1, os.SEEK_DATA) == 2 * CHUNK - 1
        assert seek(2 * CHUNK, os.SEEK_DATA) == 4 * CHUNK
        assert seek(3 * CHUNK + 5, os.SEEK_HOLE) == 3 * CHUNK + 5
        assert seek(4 * CHUNK, os.SEEK_HOLE) == 6 * CHUNK
        assert seek(6 * CHUNK + 1, os.SEEK_DATA) == 7 * CHUNK
        assert seek(7 * CHUNK, os.SEEK_HOLE) == size
        assert seek(size - 1, os.SEEK_DATA) == size - 1
        for offset, whence in ((size, os.SEEK_DATA), (size, os.SEEK_HOLE), (size + 9, os.SEEK_HOLE)):
            assert fails_with(errno.ENXIO, lambda at=offset, how=whence: seek(at, how))  # type: ignore[misc]
    with (mount / CONFIGURATION).open("rb") as blob_file:
        assert os.lseek(blob_file.fileno(), 1, os.SEEK_HOLE) == len(stocked.contents[CONFIGURATION])


def test_copies_stay_sparse(mount: Mounted, stocked: Stocked, tmp_path: Path) -> None:
    copy = tmp_path / "copy.img"
    output_of("cp", str(mount / IMAGE), str(copy))
    assert copy.read_bytes() == stocked.contents[IMAGE]
    assert copy.stat().st_blocks * 512 < len(stocked.contents[IMAGE]) - 2 * CHUNK


# --- names and attributes


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


# --- what changes while it is mounted


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


# --- from a server


@pytest.fixture
def server(own: Stocked) -> Iterator[ReferenceServer]:
    """A server over the test's own datastore."""
    with serving(own.path) as found:
        yield found


def test_what_a_server_has_not_told_is_learned_by_opening(
    server: ReferenceServer, own: Stocked, tmp_path: Path
) -> None:
    size = len(own.contents[IMAGE])
    with mounted(access(server), tmp_path / "m") as mount:

        def told(path: str) -> tuple[int, int]:
            found = (mount / path).stat()
            return found.st_size, found.st_blocks

        assert told(IMAGE) == (size, -(-size // 512))
        for path, content in own.contents.items():
            assert (mount / path).stat().st_size == len(content)
            assert (mount / path).read_bytes() == content
        assert told(IMAGE) == (size, (len(LAYOUT.replace("0", "")) * CHUNK + 1536) // 512)
        for path, content in own.contents.items():  # from the kernel's cache now
            assert (mount / path).read_bytes() == content
    with mounted(access(server), tmp_path / "m2") as mount:
        output_of("cp", str(mount / IMAGE), str(tmp_path / "copy"))
        assert (tmp_path / "copy").read_bytes() == own.contents[IMAGE]
        assert (tmp_path / "copy").stat().st_blocks * 512 < size - 2 * CHUNK
        with (mount / NEWER_IMAGE).open("rb") as file:
            assert os.lseek(file.fileno(), 0, os.SEEK_DATA) == CHUNK


MAP = """
import mmap, os, sys
fd = os.open(sys.argv[2], os.O_RDONLY)
with mmap.mmap(fd, 0, getattr(mmap, sys.argv[1]), mmap.PROT_READ) as found:
    sys.stdout.buffer.write(found)
"""


def test_files_can_be_mapped_and_sent(server: ReferenceServer, own: Stocked, tmp_path: Path) -> None:
    def mapped(path: Path, flags: str) -> bytes:
        # In a process of its own: the server here could not answer while Python waits for a page.
        command = [sys.executable, "-c", MAP, flags, str(path)]
        return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout

    def sent(path: Path) -> bytes:
        with opened(path) as fd, (tmp_path / "sent").open("wb") as out:
            while os.sendfile(out.fileno(), fd, None, 1 << 20):
                pass
        return (tmp_path / "sent").read_bytes()

    for read in (partial(mapped, flags="MAP_SHARED"), partial(mapped, flags="MAP_PRIVATE"), sent):
        for source in (own.path, access(server)):
            with mounted(source, tmp_path / "m") as mount:
                for path, content in own.contents.items():
                    os.listdir((mount / path).parent)  # from which the kernel has lengths that are not exact
                    assert read(mount / path) == content


def test_looking_opens_no_session(server: ReferenceServer, own: Stocked, tmp_path: Path) -> None:
    # A busy machine answers late, and pbsfs then opens more sessions, as for a distant server.
    with mounted(access(server), tmp_path / "m", "--connections", "1") as mount:
        for directory, _names, files in os.walk(mount.place):
            for name in (*files, "."):
                path = Path(directory, name)
                path.stat()
                for attribute in os.listxattr(path):
                    os.getxattr(path, attribute)
        assert os.getxattr(mount / FIRST, "user.pbs.notes") == b"before the upgrade"
        assert fails_with(errno.ENODATA, lambda: os.getxattr(mount / IMAGE, "user.pbs.chunk_size"))
        for blob_file in (CONFIGURATION, LOG, f"{FIRST}/index.json", f"{SECOND}/index.json"):
            assert (mount / blob_file).read_bytes()
        assert server.sessions.all() == []
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        assert [str(session.snapshot) for session in server.sessions.all()] == [FIRST]


def test_a_server_that_is_away_is_waited_for(server: ReferenceServer, own: Stocked, tmp_path: Path) -> None:
    def listing(mount: Mounted) -> list[str]:
        return os.listdir(mount / "vm/100")

    def logged(mount: Mounted, words: str) -> bool:
        return any(words in line for line in mount.log_lines())

    with mounted(access(server), tmp_path / "m", *SOON) as mount, ThreadPoolExecutor(2) as readers:
        names = listing(mount)
        server.go_down()
        read = readers.submit((mount / IMAGE).read_bytes)
        wait_until(lambda: logged(mount, "trying again"), "it is tried again")
        listed = readers.submit(listing, mount)
        assert not read.done()
        server.come_back()
        assert read.result(30) == own.contents[IMAGE]
        assert listed.result(30) == names
        assert logged(mount, "available again")
    with mounted(access(server), tmp_path / "m2", *SOON, "--retry-timeout", "0.5") as mount:
        assert listing(mount) == names
        server.go_down()
        assert fails_with(errno.EIO, lambda: (mount / IMAGE).open("rb"))
        wait_until(
            lambda: fails_with(errno.EIO, lambda: listing(mount)), "the listing is too old to be shown"
        )
        server.come_back()
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        assert listing(mount) == names
        assert logged(mount, "Connection refused")


def test_a_group_without_snapshots_is_empty(own: Stocked, tmp_path: Path) -> None:
    (own.path / "vm" / "199").mkdir()
    (own.path / "vm" / "199" / "owner").write_text("tester@pbs\n")
    with (
        serving(own.path, release=PBS_4) as server,
        mounted(access(server), tmp_path / "m", "--refresh", "600") as mount,
    ):
        assert os.listdir(mount / "vm/199") == []
        assert fails_with(errno.ENOENT, lambda: os.listdir(mount / "vm/198"))
        for command in (["ls", "-lR"], ["find"], ["du", "-a"]):
            output_of(*command, str(mount.place))
        assert pbsfs("verify", env=access(server)).returncode in (0, 5)  # 5: keys are missing
        assert "backup_count:    0" in output_of(PBSFS, "info", "vm/199", env=access(server))


def test_what_is_forbidden_is_left_out(server: ReferenceServer, own: Stocked, tmp_path: Path) -> None:
    store, token = f"/datastore/{STORE}", "reader@pbs!some"
    seeing = frozenset({"Datastore.Modify"})  # that it is there, and no more
    for namespace in ("closed", "hidden"):
        content = {"a.img.fidx": own.contents[IMAGE]}
        own.writer.add_snapshot(made.snapshot(namespace=Namespace((namespace,))), content)
    grants = {f"{store}/prod": READER, f"{store}/closed": seeing}
    server.accounts.grant("reader@pbs", store, READER | seeing)  # a token has no more than its user
    server.add_token(token, SECRET, grants=grants)
    with mounted(access(server, token, SECRET), tmp_path / "m", *SOON) as mount:
        assert os.listdir(mount.place) == ["ns"]
        assert sorted(os.listdir(mount / "ns")) == ["closed", "prod"]
        for _ in range(2):
            assert fails_with(errno.EACCES, lambda: os.listdir(mount / "ns/closed"))
        assert (mount / IN_NAMESPACE).read_bytes() == own.contents[IN_NAMESPACE]
        assert fails_with(errno.ENOENT, (mount / "ns/hidden").stat)
        lines = mount.log_lines()
        assert len([line for line in lines if f"on {store}/closed" in line]) == 1
        assert len([line for line in lines if f"on {store}" in line]) == len(lines) == 2


# --- cost


def test_the_kernel_keeps_what_was_read(own: Stocked, tmp_path: Path) -> None:
    def written(pid: int) -> int:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("wchar")).split()[1])

    need_root("see what the process of a mount writes")
    size = len(own.contents[IMAGE])
    with mounted(own.path, tmp_path / "m") as mount:
        before = written(mount.pid)
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        between = written(mount.pid)
        assert between - before > size  # so this is where reading can be seen
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        assert written(mount.pid) - between < size // 10


def test_statfs_needs_no_storage(own: Stocked, tmp_path: Path) -> None:
    def is_told(mount: Mounted) -> bool:
        found, real = os.statvfs(mount.place), os.statvfs(own.path)
        assert (found.f_files, found.f_ffree, found.f_namemax) == (0, 0, 255)
        assert found.f_flag & os.ST_RDONLY
        if found.f_blocks == 0:
            assert (found.f_bfree, found.f_bavail) == (0, 0)
            return False
        assert found.f_blocks * found.f_frsize == real.f_blocks * real.f_frsize // 4096 * 4096
        assert 0 < found.f_bavail <= found.f_bfree <= found.f_blocks
        return True

    with mounted(own.path, tmp_path / "m", *SOON) as mount:
        wait_until(lambda: is_told(mount), "the space is known")
        shown = output_of("df", "--output=itotal,iused,iavail,ipcent", str(mount.place))
        assert shown.splitlines()[1].split() == ["0", "0", "0", "-"]
        before = os.statvfs(mount.place)
        own.path.rename(tmp_path / "away")
        assert os.statvfs(mount.place) == before
        assert not mount.log_lines()
        (tmp_path / "away").rename(own.path)
    with serving(own.path) as server, mounted(access(server), tmp_path / "m2") as mount:
        wait_until(lambda: is_told(mount), "the space is known")


def test_read_ahead_is_raised(mount: Mounted) -> None:
    need_root("set the read-ahead of a mount")
    entry = mounted_at(mount.place)
    assert entry is not None
    assert Path(f"/sys/class/bdi/{entry.device}/read_ahead_kb").read_text().strip() == "1024"


def peak_of(pid: int) -> int:
    """Bytes of memory that a process took at most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def test_memory_is_bounded(writer: DatastoreWriter, tmp_path: Path) -> None:
    cache, extra, chunk, count = 32 << 20, 150 << 20, 4 << 20, 110
    assert count * chunk > cache + extra  # else reading it all could not break the promise
    image = tmp_path / "image"
    with image.open("wb") as file:
        for number in range(count):
            file.write(b"%064d" % number * (chunk // 64))
    writer.add_snapshot(made.snapshot(), {"drive-scsi0.img.fidx": image})
    with mounted(writer.path, tmp_path / "m", "--cache-size", "32M") as mount:
        output_of("dd", f"if={mount / IMAGE}", f"of={os.devnull}", "bs=1M")
        assert peak_of(mount.pid) < cache + extra, f"{peak_of(mount.pid) >> 20} MiB"


def test_memory_of_open_files_is_bounded(writer: DatastoreWriter, tmp_path: Path) -> None:
    cache, extra, limit, count, size = 32 << 20, 150 << 20, 256 << 20, 150, 1 << 40
    data = b"data" * (1 << 20)
    places = large_images(writer, data, size=size, count=count)
    blobs = [f"{made.snapshot(backup_id=name)}/big" for name in ("701", "702", "703")]
    for name in ("701", "702", "703"):
        writer.add_snapshot(made.snapshot(backup_id=name), {"big.blob": bytes(100 << 20)})
    assert count * size // len(data) * 32 > 2 * (cache + extra + limit)
    with mounted(writer.path, tmp_path / "m", "--cache-size", "32M") as mount:
        with contextlib.ExitStack() as stack:
            for place in blobs[:2] * 5:
                content = stack.enter_context((mount / place).open("rb"))
                assert os.pread(content.fileno(), 4, 50 << 20) == bytes(4)
            with pytest.raises(OSError, match="Cannot allocate memory"):
                (mount / blobs[2]).open("rb")
            assert "close some files" in mount.log_lines()[-1]
        assert (mount / blobs[2]).read_bytes() == bytes(100 << 20)
        files = [os.open(mount / place, os.O_RDONLY) for place in places]
        try:
            for offset in (5, size - 5000):  # all tables were dropped and fetched again by the second
                for file in files:
                    assert os.pread(file, 4, offset) == (data * 2)[offset % 4 :][:4]
                    assert os.lseek(file, 0, os.SEEK_HOLE) == size
        finally:
            for file in files:
                os.close(file)
        assert peak_of(mount.pid) < cache + extra + limit, f"{peak_of(mount.pid) >> 20} MiB"


def test_memory_is_bounded_with_many_open_images_and_long_listings(
    writer: DatastoreWriter, tmp_path: Path
) -> None:
    cache, extra, limit, count, size, names = 64 << 20, 150 << 20, 256 << 20, 200, 1 << 39, 100_000
    data = b"data" * (1 << 20)
    places = large_images(writer, data, size=size, count=count)
    (writer.path / "ct").mkdir(exist_ok=True)
    for number in range(names):
        os.mkdir(f"{writer.path}/ct/{number + 100}")
    assert count * size // len(data) * 32 > cache + extra + limit
    # On a busy machine all of this takes minutes.
    with mounted(writer.path, tmp_path / "m", "--cache-size", "64M", lifetime=600) as mount:
        files = [os.open(mount / place, os.O_RDONLY) for place in places]
        try:
            assert sum(entry.is_dir() for entry in os.scandir(mount / "ct")) == names
            for number, file in enumerate(files):
                assert os.pread(file, 4, 5) == data[1:5], number
            assert len(os.listdir(mount / "ct")) == names
            for file in files:
                assert os.pread(file, 4, size - 5000) == data[:4]
        finally:
            for file in files:
                os.close(file)
        assert peak_of(mount.pid) < cache + limit + extra, f"{peak_of(mount.pid) >> 20} MiB"


# --- from mount to umount


def test_mount_returns_when_it_answers(own: Stocked, tmp_path: Path) -> None:
    place = tmp_path / "m"
    for _ in range(3):
        with mounted(own.path, place):  # which sees to the status
            assert mounted_at(place)
            assert (place / CONFIGURATION).read_bytes() == own.contents[CONFIGURATION]


def test_mount_failures_have_a_reason_and_a_status(own: Stocked, tmp_path: Path) -> None:
    (place := tmp_path / "m").mkdir()
    (empty := tmp_path / "empty").mkdir()
    source = ("--datastore-dir", own.path)

    def refused(status: int, *arguments: str | Path) -> str:
        with cleaned_up(place):
            text = error_of(pbsfs("mount", "--log-file", os.devnull, *arguments), status)
            assert not mounted_at(place)
        return text

    assert "rw" in refused(2, *source, "-o", "rw", place)
    assert "16M" in refused(2, *source, "--cache-size", "16M", place)
    assert "--datastore-dir" in refused(2, place)
    assert "nowhere" in refused(3, *source, "--ns", "nowhere", place)
    assert "nowhere" in refused(3, *source, "--ns", "nowhere", "--foreground", place)
    assert str(empty) in refused(4, "--datastore-dir", empty, place)
    assert "not a directory" in refused(7, *source, own.path / ".chunks" / ".." / f"{IMAGE}.fidx")
    with serving(own.path) as server, cleaned_up(place):
        for told, status in ((access(server, secret="wrong"), 10), (access(server, PBS_FINGERPRINT=""), 12)):
            told["XDG_CONFIG_HOME"] = str(tmp_path)
            error_of(pbsfs("mount", "--log-file", os.devnull, place, env=told), status)
            assert not mounted_at(place)


def test_mount_points_in_the_way_are_refused(own: Stocked, tmp_path: Path) -> None:
    source = ("--datastore-dir", own.path)
    file = tmp_path / "file"
    file.touch()
    assert "not a directory" in refusal(file, *source)
    assert "is inside the datastore" in refusal(own.path / "vm/100", *source, "-o", "nonempty")
    assert "contains the datastore" in refusal(tmp_path, *source, "-o", "nonempty")
    (full := tmp_path / "full").mkdir()
    (full / "file").touch()
    assert "is not empty" in refusal(full, *source)
    with mounted(own.path, full, "-o", "nonempty") as mount:
        assert "already mounted" in refusal(mount.place, *source, "-o", "nonempty")
        assert sorted(os.listdir(full)) == ["ct", "ns", "vm"]


def test_umount_tells_how_it_went(own: Stocked, tmp_path: Path) -> None:
    assert "not mounted" in error_of(pbsfs("umount", tmp_path), 7)
    assert "not a pbsfs mount" in error_of(pbsfs("umount", "/proc"), 7)
    with mounted(own.path, tmp_path / "m") as mount:
        with (mount / IMAGE).open("rb"):
            text = error_of(pbsfs("umount", mount.place), 7)
            assert "busy; close what is open there, or use --lazy" in text
            assert "--lazy" in text
            assert mount.is_mounted()
        done = pbsfs("umount", mount.place)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert not mount.is_mounted()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_a_mount(own: Stocked, tmp_path: Path, number: signal.Signals) -> None:
    need_fuse()
    place = tmp_path / "m"
    place.mkdir()
    command = [PBSFS, "mount", "--foreground", "--datastore-dir", str(own.path), str(place)]
    with (
        cleaned_up(place),
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process,
    ):
        try:
            wait_until((place / "vm").exists, "it is mounted")
            with opened(place / IMAGE) as fd:
                process.send_signal(number)
                _nothing, errors = process.communicate(timeout=20)
                assert fails_with(errno.ENOTCONN, lambda: os.pread(fd, 1, 5 * CHUNK))
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, "")
    assert not mounted_at(place)


def test_any_umount_ends_the_process(own: Stocked, tmp_path: Path) -> None:
    commands = [[PBSFS, "umount"], ["fusermount3", "-u"]]
    commands += [["umount"]] if os.geteuid() == 0 else []
    need("fusermount3")
    for number, command in enumerate(commands):
        with mounted(own.path, tmp_path / str(number)) as mount:
            with (mount / IMAGE).open("rb"):
                assert run([*command, mount.place]).returncode != 0
                assert (mount / CONFIGURATION).read_bytes() == own.contents[CONFIGURATION]
            output_of(*command, mount.place)
            wait_until(mount.has_ended, f"{command} ends the process")
    with mounted(own.path, tmp_path / "lazy") as mount:
        with (mount / IMAGE).open("rb") as file:
            output_of(PBSFS, "umount", "--lazy", mount.place)
            assert not mount.is_mounted()
            assert file.read() == own.contents[IMAGE]
            assert mount.is_running()
        wait_until(mount.has_ended, "the process ends with the last open file")


def test_a_killed_mount_is_reported_and_cleared(own: Stocked, tmp_path: Path) -> None:
    with mounted(own.path, tmp_path / "m") as mount:
        with opened(mount / IMAGE) as fd:
            mount.signal(signal.SIGKILL)
            wait_until(mount.is_dead, "the process is gone")
            assert fails_with(errno.ENOTCONN, lambda: os.listdir(mount.place))
            assert fails_with(errno.ENOTCONN, lambda: os.pread(fd, 1, 5 * CHUNK))
        text = refusal(mount.place, "--datastore-dir", own.path)
        assert f"pbsfs umount {mount.place}" in text
        assert pbsfs("umount", mount.place).returncode == 0
        assert not mount.is_mounted()
        assert mount.place.is_dir()


def test_what_a_mount_did_can_be_read(server: ReferenceServer, own: Stocked, tmp_path: Path) -> None:
    with mounted(access(server, TOKEN), tmp_path / "m") as mount:
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
        assert ".pbsfs" not in os.listdir(mount.place)
        found = subprocess.run(["find", mount.place, "-maxdepth", "1"], capture_output=True, check=True)
        assert b".pbsfs" not in found.stdout
        server.go_down()
        names = {"stats", "errors", "version"}
        assert set(os.listdir(mount / ".pbsfs")) == names
        text = {name: (mount / f".pbsfs/{name}").read_text() for name in names}
        numbers = dict(line.split(" ") for line in text["stats"].splitlines())
        assert int(numbers["bytes_served"]) >= len(own.contents[IMAGE])
        assert int(numbers["sessions_opened"]) >= 1
        assert {(mount / f".pbsfs/{name}").stat().st_size for name in names} == {0}
        assert not any(SECRET in shown for shown in text.values())


def test_a_reader_can_be_killed(own: Stocked, tmp_path: Path) -> None:
    with mounted(own.path, tmp_path / "m") as mount:
        mount.signal(signal.SIGSTOP)  # stands for storage that does not answer
        with subprocess.Popen(["cat", str(mount / IMAGE)], stdout=subprocess.DEVNULL) as reader:
            wchan = Path(f"/proc/{reader.pid}/wchan")
            wait_until(lambda: "fuse" in wchan.read_text() or "request" in wchan.read_text(), "it waits")
            reader.kill()
            mount.signal(signal.SIGCONT)
            assert reader.wait(timeout=20) == -signal.SIGKILL
        assert (mount / IMAGE).read_bytes() == own.contents[IMAGE]
