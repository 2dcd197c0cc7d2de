"""The chunk files of a datastore in a directory, and what a missing or empty one means.

Usually it means damage. But the directory may be the one that a server keeps beside an object store: it has
all metadata, and of the chunks only those in the server's cache. The others are not damaged, they are
elsewhere. Used by the directory source, from several worker threads at once; everything blocks.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from itertools import islice

from pbsfs.base.errors import DamageError, SourceError
from pbsfs.sources import layout
from pbsfs.sources.directory.datastore import Datastore

_MEDIUM_ERRORS = (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.EILSEQ)
"""What a file system answers for a file that its disk can't read any more, or that fails its own checks."""

_SAMPLE_AT_START = (64, 256)
_SAMPLE_ON_FAULT = (1 << 16, 4096)
"""Directories and files of the chunk store that pbsfs looks at to decide whether it is a cache. The first
costs a moment of each start. The second comes once, before pbsfs calls a chunk damaged, and covers all of a
chunk store that has few chunks in its 65,536 directories (2 s if the kernel has them cached)."""

_EVICTED_SHARE = 8
_LEAST_EVICTED = 3
"""The chunk store is a cache if one chunk file in so many is empty, and at least so many are. A power loss
leaves some empty files in an ordinary datastore, too."""


class ChunkFiles:
    """The chunks of `datastore`."""

    def __init__(self, datastore: Datastore) -> None:
        self._datastore = datastore
        self._files = datastore.chunks
        self._is_cache: bool | None = None  # not decided yet
        self._deciding = threading.Lock()  # one thread takes the large sample, the others wait for it

    def is_obviously_a_cache(self) -> bool:
        """Whether a quick look says that only some chunks are here. Raises SourceError, OSError."""
        is_cache = self._looks_like_a_cache(*_SAMPLE_AT_START)
        if is_cache:
            self._is_cache = True
        return is_cache

    def read(self, digest: bytes, limit: int) -> bytes:
        """The stored bytes of a chunk.

        Raises DamageError if the chunk is missing, unreadable, or has more than `limit` bytes; SourceError if
        the chunk is elsewhere; other OSErrors.
        """
        steps = layout.chunk_steps(digest)
        try:
            data = self._files.read_file(steps, limit)
        except (FileNotFoundError, NotADirectoryError):
            raise self._absent(digest, "missing") from None
        except OSError as error:
            if error.errno not in _MEDIUM_ERRORS:
                raise
            self._datastore.check()  # if the disk is missing, the file is not at fault
            raise DamageError(f"chunk file {self._files.joined(steps)}: {error.strerror}") from None
        if not data:
            raise self._absent(digest, "it is empty")
        return data

    def missing(self, digests: Sequence[bytes]) -> list[int]:
        """Which of these chunks have no file, by their places in `digests`.

        Raises SourceError if the chunks are elsewhere; OSErrors.
        """
        found = [n for n, digest in enumerate(digests) if not self._files.exists(layout.chunk_steps(digest))]
        if found and isinstance(error := self._absent(digests[found[0]], "missing"), SourceError):
            raise error
        return found

    def _absent(self, digest: bytes, problem: str) -> DamageError | SourceError:
        """The error for a chunk of which no byte is here: damage, unless the chunk is elsewhere."""
        self._datastore.check()
        with self._files.scanned(()) as entries:
            if next(entries, None) is None:
                return SourceError(
                    f"{self._files.path} is empty; mount the disk with the chunks there", retryable=True
                )
        if self._is_only_a_cache():
            return SourceError(
                f"chunk {digest.hex()} is not here: the chunks of {self._datastore} are in an object store; "
                "read it through the server, or from a copy of the bucket"
            )
        bad = self._bad_copy(digest)
        if bad is not None:
            problem = f"a verification found it damaged ({bad})"
        return DamageError(f"chunk file {self._files.joined(layout.chunk_steps(digest))}: {problem}")

    def _bad_copy(self, digest: bytes) -> str | None:
        """The first name of a damaged copy of a chunk, as the server's verification leaves it."""
        try:
            with self._files.scanned(layout.chunk_steps(digest)[:-1]) as entries:
                return min((e.name for e in entries if layout.is_bad_copy(e.name, digest)), default=None)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _is_only_a_cache(self) -> bool:
        """Whether chunks that are not here are in an object store. Decided once."""
        with self._deciding:
            if self._is_cache is None:
                self._is_cache = self._looks_like_a_cache(*_SAMPLE_ON_FAULT)
            return self._is_cache

    def _looks_like_a_cache(self, directories: int, files: int) -> bool:
        """Looks at so many directories and files of the chunk store.

        A server with an object store replaces a chunk that it removes from its cache by an empty file, and
        creates an empty `DIGEST.using` for one that never was in the cache (proxmox-backup 4.2.3,
        pbs-datastore/src/chunk_store.rs). Nothing else in the directory shows that there is an object store.
        """
        if self._datastore.is_bucket:
            return False
        with self._files.scanned(()) as entries:
            folders = [entry.name for entry in islice(entries, directories)]
        seen = empty = 0
        for folder in folders:
            try:
                with self._files.scanned((folder,)) as entries:
                    for entry in entries:
                        if entry.name.endswith(layout.UNCACHED):
                            return True
                        if layout.is_chunk_name(entry.name) and seen < files:
                            seen += 1
                            empty += entry.stat(follow_symlinks=False).st_size == 0
            except (OSError, SourceError):
                continue  # its chunks count neither way
            if seen >= files:
                break
        return empty >= _LEAST_EVICTED and empty * _EVICTED_SHARE >= seen
