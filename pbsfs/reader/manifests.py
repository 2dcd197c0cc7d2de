"""The manifests of snapshots: fetched, verified against the keys, and kept for a while.

They say what a snapshot's files are, and which key each needs. `Reader` asks here before it opens a file.
Called from tasks of one trio loop; tasks that need the same manifest at once share one fetch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from pbsfs.base.errors import DamageError, KeyRequiredError, SourceError
from pbsfs.base.names import CLIENT_LOG, MANIFEST, MASTER_KEY_BLOB, Snapshot
from pbsfs.base.text import first_of, one_line
from pbsfs.formats import blob
from pbsfs.formats.keys import Key
from pbsfs.formats.manifest import MAX_MANIFEST_SIZE, CryptMode, Manifest, ManifestFile
from pbsfs.reader.decode import fetch_stored, in_thread_if_large, parse_manifest
from pbsfs.runtime.memory import Charge, Memory
from pbsfs.sources.base import FileInfo, SnapshotInfo, Source
from pbsfs.sources.retry import SharedTry

MAX_MANIFESTS = 256
"""Manifests that are kept, of snapshots in which something was opened."""

PARSED = 3
"""Bytes of memory that a manifest takes for each byte of its text: some 2, measured."""


class Fetched(NamedTuple):
    """A manifest as it was fetched. `size` (bytes) and `digest` (SHA-256): of its text."""

    manifest: Manifest
    size: int
    digest: bytes
    charge: Charge


@dataclass(slots=True)
class _Slot:
    """A snapshot's manifest as it was fetched last, and when, by the loop's clock."""

    fetched: Fetched | None = None
    when: float = -math.inf
    asking: SharedTry[Fetched] = field(default_factory=SharedTry)


class Manifests:
    """The manifests of one source."""

    def __init__(self, source: Source, memory: Memory, keys: Mapping[str, Key]) -> None:
        """`keys`: by fingerprint."""
        self._source = source
        self._memory = memory
        self._keys = keys
        self._slots: dict[Snapshot, _Slot] = {}  # in order of use, the last used one last
        memory.reclaim_with(self._drop)

    @property
    def has_keys(self) -> bool:
        """Whether the user gave any key."""
        return bool(self._keys)

    def lacks_key(self, info: SnapshotInfo, file: FileInfo) -> bool:
        """Whether `Reader.open_image` is known to fail because a key is missing, by the listing alone."""
        if not self._keys:
            return file.crypt_mode is CryptMode.ENCRYPT
        sealed = file.crypt_mode in (CryptMode.ENCRYPT, CryptMode.SIGN_ONLY)
        return sealed and info.key_fingerprint is not None and info.key_fingerprint not in self._keys

    async def describe(
        self, info: SnapshotInfo, file: FileInfo, max_age: float, *, anew: bool = False
    ) -> tuple[FileInfo, Manifest | None]:
        """`file` as the manifest has it, and the manifest, which is verified if keys were given.

        Without keys, pbsfs uses what the listing took from the manifest, unless `anew` says to fetch it; the
        manifest is None then. Raises DamageError, KeyRequiredError, SourceError.
        """
        if file.archive == MANIFEST:
            return file, None
        if file.archive == CLIENT_LOG:
            return file, (await self.get(info.snapshot, max_age)).manifest if self._keys else None
        sealed = file.crypt_mode is CryptMode.ENCRYPT and file.archive != MASTER_KEY_BLOB
        if sealed and not self._keys:
            raise self.key_missing(info.snapshot, file, info.key_fingerprint)  # without asking for more
        if file.csum is not None and not self._keys and not anew:
            return file, None
        manifest = (await self.get(info.snapshot, max_age)).manifest
        entry = _entry(manifest, file)
        if entry is None:
            if not anew:
                return await self.describe(info, file, 0, anew=True)
            raise SourceError(
                f"{info.snapshot}/{file.archive}: the manifest differs from the listing; if the snapshot was "
                f"made again, open the file again in some seconds"
            )
        described = FileInfo(entry.archive, entry.size, entry.crypt_mode, entry.csum)
        bound = entry.crypt_mode is not CryptMode.NONE and entry.archive != MASTER_KEY_BLOB
        if self._keys and bound and self.key_of(manifest) is None:
            # Also if it is only signed: with keys given, pbsfs returns only bytes that they verify.
            raise self.key_missing(info.snapshot, described, manifest.key_fingerprint)
        return described, manifest

    async def get(self, snapshot: Snapshot, max_age: float) -> Fetched:
        """The manifest, fetched less than `max_age` seconds ago. Raises DamageError, SourceError."""
        slot = self._slots.pop(snapshot, None) or _Slot()
        self._slots[snapshot] = slot
        while len(self._slots) > MAX_MANIFESTS:
            del self._slots[next(iter(self._slots))]
        before = slot.when

        def young_enough() -> Fetched | None:
            fetched_meanwhile = slot.when != before
            return slot.fetched if fetched_meanwhile or trio.current_time() - slot.when < max_age else None

        async def fetch() -> Fetched:
            text, manifest = await self.fetch(snapshot)
            charge = self._memory.charge("manifests", PARSED * len(text), passing=True)
            slot.fetched = Fetched(manifest, len(text), hashlib.sha256(text).digest(), charge)
            slot.when = trio.current_time()
            self._memory.reclaim()
            return slot.fetched

        return await slot.asking.run(young_enough, fetch)

    def _drop(self, excess: int) -> None:
        """Drops manifests of at least `excess` bytes if possible, the least recently used first."""
        while self._slots and excess > 0:
            slot = self._slots.pop(next(iter(self._slots)))
            excess -= 0 if slot.fetched is None else slot.fetched.charge.size

    async def fetch(self, snapshot: Snapshot) -> tuple[bytes, Manifest]:
        """The manifest as it is stored now, as text too, checked against the keys.

        Raises DamageError, SourceError.
        """

        async def attempt() -> tuple[bytes, Manifest]:
            limit = blob.stored_limit(MAX_MANIFEST_SIZE)
            raw = await fetch_stored(self._source, snapshot, FileInfo(MANIFEST, 0, None), limit)
            return await in_thread_if_large(blob.work_of(raw), parse_manifest, raw)

        try:
            text, manifest = await self._source.confirmed(attempt)
            if self._keys:
                await in_thread_if_large(len(text), self._verify, manifest, snapshot)
        except DamageError as error:
            raise DamageError(f"{snapshot}/{MANIFEST}: {error}") from None
        return text, manifest

    def _verify(self, manifest: Manifest, snapshot: Snapshot) -> None:
        """Checks a manifest against the keys that the user gave. Raises DamageError."""
        if manifest.needs_key and manifest.signature is None:
            raise DamageError("it says that a key was used, but has no signature: it was changed")
        key = self.key_of(manifest)
        if key is None:
            return  # made without a key, or with one not given: files that need it fail when opened
        if not manifest.is_signed_by(key):
            raise DamageError(f"its signature does not match under the key {key.fingerprint}: it was changed")
        found = (manifest.backup_type, manifest.backup_id, manifest.backup_time)
        if found != (snapshot.group.type, snapshot.group.id, snapshot.time):
            raise DamageError("it is the manifest of another snapshot: {}/{}, {}".format(*found))

    def key_of(self, manifest: Manifest) -> Key | None:
        """The given key that the manifest names; for old ones, which name none, the one that signed it."""
        if manifest.key_fingerprint is not None:
            return self._keys.get(manifest.key_fingerprint)
        return next((key for key in self._keys.values() if manifest.is_signed_by(key)), None)

    def key_for(self, info: SnapshotInfo, file: FileInfo, manifest: Manifest | None) -> Key:
        """The key that `file` needs. Raises KeyRequiredError if it was not given."""
        key = None if manifest is None else self.key_of(manifest)
        if key is None:
            named = info if manifest is None else manifest
            raise self.key_missing(info.snapshot, file, named.key_fingerprint)
        return key

    def key_missing(self, snapshot: Snapshot, file: FileInfo, fingerprint: str | None) -> KeyRequiredError:
        """The error for a file whose key, with this fingerprint, was not given."""
        done = "signed" if file.crypt_mode is CryptMode.SIGN_ONLY else "encrypted"
        named = one_line(fingerprint, 100) if fingerprint else "(the manifest does not name it)"
        given = f" (given: {first_of(self._keys)})" if self._keys else ""
        return KeyRequiredError(
            f"{snapshot}/{file.archive.name} is {done} with the key {named}, which was not given{given}; "
            "give its key file (--keyfile, or keyfile= of nbdkit)",
            fingerprint=one_line(fingerprint, 100) if fingerprint else None,
        )


def _entry(manifest: Manifest, file: FileInfo) -> ManifestFile | None:
    """What the manifest has of a file that was listed; None where it has another one or none."""
    entry = next((entry for entry in manifest.files if entry.archive == file.archive), None)
    if entry is None or entry.size != file.size or file.csum not in (None, entry.csum):
        return None
    return entry
