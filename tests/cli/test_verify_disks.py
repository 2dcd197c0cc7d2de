"""`pbsfs verify` and files on disk images: which of them damage hits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pbsfs.formats.index import FixedIndex
from pbsfs.testing.writer import DatastoreWriter
from tests.support import made
from tests.support.damaged_disk import CHUNK, VOLUME, Damaged
from tests.support.program import pbsfs
from tests.support.truth import FILES

IMAGE = "vm/100/2023-11-14T22:13:20Z/drive-scsi0.img"


@pytest.fixture
def damaged(tmp_path: Path) -> Damaged:
    return Damaged(tmp_path)


def test_the_files_with_data_in_a_damaged_chunk_are_named(damaged: Damaged) -> None:
    chunk, files = max(damaged.chunks().items(), key=lambda item: len(item[1]))
    damaged.lose(chunk)
    (found,) = damaged.verify("vm")
    assert found["path"] == IMAGE
    assert found["ranges"] == [{"offset": chunk * CHUNK, "length": CHUNK}]
    assert set(found["files"]) == files
    assert (found["file_count"], found["incomplete"]) == (len(files), [])
    text = damaged.verify("vm", form="--no-progress")
    assert f"\n  files in it that are damaged: {VOLUME}/d" in text
    # Reading the files themselves finds the same ones.
    assert {each["path"] for each in damaged.verify(VOLUME)} == files


def test_the_files_of_several_damaged_chunks_are_named_once(damaged: Damaged) -> None:
    chunks = dict(list(damaged.chunks().items())[::2])
    for number in chunks:
        damaged.lose(number)
    (found,) = damaged.verify()
    assert found["file_count"] == len(found["files"]) > 3
    assert set(found["files"]) == set().union(*chunks.values())


def test_a_volume_whose_metadata_is_damaged_is_named_as_incomplete(damaged: Damaged) -> None:
    damaged.lose((1 << 20) // CHUNK)  # the superblock
    (found,) = damaged.verify()
    assert (found["path"], found["files"]) == (IMAGE, [])
    (incomplete,) = found["incomplete"]
    assert incomplete["path"] == VOLUME
    assert f"{IMAGE}: bytes {1 << 20} to " in incomplete["reason"]
    text = damaged.verify(form="--no-progress")
    assert f"\n  {VOLUME}: can't be read completely, so more may be damaged: " in text


def test_a_disk_whose_table_is_damaged_is_named_as_incomplete(damaged: Damaged) -> None:
    damaged.lose(0)
    (found,) = damaged.verify()
    assert [each["path"] for each in found["incomplete"]] == [VOLUME.removesuffix("-p1")]


def test_damaged_inodes_name_the_directories_that_lack_files(damaged: Damaged) -> None:
    start = damaged.disk.index(b"f7\0\0") // CHUNK  # the directory d1
    damaged.lose(start)
    (found,) = damaged.verify()
    assert {VOLUME, f"{VOLUME}/d1"} & set(found["files"])
    assert [each["path"] for each in found["incomplete"]] == [VOLUME]


def test_a_disk_without_volumes_is_verified_as_before(tmp_path: Path) -> None:
    writer = DatastoreWriter(tmp_path / "store")
    image = made.image(3, "r" * 64, chunk_size=CHUNK)
    snapshot = writer.add_snapshot(made.snapshot(), {"drive-scsi0.img.fidx": image}, chunk_size=CHUNK)
    index = FixedIndex((snapshot / "drive-scsi0.img.fidx").read_bytes())
    writer.chunk_path(index.digest(40)).unlink()
    done = pbsfs("verify", "--json", "--datastore-dir", writer.path)
    (found,) = json.loads(done.stdout)["damaged"]
    assert (found["files"], found["file_count"], found["incomplete"]) == ([], 0, [])
    assert found["ranges"] == [{"offset": 40 * CHUNK, "length": CHUNK}]


@pytest.mark.golden
@pytest.mark.parametrize(
    ("vm", "disk", "chunk"),
    [(320, "scsi0", 159), (320, "scsi1", 22), (321, "sata0", 38), (322, "virtio0", 26)],
)
def test_what_is_named_cannot_be_read(vm: int, disk: str, chunk: int, tmp_path: Path) -> None:
    shutil.copytree(FILES / "datastore", tmp_path / "store")
    (index_file,) = (tmp_path / f"store/vm/{vm}").glob(f"*/drive-{disk}.img.fidx")
    digest = FixedIndex(index_file.read_bytes()).digest(chunk).hex()
    (tmp_path / "store/.chunks" / digest[:4] / digest).unlink()
    words = ("verify", "--json", "--datastore-dir", tmp_path / "store")
    (found,) = json.loads(pbsfs(*words, f"vm/{vm}").stdout)["damaged"]
    place = f"files/vm/{vm}/{index_file.parent.name}"
    read = json.loads(pbsfs(*words, place).stdout)["damaged"]
    assert {each["path"] for each in read} == set(found["files"])
    assert found["files"]
