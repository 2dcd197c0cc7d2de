"""Restores in place, for tests: content that differs in places, and devices that hold it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.needs import need_loop
from tests.support.program import output_of, pbsfs
from tests.support.stocked import CHUNK, Stocked

VERIFIED = "what was written was read back and verified"


def in_place(stocked: Stocked, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return pbsfs("export", "--in-place", "--datastore-dir", stocked.path, *arguments)


def changed(content: bytes, *numbers: int) -> bytes:
    """`content` with one byte changed in each of these chunks."""
    data = bytearray(content)
    for number in numbers:
        data[number * CHUNK + 700] ^= 0x20
    return bytes(data)


@contextmanager
def a_device(backing: Path, content: bytes) -> Iterator[Path]:
    """A block device with `content`."""
    need_loop()
    backing.write_bytes(content)
    name = output_of("losetup", "--find", "--show", str(backing)).strip()
    try:
        yield Path(name)
    finally:
        subprocess.run(["losetup", "--detach", name], check=True, timeout=30)
