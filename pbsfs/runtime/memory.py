"""One limit for the memory of a reader. Everything that grows with use is charged to it.

`open_reader` makes one `Memory`. What keeps bytes (digest tables, blobs, listings, buffers) holds a `Charge`
for as long as it keeps them. The chunk cache takes what the charges leave, and gives way at once to buffers
that hold what was read from it (`lend`). When charges need more, the cache shrinks first, down to
LEAST_CACHE; then the reclaimers free what can be fetched again; then `admit` refuses.

Any thread may make, resize and end charges. `admit` and `reclaim` belong to tasks of the trio loop, and so do
the reclaimers. Reading from the cache costs nothing here.
"""

from __future__ import annotations

import errno
import threading
from collections import Counter, deque
from collections.abc import Callable

from pbsfs.base.errors import SourceError

DEFAULT_CACHE_SIZE = 256 << 20
"""Bytes of decoded chunks in the cache: enough for the working set of a booting guest."""

DEFAULT_OPEN_LIMIT = 256 << 20
"""Bytes for all that is charged, before the cache shrinks: the digest tables of 32 TiB in chunks of 4 MiB."""

COMMAND_OPEN_LIMIT = 1 << 30
"""The same for a command, which ends soon: it holds the files of a whole datastore, and the chunks it has
read."""

LEAST_CACHE = 32 << 20
"""Bytes that the charges always leave to the cache: two chunks of the largest size that exists."""


class MemoryLimitError(SourceError):
    """Something does not fit in memory beside all that is in use."""

    errno = errno.ENOMEM


class Charge:
    """Bytes of one holder. They are given back when the object is freed."""

    __slots__ = ("_holder", "_memory", "passing", "size")

    def __init__(self, memory: Memory, holder: str, *, passing: bool) -> None:
        self._memory = memory
        self._holder = holder
        self.passing = passing
        self.size = 0

    def resize(self, size: int) -> None:
        """Changes the charge to `size` bytes. Callers in several threads need a lock of their own."""
        self._memory._change(self._holder, size - self.size, passing=self.passing)
        self.size = size

    def __del__(self) -> None:
        # No lock here: the garbage collector calls this anywhere, also while the same thread holds the lock.
        self._memory._given_back.append((self._holder, self.size, self.passing))


class Memory:
    """A limit in bytes and what is charged to it. `limit`: the cache with all that is charged."""

    def __init__(self, cache_size: int = DEFAULT_CACHE_SIZE, open_limit: int = DEFAULT_OPEN_LIMIT) -> None:
        """`cache_size`: most bytes of the cache. `open_limit`: bytes of charges before the cache shrinks."""
        self.cache_size = cache_size
        self.open_limit = open_limit
        self.limit = cache_size + open_limit
        self._least_cache = min(cache_size, LEAST_CACHE)
        self._lock = threading.Lock()
        self._charged: Counter[str] = Counter()  # bytes by holder
        self._total = 0
        self._passing = 0
        self._lent = 0  # bytes of the cache's own part
        self._given_back: deque[tuple[str, int, bool]] = deque()  # by charges that were freed
        self._resize_cache: Callable[[int], object] = lambda _size: None
        self._reclaimers: list[Callable[[int], object]] = []

    def resize_cache_with(self, resize: Callable[[int], object]) -> None:
        """Has `resize` called, from any thread, with the bytes that the cache may take from then on."""
        self._resize_cache = resize

    def reclaim_with(self, reclaim: Callable[[int], object]) -> None:
        """Has `reclaim` called with the bytes to free when charges don't fit. The newest is called first."""
        self._reclaimers.append(reclaim)

    def charge(self, holder: str, size: int, *, passing: bool = False) -> Charge:
        """A charge of `size` bytes, also where they don't fit.

        `holder`: what the bytes are, as an error names them. `passing`: a reclaimer can free them, or they
        are needed for a short time only; so they are not a reason to refuse anything.
        """
        charge = Charge(self, holder, passing=passing)
        charge.resize(size)
        return charge

    def lend(self, size: int) -> None:
        """Leaves `size` bytes of the cache's own part, as far as it has them, to buffers that hold what was
        read from it. A negative size takes them back.

        Buffers are not charged: to refuse something, or to drop it, would free none of them.
        """
        with self._lock:
            self._lent += size
            self._settle(changed=True)

    def limit_cache(self, size: int) -> None:
        """Has the cache take at most `size` bytes from now on, or what it always has."""
        with self._lock:
            self.cache_size = min(self.cache_size, max(size, self._least_cache))
            self._settle(changed=True)

    def admit(self, what: str, holder: str, size: int) -> Charge:
        """A charge of `size` bytes. Raises MemoryLimitError if they don't fit beside the others.

        `what`: an object and what of it needs memory, for the error: `name: its 5 bytes`.
        """
        charge = self.charge(holder, size)
        self.reclaim()
        with self._lock:
            lasting = self._total - self._passing
            if lasting <= self.limit - self._least_cache or lasting == size:
                return charge
        charge.resize(0)
        raise MemoryLimitError(
            f"{what} do not fit in memory beside {self} (limit: {self.limit} bytes with the cache); close "
            f"some files, give a larger cache, or name fewer backups"
        )

    def reclaim(self) -> None:
        """Frees what can be fetched again until the charges fit, as far as possible."""
        for reclaim in reversed(self._reclaimers):
            excess = self.excess()
            if excess <= 0:
                return
            reclaim(excess)

    def excess(self) -> int:
        """Bytes of charges that don't fit even beside the smallest cache; negative where some are left."""
        with self._lock:
            self._settle()
            return self._total - (self.limit - self._least_cache)

    def settle(self) -> None:
        """Gives the cache what freed charges left."""
        if self._given_back:
            self.excess()

    def charged(self, holder: str | None = None) -> int:
        """Bytes that `holder` is charged for; None: all of them."""
        with self._lock:
            self._settle()
            return self._total if holder is None else self._charged[holder]

    def __str__(self) -> str:
        with self._lock:
            self._settle()
            found = [f"{size} bytes of {holder}" for holder, size in self._charged.most_common() if size]
        return " and ".join(found) or "nothing"

    def _change(self, holder: str, size: int, *, passing: bool) -> None:
        with self._lock:
            self._add(holder, size, passing)
            self._settle(changed=True)

    def _settle(self, *, changed: bool = False) -> None:
        while self._given_back:
            holder, size, passing = self._given_back.popleft()
            self._add(holder, -size, passing)
            changed = True
        if changed:
            left = min(self.cache_size, self.limit - self._total) - self._lent
            self._resize_cache(max(left, self._least_cache))

    def _add(self, holder: str, size: int, passing: bool) -> None:
        self._charged[holder] += size
        self._total += size
        if passing:
            self._passing += size
