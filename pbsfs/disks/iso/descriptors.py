"""The volume descriptors of ISO 9660: where its trees of directories begin. Used by `reader`."""

from __future__ import annotations

from dataclasses import dataclass

from pbsfs.base.errors import DamageError
from pbsfs.disks.volume import Volume

SECTOR = 2048
FIRST = 16 * SECTOR
"""Where the descriptors begin."""

MAGIC = b"CD001"
_MOST = 100
_PRIMARY, _SUPPLEMENTARY, _END = 1, 2, 255
_JOLIET = (b"%/@", b"%/C", b"%/E")
_ROOT = 156
_MODIFIED, _CREATED = 830, 813


@dataclass(frozen=True, slots=True)
class Descriptor:
    """`root`: the byte where the root directory begins. `blocks`: of `block_size` bytes in the volume."""

    label: str
    uuid: str
    block_size: int
    blocks: int
    root: int


def descriptors(volume: Volume) -> tuple[Descriptor, Descriptor | None]:
    """The primary descriptor, and that of Joliet, if there is one. Raises DamageError."""
    primary = joliet = None
    for number in range(_MOST):
        at = FIRST + number * SECTOR
        raw = volume.read(at, SECTOR) if at + SECTOR <= volume.size else b""
        if raw[1:6] != MAGIC or raw[0] == _END:
            break
        if raw[0] == _PRIMARY and primary is None:
            primary = _descriptor(raw, raw[40:72].decode("latin-1"))
        elif raw[0] == _SUPPLEMENTARY and raw[88:91] in _JOLIET and joliet is None:
            joliet = _descriptor(raw, raw[40:72].decode("utf-16-be", "replace"))
    if primary is None:
        raise DamageError("there is no primary volume descriptor")
    return primary, joliet


def _descriptor(raw: bytes, label: str) -> Descriptor:
    block_size = int.from_bytes(raw[128:130], "little")
    if block_size not in {512, 1024, 2048}:
        raise DamageError("a volume descriptor has a wrong block size")
    root = int.from_bytes(raw[_ROOT + 2 : _ROOT + 6], "little") + raw[_ROOT + 1]
    blocks = int.from_bytes(raw[80:84], "little")
    return Descriptor(label.rstrip(" \0"), _uuid(raw), block_size, blocks, root * block_size)


def _uuid(raw: bytes) -> str:
    """As libblkid has it: when the volume was made."""
    for at in (_MODIFIED, _CREATED):
        digits = raw[at : at + 16]
        if digits.isdigit() and digits.strip(b"0"):
            text = digits.decode("ascii")
            return "-".join((text[:4], *(text[place : place + 2] for place in range(4, 16, 2))))
    return ""
