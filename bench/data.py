"""The data that is measured with: made once, deterministic, kept in a directory.

An image like the disk of a Linux machine: runs of text, of binary data, of what is compressed already, of
zeros; in all compressible to about 30 % at zstd's level 1; more than half of the image was never written.
Stored plain, with a later snapshot of the same machine that shares most chunks, and encrypted.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from bench.measures import GIB, MIB, BenchError
from pbsfs.base.names import ROOT_NAMESPACE, Group, Snapshot
from pbsfs.formats.index import FixedIndex
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode
from pbsfs.testing.writer import DatastoreWriter

VERSION = "2"
"""Of what is made: data of another version is made anew."""

CHUNK = 4 * MIB
IMAGE = "drive-scsi0.img"
INDEX = f"{IMAGE}.fidx"
TIME = 1_700_000_000
DAY = 86_400
KEY = Key(bytes(range(32)))

PLAIN = Snapshot(Group(ROOT_NAMESPACE, "vm", "100"), TIME)
NEWER = Snapshot(Group(ROOT_NAMESPACE, "vm", "100"), TIME + DAY)
ENCRYPTED = Snapshot(Group(ROOT_NAMESPACE, "vm", "101"), TIME)


@dataclass(frozen=True, slots=True)
class Size:
    """How much of it, in chunks: the image, its first run of data, the hole behind that, and data in all."""

    chunks: int
    first_data: int
    first_hole: int
    data: int


FULL = Size(chunks=1024, first_data=72, first_hole=72, data=384)
QUICK = Size(chunks=64, first_data=16, first_hole=16, data=24)


@dataclass(frozen=True, slots=True)
class Data:
    """What was made. `data_chunks`: the numbers of the chunks of `PLAIN` that are no holes."""

    directory: Path
    size: Size
    data_chunks: tuple[int, ...]
    stored: int
    stored_encrypted: int

    @property
    def datastore(self) -> Path:
        return self.directory / "datastore"

    @property
    def raw(self) -> Path:
        return self.directory / "raw.img"

    @property
    def keyfile(self) -> Path:
        return self.directory / "key.json"

    @property
    def image_bytes(self) -> int:
        return self.size.chunks * CHUNK

    @property
    def data_bytes(self) -> int:
        return len(self.data_chunks) * CHUNK

    @property
    def first_data_bytes(self) -> int:
        return self.size.first_data * CHUNK

    @property
    def first_hole(self) -> tuple[int, int]:
        """Its offset and length in bytes."""
        return self.size.first_data * CHUNK, self.size.first_hole * CHUNK

    def index(self, snapshot: Snapshot = PLAIN, key: Key | None = None) -> FixedIndex:
        return FixedIndex((self.datastore / str(snapshot) / INDEX).read_bytes(), key)

    def chunk_path(self, digest: bytes) -> Path:
        return DatastoreWriter(self.datastore).chunk_path(digest)


def make(directory: Path, *, quick: bool) -> Data:
    """The data in `directory`, made if it is not there yet. Raises BenchError where there is no room."""
    size = QUICK if quick else FULL
    place = directory / f"{'quick' if quick else 'full'}-{VERSION}"
    note = place / "made.json"
    if not note.exists():
        if place.exists():
            shutil.rmtree(place)
        place.mkdir(parents=True)
        check_room(place, size.data * CHUNK * 3)
        _write_raw(place / "raw.img", size)
        _write_datastore(place, size)
        note.write_text(json.dumps(_measured(place)))
    found = json.loads(note.read_text())
    data_chunks = tuple(number for number, digit in enumerate(_layout(size)) if digit)
    return Data(place, size, data_chunks, found["stored"], found["stored_encrypted"])


def check_room(place: Path, needed: int) -> None:
    free = shutil.disk_usage(place).free
    if free < needed + GIB // 4:
        raise BenchError(f"{place}: {free // MIB} MiB are free, {needed // MIB} MiB are needed; see --data")


def _layout(size: Size) -> list[bool]:
    """Which chunks hold data: a long run, a long hole, then runs of 1 to 16 chunks."""
    rest = size.chunks - size.first_data - size.first_hole
    left = size.data - size.first_data
    source = random.Random(1)
    tail: list[bool] = []
    while len(tail) < rest:
        holes = source.randrange(1, 17)
        run = min(source.randrange(1, 17), left)
        tail += [False] * holes + [True] * run
        left -= run
    del tail[rest:]
    # What did not find room takes that of holes, from the end.
    missing = size.data - size.first_data - sum(tail)
    for place in range(rest - 1, -1, -1):
        if missing and not tail[place]:
            tail[place] = True
            missing -= 1
    return [True] * size.first_data + [False] * size.first_hole + tail


class _Material:
    """Pools of bytes of several kinds, from which chunks are put together."""

    def __init__(self, pool: int) -> None:
        """`pool`: bytes of each; what is taken from a large one is never the same twice in a chunk."""
        source = random.Random(2)
        letters = "etaoinshrdlucmfwypvbgkjqxz"
        words = [
            "".join(source.choices(letters, range(26, 0, -1), k=source.randrange(2, 11)))
            for _ in range(20_000)
        ]
        weights = list(itertools.accumulate(1 / rank for rank in range(2, len(words) + 2)))
        text = " ".join(source.choices(words, cum_weights=weights, k=pool // 6)).encode()
        binary = bytearray(source.randbytes(pool))
        for place in (0, 3, 5, 6, 7):  # of each 8 bytes, five that hardly change, as in tables and code
            binary[place::8] = bytes([place * 31]) * len(binary[place::8])
        self._pools = {"text": text, "binary": bytes(binary)}

    def chunk(self, seed: int) -> bytes:
        source = random.Random(seed)
        parts: list[bytes] = []
        size = 0
        while size < CHUNK:
            length = min(source.randrange(4, 65) << 12, CHUNK - size)
            kind = source.choices(("text", "binary", "random", "zeros"), (35, 25, 4, 36))[0]
            if kind == "zeros":
                parts.append(bytes(length))
            elif kind == "random":
                parts.append(source.randbytes(length))
            else:
                pool = self._pools[kind]
                start = source.randrange(len(pool) - length)
                parts.append(pool[start : start + length])
            size += length
        return b"".join(parts)


def _write_raw(path: Path, size: Size) -> None:
    material = _Material(min(24 * MIB, size.data * MIB // 4))
    with path.open("wb") as file:
        for number, is_data in enumerate(_layout(size)):
            if is_data:
                file.seek(number * CHUNK)
                file.write(material.chunk(number))
        file.truncate(size.chunks * CHUNK)


def _write_datastore(place: Path, size: Size) -> None:
    raw = place / "raw.img"
    writer = DatastoreWriter(place / "datastore")
    writer.add_snapshot(PLAIN, {INDEX: raw})
    writer.add_snapshot(ENCRYPTED, {INDEX: raw}, crypt_mode=CryptMode.ENCRYPT, key=KEY)
    changing = [number for number, is_data in enumerate(_layout(size)) if is_data][::16]
    with raw.open("r+b") as file:
        before = [os.pread(file.fileno(), 8, number * CHUNK) for number in changing]
        for number in changing:
            os.pwrite(file.fileno(), number.to_bytes(8, "big"), number * CHUNK)
        writer.add_snapshot(NEWER, {INDEX: raw})
        for number, start in zip(changing, before, strict=True):
            os.pwrite(file.fileno(), start, number * CHUNK)
    document = {
        "kdf": None,
        "created": "2023-11-14T22:13:20+00:00",
        "modified": "2023-11-14T22:13:20+00:00",
        "data": base64.b64encode(KEY.reveal()).decode(),
        "fingerprint": KEY.fingerprint,
    }
    (place / "key.json").write_text(json.dumps(document))


def _measured(place: Path) -> dict[str, int]:
    """Bytes that the chunks of data take as they are stored."""
    data = Data(place, QUICK, (), 0, 0)
    sums: dict[str, int] = {}
    for name, snapshot, key in (("stored", PLAIN, None), ("stored_encrypted", ENCRYPTED, KEY)):
        index = data.index(snapshot, key)
        chunks = {index.digest(n) for n in range(index.count) if not index.is_hole(n)}
        sums[name] = sum(os.stat(data.chunk_path(digest)).st_size for digest in chunks)
    return sums
