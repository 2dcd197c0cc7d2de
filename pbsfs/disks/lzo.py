"""LZO1X: the compression that btrfs and squashfs call lzo. Pure.

Format: the kernel's Documentation/staging/lzo.rst.
"""

from __future__ import annotations

from pbsfs.base.errors import DamageError


def decompress(data: bytes, most: int) -> bytes:
    """What a stream of LZO1X holds: at most `most` bytes. Raises DamageError."""
    try:
        return _decompress(data, most)
    except IndexError:
        raise DamageError("LZO data ends early") from None


def _decompress(data: bytes, most: int) -> bytes:
    out = bytearray()
    at = 0
    state = 0  # literals after the last match; 4 after a run of literals
    if data[0] > 17:
        count = data[0] - 17
        at = 1 + count
        out += data[1:at]
        state = min(count, 4)
    while True:
        code = data[at]
        at += 1
        if code >= 64:
            count = (code >> 5) + 1
            distance = 1 + (code >> 2 & 7) + (data[at] << 3)
            literals = code & 3
            at += 1
        elif code >= 16:
            mask = 31 if code >= 32 else 7
            count = code & mask
            if not count:
                count, at = _long(data, at, mask)
            count += 2
            word = data[at] | data[at + 1] << 8
            at += 2
            literals = word & 3
            distance = word >> 2
            if code >= 32:
                distance += 1
            else:
                distance += (code & 8) << 11
                if not distance:
                    if count != 3 or at != len(data):
                        raise DamageError("LZO data ends in a wrong way")
                    return bytes(out)
                distance += 0x4000
        elif state:
            literals = code & 3
            distance = 1 + (code >> 2) + (data[at] << 2)
            at += 1
            count = 2
            if state == 4:
                count = 3
                distance += 0x800
        else:
            count = code
            if not count:
                count, at = _long(data, at, 15)
            count += 3
            if at + count > len(data):
                raise DamageError("LZO data ends early")
            if len(out) + count > most:
                raise DamageError("LZO data holds more than it should")
            out += data[at : at + count]
            at += count
            state = 4
            continue
        start = len(out) - distance
        if start < 0:
            raise DamageError("LZO data refers to what is before its begin")
        if len(out) + count + literals > most:
            raise DamageError("LZO data holds more than it should")
        if distance >= count:
            out += out[start : start + count]
        else:
            part = bytes(out[start:])
            out += (part * (count // distance + 1))[:count]
        if literals:
            out += data[at : at + literals]
            at += literals
        state = literals


def _long(data: bytes, at: int, base: int) -> tuple[int, int]:
    """A count that continues in further bytes, and where those end."""
    while not data[at]:
        base += 255
        at += 1
    return base + data[at], at + 1
