"""The places that give a key: each fetches it, again and again if the key expires, and can be handed over.

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
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self
from urllib.parse import quote, urlencode
from xml.etree import ElementTree as ET

from pbsfs.access.aws.ask import Reply, Service, ask
from pbsfs.access.credentials import MAX_SECRET, first_line, read_file, run_command, take_secrets
from pbsfs.base.errors import AuthError, ConnectError, SourceError, WrongServerError
from pbsfs.base.text import one_line
from pbsfs.sources.bucket.credentials import AwsCredentials

Facts = dict[str, Any]
"""What JSON can hold."""

COMMAND_TIMEOUT = 60.0
"""Seconds for a command that prints a key."""

CONTAINER_TIMEOUT = 5.0
STS_TIMEOUT = 15.0

INSTANCE_TIMEOUT = 1.0
"""Seconds for an answer of the machine's metadata service, which is on the machine: the default of AWS's
tools. Where there is no such service, a try takes all of it."""

INSTANCE_TRIES = 2

TOKEN_LIFETIME = 300
"""Seconds for which the metadata service's own token is valid; pbsfs uses it at once."""


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
            problem = f"the command ended with status {error.returncode}; run it in a shell to see why"
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


@dataclass(frozen=True, slots=True, repr=False)
class WebIdentityKey(KeySource):
    """STS exchanges a token in a file for the key of a role: in Kubernetes, for example.

    `url`: of STS. `proxies`: the variables of proxies. `ca`: certificates that count instead of the system's
    CAs. Source: AWS, "AssumeRoleWithWebIdentity".
    """

    kind: ClassVar[str] = "web-identity"
    url: str
    role: str
    token_file: str
    session: str
    proxies: Mapping[str, str]
    ca: str | None = None

    def fetch(self) -> AwsCredentials:
        token = _token_in(self.token_file)
        parameters = {
            "Action": "AssumeRoleWithWebIdentity",
            "Version": "2011-06-15",
            "RoleArn": self.role,
            "RoleSessionName": self.session,
            "WebIdentityToken": token,
        }
        service = Service.parse(self.url, "AWS_ENDPOINT_URL_STS")
        reply = ask(
            service,
            STS_TIMEOUT,
            method="POST",
            headers={"Content-Type": "application/x-www-form-urlencoded"},
            body=urlencode(parameters).encode(),
            proxies=self.proxies,
            ca=self.ca,
        )
        found = _elements(reply.body)
        if reply.status != 200:
            said = ": ".join(filter(None, (found.get("Code"), found.get("Message"))))
            raise refused(service, reply, f"gives no key for the role {self.role}", said)
        return checked(
            service.address,
            found.get("AccessKeyId"),
            found.get("SecretAccessKey"),
            found.get("SessionToken"),
            found.get("Expiration"),
        )

    def __str__(self) -> str:
        return f"of the role {self.role}, by the token in {self.token_file}"


@dataclass(frozen=True, slots=True, repr=False)
class ContainerKey(KeySource):
    """A service for containers (ECS, EKS) gives the key. `token`, or the file that has it: to get in.

    Source: AWS, "Container credential provider".
    """

    kind: ClassVar[str] = "container"
    url: str
    token: str | None = None
    token_file: str | None = None

    def fetch(self) -> AwsCredentials:
        service = Service.parse(self.url, "the service of the container")
        token = self.token if self.token_file is None else _token_in(self.token_file)
        headers = {} if not token else {"Authorization": printable_token(service.address, token)}
        reply = ask(service, CONTAINER_TIMEOUT, headers=headers)
        if reply.status != 200:
            raise refused(service, reply, "gives no key to this container")
        return parsed(service.address, reply.body, "Token")

    def __str__(self) -> str:
        return f"of this container, by {Service.parse(self.url, '').address}"


@dataclass(frozen=True, slots=True)
class InstanceKey(KeySource):
    """The metadata service of a machine at AWS gives the key of the machine's role (IMDSv2).

    `looked`: where there was no key before this was tried, for the error. Source: AWS, "Use the Instance
    Metadata Service to access instance metadata", and "Retrieve security credentials".
    """

    kind: ClassVar[str] = "instance"
    url: str
    looked: str

    def fetch(self) -> AwsCredentials:
        try:
            headers = {"X-aws-ec2-metadata-token": self._token()}
            role = self._get("/latest/meta-data/iam/security-credentials/", headers)
            service = self._service("")
            if role.status not in (200, 404):
                raise refused(service, role, "does not name this machine's role")
            name = first_line(role.body).strip()
            if role.status == 404 or not name:
                raise AuthError(f"{self.looked}; this machine has no role; {ADVICE}")
            place = f"/latest/meta-data/iam/security-credentials/{quote(name, safe='')}"
            found = self._get(place, headers)
            if found.status != 200:
                raise refused(service, found, "gives no key of this machine's role")
            return parsed(service.address, found.body, "Token")
        except ValueError:
            raise AuthError(f"{self.looked}; the name of this machine's role is not text; {ADVICE}") from None

    def _token(self) -> str:
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_LIFETIME)}
        for left in reversed(range(INSTANCE_TRIES)):
            try:
                reply = ask(
                    self._service("/latest/api/token"), INSTANCE_TIMEOUT, method="PUT", headers=headers
                )
            except SourceError as error:
                if not left or isinstance(error, WrongServerError):
                    raise AuthError(
                        f"{self.looked}; no metadata service of AWS ({error}); {ADVICE}"
                    ) from None
            else:
                if reply.status != 200:
                    raise refused(self._service(""), reply, "gives no token", f"{self.looked}; {ADVICE}")
                return printable_token(self._service("").address, first_line(reply.body))
        raise AssertionError

    def _get(self, path: str, headers: Mapping[str, str]) -> Reply:
        return ask(self._service(path), INSTANCE_TIMEOUT, headers=headers)

    def _service(self, path: str) -> Service:
        return Service.parse(self.url.rstrip("/") + path, "AWS_EC2_METADATA_SERVICE_ENDPOINT")

    def __str__(self) -> str:
        return "of this machine's role, by the metadata service"


KINDS: Mapping[str, type[KeySource]] = {
    kind.kind: kind for kind in (NoKey, GivenKey, CommandKey, WebIdentityKey, ContainerKey, InstanceKey)
}

ADVICE = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give --aws-profile, --s3-config, or --anonymous for "
    "a public bucket"
)
"""What to do where there is no key."""


def dump_key(source: KeySource) -> Facts:
    """All of it, secrets included."""
    return {"kind": source.kind, "facts": source.dump()}


def load_key(facts: Facts) -> KeySource:
    """The inverse of `dump_key`."""
    return KINDS[facts["kind"]].load(facts["facts"])


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


def printable_token(place: str, token: str) -> str:
    """A token for a header. Raises AuthError."""
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable():
        raise AuthError(f"{place}: the token has characters that no token has; correct it")
    return token


def refused(service: Service, reply: Reply, what: str, said: str = "") -> SourceError:
    """The error for an answer that is not a key: `ConnectError` where it may pass."""
    words = f": {one_line(said, 500)}" if said else ""
    text = f"{service.address} {what} (status {reply.status}){words}"
    passing = reply.status in (408, 429) or reply.status >= 500
    return ConnectError(text) if passing else AuthError(f"{text}; check the role and who may use it")


def _token_in(file: str) -> str:
    try:
        token = first_line(read_file(file))
    except OSError as error:
        raise AuthError(f"{file}: {error.strerror}; check the file of the token") from None
    except ValueError as error:
        raise AuthError(f"{file}: {error}; check the file of the token") from None
    return printable_token(file, token)


def _elements(document: bytes) -> dict[str, str]:
    """The texts of an XML document by the names of their elements; empty for another document."""
    try:
        text = document.decode()  # another encoding could hide a document type
        if "<!" in text:  # which could define entities without end
            return {}
        root = ET.fromstring(text)  # noqa: S314 - bounded, and without entities
    except (UnicodeDecodeError, ET.ParseError):
        return {}
    return {each.tag.rpartition("}")[2]: each.text.strip() for each in root.iter() if each.text}
