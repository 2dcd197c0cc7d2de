"""btrfs: the golden disk, images of all kinds against the kernel's view, damage, and hostile images."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import zstandard

from pbsfs.base.errors import DamageError, UnsupportedError
from pbsfs.contents.base import DECODED, Entry
from pbsfs.disks import lzo
from pbsfs.disks.btrfs.btrfs import Btrfs
from pbsfs.disks.btrfs.checksums import xxhash64
from pbsfs.disks.btrfs.compression import decompress
from pbsfs.disks.btrfs.superblock import read_superblock
from pbsfs.disks.volume import Disk
from tests.disks.btrfs_images import (
    TEXT,
    Patched,
    fill,
    formatted,
    made,
    mounted,
    nodes_in,
    run,
    truth_of,
)
from tests.support import needs
from tests.support.disks import (
    FileDisk,
    GoldenDisk,
    MemoryDisk,
    check_decoded_from,
    content_of,
    differences,
    image_from,
    lines_of,
)
from tests.support.hostile import counts, limited

SUPERBLOCK = 64 << 10


@pytest.mark.golden
def test_every_field_of_the_golden_disk() -> None:
    disk = GoldenDisk(322, "drive-virtio0")
    assert Btrfs.recognise(Disk(disk))
    contents = Btrfs(Disk(disk))
    assert contents.facts() == {
        "label": "data",
        "uuid": "58567017-621b-4d46-92a8-1a20d932d813",
        "journal": "clean",
        "checksums": "crc32c",
        "data checksums": "verified only for compressed data and data in stripes",
        "devices": "1 of 1",
    }
    assert not differences(contents, [disk], lines_of("btrfs.whole"))


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs.need("mkfs.btrfs")
    return made(tmp_path_factory.mktemp("btrfs") / "image")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--csum", "xxhash", "--nodesize", "65536"),
        ("--csum", "sha256", "--nodesize", "4096", "--metadata", "single", "-O", "^no-holes"),
        ("--csum", "blake2", "--mixed"),
    ],
)
def test_what_mkfs_copies_is_there(tmp_path: Path, options: Sequence[str]) -> None:
    needs.need("mkfs.btrfs")
    disk = FileDisk(made(tmp_path / "image", *options))
    # mkfs.btrfs copies a file with two names as two files, and is given the time of the root by its own work.
    truth = truth_of(tmp_path / "image.files")
    assert not differences(Btrfs(Disk(disk)), [disk], truth, but="mt,n")


@pytest.mark.root
@pytest.mark.parametrize(
    ("count", "made_with", "mounted_with"),
    [
        (1, (), "compress-force=zstd"),
        (1, ("--csum", "xxhash"), "compress-force=lzo"),
        (1, ("-O", "^no-holes"), "compress-force=zlib,max_inline=4095"),
        (1, ("--data", "dup"), "nodatasum"),
        (2, ("--data", "raid1", "--metadata", "raid1"), "compress=lzo"),
        (3, ("--data", "raid0", "--metadata", "raid1c3"), "compress=zstd"),
        (4, ("--data", "raid10", "--metadata", "raid10"), "noatime"),
        (3, ("--data", "raid5", "--metadata", "raid1"), "noatime"),
        (4, ("--data", "raid6", "--metadata", "raid1c4"), "compress=zstd"),
    ],
)
def test_the_kernels_view_of_every_profile(
    tmp_path: Path, count: int, made_with: Sequence[str], mounted_with: str
) -> None:
    needs.need_loop()
    needs.need("mkfs.btrfs")
    images = formatted([tmp_path / str(number) for number in range(count)], *made_with)
    with mounted(images, tmp_path / "mnt", mounted_with) as top:
        run("btrfs", "subvolume", "create", top / "sub")
        fill(top / "sub")
        run("btrfs", "subvolume", "create", top / "sub/inner")
        (top / "sub/inner/file").write_bytes(TEXT)
        run("cp", "--reflink=always", top / "sub/text-300001", top / "clone")
        with (top / "clone").open("r+b") as file:
            file.seek(100_000)
            file.write(b"changed")
            file.truncate(250_000)
        run("fallocate", "--length", "1000000", top / "prealloc")
        with (top / "prealloc").open("r+b") as file:
            file.seek(500_000)
            file.write(b"written")
        run("mknod", top / "device", "c", "300", "70000")
        run("btrfs", "subvolume", "snapshot", "-r", top / "sub", top / "snapshot")
        (top / "sub/text-5000").write_bytes(b"later")
    with mounted(images, tmp_path / "mnt", "ro") as top:
        truth = truth_of(top)
    disks = [FileDisk(image) for image in images]
    contents = Btrfs(Disk(disks[0]), [Disk(disk, number) for number, disk in enumerate(disks) if number])
    holes = [piece.length for piece in contents.data(found(contents, b"sub/sparse")) if piece.stream is None]
    assert holes[0] == 1 << 20
    assert len(holes) == 2
    assert contents.facts()["devices"] == f"{count} of {count}"
    del truth[b"snapshot/inner"]["mt"]  # to the kernel it is as old as the mount
    (difference,) = differences(contents, disks, truth)
    assert difference.startswith("b'snapshot/inner': mt")


@pytest.mark.root
def test_subvolumes_by_number_and_the_default_one(tmp_path: Path) -> None:
    needs.need_loop()
    needs.need("mkfs.btrfs")
    (image,) = formatted([tmp_path / "0"])
    before = Btrfs(Disk(FileDisk(image)))
    assert before.subvolume(None) == before.root
    with mounted([image], tmp_path / "mnt", "noatime") as top:
        run("btrfs", "subvolume", "create", top / "one")
        run("btrfs", "subvolume", "create", top / "one/two")
        (top / "one/two/file").write_bytes(TEXT)
        run("btrfs", "subvolume", "set-default", top / "one/two")
    contents = Btrfs(Disk(FileDisk(image)))
    default = contents.subvolume(None)
    assert default is not None
    assert [entry.name for entry in contents.children(default).entries] == [b"file"]
    assert default.inode == found(contents, b"one/two").inode
    one = contents.subvolume(256)
    assert one is not None
    assert [entry.name for entry in contents.children(one).entries] == [b"two"]
    assert contents.subvolume(5) == contents.subvolume(0) == contents.root
    assert contents.subvolume(7) is contents.subvolume(999) is contents.subvolume(1 << 70) is None


@pytest.mark.root
def test_a_device_that_is_missing_costs_only_what_is_on_it_alone(tmp_path: Path) -> None:
    needs.need_loop()
    needs.need("mkfs.btrfs")
    images = formatted([tmp_path / "0", tmp_path / "1"], "--data", "raid0", "--metadata", "raid1")
    with mounted(images, tmp_path / "mnt", "noatime") as top:
        fill(top)
    for number in range(2):
        disk = FileDisk(images[number])
        contents = Btrfs(Disk(disk))
        assert contents.facts()["devices"] == "1 of 2"
        file = found(contents, b"text-100")
        assert b"".join(content_of(contents, [disk], file)) == TEXT[:100]
        file = found(contents, b"text-300001")
        with pytest.raises(DamageError, match=f"on device {2 - number} of the file system, which is missing"):
            b"".join(content_of(contents, [disk], file))


@pytest.mark.root
def test_a_device_that_is_out_of_date_is_not_read(tmp_path: Path) -> None:
    needs.need_loop()
    needs.need("mkfs.btrfs")
    images = formatted([tmp_path / "0", tmp_path / "1"], "--data", "raid1", "--metadata", "raid1")
    with mounted(images, tmp_path / "mnt", "noatime") as top:
        (top / "file").write_bytes(TEXT)
    stale = tmp_path / "stale"
    run("cp", "--sparse=always", images[0], stale)
    with mounted(images, tmp_path / "mnt", "noatime") as top:
        for _ in range(3):
            (top / "file").write_bytes(bytes(reversed(TEXT)))
            run("btrfs", "filesystem", "sync", top)
    disks = [FileDisk(stale), FileDisk(images[1])]
    contents = Btrfs(Disk(disks[0]), [Disk(disks[1], 1)])
    assert contents.facts()["devices"] == "1 of 2"
    assert b"".join(content_of(contents, disks, found(contents, b"file"))) == bytes(reversed(TEXT))


def found(contents: Btrfs, path: bytes) -> Entry:
    entry: Entry | None = contents.root
    for name in path.split(b"/"):
        assert entry is not None
        entry = contents.child(entry, name)
    assert entry is not None
    return entry


def test_child_agrees_with_the_listing(image: Path) -> None:
    contents = Btrfs(Disk(FileDisk(image)))
    directory = found(contents, b"deep/er")
    entries = contents.children(directory).entries
    assert len(entries) == 200
    assert [contents.child(directory, entry.name) for entry in entries] == entries
    assert contents.child(directory, b"missing") is None


def test_inline_data_is_decoded_and_other_data_is_not(image: Path) -> None:
    contents = Btrfs(Disk(FileDisk(image)))
    assert [piece.stream for piece in contents.data(found(contents, b"noise-4096"))] == [0]
    (piece,) = contents.data(found(contents, b"text-100"))
    assert piece.stream == DECODED


# --- damage


def test_the_second_copy_of_a_node_is_read_where_the_first_is_damaged(image: Path) -> None:
    disk = Patched(image)
    contents = Btrfs(Disk(disk))
    good = dict(contents.walk(contents.root))
    assert all(isinstance(entry, Entry) for entry in good.values())
    block = read_superblock(Disk(disk))
    seen: set[bytes] = set()
    for at in nodes_in(image, block.node_uuid, block.node_size):
        content = disk.pread(at, block.node_size)
        if content not in seen:
            seen.add(content)
            disk.changes[at + 200] = b"damaged!"
    assert len(disk.changes) > 5
    contents = Btrfs(Disk(disk))
    assert dict(contents.walk(contents.root)) == good


def test_a_damaged_node_is_an_error_and_never_other_bytes(image: Path) -> None:
    disk = Patched(image)
    block = read_superblock(Disk(disk))
    contents = Btrfs(Disk(disk))
    good = dict(contents.walk(contents.root))
    by_content: dict[bytes, list[int]] = {}
    for at in nodes_in(image, block.node_uuid, block.node_size):
        by_content.setdefault(disk.pread(at, block.node_size), []).append(at)
    hit = 0
    for places in by_content.values():
        disk.changes = {at + 300: b"damaged!" for at in places}
        try:
            contents = Btrfs(Disk(disk))
        except DamageError:
            hit += 1
            continue
        walked = list(contents.walk(contents.root))
        hit += any(isinstance(entry, DamageError) for _path, entry in walked)
        assert all(good[path] == entry for path, entry in walked if isinstance(entry, Entry))
    assert hit > 5


@pytest.mark.parametrize("at", [SUPERBLOCK + 80, SUPERBLOCK + 32, SUPERBLOCK])
def test_the_second_superblock_is_read_where_the_first_is_damaged(image: Path, at: int) -> None:
    disk = Patched(image)
    disk.changes[at] = b"damaged!"
    contents = Btrfs(Disk(disk))
    assert contents.facts()["journal"].startswith("not replayed: the first superblock is damaged")
    assert found(contents, b"deep/er").is_directory
    disk.changes[(64 << 20) + 80] = b"damaged!"
    with pytest.raises(DamageError, match="the superblock at byte 65536 has a wrong checksum"):
        Btrfs(Disk(disk))


@pytest.mark.golden
def test_compressed_files_need_what_they_are_decoded_from() -> None:
    assert check_decoded_from(lambda disk: Btrfs(Disk(disk)), GoldenDisk(322, "drive-virtio0")) == 5


@pytest.mark.golden
def test_damaged_compressed_data_is_an_error() -> None:
    golden = GoldenDisk(322, "drive-virtio0")
    data = bytearray(golden.pread(0, golden.size))
    disk = MemoryDisk(data)
    contents = Btrfs(Disk(disk))
    file = found(contents, b"big/text.log")
    good = b"".join(content_of(contents, [disk], file))
    at = data.find(b"\x28\xb5\x2f\xfd")  # where a frame of zstd begins
    while at >= 0:
        data[at + 40] ^= 1
        at = data.find(b"\x28\xb5\x2f\xfd", at + 4)
    assert len(good) == 400_000
    with pytest.raises(
        DamageError, match=r"inode \d+ of subvolume 5: the data at the address \d+ has a wrong checksum"
    ):
        b"".join(content_of(Btrfs(Disk(disk)), [disk], file))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (188, 1 << 12, "btrfs with zoned is not supported"),
        (188, 1 << 13 | 1 << 40, "btrfs with extent-tree-v2, feature 40 is not supported"),
        (196, 9, "btrfs with checksums of kind 9 is not supported"),
    ],
)
def test_what_is_not_read_is_named(image: Path, at: int, value: int, message: str) -> None:
    disk = Patched(image)
    block = bytearray(disk.pread(SUPERBLOCK, 4096))
    block[at : at + (2 if at == 196 else 8)] = value.to_bytes(2 if at == 196 else 8, "little")
    disk.sealed(SUPERBLOCK, bytes(block))
    with pytest.raises(UnsupportedError, match=message):
        Btrfs(Disk(disk))


@pytest.mark.parametrize("size", [0, 1, 65536, 65600, 65608, 70000])
def test_tiny_volumes_are_not_btrfs(size: int) -> None:
    assert not Btrfs.recognise(Disk(MemoryDisk(bytes(size))))
    with pytest.raises(DamageError):
        Btrfs(Disk(MemoryDisk(bytes(size))))


# --- hostile images

NUMBERS = (0, 1, 2, 255, 256, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def mutated(block: bytes, noise: random.Random) -> bytes:
    """A node with changes where they matter: in its header, its keys, and its items."""
    changed = bytearray(block)
    count, level = struct.unpack_from("<IB", block, 96)
    for _ in range(noise.choice((1, 1, 1, 2, 5))):
        at = noise.randrange(48, 101)
        if count and noise.random() < 0.9:
            row = 101 + noise.randrange(count) * (33 if level else 25)
            at = row + noise.randrange(25)
            if not level and noise.random() < 0.7:
                start, size = struct.unpack_from("<II", block, row + 17)
                at = 101 + start + noise.randrange(max(size, 1))
        at = min(at, len(block) - 8)
        form = noise.choice("BHIQ")
        if noise.random() < 0.3:
            changed[at] ^= 1 << noise.randrange(8)
        else:
            size = struct.calcsize(form)
            struct.pack_into("<" + form, changed, at, noise.choice(NUMBERS) & ((1 << 8 * size) - 1))
    return bytes(changed)


def everything(contents: Btrfs, disk: Patched) -> Iterator[object]:
    for _path, entry in contents.walk(contents.root):
        if isinstance(entry, DamageError):
            continue
        try:
            yield contents.xattrs(entry)
            if entry.is_file:
                pieces = contents.data(entry)
                assert sum(piece.length for piece in pieces) == entry.size
                if entry.size < 16 << 20:
                    assert sum(map(len, content_of(contents, [disk], entry))) == entry.size
        except DamageError:
            continue


@pytest.mark.parametrize("count", counts(200, 2000))
def test_hostile_images_raise_nothing_but_damage(image: Path, count: int) -> None:
    noise = random.Random(count)
    disk = Patched(image)
    block = read_superblock(Disk(disk))
    by_content: dict[bytes, list[int]] = {}
    for at in nodes_in(image, block.node_uuid, block.node_size):
        by_content.setdefault(disk.pread(at, block.node_size), []).append(at)
    for _ in range(count):
        disk.changes = {}
        for content in noise.sample(sorted(by_content), noise.randint(1, 3)):
            for at in by_content[content]:
                disk.sealed(at, mutated(content, noise))
        with limited(), suppress(DamageError):
            for _value in everything(Btrfs(Disk(disk)), disk):
                pass


# --- parts


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0xEF46DB3751D8E999),
        (b"a", 0xD24EC4F1A98C6E5B),
        (bytes(range(32)), 0xCBF59C5116FF32B4),
        (bytes(range(101)), 0xE99038495F85381E),
        (bytes(range(100, 171)), 0x7A1B45DB64B7F2C0),
    ],
)
def test_known_values_of_xxhash(data: bytes, value: int) -> None:
    assert xxhash64(data) == value


def test_lzo_that_is_whole() -> None:
    assert lzo.decompress(b"\x16hello\x11\0\0", 4096) == b"hello"
    # Five literals, a match of 40 bytes at the distance 5, and the end.
    assert lzo.decompress(b"\x16hello\x20\x07\x10\0\x11\0\0", 4096) == b"hello" * 9


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x16hel",
        b"\x16hello",
        b"\x16hello\x11\0\0more",
        b"\x16hello\x20\x07\x1c\0\x11\0\0",  # a match before the begin
        b"\x16hello\x20" + bytes(200) + b"\x01\x10\0\x11\0\0",  # more than the limit
        b"\x20" + bytes(5000),
    ],
)
def test_lzo_that_is_not(data: bytes) -> None:
    with pytest.raises(DamageError, match="LZO"):
        lzo.decompress(data, 4096)


def test_mutated_lzo_raises_nothing_but_damage() -> None:
    noise = random.Random(1)
    for _ in range(2000):
        data = bytes(noise.choice((0, 1, 16, 17, 20, 32, 64, 255, noise.randrange(256))) for _ in range(40))
        try:
            assert len(lzo.decompress(data, 4096)) <= 4096
        except DamageError:
            continue


def test_decompression_is_bounded() -> None:
    bomb = bytes(64 << 20)
    window = zstandard.ZstdCompressionParameters.from_level(3, window_log=17)
    small = zstandard.ZstdCompressor(compression_params=window)
    with pytest.raises(DamageError, match="too much memory"):
        decompress(3, zstandard.compress(bomb), 100_000, 4096)
    assert decompress(1, zlib.compress(bomb), 100_000, 4096) == bytes(100_000)
    assert decompress(3, small.compress(bomb), 100_000, 4096) == bytes(100_000)
    assert decompress(3, zstandard.compress(TEXT[:999]) + bytes(100), 4096, 4096) == TEXT[:999]
    for kind in (1, 2, 3):
        with pytest.raises(DamageError):
            decompress(kind, b"\xff" * 100, 4096, 4096)
    with pytest.raises(UnsupportedError, match="compression of kind 4 is not supported"):
        decompress(4, b"", 1, 4096)


def test_a_file_system_without_files(tmp_path: Path) -> None:
    needs.need("mkfs.btrfs")
    path = image_from(tmp_path / "empty", 120 << 20)
    run("mkfs.btrfs", "-q", "--label", "ëmpty", path)
    contents = Btrfs(Disk(FileDisk(path)))
    assert contents.children(contents.root).entries == []
    assert contents.facts()["label"] == "ëmpty"
