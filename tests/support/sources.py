"""A source in memory that tests script: it counts calls, fails, waits at gates, hands out damage."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TypeVar

import trio

from pbsfs.base.errors import DamageError, NotFoundError
from pbsfs.base.names import CLIENT_LOG, MANIFEST, Archive, ArchiveKind, Group, Namespace, Snapshot
from pbsfs.formats import blob, index, manifest
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import CryptMode, ManifestFile
from pbsfs.sources.base import FileInfo, GroupInfo, SnapshotInfo, Source

T = TypeVar("T")

CHUNK_SIZE = 64 << 10


class MemorySource(Source):
    """Snapshots that were added to it.

    `calls`: how often each method was called; `fetched`: the chunks asked for, in order; `in_flight`
    and `peak`: chunk fetches that run now, and the most that ever ran at once.
    """

    def __init__(self, *, cheap_files: bool = True) -> None:
        self.cheap_files = cheap_files
        self.infos: dict[Snapshot, SnapshotInfo] = {}
        self.files: dict[tuple[Snapshot, Archive], bytes] = {}
        self.chunks: dict[bytes, bytes] = {}
        self.calls: Counter[str] = Counter()
        self.fetched: list[bytes] = []
        self.in_flight = 0
        self.peak = 0
        self.closed = 0
        self._failures: dict[str, list[Exception]] = {}
        self._gates: dict[str | bytes, trio.Event] = {}

    def __str__(self) -> str:
        return "memory"

    # --- what a test does with it

    def add(
        self,
        snapshot: Snapshot,
        files: Mapping[str, bytes],
        *,
        crypt_mode: CryptMode = CryptMode.NONE,
        key: Key | None = None,
        chunk_size: int = CHUNK_SIZE,
        compress: bool = True,
        client_log: bytes | None = None,
        notes: str | None = None,
        verify_state: str | None = None,
        protected: bool = False,
    ) -> SnapshotInfo:
        """Adds a snapshot of `files`, content by stored name; streams too are cut every `chunk_size`."""
        data_key = key if crypt_mode is CryptMode.ENCRYPT else None
        infos: list[FileInfo] = []
        for filename, content in files.items():
            archive = Archive(filename)
            if archive.kind is ArchiveKind.BLOB:
                stored = blob.encode(content, key=data_key, compress=compress)
                size, csum = len(stored), hashlib.sha256(stored).digest()
            else:
                ends = [*range(0, len(content), chunk_size), len(content)]
                pieces = [content[a:b] for a, b in pairwise(ends)] if content else []
                digests = [self.add_chunk(piece, key=data_key, compress=compress) for piece in pieces]
                size = len(content)
                if archive.kind is ArchiveKind.FIXED:
                    stored, csum = index.encode_fixed(digests, size=size, chunk_size=chunk_size, ctime=0)
                else:
                    entries = list(zip(ends[1:], digests, strict=False))
                    stored, csum = index.encode_dynamic(entries, ctime=0)
            self.files[snapshot, archive] = stored
            infos.append(FileInfo(archive, size, crypt_mode, csum))
        self.set_manifest(snapshot, infos, key)
        infos.append(FileInfo(MANIFEST, len(self.files[snapshot, MANIFEST]), CryptMode.NONE))
        if client_log is not None:
            self.files[snapshot, CLIENT_LOG] = blob.encode(client_log, key=data_key)
            infos.append(FileInfo(CLIENT_LOG, len(self.files[snapshot, CLIENT_LOG]), None))
        info = self.infos[snapshot] = SnapshotInfo(
            snapshot,
            tuple(infos),
            owner="root@pam",
            protected=protected,
            key_fingerprint=key.fingerprint if key is not None else None,
            notes=notes,
            verify_state=verify_state,
        )
        return info

    def set_manifest(self, snapshot: Snapshot, files: Sequence[FileInfo], key: Key | None) -> None:
        """Stores the manifest: of the files that have a checksum, signed where there is a key."""
        entries = (
            ManifestFile(file.archive, file.crypt_mode, file.size, file.csum)
            for file in files
            if file.crypt_mode is not None and file.csum is not None
        )
        text = manifest.encode(
            backup_type=snapshot.group.type,
            backup_id=snapshot.group.id,
            backup_time=snapshot.time,
            files=tuple(entries),
            unprotected={} if key is None else {"key-fingerprint": key.fingerprint},
            key=key,
        )
        self.files[snapshot, MANIFEST] = blob.encode(text)

    def add_chunk(self, data: bytes, *, key: Key | None = None, compress: bool = True) -> bytes:
        digest = blob.chunk_digest(data, key)
        if digest not in self.chunks:
            self.chunks[digest] = blob.encode(data, key=key, compress=compress)
        return digest

    def fail(self, kind: str, *errors: Exception) -> None:
        """The next calls of the method `kind` raise `errors`, one each."""
        self._failures.setdefault(kind, []).extend(errors)

    def hold(self, what: str | bytes) -> trio.Event:
        """Calls of the method `what`, or fetches of the chunk `what`, wait until the event is set."""
        gate = self._gates[what] = trio.Event()
        return gate

    def damage(self, digest: bytes, bit: int) -> None:
        """Flips one bit of a stored chunk."""
        data = bytearray(self.chunks[digest])
        data[bit // 8] ^= 1 << bit % 8
        self.chunks[digest] = bytes(data)

    # --- the interface

    async def namespaces(self, parent: Namespace) -> list[Namespace]:
        depth = len(parent.parts) + 1
        found = {snapshot.group.namespace.parts[:depth] for snapshot in self.infos}
        inside = sorted(p for p in found if len(p) == depth and p[:-1] == parent.parts)
        return await self._answer("namespaces", [Namespace(parts) for parts in inside])

    async def groups(self, namespace: Namespace) -> list[GroupInfo]:
        times: dict[Group, list[int]] = {}
        for snapshot in self.infos:
            if snapshot.group.namespace == namespace:
                times.setdefault(snapshot.group, []).append(snapshot.time)
        found = [
            GroupInfo(group, max(times[group]), len(times[group]), "root@pam") for group in sorted(times)
        ]
        return await self._answer("groups", found)

    async def snapshots(self, group: Group) -> list[SnapshotInfo]:
        found = [self.infos[snapshot] for snapshot in sorted(self.infos) if snapshot.group == group]
        return await self._answer("snapshots", found)

    async def fetch_file(self, snapshot: Snapshot, archive: Archive, limit: int) -> bytes:
        stored = await self._answer("fetch_file", self.files.get((snapshot, archive)))
        if stored is None:
            raise NotFoundError(f"{snapshot}/{archive} does not exist")
        return _limited(stored, limit)

    async def fetch_chunk(self, snapshot: Snapshot, archive: Archive, digest: bytes, limit: int) -> bytes:
        assert (snapshot, archive) in self.files
        self.fetched.append(digest)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            gate = self._gates.get(digest)
            if gate is not None:
                await gate.wait()
            raw = await self._answer("fetch_chunk", self.chunks[digest])
        finally:
            self.in_flight -= 1
        return _limited(raw, limit)

    async def aclose(self) -> None:
        self.closed += 1

    async def _answer(self, kind: str, answer: T) -> T:
        self.calls[kind] += 1
        gate = self._gates.get(kind)
        failures = self._failures.get(kind)
        failure = failures.pop(0) if failures else None
        if gate is not None:
            await gate.wait()
        await trio.lowlevel.checkpoint()
        if failure is not None:
            raise failure
        return answer


def _limited(stored: bytes, limit: int) -> bytes:
    if len(stored) > limit:
        raise DamageError(f"has {len(stored)} bytes where {limit} is the most")
    return stored


def file_of(info: SnapshotInfo, filename: str) -> FileInfo:
    """The file that is stored as `filename`."""
    return next(file for file in info.files if file.archive.filename == filename)


class TimedSource(MemorySource):
    """Takes note of when each chunk is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[float] = []

    async def fetch_chunk(self, snapshot: Snapshot, archive: Archive, digest: bytes, limit: int) -> bytes:
        self.asked.append(trio.current_time())
        return await super().fetch_chunk(snapshot, archive, digest, limit)
