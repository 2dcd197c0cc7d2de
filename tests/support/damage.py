"""Damage: what disks, software and attackers do to stored files."""

from __future__ import annotations

import os
from pathlib import Path


def flip_bit(path: Path, bit: int) -> None:
    """Flips one bit of a file, counted from its first byte's lowest."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    replace(path, bytes(data))


def truncate(path: Path, size: int) -> None:
    """Cuts a file to `size` bytes."""
    replace(path, path.read_bytes()[:size])


def replace(path: Path, data: bytes) -> None:
    """Gives a file other content, as another file of that name: caches by inode notice."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(data)
    os.replace(new, path)
