"""SipHash-2-4, which hashes the names in pxar archives (Aumasson and Bernstein, 2012).

Python has another variant of it, with a key of its own choice. Pure, for any thread.
"""

from __future__ import annotations

import struct

_MASK = 0xFFFFFFFFFFFFFFFF


def siphash_2_4(key: tuple[int, int], data: bytes) -> int:
    """The hash of `data` under `key`: two numbers of 64 bits, its halves in little-endian order."""
    k0, k1 = key
    v0, v1 = k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D
    v2, v3 = k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573
    length = len(data)
    padded = data + bytes(7 - length % 8) + bytes((length & 0xFF,))
    m = _MASK
    for word in (*struct.unpack(f"<{len(padded) // 8}Q", padded), None):
        if word is None:
            v2 ^= 0xFF
        else:
            v3 ^= word
        for _ in range(4 if word is None else 2):
            v0 = (v0 + v1) & m
            v1 = ((v1 << 13) & m | v1 >> 51) ^ v0
            v0 = (v0 << 32) & m | v0 >> 32
            v2 = (v2 + v3) & m
            v3 = ((v3 << 16) & m | v3 >> 48) ^ v2
            v0 = (v0 + v3) & m
            v3 = ((v3 << 21) & m | v3 >> 43) ^ v0
            v2 = (v2 + v1) & m
            v1 = ((v1 << 17) & m | v1 >> 47) ^ v2
            v2 = (v2 << 32) & m | v2 >> 32
        if word is not None:
            v0 ^= word
    return v0 ^ v1 ^ v2 ^ v3
