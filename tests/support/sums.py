"""Checksums of files and streams, read in pieces."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO


def sum_of_stream(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while data := stream.read(1 << 20):
        digest.update(data)
    return digest.hexdigest()


def sum_of(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return sum_of_stream(file)
