"""Indexes: which chunk holds which bytes of an archive.

A fixed index (images) has chunks of one size, a dynamic index (pxar archives) has chunks that end at
given offsets; both answer the same questions, so that the reader needs to know no difference.
Chunks are counted from 0. Digests stay in one bytes object: an image of 16 TiB has 4 million.
Immutable, usable from any thread; parsing and verifying a large index takes a while and belongs in a
worker thread.
"""

from __future__ import annotations

import abc
import hashlib
import struct
import uuid
from array import array
from bisect import bisect_right
from collections.abc import Sequence

from pbsfs.errors import DamageError
from pbsfs.formats.blob import DIGEST_SIZE, MAX_CHUNK_SIZE, zero_digest
from pbsfs.formats.keys import Key

FIXED_MAGIC = bytes.fromhex("2f7f41ed91fd0fcd")
DYNAMIC_MAGIC = bytes.fromhex("1c914ea519bab3cd")
HEADER_SIZE = 4096
MIN_FIXED_CHUNK_SIZE = 64 << 10
MAX_ARCHIVE_SIZE = (1 << 63) - 1
"""Most bytes of an archive: file offsets are signed 64-bit numbers."""

_HEADER = struct.Struct("<8s16sq32s")  # magic, uuid, ctime, index_csum
_FIXED_HEADER = struct.Struct("<QQ")  # size, chunk_size
_DYNAMIC_ENTRY = struct.Struct("<Q32s")  # end offset, digest

FIXED_ENTRY_SIZE = DIGEST_SIZE
DYNAMIC_ENTRY_SIZE = _DYNAMIC_ENTRY.size
"""Bytes that a chunk takes in an index of each kind."""


class Index(abc.ABC):
    """What both kinds of index answer.

    `size`: bytes of the archive. `count`: number of chunks. `csum`: the verified checksum (32 bytes)
    that the manifest repeats.
    """

    size: int
    count: int
    csum: bytes

    @property
    @abc.abstractmethod
    def chunk_size(self) -> int | None:
        """The size of every chunk but the last, where they have one size."""

    @abc.abstractmethod
    def find(self, offset: int) -> int:
        """The chunk that holds byte `offset`, 0 ≤ offset < size."""

    @abc.abstractmethod
    def span(self, chunk: int) -> tuple[int, int]:
        """The first byte of `chunk`, and the first behind it."""

    @abc.abstractmethod
    def digest(self, chunk: int) -> bytes:
        """The digest of `chunk` (32 bytes)."""

    @abc.abstractmethod
    def run(self, chunk: int, key: Key | None, stop: int | None = None) -> tuple[bool, int]:
        """Whether `chunk` is a hole, and the first chunk behind it that is not like it.

        `key`: the one that encrypts the archive; the digest of a hole depends on it. `stop`: the first chunk
        that is of no interest; the run ends there at the latest. Looking at all of a long one takes time.
        """

    def is_hole(self, chunk: int, key: Key | None) -> bool:
        start, end = self.span(chunk)
        return self.digest(chunk) == zero_digest(end - start, key)


def _header(raw: bytes, magic: bytes) -> bytes:
    """Checks what both headers share; returns the checksum that the header claims."""
    if len(raw) < HEADER_SIZE:
        raise DamageError(f"index cut short: {len(raw)} bytes, less than its header")
    found, _uuid, _ctime, csum = _HEADER.unpack_from(raw)
    if found != magic:
        raise DamageError("not an index of this kind: wrong magic number")
    return bytes(csum)


def _encode_header(magic: bytes, ctime: int, csum: bytes, rest: bytes = b"") -> bytes:
    return (_HEADER.pack(magic, uuid.uuid4().bytes, ctime, csum) + rest).ljust(HEADER_SIZE, b"\0")


class FixedIndex(Index):
    """A `.fidx`. Look-ups are O(1)."""

    def __init__(self, raw: bytes) -> None:
        """Parses and verifies the stored file `raw`. Raises DamageError."""
        csum = _header(raw, FIXED_MAGIC)
        self.size: int
        self._chunk_size: int
        self.size, self._chunk_size = _FIXED_HEADER.unpack_from(raw, _HEADER.size)
        if self.size > MAX_ARCHIVE_SIZE:
            raise DamageError(f"index claims an impossible size of {self.size} bytes")
        chunk_size = self._chunk_size
        if chunk_size & (chunk_size - 1) or not MIN_FIXED_CHUNK_SIZE <= chunk_size <= MAX_CHUNK_SIZE:
            raise DamageError(f"index claims an impossible chunk size of {chunk_size} bytes")
        self.count = -(-self.size // chunk_size)
        expected = HEADER_SIZE + self.count * DIGEST_SIZE
        if len(raw) != expected:
            raise DamageError(f"index has {len(raw)} bytes where its header makes it {expected}")
        self.csum = hashlib.sha256(memoryview(raw)[HEADER_SIZE:]).digest()
        if self.csum != csum:
            raise DamageError("index checksum mismatch")
        # Kept whole, header and all: cutting the header off would copy 128 MiB for 16 TiB.
        self._raw = raw

    @property
    def chunk_size(self) -> int:
        return self._chunk_size

    def find(self, offset: int) -> int:
        return offset // self._chunk_size

    def span(self, chunk: int) -> tuple[int, int]:
        start = chunk * self._chunk_size
        return start, min(start + self._chunk_size, self.size)

    def digest(self, chunk: int) -> bytes:
        start = HEADER_SIZE + chunk * DIGEST_SIZE
        return self._raw[start : start + DIGEST_SIZE]

    def run(self, chunk: int, key: Key | None, stop: int | None = None) -> tuple[bool, int]:
        hole = self.is_hole(chunk, key)
        # The last chunk may be short, so its digest as a hole is another one: it is looked at by itself.
        last = self.count - 1
        stop = self.count if stop is None else min(max(stop, chunk + 1), self.count)
        zero = zero_digest(self._chunk_size, key)
        search = self._zeros_end if hole else self._zeros_start
        end = search(chunk, min(stop, last), zero)
        if end == last < stop and self.is_hole(last, key) == hole:
            end = self.count
        return hole, end

    def _zeros_start(self, chunk: int, stop: int, zero: bytes) -> int:
        """The first of the chunks `chunk` … `stop` - 1 that is zero, or `stop`."""
        base = HEADER_SIZE
        limit = base + stop * DIGEST_SIZE
        at = base + chunk * DIGEST_SIZE
        while (at := self._raw.find(zero, at, limit)) >= 0:
            if (at - base) % DIGEST_SIZE == 0:
                return (at - base) // DIGEST_SIZE
            at += 1  # across two digests: a made-up index, never chance
        return stop

    def _zeros_end(self, chunk: int, stop: int, zero: bytes) -> int:
        """The first of the chunks `chunk` … `stop` - 1 that is not zero, or `stop`."""
        # Compared in growing steps: a 16 TiB image may begin with a million holes.
        step = 1
        while chunk < stop and step:
            step = min(step, stop - chunk)
            start = HEADER_SIZE + chunk * DIGEST_SIZE
            if self._raw[start : start + step * DIGEST_SIZE] == zero * step:
                chunk += step
                step = min(step * 2, 4096)
            else:
                step //= 2
        return chunk


class DynamicIndex(Index):
    """A `.didx`. Look-ups are O(log n)."""

    def __init__(self, raw: bytes) -> None:
        """Parses and verifies the stored file `raw`. Raises DamageError."""
        csum = _header(raw, DYNAMIC_MAGIC)
        body = memoryview(raw)[HEADER_SIZE:]
        if len(body) % _DYNAMIC_ENTRY.size:
            raise DamageError(f"index cut short: {len(raw)} bytes is not a whole number of entries")
        self.csum = hashlib.sha256(body).digest()
        if self.csum != csum:
            raise DamageError("index checksum mismatch")
        self.count = len(body) // _DYNAMIC_ENTRY.size
        self._raw = raw
        self._ends = array("Q")
        previous = 0
        for end, _digest in _DYNAMIC_ENTRY.iter_unpack(body):
            if not previous < end <= previous + MAX_CHUNK_SIZE:
                raise DamageError(f"index claims a chunk from {previous} to {end}")
            self._ends.append(end)
            previous = end
        self.size = previous

    @property
    def chunk_size(self) -> None:
        return None

    def find(self, offset: int) -> int:
        return bisect_right(self._ends, offset)

    def span(self, chunk: int) -> tuple[int, int]:
        return (self._ends[chunk - 1] if chunk else 0), self._ends[chunk]

    def digest(self, chunk: int) -> bytes:
        start = HEADER_SIZE + chunk * _DYNAMIC_ENTRY.size + 8
        return self._raw[start : start + DIGEST_SIZE]

    def run(self, chunk: int, key: Key | None, stop: int | None = None) -> tuple[bool, int]:
        # Chunks of a stream are cut where its content says, so zero chunks have many lengths and each
        # would need a digest of its own. A pxar stream has no holes worth that.
        return False, self.count

    def is_hole(self, chunk: int, key: Key | None) -> bool:
        return False


def encode_fixed(digests: Sequence[bytes], *, size: int, chunk_size: int, ctime: int) -> tuple[bytes, bytes]:
    """A stored `.fidx` of `size` bytes, and its checksum for the manifest."""
    body = b"".join(digests)
    csum = hashlib.sha256(body).digest()
    return _encode_header(FIXED_MAGIC, ctime, csum, _FIXED_HEADER.pack(size, chunk_size)) + body, csum


def encode_dynamic(entries: Sequence[tuple[int, bytes]], *, ctime: int) -> tuple[bytes, bytes]:
    """A stored `.didx` of (end offset, digest) entries, and its checksum for the manifest."""
    body = b"".join(_DYNAMIC_ENTRY.pack(end, digest) for end, digest in entries)
    csum = hashlib.sha256(body).digest()
    return _encode_header(DYNAMIC_MAGIC, ctime, csum) + body, csum
