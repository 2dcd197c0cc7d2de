"""The C decoder against the reference in Python: it accepts what that accepts, and never anything else."""

from __future__ import annotations

import gc
import os
import random
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from pbsfs.base.errors import DamageError, KeyRequiredError
from pbsfs.chunks import decoder
from pbsfs.formats import _decoder, blob
from pbsfs.formats.blob import MAX_CHUNK_SIZE
from tests.support import byhand, stored_chunks
from tests.support.damage import flip_bit
from tests.support.hostile import counts
from tests.support.made import KEY
from tests.support.program import environment, pbsfs
from tests.support.stocked import CHUNK, IMAGE, NEWER_IMAGE, stock
from tests.support.stored_chunks import Case

all_kinds = pytest.mark.parametrize("magic", byhand.KINDS)


def decoded(case: Case) -> bytes:
    return decoder.decode_chunk(
        case.raw, digest=case.digest, length=case.length, encrypted=case.encrypted, key=case.key
    )


@pytest.mark.parametrize("mutations", counts(300, 20_000))
def test_the_extension_accepts_what_the_reference_accepts_and_nothing_else(mutations: int) -> None:
    found = stored_chunks.compare_all(_decoder, range(mutations))

    assert min(found["good"], found["bad"], found["verified"] * 2, found["refused"] * 2) > 100, found
    assert found["stricter"] <= mutations // 1000, found
    assert found["pairs verified"] > 100, found


def test_two_chunks_of_any_lengths_are_hashed_side_by_side() -> None:
    lengths = [*range(70), 100, 119, 120, 127, 128, 129, 4096, 65_535, 1 << 20]
    some = random.Random(1)
    cases = [
        stored_chunks.of(some.randbytes(length), magic)
        for length in lengths
        for magic in (byhand.PLAIN, byhand.ENCRYPTED)
    ]
    for first in cases:
        assert stored_chunks.compare_pair(_decoder, first, some.choice(cases)) != (None, None)
        for wrong in (0, 100, 255):
            damaged = replace(first, digest=byhand.flipped(first.digest, wrong))
            second = some.choice(cases)
            content = decoded(second)
            assert _decoder.decode_pair(damaged.given, second.given) == (None, content)
            assert _decoder.decode_pair(second.given, damaged.given) == (content, None)


@all_kinds
@pytest.mark.parametrize("length", [MAX_CHUNK_SIZE, MAX_CHUNK_SIZE + 1])
def test_the_extension_takes_chunks_up_to_the_largest_that_exist(magic: str, length: int) -> None:
    case = stored_chunks.of(bytes(length - 4) + b"last", magic)
    got = _decoder.decode(*case.given)

    assert (got is not None) == (length == MAX_CHUNK_SIZE)
    assert decoded(case) == bytes(length - 4) + b"last"  # by the reference, if need be


# --- what the extension is asked


@pytest.mark.parametrize("lengths", [(31, 32, 32), (32, 31, 32), (32, 32, 33), (32, 0, 32), (32, 32, None)])
def test_digests_and_keys_of_another_size_are_mistakes(lengths: tuple[int, int, int | None]) -> None:
    digest, key, id_key = (None if length is None else bytes(length) for length in lengths)
    assert digest is not None
    with pytest.raises(ValueError, match="32 bytes"):
        _decoder.decode(b"raw", digest, 1, key, id_key)
    good = stored_chunks.of(b"abc", byhand.PLAIN).given
    for pair in ((good, (b"raw", digest, 1, key, id_key)), ((b"raw", digest, 1, key, id_key), good)):
        with pytest.raises(ValueError, match="32 bytes"):
            _decoder.decode_pair(*pair)


@pytest.mark.parametrize("length", [-1, -(1 << 63), MAX_CHUNK_SIZE + 1, 1 << 40, (1 << 63) - 1])
def test_no_length_that_a_chunk_cannot_have_sizes_an_allocation(length: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert _decoder.decode(byhand.blob(byhand.PLAIN, b"abc"), bytes(32), length, None, None) is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10  # KiB


@all_kinds
def test_neither_memory_nor_references_are_lost(magic: str) -> None:
    data = os.urandom(1 << 19) + bytes(1 << 19)
    good = stored_chunks.of(data, magic)
    inside = replace(good, raw=byhand.with_crc(byhand.flipped(good.raw, 8 * 100_000)))
    cases = [good, replace(good, digest=bytes(32)), inside, replace(good, length=1 << 19)]
    held = [value for case in cases for value in (case.raw, case.digest)]

    def turn() -> None:
        for case in cases:
            assert (_decoder.decode(*case.given) is None) == (case is not good)
            assert _decoder.decode_pair(case.given, good.given)[1] is not None

    for _ in range(20):
        turn()
    gc.collect()
    counted = [sys.getrefcount(value) for value in held]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        turn()
    assert [sys.getrefcount(value) for value in held] == counted
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB; one leak is 100 MiB


def test_threads_decode_side_by_side() -> None:
    cases = [*stored_chunks.good(), *map(stored_chunks.mutated, range(200))]

    def decode_all() -> list[bytes | None]:
        return [_decoder.decode(*case.given) for case in cases]

    alone = decode_all()
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(
            lambda _: [_decoder.decode(c.raw, c.digest, c.length, *c.keys) for c in cases], range(4)
        ):
            assert got == alone


# --- who decides


@all_kinds
def test_errors_are_those_of_the_reference(magic: str) -> None:
    good = stored_chunks.of(b"scsi0: local:100/disk.raw,size=4G\n" * 20, magic)
    flipped = replace(good, raw=byhand.flipped(good.raw, 8 * 60))
    with pytest.raises(DamageError, match=r"^CRC mismatch$"):
        decoded(flipped)
    with pytest.raises(DamageError, match=r"^digest mismatch$"):
        decoded(replace(good, digest=bytes(32)))
    if good.encrypted:
        with pytest.raises(KeyRequiredError):
            decoded(replace(good, key=None))
    else:
        with pytest.raises(DamageError, match="not encrypted"):
            decoded(replace(good, key=KEY, encrypted=True))


@all_kinds
def test_the_reference_decides_where_the_extension_does_not_verify(
    magic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = stored_chunks.of(b"scsi0: local:100/disk.raw,size=4G\n" * 20, magic)
    content = decoded(case)
    monkeypatch.setattr(blob, "decode_chunk", lambda *_, **__: pytest.fail("the reference was asked"))
    assert decoded(case) == content
    monkeypatch.undo()
    monkeypatch.setattr(decoder, "_extension", decoder.Extension(lambda *_: None, lambda *_: (None, None)))
    assert decoded(case) == content


def test_the_environment_chooses_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(decoder.PURE_VARIABLE, raising=False)
    assert decoder.find_extension() == (_decoder.decode, _decoder.decode_pair)
    monkeypatch.setenv(decoder.PURE_VARIABLE, "1")
    assert decoder.find_extension() is None
    monkeypatch.setenv(decoder.PURE_VARIABLE, "")
    assert decoder.find_extension() == (_decoder.decode, _decoder.decode_pair)


def test_a_missing_extension_leaves_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(decoder.PURE_VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "pbsfs.formats._decoder", None)
    assert decoder.find_extension() is None


@pytest.mark.long
def test_pbsfs_reads_and_reports_the_same_on_both_paths(tmp_path: Path) -> None:
    stocked = stock(tmp_path / "datastore")
    second = blob.chunk_digest(stocked.contents[IMAGE][CHUNK : 2 * CHUNK], None)
    flip_bit(stocked.writer.chunk_path(second), 8 * 500)
    results: dict[str, list[tuple[int, bytes, str]]] = {}
    for name, pure in (("the C extension", ""), ("Python", "1")):
        variables = environment(**{decoder.PURE_VARIABLE: pure})
        source = ("--datastore-dir", stocked.path)
        logged = pbsfs("verify", *source, "--log-level", "debug", env=variables)
        assert f"{name} decodes chunks" in logged.stderr
        found = results[name] = []
        for arguments in (("verify",), ("cat", IMAGE), ("cat", NEWER_IMAGE)):
            command = [sys.executable, "-m", "pbsfs", arguments[0], *map(str, source), *arguments[1:]]
            done = subprocess.run(command, env=variables, capture_output=True, check=False, timeout=60)
            found.append((done.returncode, done.stdout, done.stderr.decode()))
    assert results["Python"] == results["the C extension"]
    assert any(status != 0 and "CRC mismatch" in error for status, _out, error in results["Python"])
    assert any(status == 0 and len(out) > CHUNK for status, out, _error in results["Python"])
