"""A place that gives a key: it fetches the key, again and again if that expires, and can be handed over.

Here are the places on this computer; `services` and `sts` have those that are asked over the network.
`pbsfs.access.aws.find` chooses one; it is part of the description of a source. `fetch` is synchronous and may
block: `Renewed` calls it, in a worker thread. No `repr` shows a secret.
"""

from __future__ import annotations

import abc
import datetime
import json
import os
import shlex
import subprocess
import time
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from pbsfs.access.credentials import MAX_SECRET, ended, run_command, take_secrets
from pbsfs.base.errors import AuthError
from pbsfs.base.text import one_line
from pbsfs.sources.bucket.credentials import AwsCredentials

Facts = dict[str, Any]
"""What JSON can hold."""

COMMAND_TIMEOUT = 60.0
"""Seconds for a command that prints a key."""


class KeySource(abc.ABC):
    """Where a key comes from. Immutable. `str` is for people, and has no secret."""

    kind: ClassVar[str]

    @abc.abstractmethod
    def fetch(self) -> AwsCredentials | None:
        """The key; None to leave requests unsigned.

        Raises AuthError if there is none, and ConnectError if that may pass.
        """

    def dump(self) -> Facts:
        """All of it, secrets included."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]  # all of them are dataclasses

    @classmethod
    def load(cls, facts: Facts) -> Self:
        """The inverse of `dump`."""
        return cls(**facts)


@dataclass(frozen=True, slots=True)
class NoKey(KeySource):
    """Requests are not signed: the bucket is public."""

    kind: ClassVar[str] = "none"

    def fetch(self) -> None:
        return None

    def __str__(self) -> str:
        return "not needed: requests are anonymous"


@dataclass(frozen=True, slots=True, repr=False)
class GivenKey(KeySource):
    """A key that does not change. `place`: what has it."""

    kind: ClassVar[str] = "given"
    place: str
    access_key: str
    secret_key: str
    token: str | None = None

    def fetch(self) -> AwsCredentials:
        return checked(self.place, self.access_key, self.secret_key, self.token)

    def __str__(self) -> str:
        return f"{self.access_key} of {self.place}"


@dataclass(frozen=True, slots=True, repr=False)
class CommandKey(KeySource):
    """A command prints the key as JSON. `place`: what names the command.

    Source: AWS, "Sourcing credentials with an external process".
    """

    kind: ClassVar[str] = "command"
    place: str
    command: str

    def fetch(self) -> AwsCredentials:
        try:
            words = shlex.split(self.command)
            if not words:
                raise ValueError
            variables = dict(os.environ)
            take_secrets(variables)  # those of pbsfs are not for the command; nbdkit's environment has them
            output = run_command(words, variables, COMMAND_TIMEOUT)
        except subprocess.CalledProcessError as error:
            problem = f"the command {ended(error)}; run it in a shell to see why"
        except subprocess.TimeoutExpired:
            problem = f"the command did not end within {COMMAND_TIMEOUT:.0f} s; run it in a shell to see why"
        except OSError as error:
            problem = f"{error.strerror}; check the name of the command and who may run it"
        except ValueError:
            problem = "not a command; correct it"
        else:
            return parsed(self.place, output, "SessionToken", version=1)
        raise AuthError(f"{self.place}: {problem}")

    def __str__(self) -> str:
        return f"from {self.place}"


ADVICE = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give --aws-profile, --s3-config, or --anonymous for "
    "a public bucket"
)
"""What to do where there is no key."""


def parsed(place: str, data: bytes, token: str, *, version: int | None = None) -> AwsCredentials:
    """The key in a JSON object, as commands and metadata services write it. `place`: what gave it.

    `token`: the name that it has there. Raises AuthError.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or len(data) > MAX_SECRET:
        raise AuthError(f"{place}: what it gives is not a key in JSON; check that it is the right place")
    if found.get("Code", "Success") != "Success":
        raise AuthError(f"{place}: no key: {one_line(str(found['Code']), 100)}; check the role")
    if version is not None and found.get("Version") != version:
        raise AuthError(f"{place}: the key has no Version {version}; update the command")
    return checked(
        place,
        found.get("AccessKeyId"),
        found.get("SecretAccessKey"),
        found.get(token),
        found.get("Expiration"),
    )


def checked(
    place: str, access_key: Any, secret_key: Any, token: Any = None, expiration: Any = None
) -> AwsCredentials:
    """A key whose parts are what they have to be. Raises AuthError."""
    for name, value in (
        ("access key", access_key),
        ("secret key", secret_key),
        ("session token", token or "-"),
    ):
        if not isinstance(value, str) or not value:
            raise AuthError(f"{place}: it has no {name}; correct it")
        if not value.isascii() or not value.isprintable() or " " in value:
            raise AuthError(f"{place}: the {name} has characters that no key has; correct it")
    expires = None
    if expiration:
        try:
            moment = datetime.datetime.fromisoformat(expiration)
        except (ValueError, TypeError):
            raise AuthError(f"{place}: the key's Expiration is not a time; correct it") from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=datetime.UTC)
        expires = moment.timestamp()
        if expires <= time.time():
            raise AuthError(f"{place}: the key has expired; get a new one, and check this computer's clock")
    return AwsCredentials(access_key, secret_key, token or None, expires)
