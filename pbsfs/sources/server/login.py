"""The user of the server: an API token, or a user with a password and a ticket that pbsfs renews.

Used by `api` and `pool`, in tasks of one trio loop, and by `pbsfs.access.login`. pbsfs renews a ticket long
before it expires, so a mount stays logged in for weeks.
"""

from __future__ import annotations

import json
import logging
import time
import urllib.parse
from collections.abc import Callable, Mapping

import trio

from pbsfs.base.errors import (
    AuthError,
    DamageError,
    PbsfsError,
    SourceError,
    UnknownRealmError,
    WrongServerError,
)
from pbsfs.base.secret import Secret, Ticket
from pbsfs.base.text import first_of, one_line
from pbsfs.sources.http.client import Answer, HttpClient, Request
from pbsfs.sources.retry import SharedTry
from pbsfs.sources.server.limits import DEFAULT, ServerLimits
from pbsfs.sources.server.refusals import Meaning, error_of, refusal_of
from pbsfs.sources.server.repository import PBS, Repository
from pbsfs.sources.server.second_factor import Challenge, SecondFactorError

log = logging.getLogger(__name__)

COOKIES = ("PBSAuthCookie", "__Host-PBSAuthCookie")
"""Servers up to 3.x read the first, 4.x prefers the second."""

MAX_ANSWER = 1 << 20
"""Bytes of an answer to a login, and of the list of realms."""


class Login:
    """The login of one user or API token at one server."""

    def __init__(
        self,
        repository: Repository,
        secret: Secret,
        client: HttpClient,
        limits: ServerLimits = DEFAULT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`secret`: the user's password or a ticket, or the token's secret. `clock`: seconds."""
        self._repository = repository
        self._secret = secret.password if isinstance(secret, Ticket) else secret
        self._client = client
        self._limits = limits
        self._clock = clock
        self._ticket: Secret | None = secret if isinstance(secret, Ticket) else None
        self._ticket_time = float("-inf")  # renewed at once: only the server knows the age of a ticket
        self._logging_in = SharedTry[Secret]()

    async def headers(self) -> dict[str, str]:
        """The headers that name the user or token; logs in, or renews the ticket, if that is due.

        Raises AuthError, UnknownRealmError, WrongServerError and other SourceErrors.
        """
        if self._repository.token is not None:
            assert self._secret is not None
            secret = urllib.parse.quote(self._secret.reveal(), safe="")  # the server decodes it
            return {"Authorization": f"PBSAPIToken {self._repository.auth_id}:{secret}"}
        return _cookie(await self.ticket())

    async def ticket(self) -> Secret:
        """The ticket of the user; logs in, or renews it, if that is due. Raises like `headers`."""
        return await self._logging_in.run(self._valid_ticket, self._log_in)

    async def answer(self, challenge: Challenge, response: Secret) -> Secret | None:
        """The ticket for the answer to a challenge; None if the server does not accept the answer."""
        answer = await self._post_ticket(response, challenge)
        if answer.status != 200 and refusal_of(answer)[0] is Meaning.NOT_ACCEPTED:
            return None
        self._check(answer)
        return self._take_ticket(answer)

    async def keep(self) -> None:
        """Renews a ticket in time, also while nobody reads, if no password could replace it later.

        Runs as long as the login is used, and ends when the server does not accept the ticket any more.
        """
        if self._repository.token is not None or self._secret is not None:
            return
        while True:
            due = self._ticket_time + self._limits.ticket_renewal - self._clock()
            await trio.sleep(max(due, self._limits.renewal_pause))
            try:
                await self.ticket()
            except AuthError as error:
                log.warning("%s", error)
                return
            except PbsfsError as error:  # whatever else answered may be gone when the ticket still is valid
                log.debug("the ticket was not renewed: %s", error)

    def forget_ticket(self, headers: Mapping[str, str]) -> bool:
        """The server refused `headers`. Returns whether they held a ticket: a new login may help.

        Keeps a ticket that is newer than the refused one: another request fetched it.
        """
        if self._ticket is not None and headers == _cookie(self._ticket):
            self._ticket = None
        return "Cookie" in headers

    def _valid_ticket(self) -> Secret | None:
        """The ticket, unless it is due for renewal."""
        return self._ticket if self._clock() - self._ticket_time <= self._limits.ticket_renewal else None

    async def _log_in(self) -> Secret:
        """Logs in with the old ticket if the server accepts it, and with the password if not."""
        if self._ticket is not None:
            answer = await self._post_ticket(self._ticket)
            if answer.status == 200:
                return self._take_ticket(answer)
            if self._secret is None and refusal_of(answer)[0] is not Meaning.NOT_ACCEPTED:
                self._check(answer)  # it may be renewed later
            log.debug("the ticket was not renewed (status %d); logging in again", answer.status)
        if self._secret is None:
            raise AuthError(
                f"the login of {self._repository.user} at {self._repository.address} is no longer valid; "
                "run pbsfs login again, and end and start again what uses it"
            )
        answer = await self._post_ticket(self._secret)
        if answer.status != 200:
            meaning, words = refusal_of(answer)
            if meaning is Meaning.NOT_ACCEPTED:
                raise await self._refused(words)
            if answer.status in (404, 405):
                raise WrongServerError(
                    f"{self._repository.address} has no login ({words}); {PBS.check_address}"
                )
        self._check(answer)
        return self._take_ticket(answer)

    def _check(self, answer: Answer) -> None:
        if answer.status != 200:
            meaning, words = refusal_of(answer)
            raise error_of(meaning, answer.status, words, self._repository)

    async def _post_ticket(self, secret: Secret, challenge: Challenge | None = None) -> Answer:
        values = {"username": self._repository.user, "password": secret.reveal()}
        if challenge is not None:
            values["tfa-challenge"] = challenge.ticket.reveal()
        body = json.dumps(values).encode()
        headers = {"Content-Type": "application/json"}
        return await self._client.request(
            Request("POST", "/api2/json/access/ticket", headers, MAX_ANSWER, body)
        )

    def _take_ticket(self, answer: Answer) -> Secret:
        try:
            ticket = json.loads(answer.body)["data"].get("ticket") or answer.cookies.get(COOKIES[1])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            ticket = None
        if not isinstance(ticket, str) or not ticket:
            raise WrongServerError(f"{self._repository.address} returned an invalid login ticket")
        challenge = Challenge.of(ticket)
        if challenge is not None:
            raise SecondFactorError.of(self._repository.user, challenge)
        self._ticket = Secret(ticket)
        self._ticket_time = self._clock()
        return self._ticket

    async def _refused(self, words: str) -> AuthError:
        """Why a login failed: the server reports wrong passwords and unknown realms in the same words."""
        server, user = self._repository.address, self._repository.user
        try:
            answer = await self._client.request(Request("GET", "/api2/json/access/domains", {}, MAX_ANSWER))
            realms = [entry["realm"] for entry in json.loads(answer.body)["data"]]
        except (SourceError, DamageError, ValueError, KeyError, TypeError, RecursionError):
            realms = []
        if realms and self._repository.realm not in realms:
            known = one_line(first_of(str(realm)[:100] for realm in realms))
            return UnknownRealmError(
                f"{server} has no realm '{self._repository.realm}' (of {user}); "
                f"its realms are {known}: {words}"
            )
        return AuthError(
            f"{server} does not accept {user} and this password: {words}; "
            "check the name, the realm and the password"
        )


def _cookie(ticket: Secret) -> dict[str, str]:
    quoted = urllib.parse.quote(ticket.reveal(), safe="")
    return {"Cookie": "; ".join(f"{name}={quoted}" for name in COOKIES)}
