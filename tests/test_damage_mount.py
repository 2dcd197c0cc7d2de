"""Damage under a mount: an error for what touches it, and the right bytes for all else."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pbsfs.base.names import MANIFEST
from tests.support import damage, made
from tests.support.mounts import Mounted, fails_with, mounted, read_at
from tests.support.program import output_of, run
from tests.support.stocked import (
    ARCHIVE,
    CHUNK,
    CONFIGURATION,
    FIRST,
    IMAGE,
    IN_NAMESPACE,
    NEWER_IMAGE,
    SECOND,
    Stocked,
    stock,
)
from tests.support.waiting import wait_until

pytestmark = pytest.mark.mount

SECTOR = 512
PAGE = 4096
"""What the kernel caches, and so asks for, at the least."""

DAMAGED = range(CHUNK, 2 * CHUNK)
"""The bytes of `IMAGE` whose chunk is damaged here: the second one."""


@pytest.fixture
def stocked(tmp_path: Path) -> Stocked:
    return stock(tmp_path / "datastore")


def digest_of(stocked: Stocked) -> bytes:
    return hashlib.sha256(stocked.contents[IMAGE][DAMAGED.start : DAMAGED.stop]).digest()


def chunk_of(stocked: Stocked) -> Path:
    return stocked.writer.chunk_path(digest_of(stocked))


def check_every_read(mount: Mounted, content: bytes) -> None:
    """Reads `IMAGE` in sectors, and over the edges of what is damaged."""
    for offset in range(0, len(content), 16 * SECTOR):
        if offset in DAMAGED:
            assert fails_with(errno.EIO, lambda at=offset: read_at(mount / IMAGE, at, SECTOR))  # type: ignore[misc]
        else:
            assert read_at(mount / IMAGE, offset, SECTOR) == content[offset : offset + SECTOR]
    # What lies before the damage is still got, up to the page.
    before = read_at(mount / IMAGE, CHUNK - PAGE, 2 * PAGE)
    assert before == content[CHUNK - PAGE : CHUNK]
    assert fails_with(errno.EIO, lambda: read_at(mount / IMAGE, 2 * CHUNK - 1, 2))
    assert read_at(mount / IMAGE, 2 * CHUNK, 4096) == content[2 * CHUNK : 2 * CHUNK + 4096]


# Of an uncompressed blob: magic, CRC, data.
@pytest.mark.parametrize("byte", [0, 9, 12, 5000, 12 + CHUNK - 1])
def test_one_flipped_bit_is_an_error_where_it_is_and_nowhere_else(
    stocked: Stocked, tmp_path: Path, byte: int
) -> None:
    assert chunk_of(stocked).stat().st_size == 12 + CHUNK
    damage.flip_bit(chunk_of(stocked), byte * 8 + byte % 8)
    with mounted(stocked.path, tmp_path / "m") as mount:
        check_every_read(mount, stocked.contents[IMAGE])
        for path, content in stocked.contents.items():
            if path not in (IMAGE, IN_NAMESPACE):
                assert (mount / path).read_bytes() == content
        (line,) = mount.log_lines()
        for part in (digest_of(stocked).hex(), IMAGE, FIRST):
            assert part in line
        assert mount.is_mounted()


def test_every_snapshot_that_needs_the_chunk_is_named(stocked: Stocked, tmp_path: Path) -> None:
    damage.flip_bit(chunk_of(stocked), 4000)
    with mounted(stocked.path, tmp_path / "m") as mount:
        for _ in range(2):
            for path in (IMAGE, IN_NAMESPACE):
                assert fails_with(errno.EIO, (mount / path).read_bytes)
        first, second = mount.log_lines()
        assert f" {IMAGE}: " in first
        assert f" {IN_NAMESPACE}: " in second
        assert digest_of(stocked).hex() in first
        assert digest_of(stocked).hex() in second


@pytest.mark.parametrize("size", [0, 1000])
def test_a_chunk_that_was_cut_short_is_an_error(stocked: Stocked, tmp_path: Path, size: int) -> None:
    damage.truncate(chunk_of(stocked), size)
    with mounted(stocked.path, tmp_path / "m") as mount:
        check_every_read(mount, stocked.contents[IMAGE])
        (line,) = mount.log_lines()
        assert digest_of(stocked).hex() in line


def test_another_chunk_in_its_place_is_an_error(stocked: Stocked, tmp_path: Path) -> None:
    other = stocked.writer.add_chunk(stocked.contents[IMAGE][:CHUNK])
    shutil.copyfile(stocked.writer.chunk_path(other), chunk_of(stocked))
    with mounted(stocked.path, tmp_path / "m") as mount:
        check_every_read(mount, stocked.contents[IMAGE])
        (line,) = mount.log_lines()
        assert digest_of(stocked).hex() in line


def test_a_missing_chunk_is_an_error_until_it_is_back(stocked: Stocked, tmp_path: Path) -> None:
    chunk_of(stocked).rename(tmp_path / "away")
    with mounted(stocked.path, tmp_path / "m") as mount:
        check_every_read(mount, stocked.contents[IMAGE])
        (line,) = mount.log_lines()
        for part in (digest_of(stocked).hex(), IMAGE, "missing"):
            assert part in line
        (tmp_path / "away").rename(chunk_of(stocked))
        assert (mount / IMAGE).read_bytes() == stocked.contents[IMAGE]


def test_a_chunk_that_a_verification_set_aside_is_named_so(stocked: Stocked, tmp_path: Path) -> None:
    chunk = chunk_of(stocked)
    chunk.rename(chunk.with_name(f"{chunk.name}.0.bad"))
    with mounted(stocked.path, tmp_path / "m") as mount:
        check_every_read(mount, stocked.contents[IMAGE])
        (line,) = mount.log_lines()
        assert "verification" in line


def test_tools_tell_of_damage_and_can_save_the_rest(stocked: Stocked, tmp_path: Path) -> None:
    damage.flip_bit(chunk_of(stocked), 4000)
    content = stocked.contents[IMAGE]
    with mounted(stocked.path, tmp_path / "m") as mount:
        done = run(["cp", mount / IMAGE, tmp_path / "copy"])
        assert done.returncode != 0
        assert "Input/output error" in done.stderr
        saved = tmp_path / "saved"
        command = ["dd", f"if={mount / IMAGE}", f"of={saved}", "bs=4096", "conv=noerror,sync"]
        assert "Input/output error" in run(command).stderr
        saved_bytes = saved.read_bytes()[: len(content)]
        assert saved_bytes == content[: DAMAGED.start] + bytes(CHUNK) + content[DAMAGED.stop :]
        assert len(mount.log_lines()) == 1


def test_damage_in_an_archive_of_dynamic_chunks_is_an_error_there(stocked: Stocked, tmp_path: Path) -> None:
    content = made.image(8, "r" * 40)
    path = stocked.writer.add_snapshot(made.snapshot("9", type="host"), {"root.pxar.didx": content})
    archive = f"{path.relative_to(stocked.path)}/root.pxar"
    older = {chunk.name for chunk in (stocked.path / ".chunks").glob("*/*")}
    newest = (stocked.path / ".chunks").glob("*/*")
    first = next(c for c in newest if content.startswith(c.read_bytes()[12 : 12 + 4096]))
    assert first.name in older
    length = first.stat().st_size - 12
    assert 0 < length < len(content)
    damage.flip_bit(first, 8 * 100)
    with mounted(stocked.path, tmp_path / "m") as mount:
        for offset in (0, length - 1):
            assert fails_with(errno.EIO, lambda at=offset: read_at(mount / archive, at, 1))  # type: ignore[misc]
        behind = -(-length // PAGE) * PAGE
        assert read_at(mount / archive, behind, len(content)) == content[behind:]
        (line,) = mount.log_lines()
        assert archive in line
        assert (mount / ARCHIVE).read_bytes() == stocked.contents[ARCHIVE]


# --- indexes, blobs, manifests


def _unlink(path: Path) -> None:
    path.unlink()


def _flip_header(path: Path) -> None:
    damage.flip_bit(path, 8 * 70)


def _flip_digest(path: Path) -> None:
    damage.flip_bit(path, 8 * 4100)


def _cut(path: Path) -> None:
    damage.truncate(path, 4100)


@pytest.mark.parametrize("harm", [_unlink, _flip_header, _flip_digest, _cut])
def test_a_file_with_a_damaged_index_cannot_be_opened_and_is_listed(
    stocked: Stocked, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    harm(stocked.path / f"{IMAGE}.fidx")
    with mounted(stocked.path, tmp_path / "m") as mount:
        assert "drive-scsi0.img" in os.listdir(mount / FIRST)
        assert (mount / IMAGE).stat().st_size == len(stocked.contents[IMAGE])
        for _ in range(2):
            assert fails_with(errno.EIO, lambda: (mount / IMAGE).open("rb"))
        for path, content in stocked.contents.items():
            if path != IMAGE:
                assert (mount / path).read_bytes() == content
        assert all(FIRST in line and "drive-scsi0.img" in line for line in mount.log_lines())
        assert 1 <= len(mount.log_lines()) <= 2  # when it is listed, and when it is opened


@pytest.mark.parametrize("byte", [9, 30])
def test_a_damaged_blob_cannot_be_opened(stocked: Stocked, tmp_path: Path, byte: int) -> None:
    damage.flip_bit(stocked.path / f"{CONFIGURATION}.blob", 8 * byte + 3)
    with mounted(stocked.path, tmp_path / "m") as mount:
        for _ in range(2):
            assert fails_with(errno.EIO, (mount / CONFIGURATION).read_bytes)
        assert (mount / IMAGE).read_bytes() == stocked.contents[IMAGE]
        (line,) = mount.log_lines()
        assert CONFIGURATION in line


@pytest.mark.parametrize("size", [0, 60])
def test_a_snapshot_with_a_broken_manifest_is_shown_and_cannot_be_listed(
    stocked: Stocked, tmp_path: Path, size: int
) -> None:
    manifest = stocked.path / SECOND / MANIFEST.filename
    whole = manifest.read_bytes()
    damage.truncate(manifest, size)
    with mounted(stocked.path, tmp_path / "m", "--refresh", "0.1") as mount:
        assert "2023-11-15T22:13:20Z" in os.listdir(mount / "vm/100")
        for _ in range(2):
            assert fails_with(errno.EIO, lambda: os.listdir(mount / SECOND))
            assert fails_with(errno.EIO, lambda: (mount / NEWER_IMAGE).open("rb"))
        assert os.getxattr(mount / SECOND, "user.pbs.error").startswith(b"unreadable manifest")
        assert (mount / "vm/100/latest").readlink() == Path("2023-11-14T22:13:20Z")
        for path, content in stocked.contents.items():
            if path != NEWER_IMAGE:
                assert (mount / path).read_bytes() == content
        (line,) = mount.log_lines()
        assert SECOND in line
        assert "unreadable manifest" in line
        damage.replace(manifest, whole)
        latest = mount / "vm/100/latest"
        wait_until(lambda: latest.readlink() == Path("2023-11-15T22:13:20Z"), "it is back")
        # What the kernel knows of the snapshot goes out of date at the same time, give or take a tick.
        wait_until(lambda: not fails_with(errno.EIO, lambda: read_at(mount / NEWER_IMAGE, 0, 1)), "it opens")
        assert (mount / NEWER_IMAGE).read_bytes() == stocked.contents[NEWER_IMAGE]


def test_find_goes_past_what_is_broken(stocked: Stocked, tmp_path: Path) -> None:
    damage.truncate(stocked.path / SECOND / MANIFEST.filename, 5)
    with mounted(stocked.path, tmp_path / "m") as mount:
        found = run(["find", ".", "-name", "drive-*"], cwd=mount.place)
        assert SECOND in found.stderr
        assert {f"./{IMAGE}", f"./{IN_NAMESPACE}"} <= set(found.stdout.split())
        assert output_of("ls", str(mount / FIRST))
        assert len(mount.log_lines()) == 1
