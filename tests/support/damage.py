"""Damage: what disks, software and attackers do to stored files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from pbsfs.formats import blob


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


# --- of a chunk's file: what it takes, each in its own way


def _flipped(path: Path, _other: bytes) -> None:
    flip_bit(path, path.stat().st_size * 8 - 3)


def _missing(path: Path, _other: bytes) -> None:
    path.unlink()


def _truncated(path: Path, _other: bytes) -> None:
    truncate(path, path.stat().st_size // 2)


def _swapped(path: Path, other: bytes) -> None:
    replace(path, blob.encode(other))  # a blob without a fault, of another content


def _renamed(path: Path, _other: bytes) -> None:
    path.rename(path.with_name(f"{path.name}.0.bad"))  # as the server's verification does


CHUNK_DAMAGE: dict[str, Callable[[Path, bytes], None]] = {
    "bit flip": _flipped,
    "missing": _missing,
    "truncated": _truncated,
    "other content": _swapped,
    "found bad": _renamed,
}
"""Ways to damage the file of a chunk; the second argument is content that it does not have."""
