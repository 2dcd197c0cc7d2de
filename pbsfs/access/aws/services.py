"""The services that give a key to a container or to a machine at AWS, without any setting by the user.

Synchronous, for worker threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import quote

from pbsfs.access.aws.ask import Reply, Service, ask
from pbsfs.access.aws.keys import ADVICE, KeySource, parsed
from pbsfs.access.aws.tokens import printable_token, refused, token_in
from pbsfs.access.credentials import first_line
from pbsfs.base.errors import AuthError, SourceError, WrongServerError
from pbsfs.sources.bucket.credentials import AwsCredentials

CONTAINER_TIMEOUT = 5.0

INSTANCE_TIMEOUT = 1.0
"""Seconds for an answer of the machine's metadata service, which is on the machine: the default of AWS's
tools. Where there is no such service, a try takes all of it."""

INSTANCE_TRIES = 2

TOKEN_LIFETIME = 300
"""Seconds for which the metadata service's own token is valid; pbsfs uses it at once."""


class NoServiceError(AuthError):
    """The metadata service does not answer: there is none, or the network fails for now. `problem`: how.

    The service itself can't tell which; `Renewed` can, as it knows whether the service gave a key before.
    """

    def __init__(self, message: str, problem: SourceError) -> None:
        super().__init__(message)
        self.problem = problem


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
        token = self.token if self.token_file is None else token_in(self.token_file)
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
                    text = f"{self.looked}; no metadata service of AWS ({error}); {ADVICE}"
                    raise NoServiceError(text, error) from None
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
