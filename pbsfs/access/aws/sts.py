"""AWS's token service (STS): it gives the key of a role.

Synchronous, for worker threads.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar
from urllib.parse import urlencode
from xml.etree import ElementTree as ET

from pbsfs.access.aws.ask import Reply, Route, Service, ask
from pbsfs.access.aws.keys import KeySource, checked
from pbsfs.access.aws.tokens import refused, token_in
from pbsfs.base.errors import AuthError
from pbsfs.sources.bucket.credentials import AwsCredentials
from pbsfs.sources.bucket.signing import signed_headers

STS_TIMEOUT = 15.0
"""Seconds for an answer."""

STS_VARIABLE = "AWS_ENDPOINT_URL_STS"

_FORM = "application/x-www-form-urlencoded"

_PASSING_CODES = ("Throttling", "ThrottlingException", "RequestLimitExceeded", "IDPCommunicationError")
"""Codes of what may pass, whatever the status. Source: AWS, "Common errors" of the STS API."""


@dataclass(frozen=True, slots=True, repr=False)
class WebIdentityKey(KeySource):
    """STS exchanges a token in a file for the key of a role: in Kubernetes, for example.

    `url`: of STS. Source: AWS, "AssumeRoleWithWebIdentity".
    """

    kind: ClassVar[str] = "web-identity"
    url: str
    role: str
    token_file: str
    session: str
    route: Route

    def fetch(self) -> AwsCredentials:
        token = token_in(self.token_file)
        service = Service.parse(self.url, STS_VARIABLE)
        parameters = {
            "Action": "AssumeRoleWithWebIdentity",
            "RoleArn": self.role,
            "RoleSessionName": self.session,
            "WebIdentityToken": token,
        }
        body = _body(parameters)
        return _key_of(_posted(service, {}, body, self.route), service, self.role)

    def __str__(self) -> str:
        return f"of the role {self.role}, by the token in {self.token_file}"


@dataclass(frozen=True, slots=True, repr=False)
class RoleKey(KeySource):
    """STS gives the key of a role for the key of another place, `source`.

    `url`, `region`: of STS. `session`: the name in AWS's logs. `duration`: seconds that the key is valid, or
    None for AWS's default. Source: AWS, "AssumeRole".
    """

    kind: ClassVar[str] = "role"
    url: str
    region: str
    role: str
    session: str
    source: KeySource
    external_id: str | None
    duration: int | None
    route: Route

    def fetch(self) -> AwsCredentials:
        key = self.source.fetch()
        if key is None:
            raise AuthError(f"the role {self.role}: it takes a key; name its source_profile")
        service = Service.parse(self.url, STS_VARIABLE)
        parameters = {"Action": "AssumeRole", "RoleArn": self.role, "RoleSessionName": self.session}
        if self.external_id is not None:
            parameters["ExternalId"] = self.external_id
        if self.duration is not None:
            parameters["DurationSeconds"] = str(self.duration)
        body = _body(parameters)
        path, _question, query = service.target.partition("?")
        headers = signed_headers(
            path,
            query,
            {"host": service.authority, "content-type": _FORM},
            key,
            region=self.region,
            now=time.time(),
            method="POST",
            service="sts",
            body=body,
        )
        return _key_of(_posted(service, headers, body, self.route), service, self.role)

    def __str__(self) -> str:
        return f"of the role {self.role}, by {self.source}"


def _body(parameters: Mapping[str, str]) -> bytes:
    return urlencode({"Version": "2011-06-15", **parameters}).encode()


def _posted(service: Service, headers: Mapping[str, str], body: bytes, route: Route) -> Reply:
    """The answer to a form. `headers`: of its signature; the connection has its own `host`."""
    more = {name: value for name, value in headers.items() if name != "host"}
    more["content-type"] = _FORM
    return ask(service, STS_TIMEOUT, method="POST", headers=more, body=body, route=route)


def _key_of(reply: Reply, service: Service, role: str) -> AwsCredentials:
    """The key in an answer of STS. Raises AuthError, ConnectError."""
    found = _elements(reply.body)
    if reply.status != 200:
        code = found.get("Code", "")
        said = ": ".join(filter(None, (code, found.get("Message"))))
        raise refused(
            service, reply, f"gives no key for the role {role}", said, may_pass=code in _PASSING_CODES
        )
    return checked(
        service.address,
        found.get("AccessKeyId"),
        found.get("SecretAccessKey"),
        found.get("SessionToken"),
        found.get("Expiration"),
    )


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
