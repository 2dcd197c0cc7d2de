"""Images of many hosts with many keys: opening one costs the same as if it were the only one."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest

from pbsfs.formats import zeros
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode
from pbsfs.reader.reader import open_reader
from tests.support import made
from tests.support.run import in_trio
from tests.support.sources import CHUNK_SIZE, MemorySource, file_of

NAME = "disk.img.fidx"


@in_trio
async def test_the_hundredth_key_hashes_no_zeros_again(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []

    def sha256(data: bytes) -> object:
        hashed.append(len(data))
        return hashlib.sha256(data)

    keys = [Key(number.to_bytes(32)) for number in range(100)]
    source = MemorySource()
    infos = [
        source.add(
            made.snapshot(str(100 + number)),
            {NAME: bytes(2 * CHUNK_SIZE) + b"data" * (CHUNK_SIZE // 4)},
            crypt_mode=CryptMode.ENCRYPT,
            key=key,
        )
        for number, key in enumerate(keys)
    ]
    monkeypatch.setattr(zeros, "hashlib", SimpleNamespace(sha256=sha256))
    async with open_reader(source, keys={key.fingerprint: key for key in keys}) as reader:
        for _turn in range(2):
            for info in infos:
                image = await reader.open_image(info, file_of(info, NAME))
                assert image.index.data_size == CHUNK_SIZE
    assert hashed == [CHUNK_SIZE]
