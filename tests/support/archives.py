"""Archives of the golden data, decoded in memory, and the truth about their entries."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pbsfs.formats import blob
from pbsfs.formats.index import DynamicIndex
from tests.support import golden

FILES = golden.ROOT / "files"


@dataclass
class Memory:
    """A stream in memory, which counts the reads."""

    data: bytes
    reads: int = 0
    requested: int = 0

    @property
    def size(self) -> int:
        return len(self.data)

    def pread(self, offset: int, size: int) -> bytes:
        assert 0 <= offset <= self.size
        assert size >= 0
        self.reads += 1
        return self.data[offset : offset + size]

    def prefetch(self, ranges: Sequence[tuple[int, int]]) -> None:
        assert all(0 <= offset <= offset + size <= self.size for offset, size in ranges)
        self.requested += len(ranges)


@functools.lru_cache(maxsize=2)
def stream(path: Path) -> bytes:
    """The stream of a dynamic index in the golden files, decoded with the plain key where it is encrypted."""
    chunks = []
    index = DynamicIndex(path.read_bytes())
    for number in range(index.count):
        digest = index.digest(number).hex()
        raw = (FILES / "datastore" / ".chunks" / digest[:4] / digest).read_bytes()
        start, end = index.span(number)
        chunks.append(blob.decode(raw, max_size=end - start, key=golden.plain_key()))
    return b"".join(chunks)


def truth(name: str) -> dict[bytes, dict[str, Any]]:
    lines = (FILES / "truth" / f"{name}.jl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {bytes.fromhex(row["p"]): row for row in rows}
