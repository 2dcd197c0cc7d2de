"""A backup of a disk with files, some of whose chunks are lost, and what `pbsfs verify` says of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from pbsfs.formats.index import FixedIndex
from pbsfs.testing.writer import DatastoreWriter
from tests.support import made
from tests.support.disks import ext4_of, partitioned
from tests.support.program import pbsfs

CHUNK = 1 << 16
BLOCK = 1 << 10
VOLUME = "files/vm/100/2023-11-14T22:13:20Z/scsi0-p1"


def contents() -> dict[str, bytes]:
    return {f"d{n % 3}/f{n}": random.Random(n).randbytes(30_000 + 10_000 * n) for n in range(12)}


class Damaged:
    """A datastore with one disk, of which chunks can be taken away."""

    def __init__(self, place: Path) -> None:
        for path, data in contents().items():
            (place / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
            (place / "tree" / path).write_bytes(data)
        self.disk = partitioned(ext4_of(place / "tree", place / "image"))
        self.writer = DatastoreWriter(place / "store")
        files: dict[str, bytes | Path] = {"drive-scsi0.img.fidx": self.disk}
        snapshot = self.writer.add_snapshot(made.snapshot(), files, chunk_size=CHUNK)
        self._index = FixedIndex((snapshot / "drive-scsi0.img.fidx").read_bytes())

    def chunks(self) -> dict[int, set[str]]:
        """The chunks that hold data of files and nothing else, with the paths of these."""
        owners: dict[int, str] = {}
        for path, data in contents().items():
            for at in range(0, len(data), BLOCK):
                owners[self.disk.index(data[at : at + BLOCK])] = f"{VOLUME}/{path}"
        found: dict[int, set[str]] = {}
        for number in range(len(self.disk) // CHUNK):
            blocks = range(number * CHUNK, (number + 1) * CHUNK, BLOCK)
            if all(at in owners for at in blocks):
                found[number] = {owners[at] for at in blocks}
        return found

    def lose(self, number: int) -> None:
        self.writer.chunk_path(self._index.digest(number)).unlink()

    def verify(self, *paths: str, form: str = "--json") -> Any:
        done = pbsfs("verify", form, "--datastore-dir", self.writer.path, *paths)
        assert (done.returncode, done.stderr) == (6, "")
        return json.loads(done.stdout)["damaged"] if form == "--json" else done.stdout
