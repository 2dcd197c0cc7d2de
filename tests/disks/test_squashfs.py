"""squashfs as the kernel shows it, in every compression, and damaged ones."""

from __future__ import annotations

import os
import random
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.contents.base import Entry
from pbsfs.disks import lz4
from pbsfs.disks.host import Parser
from pbsfs.disks.probe import probe
from pbsfs.disks.remote import RemoteVolume
from pbsfs.disks.squashfs.compression import decompress
from pbsfs.disks.squashfs.reader import Squashfs
from pbsfs.disks.volume import Disk
from tests.support.disks import (
    FileDisk,
    MemoryDisk,
    Patched,
    check_decoded_from,
    content_of,
    differences,
    fields_of,
)
from tests.support.histories import mounted
from tests.support.hostile import counts, limited, mutate
from tests.support.needs import need, need_loop
from tests.support.truth import fields_at, names_below

FORMS = (
    "-comp gzip",
    "-comp gzip -noI -noD -noF -noX",
    "-comp gzip -b 4096 -no-fragments",
    "-comp gzip -b 1M -always-use-fragments -noD",
    "-comp lzo",
    "-comp lz4 -Xhc -noF",
    "-comp lz4 -b 8192 -no-duplicates",
    "-comp xz -Xbcj x86",
    "-comp zstd -b 256K",
    "-comp zstd -no-xattrs",
)


def text(some: random.Random, size: int) -> bytes:
    """Bytes that can be compressed."""
    words = [some.randbytes(some.randrange(2, 9)) for _ in range(50)]
    return b"".join(some.choices(words, k=size // 2 + 1))[:size]


def tree_in(top: Path, *, with_owners: bool) -> Path:
    """A tree with all that squashfs has; `with_owners`: with what only root can make."""
    some = random.Random(4)
    top.mkdir()
    for number, size in enumerate((0, 1, 100, 4095, 4096, 4097, 70_000, 131_072, 400_000, 1_500_000)):
        (top / f"text-{number}").write_bytes(text(some, size))
        (top / f"random-{number}").write_bytes(some.randbytes(size))
    with (top / "holes").open("wb") as file:
        file.write(b"begin")
        file.seek(700_000)
        file.write(text(some, 200_000))
        file.truncate(1 << 20)
    with (top / "only a hole").open("wb") as file:
        file.truncate(3_000_001)
    many = top / "many"
    many.mkdir()
    for number in range(700):
        (many / f"{number:04d}-{'n' * (number % 200)}").write_bytes(b"%d" % number * (number % 40))
    deep = top / "deep"
    for name in ("a", "b", "empty"):
        deep = deep / name
    deep.mkdir(parents=True)
    (top / b"n\xff\n".decode(errors="surrogateescape")).write_bytes(b"name")
    (top / "link").symlink_to("t" * 300)
    (top / "short").symlink_to("many/..")
    os.link(top / "text-6", top / "many" / "hard")
    os.mkfifo(top / "fifo", 0o640)
    os.utime(top / "text-2", (4_000_000_000, 4_000_000_000))
    os.chmod(top / "text-3", 0o4751)
    for attribute, value in {b"user.a": b"1", b"user.empty": b"", b"user.long": some.randbytes(3000)}.items():
        for path in ("text-6", "deep", "random-4"):
            os.setxattr(top / path, attribute, value)
    if with_owners:
        os.chown(top / "text-4", 70_000, 1 << 31)
        os.mknod(top / "device", stat.S_IFBLK | 0o600, os.makedev(4000, 700_000))
        os.mknod(top / "tty", stat.S_IFCHR | 0o600, os.makedev(4, 64))
        for path in ("device", "link", "fifo"):
            os.setxattr(top / path, b"trusted.x", b"special", follow_symlinks=False)
        os.setxattr(top / "text-5", b"security.capability", struct.pack("<5I", 0x2000001, 1024, 0, 0, 0))
    return top


def packed(tree: Path, image: Path, *options: str) -> Path:
    need("mksquashfs")
    always = ("-noappend", "-quiet", "-no-progress", "-processors", "1")
    command = ["mksquashfs", str(tree), str(image), *always, *options]
    subprocess.run(command, check=True, capture_output=True)
    return image


def opened(disk: Any) -> Squashfs:
    (found,) = probe([("scsi0", Disk(disk))])
    assert found.kind == "squashfs"
    system = found.open()
    assert isinstance(system, Squashfs)
    return system


@pytest.mark.root
@pytest.mark.parametrize("form", FORMS)
def test_all_fields_are_as_the_kernel_shows_them(form: str, tmp_path: Path) -> None:
    need_loop()
    image = packed(tree_in(tmp_path / "tree", with_owners=True), tmp_path / "image", *form.split())
    with mounted(image, tmp_path / "view", "squashfs", "ro"):
        top = os.fsencode(tmp_path / "view")
        truth = {b"": fields_at(top)} | {
            path: fields_at(os.path.join(top, path)) for path in names_below(tmp_path / "view")
        }
    disk = FileDisk(image)
    system = opened(disk)
    assert differences(system, [disk], truth) == []
    assert system.facts() == {"journal": "none", "compression": form.split()[1]}


@pytest.mark.parametrize("form", FORMS)
def test_all_is_as_in_the_tree_that_was_packed(form: str, tmp_path: Path) -> None:
    tree = tree_in(tmp_path / "tree", with_owners=False)
    image = packed(tree, tmp_path / "image", *form.split())
    top = os.fsencode(tree)
    truth = {b"": fields_at(top)} | {path: fields_at(os.path.join(top, path)) for path in names_below(tree)}
    for fields in truth.values():
        fields["mt"] -= fields["mt"] % 10**9
    disk = FileDisk(image)
    but = "x" if "-no-xattrs" in form else ""
    assert differences(opened(disk), [disk], truth, but=but) == []


@pytest.mark.parametrize("form", ["-comp gzip", "-comp zstd -b 4096 -no-fragments"])
def test_what_is_decoded_comes_from_where_the_reader_says(form: str, tmp_path: Path) -> None:
    image = packed(tree_in(tmp_path / "tree", with_owners=False), tmp_path / "image", *form.split())
    assert check_decoded_from(lambda stream: Squashfs(Disk(stream)), FileDisk(image)) == 5


def test_ranges_of_compressed_files_are_read_from_anywhere(tmp_path: Path) -> None:
    tree = tree_in(tmp_path / "tree", with_owners=False)
    disk = FileDisk(packed(tree, tmp_path / "image", "-b", "4096"))
    system = Squashfs(Disk(disk))
    some = random.Random(2)
    for name in ("text-6", "text-8", "holes"):
        file = system.child(system.root, name.encode())
        assert file is not None
        content = (tree / name).read_bytes()
        for _ in range(200):
            start = some.randrange(len(content))
            size = min(some.randrange(1, 20_000), len(content) - start)
            assert system.read(file, start, size) == content[start : start + size]


def test_what_is_not_read_says_so(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    image = bytearray(packed(small, tmp_path / "image").read_bytes())
    for at, value, message in (
        (28, 3, r"squashfs of version 3\.\d is not supported"),
        (20, 2, "squashfs with compression lzma is not supported"),
        (20, 9, "squashfs with compression of kind 9 is not supported"),
    ):
        changed = bytearray(image)
        changed[at] = value
        with pytest.raises(UnsupportedError, match=message):
            Squashfs(Disk(MemoryDisk(changed)))
    with pytest.raises(DamageError, match="longer than the volume"):
        Squashfs(Disk(MemoryDisk(image[: struct.unpack_from("<Q", image, 40)[0] - 1])))


def test_lz4_blocks_are_bounded() -> None:
    # 20 literals; a match of 4 + 15 + 3 at the distance 1; one literal
    block = b"\xff\x05" + bytes(range(20)) + b"\x01\x00\x03" + b"\x10x"
    whole = bytes(range(20)) + b"\x13" * 22 + b"x"
    assert lz4.decompress(block, len(whole)) == whole
    with pytest.raises(DamageError, match="more than it should"):
        lz4.decompress(block, len(whole) - 1)
    with pytest.raises(DamageError, match="before its begin"):
        lz4.decompress(b"\x10a\x02\x00\x00", 100)
    for end in range(len(block) - 2):
        if end != 22:  # where the match begins, a block may end
            with pytest.raises(DamageError, match="ends early"):
                lz4.decompress(block[:end], 100)


@pytest.mark.parametrize("kind", [1, 3, 4, 5, 6])
def test_damaged_compressed_data_is_damage(kind: int) -> None:
    some = random.Random(kind)
    failed = 0
    for _ in range(300):
        with limited():
            try:
                found = decompress(kind, some.randbytes(some.randrange(1, 300)), 8192)
                assert len(found) <= 8192
            except DamageError:
                failed += 1
    assert failed > 200


def everything(system: Squashfs, disk: Any) -> Iterator[tuple[bytes, dict[str, Any] | DamageError]]:
    """All that a file system gives, or why not."""
    for path, entry in system.walk(system.root):
        if isinstance(entry, DamageError):
            yield path, entry
            continue
        try:
            if entry.is_file:
                assert sum(piece.length for piece in system.data(entry)) == entry.size
                if entry.size > 4 << 20:
                    continue  # a hole, that nobody wants to hash
            yield path, fields_of(system, [disk], entry)
        except DamageError as error:
            yield path, error


@pytest.mark.parametrize("form", ["-comp gzip", "-comp gzip -noI -noD -noF -noX", "-comp lz4", "-comp zstd"])
@pytest.mark.parametrize("count", counts(30, 260))
def test_mutated_disks_raise_nothing_but_damage(count: int, form: str, tmp_path: Path) -> None:
    tree = tree_in(tmp_path / "tree", with_owners=False)
    for path in ("text-9", "random-9", "random-8", "only a hole"):
        (tree / path).unlink()
    image = packed(tree, tmp_path / "image", *form.split())
    disk = Patched(FileDisk(image))
    size = disk.size
    inodes = struct.unpack_from("<Q", disk.pread(0, 96), 64)[0]
    some = random.Random(count)
    opened_ = 0
    for _ in range(count):
        mutate(
            disk,
            lambda: some.choice(
                (some.randrange(96), some.randrange(inodes, size), some.randrange(inodes, size))
            ),
            some,
        )
        with limited():
            try:
                system = Squashfs(Disk(disk))
            except DamageError:
                continue
            opened_ += 1
            for _path, _found in everything(system, disk):
                pass
    assert opened_ > count // 3


def test_a_directory_that_contains_itself_is_damage(tmp_path: Path) -> None:
    (tmp_path / "tree/a/b").mkdir(parents=True)
    image = bytearray(packed(tmp_path / "tree", tmp_path / "image", "-noI").read_bytes())
    names = struct.unpack_from("<Q", image, 72)[0]
    system = Squashfs(Disk(MemoryDisk(image)))
    a = system.child(system.root, b"a")
    assert a is not None
    at = image.index(struct.pack("<HhHH", 0, 0, 1, 0) + b"b", names)
    image[at : at + 2] = (a.inode & 0xFFFF).to_bytes(2, "little")
    with limited():
        looped = Squashfs(Disk(MemoryDisk(image)))
        found = list(looped.walk(looped.root))
    assert [path for path, entry in found if isinstance(entry, Entry)] == [b"a"]
    assert any("is in two places" in str(entry) for _path, entry in found if isinstance(entry, DamageError))


@pytest.mark.parametrize("compression", ["gzip", "lzo", "lz4", "xz", "zstd"])
def test_the_parser_process_reads_it_without_rights(compression: str, tmp_path: Path) -> None:
    tree = tree_in(tmp_path / "tree", with_owners=False)
    disk = FileDisk(packed(tree, tmp_path / "image", "-comp", compression))
    parser = Parser("vm/1/x", [("scsi0", disk)])
    try:
        (volume, *_guest) = parser.volumes()
        contents = RemoteVolume(parser, volume)
        assert contents.facts()["compression"] == compression
        for name in ("text-9", "random-8", "holes"):
            file = contents.child(contents.root, name.encode())
            assert file is not None
            found = b"".join(content_of(contents, [disk], file))
            assert found == (tree / name).read_bytes()
    finally:
        parser.close()
