"""Digests of zeros: those of the vendor, and hashed once for all keys."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest

from pbsfs.formats import zeros
from pbsfs.formats.blob import chunk_digest
from pbsfs.formats.index import FixedIndex
from pbsfs.formats.keys import Key
from pbsfs.formats.zeros import ZeroDigests
from tests.support import byhand
from tests.support.made import KEY, OTHER_KEY

CHUNK = 1 << 16


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all zeros that are hashed, in order."""
    lengths: list[int] = []

    def sha256(data: bytes) -> object:
        lengths.append(len(data))
        return hashlib.sha256(data)

    monkeypatch.setattr(zeros, "hashlib", SimpleNamespace(sha256=sha256))
    return lengths


def test_the_digest_of_zeros_is_a_constant_per_length_and_key() -> None:
    known = {
        1 << 16: "de2f256064a0af797747c2b97505dc0b9f3df0de4f489eac731c23ae9ca9cc31",
        4 << 20: "bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8",
    }
    id_key = hashlib.pbkdf2_hmac("sha256", byhand.KEY, b"_id_key", 10, 32)
    digests = ZeroDigests()
    for _turn in range(2):
        for length, digest in known.items():
            assert digests.digest(length, None).hex() == digest
            assert digests.digest(length, KEY) == hashlib.sha256(bytes(length) + id_key).digest()
            assert digests.digest(length, OTHER_KEY) != digests.digest(length, KEY)


def test_ten_hosts_with_ten_keys_each_hash_no_more_than_one(hashed: list[int]) -> None:
    digests = ZeroDigests()
    for turn in range(2):
        for number in range(100):
            key = Key(number.to_bytes(32))
            hole, data = chunk_digest(bytes(CHUNK), key), bytes(32)
            raw = byhand.fixed([hole, data, hole], size=3 * CHUNK, chunk_size=CHUNK)
            index = FixedIndex(raw, key, digests)
            assert [index.is_hole(chunk) for chunk in range(3)] == [True, False, True]
        assert hashed == [CHUNK], f"turn {turn}"


def test_only_lengths_that_are_few_are_kept(hashed: list[int]) -> None:
    digests = ZeroDigests()
    for _turn in range(2):
        for length in (512, 513, 514):
            assert digests.digest(length, None) == hashlib.sha256(bytes(length)).digest()
    assert hashed == [512, 513, 514, 513, 514]
    assert [digests.work(length) for length in (0, 512, 513)] == [0, 0, 513]


def test_an_index_without_others_hashes_for_itself(hashed: list[int]) -> None:
    raw = byhand.fixed([bytes(32)] * 3, size=3 * CHUNK, chunk_size=CHUNK)
    for _turn in range(2):
        FixedIndex(raw)
    assert hashed == [CHUNK] * 2
