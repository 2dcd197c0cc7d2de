"""Encrypted and signed backups: every kind reads like a plain one with its key, and only with that."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest

from pbsfs.access.keyring import read_keys
from pbsfs.base.names import CLIENT_LOG, MANIFEST, Snapshot
from pbsfs.base.secret import Secret
from pbsfs.formats import blob
from pbsfs.formats.blob import BlobKind
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode, Manifest
from pbsfs.testing.writer import DatastoreWriter
from tests.reader.sealed import (
    CHUNK,
    CONF,
    DISK,
    LOG,
    STREAM,
    check_key_required,
    contents,
    each_source,
    ring,
    seen_in,
)
from tests.support import made
from tests.support.keyfiles import KINDS, PASSWORD, key_file
from tests.support.made import OTHER_KEY


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
