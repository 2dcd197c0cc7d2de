"""The token of a login by SSO, in the file where AWS's programs keep it: read, and renewed as they do.

A token is valid for an hour or so, and a login of an `sso-session` for days: the file has what renews the
token. The service for that may give a new `refreshToken` and forget the old one, so the file is replaced, as
AWS's programs do it. Synchronous, for worker threads.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import tempfile
import time
from contextlib import suppress
from typing import Any

from pbsfs.access.aws.ask import MAX_ANSWER, Route, Service, ask
from pbsfs.access.aws.tokens import printable_token, refused
from pbsfs.base.errors import AuthError, SourceError

log = logging.getLogger(__name__)

SSO_TIMEOUT = 15.0
"""Seconds for an answer."""

NO_LOGIN = "not the token of a login"
EXPIRED = "the login has expired"

OIDC_VARIABLE = "AWS_ENDPOINT_URL_SSO_OIDC"

RENEWAL_WINDOW = 15 * 60.0
"""Seconds before its end from which a token is renewed (botocore, `SSOTokenProvider`)."""

_NEEDED = ("refreshToken", "clientId", "clientSecret", "registrationExpiresAt")


class NoTokenError(Exception):
    """There is no token that is valid. The text says why: NO_LOGIN or EXPIRED."""


def token_in(file: str, url: str, route: Route) -> str:
    """The token in `file`, renewed where it ends soon. `url`: of the service that renews tokens.

    Raises NoTokenError, OSError, AuthError for a token that is none, and SourceError where the token has
    ended and the service can't be reached.
    """
    found = _read(file)
    left, token = _left(found), str(found["accessToken"])
    if left >= RENEWAL_WINDOW:
        return printable_token(file, token)
    fresh: str | None = None
    failure: Exception = NoTokenError(EXPIRED)
    try:
        fresh = _renewed(file, found, url, route)
    except (AuthError, NoTokenError, OSError) as error:
        log.debug("%s: not renewed: %s", file, error)
    except SourceError as error:
        failure = error
    if fresh is None:
        with suppress(NoTokenError, OSError):  # another program may have been faster, or be writing the file
            again = _read(file)
            fresh = again["accessToken"] if again != found and _left(again) > 0 else None
    if fresh is None and left <= 0:
        raise failure
    return printable_token(file, fresh or token)


def _renewed(file: str, found: dict[str, Any], url: str, route: Route) -> str | None:
    """A new token, which the file has too; None where the login has nothing to renew it with.

    Raises SourceError, OSError. Source: AWS, "CreateToken" of the IAM Identity Center OIDC API.
    """
    if not all(isinstance(found.get(key), str) for key in _NEEDED):
        return None
    if _time_of(found["registrationExpiresAt"]) <= time.time():
        return None
    place = os.path.realpath(file)
    fd, part = tempfile.mkstemp(dir=os.path.dirname(place))  # before the old one is used up
    try:
        with open(fd, "w", encoding="utf-8") as opened:
            owner = os.stat(place)
            with suppress(OSError):  # root keeps the file for the user whose login it is
                os.fchown(fd, owner.st_uid, owner.st_gid)
            service = Service.parse(f"{url.rstrip('/')}/token", OIDC_VARIABLE)
            body = {key: found[key] for key in ("clientId", "clientSecret", "refreshToken")}
            reply = ask(
                service,
                SSO_TIMEOUT,
                method="POST",
                headers={"Content-Type": "application/json"},
                body=json.dumps(body | {"grantType": "refresh_token"}).encode(),
                route=route,
            )
            given = json_object(reply.body)
            token, seconds = given.get("accessToken"), given.get("expiresIn")
            if reply.status != 200 or not isinstance(token, str) or not isinstance(seconds, int):
                raise refused(service, reply, "does not renew the login")
            now = datetime.datetime.now(datetime.UTC)
            end = now + datetime.timedelta(seconds=min(max(seconds, 0), 1 << 30))
            json.dump(
                {key: value for key, value in found.items() if key != "refreshToken"}
                | {"accessToken": token, "expiresAt": f"{end:%Y-%m-%dT%H:%M:%SZ}"}
                | {key: value for key, value in given.items() if key == "refreshToken"},
                opened,
            )
        os.replace(part, place)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
    return token


def _read(file: str) -> dict[str, Any]:
    with open(file, "rb") as opened:
        return json_object(opened.read(MAX_ANSWER))


def _left(found: dict[str, Any]) -> float:
    """Seconds for which a token is valid."""
    if not isinstance(found.get("accessToken"), str):
        raise NoTokenError(NO_LOGIN)
    return _time_of(found.get("expiresAt")) - time.time()


def _time_of(text: object) -> float:
    """Seconds since 1970."""
    try:
        moment = datetime.datetime.fromisoformat(str(text).replace("UTC", "Z"))
    except ValueError:
        raise NoTokenError(NO_LOGIN) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def json_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`; empty for anything else."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
