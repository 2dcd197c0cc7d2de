"""Blobs: the envelope of every chunk, manifest and configuration file.

A blob is a header (magic number, CRC-32 and, for the encrypted kinds, IV and tag) and its data. `decode`
returns its content; `decode_chunk` also checks the content against the digest and length in an index, which
makes a chunk trustworthy. Called from worker threads: all bulk work (CRC, AES, zstd, SHA-256) releases the
GIL.
"""

from __future__ import annotations

import enum
import hashlib
import threading
import zlib
from typing import NamedTuple

import zstandard

from pbsfs.base.errors import DamageError, KeyRequiredError
from pbsfs.formats.keys import IV_SIZE, TAG_SIZE, Key

MAX_BLOB_SIZE = 128 << 20
"""Most bytes that a blob may hold when decoded."""

MAX_CHUNK_SIZE = 16 << 20
"""Most bytes that a chunk may hold when decoded."""

DIGEST_SIZE = 32

Stored = bytes | memoryview
"""A stored blob; a view where it stays in the memory that it was received into. Nothing changes it later."""

_MAGIC_SIZE = 8
_PLAIN_HEADER = _MAGIC_SIZE + 4
_SEALED_HEADER = _PLAIN_HEADER + IV_SIZE + TAG_SIZE

_COMPRESSION_LEVEL = 1  # what the vendor's client uses


class BlobKind(enum.Enum):
    """The four kinds of blob, by magic number."""

    PLAIN = bytes.fromhex("42ab3807be8370a1")
    COMPRESSED = bytes.fromhex("31b958426fb6a37f")
    ENCRYPTED = bytes.fromhex("7b6785be222d4cf0")
    ENCRYPTED_COMPRESSED = bytes.fromhex("e6591bbf0bbfd80b")

    @property
    def encrypted(self) -> bool:
        return self in (BlobKind.ENCRYPTED, BlobKind.ENCRYPTED_COMPRESSED)

    @property
    def compressed(self) -> bool:
        return self in (BlobKind.COMPRESSED, BlobKind.ENCRYPTED_COMPRESSED)

    @property
    def header_size(self) -> int:
        return _SEALED_HEADER if self.encrypted else _PLAIN_HEADER


class _Envelope(NamedTuple):
    kind: BlobKind
    iv: bytes
    tag: bytes
    data: memoryview


def stored_limit(decoded_limit: int) -> int:
    """Most bytes that a blob of at most `decoded_limit` decoded bytes takes in storage.

    Writers compress only if that makes data smaller. The limit still includes what zstd adds at worst, so
    that pbsfs reads the blobs of an unusual writer.
    """
    return decoded_limit + (decoded_limit >> 8) + 1024


def kind_of(raw: Stored) -> BlobKind:
    """The kind of the stored blob `raw`, from its first bytes. Raises DamageError if there is none."""
    try:
        return BlobKind(bytes(raw[:_MAGIC_SIZE]))
    except ValueError:
        raise DamageError("not a blob: wrong magic number") from None


def _open(raw: Stored) -> _Envelope:
    kind = kind_of(raw)
    if len(raw) < kind.header_size:
        raise DamageError(f"blob cut short: {len(raw)} bytes")
    view = memoryview(raw)
    data = view[kind.header_size :]
    expected = int.from_bytes(view[_MAGIC_SIZE:_PLAIN_HEADER], "little")
    if zlib.crc32(data) != expected:
        raise DamageError("CRC mismatch")
    iv = bytes(view[_PLAIN_HEADER : _PLAIN_HEADER + IV_SIZE]) if kind.encrypted else b""
    tag = bytes(view[_PLAIN_HEADER + IV_SIZE : _SEALED_HEADER]) if kind.encrypted else b""
    return _Envelope(kind, iv, tag, data)


_thread = threading.local()


def _decompressor() -> zstandard.ZstdDecompressor:
    # One per thread: threads must not share a context, and making one takes long.
    context: zstandard.ZstdDecompressor | None = getattr(_thread, "decompressor", None)
    if context is None:
        context = _thread.decompressor = zstandard.ZstdDecompressor()
    return context


def _decompress(data: bytes | memoryview, max_size: int) -> bytes:
    """The content, at most `max_size` bytes, of one zstd frame with nothing after it. Allocates no more."""
    try:
        frame = zstandard.get_frame_parameters(data)
        announced = frame.content_size
        if announced != zstandard.CONTENTSIZE_UNKNOWN and announced > max_size:
            raise DamageError(f"zstd frame announces {announced} bytes where {max_size} is the most")
        if announced in (0, zstandard.CONTENTSIZE_UNKNOWN):
            _check_frame_end(data, has_checksum=frame.has_checksum)  # the library checks only other frames
        if announced == 0:  # the library would believe that
            content = _decompressor().stream_reader(data, read_across_frames=False).read(1)
        else:
            # max_output_size=0 would mean 'no limit', so pbsfs asks for 1 and checks the length below.
            content = _decompressor().decompress(
                data, max_output_size=max(max_size, 1), read_across_frames=False, allow_extra_data=False
            )
    except zstandard.ZstdError as error:
        raise DamageError(f"zstd: {error}") from None
    if len(content) > max_size:
        raise DamageError(f"zstd frame holds more than {max_size} bytes")
    return content


def _check_frame_end(data: bytes | memoryview, *, has_checksum: bool) -> None:
    """Raises DamageError unless the zstd frame ends where `data` does (RFC 8878, 3.1.1)."""
    at = zstandard.frame_header_size(data)
    last = False
    while not last:
        header = int.from_bytes(data[at : at + 3], "little")
        last, run, size = header & 1 == 1, header >> 1 & 3 == 1, header >> 3
        at += 3 + (1 if run else size)
        if at > len(data):
            raise DamageError("zstd frame cut short")
    if at + 4 * has_checksum != len(data):
        raise DamageError("zstd frame does not end where its blob ends")


def decode(raw: Stored, *, max_size: int, key: Key | None = None, encrypted: bool | None = None) -> bytes:
    """The content of the stored blob `raw`.

    `max_size`: most decoded bytes. `encrypted`: whether the blob has to be of an encrypted kind; None accepts
    both. Raises DamageError if anything is wrong with the blob, and KeyRequiredError for an encrypted blob
    without a key.
    """
    envelope = _open(raw)
    if encrypted is not None and envelope.kind.encrypted != encrypted:
        is_not = "encrypted, but must not be" if envelope.kind.encrypted else "not encrypted, but must be"
        raise DamageError(f"the blob is {is_not}")
    data: bytes | memoryview = envelope.data
    if envelope.kind.encrypted:
        if key is None:
            raise KeyRequiredError("encrypted, but no key was given")
        data = key.decrypt(envelope.iv, envelope.tag, envelope.data)
    if envelope.kind.compressed:
        return _decompress(data, max_size)
    if len(data) > max_size:
        raise DamageError(f"blob holds {len(data)} bytes where {max_size} is the most")
    return bytes(data)


def work_of(raw: Stored) -> int:
    """The most bytes, stored or decoded, that decoding `raw` has to process; `raw` may be anything.

    A small blob may decode to many bytes: its frame says how many, unless it is encrypted.
    """
    announced = zstandard.CONTENTSIZE_UNKNOWN
    try:
        kind = kind_of(raw)
        if not kind.compressed:
            return len(raw)
        if not kind.encrypted:
            announced = zstandard.get_frame_parameters(memoryview(raw)[kind.header_size :]).content_size
    except (DamageError, zstandard.ZstdError):
        return len(raw)  # decoding fails there, too
    return max(len(raw), MAX_BLOB_SIZE if announced in (0, zstandard.CONTENTSIZE_UNKNOWN) else announced)


def decode_chunk(
    raw: Stored, *, digest: bytes, length: int, encrypted: bool, key: Key | None = None
) -> bytes:
    """The content (`length` bytes) of the stored chunk `raw`, checked against its digest.

    `encrypted`: whether the archive's crypt mode requires an encrypted blob. Raises like `decode`.
    """
    data = decode(raw, max_size=length, key=key, encrypted=encrypted)
    if len(data) != length:
        raise DamageError(f"chunk holds {len(data)} bytes, the index says {length}")
    if chunk_digest(data, key if encrypted else None) != digest:
        raise DamageError("digest mismatch")
    return data


def chunk_digest(data: bytes | memoryview, key: Key | None) -> bytes:
    """The digest (32 bytes) of a chunk with the content `data`; `key`: the one that encrypts it, if any."""
    return key.digest(data) if key else hashlib.sha256(data).digest()


def encode(data: bytes, *, key: Key | None = None, compress: bool = True) -> bytes:
    """`data` as a stored blob: encrypted if there is a key, compressed if asked to and if that is smaller."""
    compressed = False
    if compress:
        packed = zstandard.ZstdCompressor(level=_COMPRESSION_LEVEL).compress(data)
        if len(packed) < len(data):
            data, compressed = packed, True
    if key is None:
        kind = BlobKind.COMPRESSED if compressed else BlobKind.PLAIN
        return kind.value + zlib.crc32(data).to_bytes(4, "little") + data
    kind = BlobKind.ENCRYPTED_COMPRESSED if compressed else BlobKind.ENCRYPTED
    iv, tag, sealed = key.encrypt(data)
    return kind.value + zlib.crc32(sealed).to_bytes(4, "little") + iv + tag + sealed
