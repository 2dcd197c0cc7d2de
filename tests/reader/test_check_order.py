"""What is checked before what, on a source that answers as it is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from pbsfs.base.errors import DamageError, SourceError
from pbsfs.base.names import CLIENT_LOG, MANIFEST, MASTER_KEY_BLOB, Archive
from pbsfs.formats import blob
from pbsfs.formats.manifest import CryptMode, Manifest
from pbsfs.reader.reader import open_reader
from pbsfs.sources.base import FileInfo
from tests.reader.sealed import (
    CONF,
    CSUM_DIFFERS,
    DISK,
    DOES_NOT_MATCH,
    LOG,
    NEWER,
    OTHER_DISK,
    STREAM,
    TINY,
    contents,
    each_mode,
    read,
    ring,
    stored,
)
from tests.support import byhand
from tests.support.made import KEY, OTHER_KEY
from tests.support.run import in_trio
from tests.support.sources import file_of


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
