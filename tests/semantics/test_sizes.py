"""What docs/semantics.md promises of sizes and holes: a test for each promise, by its name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.support.mounts import Mounted, fails_with
from tests.support.program import output_of
from tests.support.stocked import (
    ARCHIVE,
    CHUNK,
    CONFIGURATION,
    ENCRYPTED,
    IMAGE,
    LAYOUT,
    Stocked,
)

pytestmark = pytest.mark.mount


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
