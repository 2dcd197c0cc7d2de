"""Writes a datastore directory, as the vendor's client and server do together.

For the demo and the tests, which need real data of every kind. Not a backup program: everything blocks, it
locks nothing, and a directory must have one writer at a time.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pbsfs.base.errors import UsageError
from pbsfs.base.names import BACKUP_TYPES, CLIENT_LOG, MANIFEST, Archive, ArchiveKind, Group, Snapshot
from pbsfs.formats import blob, index, manifest
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode, ManifestFile
from pbsfs.sources import layout

DEFAULT_CHUNK_SIZE = 4 << 20
"""Bytes of a chunk of an image, as with the vendor's client."""

SMALL_CHUNKS = 64 << 10, 1 << 20
"""Least and most bytes of a chunk of an archive: small, so that small archives have several."""

USUAL_CHUNKS = 1 << 20, 7 << 20
"""The same for chunks of 4 MiB on average, as with the vendor's client."""


class DatastoreWriter:
    """A datastore in the directory `path`, which it makes if needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / layout.CHUNKS).mkdir(parents=True, exist_ok=True)
        for backup_type in BACKUP_TYPES:
            (path / backup_type).mkdir(exist_ok=True)

    def group_path(self, group: Group) -> Path:
        return self.path.joinpath(*layout.group_steps(group))

    def snapshot_path(self, snapshot: Snapshot) -> Path:
        return self.path.joinpath(*layout.snapshot_steps(snapshot))

    def chunk_path(self, digest: bytes) -> Path:
        return self.path.joinpath(layout.CHUNKS, *layout.chunk_steps(digest))

    def add_chunk(self, data: bytes, *, key: Key | None = None, compress: bool = True) -> bytes:
        """Stores one chunk, unless it is stored already; returns its digest."""
        digest = blob.chunk_digest(data, key)
        path = self.chunk_path(digest)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(blob.encode(data, key=key, compress=compress))
        return digest

    def add_snapshot(
        self,
        snapshot: Snapshot,
        files: Mapping[str, bytes | Path],
        *,
        crypt_mode: CryptMode = CryptMode.NONE,
        key: Key | None = None,
        chunk_size: int = DEFAULT_CHUNK_SIZE,
        stream_chunks: tuple[int, int] = SMALL_CHUNKS,
        compress: bool = True,
        owner: str = "root@pam",
        notes: str | None = None,
        verify_state: str | None = None,
        protected: bool = False,
        client_log: bytes | None = None,
    ) -> Path:
        """Stores a backup; returns the snapshot's directory.

        `files`: content by stored name (`drive-scsi0.img.fidx`), as bytes or as the path of a file.
        `key`: needed for any `crypt_mode` but NONE. `chunk_size`: bytes, of fixed indexes.
        `stream_chunks`: least and most bytes of a chunk, of dynamic indexes.
        """
        if (key is None) != (crypt_mode is CryptMode.NONE):
            raise UsageError("give a key with the crypt modes encrypt and sign-only, and with no other")
        directory = self.snapshot_path(snapshot)
        directory.mkdir(parents=True)
        (directory.parent / layout.OWNER).write_text(f"{owner}\n")
        data_key = key if crypt_mode is CryptMode.ENCRYPT else None
        entries = []
        for filename, content in files.items():
            archive = Archive(filename)
            with content.open("rb") if isinstance(content, Path) else io.BytesIO(content) as stream:
                pieces = (
                    _fixed_pieces(stream, chunk_size)
                    if archive.kind is ArchiveKind.FIXED
                    else _dynamic_pieces(stream, *stream_chunks)
                )
                stored, size, csum = self._store(
                    archive, stream, pieces, snapshot.time, data_key, chunk_size, compress
                )
            (directory / filename).write_bytes(stored)
            entries.append(ManifestFile(archive, crypt_mode, size, csum))
        if client_log is not None:
            (directory / CLIENT_LOG.filename).write_bytes(blob.encode(client_log, key=data_key))
        if protected:
            (directory / layout.PROTECTED).touch()
        unprotected: dict[str, Any] = {"chunk_upload_stats": {}}
        if key is not None:
            unprotected["key-fingerprint"] = key.fingerprint
        if notes is not None:
            unprotected["notes"] = notes
        if verify_state is not None:
            unprotected["verify_state"] = {"state": verify_state, "upid": "UPID:made:up"}
        text = manifest.encode(
            backup_type=snapshot.group.type,
            backup_id=snapshot.group.id,
            backup_time=snapshot.time,
            files=tuple(entries),
            unprotected=unprotected,
            key=key,
        )
        # The manifest comes last: it makes the backup finished.
        (directory / MANIFEST.filename).write_bytes(blob.encode(text))
        return directory

    def _store(
        self,
        archive: Archive,
        stream: BinaryIO,
        pieces: Iterator[bytes],
        ctime: int,
        key: Key | None,
        chunk_size: int,
        compress: bool,
    ) -> tuple[bytes, int, bytes]:
        """Stores the chunks of an archive; returns its file, and size and csum for the manifest."""
        if archive.kind is ArchiveKind.BLOB:
            stored = blob.encode(stream.read(), key=key, compress=compress)
            return stored, len(stored), hashlib.sha256(stored).digest()
        fixed = archive.kind is ArchiveKind.FIXED
        entries: list[tuple[int, bytes]] = []
        size = 0
        for data in pieces:
            size += len(data)
            entries.append((size, self.add_chunk(data, key=key, compress=compress)))
        if fixed:
            digests = [digest for _end, digest in entries]
            stored, csum = index.encode_fixed(digests, size=size, chunk_size=chunk_size, ctime=ctime)
        else:
            stored, csum = index.encode_dynamic(entries, ctime=ctime)
        return stored, size, csum


def _fixed_pieces(stream: BinaryIO, chunk_size: int) -> Iterator[bytes]:
    while data := stream.read(chunk_size):
        yield data


def _dynamic_pieces(stream: BinaryIO, least: int, most: int) -> Iterator[bytes]:
    """Pieces of `least` to `most` bytes, of lengths that depend on the content: the same content, the same
    chunks."""
    while head := stream.read(least):
        rest = int.from_bytes(hashlib.sha256(head).digest()[:8], "little") % (most - least)
        yield head + stream.read(rest)
