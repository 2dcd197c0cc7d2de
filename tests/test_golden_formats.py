"""Everything that the vendor's own server and client stored decodes, and is what was backed up."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pbsfs.base.errors import DamageError, KeyRequiredError
from pbsfs.base.names import MANIFEST, MASTER_KEY_BLOB, ArchiveKind
from pbsfs.formats import _decoder, blob
from pbsfs.formats.index import DynamicIndex, FixedIndex, Index
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode, Manifest, ManifestFile
from tests.support import golden
from tests.support.golden import DATASTORE
from tests.support.stored_chunks import Case, compare

pytestmark = pytest.mark.golden

ZERO_CHUNK = "bb9f8df61474d25e71fa00722318cd387396ca1736605e1248821cc0de3d3af8"
"""SHA-256 of 4 MiB of zeros."""

MANIFESTS = sorted(DATASTORE.rglob(MANIFEST.filename)) if golden.is_there() else []
"""All manifests; none where the golden data is missing (the first test tells of that)."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A file that a manifest names, with its snapshot's directory."""

    directory: Path
    manifest: Manifest
    file: ManifestFile

    @property
    def raw(self) -> bytes:
        return (self.directory / self.file.archive.filename).read_bytes()

    @property
    def encrypted(self) -> bool:
        return self.file.crypt_mode is CryptMode.ENCRYPT

    @property
    def key(self) -> Key | None:
        """The plain key, where it is the one that encrypts this file."""
        key = golden.plain_key()
        return key if self.encrypted and self.manifest.key_fingerprint == key.fingerprint else None

    @property
    def readable(self) -> bool:
        return not self.encrypted or self.key is not None

    @property
    def index(self) -> Index:
        if self.file.archive.kind is ArchiveKind.FIXED:
            return FixedIndex(self.raw, self.key if self.encrypted else None)
        return DynamicIndex(self.raw)

    def __str__(self) -> str:
        return f"{self.directory.relative_to(DATASTORE)}/{self.file.archive.name}"


@functools.cache
def manifest_in(path: Path) -> Manifest:
    raw = path.read_bytes()
    return Manifest.parse(blob.decode(raw, max_size=1 << 20, encrypted=False))


def stored_files() -> Iterator[Stored]:
    for path in MANIFESTS:
        manifest = manifest_in(path)
        for file in manifest.files:
            yield Stored(path.parent, manifest, file)


ALL = list(stored_files())
INDEXES = [stored for stored in ALL if stored.file.archive.kind is not ArchiveKind.BLOB]
BLOBS = [stored for stored in ALL if stored not in INDEXES]


def chunk(digest: bytes) -> bytes:
    name = digest.hex()
    return (DATASTORE / ".chunks" / name[:4] / name).read_bytes()


def test_the_golden_data_holds_what_these_tests_are_about() -> None:
    assert len(MANIFESTS) == 15
    assert {str(stored) for stored in ALL} >= {original.path for original in golden.originals()}
    assert {stored.file.archive.kind for stored in ALL} == set(ArchiveKind)
    assert {stored.file.crypt_mode for stored in ALL} == set(CryptMode)


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=str(p.parent.relative_to(DATASTORE))) for p in MANIFESTS]
)
def test_every_manifest_is_the_one_of_its_snapshot(path: Path) -> None:
    manifest = manifest_in(path)
    directory = path.parent

    assert directory.parts[-3:-1] == (manifest.backup_type, manifest.backup_id)
    assert manifest.verify_state == "ok"
    assert manifest.unknown == ()
    listed = {file.archive.filename for file in manifest.files} | {MANIFEST.filename}
    assert listed == {p.name for p in directory.iterdir() if not p.name.startswith(".")}


@pytest.mark.parametrize("stored", INDEXES, ids=str)
def test_every_index_agrees_with_its_manifest(stored: Stored) -> None:
    index = stored.index

    assert index.csum == stored.file.csum
    assert index.size == stored.file.size
    spans = [index.span(number) for number in range(index.count)]
    assert [start for start, _end in spans] == [0, *(end for _start, end in spans)][: index.count]
    assert (spans[-1][1] if spans else 0) == index.size


@pytest.mark.parametrize("stored", INDEXES, ids=str)
def test_every_chunk_of_every_index_decodes_or_wants_its_key(stored: Stored) -> None:
    index = stored.index
    seen: set[bytes] = set()
    for number in range(index.count):
        digest = index.digest(number)
        if digest in seen:
            continue
        seen.add(digest)
        start, end = index.span(number)
        if stored.readable:
            assert len(decoded(digest, end - start, stored)) == end - start
            case = Case(digest.hex(), chunk(digest), digest, end - start, stored.encrypted, stored.key)
            assert compare(_decoder, case) == "verified"
        else:
            with pytest.raises(KeyRequiredError):
                decoded(digest, end - start, stored)
            wrong = golden.plain_key().reveal_all()
            assert _decoder.decode(chunk(digest), digest, end - start, *wrong) is None
            with pytest.raises(DamageError, match="wrong key"):
                blob.decode_chunk(
                    chunk(digest), digest=digest, length=end - start, encrypted=True, key=golden.plain_key()
                )


def decoded(digest: bytes, length: int, stored: Stored) -> bytes:
    return blob.decode_chunk(
        chunk(digest), digest=digest, length=length, encrypted=stored.encrypted, key=stored.key
    )


@pytest.mark.parametrize("stored", BLOBS, ids=str)
def test_every_blob_agrees_with_its_manifest(stored: Stored) -> None:
    assert len(stored.raw) == stored.file.size
    assert hashlib.sha256(stored.raw).digest() == stored.file.csum
    # The master key's blob holds what is encrypted already, and is a plain one.
    sealed = stored.encrypted and stored.file.archive != MASTER_KEY_BLOB
    assert blob.kind_of(stored.raw).encrypted == sealed


def test_no_chunk_is_left_that_no_index_names() -> None:
    named: set[str] = set()
    for stored in INDEXES:
        index = stored.index
        named |= {index.digest(number).hex() for number in range(index.count)}

    assert named == {path.name for path in (DATASTORE / ".chunks").glob("*/*")}


@pytest.mark.parametrize("original", [pytest.param(o, id=o.path) for o in golden.originals()])
def test_every_original_that_the_plain_key_opens_is_read_back_to_its_checksum(
    original: golden.Original,
) -> None:
    (stored,) = [stored for stored in ALL if str(stored) == original.path]
    assert stored.file.crypt_mode.value == original.crypt_mode
    if not stored.readable:
        assert original.key in ("scrypt", "pbkdf2")
        return
    state = hashlib.sha256()
    size = 0
    for data in contents(stored):
        state.update(data)
        size += len(data)

    assert (size, state.hexdigest()) == (original.size, original.sha256)


def contents(stored: Stored) -> Iterator[bytes]:
    """The decoded content, piece by piece; holes from their digest alone."""
    if stored.file.archive.kind is ArchiveKind.BLOB:
        sealed = stored.encrypted and stored.file.archive != MASTER_KEY_BLOB
        yield blob.decode(stored.raw, max_size=1 << 20, key=stored.key, encrypted=sealed)
        return
    index = stored.index
    for number in range(index.count):
        start, end = index.span(number)
        if index.is_hole(number):
            yield bytes(end - start)
        else:
            yield decoded(index.digest(number), end - start, stored)


def test_the_zero_chunk_of_the_vendor_is_the_known_one() -> None:
    assert blob.chunk_digest(bytes(4 << 20), None).hex() == ZERO_CHUNK
    raw = chunk(bytes.fromhex(ZERO_CHUNK))
    assert blob.decode_chunk(raw, digest=bytes.fromhex(ZERO_CHUNK), length=4 << 20, encrypted=False) == bytes(
        4 << 20
    )


@pytest.mark.parametrize("path", ["vm/105/2023-11-14T23:13:24Z", "vm/107/2023-11-14T23:13:26Z"])
def test_a_sparse_disk_has_two_chunks_that_are_no_holes(path: str) -> None:
    manifest = manifest_in(DATASTORE / path / MANIFEST.filename)
    stored = Stored(DATASTORE / path, manifest, manifest.files[0])
    index = stored.index

    assert stored.readable
    text = index.find((300 << 20) + 4096)
    ends = [0]
    while ends[-1] < index.count:
        _hole, end = index.run(ends[-1])
        ends.append(end)
    assert ends == [0, text, text + 1, index.count - 1, index.count]
    assert [index.is_hole(number) for number in ends[:-1]] == [True, False, True, False]
