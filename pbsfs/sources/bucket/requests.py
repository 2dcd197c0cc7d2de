"""Requests for objects and lists of one bucket: signed, bounded, and each answer given its meaning.

Used by the other modules of this folder, in tasks of one trio loop. `retry` is up to the caller.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import trio

from pbsfs.base.errors import (
    ConnectError,
    DamageError,
    NotFoundError,
    UnavailableError,
    UnknownDatastoreError,
    WrongServerError,
)
from pbsfs.runtime.stats import COUNTS
from pbsfs.runtime.threads import in_thread
from pbsfs.sources.bucket import signing
from pbsfs.sources.bucket.address import BucketAddress
from pbsfs.sources.bucket.credentials import AwsCredentials, CredentialSource
from pbsfs.sources.bucket.limits import DEFAULT, BucketLimits
from pbsfs.sources.bucket.pages import Page, parse_page
from pbsfs.sources.bucket.refusals import Refusal
from pbsfs.sources.http.client import SUCCESSES, Answer, HttpClient, Request
from pbsfs.sources.http.proxy import Proxy
from pbsfs.sources.http.tls import Trust
from pbsfs.sources.retry import SharedTry, connecting

_WORDLESS = (400, 401, 403)
"""Refusals whose document says why, and whether another key helps. An answer to HEAD has no document."""

_FIRST_BYTE: Mapping[str, str] = {"range": "bytes=0-0"}

_MOST_PASSED_OVER = 64 << 10
"""Bytes that pbsfs receives at most from a server that ignores ranges."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request without its signature. `key`: empty for a list. `limit`: bytes of the answer at most. `what`:
    names it in errors. `headers`: further ones."""

    method: str
    key: str
    limit: int
    what: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


class Requests:
    """What one bucket answers."""

    def __init__(
        self,
        address: BucketAddress,
        credentials: CredentialSource,
        trust: Trust,
        proxy: Proxy | None = None,
        limits: BucketLimits = DEFAULT,
    ) -> None:
        self.address = address
        self._credentials = credentials
        self._limits = limits
        self._threads = trio.CapacityLimiter(limits.requests)
        self._parsers = trio.CapacityLimiter(limits.parsed_at_once)
        self._client = HttpClient(address, trust, proxy, limits, threads=self._threads)
        self._key: AwsCredentials | None = None
        self._has_key = False  # None is an answer too: a public bucket
        self._asking: SharedTry[tuple[AwsCredentials | None]] = SharedTry()

    async def tidy(self) -> None:
        """Closes connections that are idle for too long. Runs as long as requests are made."""
        await self._client.tidy()

    def close(self) -> None:
        """Closes idle connections."""
        self._client.close()

    async def get(self, key: str, limit: int, what: str) -> bytes:
        """All bytes of an object. `what`: names it in errors.

        Raises NotFoundError, DamageError above `limit` bytes, SourceError.
        """
        return (await self._send(_Asked("GET", key, limit, what))).body

    async def exists(self, key: str, what: str) -> bool:
        """Whether there is an object with this key; fetches none of it. Raises SourceError."""
        try:
            await self._send(_Asked("HEAD", key, 0, what))
        except NotFoundError:
            return False
        except DamageError:  # a server that ignores ranges sent more than one byte
            return True
        return True

    async def page(
        self, prefix: str, *, delimited: bool, token: str | None = None, most: int | None = None
    ) -> Page:
        """One answer of a listing of the keys that begin with `prefix`, `most` or as many as there may be.

        `delimited`: only up to the next `/`. `token`: of the answer before. Raises SourceError.
        """
        query = {
            "list-type": "2",
            "prefix": prefix,
            "encoding-type": "url",
            "max-keys": str(most or self._limits.page),
        }
        if delimited:
            query["delimiter"] = "/"
        if token is not None:
            query["continuation-token"] = token
        try:
            asked = _Asked("GET", "", self._limits.max_page, f"the list of {self.address}", query)
            answer = await self._send(asked)
            if len(answer.body) <= self._limits.parse_at_once:
                return parse_page(answer.body, prefix)
            return await in_thread(
                parse_page, answer.body, prefix, limiter=self._parsers, abandon_on_cancel=True
            )
        except NotFoundError:  # nothing in a bucket, but the bucket, or what is behind the endpoint
            raise UnknownDatastoreError(
                f"{self.address.address} has no list of the bucket '{self.address.bucket}'; "
                "check the bucket's name and the endpoint"
            ) from None
        except DamageError as error:
            raise WrongServerError(
                f"{self.address.address} does not list as an S3 object store does ({error}); "
                "check the endpoint"
            ) from None

    async def _send(self, asked: _Asked) -> Answer:
        """The answer to a request that succeeds."""
        answer = await self._accepted(asked)
        if asked.key and answer.headers.get_content_type() == "text/html":  # no object of a datastore is
            raise UnavailableError(
                f"{self.address.address} answers with a page for browsers, as a login to a network does; "
                "check the endpoint, and the way to it"
            )
        if asked.method == "GET" and not _has_announced_end(answer):
            raise ConnectError(
                f"{self.address.address}: the connection was closed before the answer was complete"
            )
        return answer

    async def _accepted(self, asked: _Asked) -> Answer:
        was_kept = self._has_key
        credentials = await self._current()
        answer = await self._try(asked, credentials)
        if answer.status in SUCCESSES:
            return answer
        if asked.method == "HEAD" and answer.status in _WORDLESS:
            first_byte = replace(asked, method="GET", limit=_MOST_PASSED_OVER, headers=_FIRST_BYTE)
            return await self._accepted(first_byte)
        refusal = Refusal.of(answer)
        if refusal.concerns_key and was_kept:
            if self._key is credentials:  # not yet exchanged for another request
                self._has_key = False
            answer = await self._try(asked, await self._current())
            if answer.status in SUCCESSES:
                return answer
            refusal = Refusal.of(answer)
        raise refusal.error(self.address, asked.what)

    async def _try(self, asked: _Asked, credentials: AwsCredentials | None) -> Answer:
        path, text = self.address.path(asked.key), signing.query_of(asked.query)
        headers = {"host": self.address.authority, **asked.headers}
        if credentials is not None:
            headers = signing.signed_headers(
                path,
                text,
                headers,
                credentials,
                region=self.address.signing_region,
                now=time.time(),
                method=asked.method,
            )
        COUNTS.requests += 1
        target = f"{path}?{text}" if text else path
        return await self._client.request(Request(asked.method, target, headers, asked.limit))

    async def _current(self) -> AwsCredentials | None:
        """The key to sign with. Asking for it may take long, so one that stays valid is kept."""
        if not self._is_due():
            return self._key
        return (await self._asking.run(lambda: None if self._is_due() else (self._key,), self._ask))[0]

    async def _ask(self) -> tuple[AwsCredentials | None]:
        with connecting("what gives the access key"):
            self._key = await in_thread(
                self._credentials.current, limiter=self._threads, abandon_on_cancel=True
            )
        self._has_key = True
        return (self._key,)

    def _is_due(self) -> bool:
        """Whether the key has to be asked for, as none is known or it expires soon."""
        expires = None if self._key is None else self._key.expires
        return not self._has_key or (
            expires is not None and time.time() > expires - self._limits.renewal_margin
        )


def _has_announced_end(answer: Answer) -> bool:
    """Whether a lost connection would differ from the end of the answer (RFC 9112, 6.3)."""
    return "content-length" in answer.headers or "transfer-encoding" in answer.headers
