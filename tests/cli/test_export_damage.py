"""`pbsfs export --on-damage`: a copy with zeros in the place of damage, and a map that says where."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pbsfs.reader.damage import Range
from pbsfs.tasks.image.map import write_map
from tests.support import damage
from tests.support.keyfiles import key_file
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs
from tests.support.stocked import ARCHIVE, CHUNK, CONFIGURATION, ENCRYPTED, IMAGE, NEWER_IMAGE, Stocked, stock

ZERO = ("--on-damage", "zero")
BAD = (1, 4, 5, 8)
"""The chunks of `IMAGE` that are damaged here, in different ways: two touch, and the last is a short one."""


@pytest.fixture
def spoiled(tmp_path: Path) -> Stocked:
    own = stock(tmp_path / "datastore")
    for number, way in zip(BAD, damage.CHUNK_DAMAGE.values(), strict=False):
        part = own.contents[IMAGE][number * CHUNK : (number + 1) * CHUNK]
        way(own.writer.chunk_path(hashlib.sha256(part).digest()), b"other")
    return own


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty directory to export into."""
    (path := tmp_path / "out").mkdir()
    return path


def shown(stocked: Stocked) -> bytes:
    """`IMAGE` as the copy has to be."""
    content = bytearray(stocked.contents[IMAGE])
    for number in BAD:
        end = min((number + 1) * CHUNK, len(content))
        content[number * CHUNK : end] = bytes(end - number * CHUNK)
    return bytes(content)


def export(stocked: Stocked, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return pbsfs("export", "--datastore-dir", stocked.path, *arguments)


def zeros_of(map_file: Path, size: int) -> list[tuple[int, int]]:
    """The ranges that a map file of ddrescue (its manual, 'Mapfile structure') says are bad: offset, length.

    Fails where it is not one, or where its blocks do not cover all of the copy, one behind the other.
    """
    lines = map_file.read_text().splitlines()
    lines = [line for line in lines if not line.startswith("#")]
    number = "(0x[0-9A-F]+|0|[1-9][0-9]*)"
    assert re.fullmatch(rf"{number}\s+[?*/\-F G+]\s+[1-9][0-9]*", lines[0])
    found, end = [], 0
    for line in lines[1:]:
        block = re.fullmatch(rf"{number}\s+{number}\s+([?*/\-+])", line)
        assert block is not None, line
        offset, length = int(block[1], 0), int(block[2], 0)
        assert offset == end
        assert length > 0
        end += length
        if block[3] != "+":
            assert block[3] == "-"
            found.append((offset, length))
    assert end == size
    if tool := shutil.which("ddrescuelog"):
        status = subprocess.run([tool, "--show-status", map_file], check=True, capture_output=True, text=True)
        assert re.search(rf"bad-sector:\s+{sum(length for _o, length in found)} B", status.stdout)
        listed = output_of(tool, "--block-size=1", "--list-blocks=-", map_file).split()
        assert len(listed) == sum(length for _o, length in found)
        assert subprocess.run([tool, "--done-status", map_file], check=False).returncode == bool(found)
    return found


BAD_RANGES = [(CHUNK, CHUNK), (4 * CHUNK, 2 * CHUNK), (8 * CHUNK, 1536)]


def test_without_it_damage_leaves_neither_copy_nor_part_nor_map(spoiled: Stocked, out: Path) -> None:
    for options in ((), ("--on-damage", "fail"), ("--force",)):
        assert IMAGE in error_of(export(spoiled, *options, IMAGE, out / "copy"), 6)
        assert list(out.iterdir()) == []


def test_the_copy_is_whole_with_zeros_where_it_is_damaged_and_a_map_says_where(
    spoiled: Stocked, out: Path
) -> None:
    done = export(spoiled, *ZERO, IMAGE, out / "copy")
    assert done.returncode == 6
    assert sorted(path.name for path in out.iterdir()) == ["copy", "copy.map"]
    content = shown(spoiled)
    assert (out / "copy").read_bytes() == content
    assert zeros_of(out / "copy.map", len(content)) == BAD_RANGES
    *logged, last = done.stderr.splitlines()
    assert len(logged) == len(BAD)  # each chunk, once
    assert all(line.startswith(f"pbsfs: WARNING: {IMAGE}: bytes ") for line in logged)
    assert last == (
        f"pbsfs: the copy is complete, but {3 * CHUNK + 1536} bytes in 3 ranges are zeros instead of "
        f"damaged data; {out / 'copy.map'} lists them"
    )


def test_the_error_is_one_line_where_no_more_is_to_be_logged(spoiled: Stocked, out: Path) -> None:
    done = export(spoiled, *ZERO, "--log-level", "error", IMAGE, out / "copy")
    assert error_of(done, 6).startswith("the copy is complete, but ")


def test_where_nothing_is_damaged_the_map_says_so_and_the_status_is_0(spoiled: Stocked, out: Path) -> None:
    for path in (NEWER_IMAGE, ARCHIVE):
        copy = out / path.replace("/", "-")
        done = export(spoiled, *ZERO, path, copy)
        assert (done.returncode, done.stderr) == (0, "")
        assert copy.read_bytes() == spoiled.contents[path]
        assert zeros_of(Path(f"{copy}.map"), len(spoiled.contents[path])) == []


def test_in_a_directory_the_map_lies_beside_the_copy(spoiled: Stocked, out: Path) -> None:
    assert export(spoiled, *ZERO, IMAGE, out).returncode == 6
    assert sorted(path.name for path in out.iterdir()) == ["drive-scsi0.img", "drive-scsi0.img.map"]


def test_a_map_that_exists_is_refused_before_anything_is_read(spoiled: Stocked, out: Path) -> None:
    (out / "copy.map").write_text("precious")
    text = error_of(export(spoiled, *ZERO, IMAGE, out / "copy"), 8)  # and no chunk was told of
    assert text.startswith(f"{out / 'copy.map'} exists; remove it, or overwrite it with --force")
    assert [path.name for path in out.iterdir()] == ["copy.map"]
    assert (out / "copy.map").read_text() == "precious"
    assert export(spoiled, *ZERO, "--force", IMAGE, out / "copy").returncode == 6
    assert zeros_of(out / "copy.map", len(spoiled.contents[IMAGE])) == BAD_RANGES


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_map_that_could_not_be_written_is_refused_before_anything_is_read(
    spoiled: Stocked, out: Path, force: tuple[str, ...]
) -> None:
    command = (*ZERO, *force, "--map-file")
    text = error_of(export(spoiled, *command, out / "none" / "map", IMAGE, out / "copy"), 8)
    assert text.startswith(f"cannot write {out / 'none' / 'map'}: No such file or directory; ")
    assert text.endswith("create it with mkdir")
    text = error_of(export(spoiled, *command, out / "copy", IMAGE, out / "copy"), 8)
    assert "can't be both the copy and its map" in text
    assert list(out.iterdir()) == []


def test_a_map_without_zeros_makes_no_sense(spoiled: Stocked, out: Path) -> None:
    text = error_of(export(spoiled, "--map-file", out / "map", NEWER_IMAGE, out / "copy"), 2)
    assert "--on-damage zero" in text
    assert list(out.iterdir()) == []


def test_a_pipe_gets_all_of_it_and_a_map_where_one_is_named(spoiled: Stocked, out: Path) -> None:
    content = shown(spoiled)
    command = [PBSFS, "export", "--datastore-dir", str(spoiled.path), *ZERO, "--log-level=error", IMAGE, "-"]
    done = subprocess.run(command, capture_output=True, timeout=60, check=False, env=environment())
    assert (done.returncode, done.stdout) == (6, content)
    assert b"damaged data: 65536+65536, 262144+131072, 524288+1536; read another" in done.stderr
    assert list(out.iterdir()) == []
    done = subprocess.run(
        [*command, f"--map-file={out / 'map'}"],
        capture_output=True,
        timeout=60,
        check=False,
        env=environment(),
    )
    assert (done.returncode, done.stdout) == (6, content)
    assert done.stderr.endswith(f"; {out / 'map'} lists them\n".encode())
    assert zeros_of(out / "map", len(content)) == BAD_RANGES


@pytest.mark.root
def test_a_block_device_gets_all_of_it_and_a_map_where_one_is_named(
    spoiled: Stocked, out: Path, device: Path
) -> None:
    content = shown(spoiled)
    command = (*ZERO, "--force", "--log-level", "error")
    for options, told in (((), "262144+131072"), (("--map-file", out / "map"), f"{out / 'map'} lists them")):
        device.write_bytes(b"\xff" * (2 << 20))
        assert told in error_of(export(spoiled, *command, *options, IMAGE, device), 6)
        assert device.read_bytes()[: len(content)] == content
    assert zeros_of(out / "map", len(content)) == BAD_RANGES
    text = error_of(export(spoiled, *command, "--map-file", device, IMAGE, device), 8)
    assert "can't be both the copy and its map" in text
    assert not device.with_name(f"{device.name}.map").exists()


def test_what_is_no_damage_of_a_chunk_is_never_zeros(spoiled: Stocked, out: Path, tmp_path: Path) -> None:
    (key := tmp_path / "key.json").write_bytes(key_file(key=bytes(32)))
    assert "was not given" in error_of(export(spoiled, *ZERO, ENCRYPTED, out), 5)
    assert "was not given" in error_of(export(spoiled, *ZERO, "--keyfile", key, ENCRYPTED, out), 5)
    damage.flip_bit(spoiled.path / f"{IMAGE}.fidx", 8 * 4100)
    assert "checksum" in error_of(export(spoiled, *ZERO, IMAGE, out), 6)
    damage.flip_bit(spoiled.path / f"{CONFIGURATION}.blob", 8 * 14)
    assert "checksum" in error_of(export(spoiled, *ZERO, CONFIGURATION, out), 6)
    shutil.rmtree(spoiled.path / ".chunks")
    assert error_of(export(spoiled, *ZERO, NEWER_IMAGE, out), 4)
    assert list(out.iterdir()) == []


@given(
    size=st.integers(1, 1 << 45),
    cuts=st.lists(st.tuples(st.integers(0, 1 << 45), st.integers(1, 1 << 30)), max_size=6),
)
def test_any_map_covers_the_whole_copy_and_names_just_the_zeros(
    tmp_path_factory: pytest.TempPathFactory, size: int, cuts: list[tuple[int, int]]
) -> None:
    zeros: list[Range] = []
    for offset, length in sorted(cuts):
        start = max(offset % size, zeros[-1].offset + zeros[-1].length + 1 if zeros else 0)
        if start < size:
            zeros.append(Range(start, min(length, size - start, 1 << 12)))
    path = tmp_path_factory.mktemp("map") / "map"
    write_map(path, size, sorted(zeros), force=False)
    assert zeros_of(path, size) == [(zero.offset, zero.length) for zero in sorted(zeros)]
