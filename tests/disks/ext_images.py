"""Images of ext2 to ext4 that mke2fs and debugfs make, also with transactions in their journals."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from pbsfs.contents.base import Entry, Piece
from pbsfs.disks.ext.reader import Ext
from pbsfs.disks.volume import Disk
from tests.support.disks import FileDisk, content_of, image_from
from tests.support.needs import need

MAGIC = b"\xc0\x3b\x39\x98"


def made(image: Path, *options: str, tree: Path | None = None, size: int = 24 << 20) -> FileDisk:
    need("mke2fs")
    image_from(image, size)
    source = [] if tree is None else ["-d", str(tree)]
    subprocess.run(["mke2fs", "-q", "-F", *options, *source, image], check=True, capture_output=True)
    return FileDisk(image)


def debugfs(image: Path, *commands: str) -> None:
    need("debugfs")
    script = "".join(f"{command}\n" for command in commands)
    subprocess.run(
        ["debugfs", "-w", "-f", "-", image], input=script, check=True, capture_output=True, text=True
    )


def walked(found: Ext) -> dict[bytes, Entry]:
    entries: dict[bytes, Entry] = {}
    for path, entry in found.walk(found.root):
        assert isinstance(entry, Entry), (path, entry)
        entries[path] = entry
    return entries


class Journaled:
    """An image with a file of four blocks of 1 KiB, and transactions that debugfs wrote to its journal."""

    def __init__(self, path: Path, *options: str, journal: int = 1) -> None:
        self.image = path / "image"
        made(self.image, "-t", "ext4", "-b", "1024", "-J", f"size={journal}", *options, size=12 << 20)
        (path / "content").write_bytes(b"".join(bytes([letter]) * 1024 for letter in b"ABCD"))
        debugfs(self.image, f"write {path / 'content'} file")
        (piece,) = self.pieces()
        self.first = piece.offset // 1024
        self.path = path

    def open(self) -> Ext:
        return Ext(Disk(FileDisk(self.image)))

    def pieces(self) -> list[Piece]:
        found = self.open()
        return list(found.data(walked(found)[b"file"]))

    def content(self) -> bytes:
        found = self.open()
        return b"".join(content_of(found, [FileDisk(self.image)], walked(found)[b"file"]))

    def write(self, *transactions: tuple[dict[int, bytes], list[int]], checksums: bool) -> None:
        """Transactions: each with what it writes to blocks of the file, and what it revokes."""
        commands = [f"journal_open{' -c' if checksums else ''}"]
        for number, (blocks, revoked) in enumerate(transactions):
            if blocks:
                data = self.path / f"data{number}"
                data.write_bytes(b"".join(blocks.values()))
                places = ",".join(str(self.first + block) for block in blocks)
                commands.append(f"journal_write -b {places} {data}")
            if revoked:
                commands.append(f"journal_write -r {','.join(str(self.first + block) for block in revoked)}")
        debugfs(self.image, *commands, "journal_close")

    def journal(self) -> tuple[int, bytearray]:
        """Where the journal is in the image, and its bytes."""
        data = self.image.read_bytes()
        head = MAGIC + struct.pack(">I", 4)
        (start,) = (at for at in range(0, len(data), 1024) if data[at : at + 8] == head)
        return start, bytearray(data[start : start + (1 << 20)])

    def change(self, offset: int, value: bytes) -> None:
        with self.image.open("r+b") as file:
            file.seek(self.journal()[0] + offset)
            file.write(value)

    def block(self, kind: int, number: int = 0) -> int:
        """The offset in the journal of its block of a kind, the `number`th."""
        journal = self.journal()[1]
        head = MAGIC + struct.pack(">I", kind)
        return [at for at in range(0, len(journal), 1024) if journal[at : at + 8] == head][number]
