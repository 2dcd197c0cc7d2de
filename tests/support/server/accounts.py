"""Users, API tokens, and what each may do where.

Privileges are granted on paths (`/datastore/<store>[/<namespace>…]`) and hold below them, unless
something else is granted there; a token has those that both it and its user have; `root@pam` has
all. Rules and texts are those of proxmox-backup 3.2.4. Safe to use from any thread: each change is
one assignment, and a request sees it or does not.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from urllib.parse import unquote

from tests.support.server.answers import RefusedError, Request
from tests.support.server.clock import Clock
from tests.support.server.factors import Factors
from tests.support.server.tickets import TicketError, Tickets

AUDIT = "Datastore.Audit"
MODIFY = "Datastore.Modify"
READ = "Datastore.Read"
VERIFY = "Datastore.Verify"
BACKUP = "Datastore.Backup"

PRIVILEGES = (AUDIT, "Datastore.Allocate", MODIFY, READ, VERIFY, BACKUP, "Datastore.Prune")
"""In the order in which texts name them."""

READER = frozenset({AUDIT, READ, VERIFY})
"""The role DatastoreReader."""

OWN_GROUPS = frozenset({BACKUP})
"""The role DatastoreBackup: reads the groups that it owns."""

NOTHING: frozenset[str] = frozenset()
"""The role NoAccess."""

ANY = frozenset({AUDIT, MODIFY, READ, BACKUP})
"""The privileges of which one is enough to see that a namespace is there."""

Grants = Mapping[str, frozenset[str]]

CLEARED = (
    "__Host-PBSAuthCookie=; Expires=Thu, 01 Jan 1970 00:00:00 GMT; Secure; SameSite=Lax; HttpOnly; Path=/;"
)
"""What takes a ticket that is not good out of a browser."""

COOKIES = ("__Host-PBSAuthCookie", "PBSAuthCookie")


@dataclass
class Account:
    """A user or token. `secret`: password or token secret; `grants`: privileges by path; `factors`: the
    second factors that a login needs."""

    secret: str
    grants: dict[str, frozenset[str]] = field(default_factory=dict)
    factors: Factors | None = None


def user_of(auth_id: str) -> str:
    """The user that a token belongs to; a user is their own."""
    return auth_id.partition("!")[0]


def owns(auth_id: str, owner: str) -> bool:
    """Whether `auth_id` may do what the owner of a group may. A user owns what their tokens own."""
    return owner == auth_id or ("!" in owner and user_of(owner) == auth_id)


class Accounts:
    """All accounts of the server. `cookies`: names of the cookies that tickets are read from.

    `newer`: whether refusals are those of 4.x, which don't say why.
    """

    def __init__(self, clock: Clock, cookies: tuple[str, ...] = COOKIES, *, newer: bool = False) -> None:
        self.tickets = Tickets(clock)
        self.cookies = cookies
        self._newer = newer
        self._accounts: dict[str, Account] = {}

    def add(self, auth_id: str, secret: str | None, grants: Grants, *, factors: Factors | None = None) -> str:
        """Adds or replaces an account; returns its secret, which is made where none is given."""
        if "!" in auth_id and user_of(auth_id) not in self._accounts:
            raise ValueError(f"{auth_id}: add the user first")
        made = str(uuid.uuid4()) if "!" in auth_id else secrets.token_urlsafe(12)
        self._accounts[auth_id] = Account(secret or made, dict(grants), factors)
        return self._accounts[auth_id].secret

    def remove(self, auth_id: str) -> None:
        """Removes an account, and the tokens of a user with it."""
        self._accounts = {
            known: account
            for known, account in self._accounts.items()
            if auth_id not in (known, user_of(known))
        }

    def grant(self, auth_id: str, path: str, privileges: Iterable[str]) -> None:
        """Sets what `auth_id` may do on `path` and below."""
        account = self._accounts[auth_id]
        account.grants = account.grants | {path: frozenset(privileges)}

    def log_in(self, user: str, password: str, challenge: str | None = None) -> str:
        """The ticket for the right password, or for an old ticket in its place: a partial one for a user
        with second factors, unless `challenge` is one and `password` its answer. Raises RefusedError."""
        account = self._accounts.get(user)
        if account is None:
            raise RefusedError(401, "permission check failed.")
        if challenge is not None:
            if (
                account.factors is None
                or not self.tickets.is_partial(challenge, user)
                or not account.factors.accept(password)
            ):
                raise RefusedError(401, "permission check failed.")
            return self.tickets.issue(user)
        if password.startswith("PBS:"):
            with suppress(TicketError):
                if self.tickets.user_of(password) == user:
                    return self.tickets.issue(user)
                raise RefusedError(401, "permission check failed.")
        if not secrets.compare_digest(account.secret.encode(), password.encode()):
            raise RefusedError(401, "permission check failed.")
        if account.factors is None:
            return self.tickets.issue(user)
        return self.tickets.issue_partial(user, account.factors.challenge())

    def authenticate(self, request: Request) -> str:
        """Who sends the request. Raises RefusedError."""
        ticket = self._cookie(request.headers.get("cookie", ""))
        if ticket is not None:
            try:
                user = self.tickets.user_of(ticket)
            except TicketError as error:
                raise self._not_authenticated(str(error)) from None
            if user not in self._accounts:
                raise self._not_authenticated("user account disabled or expired.")
            if request.method != "GET" and "csrfpreventiontoken" not in request.headers:
                raise self._not_authenticated("missing CSRF prevention token")
            return user
        authorization = request.headers.get("authorization", "")
        if not authorization.startswith(("PBSAPIToken ", "PBSAPIToken=")):
            raise self._not_authenticated("no authentication credentials provided.")
        token, separator, secret = authorization[len("PBSAPIToken ") :].partition(":")
        account = self._accounts.get(token)
        if account is None or "!" not in token:
            raise self._not_authenticated("user account or token disabled or expired.")
        if not separator:
            raise self._not_authenticated("failed to split API token header")
        if not secrets.compare_digest(account.secret.encode(), unquote(secret).encode()):
            raise self._not_authenticated("invalid credentials")
        return token

    def _cookie(self, header: str) -> str | None:
        found = dict(part.strip().partition("=")[::2] for part in header.split(";"))
        return next((unquote(found[name]) for name in self.cookies if name in found), None)

    def privileges(self, auth_id: str, path: str) -> frozenset[str]:
        """What `auth_id` may do on `path`."""
        own = self._granted(auth_id, path)
        return own & self._granted(user_of(auth_id), path) if "!" in auth_id else own

    def _granted(self, auth_id: str, path: str) -> frozenset[str]:
        if auth_id == "root@pam":
            return frozenset(PRIVILEGES)
        account = self._accounts.get(auth_id)
        if account is None:
            return NOTHING
        at = path
        while at not in account.grants and at:  # what is granted deepest down holds
            at = at.rpartition("/")[0]
        return account.grants.get(at or "/", NOTHING)

    def any_below(self, auth_id: str, path: str) -> bool:
        """Whether `auth_id` may see anything at or below `path`."""
        account = self._accounts.get(auth_id)
        paths = [path, *(at for at in (account.grants if account else ()) if at.startswith(f"{path}/"))]
        return any(self.privileges(auth_id, at) & ANY for at in paths)

    def require(self, auth_id: str, path: str, full: frozenset[str], partial: frozenset[str]) -> bool:
        """Whether only the groups that `auth_id` owns are theirs to see. Raises RefusedError."""
        held = self.privileges(auth_id, path)
        if held & full:
            return False
        if held & partial:
            return True
        names = "|".join(name for name in PRIVILEGES if name in full | partial)
        raise RefusedError(403, f"permission check failed - missing {names} on {path}")

    def _not_authenticated(self, why: str) -> RefusedError:
        if not self._newer:
            return RefusedError(401, f"authentication failed - {why}", content_type=None)
        refused = RefusedError(401, "authentication failed", content_type=None)
        refused.answer = replace(refused.answer, headers=(("set-cookie", CLEARED),))
        return refused
