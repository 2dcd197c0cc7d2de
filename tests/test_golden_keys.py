"""The vendor's own encrypted and signed backups: read with their keys as they were, refused without."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from pbsfs.access.keyring import KeyRing, read_keys
from pbsfs.base.errors import DamageError, KeyRequiredError, PbsfsError
from pbsfs.base.names import MANIFEST, MASTER_KEY_BLOB, ROOT_NAMESPACE, ArchiveKind, Namespace
from pbsfs.base.secret import Secret
from pbsfs.formats import blob
from pbsfs.formats.keyfile import KeyFile
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode, Manifest
from pbsfs.reader.image import Image
from pbsfs.reader.reader import Reader, open_reader
from pbsfs.sources.base import FileInfo, SnapshotInfo
from pbsfs.sources.directory.source import DirectorySource
from tests.sources.server import serving
from tests.support import byhand, damage, golden
from tests.support.server import ReferenceServer

pytestmark = pytest.mark.golden

KEYS = golden.ROOT / "keys"
PASSWORD = "correct-horse"
NAMES = ("plain", "scrypt", "pbkdf2")
LIMIT = 60.0
MIB = 1 << 20

ORIGINALS = {original.path: original for original in golden.originals()}

SPARSE = "vm/107/2023-11-14T23:13:26Z/drive-scsi0.img"
SIGNED = "vm/103/2023-11-14T23:13:22Z"
VICTIM = "vm/101/2023-11-14T23:13:20Z"
WITH_MASTER_KEY = "vm/106/2023-11-14T23:13:25Z"


@functools.cache
def ring(*names: str) -> KeyRing:
    """The keys of those names, from their files."""
    files = [KEYS / f"{name}.json" for name in names]
    return read_keys(
        files, given=None, password=Secret(PASSWORD), ask=lambda _path, _file: None, config_home=KEYS / "none"
    )


@functools.cache
def fingerprint(name: str) -> str:
    found = KeyFile.parse((KEYS / f"{name}.json").read_bytes()).fingerprint
    assert found is not None
    return found


@dataclass(frozen=True)
class Found:
    """A file as listed, and its place in a mount."""

    path: str
    info: SnapshotInfo
    file: FileInfo


@asynccontextmanager
async def opened(kind: str, path: Path, keys: Mapping[str, Key]) -> AsyncIterator[Reader]:
    with trio.fail_after(LIMIT):
        if kind == "directory":
            async with open_reader(DirectorySource(path), keys=keys) as reader:
                yield reader
        else:
            with ReferenceServer(path) as server:
                server.add_user(serving.USER, serving.PASSWORD)
                async with open_reader(serving.source_of(server, connections=2), keys=keys) as reader:
                    yield reader


async def everything(reader: Reader, namespace: Namespace = ROOT_NAMESPACE) -> list[Found]:
    """All files of all snapshots, in all namespaces."""
    found = []
    above = "".join(f"ns/{part}/" for part in namespace.parts)
    for group in await reader.source.groups(namespace):
        for info in await reader.source.snapshots(group.group):
            place = f"{above}{info.snapshot.group.type}/{info.snapshot.group.id}/{info.snapshot.time_text}"
            found += [Found(f"{place}/{file.archive.name}", info, file) for file in info.files]
    for below in await reader.source.namespaces(namespace):
        found += await everything(reader, below)
    return found


@functools.cache
def sum_of_runs(runs: tuple[tuple[int, bytes | None], ...]) -> str:
    """SHA-256 of runs of bytes: of that many zeros, or of what is given. The same runs are summed once."""
    state = hashlib.sha256()
    zeros = bytes(MIB)
    for length, data in runs:
        for _ in range(length // MIB if data is None else 0):
            state.update(zeros)
        state.update(zeros[: length % MIB] if data is None else data)
    return state.hexdigest()


async def sum_of(image: Image) -> str:
    """SHA-256 of an image: holes are believed, all else is read."""
    handle = image.handle()
    state = hashlib.sha256()
    runs: list[tuple[int, bytes | None]] = []
    for extent in image.extents(0, image.size):
        if extent.hole:
            runs.append((extent.length, None))
            continue
        for offset in range(extent.offset, extent.offset + extent.length, 4 * MIB):
            length = min(4 * MIB, extent.offset + extent.length - offset)
            runs.append((length, bytes(await handle.read(offset, length))))
    handle.close()
    if image.size > 100 * MIB:
        return sum_of_runs(tuple(runs))
    for length, data in runs:
        state.update(bytes(length) if data is None else data)
    return state.hexdigest()


async def read(reader: Reader, found: Found) -> tuple[int, str]:
    """Size and SHA-256 of what a file reads as."""
    if found.file.archive.kind is ArchiveKind.BLOB:
        data = await reader.read_blob(found.info, found.file)
        return len(data), hashlib.sha256(data).hexdigest()
    image = await reader.open_image(found.info, found.file)
    return image.size, await sum_of(image)


# --- reading


@pytest.mark.parametrize("kind", ["directory", "server"])
def test_with_all_keys_everything_reads_as_it_was_backed_up(kind: str) -> None:
    checked: set[str] = set()
    others: dict[str, int] = {}

    async def main() -> None:
        async with opened(kind, golden.DATASTORE, ring(*NAMES)) as reader:
            for found in await everything(reader):
                told = await read(reader, found)
                original = ORIGINALS.get(found.path)
                if original is None:
                    name = found.file.archive.filename
                    others[name] = others.get(name, 0) + 1
                    continue
                assert told == (original.size, original.sha256), found.path
                if original.crypt_mode != "none" and original.key is not None:
                    assert found.info.key_fingerprint == fingerprint(original.key)
                checked.add(found.path)

    trio.run(main)
    assert checked == set(ORIGINALS)
    # What was not backed up from a file; its checks were those of the manifest.
    assert others == {"index.json.blob": 15, "catalog.pcat1.didx": 3, "rsa-encrypted.key.blob": 1}


@pytest.mark.parametrize("kind", ["directory", "server"])
def test_the_holes_of_an_encrypted_image_are_those_of_the_plain_one(kind: str) -> None:
    async def main() -> None:
        async with opened(kind, golden.DATASTORE, ring("plain")) as reader:
            (found,) = [f for f in await everything(reader) if f.path == SPARSE]
            image = await reader.open_image(found.info, found.file)
            data = [(e.offset, e.length) for e in image.extents(0, image.size) if not e.hole]
            assert data == [(300 * MIB, 4 * MIB), (1020 * MIB, 4 * MIB)]
            text = bytes(await image.read(300 * MIB, 4 * MIB))
            assert text.strip(b"\0") == text[4096 : 4096 + MIB].strip(b"\0") != b""

    trio.run(main)


@pytest.mark.parametrize("kind", ["directory", "server"])
def test_without_keys_all_that_is_encrypted_is_listed_and_refused_by_its_keys_name(kind: str) -> None:
    refused: dict[str, str] = {}

    async def main() -> None:
        async with opened(kind, golden.DATASTORE, {}) as reader:
            for found in await everything(reader):
                original = ORIGINALS.get(found.path)
                if found.file.archive.kind is not ArchiveKind.BLOB and original is not None:
                    assert found.file.size == original.size
                if found.file.crypt_mode is not CryptMode.ENCRYPT:
                    continue
                try:
                    await read(reader, found)
                except KeyRequiredError as error:
                    refused[found.path] = str(error)

    trio.run(main)
    encrypted = {path: original for path, original in ORIGINALS.items() if original.encrypted}
    assert set(refused) >= set(encrypted)
    assert not any(path.endswith(MASTER_KEY_BLOB.name) for path in refused)
    for path, original in encrypted.items():
        assert fingerprint(original.key or "") in refused[path]
        assert path in refused[path]


@pytest.mark.parametrize("name", [*NAMES, "other"])
def test_a_key_opens_its_own_backups_and_no_others(name: str) -> None:
    told = outcomes(golden.DATASTORE, ring(name))
    for path, original in ORIGINALS.items():
        if original.key in (None, name):
            assert told[path] == original.sha256
            continue
        error = told[path]
        assert isinstance(error, KeyRequiredError)
        assert fingerprint(original.key or "") in str(error)
        assert fingerprint(name) in str(error)
    assert isinstance(told[f"{VICTIM}/drive-scsi0.img"], str) == (name == "plain")


# --- attacks


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., Path]:
    """Copies snapshots into a datastore of their own; chunks only where they are to be written to."""

    def copy(*snapshots: str, chunks: bool = False) -> Path:
        path = tmp_path / "datastore"
        path.mkdir()
        if chunks:
            (path / ".chunks").mkdir()
        else:
            (path / ".chunks").symlink_to(golden.DATASTORE / ".chunks")
        for backup_type in ("vm", "ct", "host"):
            (path / backup_type).mkdir()
        for snapshot in snapshots:
            shutil.copytree(golden.DATASTORE / snapshot, path / snapshot, copy_function=shutil.copyfile)
            for place in (path / snapshot, (path / snapshot).parent):
                place.chmod(0o755)
        return path

    return copy


def outcomes(path: Path, keys: Mapping[str, Key]) -> dict[str, str | PbsfsError]:
    """The checksum or the error of every file of a datastore."""

    async def main() -> dict[str, str | PbsfsError]:
        told: dict[str, str | PbsfsError] = {}
        async with opened("directory", path, keys) as reader:
            for found in await everything(reader):
                try:
                    told[found.path] = (await read(reader, found))[1]
                except PbsfsError as error:
                    told[found.path] = error
        return told

    return trio.run(main)


def check_all_refused(told: Mapping[str, str | PbsfsError], reason: str) -> None:
    assert len(told) > 1
    for path, outcome in told.items():
        assert type(outcome) is DamageError, path
        assert reason in str(outcome)


def manifest_of(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(blob.decode((path / MANIFEST.filename).read_bytes(), max_size=MIB))
    return data


def changes() -> Iterator[tuple[str, Callable[[dict[str, Any]], object], str]]:
    mismatch = "its signature does not match"
    yield "signature removed", lambda d: d.pop("signature"), "has no signature"
    yield "signature changed", lambda d: d.update(signature="0" * 64), mismatch
    yield "mode", lambda d: d["files"][0].update({"crypt-mode": "none"}), mismatch
    yield "size", lambda d: d["files"][0].update(size=512), mismatch
    yield "checksum", lambda d: d["files"][0].update(csum="00" * 32), mismatch
    yield "file removed", lambda d: d["files"].pop(), mismatch
    yield "time", lambda d: d.update({"backup-time": d["backup-time"] + 1}), mismatch


@pytest.mark.parametrize("snapshot", [VICTIM, SIGNED])
@pytest.mark.parametrize(("change", "reason"), [pytest.param(c, r, id=n) for n, c, r in changes()])
def test_a_changed_manifest_of_the_vendors_is_refused_with_all_its_files(
    copied: Callable[..., Path],
    snapshot: str,
    change: Callable[[dict[str, Any]], object],
    reason: str,
) -> None:
    path = copied(snapshot)
    data = manifest_of(path / snapshot)
    change(data)
    damage.replace(path / snapshot / MANIFEST.filename, blob.encode(json.dumps(data).encode()))
    check_all_refused(outcomes(path, ring(*NAMES)), reason)


def test_a_genuine_manifest_of_another_snapshot_is_refused(copied: Callable[..., Path]) -> None:
    path = copied(VICTIM)
    for file in (path / VICTIM).iterdir():
        file.unlink()
    for file in (golden.DATASTORE / SIGNED).iterdir():
        shutil.copyfile(file, path / VICTIM / file.name)
    check_all_refused(outcomes(path, ring(*NAMES)), "it is the manifest of another snapshot: vm/103, ")


def test_an_index_of_another_snapshot_is_refused(copied: Callable[..., Path]) -> None:
    # VM 107 is encrypted with the same key: all of its chunks would decrypt.
    path = copied(VICTIM)
    name = "drive-scsi0.img.fidx"
    other = (golden.DATASTORE / SPARSE).parent / name
    damage.replace(path / VICTIM / name, other.read_bytes())
    told = outcomes(path, ring("plain"))
    (refused,) = [p for p, outcome in told.items() if isinstance(outcome, PbsfsError)]
    assert refused == f"{VICTIM}/drive-scsi0.img"
    assert "checksum differs from the manifest" in str(told[refused])


def test_a_plain_chunk_and_any_bit_in_iv_tag_and_ciphertext_are_refused(copied: Callable[..., Path]) -> None:
    name = "drive-efidisk0.img"
    path = copied(VICTIM, chunks=True)
    digest = (golden.DATASTORE / VICTIM / f"{name}.fidx").read_bytes()[4096:].hex()
    assert len(digest) == 64
    raw = (golden.DATASTORE / ".chunks" / digest[:4] / digest).read_bytes()
    (chunk := path / ".chunks" / digest[:4] / digest).parent.mkdir()
    (key,) = ring("plain").values()
    content = blob.decode(raw, max_size=512, key=key)
    assert hashlib.sha256(content).hexdigest() == ORIGINALS[f"{VICTIM}/{name}"].sha256

    async def main() -> None:
        for changed, reason in attempts:
            chunk.write_bytes(changed)
            async with opened("directory", path, ring("plain")) as reader:
                (found,) = [f for f in await everything(reader) if f.path == f"{VICTIM}/{name}"]
                image = await reader.open_image(found.info, found.file)
                if not reason:
                    assert await image.read(0, 512) == content
                    continue
                with pytest.raises(DamageError, match=reason):
                    await image.read(0, 512)

    attempts = [(raw, ""), (blob.encode(content), "not encrypted")]
    bits = [*range(8 * 12, 8 * 44, 7), 8 * 44 - 1, *range(8 * 44, 8 * len(raw), 31), 8 * len(raw) - 1]
    attempts += [(byhand.with_crc(byhand.flipped(raw, bit)), "decryption failed") for bit in bits]
    trio.run(main)


def test_the_manifest_of_the_vendors_that_comes_out_is_the_stored_one() -> None:
    async def main() -> None:
        async with opened("directory", golden.DATASTORE, ring(*NAMES)) as reader:
            for found in await everything(reader):
                if found.file.archive == MANIFEST:
                    text = await reader.read_blob(found.info, found.file)
                    stored = golden.DATASTORE / found.path.replace("index.json", MANIFEST.filename)
                    assert text == blob.decode(stored.read_bytes(), max_size=MIB)
                    assert Manifest.parse(text).key_fingerprint == found.info.key_fingerprint

    trio.run(main)
