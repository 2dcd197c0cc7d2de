"""The objects of one datastore in a bucket: fetched and listed, with retries.

Used by `metadata` and `source`, in tasks of one trio loop.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from pbsfs.base.errors import WrongServerError
from pbsfs.sources.bucket.address import BucketAddress
from pbsfs.sources.bucket.limits import BucketLimits
from pbsfs.sources.bucket.pages import StoredObject
from pbsfs.sources.bucket.requests import Requests
from pbsfs.sources.retry import Outage, retried

R = TypeVar("R")


class Objects:
    """`root`: what the keys of the datastore begin with; ends with `/`, or is empty."""

    def __init__(self, requests: Requests, retry_timeout: float, limits: BucketLimits) -> None:
        """`retry_timeout`: seconds for which a request is retried."""
        self._requests = requests
        self._retry_timeout = retry_timeout
        self._limits = limits
        self._outage = Outage()
        self.root = f"{requests.address.store}/" if requests.address.store else ""

    @property
    def address(self) -> BucketAddress:
        return self._requests.address

    async def get(self, key: str, limit: int, what: str) -> bytes:
        """Like `Requests.get`."""
        return await self.retried(what, lambda: self._requests.get(key, limit, what))

    async def exists(self, key: str, what: str) -> bool:
        """Like `Requests.exists`."""
        return await self.retried(what, lambda: self._requests.exists(key, what))

    async def any(self, prefix: str) -> bool:
        """Whether any key begins with `prefix`. Raises SourceError."""
        page = await self.retried(
            f"listing {self.address}", lambda: self._requests.page(prefix, delimited=False, most=1)
        )
        return bool(page.objects or page.prefixes)

    async def list(self, prefix: str, *, delimited: bool) -> tuple[list[StoredObject], list[str]]:
        """The objects whose keys begin with `prefix`, and with `delimited` the prefixes up to the next `/`.

        Raises SourceError, also for a list that has no end.
        """
        objects: dict[str, StoredObject] = {}
        prefixes: dict[str, None] = {}
        token: str | None = None
        idle = 0
        while True:
            before = len(objects) + len(prefixes)
            asked = token
            page = await self.retried(
                f"listing {self.address}",
                lambda: self._requests.page(prefix, delimited=delimited, token=asked),  # noqa: B023
            )
            objects.update((found.key, found) for found in page.objects)
            prefixes.update(dict.fromkeys(page.prefixes))
            token = page.token
            if token is None:
                return list(objects.values()), list(prefixes)
            count = len(objects) + len(prefixes)
            idle = idle + 1 if count == before else 0
            if token == asked or idle > self._limits.idle_pages or count > self._limits.max_keys:
                raise WrongServerError(f"{self.address.address}: the list of {self.address} does not end")

    async def retried(self, what: str, work: Callable[[], Awaitable[R]]) -> R:
        """The result of `work`, tried again while it raises an error that may pass. `what`: for the log."""
        return await retried(work, self._retry_timeout, what, self._outage, pacing=self._limits.pacing)
