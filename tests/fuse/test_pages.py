"""The kernel's pages of holes: dropped behind a program that reads them in order, and never others."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from pathlib import Path

import pytest

from pbsfs.fuse.pages import AT_ONCE, KEPT, HoleReads
from pbsfs.testing.writer import DatastoreWriter
from tests.support import made
from tests.support.mounts import mounted
from tests.support.waiting import wait_until

MIB = 1 << 20
HOLE, DATA = 192 * MIB, 8 * MIB


def test_a_range_is_dropped_when_a_reader_is_past_it() -> None:
    reads = HoleReads(7)
    found = [passed for at in range(0, 2 * AT_ONCE, MIB) if (passed := reads.passed(at, MIB))]
    assert found[0] == (0, AT_ONCE - KEPT)
    assert all(start == end for (_, end), (start, _) in itertools.pairwise(found))


def test_requests_may_overtake_each_other() -> None:
    reads = HoleReads(7)
    order = [at ^ MIB for at in range(0, AT_ONCE, MIB)]
    assert [passed for at in order if (passed := reads.passed(at, MIB))] == [(0, AT_ONCE - KEPT)]


def test_reads_here_and_there_drop_nothing() -> None:
    reads = HoleReads(7)
    assert not any(reads.passed(turn % 2 * 100 * AT_ONCE + turn * MIB, MIB) for turn in range(200))


def resident(file: Path) -> int:
    """How many bytes of `file` the kernel keeps (mincore(2))."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    size = file.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with file.open("rb") as opened:
        place = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, opened.fileno(), 0)
        assert libc.mincore(place, size, pages) == 0
        libc.munmap(place, size)
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.mount
def test_a_hole_that_was_read_takes_no_memory_and_data_stays(tmp_path: Path) -> None:
    data = b"".join(b"%064d" % number for number in range(DATA // 64))
    with (tmp_path / "image").open("wb") as file:
        file.write(data)
        file.truncate(DATA + HOLE)
    DatastoreWriter(tmp_path / "store").add_snapshot(
        made.snapshot("100"), {"drive-scsi0.img.fidx": tmp_path / "image"}
    )
    with mounted(tmp_path / "store", tmp_path / "m") as mount:
        image = mount / f"{made.snapshot('100')}/drive-scsi0.img"
        for _turn in range(2):
            with image.open("rb", buffering=0) as file:
                assert file.read(DATA) == data
                for _part in range(HOLE // MIB):
                    assert not file.read(MIB).strip(b"\0")
            wait_until(lambda: resident(image) <= DATA + AT_ONCE + KEPT, "the kernel drops the rest")
            assert resident(image) >= DATA
