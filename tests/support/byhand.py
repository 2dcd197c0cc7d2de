"""Stored bytes built by hand, from the format's description: independent of the encoders under test."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Sequence

import zstandard
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

PLAIN = "42ab3807be8370a1"
COMPRESSED = "31b958426fb6a37f"
ENCRYPTED = "7b6785be222d4cf0"
ENCRYPTED_COMPRESSED = "e6591bbf0bbfd80b"
FIXED = "2f7f41ed91fd0fcd"
DYNAMIC = "1c914ea519bab3cd"

KEY = bytes(range(32))
"""The bytes of `made.KEY`."""

IV = bytes(range(100, 116))

KINDS = (PLAIN, COMPRESSED, ENCRYPTED, ENCRYPTED_COMPRESSED)


def blob(magic: str, data: bytes, *, key: bytes = KEY, announce: bool = False) -> bytes:
    """A stored blob that holds `data`. `announce`: whether a zstd frame carries its content size."""
    if magic in (COMPRESSED, ENCRYPTED_COMPRESSED):
        data = frame(data, announce=announce)
    if magic in (PLAIN, COMPRESSED):
        return unsealed(magic, data)
    encryptor = Cipher(AES(key), GCM(IV)).encryptor()
    sealed = encryptor.update(data) + encryptor.finalize()
    return bytes.fromhex(magic) + struct.pack("<I", zlib.crc32(sealed)) + IV + encryptor.tag + sealed


def unsealed(magic: str, data: bytes) -> bytes:
    """A blob of a kind that is not encrypted around `data` as it stands."""
    return bytes.fromhex(magic) + struct.pack("<I", zlib.crc32(data)) + data


def frame(data: bytes, *, announce: bool = False) -> bytes:
    """One zstd frame, with or without its content size."""
    return zstandard.ZstdCompressor(level=1, write_content_size=announce).compress(data)


def with_crc(stored: bytes) -> bytes:
    """`stored` with the CRC that its data has now."""
    header = 12 if stored[:8].hex() in (PLAIN, COMPRESSED) else 44
    return stored[:8] + struct.pack("<I", zlib.crc32(stored[header:])) + stored[12:]


def fixed(
    digests: Sequence[bytes],
    *,
    size: int,
    chunk_size: int,
    magic: str = FIXED,
    csum: bytes | None = None,
) -> bytes:
    """A stored `.fidx`."""
    body = b"".join(digests)
    csum = hashlib.sha256(body).digest() if csum is None else csum
    header = bytes.fromhex(magic) + bytes(range(16)) + struct.pack("<q", 1_700_000_000) + csum
    return (header + struct.pack("<QQ", size, chunk_size)).ljust(4096, b"\0") + body


def dynamic(
    entries: Sequence[tuple[int, bytes]], *, magic: str = DYNAMIC, csum: bytes | None = None
) -> bytes:
    """A stored `.didx` of (end offset, digest) entries."""
    body = b"".join(struct.pack("<Q", end) + digest for end, digest in entries)
    csum = hashlib.sha256(body).digest() if csum is None else csum
    header = bytes.fromhex(magic) + bytes(range(16)) + struct.pack("<q", 1_700_000_000) + csum
    return header.ljust(4096, b"\0") + body


def flipped(stored: bytes, bit: int) -> bytes:
    """`stored` with one bit flipped, counted from the first byte's lowest."""
    data = bytearray(stored)
    data[bit // 8] ^= 1 << bit % 8
    return bytes(data)
