"""What docs/semantics.md promises of reading: a test for each promise, by its name."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pbsfs.base.names import MANIFEST
from pbsfs.formats.manifest import CryptMode
from tests.support import damage, made
from tests.support.keyfiles import keys_in
from tests.support.mounts import Mounted, fails_with, mounted, read_at
from tests.support.stocked import (
    CHUNK,
    CONFIGURATION,
    ENCRYPTED,
    FIRST,
    IMAGE,
    IN_NAMESPACE,
    NEWER_IMAGE,
    SEALED,
    SECOND,
    Stocked,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount


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
