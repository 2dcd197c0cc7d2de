"""`pbsfs map`: data, holes, changes and damage of an image, as a picture, a table, JSON and files."""

from __future__ import annotations

import json
import struct
import subprocess
import tracemalloc
import xml.etree.ElementTree as ET
import zlib
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from pbsfs.formats.index import FixedIndex, encode_fixed
from pbsfs.tasks.mapping import CHANGED, HOLE, ImageMap
from pbsfs.testing.writer import DatastoreWriter
from tests.support import golden, made, program
from tests.support.mounts import mounted
from tests.support.needs import need
from tests.support.program import PBSFS, environment, error_of, output_of, pbsfs
from tests.support.serving import access, serving
from tests.support.stocked import ARCHIVE, CHUNK, CONFIGURATION, ENCRYPTED, Stocked
from tests.support.terminal import at_a_terminal

OLD, NEW = "2023-11-14T22:13:20Z", "2023-11-15T22:13:20Z"
DISK = f"vm/7/{NEW}/disk.img"
KINDS = ["directory", "server"]

CHUNKS = {letter: made.image(number, "r") for number, letter in enumerate("ABCDE")} | {"0": bytes(CHUNK)}
NIGHTS = ["AB00DD", "AB0ECC00"]
CHANGES = "...XXX" + "XX"  # of the second, by chunk: the last two are new


def disk(letters: str) -> bytes:
    return b"".join(CHUNKS[letter] for letter in letters)


def nights(path: Path) -> DatastoreWriter:
    writer = DatastoreWriter(path)
    for day, letters in enumerate(NIGHTS):
        writer.add_snapshot(
            made.snapshot("7", time=made.TIME + day * made.DAY),
            {"disk.img.fidx": disk(letters)},
            chunk_size=CHUNK,
            verify_state=("ok", None)[day],
        )
    return writer


def lose(writer: DatastoreWriter, place: int) -> None:
    """Removes the chunk at `place` of the second night."""
    stored = writer.snapshot_path(made.snapshot("7", time=made.TIME + made.DAY)) / "disk.img.fidx"
    writer.chunk_path(FixedIndex(stored.read_bytes()).digest(place)).unlink()


def extents(letters: str, changes: str | None = None) -> list[dict[str, Any]]:
    """What --json has to be."""
    found: list[dict[str, Any]] = []
    marked = changes or "." * len(letters)
    for (hole, changed), run in groupby(
        enumerate(letters), lambda item: (item[1] == "0", marked[item[0]] == "X")
    ):
        places = [place for place, _letter in run]
        start = places[0] * CHUNK
        row = {"start": start, "length": len(places) * CHUNK, "depth": 0, "present": True, "zero": hole}
        row |= {"data": not hole, "offset": start}
        found.append(row if changes is None else row | {"changed": changed})
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_ranges_and_changes_are_those_of_the_disks(tmp_path: Path, kind: str) -> None:
    writer = nights(tmp_path / "store")
    with serving(writer.path) as server:
        told = access(server) if kind == "server" else environment(PBSFS_DATASTORE_DIR=str(writer.path))
        assert json.loads(output_of(PBSFS, "map", "--json", DISK, env=told)) == extents(NIGHTS[1])
        for since in ("previous", OLD, f"vm/7/{OLD}", f"vm/7/{OLD}/disk.img"):
            found = output_of(PBSFS, "map", "--json", "--since", since, DISK, env=told)
            assert json.loads(found) == extents(NIGHTS[1], CHANGES)
        found = output_of(PBSFS, "map", "--json", "--since", NEW, DISK, env=told)
        assert json.loads(found) == extents(NIGHTS[1], "." * 8)


@pytest.mark.mount
@pytest.mark.parametrize("kind", KINDS)
def test_json_is_what_qemu_img_says_of_the_image_in_a_mount(tmp_path: Path, kind: str) -> None:
    need("qemu-img")
    writer = nights(tmp_path / "store")
    with serving(writer.path) as server:
        told = access(server) if kind == "server" else environment(PBSFS_DATASTORE_DIR=str(writer.path))
        with mounted(told, tmp_path / "m") as mount:
            command: list[str | Path] = ["qemu-img", "map", "-f", "raw", "--output=json", mount / DISK]
            done = subprocess.run(command, check=True, capture_output=True, timeout=60)
            rows = json.loads(done.stdout)
            here = json.loads(output_of(PBSFS, "map", "--json", mount / DISK, env=told))
        assert [{key: row[key] for key in row if key != "compressed"} for row in rows] == here


PICTURE = f"""\
{DISK}
512 KiB; one character is 64 KiB

      0 B  ██·+++++

█ data: 320 KiB (62%)
· hole: 192 KiB (37%)
+ changed since {OLD}: 320 KiB (62%)
"""
NEVER = "Verify state: none (never verified on the server)\n"


def test_a_directory_is_drawn_with_what_was_looked_at(tmp_path: Path) -> None:
    writer = nights(tmp_path / "store")
    words = ("map", "--datastore-dir", writer.path, "--since", "previous", DISK)
    looked = "pbsfs looked for the files of all chunks, and did not read them; --check reads all data.\n"
    assert output_of(PBSFS, *words) == PICTURE + looked + NEVER
    plain = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    letters = PICTURE.translate(str.maketrans("█·", "#."))
    assert output_of(PBSFS, *words, env=plain) == letters + looked + NEVER
    checked = output_of(PBSFS, *words, "--check")
    assert checked == PICTURE + "pbsfs read and checked all data.\n"


def test_a_server_is_drawn_with_what_was_not_looked_at(tmp_path: Path) -> None:
    writer = nights(tmp_path / "store")
    with serving(writer.path) as server:
        words = ("map", "--since", "previous", DISK)
        not_looked = "pbsfs did not look for damage; --check reads all data.\n"
        assert output_of(PBSFS, *words, env=access(server)) == PICTURE + not_looked + NEVER
        lose(writer, 3)
        done = pbsfs("map", "--check", DISK, env=access(server))
    assert done.returncode == 6
    assert "      0 B  ██·!██··\n" in done.stdout
    assert f"Damaged: {CHUNK} bytes: {3 * CHUNK}+{CHUNK}\npbsfs read and checked all data.\n" in done.stdout


def test_a_missing_chunk_is_found_without_reading(tmp_path: Path) -> None:
    writer = nights(tmp_path / "store")
    lose(writer, 4)  # which is there twice
    done = pbsfs("map", "--datastore-dir", writer.path, DISK)
    assert done.returncode == 6
    assert "      0 B  ██·█!!··\n" in done.stdout
    assert f"\n! damaged: 128 KiB (25%)\nDamaged: {2 * CHUNK} bytes: {4 * CHUNK}+{2 * CHUNK}\n" in done.stdout
    done = pbsfs("map", "--datastore-dir", writer.path, "--table", DISK)
    assert done.stdout.splitlines() == [
        "Offset          Length          Content",
        "0x0             0x20000         data",
        "0x20000         0x10000         hole",
        "0x30000         0x10000         data",
        "0x40000         0x20000         data, damaged",
        "0x60000         0x20000         hole",
    ]
    rows = json.loads(pbsfs("map", "--datastore-dir", writer.path, "--json", DISK).stdout)
    assert [row.get("damaged") for row in rows] == [None, None, None, True, None]
    rows = json.loads(pbsfs("map", "--datastore-dir", writer.path, "--json", "--check", DISK).stdout)
    assert [row.get("damaged") for row in rows] == [False, False, False, True, False]


def test_a_chunk_store_that_is_away_is_no_damage(tmp_path: Path) -> None:
    writer = nights(tmp_path / "store")
    (writer.path / ".chunks").rename(tmp_path / "chunks")
    (writer.path / ".chunks").mkdir()
    text = output_of(PBSFS, "map", "--datastore-dir", writer.path, DISK)
    assert "pbsfs could not look for damage: " in text
    assert "is empty; mount the disk with the chunks there\n" in text
    assert "!" not in text


def test_pictures_go_to_files(tmp_path: Path) -> None:
    writer = nights(tmp_path / "store")
    words = ("map", "--datastore-dir", writer.path, "--since", "previous", DISK)
    out = tmp_path / "a.svg", tmp_path / "a.png"
    assert output_of(PBSFS, *words, "--svg", out[0], "--png", out[1]) == ""
    texts = {element.text for element in ET.parse(out[0]).iter("{http://www.w3.org/2000/svg}text")}
    assert {"data: 320 KiB (62%)", f"changed since {OLD}: 320 KiB (62%)"} < texts
    colours = [0x2F6DB5] * 2 + [0xE3E3E3] + [0xF0A30A] * 5 + [0xFFFFFF]
    assert pixels(out[1].read_bytes())[0][: 9 * 64 : 64] == colours
    text = error_of(pbsfs(*words, "--svg", out[0]), 8)
    assert text == f"{out[0]} exists; remove it, or overwrite it with --force"
    assert output_of(PBSFS, *words, "--force", "--svg", out[0]) == ""
    text = error_of(pbsfs(*words, "--png", tmp_path / "none" / "a.png"), 8)
    assert text.startswith(f"cannot write {tmp_path / 'none' / 'a.png'}: No such file or directory; ")
    text = error_of(pbsfs(*words, "--svg", out[0], "--png", out[0]), 2)
    assert text == f"--svg and --png both name {out[0]}; name two files"


def test_a_picture_goes_to_standard_output(tmp_path: Path) -> None:
    writer = nights(tmp_path / "store")
    words = ("map", "--datastore-dir", writer.path, DISK)
    shown = output_of(PBSFS, *words, "--svg", "-", cwd=tmp_path)
    assert ET.fromstring(shown).tag == "{http://www.w3.org/2000/svg}svg"
    output_of(PBSFS, *words, "--svg", tmp_path / "a.svg")
    assert shown == (tmp_path / "a.svg").read_text()
    assert not (tmp_path / "-").exists()


def test_a_picture_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    writer = nights(tmp_path / "store")
    out = tmp_path / "a.svg"
    no_room = ("sh", "-c", 'ulimit -f 0 && exec "$@"', "sh")
    done = program.run([*no_room, PBSFS, "map", "--datastore-dir", writer.path, DISK, "--svg", out])
    assert error_of(done, 8).startswith(f"cannot write {out}: File too large; ")
    assert not out.exists()


def pixels(image: bytes) -> list[list[int]]:
    """The colours of a PNG of a palette."""
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    parts: dict[bytes, bytes] = {}
    at = 8
    while at < len(image):
        length, name = struct.unpack_from(">I4s", image, at)
        parts[name] = image[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack_from(">I", image, at + 8 + length)
        assert checksum == zlib.crc32(name + parts[name])
        at += 12 + length
    width, height, *kind = struct.unpack(">IIBBBBB", parts[b"IHDR"])
    assert kind == [8, 3, 0, 0, 0]
    palette = [int.from_bytes(parts[b"PLTE"][n : n + 3]) for n in range(0, len(parts[b"PLTE"]), 3)]
    raw = zlib.decompress(parts[b"IDAT"])
    assert len(raw) == height * (width + 1)
    return [[palette[n] for n in raw[y * (width + 1) + 1 : (y + 1) * (width + 1)]] for y in range(height)]


def test_a_terminal_gets_colours_unless_it_wants_none(tmp_path: Path) -> None:
    writer = nights(tmp_path / "store")
    words: list[str | Path] = [PBSFS, "map", "--datastore-dir", writer.path, DISK]
    status, drawn = at_a_terminal(words, [], environment(COLUMNS="80", TERM="xterm"))
    assert (status, "\x1b[34m██\x1b[0m" in drawn) == (0, True)
    status, drawn = at_a_terminal(words, [], environment(COLUMNS="80", NO_COLOR="1"))
    assert (status, "\x1b" in drawn) == (0, False)


def test_an_archive_is_a_stream(stocked: Stocked) -> None:
    rows = json.loads(output_of(PBSFS, "map", "--datastore-dir", stocked.path, "--json", ARCHIVE))
    assert sum(row["length"] for row in rows) == len(stocked.contents[ARCHIVE])


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        ((CONFIGURATION,), 2, f"{CONFIGURATION}: not an image; name an .img, .pxar"),
        ((ENCRYPTED,), 5, "which was not given"),
        (("--since", "previous", ENCRYPTED), 3, "there is no snapshot before it; leave out --since"),
        (("--since", "2020-01-01T00:00:00Z", ENCRYPTED), 3, "there is no '2020-01-01T00:00:00Z'"),
        (("--since", "vm/101", ENCRYPTED), 2, "vm/101: not a snapshot"),
        (("--since", "vm/100/latest", ARCHIVE), 3, "there is no 'root.pxar'"),
        (("--json", "--table", ENCRYPTED), 2, "exclude each other"),
    ],
)
def test_what_cannot_be_drawn_says_why(
    stocked: Stocked, words: tuple[str, ...], status: int, reason: str
) -> None:
    assert reason in error_of(pbsfs("map", "--datastore-dir", stocked.path, *words), status)


def test_a_map_of_a_tib_takes_a_byte_for_each_chunk() -> None:
    chunk_size, count = 4 << 20, 1 << 18
    raw, _csum = encode_fixed([bytes(32)] * count, size=chunk_size * count, chunk_size=chunk_size, ctime=0)
    found = ImageMap(FixedIndex(raw), bytearray(bytes([HOLE, CHANGED]) * (count // 2)))
    tracemalloc.start()
    try:
        found.add_up()
        cells = found.cells(1 << 30)
        assert sum(1 for _extent in found.extents()) == count
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert found.totals.data == found.totals.changed == sum(cell.data for cell in cells) == 1 << 39


@pytest.mark.golden
def test_the_vendors_image_has_the_same_map_plain_and_encrypted() -> None:
    place = ("map", "--table", "--datastore-dir", golden.ROOT / "datastore")
    plain = output_of(PBSFS, *place, "vm/105/latest/drive-sata0.img")
    key = ("--keyfile", golden.ROOT / "keys" / "plain.json")
    assert output_of(PBSFS, *place, *key, "vm/107/latest/drive-scsi0.img") == plain
    offsets = [int(line.split()[0], 16) for line in plain.splitlines()[1:]]
    assert offsets == [0, 300 << 20, 304 << 20, 1020 << 20]
