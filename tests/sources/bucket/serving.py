"""The bucket source opened on the small object store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol, TypeVar

import trio

from pbsfs.base.errors import PbsfsError
from pbsfs.sources.bucket.address import BucketAddress
from pbsfs.sources.bucket.credentials import AwsCredentials
from pbsfs.sources.bucket.limits import BucketLimits
from pbsfs.sources.bucket.source import BucketSettings, BucketSource
from pbsfs.sources.http.tls import Trust, parse_fingerprint
from pbsfs.sources.pacing import Pacing
from tests.support.s3 import ACCESS_KEY, SECRET_KEY
from tests.support.server.certificate import Certificate

QUICK = Pacing(first_pause=0.002, longest_pause=0.02)
"""No pause between tries is long."""

LIMITS = BucketLimits(pacing=QUICK)

LIMIT = 20.0
"""Seconds that anything may take; only when something is broken does it take long."""

KEY = AwsCredentials(ACCESS_KEY, SECRET_KEY)

T = TypeVar("T")


class Keys:
    """Credentials one after the other; the last one stays. `asked`: how often."""

    def __init__(self, *keys: AwsCredentials | None) -> None:
        self._keys = list(keys or (KEY,))
        self.asked = 0

    def current(self) -> AwsCredentials | None:
        self.asked += 1
        return self._keys.pop(0) if len(self._keys) > 1 else self._keys[0]


class Serves(Protocol):
    """A server with a datastore."""

    @property
    def address(self) -> BucketAddress: ...


def source_of(
    server: Serves,
    certificate: Certificate,
    keys: Keys | None = None,
    *,
    address: BucketAddress | None = None,
    retry_timeout: float = LIMIT,
    limits: BucketLimits = LIMITS,
) -> BucketSource:
    """A source that trusts `certificate`, and pauses for almost no time between tries."""
    return BucketSource(
        address or server.address,
        keys or Keys(),
        Trust(pinned=parse_fingerprint(certificate.fingerprint)),
        BucketSettings(retry_timeout),
        limits=limits,
    )


@asynccontextmanager
async def opened(source: BucketSource) -> AsyncIterator[BucketSource]:
    failure: PbsfsError | None = None
    async with trio.open_nursery() as nursery:
        try:
            await source.open(nursery)
            yield source
        except PbsfsError as error:  # raised outside, so that the nursery does not wrap it in a group
            failure = error
        finally:
            with trio.CancelScope(shield=True):
                await source.aclose()
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def use(source: BucketSource, work: Callable[[BucketSource], Awaitable[T]]) -> T:
    """What `work` returns, given the opened source."""

    async def main() -> T:
        with trio.fail_after(LIMIT):
            async with opened(source) as ready:
                return await work(ready)
        raise AssertionError

    return trio.run(main)
