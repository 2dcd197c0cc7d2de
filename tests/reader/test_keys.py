"""Encrypted and signed backups: read like plain ones with their key, and no attack gets a byte through."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from pbsfs.access.keyring import KeyRing, read_keys
from pbsfs.base.errors import DamageError, KeyRequiredError, PbsfsError, SourceError
from pbsfs.base.names import CLIENT_LOG, MANIFEST, MASTER_KEY_BLOB, Archive, ArchiveKind, Snapshot
from pbsfs.base.secret import Secret
from pbsfs.formats import blob
from pbsfs.formats.blob import BlobKind
from pbsfs.formats.index import FixedIndex
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode, Manifest
from pbsfs.reader.image import Extent
from pbsfs.reader.reader import Reader, open_reader
from pbsfs.sources.base import FileInfo, SnapshotInfo
from pbsfs.sources.directory.source import DirectorySource
from pbsfs.testing.writer import DatastoreWriter
from tests.sources.server import serving
from tests.support import byhand, damage, made
from tests.support.keyfiles import KINDS, PASSWORD, key_file
from tests.support.made import DAY, KEY, OTHER_KEY, TIME
from tests.support.run import in_trio
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


# --- reading all of a snapshot


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


# --- every combination


@dataclass(frozen=True)
class Combination:
    key_kind: str | None
    mode: CryptMode
    compress: bool
    snapshot: Snapshot
    files: dict[str, bytes]
    key: Key | None


def combinations() -> list[Combination]:
    keys: dict[str | None, Key] = {kind: Key(bytes([n] * 32)) for n, kind in enumerate(KINDS)}
    kinds: list[tuple[str | None, CryptMode]] = [(None, CryptMode.NONE)]
    kinds += itertools.product(KINDS, (CryptMode.ENCRYPT, CryptMode.SIGN_ONLY))
    return [
        Combination(kind, mode, compress, made.snapshot(str(number)), contents(number), keys.get(kind))
        for number, ((kind, mode), compress) in enumerate(itertools.product(kinds, (True, False)), 100)
    ]


COMBINATIONS = combinations()


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datastore with a snapshot of each combination."""
    writer = DatastoreWriter(tmp_path_factory.mktemp("kinds") / "datastore")
    for one in COMBINATIONS:
        writer.add_snapshot(
            one.snapshot,
            one.files,
            crypt_mode=one.mode,
            key=one.key,
            compress=one.compress,
            chunk_size=CHUNK,
            client_log=LOG,
        )
    return writer.path


@pytest.fixture(scope="module")
def key_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a key file of each kind."""
    place = tmp_path_factory.mktemp("keys")
    for one in COMBINATIONS:
        if one.key is not None and one.key_kind is not None:
            text = key_file(one.key_kind, key=one.key.reveal(), fingerprint=one.key.fingerprint)
            (place / f"{one.key_kind}.json").write_bytes(text)
    return place


def test_the_combinations_are_all_there(every_kind: Path) -> None:
    kinds = {
        blob.kind_of(path.read_bytes())
        for path in every_kind.rglob("*")
        if path.parent.parent.name == ".chunks"
    }
    assert kinds == set(BlobKind)
    for one in COMBINATIONS:
        sealed = one.mode is CryptMode.ENCRYPT
        raw = (every_kind / str(one.snapshot) / CONF).read_bytes()
        assert blob.kind_of(raw).encrypted == sealed
        assert blob.kind_of(raw).compressed == one.compress


@each_source
def test_every_kind_of_key_mode_and_blob_reads_back_as_it_was_with_its_holes(
    every_kind: Path, key_files: Path, kind: str
) -> None:
    keys = read_keys(
        [key_files],
        given=None,
        password=Secret(PASSWORD),
        ask=lambda _path, _file: None,
        config_home=key_files,
    )
    assert len(keys) == len(KINDS)
    found = seen_in(kind, every_kind, keys, *(one.snapshot for one in COMBINATIONS))
    for one, seen in zip(COMBINATIONS, found, strict=True):
        assert seen.errors == {}
        text = seen.data.pop(MANIFEST.filename)
        assert Manifest.parse(text).backup_id == one.snapshot.group.id
        assert seen.data.pop(CLIENT_LOG.filename) == LOG
        assert seen.data == one.files
        holes = [(e.offset, e.length) for e in seen.extents[DISK] if e.hole]
        assert holes == [(CHUNK, CHUNK)]


@each_source
def test_without_keys_only_what_is_encrypted_is_refused_and_listed_with_its_size(
    every_kind: Path, kind: str
) -> None:
    found = seen_in(kind, every_kind, {}, *(one.snapshot for one in COMBINATIONS))
    for one, seen in zip(COMBINATIONS, found, strict=True):
        assert {name: seen.sizes[name] for name in (DISK, STREAM)} == {
            name: len(one.files[name]) for name in (DISK, STREAM)
        }
        assert MANIFEST.filename in seen.data
        if one.mode is CryptMode.ENCRYPT and one.key is not None:
            assert set(seen.errors) == {*one.files, CLIENT_LOG.filename}
            check_key_required(seen.errors.values(), one.snapshot, one.key.fingerprint, "encrypted")
        else:
            assert seen.errors == {}
            assert one.files.items() <= seen.data.items()


def check_key_required(
    errors: Iterable[PbsfsError], snapshot: Snapshot, fingerprint: str, *words: str
) -> None:
    for error in errors:
        assert isinstance(error, KeyRequiredError), error
        assert str(error).startswith(f"{snapshot}/")
        assert fingerprint in str(error)
        for word in words:
            assert word in str(error)


@each_source
def test_a_wrong_key_is_told_from_damage_by_both_fingerprints(every_kind: Path, kind: str) -> None:
    found = seen_in(kind, every_kind, ring(OTHER_KEY), *(one.snapshot for one in COMBINATIONS))
    for one, seen in zip(COMBINATIONS, found, strict=True):
        if one.key is None:
            assert seen.errors == {}
            assert one.files.items() <= seen.data.items()
            continue
        sealed = one.mode is CryptMode.ENCRYPT
        # What is only signed too: who gives keys wants nothing that they don't vouch for.
        assert set(seen.errors) == {*one.files, *([CLIENT_LOG.filename] if sealed else [])}
        word = "encrypted" if sealed else "signed"
        check_key_required(
            seen.errors.values(), one.snapshot, one.key.fingerprint, word, OTHER_KEY.fingerprint
        )


# --- attacks


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


def flip_hex(text: str) -> str:
    return ("1" if text[0] == "0" else "0") + text[1:]


def first(data: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = data["files"][0]
    assert entry["filename"] == DISK
    return entry


def add_file(attacked: Target) -> None:
    raw = blob.encode(b"evil")
    (attacked.place / "evil.blob").write_bytes(raw)
    csum = blob.chunk_digest(raw, None).hex()
    entry = {"filename": "evil.blob", "crypt-mode": "none", "size": len(raw), "csum": csum}
    attacked.forge(lambda data: data["files"].append(entry))


def rename_file(attacked: Target) -> None:
    shutil.copy(attacked.place / DISK, attacked.place / "new.img.fidx")
    attacked.forge(lambda data: first(data).update(filename="new.img.fidx"))


def swap_names(data: dict[str, Any]) -> None:
    one, two = data["files"][:2]
    one["filename"], two["filename"] = two["filename"], one["filename"]


def other_mode(data: dict[str, Any]) -> None:
    modes = {"encrypt": "sign-only", "sign-only": "encrypt"}
    first(data).update({"crypt-mode": modes[first(data)["crypt-mode"]]})


Attack = Callable[[Target], object]

DOES_NOT_MATCH = "its signature does not match"
NO_SIGNATURE = "has no signature"
OF_ANOTHER = "it is the manifest of another snapshot"

ON_THE_MANIFEST: dict[str, tuple[Attack, str]] = {
    "a digit of the signature": (
        lambda t: t.forge(lambda d: d.update(signature=flip_hex(d["signature"]))),
        DOES_NOT_MATCH,
    ),
    "the signature is null": (lambda t: t.forge(lambda d: d.update(signature=None)), NO_SIGNATURE),
    "the signature is gone": (lambda t: t.forge(lambda d: d.pop("signature")), NO_SIGNATURE),
    "the signature is empty": (lambda t: t.forge(lambda d: d.update(signature="")), DOES_NOT_MATCH),
    "the signature is no text": (lambda t: t.forge(lambda d: d.update(signature="\ud800")), DOES_NOT_MATCH),
    "signature and fingerprint are gone": (
        lambda t: t.forge(lambda d: (d.pop("signature"), d["unprotected"].pop("key-fingerprint"))),
        NO_SIGNATURE,
    ),
    "signed with another key": (lambda t: t.forge(lambda _d: None, key=OTHER_KEY), DOES_NOT_MATCH),
    "a checksum": (
        lambda t: t.forge(lambda d: first(d).update(csum=flip_hex(first(d)["csum"]))),
        DOES_NOT_MATCH,
    ),
    "a size": (lambda t: t.forge(lambda d: first(d).update(size=first(d)["size"] - 512)), DOES_NOT_MATCH),
    "another crypt mode": (lambda t: t.forge(other_mode), DOES_NOT_MATCH),
    "crypt mode none": (lambda t: t.forge(lambda d: first(d).update({"crypt-mode": "none"})), DOES_NOT_MATCH),
    "no crypt mode": (lambda t: t.forge(lambda d: first(d).pop("crypt-mode")), DOES_NOT_MATCH),
    "a file more": (add_file, DOES_NOT_MATCH),
    "a file less": (lambda t: t.forge(lambda d: d["files"].pop()), DOES_NOT_MATCH),
    "a file of another name": (rename_file, DOES_NOT_MATCH),
    "files whose names were swapped": (lambda t: t.forge(swap_names), DOES_NOT_MATCH),
    "a member more": (lambda t: t.forge(lambda d: d.update(more=1)), DOES_NOT_MATCH),
    "another time": (lambda t: t.forge(lambda d: d.update({"backup-time": TIME})), DOES_NOT_MATCH),
    "another id": (lambda t: t.forge(lambda d: d.update({"backup-id": "101"})), DOES_NOT_MATCH),
    "another type": (lambda t: t.forge(lambda d: d.update({"backup-type": "host"})), DOES_NOT_MATCH),
    "the manifest of another group": (lambda t: t.take_from(ANOTHER, MANIFEST.filename), OF_ANOTHER),
    "all of another group's snapshot": (lambda t: t.take_from(ANOTHER), OF_ANOTHER),
    "the manifest of an older snapshot": (lambda t: t.take_from(OLDER, MANIFEST.filename), OF_ANOTHER),
    "all of an older snapshot": (lambda t: t.take_from(OLDER), OF_ANOTHER),
}

each_mode = pytest.mark.parametrize("mode", [CryptMode.ENCRYPT, CryptMode.SIGN_ONLY], ids=lambda m: m.value)


def check_others(found: Seen) -> None:
    """The older snapshot was not touched, and reads as ever."""
    assert found.errors == {}
    assert contents(11).items() <= found.data.items()


@each_source
@each_mode
@pytest.mark.parametrize("name", ON_THE_MANIFEST)
def test_a_manifest_that_was_changed_or_swapped_lets_nothing_through(
    tmp_path: Path, kind: str, mode: CryptMode, name: str
) -> None:
    attack, reason = ON_THE_MANIFEST[name]
    attacked = target(tmp_path / "datastore", mode)
    attack(attacked)
    seen, others = seen_in(kind, attacked.writer.path, ring(KEY, OTHER_KEY), NEWER, OLDER)
    assert seen.data == {}
    assert MANIFEST.filename in seen.errors
    assert len(seen.errors) > 4
    for error in seen.errors.values():
        assert type(error) is DamageError
        assert reason in str(error)
        assert str(error).startswith(f"{NEWER}/index.json.blob: ")
    check_others(others)


@each_source
@each_mode
def test_a_newer_manifest_in_the_place_of_an_older_is_refused_too(
    tmp_path: Path, kind: str, mode: CryptMode
) -> None:
    attacked = target(tmp_path / "datastore", mode)
    older = attacked.writer.snapshot_path(OLDER)
    for path in attacked.place.iterdir():
        damage.replace(older / path.name, path.read_bytes())
    (seen,) = seen_in(kind, attacked.writer.path, ring(KEY), OLDER)
    assert seen.data == {}
    assert all(OF_ANOTHER in str(error) for error in seen.errors.values())


@each_source
@each_mode
@pytest.mark.parametrize("signer", [None, OTHER_KEY], ids=["as it was", "signed with it"])
def test_a_manifest_that_names_a_key_that_is_not_given_is_not_read_while_keys_are_given(
    tmp_path: Path, kind: str, mode: CryptMode, signer: Key | None
) -> None:
    attacked = target(tmp_path / "datastore", mode)

    def rename_key(data: dict[str, Any]) -> None:
        data["unprotected"]["key-fingerprint"] = OTHER_KEY.fingerprint

    attacked.forge(rename_key, key=signer)
    seen, others = seen_in(kind, attacked.writer.path, ring(KEY), NEWER, OLDER)
    assert set(seen.errors) >= set(contents(1))
    check_key_required(seen.errors.values(), NEWER, OTHER_KEY.fingerprint)
    assert set(seen.data) <= {MANIFEST.filename, CLIENT_LOG.filename}
    check_others(others)
    # Where that key is given too, the signature tells.
    (seen,) = seen_in(kind, attacked.writer.path, ring(KEY, OTHER_KEY), NEWER)
    if signer is None:
        assert all(DOES_NOT_MATCH in str(error) for error in seen.errors.values())
        assert seen.data == {}


@each_source
@each_mode
def test_a_manifest_that_names_no_key_is_tried_with_those_that_are_given(
    tmp_path: Path, kind: str, mode: CryptMode
) -> None:
    attacked = target(tmp_path / "datastore", mode)
    attacked.forge(lambda data: data["unprotected"].pop("key-fingerprint"))
    (seen,) = seen_in(kind, attacked.writer.path, ring(OTHER_KEY, KEY), NEWER)
    assert seen.errors == {}
    assert contents(1).items() <= seen.data.items()
    assert seen.data[CLIENT_LOG.filename] == LOG
    (seen,) = seen_in(kind, attacked.writer.path, ring(OTHER_KEY), NEWER)
    assert set(seen.errors) >= set(contents(1))
    check_key_required(seen.errors.values(), NEWER, "(the manifest does not name it)")


@each_source
def test_what_is_unprotected_may_change_freely(tmp_path: Path, kind: str) -> None:
    attacked = target(tmp_path / "datastore", CryptMode.ENCRYPT)
    attacked.forge(
        lambda data: data["unprotected"].update(
            notes="new", verify_state={"state": "failed", "upid": "UPID:x"}
        )
    )
    (seen,) = seen_in(kind, attacked.writer.path, ring(KEY), NEWER)
    assert seen.errors == {}
    assert contents(1).items() <= seen.data.items()


@each_source
def test_an_encrypted_backup_that_is_said_to_be_plain_is_not_decrypted(tmp_path: Path, kind: str) -> None:
    # Nothing is left by which it could be told from a plain backup, but what is encrypted stays that.
    attacked = target(tmp_path / "datastore", CryptMode.ENCRYPT)

    def strip(data: dict[str, Any]) -> None:
        data.update(signature=None, unprotected={})
        for entry in data["files"]:
            entry["crypt-mode"] = "none"

    attacked.forge(strip)
    (seen,) = seen_in(kind, attacked.writer.path, ring(KEY), NEWER)
    assert set(seen.errors) >= set(contents(1))
    for name in contents(1):
        assert type(seen.errors[name]) is DamageError
        assert "the blob is encrypted, but must not be" in str(seen.errors[name])
        assert seen.data.get(name, b"") == b""


def test_a_fingerprint_with_terminal_codes_is_told_without_them(tmp_path: Path) -> None:
    attacked = target(tmp_path / "datastore", CryptMode.ENCRYPT)
    attacked.forge(lambda data: data["unprotected"].update({"key-fingerprint": "\x1b[2Jx\n" * 50}))
    for keys in (ring(KEY), ring()):
        (seen,) = seen_in("directory", attacked.writer.path, keys, NEWER)
        assert set(seen.errors) >= set(contents(1))
        for error in seen.errors.values():
            assert isinstance(error, KeyRequiredError)
            assert str(error).isprintable()
            assert len(str(error)) < 500


def test_the_keys_that_were_given_are_not_all_told_where_they_are_many(tmp_path: Path) -> None:
    attacked = target(tmp_path / "datastore", CryptMode.ENCRYPT)
    keys = ring(*(Key(bytes([n] * 32)) for n in range(100)))
    (seen,) = seen_in("directory", attacked.writer.path, keys, NEWER)
    assert "(100 in all)" in str(seen.errors[DISK])
    assert len(str(seen.errors[DISK])) < 1200


# --- attacks on what the manifest covers


def put_chunk(attacked: Target, raw: bytes) -> None:
    damage.replace(attacked.chunk_path(0), raw)


def chunk_of_disk(number: int = 0) -> bytes:
    return contents(1)[DISK][number * CHUNK :][:CHUNK]


def flip_in_chunk(bit: int) -> Attack:
    """Flips a bit of a chunk that is part of what GCM authenticates; its CRC is made to match."""
    return lambda t: put_chunk(t, byhand.with_crc(byhand.flipped(t.chunk_path(0).read_bytes(), bit)))


NOT_ENCRYPTED = "the blob is not encrypted, but must be"
UNDECRYPTABLE = "decryption failed"

ON_A_CHUNK: dict[str, tuple[CryptMode, Attack, str]] = {
    "plain, of the same content": (
        CryptMode.ENCRYPT,
        lambda t: put_chunk(t, blob.encode(chunk_of_disk())),
        NOT_ENCRYPTED,
    ),
    "plain and not compressed": (
        CryptMode.ENCRYPT,
        lambda t: put_chunk(t, blob.encode(chunk_of_disk(), compress=False)),
        NOT_ENCRYPTED,
    ),
    "plain, of other content": (
        CryptMode.ENCRYPT,
        lambda t: put_chunk(t, blob.encode(bytes(CHUNK))),
        NOT_ENCRYPTED,
    ),
    "encrypted with another key": (
        CryptMode.ENCRYPT,
        lambda t: put_chunk(t, blob.encode(chunk_of_disk(), key=OTHER_KEY)),
        UNDECRYPTABLE,
    ),
    "another chunk of the image": (
        CryptMode.ENCRYPT,
        lambda t: put_chunk(t, t.chunk_path(3).read_bytes()),
        "digest mismatch",
    ),
    "zeros that are encrypted with the key": (
        CryptMode.ENCRYPT,
        lambda t: put_chunk(t, t.chunk_path(1).read_bytes()),
        "digest mismatch",
    ),
    "a bit of the first byte of the IV": (CryptMode.ENCRYPT, flip_in_chunk(8 * 12), UNDECRYPTABLE),
    "a bit of the last byte of the IV": (CryptMode.ENCRYPT, flip_in_chunk(8 * 28 - 1), UNDECRYPTABLE),
    "a bit of the first byte of the tag": (CryptMode.ENCRYPT, flip_in_chunk(8 * 28), UNDECRYPTABLE),
    "a bit of the last byte of the tag": (CryptMode.ENCRYPT, flip_in_chunk(8 * 44 - 1), UNDECRYPTABLE),
    "a bit of the first byte of ciphertext": (CryptMode.ENCRYPT, flip_in_chunk(8 * 44), UNDECRYPTABLE),
    "a bit in the middle of ciphertext": (CryptMode.ENCRYPT, flip_in_chunk(8 * 30_000 + 3), UNDECRYPTABLE),
    "a bit of the CRC": (
        CryptMode.ENCRYPT,
        lambda t: put_chunk(t, byhand.flipped(t.chunk_path(0).read_bytes(), 8 * 8)),
        "CRC mismatch",
    ),
    "encrypted where it is only signed": (
        CryptMode.SIGN_ONLY,
        lambda t: put_chunk(t, blob.encode(chunk_of_disk(), key=KEY)),
        "the blob is encrypted, but must not be",
    ),
    "other content where it is only signed": (
        CryptMode.SIGN_ONLY,
        lambda t: put_chunk(t, blob.encode(chunk_of_disk(3))),
        "digest mismatch",
    ),
}


@each_source
@pytest.mark.parametrize("name", ON_A_CHUNK)
def test_a_chunk_that_was_changed_or_swapped_is_damage_and_nothing_of_it_comes_out(
    tmp_path: Path, kind: str, name: str
) -> None:
    mode, attack, reason = ON_A_CHUNK[name]
    attacked = target(tmp_path / "datastore", mode)
    attack(attacked)
    seen, others = seen_in(kind, attacked.writer.path, ring(KEY), NEWER, OLDER)
    assert set(seen.errors) == {DISK}
    assert type(seen.errors[DISK]) is DamageError
    assert reason in str(seen.errors[DISK])
    assert str(seen.errors[DISK]).startswith(f"{NEWER}/disk.img: bytes 0 to {CHUNK - 1}")
    assert attacked.chunk_path(0).name in str(seen.errors[DISK])
    assert seen.data[DISK] == contents(1)[DISK][CHUNK:]  # the chunks behind it, and no more
    check_others(others)


CSUM_DIFFERS = "checksum differs from the manifest"


def put(attacked: Target, name: str, raw: bytes) -> None:
    damage.replace(attacked.place / name, raw)


def flip_in(name: str, *, byte: int) -> Attack:
    def flip(attacked: Target) -> None:
        raw = (attacked.place / name).read_bytes()
        put(attacked, name, byhand.flipped(raw, (byte if byte >= 0 else len(raw) + byte) * 8 + 2))

    return flip


ON_A_FILE: dict[str, tuple[str, Attack]] = {
    "the index of another image": (DISK, lambda t: put(t, DISK, (t.place / OTHER_DISK).read_bytes())),
    "the index of an older snapshot": (DISK, lambda t: t.take_from(OLDER, DISK)),
    "the index of an older stream": (STREAM, lambda t: t.take_from(OLDER, STREAM)),
    "the first digest": (DISK, flip_in(DISK, byte=4096)),
    "the last digest": (DISK, flip_in(DISK, byte=-1)),
    "the checksum in the index": (DISK, flip_in(DISK, byte=32)),
    "the size in the index": (DISK, flip_in(DISK, byte=64)),
    "the first end in a stream's index": (STREAM, flip_in(STREAM, byte=4097)),
    "the last digest of a stream": (STREAM, flip_in(STREAM, byte=-1)),
    "a configuration of an older snapshot": (CONF, lambda t: t.take_from(OLDER, CONF)),
    "one of an older snapshot that has the same length": (TINY, lambda t: t.take_from(OLDER, TINY)),
    "a plain configuration": (CONF, lambda t: put(t, CONF, blob.encode(contents(1)[CONF]))),
    "a configuration encrypted anew": (CONF, lambda t: put(t, CONF, blob.encode(contents(1)[CONF], key=KEY))),
    "the IV of a configuration": (TINY, flip_in(TINY, byte=12)),
    "the last byte of a configuration": (TINY, flip_in(TINY, byte=-1)),
}


@each_source
@pytest.mark.parametrize("name", ON_A_FILE)
def test_an_index_or_configuration_that_is_not_the_one_that_was_signed_is_damage(
    tmp_path: Path, kind: str, name: str
) -> None:
    victim, attack = ON_A_FILE[name]
    attacked = target(tmp_path / "datastore", CryptMode.ENCRYPT)
    attack(attacked)
    seen, others = seen_in(kind, attacked.writer.path, ring(KEY), NEWER, OLDER)
    assert set(seen.errors) == {victim}
    assert type(seen.errors[victim]) is DamageError
    assert victim not in seen.data
    assert {n: data for n, data in contents(1).items() if n != victim}.items() <= seen.data.items()
    check_others(others)


@pytest.mark.parametrize("name", ["the index of another image", "the index of an older snapshot"])
def test_a_valid_index_in_the_place_of_another_is_told_by_its_checksum(tmp_path: Path, name: str) -> None:
    attacked = target(tmp_path / "datastore", CryptMode.ENCRYPT)
    ON_A_FILE[name][1](attacked)
    (seen,) = seen_in("directory", attacked.writer.path, ring(KEY), NEWER)
    assert CSUM_DIFFERS in str(seen.errors[DISK])


# --- the order of checks, on a source that answers as it is told


def stored(mode: CryptMode = CryptMode.ENCRYPT) -> tuple[MemorySource, SnapshotInfo]:
    source = MemorySource()
    return source, source.add(NEWER, contents(1), crypt_mode=mode, key=KEY, client_log=LOG)


@in_trio
async def test_nothing_is_fetched_of_a_snapshot_whose_manifest_is_not_genuine() -> None:
    source, info = stored()
    source.set_manifest(NEWER, info.files, OTHER_KEY)
    async with open_reader(source, keys=ring(KEY, OTHER_KEY)) as reader:
        forged = Manifest.parse(blob.decode(source.files[NEWER, MANIFEST], max_size=1 << 20))
        source.files[NEWER, MANIFEST] = blob.encode(
            json.dumps({**as_json(forged), "unprotected": {"key-fingerprint": KEY.fingerprint}}).encode()
        )
        for number, name in enumerate((DISK, STREAM, CONF), 1):
            with pytest.raises(DamageError, match=DOES_NOT_MATCH):
                await read(reader, info, name)
            assert source.calls["fetch_file"] == number  # the manifest each time, and nothing else
        assert source.calls["fetch_chunk"] == 0


def as_json(manifest: Manifest) -> dict[str, Any]:
    return {**json.loads(manifest.signed), "signature": manifest.signature}


async def read(reader: Reader, info: SnapshotInfo, name: str) -> bytes:
    file = file_of(info, name)
    if file.archive.kind is ArchiveKind.BLOB:
        return await reader.read_blob(info, file)
    image = await reader.open_image(info, file)
    return bytes(await image.read(0, image.size))


@in_trio
async def test_no_chunk_is_fetched_of_an_index_that_the_manifest_does_not_have() -> None:
    source, info = stored()
    source.files[NEWER, Archive(DISK)] = source.files[NEWER, Archive(OTHER_DISK)]
    async with open_reader(source, keys=ring(KEY)) as reader:
        with pytest.raises(DamageError, match=CSUM_DIFFERS):
            await read(reader, info, DISK)
    assert source.calls["fetch_chunk"] == 0


@in_trio
async def test_the_manifest_is_verified_once_for_all_files_of_a_snapshot() -> None:
    source, info = stored()
    async with open_reader(source, keys=ring(KEY)) as reader:
        for name in (DISK, OTHER_DISK, STREAM, CONF, TINY):
            assert await read(reader, info, name) == contents(1)[name]
    assert source.calls["fetch_file"] == 1 + 5


def lies() -> Iterator[tuple[str, Callable[[FileInfo], FileInfo]]]:
    yield "crypt mode none", lambda file: replace(file, crypt_mode=CryptMode.NONE)
    yield "crypt mode sign-only", lambda file: replace(file, crypt_mode=CryptMode.SIGN_ONLY)
    yield "no crypt mode", lambda file: replace(file, crypt_mode=None)
    yield "no checksum", lambda file: replace(file, csum=None)


@pytest.mark.parametrize(("name", "lie"), [pytest.param(n, change, id=n) for n, change in lies()])
@in_trio
async def test_a_listing_that_lies_changes_nothing(name: str, lie: Callable[[FileInfo], FileInfo]) -> None:
    source, info = stored()
    told = replace(info, files=tuple(lie(f) if f.csum else f for f in info.files), key_fingerprint="00:11")
    async with open_reader(source, keys=ring(KEY)) as reader:
        for stored_name in (DISK, STREAM, CONF, TINY):
            assert await read(reader, told, stored_name) == contents(1)[stored_name], name
        damaged = source.files[NEWER, Archive(CONF)] = blob.encode(b"evil")
        with pytest.raises(DamageError, match=f"has {len(damaged)} bytes, the manifest says"):
            await read(reader, told, CONF)


@in_trio
async def test_what_is_listed_otherwise_than_the_manifest_has_it_is_refused() -> None:
    source, info = stored()
    evil = blob.encode(b"evil")
    source.files[NEWER, Archive("evil.blob")] = evil
    csum = blob.chunk_digest(evil, None)
    more = FileInfo(Archive("evil.blob"), len(evil), CryptMode.NONE, csum)
    size = replace(file_of(info, DISK), size=512)
    other = replace(file_of(info, CONF), csum=csum)
    told = replace(info, files=(more, size, other))
    async with open_reader(source, keys=ring(KEY)) as reader:
        for name in ("evil.blob", DISK, CONF):
            with pytest.raises(SourceError, match="the manifest differs from the listing"):
                await read(reader, told, name)


@in_trio
async def test_the_manifest_that_comes_out_is_the_one_that_was_verified() -> None:
    source, info = stored()
    genuine = source.files[NEWER, MANIFEST]
    async with open_reader(source, keys=ring(KEY)) as reader:
        assert await read(reader, info, DISK) == contents(1)[DISK]
        # From now on the server has another one.
        source.set_manifest(NEWER, info.files, OTHER_KEY)
        data = json.loads(blob.decode(source.files[NEWER, MANIFEST], max_size=1 << 20))
        data["unprotected"]["key-fingerprint"] = KEY.fingerprint
        source.files[NEWER, MANIFEST] = blob.encode(json.dumps(data).encode())
        with pytest.raises(DamageError, match=DOES_NOT_MATCH):
            await read(reader, info, MANIFEST.filename)
        source.files[NEWER, MANIFEST] = genuine
        assert await read(reader, info, MANIFEST.filename) == blob.decode(genuine, max_size=1 << 20)


@in_trio
async def test_a_snapshot_that_was_replaced_by_another_is_verified_anew() -> None:
    source, info = stored()
    async with open_reader(source, keys=ring(KEY)) as reader:
        assert await read(reader, info, CONF) == contents(1)[CONF]
        changed = source.add(NEWER, contents(31), crypt_mode=CryptMode.ENCRYPT, key=KEY)
        assert await read(reader, changed, CONF) == contents(31)[CONF]
        assert await read(reader, changed, DISK) == contents(31)[DISK]


@in_trio
async def test_a_manifest_that_was_refused_is_looked_at_again_the_next_time() -> None:
    source, info = stored()
    genuine = source.files[NEWER, MANIFEST]
    source.files[NEWER, MANIFEST] = blob.encode(b"{}")
    async with open_reader(source, keys=ring(KEY)) as reader:
        with pytest.raises(DamageError):
            await read(reader, info, CONF)
        source.files[NEWER, MANIFEST] = genuine
        assert await read(reader, info, CONF) == contents(1)[CONF]


@in_trio
async def test_a_plain_archive_beside_what_needs_another_key_can_be_read() -> None:
    source, info = stored()
    files = tuple(
        replace(file, crypt_mode=CryptMode.NONE) if file.archive == MASTER_KEY_BLOB else file
        for file in info.files
    )
    raw = blob.encode(b"cores: 2\n")
    plain = FileInfo(Archive("plain.blob"), len(raw), CryptMode.NONE, blob.chunk_digest(raw, None))
    source.files[NEWER, plain.archive] = raw
    told = replace(info, files=(*files, plain))
    source.set_manifest(NEWER, told.files, KEY)
    for keys in (ring(), ring(OTHER_KEY), ring(KEY)):
        async with open_reader(source, keys=keys) as reader:
            assert await read(reader, told, "plain.blob") == b"cores: 2\n"


# --- the client's log, which no manifest has


@each_mode
@in_trio
async def test_the_log_is_decrypted_where_it_is_encrypted(mode: CryptMode) -> None:
    source, info = stored(mode)
    async with open_reader(source, keys=ring(OTHER_KEY, KEY)) as reader:
        assert await read(reader, info, CLIENT_LOG.filename) == LOG


@in_trio
async def test_every_bit_of_an_encrypted_log_that_flips_is_noticed() -> None:
    source, info = stored()
    raw = source.files[NEWER, CLIENT_LOG]
    async with open_reader(source, keys=ring(KEY)) as reader:
        for bit in range(len(raw) * 8):
            flipped = byhand.flipped(raw, bit)
            for changed in (flipped, byhand.with_crc(flipped) if bit >= 8 * 12 else flipped):
                source.files[NEWER, CLIENT_LOG] = changed
                with pytest.raises(DamageError):
                    await read(reader, info, CLIENT_LOG.filename)
