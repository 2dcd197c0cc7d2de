"""Indexes: which chunk holds which bytes of an archive.

A fixed index (images) has chunks of one size, a dynamic index (pxar archives) has chunks that end at given
offsets. Both have the same interface, so the reader treats them alike. Chunks are counted from 0.

An index takes 32 bytes of memory for each chunk (40 in a dynamic index) for its digest table, which is one
bytes object, and 1 byte (8) for the rest. The table alone can be dropped, and restored from the same stored
file. Usable from any thread; parsing and restoring take a while, which belongs in a worker thread.
"""

from __future__ import annotations

import abc
import hashlib
import struct
import uuid
from array import array
from bisect import bisect_right
from collections.abc import Sequence

from pbsfs.base.errors import DamageError, SourceError
from pbsfs.formats.blob import DIGEST_SIZE, MAX_CHUNK_SIZE
from pbsfs.formats.keys import Key
from pbsfs.formats.zeros import ZeroDigests

FIXED_MAGIC = bytes.fromhex("2f7f41ed91fd0fcd")
DYNAMIC_MAGIC = bytes.fromhex("1c914ea519bab3cd")
HEADER_SIZE = 4096
MIN_FIXED_CHUNK_SIZE = 64 << 10
MAX_ARCHIVE_SIZE = (1 << 63) - 1
"""Most bytes of an archive: file offsets are signed 64-bit numbers."""

_HEADER = struct.Struct("<8s16sq32s")  # magic, uuid, ctime, index_csum
_FIXED_HEADER = struct.Struct("<QQ")  # size, chunk_size
_FIXED_ENTRY = struct.Struct("<32s")  # digest
_DYNAMIC_ENTRY = struct.Struct("<Q32s")  # end offset, digest

FIXED_ENTRY_SIZE = DIGEST_SIZE
DYNAMIC_ENTRY_SIZE = _DYNAMIC_ENTRY.size
"""Bytes for each chunk in an index of either kind."""

_STEP = 1 << 15
"""Chunks that one search covers: a search through their MiB of digests holds Python's lock (GIL) for 0.2 ms,
a search through a large table for much longer."""


MAX_ZERO_LENGTHS = 4
"""Lengths of chunks whose digest of zeros is computed for one dynamic index: each takes 10 ms at most."""


class TableDroppedError(SourceError):
    """The digest table of an index was dropped and has to be restored first."""


class Index(abc.ABC):
    """The interface of both kinds of index.

    `size`: bytes of the archive. `data_size`: those that are not in holes. `count`: number of chunks.
    `csum`: the verified checksum (32 bytes), which is also in the manifest. `stored_size`: bytes of the
    stored file. `table_size`: bytes of the digest table, unless it is dropped.
    """

    size: int
    data_size: int
    count: int
    csum: bytes
    stored_size: int
    _magic: bytes
    _raw: bytes | None  # the whole stored file: cutting off the header would copy it

    @property
    @abc.abstractmethod
    def chunk_size(self) -> int | None:
        """The size in bytes of every chunk but the last; None if sizes differ."""

    @abc.abstractmethod
    def find(self, offset: int) -> int:
        """The chunk that holds byte `offset`, 0 ≤ offset < size."""

    @abc.abstractmethod
    def span(self, chunk: int) -> tuple[int, int]:
        """The offset of the first byte of `chunk`, and of the first byte after it."""

    @abc.abstractmethod
    def find_digest(self, chunk: int) -> bytes | None:
        """The digest of `chunk` (32 bytes); None if the table is dropped."""

    def digest(self, chunk: int) -> bytes:
        """The digest of `chunk` (32 bytes). Raises TableDroppedError."""
        digest = self.find_digest(chunk)
        if digest is None:
            raise TableDroppedError("the digest table was dropped; read again", retryable=True)
        return digest

    @abc.abstractmethod
    def is_hole(self, chunk: int) -> bool:
        """Whether `chunk` is all zeros. Takes constant time."""

    @abc.abstractmethod
    def run(self, chunk: int, stop: int | None = None) -> tuple[bool, int]:
        """Whether `chunk` is a hole, and the first later chunk for which the answer differs.

        `stop`: a chunk after `chunk`; the run ends there at the latest.
        """

    @property
    def table_size(self) -> int:
        return self.stored_size - HEADER_SIZE

    @property
    @abc.abstractmethod
    def rest_size(self) -> int:
        """Bytes that the index needs in memory besides its table."""

    def has_table(self) -> bool:
        """Whether the index has its digest table: not if it is dropped."""
        return self._raw is not None

    def drop_table(self) -> None:
        """Frees the digest table, until `restore_table`."""
        self._raw = None

    def restore_table(self, raw: bytes) -> None:
        """Takes the digest table from `raw`, the stored file. Raises DamageError for another file."""
        if _header(raw, self._magic) != self.csum or len(raw) != self.stored_size:
            raise DamageError("the index is not the one that was opened; open the file again")
        self._take_table(raw)

    def _take_table(self, raw: bytes) -> None:
        if hashlib.sha256(memoryview(raw)[HEADER_SIZE:]).digest() != self.csum:
            raise DamageError("index checksum mismatch")
        self._raw = raw
        self.stored_size = len(raw)


def _header(raw: bytes, magic: bytes) -> bytes:
    """Checks what both kinds of header have; returns the checksum in the header."""
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

    _magic = FIXED_MAGIC

    def __init__(self, raw: bytes, key: Key | None = None, zeros: ZeroDigests | None = None) -> None:
        """Parses and verifies the stored file `raw`. Raises DamageError.

        `key`: the one that encrypts the archive; the digest of a hole depends on it. `zeros`: shared by
        indexes, so that each need not hash the zeros of a chunk again.
        """
        zeros = ZeroDigests() if zeros is None else zeros
        self.csum = _header(raw, self._magic)
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
        self._take_table(raw)
        self._holes = self._learn_holes(raw, key, zeros)
        self.data_size = self.size - self._holes.count(1) * chunk_size
        if self.count and self.is_hole(self.count - 1):  # which may be shorter than the others
            self.data_size += self.count * chunk_size - self.size

    def _learn_holes(self, raw: bytes, key: Key | None, zeros: ZeroDigests) -> bytes:
        """A byte for each chunk: 1 for a hole, 0 for data."""
        holes = bytearray()
        if self.count > 1:
            zero = zeros.digest(self._chunk_size, key)
            view = memoryview(raw)
            for first in range(0, self.count, _STEP):
                count = min(_STEP, self.count - first)
                start = HEADER_SIZE + first * DIGEST_SIZE
                end = start + count * DIGEST_SIZE
                # A search is fast, and most of an image has no holes. A match may span two digests, so after
                # one each digest is compared.
                if raw.find(zero, start, end) < 0:
                    holes += bytes(count)
                else:
                    holes += bytes([d == zero for (d,) in _FIXED_ENTRY.iter_unpack(view[start:end])])
        if self.count:
            # The last chunk may be short, and then a hole has another digest.
            start, end = self.span(self.count - 1)
            holes[self.count - 1 :] = bytes([raw[-DIGEST_SIZE:] == zeros.digest(end - start, key)])
        return bytes(holes)

    @staticmethod
    def hashes(raw: bytes, zeros: ZeroDigests) -> int:
        """Bytes of zeros that parsing `raw` has to hash: at most two chunks. `raw` may be anything."""
        if len(raw) < HEADER_SIZE:
            return 0
        size, chunk_size = _FIXED_HEADER.unpack_from(raw, _HEADER.size)
        if not 0 < chunk_size <= MAX_CHUNK_SIZE:
            return 0
        lengths = {min(size, chunk_size), size % chunk_size}
        return sum(map(zeros.work, lengths))

    @property
    def chunk_size(self) -> int:
        return self._chunk_size

    @property
    def rest_size(self) -> int:
        return self.count

    def find(self, offset: int) -> int:
        return offset // self._chunk_size

    def span(self, chunk: int) -> tuple[int, int]:
        start = chunk * self._chunk_size
        return start, min(start + self._chunk_size, self.size)

    def find_digest(self, chunk: int) -> bytes | None:
        raw = self._raw
        start = HEADER_SIZE + chunk * DIGEST_SIZE
        return raw[start : start + DIGEST_SIZE] if raw is not None else None

    def is_hole(self, chunk: int) -> bool:
        return self._holes[chunk] == 1

    def run(self, chunk: int, stop: int | None = None) -> tuple[bool, int]:
        return _run(self._holes, chunk, self.count if stop is None else min(max(stop, chunk + 1), self.count))


class DynamicIndex(Index):
    """A `.didx`. Look-ups are O(log n).

    The content of a stream decides where its chunks end, so chunks of zeros may have any length, and the
    digest of each length takes hashing as many zeros. Two kinds of length are tried: the largest, at which
    the vendor's client cuts what has no boundary, as zeros have none; and those of a chunk that is followed
    by the same one.
    """

    _magic = DYNAMIC_MAGIC

    def __init__(self, raw: bytes, key: Key | None = None, zeros: ZeroDigests | None = None) -> None:
        """Parses and verifies the stored file `raw`. Raises DamageError.

        `key` and `zeros`: as for a `FixedIndex`.
        """
        self.csum = _header(raw, self._magic)
        body = memoryview(raw)[HEADER_SIZE:]
        if len(body) % _DYNAMIC_ENTRY.size:
            raise DamageError(f"index cut short: {len(raw)} bytes is not a whole number of entries")
        self._take_table(raw)
        self.count = len(body) // _DYNAMIC_ENTRY.size
        self._ends = array("Q")
        previous = 0
        same, lengths = b"", set()
        for end, digest in _DYNAMIC_ENTRY.iter_unpack(body):
            if not previous < end <= previous + MAX_CHUNK_SIZE:
                raise DamageError(f"index claims a chunk from {previous} to {end}")
            self._ends.append(end)
            if digest == same or end - previous == MAX_CHUNK_SIZE:
                lengths.add(end - previous)
            same, previous = digest, end
        self.size = previous
        self._holes: bytearray | None = None  # a byte for each chunk, as in a `FixedIndex`; None: no holes
        tried = sorted(lengths, reverse=True)[:MAX_ZERO_LENGTHS]
        self.data_size = self.size - (
            self._learn_holes(body, tried, key, zeros or ZeroDigests()) if tried else 0
        )

    def _learn_holes(
        self, body: memoryview, lengths: Sequence[int], key: Key | None, zeros: ZeroDigests
    ) -> int:
        """The bytes in holes."""
        known = {length: zeros.digest(length, key) for length in lengths}
        holes, size, previous = bytearray(self.count), 0, 0
        for number, (end, digest) in enumerate(_DYNAMIC_ENTRY.iter_unpack(body)):
            if known.get(end - previous) == digest:
                holes[number] = 1
                size += end - previous
            previous = end
        self._holes = holes if size else None
        return size

    @property
    def chunk_size(self) -> None:
        return None

    @property
    def rest_size(self) -> int:
        return self.count * self._ends.itemsize + len(self._holes or b"")

    def find(self, offset: int) -> int:
        return bisect_right(self._ends, offset)

    def span(self, chunk: int) -> tuple[int, int]:
        return (self._ends[chunk - 1] if chunk else 0), self._ends[chunk]

    def find_digest(self, chunk: int) -> bytes | None:
        raw = self._raw
        start = HEADER_SIZE + chunk * _DYNAMIC_ENTRY.size + 8
        return raw[start : start + DIGEST_SIZE] if raw is not None else None

    def is_hole(self, chunk: int) -> bool:
        return self._holes is not None and self._holes[chunk] == 1

    def run(self, chunk: int, stop: int | None = None) -> tuple[bool, int]:
        stop = self.count if stop is None else min(max(stop, chunk + 1), self.count)
        if self._holes is None:
            return False, stop
        return _run(self._holes, chunk, stop)


def _run(holes: bytes | bytearray, chunk: int, stop: int) -> tuple[bool, int]:
    hole = holes[chunk]
    end = holes.find(1 - hole, chunk + 1, stop)
    return hole == 1, stop if end < 0 else end


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
