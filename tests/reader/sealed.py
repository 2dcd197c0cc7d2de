"""Backups with keys, how they are read, and a datastore that an attacker changes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from pbsfs.access.keyring import KeyRing
from pbsfs.base.errors import KeyRequiredError, PbsfsError
from pbsfs.base.names import MANIFEST, ArchiveKind, Snapshot
from pbsfs.formats import blob
from pbsfs.formats.index import FixedIndex
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode, Manifest
from pbsfs.reader.image import Extent
from pbsfs.reader.reader import Reader, open_reader
from pbsfs.sources.base import SnapshotInfo
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.server import serving
from tests.support import damage, made
from tests.support.made import DAY, KEY, TIME
from tests.support.sources import MemorySource, file_of

CHUNK = 1 << 16
LIMIT = 30.0

SOURCES = ("directory", "server")
each_source = pytest.mark.parametrize("kind", SOURCES)

DISK = "disk.img.fidx"
OTHER_DISK = "efi.img.fidx"
STREAM = "root.pxar.didx"
CONF = "qemu-server.conf.blob"
TINY = "fw.conf.blob"

LOG = b"starting new backup\n" * 9

NEWER = made.snapshot(time=TIME + DAY)
OLDER = made.snapshot(time=TIME)
ANOTHER = made.snapshot("101", time=TIME + DAY)


def contents(seed: int) -> dict[str, bytes]:
    """Files of a snapshot, by their stored names."""
    return {
        DISK: made.image(seed, "r0tr", tail=512),
        OTHER_DISK: made.image(seed + 1, "rt0r", tail=512),
        STREAM: made.image(seed + 2, "rt", tail=99),
        CONF: b"cores: %d\n" % seed * 50,
        TINY: b"%02d" % seed,
    }


def ring(*keys: Key) -> KeyRing:
    return KeyRing(keys)


@dataclass
class Seen:
    """What there is of a snapshot, by stored names: bytes that came out, errors, sizes, extents."""

    data: dict[str, bytes] = field(default_factory=dict)
    errors: dict[str, PbsfsError] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    extents: dict[str, list[Extent]] = field(default_factory=dict)


@asynccontextmanager
async def opened(kind: str, path: Path, keys: Mapping[str, Key]) -> AsyncIterator[Reader]:
    """A reader of the datastore in `path`, of its directory or of a server."""
    with trio.fail_after(LIMIT):
        if kind == "directory":
            async with open_reader(DirectorySource(path), keys=keys) as reader:
                yield reader
        else:
            with serving.served(path) as server:
                async with open_reader(serving.source_of(server), keys=keys) as reader:
                    yield reader


async def look(reader: Reader, snapshot: Snapshot) -> Seen:
    """Reads every file of a snapshot, each image chunk by chunk."""
    seen = Seen()
    info = await serving.info_of(reader, snapshot)
    for file in info.files:
        name = file.archive.filename
        seen.sizes[name] = file.size
        try:
            if file.archive.kind is ArchiveKind.BLOB:
                seen.data[name] = await reader.read_blob(info, file)
            else:
                image = await reader.open_image(info, file)
                seen.extents[name] = list(image.extents(0, image.size))
                seen.data[name] = b""
                for offset in range(0, image.size, CHUNK):
                    try:
                        seen.data[name] += await image.read(offset, CHUNK)
                    except PbsfsError as error:
                        seen.errors[name] = error
        except PbsfsError as error:
            seen.errors[name] = error
    return seen


def seen_in(kind: str, path: Path, keys: Mapping[str, Key], *snapshots: Snapshot) -> list[Seen]:
    async def main() -> list[Seen]:
        async with opened(kind, path, keys) as reader:
            return [await look(reader, snapshot) for snapshot in snapshots]

    return trio.run(main)  # on a true clock: sources work in threads


def check_key_required(
    errors: Iterable[PbsfsError], snapshot: Snapshot, fingerprint: str, *words: str
) -> None:
    for error in errors:
        assert isinstance(error, KeyRequiredError), error
        assert str(error).startswith(f"{snapshot}/")
        assert fingerprint in str(error)
        for word in words:
            assert word in str(error)


@dataclass
class Target:
    """A datastore to attack: `OLDER`, `NEWER` and `ANOTHER`, of which `NEWER` is the victim."""

    writer: DatastoreWriter
    mode: CryptMode

    @property
    def place(self) -> Path:
        return self.writer.snapshot_path(NEWER)

    def manifest(self) -> dict[str, Any]:
        raw = (self.place / MANIFEST.filename).read_bytes()
        data: dict[str, Any] = json.loads(blob.decode(raw, max_size=1 << 20))
        return data

    def forge(self, change: Callable[[dict[str, Any]], object], *, key: Key | None = None) -> None:
        """Changes the manifest; signs it again where there is a key."""
        data = self.manifest()
        change(data)
        if key is not None:
            data["signature"] = key.sign(Manifest.parse(json.dumps(data).encode()).signed).hex()
        damage.replace(self.place / MANIFEST.filename, blob.encode(json.dumps(data).encode()))

    def take_from(self, snapshot: Snapshot, *names: str) -> None:
        """Puts files of another snapshot in the place of the victim's; all of them unless told."""
        place = self.writer.snapshot_path(snapshot)
        for name in names or sorted(path.name for path in place.iterdir()):
            damage.replace(self.place / name, (place / name).read_bytes())

    def chunk_path(self, number: int) -> Path:
        """The stored chunk of the victim's `DISK`."""
        return self.writer.chunk_path(FixedIndex((self.place / DISK).read_bytes()).digest(number))


def target(path: Path, mode: CryptMode) -> Target:
    writer = DatastoreWriter(path)
    for seed, snapshot in ((1, NEWER), (11, OLDER), (21, ANOTHER)):
        writer.add_snapshot(
            snapshot, contents(seed), crypt_mode=mode, key=KEY, chunk_size=CHUNK, client_log=LOG
        )
    return Target(writer, mode)


def first(data: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = data["files"][0]
    assert entry["filename"] == DISK
    return entry


Attack = Callable[[Target], object]

DOES_NOT_MATCH = "its signature does not match"


CSUM_DIFFERS = "checksum differs from the manifest"


each_mode = pytest.mark.parametrize("mode", [CryptMode.ENCRYPT, CryptMode.SIGN_ONLY], ids=lambda m: m.value)


def check_others(found: Seen) -> None:
    """The older snapshot was not touched, and reads as ever."""
    assert found.errors == {}
    assert contents(11).items() <= found.data.items()


def stored(mode: CryptMode = CryptMode.ENCRYPT) -> tuple[MemorySource, SnapshotInfo]:
    source = MemorySource()
    return source, source.add(NEWER, contents(1), crypt_mode=mode, key=KEY, client_log=LOG)


async def read(reader: Reader, info: SnapshotInfo, name: str) -> bytes:
    file = file_of(info, name)
    if file.archive.kind is ArchiveKind.BLOB:
        return await reader.read_blob(info, file)
    image = await reader.open_image(info, file)
    return bytes(await image.read(0, image.size))
