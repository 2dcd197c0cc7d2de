"""The server's HTTP API: questions, and what the answers mean.

Used by `source` and `pool`, in tasks of one trio loop. `listing` makes values of the answers.
"""

from __future__ import annotations

import json
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import trio

from pbsfs.base.errors import NotFoundError, WrongServerError
from pbsfs.base.secret import Secret
from pbsfs.runtime.threads import in_thread
from pbsfs.sources.http.client import Answer, HttpClient, Request
from pbsfs.sources.http.proxy import Proxy
from pbsfs.sources.http.tls import Trust
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.login import Login
from pbsfs.sources.server.refusals import Meaning, error_of, meaning_of, meaning_of_file, refusal_of, words_of
from pbsfs.sources.server.repository import PBS, Repository

R = TypeVar("R")


class Api:
    """The API of one server, as one user. `login`: authenticates that user, also for reader sessions."""

    def __init__(
        self,
        repository: Repository,
        secret: Secret,
        trust: Trust,
        proxy: Proxy | None = None,
        limits: ServerLimits = DEFAULT,
        *,
        threads: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`threads`: how many requests run at once. `clock`: seconds, for what is kept for a time."""
        self.repository = repository
        self.trust = trust
        self.proxy = proxy
        self._limits = limits
        self._threads = trio.CapacityLimiter(threads)
        self._client = HttpClient(repository, trust, proxy, limits, threads=self._threads, clock=clock)
        self.login = Login(repository, secret, self._client, limits, clock)

    async def greet(self) -> None:
        """Asks for the version, to learn whether it is a server and accepts the user.

        Raises WrongServerError, AuthError and other SourceErrors.
        """
        try:
            await self.get("/version", {})
        except NotFoundError as error:
            raise WrongServerError(f"{error}; {PBS.check_address}") from None

    async def get(
        self,
        path: str,
        parameters: Mapping[str, str],
        parse: Callable[[Any], Any] = lambda data: data,
    ) -> Any:
        """What `parse` makes of the `data` of the answer to GET `path` (below `/api2/json`).

        A worker thread parses large answers, so `parse` has to be pure. Raises SourceError, NotFoundError,
        DamageError, and what `parse` raises.
        """
        answer = await self._get(path, parameters, self._limits.max_list, meaning_of)
        where = f"{self.repository.address}: the answer to {path}"
        if len(answer.body) <= self._limits.parse_at_once:
            return _parsed(answer.body, parse, where, self._limits.max_values)
        return await in_thread(
            _parsed,
            answer.body,
            parse,
            where,
            self._limits.max_values,
            limiter=self._threads,
            abandon_on_cancel=True,
        )

    async def download(self, path: str, parameters: Mapping[str, str], limit: int) -> bytes:
        """The body of the answer to GET `path`.

        Raises like `get`: DamageError if it has more than `limit` bytes, or if the server says that what it
        stores is broken.
        """
        return (await self._get(path, parameters, limit, meaning_of_file)).body

    async def connect(self) -> None:
        """Makes a connection that the next request uses. Raises SourceError."""
        await self._client.connect()

    async def tidy(self) -> None:
        """Closes connections that are idle for too long. Runs as long as the API is used."""
        await self._client.tidy()

    def close(self) -> None:
        """Closes idle connections."""
        self._client.close()

    async def _get(
        self,
        path: str,
        parameters: Mapping[str, str],
        limit: int,
        meaning: Callable[[int, str], Meaning],
    ) -> Answer:
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        target = f"/api2/json{path}{query}"
        headers = await self.login.headers()
        answer = await self._client.request(Request("GET", target, headers, limit))
        if (
            answer.status != 200
            and refusal_of(answer)[0] is Meaning.NOT_ACCEPTED
            and self.login.forget_ticket(headers)
        ):
            # The ticket has expired, or the server has a new key.
            headers = await self.login.headers()
            answer = await self._client.request(Request("GET", target, headers, limit))
        if answer.status != 200:
            words = words_of(answer.body, answer.status)
            raise error_of(meaning(answer.status, words), answer.status, words, self.repository)
        return answer


def _parsed(body: bytes, parse: Callable[[Any], R], where: str, max_values: int) -> R:
    # Counted before they are parsed: the shortest value takes two bytes here, and 50 times that as an object.
    if sum(map(body.count, (b",", b"[", b"{"))) > max_values:
        raise WrongServerError(f"{where} has more than {max_values} values")
    try:
        # The hook changes nothing, but it is Python code: between two calls the trio loop can run, which the
        # parser, written in C, would otherwise delay to its end.
        data = json.loads(body, object_hook=lambda entry: entry)["data"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise WrongServerError(f"{where} makes no sense") from None
    return parse(data)
